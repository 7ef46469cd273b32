"""Settings as people type them: what Hydra's grammar is too narrow for is made readable, and its errors are told in the project's own voice."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from decimal import Decimal
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException

from switch_sae.config import RunConfig
from switch_sae.invocation import invocation
from switch_sae.sweep import SweepConfig

from .compose import CONF

_SCHEMA: dict[str, type] = {"train": RunConfig, "sweep": SweepConfig}
_GROUPS = ("sae/router", "sae", "source", "model", "preset", "experiment")
_WHOLE = re.compile(r"(?<![\w.+\-])[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?(?![\w.])")
_SWEPT = {"sae.num_experts": ("EXPERTS", "sweep.experts"), "sae.k": ("K", "sweep.k")}
"""Settings of a run that a sweep takes several of: make's variable, and the sweep's setting."""
_PLACES = 5


@cache
def settings(name: str) -> dict[str, Any]:
    """The type hint of every setting that the command `name` can have, whichever entries of tables are chosen; of several, the first entry's."""
    return {key: hint for key, hint in reversed(list(_settings(_SCHEMA[name])))}


def _settings(cls: type, above: str = "") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(cls)
    for f in fields(cls):
        key, hint = above + f.name, hints[f.name]
        yield key, hint
        if "choice" in f.metadata:
            for entry in f.metadata["choice"]:
                yield from _settings(f.metadata["choice"].config_of(entry), f"{key}.")
        elif is_dataclass(hint):
            yield from _settings(hint, f"{key}.")  # type: ignore[arg-type]


def readable(words: Iterable[str], name: str) -> list[str]:
    """The words of a command line as Hydra can read them: `tokens=1e5` is the whole number that it is, and a value that Hydra's grammar cannot read
    as anything, such as `runs=~/sae` or `name=é`, is text."""
    return [_readable(word, name) for word in words]


def _readable(word: str, name: str) -> str:
    key, equals, value = word.partition("=")
    if not equals or word.startswith("-"):
        return word
    if int in _parts(settings(name).get(key.lstrip("+~"))):
        value = _WHOLE.sub(_whole, value)
    word = f"{key}={value}"
    if re.search(r"""['"\[\]{}(),$\\]""", value) is None:
        try:
            OverridesParser.create().parse_override(word)
        except HydraException:
            return f"{key}='{value}'"
    return word


def swept(words: Iterable[str]) -> set[str]:
    """The settings of which a multirun takes several values."""
    parser = OverridesParser.create()
    overrides = parser.parse_overrides([word for word in words if "=" in word and not word.startswith("-")])
    return {override.get_key_element() for override in overrides if override.is_sweep_override()}


def _whole(number: re.Match[str]) -> str:
    value = Decimal(number[0])
    is_whole = value.adjusted() < 100 and value == value.to_integral_value()
    return str(int(value)) if is_whole else number[0]


def _parts(hint: Any) -> set[Any]:
    """A hint and, of a union or a list, all that it is made of."""
    return {hint} if get_origin(hint) is None else set().union(*map(_parts, get_args(hint)))


def expected(hint: Any) -> str:
    """What values of a type hint look like, in words."""
    parts, is_list = _parts(hint), get_origin(hint) is list or any(get_origin(part) is list for part in get_args(hint))
    (kind,) = parts - {type(None)} if len(parts - {type(None)}) == 1 else (Any,)
    if isinstance(kind, type) and issubclass(kind, Enum):
        what = f"one of {', '.join(kind.__members__)}"
    elif is_dataclass(kind) or kind is Any:
        what = "several settings, each of which is set by itself with a dot"
    else:
        what = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))
    return (f"a list in brackets, [a,b], and each entry {what}" if is_list else what) + (" (or null)" if type(None) in parts else "")


