"""Encoder and decoder rows of one Switch SAE in two dimensions, coloured by expert: do experts own regions of activation space?"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.analysis.features.maps import PALETTE, scatter
from switch_sae.analysis.features.neighbours import decoder_geometry
from switch_sae.results.rows import ResultRow
from switch_sae.results.selection import Material, NotEnough, common_k
from switch_sae.runs import MODEL_FILE
from switch_sae.style import MARKERS, Drawing, canvas, legends, mark, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 4000
"""Rows that t-SNE places, evenly spaced over the live latents: about half a minute on 2 cores."""
PERPLEXITY, LEARNING_RATE, SEED = 50, 100, 0
"""As in the paper."""


@styled
def draw(material: Material) -> Drawing:
    """t-SNE of unit encoder and decoder rows of one Switch SAE, with the share of rows whose nearest other row, by cosine, is of the same expert.

    The share is of all live latents in D dimensions; by chance it is about 1 / E. Chosen is the number of experts nearest to the paper's 8. Raises
    NotEnough without a Switch SAE, ImportError without scikit-learn.
    """
    row = _chosen(material)
    sae, counts = row.load(), row.firing_counts
    live = (counts > 0).nonzero()[:, 0]
    live = live[live >= row.num_shared]
    if len(live) < 8:
        raise NotEnough(f"only {len(live)} latents of {row.name} fired on the evaluation rows.")
    weights: dict[str, Tensor] = {"encoder": sae.get_parameter("W_enc_MD").detach(), "decoder": sae.decoder_weight().detach()}
    shares = {name: decoder_geometry(weight, row.num_experts, counts, row.num_shared).same_expert_share() for name, weight in weights.items()}
    shown = live[torch.linspace(0, len(live) - 1, min(SHOWN, len(live))).round().long().unique()]
    expert = (shown - row.num_shared) // row.latents_per_expert
    places = {name: embed(F.normalize(weight[shown].float(), dim=1)) for name, weight in weights.items()}
    table = [
        {"rows": name, "latent": int(latent), "expert": int(of), "x": float(x), "y": float(y), "same_expert_share": shares[name]}
        for name, xy in places.items()
        for latent, of, (x, y) in zip(shown, expert, xy.tolist(), strict=True)
    ]
    return Drawing(_figure(row, places, expert, shares, len(live)), table)


def embed(rows: Tensor) -> Tensor:
    """[rows, 2] by t-SNE (van der Maaten & Hinton 2008), the paper's settings; the perplexity is at most a third of the rows."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError(
            f'the t-SNE figure needs scikit-learn ({error}). Type pip install "switch-sae[figures]", or pip install scikit-learn.'
        ) from error
    perplexity = min(PERPLEXITY, max(1, (len(rows) - 1) // 3))
    return torch.from_numpy(TSNE(perplexity=perplexity, learning_rate=LEARNING_RATE, random_state=SEED, init="pca").fit_transform(rows.numpy()))


def _chosen(material: Material) -> ResultRow:
    groups = [group for group in material.standard() if group.first.num_experts > 1 and group.first.kind.experts_per_token == 1]
    rows = [row for group in groups for row in group.rows if row.has_weights and row.kind.family.has_encoder]
    if not rows:
        raise NotEnough(f"there is no finished Switch SAE with its {MODEL_FILE}.")
    k = common_k(groups)
    return min(rows, key=lambda row: (abs(math.log2(row.num_experts / 8)), row.k != k, -row.num_latents, row.seed))


def _figure(row: ResultRow, places: dict[str, Tensor], expert: Tensor, shares: dict[str, float], live: int) -> "Figure":
    figure = canvas(6.8, 4.0)
    chance = 1 / row.num_experts
    for axis, (name, xy) in zip(figure.subplots(1, 2), places.items(), strict=True):
        scatter(axis, xy, expert, row.num_experts)
        title = f"{name} rows: {shares[name]:.1%} have their nearest row\nin their own expert (chance 1/E = {chance:.1%})"
        axis.set_title(title, fontsize=8.5)
    handles = [
        mark(str(e), color=PALETTE[e % len(PALETTE)], marker=MARKERS[e % len(MARKERS)], linestyle="none", markersize=4)
        for e in range(row.num_experts if row.num_experts <= 16 else 0)
    ]
    text = (
        f"t-SNE (perplexity {PERPLEXITY}, learning rate {LEARNING_RATE}, seed {SEED}) of {len(expert):,} of {live:,} live latents, as unit vectors. "
        f"{row.kind.family.label} SAE of {row.num_experts} experts, {row.num_latents:,} latents in all, k = {row.k}, seed {row.seed}. "
        "Shares are of all live latents."
    )
    legends(figure, text, handles, columns=16, title="expert", handlelength=1)
    return figure
