"""Where experts store the same directions: similarity between experts, beside a dense SAE cut into as many blocks."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from switch_sae.analysis.features.neighbours import decoder_geometry
from switch_sae.results.rows import ResultRow
from switch_sae.results.selection import Material, NotEnough, common_k, references
from switch_sae.style import Drawing, canvas, legends, look, matrix, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def draw(material: Material) -> Drawing:
    """[a, b]: mean over expert a's live decoder rows of the highest cosine to expert b's, beside a dense SAE cut into as many arbitrary blocks.

    Of one pair with equal width, k and seed: the number of experts nearest to the paper's 16. Raises NotEnough where there is no such pair.
    """
    routed, dense = _pair(material)
    experts = routed.num_experts
    matrices = {
        name: decoder_geometry(row.load().decoder_weight(), experts, row.firing_counts).similarity_EE()
        for name, row in ((look(*routed.kind).label, routed), (f"dense {dense.kind.family.label} in {experts} arbitrary blocks", dense))
    }
    table = [
        {"sae": name, "latents": routed.num_latents, "k": routed.k, "seed": routed.seed, "rows_of": a, "nearest_in": b, "cosine": float(matrix[a, b])}
        for name, matrix in matrices.items()
        for a in range(experts)
        for b in range(experts)
    ]
    return Drawing(_figure(routed, matrices), table)


def _pair(material: Material) -> tuple[ResultRow, ResultRow]:
    standard = [group for group in material.standard() if group.first.k is not None]
    dense = {(row.num_latents, row.k, row.seed): row for group in references(standard) for row in group.rows if row.has_weights}
    pairs = [
        (row, group)
        for group in standard
        for row in group.rows
        if row.num_experts > 1
        and not row.num_shared
        and row.kind.experts_per_token == 1
        and row.has_weights
        and (row.num_latents, row.k, row.seed) in dense
    ]
    if not pairs:
        raise NotEnough("no Switch SAE has a dense TopK SAE of the same num_latents, k and seed beside it.")
    k = common_k([group for _, group in pairs])
    best, _ = min(pairs, key=lambda pair: (pair[0].k != k, abs(math.log2(pair[0].num_experts / 16)), -pair[0].num_latents, pair[0].seed))
    return best, dense[best.num_latents, best.k, best.seed]


def _figure(routed: ResultRow, matrices: dict[str, Tensor]) -> "Figure":
    experts = routed.num_experts
    values = torch.stack(list(matrices.values()))
    values = values[values.isfinite()]
    places = [str(e) if experts <= 8 or e % 2 == 0 else "" for e in range(experts)]
    figure = canvas(6.8, 3.9)
    axes = list(figure.subplots(1, 2, sharey=True))
    for axis, (name, cosines) in zip(axes, matrices.items(), strict=True):
        image = matrix(axis, cosines.numpy(), float(values.min()), float(values.max()), (places, places) if experts <= 16 else None)
        off = cosines[~torch.eye(experts, dtype=torch.bool)]
        axis.set_title(f"{name}\noff the diagonal {float(off.nanmean()):.3f}, on it {float(cosines.diagonal().nanmean()):.3f}", fontsize=8.5)
        axis.set_xlabel("nearest row in expert")
    axes[0].set_ylabel("rows of expert")
    figure.colorbar(image, ax=axes, label="mean highest cosine", shrink=0.85)
    sizes = f"{routed.num_latents:,} latents in all, k = {routed.k}, seed {routed.seed}; live latents."
    legends(figure, f"{sizes} On the diagonal: to the nearest other row of the same expert.")
    return figure
