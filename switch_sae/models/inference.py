"""How an SAE finds the latents of a token: by its encoder, by the encoder's choice with values refitted, or by pursuit.

All three share the decoder, so a trained SAE can be read by each (`with_inference`). Refits and pursuit solve least squares problems and have no
gradients: in training their values are held fixed, which at the solution gives the decoder the exact gradient of min_z ||x - recon||^2 (the envelope
theorem; up to the ridge), and the encoder learns to predict them (`SAEOutput.match`).
"""

import copy
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from switch_kernels import Dispatch, Execution
from switch_kernels.decode import pair_products, row_products
from switch_kernels.pursuit import (
    GRAM_SHARE,
    gram_matrices,
    least_squares,
    matching_pursuit,
    matching_pursuit_in_lists,
    padded_columns,
    problem_of_gram,
    problem_of_rows,
    pursuit_macs,
    solve_macs,
    spread_counts,
    why_not_in_kernels,
    why_not_in_rows,
)
from switch_kernels.threads import over_parts, threads_for
from switch_sae.checks import typed
from switch_sae.models.expert_candidates import candidate_indices
from switch_sae.models.gram import local_products, precise, refresh_tokens, to_global, to_local, union_products
from switch_sae.models.latents import DenseLatents, Latents, SparseLatents

if TYPE_CHECKING:
    from switch_kernels.gpu.search import Dictionaries
    from switch_sae.models.base import SparseAutoencoder

RIDGE = 1e-3
"""Added to the diagonal of Gram matrices of unit rows (others are normalised): it keeps near duplicates from taking huge values of both signs."""
_TOKENS = 256
"""That are refitted together."""
BLOCKS = 4
"""Of pursuit, where nothing else is asked for."""


class Inference(Enum):
    """Where the latents of a token come from."""

    encoder = "encoder"
    """The SAE's own encoder."""
    refit = "refit"
    """The encoder's support, with the values of non-negative least squares: argmin_{z >= 0} ||x - b - W_dec[I]^T z||^2 + ridge ||z||^2."""
    pursuit = "pursuit"
    """Matching pursuit in blocks with such refits (`switch_kernels.pursuit.matching_pursuit`) over the latents that the token may use."""


def why_no_inference(sae: "SparseAutoencoder", inference: Inference | str) -> str | None:
    """Why an SAE cannot find latents that way; None if it can."""
    inference, name = typed("inference", Inference, inference), type(sae).__name__
    if inference is Inference.encoder or inference is sae.inference is Inference.pursuit:
        return None if inference is not Inference.encoder or sae.has_encoder else f"{name} has no encoder"
    if inference is Inference.refit and not sae.has_encoder:
        return f"{name} has no encoder whose choice could be refitted"
    if sae.is_transcoder or sae.d_in != sae.d_out:
        return f"{name} does not reconstruct its input, and the target is not known at inference"
    return sae.why_no_search(Inference(inference))


def with_inference(sae: "SparseAutoencoder", inference: Inference | str) -> "SparseAutoencoder":
    """The same SAE, its weights and buffers shared and not copied (`threshold` too), with another inference. Raises ValueError where it has none
    (`why_no_inference`).
    """
    if why := why_no_inference(sae, inference):
        raise ValueError(f"inference={typed('inference', Inference, inference).name} is not possible: {why}.")
    other = copy.copy(sae)
    other.config = replace(sae.config, inference=inference)
    return other


def searched_by(sae: "SparseAutoencoder") -> Execution:
    """Who computes an SAE's refits and pursuit, as far as `why_not_in_kernels` lets it."""
    return sae.execution if sae.execution.is_triton else sae.search


def why_not_searched_in_kernels(sae: "SparseAutoencoder") -> str | None:
    """Why PyTorch and not Triton computes the refits or the pursuit of an SAE, in words for its plan line; None if Triton does."""
    refits, most = sae.inference is Inference.refit, getattr(sae.config, "most", None)
    candidates = sae.num_shared + sae.latents_per_expert
    if most is None:
        if sae.k is None:
            return "nothing bounds how many latents a token takes"
        most = sae.k if not sae.by_threshold else candidates if refits else 2 * sae.k
    if refits and not (sae.is_routed and getattr(sae, "refits_by_gram", lambda: True)()):
        return "the kernels refit from the Gram matrix of a token's one expert"
    if not refits and sae.searches_lists:
        return "the kernels search dictionaries that many tokens share, and here each has a list of latents of its own"
    return why_not_in_kernels(searched_by(sae), sae.decoder_weight().dtype, most, padded_columns(candidates))


