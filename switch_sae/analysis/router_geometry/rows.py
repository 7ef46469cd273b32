"""What a router is as a set of directions, and how those lie to its experts' rows.

Shapes: E experts, D activation size, F latents per expert, T rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.analysis.recovery import cosines
from switch_sae.models import SparseLatents
from switch_sae.models.routers import Router


def raw_rows(router: Router) -> tuple[Tensor, str]:
    """(rows_ED, what they are): `Router.directions`. Raises ValueError for a router that has none."""
    rows_ED = router.directions()
    if rows_ED is None:
        raise ValueError(f"{type(router).__name__} routes by no directions, so it has no geometry of this kind. Leave its SAE out.")
    return rows_ED.detach().cpu().float(), router.directions_are


def centred(rows_ED: Tensor) -> Tensor:
    """Without the mean row, which adds the same to every expert's score: softmax and argmax ignore it. Rank E - 1 at most."""
    return rows_ED - rows_ED.mean(0)


def balance_of(config: dict[str, object]) -> str:
    """What keeps the load even, of the flat settings of an SAE: a loss, a bias, centroids, nothing, or a frozen router."""
    setting = {name: config.get(f"sae.router.{name}") for name in ("train", "load_balance", "rate", "decay")}
    if setting["train"] is False:
        return "frozen"
    return next((what for name, what in (("load_balance", "loss"), ("rate", "bias"), ("decay", "centroids")) if setting[name]), "none")


def mean_similarity(rows_ED: Tensor) -> float:
    """Mean cosine of different rows."""
    E = len(rows_ED)
    return float((cosines(rows_ED, rows_ED).sum() - E) / (E * (E - 1)))


def own_and_others(score_EE: Tensor) -> tuple[float, float, float]:
    """(mean of the diagonal, mean of the rest, AUC): AUC is the chance that an expert's own score beats that of another expert, ties half."""
    own_E1 = score_EE.diagonal()[:, None]
    other = ~torch.eye(len(score_EE), dtype=torch.bool)
    beats_EE = (own_E1 > score_EE).double() + 0.5 * (own_E1 == score_EE).double()
    return float(own_E1.mean()), float(score_EE[other].mean()), float(beats_EE[other].mean())


def relabelled(score_EE: Tensor, draws: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """([draws] mean own scores, [draws] AUC) with experts assigned to router rows at random."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [own_and_others(score_EE[:, torch.randperm(len(score_EE), generator=generator)]) for _ in range(draws)]
    return torch.tensor([own for own, _, _ in drawn]), torch.tensor([auc for _, _, auc in drawn])


def cosines_with_experts(rows_ED: Tensor, weight_EFD: Tensor) -> dict[str, Tensor]:
    """[router row, expert] by name: cosine with an expert's mean row (`mean`), with its difference from all experts' (`centred mean`), and |cosine|
    with its first right singular vector (`singular`), whose sign means nothing; Ahrac et al., arXiv 2605.12476."""
    mean_ED = weight_EFD.double().mean(1)
    top_ED = torch.stack([torch.linalg.svd(weight_FD.double(), full_matrices=False)[2][0] for weight_FD in weight_EFD])
    return {"mean": cosines(rows_ED, mean_ED), "centred mean": cosines(rows_ED, centred(mean_ED)), "singular": cosines(rows_ED, top_ED).abs()}


def cosines_with_tokens(rows_ED: Tensor, x_TD: Tensor, expert_T: Tensor) -> Tensor:
    """[router row, expert]: cosine with the mean of the expert's activations around the mean of all; 0 for an expert without any."""
    E = len(rows_ED)
    away_TD = x_TD.double() - x_TD.double().mean(0)
    sum_ED = torch.zeros(E, x_TD.shape[1], dtype=torch.float64).index_add_(0, expert_T, away_TD)
    return cosines(rows_ED, sum_ED)


def mean_rows(weight_MD: Tensor, latents: SparseLatents, expert_T: Tensor, num_experts: int) -> Tensor:
    """[E, D] mean unit row of latents that fire for an expert's tokens more than for any other's, for their number: an SAE without experts, sorted by
    another's routes. Latents that never fire are nobody's; 0 for an expert without any."""
    fires_TK = latents.values_TK != 0
    counts_ME = torch.zeros(latents.num_latents * num_experts, dtype=torch.float64)
    counts_ME.index_add_(0, (latents.indices_TK * num_experts + expert_T[:, None])[fires_TK], torch.ones(int(fires_TK.sum()), dtype=torch.float64))
    counts_ME = counts_ME.view(-1, num_experts)
    load_E = torch.bincount(expert_T, minlength=num_experts).clamp_min(1)
    live_M, owner_M = counts_ME.sum(1) > 0, (counts_ME / load_E).argmax(1)
    sum_ED = torch.zeros(num_experts, weight_MD.shape[1], dtype=torch.float64)
    sum_ED.index_add_(0, owner_M[live_M], F.normalize(weight_MD.double(), dim=1)[live_M])
    return sum_ED / torch.bincount(owner_M[live_M], minlength=num_experts).clamp_min(1)[:, None]


def expert_sums(x_TD: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None, k: int) -> dict[str, Tensor]:
    """[T, E] float32 by name, of all experts' pre-activations W_enc x + b_enc of centred activations: their `sum`, the sum of the positive ones
    (`positive`), of the k largest positive ones (`top k`)."""
    parts: dict[str, list[Tensor]] = {"sum": [], "positive": [], "top k": []}
    for x_tD in x_TD.split(2048):
        by_expert = []
        for expert, weight_FD in enumerate(weight_EFD):
            pre_tF = x_tD @ weight_FD.T
            if bias_EF is not None:
                pre_tF += bias_EF[expert]
            total_t = pre_tF.sum(1)
            pre_tF.clamp_(min=0)
            by_expert.append((total_t, pre_tF.sum(1), pre_tF.topk(min(k, pre_tF.shape[1]), dim=1, sorted=False).values.sum(1)))
        for name, columns in zip(parts, zip(*by_expert, strict=True), strict=True):
            parts[name].append(torch.stack(columns, dim=1))
    return {name: torch.cat(chunks) for name, chunks in parts.items()}


def correlations(first_TE: Tensor, second_TE: Tensor) -> Tensor:
    """[E, E] float64: Pearson's correlation over rows of each column with each of the other; 0 for a column that does not vary."""
    away_TE, other_TE = (values.double() - values.double().mean(0) for values in (first_TE, second_TE))
    unit_TE, unit_other_TE = (F.normalize(values, dim=0) for values in (away_TE, other_TE))
    return unit_TE.T @ unit_other_TE
