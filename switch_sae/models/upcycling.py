"""A dense SAE becomes a Switch SAE: latents that fire together become an expert, and a router learns from its calibration rows where tokens go.

After "Analytical FFN-to-MoE Restructuring" (arXiv 2502.04416), which splits a feed-forward layer by co-activation, for TopK dictionaries.
Shapes: T tokens, D activation size, M latents, K slots of a token, E experts, F = M / E latents of one, R random directions.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.models.base import SparseAutoencoder
from switch_sae.models.latents import SparseLatents
from switch_sae.models.routers.base import LinearRouter, Router
from switch_sae.models.switch import SwitchSAE
from switch_sae.models.topk import TopKSAE
from switch_sae.rows import Rows

GATE = 0.7
"""Mean probability of the chosen expert at the start, by which all that the dense SAE gave shrinks. 0.35, about where trained routers end, gave a
larger FVU in the one run that tried it (experiments/LOG.md)."""
_DIRECTIONS, _RESTARTS, _ROUNDS, _BATCH = 256, 4, 50, 4096


@dataclass(frozen=True)
class Upcycled:
    """A Switch SAE that a dense one was split into, and how much of the dense one it keeps, on the rows that it was made from."""

    sae: SwitchSAE
    latent_M: Tensor
    """The dense SAE's latent that each of its latents is."""
    kept: float
    """Share of the energy (squared latents) of the dense code that lies in each token's best expert; 1 / E or more."""
    routed: float
    """The same of the expert that its router chooses."""


@torch.no_grad()
def upcycled(dense: SparseAutoencoder, rows: Rows, num_experts: int, seed: int = 0) -> Upcycled:
    """Splits a `TopKSAE` by the co-activation of its latents on `rows` of raw activations into E experts of F = M / E latents.

    Rows of encoder and decoder are permuted, expert-major, and nothing else of them changes: with a gate of 1, and a route to the expert that holds
    a token's whole support, it gives what the dense SAE gives. Raises ValueError for another architecture, and for E that does not fit M and k.
    """
    if type(dense) is not TopKSAE:
        raise ValueError(f"{dense} is no dense TopKSAE, whose latents could be split into experts. Give a run of sae=topk.")
    if num_experts < 2:
        raise ValueError(f"num_experts={num_experts} splits nothing. Use 2 or more.")
    if len(rows) < num_experts:
        raise ValueError(f"{len(rows)} rows are too few to tell {num_experts} experts apart. Give some thousands.")
    config = SwitchSAE.Config(**{f.name: getattr(dense.config, f.name) for f in fields(dense.config)}, num_experts=num_experts)
    sae = SwitchSAE(config, dense.d_in, torch.Generator().manual_seed(seed)).to(dense.activation_scale.device)
    latents = _codes(dense, rows)
    expert_M = co_active_blocks(latents, num_experts, seed)
    latent_M = expert_M.argsort(stable=True)
    for name, tensor in dense.state_dict().items():
        sae.state_dict()[name].copy_(tensor[latent_M] if name.endswith(("_M", "_MD")) else tensor)
    energy_TE = expert_energies(latents, expert_M, num_experts)
    x_TD = rows.x_TD.to(dense.activation_scale) * dense.activation_scale
    _aim(sae.router, x_TD, energy_TE.argmax(dim=1))
    chosen_T1 = sae.router.route(x_TD).expert_TS[:, :1]
    total = energy_TE.sum().clamp_min(1e-12)
    routed = float(energy_TE.gather(1, chosen_T1).sum() / total)
    return Upcycled(sae.eval(), latent_M, float(energy_TE.amax(dim=1).sum() / total), routed)


def co_active_blocks(latents: SparseLatents, num_experts: int, seed: int = 0) -> Tensor:
    """[M] the expert of each latent, F of each: balanced spherical k-means of `profiles`, then rounds that send each token to the expert with
    most of its energy and each latent to the expert whose tokens hold most of its own, while that raises what experts keep. The best of some starts.
    """
    profile_MR = profiles(latents, _DIRECTIONS, seed)
    starts = [_k_means(profile_MR, num_experts, torch.Generator().manual_seed(seed + restart)) for restart in range(_RESTARTS)]
    found = [_refined(latents, expert_M, num_experts) for expert_M in starts]
    return max(found, key=lambda each: each[0])[1]


def profiles(latents: SparseLatents, directions: int, seed: int = 0) -> Tensor:
    """[M, R] unit rows whose cosines are about those of the rows of the latents' [M, M] correlation: A^T (A G - mean) with A [T, M] of what fires,
    columns of unit norm, and G [M, R] random. Latents that never fire are 0.
    """
    fires_TK = (latents.values_TK > 0).float()
    weight_TK = fires_TK * latents.firing_counts().clamp_min(1).rsqrt()[latents.indices_TK]
    G_MR = torch.randn(latents.num_latents, directions, generator=torch.Generator().manual_seed(seed)).to(weight_TK)
    profile_MR = torch.zeros_like(G_MR)
    seen_TR = torch.cat([(w[..., None] * G_MR[i]).sum(1) for w, i in zip(weight_TK.split(_BATCH), latents.indices_TK.split(_BATCH), strict=True)])
    seen_TR -= seen_TR.mean(dim=0)
    for slot in range(weight_TK.shape[1]):
        profile_MR.index_add_(0, latents.indices_TK[:, slot], weight_TK[:, slot, None] * seen_TR)
    return F.normalize(profile_MR, dim=1)


