"""Gradients of a few rows from elsewhere (AuxK's dead latents), added inside the kernels that make the weight gradients."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Extra:
    """Row slot_M[j] of `rows_AD` is added to the gradient of latent j, slot -1 adds nothing."""

    slot_M: Tensor
    """int32 [M]."""
    rows_AD: Tensor
    """float32 [A, D]."""