def search_plan(sae: "SparseAutoencoder") -> str:
    """Who computes the refits or the pursuit of an SAE, and why."""
    why, name, W_MD = why_not_searched_in_kernels(sae), sae.inference.name, sae.decoder_weight()
    if why is None:
        return f"{name} in Triton kernels"
    if sae.inference is not Inference.pursuit:
        return f"{name} in PyTorch ({why})"
    why_torch = why_not_in_rows(W_MD.device, precise(W_MD[:0]).dtype)
    return f"{name} row by row in numba ({why})" if why_torch is None else f"{name} in PyTorch ({why}; {why_torch})"


def refit(sae: "SparseAutoencoder", x_TD: Tensor, latents: Latents, expert_T: Tensor | None, gram_ECP: Tensor | None = None) -> Latents:
    """The same support with refitted values; `x_TD` are scaled activations, `expert_T` the experts of an SAE that has one for each token.

    With experts, from their Gram matrices; else from the decoder's rows. Rows of other than unit norm are normalised first, so that the ridge weighs
    ||z_i W_i||^2. Tokens with more than D active latents keep their values: least squares has
    no one solution there.
    """
    if isinstance(latents, SparseLatents) and expert_T is not None and why_not_searched_in_kernels(sae) is None:
        from switch_kernels.gpu.search import refit as in_kernels

        given, norm_M = _dictionaries(sae, len(x_TD), gram_ECP)
        values_TK = in_kernels(x_TD, sae.b_out_D, expert_T[:, None], given, latents.values_TK, latents.indices_TK)
        return replace(latents, values_TK=values_TK if norm_M is None else values_TK / norm_M[latents.indices_TK])
    if gram_ECP is None and expert_T is not None:
        gram_ECP = gram_now(sae, len(x_TD))
    residual_TD = precise(x_TD - sae.b_out_D).detach()
    if isinstance(latents, SparseLatents):
        values_TK = _refitted(sae, residual_TD, latents.values_TK.detach(), latents.indices_TK, expert_T, gram_ECP)
        return replace(latents, values_TK=values_TK.to(x_TD.dtype))
    dense_TM = latents.to_dense().detach()
    count_T = (dense_TM > 0).sum(dim=1)
    refitted_TM = dense_TM.clone()
    token_t = (count_T <= sae.d_in).nonzero()[:, 0]
    if len(token_t):
        values_tK, indices_tK = dense_TM[token_t].topk(int(count_T[token_t].max()), dim=1)
        values_tK = _refitted(sae, residual_TD[token_t], values_tK, indices_tK).to(dense_TM.dtype)
        refitted_TM[token_t] = dense_TM.new_zeros(len(token_t), dense_TM.shape[1]).scatter_(1, indices_tK, values_tK)
    return DenseLatents(refitted_TM)


def _refitted(
    sae: "SparseAutoencoder",
    residual_TD: Tensor,
    values_TK: Tensor,
    indices_TK: Tensor,
    expert_T: Tensor | None = None,
    gram_ECP: Tensor | None = None,
) -> Tensor:
    order_T = None
    if expert_T is not None:
        order_T = torch.argsort(expert_T, stable=True)
        residual_TD, values_TK, indices_TK, expert_T = (each.index_select(0, order_T) for each in (residual_TD, values_TK, indices_TK, expert_T))
    active_TK = values_TK > 0
    refitted_P = refit_pairs(sae, residual_TD, active_TK.sum(dim=1), indices_TK[active_TK], expert_T, gram_ECP, values_TK.shape[1])
    refitted_TK = refitted_P.new_zeros(values_TK.shape).masked_scatter_(active_TK, refitted_P)
    return refitted_TK if order_T is None else torch.empty_like(refitted_TK).index_copy_(0, order_T, refitted_TK)


