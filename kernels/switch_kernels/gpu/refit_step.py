"""One training step up to its gradients of SAEs whose encoder chooses latents for a whole batch and whose values are those of least squares.

The encoder learns to predict the values of what it chose, and of one latent of some tokens that it left out. As `pursuit_step` otherwise.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_kernels.gpu import pairs, pursuit
from switch_kernels.gpu.auxk import DeadLatents
from switch_kernels.gpu.batch_missed import encoder_weights, missed_rows
from switch_kernels.gpu.batch_select import keep_above, row_candidates, threshold_
from switch_kernels.gpu.candidate_products import candidate_products
from switch_kernels.gpu.dispatch import count_experts, sort_pairs
from switch_kernels.gpu.pursuit_step import Batch, Decoded, SearchSettings, SearchWeights, complete, dispatch, revive
from switch_kernels.gpu.step import StepTensors


@dataclass(frozen=True)
class Encoder:
    """What proposes latents, and what it is taught."""

    W_enc_MD: Tensor
    """[M, Dp] in the operands' dtype."""
    b_enc_M: Tensor
    W_dec_MD: Tensor
    """float32 [M, D]: the decoder as least squares reads it."""
    k: int
    """Latents per token, on average."""
    missed: float
    """Coefficient of the loss of what was left out."""
    missed_count: int
    """Tokens that are searched for it: the first ones."""


def refit_step(
    x_TD: Tensor, scale: Tensor, weights: SearchWeights, encoder: Encoder, s: SearchSettings, seed: Tensor, dead: DeadLatents | None = None
) -> StepTensors:
    """Losses and gradients of one batch of raw activations x_TD (float32 or bfloat16, contiguous).

    Of the T tokens' pre-activations above 0 the T k largest are taken, at most `s.most` of a token's; all that equal the smallest of them, too, which
    becomes `weights.theta`, in place. Of the rivals' those above it. `seed` and `dead` are as in `pursuit_step`; AuxK's codes are the encoder's.
    """
    batch, (tokens, D) = dispatch(x_TD, scale, weights.W_router_ED, weights.b_router_D, s.rivals, s.dot, seed), x_TD.shape
    order, latents_per_expert = batch.in_order, (weights.W_dec_MD.shape[0] - s.shared) // s.num_experts
    rows_ND = batch.rows(weights.b_pre_D, s.operand_dtype)
    pre_NC = candidate_products(rows_ND, encoder.W_enc_MD, encoder.b_enc_M, order.start_E1, s.shared, s.dot)
    offered_RL, columns_RL = row_candidates(pre_NC, order.order_N, len(batch.expert_R), s.most)
    threshold_(weights.theta, offered_RL[:tokens], tokens * encoder.k)
    values_RL, latents_RL, count_R = keep_above(offered_RL, columns_RL, weights.theta, tokens, batch.expert_R, s.shared, latents_per_expert)
    exact_ND = rows_ND if rows_ND.dtype == torch.float32 else batch.rows(weights.b_pre_D, torch.float32)
    refitted_RL = pursuit.refit_tokens(
        exact_ND, encoder.W_dec_MD, latents_RL, count_R, batch.expert_R, order.order_N, weights.gram_ECP, s.shared, s.ridge
    )  # fmt: skip
    decoded = Decoded.of(batch, weights, refitted_RL, latents_RL)
    missed_T, value_T, wanted_T = _missed(batch, decoded, rows_ND, weights, encoder, s)
    grad_TL1, losses = encoder_weights(
        values_RL[:tokens], refitted_RL[:tokens], count_R[:tokens], value_T, wanted_T, tokens, encoder.missed, encoder.missed_count
    )  # fmt: skip
    terms = {"match": losses[0]} | ({"missed": losses[1]} if encoder.missed_count else {})
    revived = None
    if dead is not None:
        revived = revive(batch, decoded, rows_ND, encoder.W_enc_MD, encoder.b_enc_M, weights, dead, s)
    indices_TL1 = torch.cat([latents_RL[:tokens], missed_T[:, None]], dim=1)
    marks_TL1 = torch.cat([values_RL[:tokens], wanted_T[:, None]], dim=1)
    of_latents = pairs.pairs_by_latent(indices_TL1, weights.W_dec_MD.shape[0], marks_TL1)
    extra = (None, None) if revived is None else (revived.dec, revived.enc)
    decoder = pairs.Terms(F.pad(decoded.values_TL, (0, 1)), decoded.grad_TD, D, extra=extra[0])
    encoding = pairs.Terms(grad_TL1, rows_ND, D, order.row_R[:tokens], extra=extra[1])
    return complete(batch, decoded, weights, of_latents, decoder, encoding, revived, s, terms)


def _missed(
    batch: Batch, decoded: Decoded, rows_ND: Tensor, weights: SearchWeights, encoder: Encoder, s: SearchSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """(latent int32, its value by the encoder, the value it should have) of each token: what would have helped most; 0s where nothing would."""
    tokens, count, device = batch.tokens, encoder.missed_count, rows_ND.device
    if not count:
        return torch.zeros(tokens, dtype=torch.int32, device=device), *torch.zeros(2, tokens, device=device)
    expert_n1 = batch.routed.expert_TS[:count]
    order = sort_pairs(expert_n1, count_experts(expert_n1, s.num_experts), s.num_experts)
    left_ND = decoded.residual_rows(batch, order.order_N, s.operand_dtype)
    left_NC = candidate_products(left_ND, weights.W_dec_MD, None, order.start_E1, s.shared, s.dot)
    missed_T, (value_T, wanted_T) = torch.empty(tokens, dtype=torch.int32, device=device), torch.empty(2, tokens, device=device)
    missed_rows(
        left_NC, order.order_N, count, batch.expert_R, weights.theta, rows_ND, batch.in_order.row_R, encoder.W_enc_MD, encoder.b_enc_M, s.shared,
        (missed_T, value_T, wanted_T),
    )  # fmt: skip
    return missed_T, value_T, wanted_T
