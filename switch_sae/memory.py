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
    """Gradients of all weights."""
    return sum(p.numel() * p.element_size() for p in trainer.sae.parameters() if p.requires_grad)


def group_bytes(trainers: Iterable[Trainer]) -> int:
    """The least that training a group needs, without batches and activations: everybody's state, and gradients.

    PyTorch frees an SAE's gradients before the next one's step, so only the largest one's count. The fused engine keeps each SAE's in its CUDA graph,
    and low-precision copies of its encoder and decoder beside.
    """
    trainers = list(trainers)
    fused = [trainer for trainer in trainers if trainer.execution.is_triton]
    others = [trainer for trainer in trainers if not trainer.execution.is_triton]
    kept = sum(gradient_bytes(trainer) + 2 * 2 * trainer.sae.decoder_weight().numel() for trainer in fused)
    return sum(map(state_bytes, trainers)) + kept + max(map(gradient_bytes, others), default=0)


def available_bytes(device: str | torch.device) -> int | None:
    """What the device can still give; None where the system does not say (macOS)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    about = Path("/proc/meminfo")
    if not about.is_file():
        return None
    machine = next(int(line.split()[1]) * 1024 for line in about.read_text().splitlines() if line.startswith("MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")  # of a container, or of a job on a cluster
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        return min(machine, int(most) - int(used.read_text()))
    return machine


def peak_bytes(device: str | torch.device) -> int:
    """Most memory that this process has held on the device; of a CPU, its whole resident memory, language model and libraries included."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss survives exec on Linux, so a small child would report its parent's peak
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
