"""Loss terms as pure functions. Every coefficient multiplies a quantity in the units of the reconstruction loss: squared activations summed over D."""

import torch
from torch import Tensor


def reconstruction_loss(residual_TD: Tensor) -> Tensor:
    """mean_t sum_d r[t, d]^2, the paper's L_recon (Mudide et al., arXiv 2410.08201); with scaled activations it is D times the uncentred FVU."""
    return residual_TD.pow(2).sum(dim=1).mean()


def load_balance_loss(expert_TS: Tensor, probs_TE: Tensor) -> Tensor:
    """L_aux = E * sum_i f_i P_i; 1 when balanced, E when one expert takes all (Fedus et al., arXiv 2101.03961, eq. 4; arXiv 2410.08201).

    f_i is the share of (token, slot) pairs routed to expert i and carries no gradient; P_i is the mean probability of expert i.
    """
    num_experts = probs_TE.shape[1]
    return num_experts * torch.dot(expert_shares(expert_TS, num_experts).to(probs_TE.dtype), probs_TE.mean(dim=0))


def expert_shares(expert_TS: Tensor, num_experts: int) -> Tensor:
    """[E] share of (token, slot) pairs that each expert receives; sums to 1."""
    counts_E = torch.zeros(num_experts, device=expert_TS.device)
    counts_E.scatter_add_(0, expert_TS.flatten().long(), torch.ones(expert_TS.numel(), device=expert_TS.device))
    return counts_E / expert_TS.numel()


def normalized_auxk_loss(residual_TD: Tensor, recon_TD: Tensor) -> Tensor:
    """sum_t ||e_t - e^_t||^2 / sum_t ||e_t - mean(e)||^2 for a fixed residual e and its reconstruction from dead latents (Gao et al., arXiv 2406.04093, A.2).

    The residual must be detached: AuxK moves dead latents towards what the others miss, and never the others. 0 where the residual has no variance.
    """
    scale = (residual_TD - residual_TD.mean(dim=0)).pow(2).sum()
    return torch.where(scale > 0, (residual_TD - recon_TD).pow(2).sum() / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)


def geometric_median(x_TD: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least summed distance to all rows, by Weiszfeld's iteration: a centre that outlier tokens hardly move."""
    point_D = x_TD.mean(dim=0)
    for _ in range(iterations):
        weight_T = 1.0 / torch.linalg.vector_norm(x_TD - point_D, dim=1).clamp_min(1e-8)
        moved_D = (weight_T / weight_T.sum()) @ x_TD
        done = torch.linalg.vector_norm(moved_D - point_D) < tolerance * torch.linalg.vector_norm(point_D).clamp_min(1e-8)
        point_D = moved_D
        if done:
            break
    return point_D
