"""Latents of tokens that each search the dictionary of one expert, for evaluation: pursuit, an encoder's choice above a threshold, and refits.

Tokens are sorted by expert in kernels, and what is found comes back in their own order. No device data is read on the host and no shape depends on
it, so all of it can be captured in a CUDA graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from switch_kernels.backend import Dot, operand_dtype
from switch_kernels.gpu import pursuit
from switch_kernels.gpu.batch_select import keep_above, row_candidates
from switch_kernels.gpu.candidate_products import candidate_products
from switch_kernels.gpu.dispatch import Sorted, count_experts, gather_rows, sort_pairs
from switch_kernels.gpu.inference import kept_operand


@dataclass(frozen=True)
class Dictionaries:
    """What tokens of E experts may use: the first `shared` rows of W, then the F = (M - shared) / E of their own expert."""

    W_MD: Tensor
    """float32 [M, D], unit rows."""
    gram_ECP: Tensor
    """float32 [E, shared + F, P]: the products of these rows with each other."""
    shared: int
    ridge: float

    @property
    def experts(self) -> int:
        return len(self.gram_ECP)


@dataclass(frozen=True)
class Tokens:
    """Scaled activations and their experts, sorted."""

    x_TD: Tensor
    b_D: Tensor
    expert_T: Tensor
    """int32."""
    in_order: Sorted

    @classmethod
    def of(cls, x_TD: Tensor, b_D: Tensor, expert_T1: Tensor, experts: int) -> "Tokens":
        """x_TD and b_D are float32; experts are integers in [0, `experts`)."""
        expert_T1 = expert_T1.int().contiguous()
        in_order = sort_pairs(expert_T1, count_experts(expert_T1, experts), experts)
        return cls(x_TD.detach().contiguous(), b_D.detach().contiguous(), expert_T1.view(-1), in_order)

    def rows(self, dtype: torch.dtype) -> Tensor:
        """[N, Dp]: x - b in the order of experts."""
        return gather_rows(self.x_TD, torch.ones((), device=self.x_TD.device), self.b_D, self.in_order.order_N, 1, dtype)

    def products(self, W_MD: Tensor, bias_M: Tensor | None, shared: int, dot: Dot) -> Tensor:
        """float32 [N, C]: those of x - b with the rows of W (float32 [M, D]) that each may use."""
        bias_M = None if bias_M is None else bias_M.detach().contiguous()
        return candidate_products(self.rows(operand_dtype(dot)), kept_operand(W_MD, dot), bias_M, self.in_order.start_E1, shared, dot)


@torch.no_grad()
def pursue(
    x_TD: Tensor, b_D: Tensor, expert_T1: Tensor, given: Dictionaries, k: int, blocks: int, theta: Tensor | float, dot: Dot
) -> tuple[Tensor, Tensor]:
    """(values float32 [T, k], latents int64 [T, k]) of `switch_kernels.pursuit.matching_pursuit` of x - b, latents by their numbers in the whole SAE.

    x_TD are scaled activations, float32; `dot` is for the products with W, all else is float32. Slots that are not in use hold 0 and latent 0.
    """
    if not len(x_TD):
        return _nothing(x_TD, k)
    tokens = Tokens.of(x_TD, b_D, expert_T1, given.experts)
    products_NC = tokens.products(given.W_MD, None, given.shared, dot)
    values_TK, latents_TK = pursuit.pursue_tokens(
        products_NC, given.gram_ECP, tokens.expert_T, tokens.in_order.order_N, k, blocks, given.ridge, _number(theta, x_TD), given.shared
    )
    return values_TK, latents_TK.long()


@torch.no_grad()
def select(
    x_TD: Tensor, b_D: Tensor, expert_T1: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, experts: int, shared: int, most: int, theta: Tensor, dot: Dot,
    refitted: Dictionaries | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(values float32 [T, most], latents int64 [T, most]): what W_enc (x - b) + b_enc has above `theta` and above 0, of a token its `most` largest.

    With `refitted` values are those of least squares on what was chosen (`switch_kernels.pursuit.least_squares`), in float32; what it drops holds 0.
    Otherwise as `pursue`.
    """
    if not len(x_TD):
        return _nothing(x_TD, most)
    tokens = Tokens.of(x_TD, b_D, expert_T1, experts)
    pre_NC = tokens.products(W_enc_MD, b_enc_M, shared, dot)
    offered_TL, columns_TL = row_candidates(pre_NC, tokens.in_order.order_N, len(x_TD), most)
    latents_per_expert = (len(W_enc_MD) - shared) // experts
    values_TL, latents_TL, count_T = keep_above(offered_TL, columns_TL, theta, 0, tokens.expert_T, shared, latents_per_expert)
    if refitted is not None:
        values_TL = _refit(tokens, refitted, latents_TL, count_T)
    return values_TL, latents_TL.long()


@torch.no_grad()
def refit(x_TD: Tensor, b_D: Tensor, expert_T1: Tensor, given: Dictionaries, values_TK: Tensor, latents_TK: Tensor) -> Tensor:
    """float32 [T, K]: values of least squares on the latents whose values are above 0, each in its slot; 0 in all others."""
    if not len(x_TD):
        return _nothing(x_TD, latents_TK.shape[1])[0]
    tokens, all_latents = Tokens.of(x_TD, b_D, expert_T1, given.experts), len(given.W_MD)
    active_TK = values_TK > 0
    # "shared" up to the last: these are numbers of latents already
    front = keep_above(values_TK.contiguous(), latents_TK.int().contiguous(), _number(0.0, x_TD), 0, tokens.expert_T, all_latents, 0)
    refitted_TK = _refit(tokens, given, *front[1:])
    return torch.where(active_TK, refitted_TK.gather(1, (active_TK.cumsum(1) - 1).clamp_min(0)), 0.0)


def _refit(tokens: Tokens, given: Dictionaries, latents_TL: Tensor, count_T: Tensor) -> Tensor:
    return pursuit.refit_tokens(
        tokens.rows(torch.float32), given.W_MD, latents_TL, count_T, tokens.expert_T, tokens.in_order.order_N, given.gram_ECP, given.shared,
        given.ridge,
    )  # fmt: skip


def _number(number: Tensor | float, like: Tensor) -> Tensor:
    """float32 [] on the device."""
    return number.float() if isinstance(number, Tensor) else torch.full((), number, dtype=torch.float32, device=like.device)


def _nothing(x_0D: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    return x_0D.new_zeros(0, slots), torch.zeros(0, slots, dtype=torch.int64, device=x_0D.device)
