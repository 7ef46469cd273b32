"""The configuration of one run: the dataclasses of every room, composed. They are the schema, the defaults and the validation."""

from dataclasses import dataclass, field
from typing import Any

from switch_kernels import Backend, Precision
from switch_sae.activations import SOURCES
from switch_sae.checks import Settings, all_at_least
from switch_sae.models import SAES
from switch_sae.models.baselines import Baseline, why_no_baseline
from switch_sae.models.inference import Inference
from switch_sae.plain import from_plain, to_plain
from switch_sae.rows import OUTLIER_FACTOR
from switch_sae.training import TrainerConfig
from switch_sae.wandb_logger import WandbConfig

BEFORE: dict[str, Any] = {"outlier_factor": None}
"""What settings meant in runs that were saved before they existed."""

HALF = "half of the documents"
"""Where results say which half of the held-out documents they are from; absent where they are from all of them."""


@dataclass
class EvaluationConfig(Settings):
    prefix = "evaluation."
    rows: int = 100_000
    """Held-out activations that every SAE is scored on."""
    downstream_contexts: int = 128
    """Contexts on which the language model runs with reconstructions spliced in; 0 leaves out delta CE and KL."""
    bootstrap: int = 1000
    """Resamples of documents for the 95 % intervals."""
    probes: bool = True
    """Whether trained SAEs are also run again for stability, meaning and other measures of `PROBES`: some seconds to a minute each."""
    inferences: list[Inference] = field(default_factory=list)
    """Further ways of inference under which every trained SAE is scored, with the same weights, beside its own."""
    calibrate: bool = False
    """One half of the held-out documents sets the thresholds of SAEs that have one, to a mean L0 of k under the inference that they are scored with,
    and everything is reported on the other half, of every SAE. Otherwise thresholds are as trained, and all held-out rows are reported."""

    def __post_init__(self) -> None:
        all_at_least(self, "evaluation.", rows=1, downstream_contexts=0, bootstrap=0)
        if len(set(self.inferences)) != len(self.inferences):
            raise ValueError(f"evaluation.inferences={[i.name for i in self.inferences]} names one twice. Name each once.")


@dataclass
class RunConfig(Settings):
    """Everything one training run needs."""

    source: Any = SOURCES.field("language_model")
    """The `Config` of one of `SOURCES`."""
    sae: Any = SAES.field("switch")
    """The `Config` of one of `SAES`."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    baselines: list[Baseline] | None = None
    """What trains beside the SAE, on the same batches; null is what the architecture suggests (`usual_baselines`)."""
    normalize_activations: bool = True
    """Scale activations once so that their mean squared norm is D; the factor is saved with the SAE."""
    outlier_factor: float | None = OUTLIER_FACTOR
    """Rows whose norm exceeds so many median norms of the calibration rows do not train and set no scale; null keeps all rows. They are evaluated,
    apart from the others."""
    calibration_rows: int = 32_768
    """First rows of the stream, which set the scale, the biases' start and the PCA control; they are not trained on."""
    tokens: int = 2_500_000
    """Activations to train on."""
    batch_size: int = 2048
    start_from: str | None = None
    """A run folder, model.safetensors, or checkpoint in one of `FORMATS`: an SAE of the same architecture and sizes, whose weights and scale the main
    SAE starts from, with fresh moments and a whole schedule of its own. null starts anew from the seed. `seed` then decides nothing of the weights;
    give another `source.seed` to see the rows in another order."""
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
        if self.outlier_factor is not None and not self.outlier_factor > 1:
            raise ValueError(f"outlier_factor={self.outlier_factor} must be above 1, such as 10 median norms, or null to leave no row out.")
        all_at_least(self, tokens=1, batch_size=1, calibration_rows=2, log_every=0, checkpoint_every=0, threads=0)
        if self.tokens < self.batch_size:
            raise ValueError(f"tokens={self.tokens} is less than one batch (batch_size={self.batch_size}). Raise tokens or lower batch_size.")

    @property
    def total_steps(self) -> int:
        return self.tokens // self.batch_size

    @property
    def rows_read(self) -> int:
        """Rows of the stream that the run takes, in whole batches: calibration, then training."""
        return (-(-self.calibration_rows // self.batch_size) + self.total_steps) * self.batch_size


def check_baselines(config: RunConfig) -> None:
    """Raises ValueError for baselines that a new run cannot have; what an earlier version trained still loads."""
    baselines = config.baselines or []
    if len(set(baselines)) != len(baselines):
        raise ValueError(f"baselines {[b.name for b in baselines]} name one twice.")
    for baseline in baselines:
        if why := why_no_baseline(config.sae, baseline):
            raise ValueError(f"baselines: there is no {baseline.name} for this SAE: {why}. Leave it out, or use baselines=[].")


def config_to_plain(config: RunConfig) -> dict[str, Any]:
    """The config as JSON values; entries of tables are named by their keys (`architecture: switch`), never by import paths."""
    return dict(to_plain(config))


def config_from_plain(plain: dict[str, Any]) -> RunConfig:
    """The inverse of `config_to_plain`, in any version. Raises ValueError for names that this version does not know."""
    config: RunConfig = from_plain(RunConfig, {**BEFORE, **plain})
    return config
