"""Scores against a known dictionary, for synthetic activations."""

import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.activations.synthetic import SyntheticSource
from switch_sae.analysis.assignment import LARGEST, one_to_one
from switch_sae.metrics.forward import sae_outputs
from switch_sae.models import SparseAutoencoder
from switch_sae.rows import Rows

THRESHOLD = 0.9
"""A direction is found where a latent's cosine to it is larger."""


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


def recovery(decoder_MD: Tensor, truth_GD: Tensor, threshold: float = THRESHOLD, firing_counts: Tensor | None = None) -> Recovery:
    """Matches decoder rows with a known dictionary; with `firing_counts` [M], only latents that fired.

    Needs scipy and an [M, G] matrix. Raises ValueError for sizes that do not fit, rows of norm 0 or no latent alive.
    """
    if decoder_MD.ndim != 2 or truth_GD.ndim != 2 or decoder_MD.shape[1] != truth_GD.shape[1]:
        raise ValueError(f"decoder {tuple(decoder_MD.shape)} and true dictionary {tuple(truth_GD.shape)} must be [latents, D] and [directions, D].")
    decoder_MD, truth_GD = decoder_MD.detach().cpu(), truth_GD.detach().cpu()
    if firing_counts is not None:
        decoder_MD = decoder_MD[firing_counts.cpu() > 0]
    if len(decoder_MD) == 0 or len(truth_GD) == 0:
        raise ValueError(f"nothing to match: {len(decoder_MD)} live latents and {len(truth_GD)} true directions.")
    if bool((decoder_MD.norm(dim=1) == 0).any()) or bool((truth_GD.norm(dim=1) == 0).any()):
        raise ValueError("some rows are exactly 0 and have no direction. Give firing_counts to leave dead latents out.")
    cosine_MG = cosines(decoder_MD, truth_GD)
    absolute_MG = cosine_MG.abs()
    return Recovery(
        mcc=mean_best_match(cosine_MG),
        recall=float((cosine_MG.amax(0) > threshold).double().mean()),
        precision=float((cosine_MG.amax(1) > threshold).double().mean()),
        uniqueness=len(absolute_MG.argmax(1).unique()) / len(absolute_MG),
        mmcs=float(cosine_MG.amax(1).mean()),
    )


@torch.no_grad()
def recovery_scores(sae: SparseAutoencoder, source: SyntheticSource, rows: Rows, row_T: Tensor | None = None) -> dict[str, float | None]:
    """How well an SAE found the world behind its activations; `rows` are those of `source.evaluation_set(len(rows))`, or `row_T` of a longer one.

    `mcc` and `recall` of `recovery` over latents that fire on these rows; `recall_common` and `recall_topic`, of the directions that all topics share
    and of single topics', where there are both; `nmi` of the (likeliest) expert and the true topic, None without experts. `mcc` is None where the
    matching would be larger than `LARGEST` or scipy, which does it, is not installed; all are 0 for an SAE that never fires.
    """
    truth = source.truth()
    device = sae.decoder_weight().device
    counts_M, experts = torch.zeros(sae.num_latents, device=device), []
    for _, _, output in sae_outputs(sae, rows):
        counts_M += output.latents.firing_counts()
        experts += [] if output.routing is None else [output.routing.expert_TS[:, 0].cpu()]
    decoder_MD, truth_GD, common_G = sae.decoder_weight()[counts_M > 0], truth.dictionary_GD.to(device), truth.is_common_G.to(device)
    parts = {"recall": torch.ones_like(common_G)} | ({"recall_common": common_G, "recall_topic": ~common_G} if len(common_G.unique()) > 1 else {})
    if len(decoder_MD) == 0:
        return dict.fromkeys(("mcc", *parts, "nmi"), 0.0) | ({} if experts else {"nmi": None})
    cosine_MG = cosines(decoder_MD, truth_GD)
    row_T = torch.arange(len(rows)) if row_T is None else row_T.cpu()
    nmi = normalized_mutual_information(torch.cat(experts), source.evaluation_truth(int(row_T.max()) + 1).topic_T.cpu()[row_T]) if experts else None
    can_match = min(cosine_MG.shape) <= LARGEST and importlib.util.find_spec("scipy") is not None
    recalls = {name: float((cosine_MG[:, chosen].amax(0) > THRESHOLD).double().mean()) for name, chosen in parts.items()}
    return {"mcc": mean_best_match(cosine_MG) if can_match else None, **recalls, "nmi": nmi}


def cosines(first_AD: Tensor, second_BD: Tensor) -> Tensor:
    """[A, B] of each row with each of the other, float64."""
    return F.normalize(first_AD.detach().double(), dim=1) @ F.normalize(second_BD.detach().double(), dim=1).T


def mean_best_match(cosine_MG: Tensor) -> float:
    """Mean |cos| over the one-to-one matches that maximise its sum. Needs scipy."""
    absolute_MG = cosine_MG.abs().cpu()
    return float(absolute_MG[one_to_one(absolute_MG)].mean())


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
