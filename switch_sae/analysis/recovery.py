"""Scores against a known dictionary, for synthetic activations."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Recovery:
    """How well decoder rows d_m match true directions g_j."""

    mcc: float
    """Mean |cos| over the one-to-one matches that maximise their sum (Hungarian algorithm); min(M, G) matches. SAELens' convention."""
    recall: float
    """Share of true directions with cos(d_m, g_j) > threshold for some latent m; signed, since latents are >= 0."""
    precision: float
    """Share of latents with cos(d_m, g_j) > threshold for some j."""
    uniqueness: float
    """Number of different true directions that are some latent's best (highest |cos|), over M: 1 when no two latents share one."""
    mmcs: float
    """Mean over latents of max_j cos(d_m, g_j). It rewards duplicates: read it beside uniqueness and recall."""


def recovery(decoder_MD: Tensor, truth_GD: Tensor, threshold: float = 0.9, firing_counts: Tensor | None = None) -> Recovery:
    """Matches decoder rows with a known dictionary; with `firing_counts` [M], only latents that fired.

    Needs scipy and an [M, G] matrix. Raises ValueError for sizes that do not fit, rows of norm 0 or no latent alive.
    """
    from scipy.optimize import linear_sum_assignment

    if decoder_MD.ndim != 2 or truth_GD.ndim != 2 or decoder_MD.shape[1] != truth_GD.shape[1]:
        raise ValueError(f"decoder {tuple(decoder_MD.shape)} and true dictionary {tuple(truth_GD.shape)} must be [latents, D] and [directions, D].")
    decoder_MD, truth_GD = decoder_MD.detach().cpu(), truth_GD.detach().cpu()
    if firing_counts is not None:
        decoder_MD = decoder_MD[firing_counts.cpu() > 0]
    if len(decoder_MD) == 0 or len(truth_GD) == 0:
        raise ValueError(f"nothing to match: {len(decoder_MD)} live latents and {len(truth_GD)} true directions.")
    if bool((decoder_MD.norm(dim=1) == 0).any()) or bool((truth_GD.norm(dim=1) == 0).any()):
        raise ValueError("some rows are exactly 0 and have no direction. Give firing_counts to leave dead latents out.")
    cosine_MG = F.normalize(decoder_MD.double(), dim=1) @ F.normalize(truth_GD.double(), dim=1).T
    absolute_MG = cosine_MG.abs()
    rows, columns = linear_sum_assignment(absolute_MG.numpy(), maximize=True)
    return Recovery(
        mcc=float(absolute_MG[rows, columns].mean()),
        recall=float((cosine_MG.amax(0) > threshold).double().mean()),
        precision=float((cosine_MG.amax(1) > threshold).double().mean()),
        uniqueness=len(absolute_MG.argmax(1).unique()) / len(absolute_MG),
        mmcs=float(cosine_MG.amax(1).mean()),
    )


def normalized_mutual_information(first_T: Tensor, second_T: Tensor) -> float:
    """NMI = 2 I(A; B) / (H(A) + H(B)) of two labellings of the same rows, such as the routed expert and the true topic.

    1 when they are the same partition, two constant labellings included; unrelated labellings score a little above 0, by about
    (|A| - 1)(|B| - 1) / T / (H(A) + H(B)). Raises ValueError for labellings of different or no length.
    """
    if first_T.ndim != 1 or first_T.shape != second_T.shape or len(first_T) == 0:
        raise ValueError(f"labellings have shapes {tuple(first_T.shape)} and {tuple(second_T.shape)}; both must be [rows] with at least one row.")
    first, second = first_T.unique(return_inverse=True)[1], second_T.unique(return_inverse=True)[1]
    joint = torch.zeros(int(first.max()) + 1, int(second.max()) + 1, dtype=torch.float64, device=first.device)
    joint.index_put_((first, second), torch.ones_like(first, dtype=torch.float64), accumulate=True)
    joint /= joint.sum()
    entropy_first, entropy_second = torch.special.entr(joint.sum(1)).sum(), torch.special.entr(joint.sum(0)).sum()
    if entropy_first + entropy_second == 0:
        return 1.0
    information = entropy_first + entropy_second - torch.special.entr(joint).sum()
    return float((2 * information / (entropy_first + entropy_second)).clamp(0, 1))
