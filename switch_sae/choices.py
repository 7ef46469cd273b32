"""A choice has one home: a table of classes by name, each with a nested `Config`, and the key that names them in files and on the command line."""

from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from typing import Any, Generic, TypeVar

from switch_sae.plain import from_plain, to_plain

T = TypeVar("T")


class Choice(dict[str, type[T]], Generic[T]):
    """Classes by key, such as SAES. Add an entry by adding a file and a line to the table.

    A config of one of them is saved as its fields and a tag, `{"architecture": "switch", "num_latents": ...}`: never an import path. An entry whose
    fields were others in an earlier version has a static method `upgrade` that takes saved fields of any version and returns today's.
    """

    def __init__(self, what: str, tag: str, entries: Mapping[str, type[T]]) -> None:
        """`what` names the choice in messages; `tag` is the key beside the fields."""
        super().__init__(entries)
        self.what, self.tag = what, tag

    def key_of(self, value: Any) -> str:
        """The key of an entry, of an instance of it or of its config, by exact class. Raises ValueError for anything else."""
        cls = value if isinstance(value, type) else type(value)
        for key, entry in self.items():
            if cls is entry or cls is vars(entry).get("Config"):
                return key
        raise ValueError(f"{cls.__qualname__} is no {self.what} of the table ({', '.join(self)}). Add a line for it.")

    def build(self, config: Any, *args: Any, **kwargs: Any) -> T:
        """An instance of the entry that a config belongs to."""
        return self[self.key_of(config)](config, *args, **kwargs)  # type: ignore[call-arg]

    def to_plain(self, config: Any) -> dict[str, Any]:
        """A config as JSON values, with its tag."""
        return {self.tag: self.key_of(config), **to_plain(config)}

    def from_plain(self, plain: Any) -> Any:
        """The config that `to_plain` wrote, in this version or an earlier one.

        Raises ValueError for a key or a field that this version does not know.
        """
        return self._typed(self.upgrade(plain))

    def upgrade(self, plain: Any) -> dict[str, Any]:
        """What an earlier version saved, as this one would have; raises ValueError for an unknown key."""
        values = self._tagged(plain)
        key = values.pop(self.tag, None)
        upgrade = getattr(self.entry(key), "upgrade", dict)
        return {self.tag: key, **upgrade(values)}

    def derive(self, base: Any, chosen: Mapping[str, Any], usual: Mapping[str, Any]) -> Any:
        """A config that has the fields `chosen` (plain; nested for choices inside; the tag chooses the entry), else `base`'s, else the usual ones.

        `base` may belong to another entry: what both have is shared, but an inner choice that is base's default becomes the entry's own default.
        Raises ValueError as `from_plain` does.
        """
        return self._typed(self._derived(base, self.key_of(base), chosen, usual))

    def _derived(self, base: Any, key: str, chosen: Any, usual: Mapping[str, Any]) -> dict[str, Any]:
        values = {self.tag: key, **self._tagged(chosen)}
        plain = {} if base is None else to_plain(base)
        for f in fields(self.config_of(values[self.tag])):
            if "choice" in f.metadata:
                choice, inner = f.metadata["choice"], getattr(base, f.name, None)
                own, theirs = (default_of(config, f.name, choice) for config in (self.config_of(values[self.tag]), type(base)))
                inner_key = own if inner is None or choice.key_of(inner) == theirs else choice.key_of(inner)
                values[f.name] = choice._derived(inner, inner_key, values.get(f.name, {}), usual)
            elif f.name not in values and (f.name in plain or f.name in usual):
                values[f.name] = plain.get(f.name, usual.get(f.name))
        return values

    def _tagged(self, plain: Any) -> dict[str, Any]:
        """A mapping as it is; a bare key is short for the entry's defaults."""
        if isinstance(plain, str):
            return {self.tag: plain}
        if not isinstance(plain, Mapping):
            raise ValueError(f"{plain!r} says no {self.what}. Write {{{self.tag}: KEY, ...}} with KEY one of {', '.join(self)}.")
        return dict(plain)

    def _typed(self, plain: dict[str, Any]) -> Any:
        return from_plain(self.config_of(plain.get(self.tag)), {key: value for key, value in plain.items() if key != self.tag})

    def config_of(self, key: Any) -> type[Any]:
        """The `Config` of an entry, which must be its own: an inherited one would be taken for its parent's, and built as that."""
        entry = self.entry(key)
        if "Config" not in vars(entry):
            raise ValueError(f"{entry.__qualname__} has no Config of its own. Nest one in it: @dataclass class Config(Parent.Config): pass.")
        config: type[Any] = vars(entry)["Config"]
        return config

    def entry(self, key: Any) -> type[T]:
        """The class of a key. Raises ValueError for one that this version does not know."""
        if key not in self:
            raise ValueError(f"unknown {self.what} {key!r}; this version knows {', '.join(self) or 'none'}.")
        return self[key]

    def field(self, key: str) -> Any:
        """A dataclass field that holds a config of this choice, by default `key`'s."""
        return field(default_factory=lambda: self.config_of(key)(), metadata={"choice": self})


def default_of(config: type[Any], name: str, choice: "Choice[Any]") -> str | None:
    """The key that a config's field of a choice has by default; None where it has no such field."""
    found = next((f for f in fields(config) if f.name == name), None) if is_dataclass(config) else None
    return None if found is None else choice.key_of(found.default_factory())  # type: ignore[operator]
