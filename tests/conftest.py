"""Shared by all tests: one thread per worker (results do not depend on the machine), and uninitialised memory filled with NaN."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")

from importlib.util import find_spec

import pytest
import torch

torch.set_num_threads(1)

# Triton decides when it is imported whether kernels are compiled or interpreted, so each mode is a process of its own.
_has_triton, _interprets = find_spec("triton") is not None, os.environ.get("TRITON_INTERPRET") == "1"
_needs = {"interpreter": _has_triton and _interprets, "test_compile_kernels.py": _has_triton and not _interprets}
collect_ignore = [name for name, is_met in _needs.items() if not is_met]


@pytest.fixture
def poisoned_memory():
    """Fills uninitialised tensors with NaN, so that reading what nothing wrote cannot go unseen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
