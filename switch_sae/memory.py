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


def group_bytes(trainers: Iterable[Trainer]) -> int:
    """The least that training a group needs: everybody's state, and what their engines hold for a step (`Engine.step_bytes`).

    PyTorch frees what an SAE's step took before the next one's, so only the largest counts. The fused engine keeps it, each SAE's in a pool of its
    own, once however many graphs it has.
    """
    trainers = list(trainers)
    kept = sum(trainer.engine.step_bytes(trainer.batch_size) for trainer in trainers if trainer.execution.is_triton)
    freed = [trainer.engine.step_bytes(trainer.batch_size) for trainer in trainers if not trainer.execution.is_triton]
    return sum(map(state_bytes, trainers)) + kept + max(freed, default=0)


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
