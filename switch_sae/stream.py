"""A source of activations with its first rows and the device that trains on it: what all SAEs of a group share."""

from dataclasses import replace
from typing import Any

import torch

from switch_kernels import Execution
from switch_sae.activations import ActivationSource, build_source
from switch_sae.countdown import duration
from switch_sae.models import SparseAutoencoder
from switch_sae.rows import NormLimit, Rows
from switch_sae.training import Trainer, TrainerConfig, prepare


class Stream:
    """Batches for training, after the calibration rows, which set scales, the biases' start and the PCA control and are not trained on."""

    def __init__(
        self, source_config: Any, batch_size: int, rows: int, calibration_rows: int, device: str, execution: Execution, outlier_factor: float | None
    ) -> None:
        """`rows` is how many rows the job will read, calibration included; `outlier_factor` as in `RunConfig`."""
        self.source_config, self.batch_size, self.device, self.execution = source_config, batch_size, device, execution
        self.outlier_factor, self._rows = outlier_factor, rows
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # graphs and kernels go to the current device
        self.source: ActivationSource = build_source(on_device(source_config, device), batch_size, rows)
        try:
            first = first_rows(self.source, calibration_rows)
            self.limit = None if outlier_factor is None else NormLimit.of(first, outlier_factor)
            """Rows of a larger norm do not train."""
            self.calibration = first if self.limit is None else self.limit.inliers(first)
            """Without outliers."""
            self._outliers = len(first) - len(self.calibration), len(first)
            self.start = self.source.state_dict()
            """Where training begins."""
        except BaseException:
            self.source.close()
            raise

    def trainer(
        self, sae: SparseAutoencoder, config: TrainerConfig, total_steps: int, normalize_activations: bool, prepared: bool = False
    ) -> Trainer:
        """A trainer for an SAE, which moves to the device and, unless it is `prepared`, gets its scale and biases from the calibration rows.

        Raises ValueError for a transcoder of rows without targets, and for an autoencoder of rows with them.
        """
        has_target, name = self.calibration.target_TD is not self.calibration.x_TD, type(sae).__name__
        if sae.is_transcoder and not has_target:
            raise ValueError(
                f"{name} writes to another hook than it reads, and these activations have no targets. Set source.target_hook, such as "
                "source.hook=blocks.2.mlp.hook_in source.target_hook=blocks.2.hook_mlp_out."
            )
        if has_target and not sae.is_transcoder:
            raise ValueError(
                f"{name} reconstructs what it reads, but source.target_hook is set. Use sae=transcoder or sae=switch_transcoder, or target_hook=null."
            )
        if sae.d_out != self.calibration.target_TD.shape[1]:
            size = self.calibration.target_TD.shape[1]
            raise ValueError(f"the target hook has size {size}, this {name} writes {sae.d_out}. Set sae.d_out={size}.")
        sae.to(self.device).train()
        if not prepared:
            prepare(sae, self.calibration, normalize_activations, None)
        return Trainer(sae, config, total_steps, self.batch_size, self.execution)

    def batches(self) -> "Batches":
        """The batches of one training, from where the source stands."""
        return Batches(self.source, self.limit)

    def rewind(self) -> None:
        """Goes to where training begins, unless it is there: going anew would make the first block of activations once more."""
        if self.source.state_dict() != self.start:
            self.source.load_state_dict(self.start)

    def describe(self) -> str:
        """What the activations are, how many of the first are outliers, and how long those of the run will take."""
        about = self.source.describe()
        told = {key: about[key] for key in ("model", "hook", "target_hook", "context_length") if key in about} | {"d_in": self.source.d_in}
        told |= {name: about[key] for key, name in (("d_out", "d_out"), ("module_flops", "FLOPs of what lies between")) if about.get(key)}
        told |= {f"text {key}": about["text"][key] for key in ("kind", "documents", "rows_per_epoch") if key in about.get("text", {})}
        words = (f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in told.items())
        lines = [f"activations: {about['source']}, {', '.join(words)}"]
        if self.limit is not None:
            count, first = self._outliers
            lines.append(
                f"outliers: {count:,} of the first {first:,} rows ({count / first:.2%}) lie beyond {self.outlier_factor:g} median norms "
                f"({self.limit.x:.4g}); such rows set no scale and do not train (outlier_factor=null keeps them)"
            )
        if self.source.rate is not None:
            lines.append(
                f"activations: {self.source.rate:,.0f} rows/s; the {self._rows:,} of this run take about {duration(self._rows / self.source.rate)}"
            )
        return "\n".join(lines)

    def close(self) -> None:
        self.source.close()


