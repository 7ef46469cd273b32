"""Loss terms as pure functions. Every coefficient multiplies a quantity in the units of the reconstruction loss:
squared activations summed over D.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_kernels import ALONE, Dispatch, Group
from switch_sae.models.latents import Latents, SparseLatents
from switch_sae.models.routers.base import Rivals


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


def local_auxk_loss(
    residual_TD: Tensor,
    W_dec_MD: Tensor,
    dead_M: Tensor,
    dispatch: Dispatch,
    shared: int,
    group: Group = ALONE,
    encoder: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """AuxK over dictionaries: the residual of each token from the dead ones, at most D / 2, of its shared latents and its expert's.

    Codes are ReLU(W_enc x + b_enc) of an `encoder` (x_TD, W_enc_MD, b_enc_M), or of the residual's products with W_dec itself, held fixed. Gradients
    reach dead rows alone; the residual is fixed. With S experts per token (and no `encoder`) the parts of each and of the shared latents add up, each
    from at most D / 2 / S.
    """
    slots, most = dispatch.slots, max(1, max(1, residual_TD.shape[1] // 2) // dispatch.slots)
    latents = (len(dead_M) - shared) // dispatch.num_experts
    dead_shared, residual_ND = dead_M[:shared].nonzero()[:, 0], dispatch.gather(residual_TD)
    own = [own_F.nonzero()[:, 0] + shared + e * latents for e, own_F in enumerate(dead_M[shared:].split(latents))]
    dead = own if slots > 1 else [torch.cat([dead_shared, own_B]) for own_B in own]
    all_B, counts = torch.cat(dead), [len(dead_B) for dead_B in dead]
    W_dec = W_dec_MD.index_select(0, all_B).split(counts)  # once: each selection has a gradient of M rows
    if encoder is None:
        x_ND, W_in, b_in = residual_ND, W_dec_MD.detach().index_select(0, all_B).split(counts), None
    else:
        x_ND, (W_in, b_in) = dispatch.gather(encoder[0]), (weight.index_select(0, all_B).split(counts) for weight in encoder[1:])
    parts = [(x_ND[dispatch.offsets[e] : dispatch.offsets[e + 1]], W_in[e], None if b_in is None else b_in[e]) for e in range(dispatch.num_experts)]
    in_order_ND = torch.cat([_from_best(*part, W_dec[e], most) for e, part in enumerate(parts)])
    recon_TD = in_order_ND if dispatch.is_identity else torch.empty_like(in_order_ND).index_copy(0, dispatch.order_N, in_order_ND)
    if slots > 1:
        recon_TD = recon_TD.view(len(residual_TD), slots, -1).sum(dim=1)
        shared_BD = W_dec_MD.index_select(0, dead_shared)
        recon_TD = recon_TD + _from_best(residual_TD, shared_BD.detach(), None, shared_BD, most)
    return normalized_auxk_loss(residual_TD, recon_TD, group)


def _from_best(x_ND: Tensor, W_in_BD: Tensor, b_in_B: Tensor | None, W_dec_BD: Tensor, most: int) -> Tensor:
    """[N, D]: what the `most` largest of ReLU(W_in x + b_in) reconstruct."""
    pre_NB = F.linear(x_ND, W_in_BD, b_in_B)
    values, indices = pre_NB.topk(min(most, pre_NB.shape[1]), dim=1, sorted=False)
    return torch.zeros_like(pre_NB).scatter(1, indices, values.relu()) @ W_dec_BD


def competition_loss(
    rivals: Rivals, target_TD: Tensor, recon_TD: Tensor, own: Latents, theirs: SparseLatents, rival_nD: Tensor, price: Tensor | float = 0.0
) -> Tensor:
    """`Rivals.loss` of the first n tokens' costs, ||x - recon||^2 + price * L0, with the chosen expert's latents and with the rival's.

    Target and reconstructions, `rival_nD` that of the rival's latents, are scaled; no gradient reaches them.
    """
    with torch.no_grad():
        count = len(theirs.values_TK)
        target_nD = target_TD[:count]
        cost_n = (target_nD - recon_TD[:count]).square().sum(dim=1) + price * (own.values[:count] > 0).sum(dim=1)
        rival_cost_n = (target_nD - rival_nD).square().sum(dim=1) + price * (theirs.values_TK > 0).sum(dim=1)
    return rivals.loss(cost_n, rival_cost_n)


def coherence_loss(W_dec_MD: Tensor, experts: int, shared: int, cosine: float = 0.3) -> Tensor:
    """mean_i sum_{j != i} ReLU(cos_ij - cosine)^2 over pairs of unit rows that are in one dictionary: the shared rows and those of an expert."""
    own_EFD = W_dec_MD[shared:].view(experts, -1, W_dec_MD.shape[1])
    others_ECD = torch.cat([W_dec_MD[:shared].expand(experts, -1, -1), own_EFD], dim=1) if shared else own_EFD
    close_EFC = (own_EFD @ others_ECD.transpose(1, 2) - cosine).relu().square()
    diagonal_EF = close_EFC.diagonal(offset=shared, dim1=1, dim2=2)
    return (close_EFC.sum() - diagonal_EF.sum()) / own_EFD[..., 0].numel()


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