def balanced(score_ME: Tensor) -> Tensor:
    """[M] an expert for each latent, M / E for each: latents take the best expert that has room, those first that would lose most by another."""
    num_latents, num_experts = score_ME.shape
    expert_M = torch.full((num_latents,), -1, device=score_ME.device)
    room = [num_latents // num_experts] * num_experts
    while len(left_L := (expert_M < 0).nonzero()[:, 0]):  # a round places all of them, or fills an expert
        open_E = torch.tensor([places > 0 for places in room], device=score_ME.device)
        best_L2 = score_ME[left_L].masked_fill(~open_E, -torch.inf).topk(2, dim=1)
        order_L = (best_L2.values[:, 0] - best_L2.values[:, 1]).argsort(descending=True, stable=True)
        for expert in open_E.nonzero()[:, 0].tolist():
            taken_P = left_L[order_L[best_L2.indices[order_L, 0] == expert][: room[expert]]]
            expert_M[taken_P] = expert
            room[expert] -= len(taken_P)
    return expert_M


def expert_energies(latents: SparseLatents, expert_M: Tensor, num_experts: int) -> Tensor:
    """[T, E] sums of squared latents of each expert."""
    energy_TE = latents.values_TK.new_zeros(len(latents.values_TK), num_experts)
    return energy_TE.scatter_add_(1, expert_M[latents.indices_TK], latents.values_TK**2)


def _aim(router: Router, x_TD: Tensor, expert_T: Tensor) -> None:
    """W_e = s C^-1 (mean_e - mean), b = mean: linear discriminants of the tokens of each expert, C their covariance within experts; s sets the mean
    probability of the chosen expert to `GATE`. Without C^-1 (nearest mean) fewer tokens arrive where their latents are."""
    assert isinstance(router, LinearRouter)
    mean_D, count_E = x_TD.mean(dim=0), expert_T.bincount(minlength=router.num_experts)
    sum_ED = x_TD.new_zeros(router.num_experts, x_TD.shape[1]).index_add_(0, expert_T, x_TD - mean_D)
    shift_ED = sum_ED / count_E.clamp_min(1)[:, None]
    within_TD = x_TD - mean_D - shift_ED[expert_T]
    cov_DD = within_TD.T @ within_TD / len(x_TD)
    ridge_DD = torch.eye(len(cov_DD)).to(cov_DD) * (1e-2 * cov_DD.diagonal().mean() + 1e-12)
    logit_TE = (x_TD - mean_D) @ (row_ED := torch.linalg.solve(cov_DD + ridge_DD, shift_ED.T).T).T
    low, high = -10.0, 10.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.softmax(logit_TE * 2**middle, dim=1).amax(dim=1).mean() < GATE else (low, middle)
    router.W_ED.copy_(row_ED * 2**high)
    router.b_D.copy_(mean_D)


def _codes(dense: TopKSAE, rows: Rows) -> SparseLatents:
    parts = [dense.encode(x_TD) for x_TD in rows.x_TD.to(dense.activation_scale.device).split(_BATCH)]
    values_TK, indices_TK = (torch.cat([getattr(part, name) for part in parts]) for name in ("values_TK", "indices_TK"))
    return SparseLatents(values_TK, indices_TK, dense.num_latents)


def _k_means(profile_MR: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """[M] of one start: centres drawn far from each other (k-means++)."""
    far_M = profile_MR.square().sum(dim=1)  # 0 of what never fires
    centres: list[Tensor] = []
    for _ in range(num_experts):
        pick = int(torch.multinomial(far_M.cpu() + 1e-9, 1, generator=generator))
        centres.append(profile_MR[pick])
        far_M = far_M.minimum((1 - profile_MR @ centres[-1]).clamp_min(0))
    centre_ER, expert_M = torch.stack(centres), torch.full((len(profile_MR),), -1, device=profile_MR.device)
    for _ in range(_ROUNDS):
        before_M, expert_M = expert_M, balanced(profile_MR @ centre_ER.T)
        if torch.equal(before_M, expert_M):
            break
        centre_ER = F.normalize(torch.zeros_like(centre_ER).index_add_(0, expert_M, profile_MR), dim=1)
    return expert_M


def _refined(latents: SparseLatents, expert_M: Tensor, num_experts: int) -> tuple[float, Tensor]:
    """(energy kept, [M]) where no further round raises it."""
    square_TK = latents.values_TK**2
    total_M = square_TK.new_zeros(latents.num_latents).index_add_(0, latents.indices_TK.flatten(), square_TK.flatten())
    best = -1.0
    for _ in range(_ROUNDS):
        kept_T, token_T = expert_energies(latents, expert_M, num_experts).max(dim=1)
        if (kept := float(kept_T.sum())) <= best:
            break
        best, found_M = kept, expert_M
        place_TK = latents.indices_TK * num_experts + token_T[:, None]
        score = square_TK.new_zeros(latents.num_latents * num_experts).index_add_(0, place_TK.flatten(), square_TK.flatten())
        expert_M = balanced(score.view(-1, num_experts) / total_M.clamp_min(1e-12)[:, None])
    return best, found_M