def close(key: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that somebody who typed `key` may have meant: by the whole name, then by its last part, wherever it is."""
    known = list(known)
    last = key.rpartition(".")[2]
    there = [other for other in known if other.rpartition(".")[2] == last]
    alike = difflib.get_close_matches(key, known, _PLACES, 0.8)
    names = {other.rpartition(".")[2]: other for other in reversed(known)}
    parts = [names[name] for name in difflib.get_close_matches(last, names, 2, 0.75)]
    return list(dict.fromkeys([*there, *alike, *parts]))[:_PLACES]


def options(group: str, name: str) -> list[str]:
    """What a group offers to the command `name`, folders inside it included; names that begin with base_ are our schemas."""
    files = [str(path.relative_to(Path(CONF, group)).with_suffix("")) for path in sorted(Path(CONF, group).rglob("*.yaml"))]
    store = ConfigStore.instance()
    table = [option.removesuffix(".yaml") for option in store.list(group) if option.endswith(".yaml")] if group.split("/")[0] in store.repo else []
    own = {"train": "run/", "sweep": "sweep/"}[name] if group == "experiment" else ""
    return [option for option in sorted({*files, *table}) if not option.startswith("base_") and option.startswith(own)]


def explained(error: Exception, words: Sequence[str], name: str) -> str:
    """One message (value, rule, fix) for an error of Hydra's or OmegaConf's about the command `name` with these settings."""
    text, cause = str(error).strip(), error.__cause__
    for word in words:
        other = "sweep" if name == "train" else "train"
        experiment = word.removeprefix("experiment=")
        if experiment != word and experiment in options("experiment", other):
            return f"{word} is for another command: {invocation(other, word)}"
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_option(error, name)
    if ambiguous := re.match(r"Ambiguous value for argument '(.*)'\n", text):
        return _several(ambiguous[1], name)
    if there := re.match(r"Could not append to config. An item is already at '(.*?)'", text):
        return f"{there[1]} is a setting already, so it takes no +: write {there[1]}=VALUE."
    if missing := re.match(r"Could not (?:override|delete from config\.) '(.*?)'", text):
        return _no_setting(missing[1], getattr(cause, "parent_node", None), name)
    place = re.match(r"In '(.*?)'", text)
    about = f"{text}\n{cause or ''}"
    if full := re.search(r"full_key: (\S+)", about):
        key = re.sub(r"\[\d+\]", "", full[1])
        word = next((word for word in reversed(words) if word.lstrip("+").startswith(f"{key}=")), "")
        if key in settings(name):
            where = f"conf/{place[1]}.yaml: " if place else ""
            return f"{where}{word or key}: it must be {expected(settings(name)[key])}."
        if "not in" in about:
            return (f"conf/{place[1]}.yaml: " if place else "") + _no_setting(key, None, name)
    return " ".join(line.strip() for line in about.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line)


def _unreadable(word: str) -> str:
    if "=" not in word:
        return f"{word!r} is no setting: settings are KEY=VALUE. A value with spaces needs quotes around it: 'KEY=some text'."
    return f"{word}: its value cannot be read. Is a bracket or a quote left open? Text that holds some needs quotes: 'KEY=\"a, b\"'."


def _no_option(error: MissingConfigException, name: str) -> str:
    path = error.missing_cfg_file or ""
    group = next((group for group in _GROUPS if path.startswith(f"{group}/")), path.rpartition("/")[0])
    option = path.removeprefix(f"{group}/")
    known = options(group, name) if group in _GROUPS else [known for known in error.options or () if not known.startswith("base_")]
    alike = difflib.get_close_matches(option, known, 3, 0.6)
    told = f"there is no {group}={option}." + (f" Close to it: {', '.join(f'{group}={other}' for other in alike)}." if alike else "")
    told += f" {group} is one of {', '.join(known)}." if known else ""
    if group == "model":
        train = invocation("train", "source.model=...", make="MODEL=...")
        told += f" A language model by its folder or its name on the hub is source.model=... ({train} takes either)."
    if group == "hydra/launcher":
        told += " joblib and submitit come with pip install 'switch-sae[sweep]', Ray with 'switch-sae[ray]'."
    return told


def _several(word: str, name: str) -> str:
    key, _, value = word.partition("=")
    if name == "sweep" and get_origin(settings(name).get(key)) is list:
        return f"{word}: several values are a list: '{key}=[{value}]'."
    if key in ("seed", "sweep.seeds"):
        count = len(value.split(","))
        sweep = invocation("sweep", f"sweep.seeds={count}", make=f"SEEDS={count}")
        fix = f"For {count} seeds of every SAE: {sweep} (sweep.seeds; they are counted from seed)."
    elif key in _SWEPT:
        variable, setting = _SWEPT[key]
        sweep = invocation("sweep", f"{setting}=[{value}]", make=f"{variable}={value}")
        fix = f"For several SAEs from one pass: {sweep} ({setting})."
    else:
        fix = "For several SAEs from one pass, name it in a grid of a sweep (docs/sweeps.md)."
    return f"{word}: it takes one value. {fix}" + (f" For a run of its own each: {invocation(name, '--multirun', word)}" if name == "train" else "")


def _no_setting(key: str, node: Any, name: str) -> str:
    if "/" in key:
        return f"there is no group {key}; groups are {', '.join(sorted(_GROUPS))}."
    if name == "train" and key in settings("sweep"):
        return f"{key} is a setting of a sweep: {invocation('sweep', f'{key}=...')}"
    above, dot, last = key.rpartition(".")
    here = [f"{above}.{known}" if above else str(known) for known in node] if hasattr(node, "keys") else []
    here = [known for known in here if known not in ("hydra", "usual")] if key.partition(".")[0] != "hydra" else here
    names = [known.rpartition(".")[2] for known in here]
    told = f"there is no setting {key}"
    if key in settings(name):  # of another architecture, router or source
        told += f" in the chosen {above}"
    elif alike := close(key, settings(name)) or [above + dot + near for near in difflib.get_close_matches(last, names, _PLACES, 0.6)]:
        return f"{told}. Close to it: {', '.join(alike)}."
    return f"{told}. {'There are ' + ', '.join(names) + '.' if names else 'Every setting: ' + invocation(name, '--cfg', 'job')}"
