"""Composes Hydra's YAML into the typed `RunConfig`, for every command: the only place, with the commands, that knows Hydra."""

import difflib
import json
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from switch_sae.activations import SOURCES
from switch_sae.choices import Choice
from switch_sae.config import RunConfig, check_baselines
from switch_sae.models import ROUTERS, SAES
from switch_sae.plain import to_plain
from switch_sae.sweep import SweepConfig

_MOST = 2**63 - 1
CONF = str(Path(__file__).resolve().parents[1] / "conf")
OmegaConf.register_new_resolver("user_folder", lambda path: str(Path(path).expanduser()), replace=True)  # here: workers import this module, no more


@dataclass
class Run(RunConfig):
    """A run's settings, and what a model or a preset finds usual for those architectures that have such a setting."""

    usual: dict[str, Any] = field(default_factory=dict)


def register_schemas() -> None:
    """Makes the dataclasses Hydra's schema, so that a mistyped key or a wrong type is refused before anything runs; tables become Hydra's groups."""
    store = ConfigStore.instance()
    for name, schema in (("base_run", Run), ("base_sweep", SweepConfig)):
        node = OmegaConf.structured(schema)
        node.source = node.sae = MISSING
        store.store(name=name, node=node)
    files = (file for group in ("model", "preset") for file in Path(CONF, group).glob("*.yaml"))
    usual = {key for file in files for key in OmegaConf.load(file).get("usual", {})}
    _register(store, "source", SOURCES, set())
    _register(store, "sae", SAES, usual)


def _register(store: ConfigStore, group: str, table: Choice[Any], usual: set[str]) -> None:
    """One option of a group for each entry of a table; choices inside an entry become groups below it (`sae/router=sigmoid`)."""
    for name in table:
        config = table.config_of(name)
        node, inner = OmegaConf.structured(config), []
        for f in fields(config):
            if "choice" in f.metadata:
                choice, node[f.name] = f.metadata["choice"], MISSING
                _register(store, f"{group}/{f.name}", choice, usual)
                inner.append({f.name: choice.key_of(f.default_factory())})
            elif f.name in usual:
                default = to_plain(getattr(config(), f.name))
                # k has no default that fits a model whose file does not name one.
                OmegaConf.update(node, f.name, "${usual.k}" if f.name == "k" else f"${{oc.select:usual.{f.name},{json.dumps(default)}}}")
        store.store(group=group, name=f"base_{name}", node=node)
        store.store(group=group, name=name, node={"defaults": [f"base_{name}", *inner, "_self_"]})


def run_config(composed: DictConfig) -> RunConfig:
    """The plain typed config; relations between values are checked here, by the dataclasses."""
    config = _object(composed)
    assert isinstance(config, RunConfig)
    plain = RunConfig(**{f.name: getattr(config, f.name) for f in fields(RunConfig)})
    check_baselines(plain)
    return plain


def sweep_config(composed: DictConfig) -> SweepConfig:
    """As `run_config`, for a sweep."""
    config = _object(composed)
    assert isinstance(config, SweepConfig)
    return config


def _object(composed: DictConfig) -> Any:
    """Typed, and nothing left out: Hydra lets `+key` add what no schema has."""
    _refuse_unknown(composed)
    known = {f.name for table in (SAES, ROUTERS) for key in table for f in fields(table.config_of(key))}
    if unknown := sorted(set(composed.usual) - known):
        raise ValueError(f"usual: no architecture and no router has a setting {', '.join(unknown)}.")
    try:
        return OmegaConf.to_object(composed)
    except InterpolationKeyError as error:
        raise ValueError(
            f"{error.full_key} is set by nothing: conf/model/MODEL.yaml should say `usual: {{k: ...}}`, or give {error.full_key}=..."
        ) from error


def _refuse_beyond_64_bits(key: str, node: Any) -> None:
    value = None if node is None or node._is_missing() or node._is_interpolation() else node._value()
    if isinstance(value, int) and abs(value) > _MOST:
        raise ValueError(f"{key}={value} is too large: whole numbers are at most {_MOST} (64 bits).")


def _refuse_unknown(node: DictConfig, path: str = "") -> None:
    schema = OmegaConf.get_type(node)
    if is_dataclass(schema) and (unknown := sorted({str(key) for key in node} - {f.name for f in fields(schema)})):
        names = [f.name for f in fields(schema)]
        close = [path + name for key in unknown for name in difflib.get_close_matches(key, names, 3)]
        raise ValueError(
            f"there are no settings {', '.join(path + key for key in unknown)}; it has {', '.join(names)}."
            + (f" Close: {', '.join(close)}." if close else "")
        )
    for key in node:
        _refuse_beyond_64_bits(f"{path}{key}", node._get_node(key))
        if not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(below := node._get_node(key)) and below._value() is not None:
            _refuse_unknown(below, f"{path}{key}.")


def taken_from_bundled(composed: DictConfig) -> str | None:
    """One line about settings that suit the bundled model where another one was asked for without a file of conf/model; None elsewhere."""
    model = OmegaConf.select(composed, "source.model")
    if model in (None, "bundled") or not HydraConfig.initialized() or HydraConfig.get().runtime.choices.get("model") != "bundled":
        return None
    bundled = OmegaConf.load(Path(CONF, "model", "bundled.yaml"))
    keys = ("source.hook", "source.text.kind", "sae.num_latents", "trainer.lr", "tokens", "batch_size", "usual.k")
    wanted = {key: OmegaConf.select(bundled, key, default="stdlib") for key in keys}  # its text is the default one
    found = {key: OmegaConf.select(composed, key) for key in keys}
    same = [f"{key}={wanted[key]}" for key in keys if getattr(found[key], "name", found[key]) == wanted[key]]
    return f"settings of the bundled model are used for {model!r}: {', '.join(same)}. Give what suits it, or a file of conf/model." if same else None
