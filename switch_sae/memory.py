"""Memory: what training will hold, what is free, and what a process has held at most. Bytes everywhere."""

import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from switch_sae.training import Trainer


def state_bytes(trainer: Trainer) -> int:
    """Weights, buffers and both of Adam's moments: what stays between steps."""
    sae = trainer.sae
    parameters = sum(p.numel() * p.element_size() for p in sae.parameters())
    moments = 2 * sum(p.numel() for p in sae.parameters() if p.requires_grad) * (2 if trainer.config.moments.value == "bfloat16" else 4)
    return parameters + moments + sum(b.numel() * b.element_size() for b in sae.buffers())


def gradient_bytes(trainer: Trainer) -> int:
    """What a step holds besides: gradients of all weights, which are freed before another SAE's step begins."""
    return sum(p.numel() * p.element_size() for p in trainer.sae.parameters() if p.requires_grad)


def group_bytes(trainers: Iterable[Trainer]) -> int:
    """The least that training a group needs: everybody's state and the largest member's gradients. Batches and activations come on top."""
    trainers = list(trainers)
    return sum(map(state_bytes, trainers)) + max(map(gradient_bytes, trainers), default=0)


def available_bytes(device: str | torch.device) -> int | None:
    """What the device can still give; None where the system does not say (macOS)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    about = Path("/proc/meminfo")
    if not about.is_file():
        return None
    return next(int(line.split()[1]) * 1024 for line in about.read_text().splitlines() if line.startswith("MemAvailable"))


def peak_bytes(device: str | torch.device) -> int:
    """Most memory that this process has held on the device; of a CPU, its whole resident memory, language model and libraries included."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss survives exec on Linux, so a small child would report its parent's peak
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
