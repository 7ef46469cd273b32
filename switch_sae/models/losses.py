"""Loss terms as pure functions. Every coefficient multiplies a quantity in the units of the reconstruction loss:
squared activations summed over D.
"""

import torch
from torch import Tensor

from switch_kernels import ALONE, Group


def reconstruction_loss(residual_TD: Tensor) -> Tensor:
    """mean_t sum_d r[t, d]^2, the paper's L_recon (Mudide et al., arXiv 2410.08201); with scaled activations it is D times the uncentred FVU."""
    return residual_TD.pow(2).sum(dim=1).mean()


def normalized_auxk_loss(residual_TD: Tensor, recon_TD: Tensor, group: Group = ALONE) -> Tensor:
    """sum_t ||e_t - e^_t||^2 / sum_t ||e_t - mean(e)||^2 for a fixed residual e and its reconstruction from dead latents.

    Gao et al., arXiv 2406.04093, A.2. The residual must be detached: AuxK moves dead latents towards what the others miss, and never the others. 0
    where the residual has no variance. Mean and variance are over all processes that share the batch; the mean of this over them is the batch's loss.
    """
    (mean_D,) = group.mean([residual_TD.mean(dim=0)])
    (scale,) = group.mean([(residual_TD - mean_D).pow(2).sum()])
    return torch.where(scale > 0, (residual_TD - recon_TD).pow(2).sum() / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)


def geometric_median(x_TD: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least summed distance to all rows, by Weiszfeld's iteration: a centre that outlier tokens hardly move.

    At least in float32: in half precision the smallest distance would be 0. Raises ValueError where there are no rows.
    """
    if not len(x_TD):
        raise ValueError("no rows have no centre. Initialise an SAE with a large batch of activations.")
    x_TD = x_TD if x_TD.dtype == torch.float64 else x_TD.float()
    point_D = x_TD.mean(dim=0)
    for _ in range(iterations):
        weight_T = 1.0 / torch.linalg.vector_norm(x_TD - point_D, dim=1).clamp_min(1e-8)
        moved_D = (weight_T / weight_T.sum()) @ x_TD
        done = torch.linalg.vector_norm(moved_D - point_D) < tolerance * torch.linalg.vector_norm(point_D).clamp_min(1e-8)
        point_D = moved_D
        if done:
            break
    return point_D
