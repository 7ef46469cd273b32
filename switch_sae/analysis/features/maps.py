"""Two-dimensional maps of many directions: a small exact t-SNE without further packages, how much of the neighbourhoods it keeps, and its drawing."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from switch_sae.style import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = (*(colour for colour in COLOURS if colour != "#000000"), "#882255", "#7A7A7A")
"""Of single experts, not of numbers of experts: no black, which would lie over all others; Tol's wine and a grey."""
LAYERS = 16
"""Parts of a random order in which all experts are drawn, so that none covers the others."""
STEPS, EXAGGERATED, EXAGGERATION = 300, 80, 12.0
HALVINGS = 30


def layout(unit_ND: Tensor, perplexity: float = 30.0) -> Tensor:
    """[N, 2]: t-SNE of unit rows (van der Maaten & Hinton, JMLR 9, 2008), every pair computed, from the first two principal components; the same on
    every call. Time and memory grow with N^2: about 3 s for 1,000 rows. Raises ValueError for fewer than 4 rows.
    """
    rows = len(unit_ND)
    if rows < 4:
        raise ValueError(f"{rows} rows make no map. Give at least 4.")
    p_NN = affinities(unit_ND, min(perplexity, (rows - 1) / 3))
    xy_N2 = principal(unit_ND)
    xy_N2 = 1e-4 * xy_N2 / xy_N2[:, 0].std()
    rate, velocity_N2, gain_N2 = max(rows / EXAGGERATION, 50.0), torch.zeros_like(xy_N2), torch.ones_like(xy_N2)
    work = (torch.empty_like(p_NN), torch.empty_like(p_NN))
    p_NN *= EXAGGERATION
    for step in range(STEPS):
        early = step < EXAGGERATED
        if step == EXAGGERATED:
            p_NN /= EXAGGERATION
        gradient_N2 = pull(p_NN, xy_N2, work)
        gain_N2 = torch.where(gradient_N2.sign() != velocity_N2.sign(), gain_N2 + 0.2, gain_N2 * 0.8).clamp(min=0.01)
        velocity_N2 = (0.5 if early else 0.8) * velocity_N2 - rate * gain_N2 * gradient_N2
        xy_N2 = xy_N2 + velocity_N2
        xy_N2 = xy_N2 - xy_N2.mean(0)
    return xy_N2


def affinities(unit_ND: Tensor, perplexity: float) -> Tensor:
    """[N, N], symmetric, sums to 1: Gaussians around each row, each as wide as makes the exponent of its entropy `perplexity`, by bisection."""
    rows = len(unit_ND)
    distance_NN = (2 - 2 * unit_ND @ unit_ND.T).clamp(min=0)
    distance_NN.fill_diagonal_(torch.inf)
    distance_NN -= distance_NN.amin(1, keepdim=True)  # cancels, and keeps exponentials from vanishing
    low_N, high_N = torch.full((rows,), -15.0), torch.full((rows,), 25.0)
    for _ in range(HALVINGS):
        middle_N = (low_N + high_N) / 2
        p_NN = (-distance_NN * middle_N.exp()[:, None]).softmax(1)
        wide_N = torch.special.entr(p_NN).sum(1).exp() > perplexity
        low_N, high_N = torch.where(wide_N, middle_N, low_N), torch.where(wide_N, high_N, middle_N)
    return (p_NN + p_NN.T) / (2 * rows)


def pull(p_NN: Tensor, xy_N2: Tensor, work: tuple[Tensor, Tensor]) -> Tensor:
    """[N, 2], the gradient of KL(P || Q): 4 sum_j (p_ij - q_ij) (y_i - y_j) / (1 + |y_i - y_j|^2), with q_ij in proportion to the last factor.

    `work` are two tensors to compute in: making them anew takes longer than the sums.
    """
    near_NN, force_NN = work
    norm_N = xy_N2.square().sum(1)
    torch.mm(xy_N2, xy_N2.T, out=near_NN)
    near_NN.mul_(-2).add_(norm_N[:, None] + 1).add_(norm_N).clamp_(min=1).reciprocal_().fill_diagonal_(0)
    torch.sub(p_NN, near_NN, alpha=float(1 / near_NN.sum()), out=force_NN).mul_(near_NN)
    return 4 * (force_NN.sum(1, keepdim=True) * xy_N2 - force_NN @ xy_N2)


def principal(rows_ND: Tensor) -> Tensor:
    """[N, 2]: the first two principal components; of each direction's two signs the one that makes its largest coordinate positive."""
    centred_ND = rows_ND - rows_ND.mean(0)
    direction_D2 = torch.linalg.eigh(centred_ND.T.double() @ centred_ND.double()).eigenvectors[:, -2:].flip(1)
    direction_D2 = direction_D2 * direction_D2.gather(0, direction_D2.abs().argmax(0, keepdim=True)).sign()
    return centred_ND @ direction_D2.to(rows_ND.dtype)


def preservation(unit_ND: Tensor, xy_N2: Tensor, k: int) -> float:
    """mean_i |N_k(i) and N'_k(i)| / k: the share of the k nearest rows by cosine that are among the k nearest on the map. By chance k / (N - 1)."""
    similarities = (unit_ND @ unit_ND.T, -torch.cdist(xy_N2.double(), xy_N2.double()))
    first_Nk, second_Nk = (each.fill_diagonal_(-torch.inf).topk(k, dim=1).indices for each in similarities)
    kept_NN = torch.zeros(len(xy_N2), len(xy_N2), dtype=torch.bool).scatter_(1, first_Nk, True)
    return float(kept_NN.gather(1, second_Nk).double().mean())


def scatter(axis: "Axes", xy: Tensor, expert: Tensor, experts: int) -> None:
    """Points coloured (and, up to 16 experts, shaped) by expert, without axes; latents of no expert (-1) are black."""
    size = 7.0 if len(xy) < 1500 else 3.0
    order = torch.randperm(len(xy), generator=torch.Generator().manual_seed(0))
    for layer in order.tensor_split(min(LAYERS, len(order))):
        for e in expert[layer].unique().tolist():
            mine = xy[layer][expert[layer] == e]
            colour = "#000000" if e < 0 else PALETTE[e % len(PALETTE)]
            marker = MARKERS[e % len(MARKERS)] if experts <= 16 else "."
            axis.scatter(mine[:, 0], mine[:, 1], s=size, color=colour, marker=marker, linewidths=0, alpha=0.8, rasterized=True)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_box_aspect(1)
    middle, half = (xy.amax(0) + xy.amin(0)) / 2, 0.52 * float((xy.amax(0) - xy.amin(0)).max())
    axis.set_xlim(float(middle[0]) - half, float(middle[0]) + half)
    axis.set_ylim(float(middle[1]) - half, float(middle[1]) + half)
