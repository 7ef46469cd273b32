"""Weights & Biases, optional: offline by default, never an account needed. metrics.jsonl is always written as well."""

import secrets
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from switch_sae.checks import Settings


class WandbMode(Enum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass
class WandbConfig(Settings):
    prefix = "wandb."
    mode: WandbMode = WandbMode.offline
    """offline writes into the run folder and needs no account; `wandb sync` uploads it later."""
    project: str = "switch_sae"


def check_wandb(config: WandbConfig) -> None:
    """Finds out before any work is done whether a run could be logged.

    Raises ModuleNotFoundError when wandb is wanted but not installed, and ConnectionError when online mode has no account or no network.
    """
    if config.mode is WandbMode.disabled:
        return
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("wandb is not installed. Install it (pip install wandb) or run with wandb.mode=disabled.") from error
    if config.mode is WandbMode.online:
        try:
            wandb.login(verify=True)
        except Exception as error:  # wandb's own errors, and those of whatever it talks through: none of them is ours
            raise _no_wandb(config, error) from error


def _no_wandb(config: WandbConfig, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"wandb could not start in {config.mode.value} mode: {' '.join(str(error).split())} Log in (wandb login), or run with wandb.mode=offline or "
        "wandb.mode=disabled."
    )


class WandbLogger:
    """One wandb run, which a resumed training goes on with (`id`); several may be open at once, such as the members of a sweep (`group`).

    Raises as `check_wandb`.
    """

    def __init__(self, config: WandbConfig, folder: Path, run_config: dict[str, Any], run_id: str | None, group: str | None = None) -> None:
        self.id = run_id or secrets.token_hex(4)
        self._run = None
        if config.mode is WandbMode.disabled:
            return
        import wandb

        settings = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
        try:
            self._run = wandb.init(
                project=config.project, id=self.id, name=folder.name, dir=str(folder), mode=config.mode.value, config=run_config,
                resume="allow" if config.mode is WandbMode.online else None, settings=settings, group=group,
                reinit="create_new",
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise _no_wandb(config, error) from error

    def log(self, step: int, row: dict[str, float]) -> None:
        if self._run is not None:
            self._run.log(row, step=step)

    def finish(self, summary: dict[str, float] | None = None) -> None:
        if self._run is not None:
            for key, value in (summary or {}).items():
                self._run.summary[key] = value
            self._run.finish()