class Batches:
    """A source's batches without outliers: rows beyond the limit are left out, and the batch is filled up from the next one.

    A stand-in for the source in `training.train`. Where there are no outliers, its batches are the source's own, bit for bit.
    """

    def __init__(self, source: ActivationSource, limit: NormLimit | None) -> None:
        """`limit` None leaves nothing out."""
        self.source, self.limit = source, limit
        self.rows = self.left_out = 0
        """How many rows were looked at, and how many of them were outliers."""
        self._rest: Rows | None = None
        self._before: dict[str, Any] = {}
        """Where the source stood before it gave the batch that `_rest` is the end of, whose first `_taken` inliers are used up."""
        self._taken = self._size = 0

    def __next__(self) -> Rows:
        if self.limit is None:
            return next(self.source)
        parts: list[Rows] = []
        while not parts or (missing := self._size - sum(map(len, parts))):
            rest = self._draw() if self._rest is None else self._rest
            part = rest[:missing] if parts and len(rest) > missing else rest
            parts.append(part)
            self._taken += len(part)
            self._rest = rest[len(part) :] if len(part) < len(rest) else None
        return Rows.cat(parts)

    def _draw(self) -> Rows:
        """The inliers of the source's next batch. Raises ValueError where most rows are outliers: they are not like those that set the limit."""
        assert self.limit is not None
        self._before, self._taken = self.source.state_dict(), 0
        rows = next(self.source)
        inliers = self.limit.inliers(rows)
        self._size = len(rows)
        self.rows += len(rows)
        self.left_out += len(rows) - len(inliers)
        if 2 * self.left_out > self.rows > 10 * len(rows):
            raise ValueError(
                f"{self.left_out:,} of {self.rows:,} training rows have a norm above {self.limit.x:.4g} and would be left out: they are not like the "
                "calibration rows, which set this limit. Raise calibration_rows, or train on all rows with outlier_factor=null."
            )
        return inliers

    def state_dict(self) -> dict[str, Any]:
        """The source's state, and how far into its next batch the rows are used up."""
        if self._rest is None:
            return {**self.source.state_dict(), "outliers": {"rows": self.rows, "left_out": self.left_out, "taken": 0}}
        return {**self._before, "outliers": {"rows": self.rows, "left_out": self.left_out, "taken": self._taken}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also of an earlier version, or of the source alone. Raises as the source does."""
        counted = state.get("outliers", {"rows": 0, "left_out": 0, "taken": 0})
        self.source.load_state_dict({key: value for key, value in state.items() if key != "outliers"})
        self._rest = None
        if counted["taken"] and self.limit is not None:
            self._rest = self._draw()[counted["taken"] :]
            self._taken = counted["taken"]
        self.rows, self.left_out = counted["rows"], counted["left_out"]


def first_rows(source: ActivationSource, rows: int) -> Rows:
    """At least so many rows, in whole batches."""
    batches: list[Rows] = []
    while sum(map(len, batches)) < rows:
        batches.append(next(source))
    return Rows.cat(batches)


def on_device(source_config: Any, device: str) -> Any:
    """The source's config with the run's device, unless it names one of its own."""
    return replace(source_config, device=device) if getattr(source_config, "device", device) is None else source_config


def resolve_device(name: str) -> tuple[str, str]:
    """(device, reason). Raises ValueError for a device that is not there."""
    if name == "auto":
        return ("cuda", "a GPU is available") if torch.cuda.is_available() else ("cpu", "no GPU is available")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name}, but torch {torch.__version__} sees no GPU. Use device=cpu, or install a CUDA build of torch.")
    return name, "as configured"
