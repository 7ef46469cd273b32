"""The configuration of one run: the dataclasses of every room, composed. They are the schema, the defaults and the validation."""

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from switch_kernels import Backend, Precision
from switch_sae.activations import SOURCES
from switch_sae.models import SwitchSAE
from switch_sae.plain import from_plain, to_plain
from switch_sae.runs import architecture_of, sae_config
from switch_sae.training import TrainerConfig
from switch_sae.wandb_logger import WandbConfig


class Baseline(Enum):
    """What trains beside the main SAE, on the same batches."""

    flop_matched = "flop_matched"
    """Dense TopK of the width that costs as many FLOPs per token, router included."""
    width_matched = "width_matched"
    """Dense TopK with as many latents in all."""
    frozen_router = "frozen_router"
    """The same Switch SAE with its router frozen at its random start."""


@dataclass
class EvaluationConfig:
    rows: int = 100_000
    """Held-out activations that every SAE is scored on."""
    downstream_contexts: int = 128
    """Contexts on which the language model runs with reconstructions spliced in; 0 leaves out delta CE and KL."""
    bootstrap: int = 1000
    """Resamples of documents for the 95 % intervals."""

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("downstream_contexts", 0), ("bootstrap", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"evaluation.{name}={getattr(self, name)} must be at least {least}.")


@dataclass
class RunConfig:
    """Everything one training run needs."""

    source: Any = field(default_factory=SOURCES["language_model"].Config)
    """The `Config` of one of `SOURCES`."""
    sae: Any = field(default_factory=SwitchSAE.Config)
    """The `Config` of one of `SAES`."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    baselines: list[Baseline] = field(default_factory=list)
    normalize_activations: bool = True
    """Scale activations once so that their mean squared norm is D; the factor is saved with the SAE."""
    calibration_rows: int = 32_768
    """First rows of the stream, which set the scale, the biases' start and the PCA control; they are not trained on."""
    tokens: int = 2_500_000
    """Activations to train on."""
    batch_size: int = 2048
    seed: int = 0
    device: str = "auto"
    """auto takes a GPU where there is one."""
    backend: Backend = Backend.auto
    """Who computes training steps: auto takes Triton on a GPU that it can serve and PyTorch elsewhere, and prints why. Evaluation is PyTorch in
    float32 always."""
    precision: Precision = Precision.auto
    """Operands of matrix products in training; weights, sums, router and losses are float32. auto: bf16 with Triton, float32 with PyTorch."""
    threads: int = 0
    """CPU threads for torch; 0 leaves torch's choice. A resume is exact only with the same number."""
    log_every: int = 20
    """Steps between rows of metrics.jsonl; 0 never logs. Training is the same either way."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0 saves only at the end and on Ctrl-C."""
    runs: str = "runs"
    """Where run folders go."""
    name: str | None = None
    """Name in the run folder's name; None is made from the architecture."""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("batch_size", 1), ("calibration_rows", 2), ("log_every", 0), ("checkpoint_every", 0), ("threads", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.tokens < self.batch_size:
            raise ValueError(f"tokens={self.tokens} is less than one batch (batch_size={self.batch_size}). Raise tokens or lower batch_size.")
        if len(set(self.baselines)) != len(self.baselines):
            raise ValueError(f"baselines {[b.name for b in self.baselines]} name one twice.")
        if self.baselines and architecture_of(self.sae) != "switch":
            raise ValueError(
                f"baselines are derived from a Switch SAE; this run trains {architecture_of(self.sae)!r}. Use baselines=[] or sae=switch."
            )

    @property
    def total_steps(self) -> int:
        return self.tokens // self.batch_size

    @property
    def rows_read(self) -> int:
        """Rows of the stream that the run takes, in whole batches: calibration, then training."""
        return (-(-self.calibration_rows // self.batch_size) + self.total_steps) * self.batch_size


def config_to_plain(config: RunConfig) -> dict[str, Any]:
    """The config as JSON values; tables are named by their keys (`architecture: switch`), never by import paths."""
    plain = {f.name: to_plain(getattr(config, f.name)) for f in fields(config)}
    plain["sae"] = {"architecture": architecture_of(config.sae), **plain["sae"]}
    kind = next(name for name, source in SOURCES.items() if type(config.source) is source.Config)
    plain["source"] = {"kind": kind, **plain["source"]}
    return plain


def config_from_plain(plain: dict[str, Any]) -> RunConfig:
    """The inverse of `config_to_plain`. Raises ValueError for names that this version does not know."""
    values = dict(plain)
    source = dict(values.pop("source"))
    kind = source.pop("kind", None)
    if kind not in SOURCES:
        raise ValueError(f"unknown source of activations {kind!r}; this version knows {', '.join(SOURCES)}.")
    sae = sae_config(values.pop("sae"))
    return from_plain(RunConfig, values, source=from_plain(SOURCES[kind].Config, source), sae=sae)
