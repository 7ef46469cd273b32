"""The dictionary that a token sees, shared latents and those of its expert, and its Gram matrix.

Latents are numbered: S shared ones first, then E experts of F = (M - S) / E each. A token of expert e has C = S + F candidates, in that order.
"""

from typing import Any

import torch
from torch import Tensor

from switch_kernels import PYTORCH, Dispatch, Execution
from switch_kernels.pursuit import gram_matrices, padded_columns

REFRESH_TOKENS = 8192
"""In training, Gram matrices are computed anew after so many tokens, as they cost E C^2 D multiply-adds: pursuit with fixed k loses 0.8 % of FVU to
half as many (experiments/LOG.md).
"""


def local_products(
    x_ND: Tensor, W_MD: Tensor, dispatch: Dispatch, shared: int, bias_M: Tensor | None = None, execution: Execution = PYTORCH
) -> Tensor:
    """[N, C] in expert order: the products of activations, in expert order, with the rows of each one's dictionary, and the bias. No gradients.

    With Triton one kernel computes them in float32 from operands of the execution's precision, and the host need not know where experts start.
    """
    if execution.is_triton and x_ND.dtype == W_MD.dtype == torch.float32:
        from switch_kernels.gpu.candidate_products import local_products as in_kernel

        return in_kernel(x_ND, W_MD, dispatch.start_E1, shared, bias_M, execution.dot)
    experts, offsets = dispatch.num_experts, dispatch.offsets
    latents = (len(W_MD) - shared) // experts
    products_NC = x_ND.new_empty(len(x_ND), shared + latents)
    parts = [(slice(0, len(x_ND)), slice(0, shared), slice(0, shared))] if shared else []
    parts += [
        (slice(offsets[e], offsets[e + 1]), slice(shared + e * latents, shared + (e + 1) * latents), slice(shared, shared + latents))
        for e in range(experts)
    ]
    for rows, owned, columns in parts:
        if bias_M is None:
            torch.mm(x_ND[rows], W_MD[owned].T, out=products_NC[rows, columns])
        else:
            torch.addmm(bias_M[owned], x_ND[rows], W_MD[owned].T, out=products_NC[rows, columns])
    return products_NC


def union_products(x_TD: Tensor, W_MD: Tensor, dispatch: Dispatch, shared: int, execution: Execution = PYTORCH) -> Tensor:
    """[T, C]: the products of activations with the rows of `candidate_indices`, C = shared + S F, those of several experts. No gradients."""
    own_RF = dispatch.scatter(local_products(dispatch.gather(x_TD), W_MD[shared:], dispatch, 0, execution=execution))
    own_TC = own_RF.view(len(x_TD), dispatch.slots * own_RF.shape[1])
    return torch.cat([x_TD @ W_MD[:shared].T, own_TC], dim=1) if shared else own_TC


def to_global(local_NK: Tensor, expert_N: Tensor, shared: int, latents: int) -> Tensor:
    """Latents' numbers from candidates' numbers in the dictionaries of experts of F = `latents` each."""
    return torch.where(local_NK < shared, local_NK, local_NK + (expert_N * latents)[:, None])


def to_local(global_NK: Tensor, expert_N: Tensor, shared: int, latents: int) -> Tensor:
    """The inverse of `to_global`."""
    return torch.where(global_NK < shared, global_NK, global_NK - (expert_N * latents)[:, None])


def precise(tensor: Tensor) -> Tensor:
    """In float32 at least, as solves need it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def refresh_tokens(config: Any) -> int:
    """After how many tokens of training Gram matrices are computed anew."""
    return getattr(config, "gram_tokens", None) or REFRESH_TOKENS


class GramCache:
    """The Gram matrices of the dictionaries of all experts, [E, C, P], for as long as the decoder stays as it is.

    In training they may be older (`REFRESH_TOKENS`). A decoder that was changed through `.data`, which PyTorch does not count, needs `forget`.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Whatever is known."""
        self._version: tuple[object, ...] | None = None
        self._of_version: Tensor | None = None
        self._in_training: Tensor | None = None
        self._age = 0

    def current(self, W_MD: Tensor, experts: int, shared: int) -> Tensor:
        """Of these very weights."""
        if W_MD.is_inference() or (W_MD.is_cuda and torch.cuda.is_current_stream_capturing()):  # no version; memory that belongs to a graph
            return _gram(W_MD, experts, shared)
        version = (W_MD._version, W_MD.data_ptr(), W_MD.dtype, W_MD.device, experts, shared)
        if self._of_version is None or self._version != version:
            self._of_version, self._version = _gram(W_MD, experts, shared), version
        return self._of_version

    @property
    def of_step(self) -> Tensor:
        """What a training step reads, after `is_due`."""
        assert self._in_training is not None
        return self._in_training

    def is_due(self, W_MD: Tensor, experts: int, shared: int, every: int) -> bool:
        """Whether a training step of kernels should write `of_step` anew, in float32; it stays where it is as long as weights do. `took` follows."""
        shape = _shape(W_MD, experts, shared)
        if not self._fits(shape, torch.float32, W_MD.device):
            self._in_training, self._age = torch.empty(shape, device=W_MD.device), every
        return self._age >= every

    def took(self, tokens: int, anew: bool) -> None:
        """After a step on so many tokens, which wrote `of_step` anew or not."""
        self._age = tokens + (0 if anew else self._age)

    def for_step(self, W_MD: Tensor, experts: int, shared: int, tokens: int, every: int) -> Tensor:
        """Of these weights or of those up to `every` tokens ago, for a training step on so many tokens."""
        anew = self._age >= every or not self._fits(_shape(W_MD, experts, shared), precise(W_MD[:0]).dtype, W_MD.device)
        if anew:
            self._keep(_gram(W_MD, experts, shared))
        self.took(tokens, anew)
        return self.of_step

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold for steps to go on bit for bit; empty where nothing was trained with Gram matrices."""
        return {} if self._in_training is None else {"gram": self._in_training, "gram_age": torch.tensor(self._age)}

    def load(self, state: dict[str, Tensor], like: Tensor) -> None:
        """From `state`, to the device of a weight."""
        self._age = int(state["gram_age"]) if state else 0
        if state:
            self._keep(state["gram"].to(like.device, copy=True))
        else:
            self._in_training = None

    def _fits(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
        last = self._in_training
        return last is not None and (tuple(last.shape), last.dtype, last.device) == (shape, dtype, device)

    def _keep(self, gram_ECP: Tensor) -> None:
        """For training steps, in the place of the last where that is possible: a captured graph may read it there."""
        if self._in_training is not None and self._fits(tuple(gram_ECP.shape), gram_ECP.dtype, gram_ECP.device):
            self._in_training.copy_(gram_ECP)
        else:
            self._in_training = gram_ECP


def _shape(W_MD: Tensor, experts: int, shared: int) -> tuple[int, int, int]:
    """[E, C, P]."""
    candidates = shared + (len(W_MD) - shared) // experts
    return experts, candidates, padded_columns(candidates)


def _gram(W_MD: Tensor, experts: int, shared: int) -> Tensor:
    W_MD = precise(W_MD.detach())
    own_EFD = W_MD[shared:].view(experts, -1, W_MD.shape[1])
    if shared:
        own_EFD = torch.cat([W_MD[:shared].expand(experts, -1, -1), own_EFD], dim=1)
    return gram_matrices(own_EFD)
