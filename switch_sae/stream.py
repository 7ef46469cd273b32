"""A source of activations with its first rows and the device that trains on it: what all SAEs of a group share."""

from dataclasses import replace
from typing import Any

import torch

from switch_kernels import Execution
from switch_sae.activations import ActivationSource, build_source
from switch_sae.models import SparseAutoencoder
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare


class Stream:
    """Batches for training, after the calibration rows, which set scales, the biases' start and the PCA control and are not trained on."""

    def __init__(self, source_config: Any, batch_size: int, rows: int, calibration_rows: int, device: str, execution: Execution) -> None:
        """`rows` is how many rows the job will read, calibration included."""
        self.source_config, self.batch_size, self.device, self.execution = source_config, batch_size, device, execution
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # graphs and kernels go to the current device
        self.source: ActivationSource = build_source(on_device(source_config, device), batch_size, rows)
        try:
            self.calibration = first_rows(self.source, calibration_rows)
            self.start = self.source.state_dict()
            """Where training begins."""
        except BaseException:
            self.source.close()
            raise

    def trainer(self, sae: SparseAutoencoder, config: TrainerConfig, total_steps: int, normalize_activations: bool) -> Trainer:
        """A trainer for a new SAE, which moves to the device and gets its scale and biases from the calibration rows."""
        prepare(sae.to(self.device), self.calibration, normalize_activations)
        return Trainer(sae, config, total_steps, self.batch_size, self.execution)

    def rewind(self) -> None:
        """Goes to where training begins, unless it is there: going anew would make the first block of activations once more."""
        if self.source.state_dict() != self.start:
            self.source.load_state_dict(self.start)

    def describe(self) -> str:
        """One line about the activations."""
        about = self.source.describe()
        told = {key: about[key] for key in ("model", "hook", "context_length") if key in about} | {"d_in": self.source.d_in}
        told |= {f"text {key}": about["text"][key] for key in ("kind", "documents", "rows_per_epoch") if key in about.get("text", {})}
        words = (f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in told.items())
        return f"activations: {about['source']}, {', '.join(words)}"

    def close(self) -> None:
        self.source.close()


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