@torch.no_grad()
def refit_pairs(
    sae: "SparseAutoencoder",
    residual_ND: Tensor,
    count_N: Tensor,
    latent_P: Tensor,
    expert_N: Tensor | None = None,
    gram_ECP: Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """[P]: the refitted values of each row's latents, row by row, `count_N` of each; the residual is x - b, scaled, in float32 at least.

    A kernel does it where Triton may (`why_not_in_kernels`), Gram matrices are given, and rows have at most `most` latents. With experts and their
    Gram matrices rows should come in the order of experts: their products then find rows of the decoder in the cache (6 ms, not 14, of 65,536 pairs
    with D = 512).
    """
    W_MD, norm_M = _unit_rows(sae)
    start_N, refitted_P = count_N.cumsum(0) - count_N, residual_ND.new_zeros(len(latent_P))
    if expert_N is not None and gram_ECP is not None:
        if most is not None and why_not_in_kernels(searched_by(sae), residual_ND.dtype, most, gram_ECP.shape[2]) is None:
            from switch_kernels.gpu.pursuit import refit_pairs as in_kernel

            shared, ridge = sae.num_shared, ridge_of(sae)
            refitted_P = in_kernel(residual_ND, W_MD, latent_P, start_N, count_N, expert_N, gram_ECP, shared, ridge, most)
            return refitted_P if norm_M is None else refitted_P / norm_M[latent_P]
        row_P = torch.repeat_interleave(count_N)
        products_P = pair_products(residual_ND.contiguous(), latent_P, row_P, start_N, W_MD)
        local_P = to_local(latent_P[:, None], expert_N[row_P], sae.num_shared, sae.latents_per_expert)[:, 0]
    order_N = torch.argsort(count_N, stable=True)

    def solve(part: slice) -> None:
        row_n = order_N[part].sort().values  # of like counts; in the order of experts, whose Gram matrices do not fit into a cache together
        slot_K = torch.arange(int(count_N[row_n].max()), device=row_n.device)
        active_nK = slot_K < count_N[row_n, None]
        pair_nK = (start_N[row_n, None] + slot_K).clamp_max(len(latent_P) - 1)
        if expert_N is None or gram_ECP is None:
            problem = problem_of_rows(residual_ND[row_n], latent_P[pair_nK], W_MD)
        else:
            problem = problem_of_gram(torch.where(active_nK, products_P[pair_nK], 0.0), gram_ECP, expert_N[row_n], local_P[pair_nK])
        refitted_P[pair_nK[active_nK]] = least_squares(problem, active_nK, ridge_of(sae))[active_nK]

    over_parts(solve, _like_parts(count_N[order_N].tolist(), threads_for(residual_ND.device)), residual_ND.device)
    return refitted_P if norm_M is None else refitted_P / norm_M[latent_P]


def _like_parts(counts: list[int], threads: int) -> list[slice]:
    """Of rising counts: at most `_TOKENS` together, whose largest count is at most a quarter (and 2) above the smallest. The largest come first: what
    takes longest is not left to the end, when other threads have nothing to do. Rows with nothing to solve are left out.
    """
    parts, start = [], bisect_right(counts, 0)
    most = min(_TOKENS, -(-(len(counts) - start) // threads))
    while start < len(counts):
        end = min(start + most, bisect_right(counts, counts[start] * 5 // 4 + 2))
        parts.append(slice(start, end))
        start = end
    return parts[::-1]


def _unit_rows(sae: "SparseAutoencoder") -> tuple[Tensor, Tensor | None]:
    """The decoder's rows at unit norm, which the ridge is meant for, and their norms; None where they have it already."""
    W_MD = precise(sae.decoder_weight().detach())
    if sae.recipe.unit_decoder:
        return W_MD, None
    norm_M = torch.linalg.vector_norm(W_MD, dim=1).clamp_min(torch.finfo(W_MD.dtype).tiny)
    return W_MD / norm_M[:, None], norm_M


def _searched_rows(sae: "SparseAutoencoder", tokens: int, gram: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """`_unit_rows`, and their Gram matrices where none were given."""
    W_MD, norm_M = _unit_rows(sae)
    if gram is None:
        gram = gram_now(sae, tokens) if norm_M is None else gram_matrices(W_MD[None])
    return W_MD, norm_M, gram


def pursue(
    sae: "SparseAutoencoder",
    x_TD: Tensor,
    dispatch: Dispatch,
    k: int,
    blocks: int = BLOCKS,
    threshold: Tensor | float = 0.0,
    limit_T: Tensor | None = None,
    gram_ECP: Tensor | None = None,
) -> SparseLatents:
    """At most k latents of each token's dictionary, and at most limit_T, joining while their correlation exceeds the threshold.

    `dispatch` is to one expert for a dictionary that every token may use whole. With S experts for each, over the union of theirs.
    """
    if dispatch.slots > 1:
        candidate_TC = candidate_indices(dispatch, sae.num_shared, sae.latents_per_expert)

        def expert_by_expert(residual_TD: Tensor, W_MD: Tensor) -> Tensor:
            return union_products(residual_TD, W_MD, dispatch, sae.num_shared, searched_by(sae))

        return pursue_in_lists(sae, x_TD, candidate_TC, k, blocks, threshold, expert_by_expert, gram_ECP, limit_T)
    if limit_T is None and why_not_searched_in_kernels(sae) is None:
        from switch_kernels.gpu.search import pursue as in_kernels

        given, norm_M = _dictionaries(sae, len(x_TD), gram_ECP)
        found_TK = in_kernels(x_TD, sae.b_out_D, dispatch.expert_TS, given, k, blocks, threshold, searched_by(sae).dot)
        return _found(sae, x_TD, *found_TK, norm_M)
    W_MD, norm_M, gram_ECP = _searched_rows(sae, len(x_TD), gram_ECP)
    with torch.no_grad():
        residual_ND, shared = dispatch.gather(precise(x_TD - sae.b_out_D)), sae.num_shared
        products_NC = local_products(residual_ND, W_MD, dispatch, shared, execution=searched_by(sae))
        expert_N = dispatch.expert_N
        limit_N = None if limit_T is None else dispatch.gather(limit_T)
        found = matching_pursuit(products_NC, gram_ECP, expert_N, k, blocks, ridge_of(sae), threshold, limit_N, searched_by(sae))
        indices_NK = to_global(found.indices_NK, expert_N, shared, sae.latents_per_expert)
        return _found(sae, x_TD, dispatch.scatter(found.values_NK), dispatch.scatter(indices_NK), norm_M)


def select_in_kernels(
    sae: "SparseAutoencoder", x_TD: Tensor, encoder: tuple[Tensor, Tensor], expert_T1: Tensor, most: int, threshold: Tensor, gram_ECP: Tensor | None
) -> SparseLatents:
    """At most so many latents of each token's dictionary, those that an encoder (W_enc_MD, b_enc_M) has above the threshold, refitted unless
    `sae.inference` is the encoder. Only where `why_not_searched_in_kernels` has no reason.
    """
    from switch_kernels.gpu.search import select

    given, norm_M = (None, None) if sae.inference is Inference.encoder else _dictionaries(sae, len(x_TD), gram_ECP)
    sizes = sae.num_experts, sae.num_shared, most
    return _found(sae, x_TD, *select(x_TD, sae.b_in_D, expert_T1, *encoder, *sizes, threshold, searched_by(sae).dot, given), norm_M)


def _dictionaries(sae: "SparseAutoencoder", tokens: int, gram_ECP: Tensor | None) -> "tuple[Dictionaries, Tensor | None]":
    """What kernels search, and the norms of the rows where they were divided by them."""
    from switch_kernels.gpu.search import Dictionaries

    W_MD, norm_M, gram_ECP = _searched_rows(sae, tokens, gram_ECP)
    return Dictionaries(W_MD, gram_ECP, sae.num_shared, ridge_of(sae)), norm_M


def _found(sae: "SparseAutoencoder", x_TD: Tensor, values_TK: Tensor, indices_TK: Tensor, norm_M: Tensor | None) -> SparseLatents:
    """Of values for rows of unit norm."""
    values_TK = values_TK if norm_M is None else values_TK / norm_M[indices_TK]
    return SparseLatents(values_TK.to(x_TD.dtype), indices_TK, sae.num_latents)


def pursue_in_lists(
    sae: "SparseAutoencoder",
    x_TD: Tensor,
    candidate_TC: Tensor,
    k: int,
    blocks: int = BLOCKS,
    threshold: Tensor | float = 0.0,
    products: Callable[[Tensor, Tensor], Tensor] | None = None,
    gram_1MP: Tensor | None = None,
    limit_T: Tensor | None = None,
) -> SparseLatents:
    """At most k latents of each token's own list, and at most limit_T, by the Gram matrix of all M, which holds the products across experts.

    `products(residual_TD, W_MD)` gives those with the rows on the lists, [T, C], where they can be had for less than row by row; what a list holds a
    second time has -inf there.
    """
    W_MD, norm_M, gram_1MP = _searched_rows(sae, len(x_TD), gram_1MP)
    with torch.no_grad():
        residual_TD = precise(x_TD - sae.b_out_D).contiguous()
        products_TC = row_products(residual_TD, candidate_TC, W_MD) if products is None else products(residual_TD, W_MD)
        found = matching_pursuit_in_lists(products_TC, candidate_TC, gram_1MP[0], k, blocks, ridge_of(sae), threshold, limit_T)
        return _found(sae, x_TD, *found, norm_M)


def ridge_of(sae: "SparseAutoencoder") -> float:
    """The setting of an architecture that has it, else `RIDGE`."""
    return float(getattr(sae.config, "ridge", RIDGE))


def equal_blocks(k: int) -> int:
    """The number of blocks, at most `BLOCKS`, that divides k."""
    return next(blocks for blocks in range(min(BLOCKS, k), 0, -1) if k % blocks == 0)


def pursue_with_threshold(
    sae: "SparseAutoencoder", x_TD: Tensor, dispatch: Dispatch, k: int, threshold: Tensor, gram_ECP: Tensor | None = None
) -> SparseLatents:
    """By the stop rule: mean L0 is whatever the threshold makes it, at most 2 k for a token that has as many to choose from, in blocks as for k."""
    step = k // equal_blocks(k)
    blocks = min(2 * k, sae.num_shared + dispatch.slots * sae.latents_per_expert) // step
    return pursue(sae, x_TD, dispatch, blocks * step, blocks, threshold, gram_ECP=gram_ECP)


def pursue_like(sae: "SparseAutoencoder", x_TD: Tensor, proposed: Latents) -> DenseLatents:
    """As many latents for each token as the encoder chose (at most D): for SAEs whose number of latents nothing but their encoder decides."""
    limit_T = (proposed.to_dense() > 0).sum(dim=1).clamp_max(sae.d_in)
    most = -(-int(limit_T.max()) // BLOCKS) * BLOCKS if len(limit_T) else BLOCKS
    most = max(BLOCKS, min(most, sae.num_latents // BLOCKS * BLOCKS))
    dispatch = Dispatch.to_one_expert(len(x_TD), x_TD.device)
    return DenseLatents(pursue(sae, x_TD, dispatch, most, most // BLOCKS, limit_T=limit_T).to_dense())


def match_loss(proposed: SparseLatents, latents: SparseLatents) -> Tensor:
    """mean_t ||v - z||^2 of values v that an encoder proposed, with their gradient, and the values z that were taken instead, held fixed."""
    v_TK, z_TK = proposed.values_TK, latents.values_TK.detach()
    if proposed.indices_TK is latents.indices_TK:
        return (v_TK - z_TK).square().sum(dim=1).mean()
    same_TKL = (proposed.indices_TK[:, :, None] == latents.indices_TK[:, None, :]).to(z_TK.dtype)
    wanted_TK = (same_TKL * z_TK[:, None, :]).sum(dim=2)  # the value of each proposed latent, 0 where it was not taken
    missed_T = z_TK.square().sum(dim=1) - wanted_TK.square().sum(dim=1)
    return ((v_TK - wanted_TK).square().sum(dim=1) + missed_T).mean()


def refit_flops(d_in: int, k: int, from_gram: bool, by_threshold: bool = False) -> int:
    """Per token: products of k rows with the activation and, without Gram matrices, with each other; a solve (one token in ten needs two). With a
    threshold, k is the mean.
    """
    counts = spread_counts(k) if by_threshold else [k]
    return round(sum(2 * (n * d_in + (0 if from_gram else n * n * d_in) + solve_macs(n)) for n in counts) / len(counts))


def pursuit_flops(d_in: int, candidates: int, k: int, blocks: int, by_threshold: bool = False) -> int:
    """Per token: correlations with all candidates, then `pursuit_macs`; with a threshold, k is the mean."""
    return round(2 * (candidates * d_in + pursuit_macs(candidates, k, blocks, by_threshold)))


def gram_flops(d_in: int, experts: int, candidates: int, every_tokens: int) -> int:
    """Per token of training: E Gram matrices of C candidates after so many tokens; of lists one, E = 1, of all M."""
    return round(2 * GRAM_SHARE * experts * candidates**2 * d_in / every_tokens)


def gram_now(sae: "SparseAutoencoder", tokens: int) -> Tensor:
    """The Gram matrices of an SAE's dictionaries, [E, C, P], or [1, M, P] where it `searches_lists`: in a training step, on so many tokens of this
    process, perhaps slightly older ones.
    """
    W_MD, (experts, shared) = sae.decoder_weight(), (1, 0) if sae.searches_lists else (sae.num_experts, sae.num_shared)
    if sae.training and torch.is_grad_enabled():
        return sae.grams.for_step(W_MD, experts, shared, tokens * sae.group.size, refresh_tokens(sae.config))
    return sae.grams.current(W_MD, experts, shared)
