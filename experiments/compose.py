"""Composes Hydra's YAML into the typed `RunConfig`, for every command: the only place, with the commands, that knows Hydra."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from switch_sae.activations import SOURCES
from switch_sae.config import RunConfig
from switch_sae.models import SAES
from switch_sae.pipeline import Interrupted
from switch_sae.runs import RunError
from switch_sae.sweep import SweepConfig

USUAL_K = {"bundled": 16, "gpt2": 32, "synthetic": 8}
"""sae.k by model. Not in conf/model, because there it would reach architectures that have no k, and Hydra would refuse it."""
CONF = str(Path(__file__).resolve().parents[1] / "conf")


def register_schemas() -> None:
    """Makes the dataclasses Hydra's schema, so that a mistyped key or a wrong type is refused before anything runs."""
    store = ConfigStore.instance()
    store.store(name="base_run", node=RunConfig(source=MISSING, sae=MISSING))
    store.store(name="base_sweep", node=SweepConfig(source=MISSING, sae=MISSING))
    for group, table in (("source", SOURCES), ("sae", SAES)):
        for name, owner in table.items():
            store.store(group=group, name=f"base_{name}", node=owner.Config)
    for name, owner in SAES.items():
        if hasattr(owner.Config, "k"):
            for model, k in USUAL_K.items():
                store.store(group="k", name=f"{name}_{model}", node={"k": k}, package="sae")


def run_config(composed: DictConfig) -> RunConfig:
    """The plain typed config; relations between values are checked here, by the dataclasses."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    return config


def sweep_config(composed: DictConfig) -> SweepConfig:
    """As `run_config`, for a sweep."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, SweepConfig)
    return config


@contextmanager
def clear_errors() -> Iterator[None]:
    """One message instead of a traceback for mistakes a user can mend; 128 + signal as exit status after an interruption."""
    try:
        yield
    except Interrupted as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        print("\nstopped before training began; nothing was saved.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        raise  # `| head` closed our output: nothing that a message could tell
    except (ValueError, FileNotFoundError, ConnectionError, FloatingPointError, ImportError, RunError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(1)


def command(main: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """A Hydra command whose mistakes are told in one message."""

    def checked(composed: DictConfig) -> None:
        with clear_errors():
            main(composed)

    return checked
