"""Where decoders store a direction twice: how many latents have a near copy, in their own expert or in another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from switch_sae.activations.base import ActivationSource
from switch_sae.analysis.base import Analysis, Table
from switch_sae.analysis.features.neighbours import decoder_geometry
from switch_sae.checks import Settings
from switch_sae.results.kind import Kind
from switch_sae.results.rows import ResultRow
from switch_sae.style import log_if_wide, look, panels, percent, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Duplication(Analysis):
    """Shares of live latents whose nearest other decoder row has a cosine above `threshold`, and the mean of that cosine (Mudide et al.)."""

    @dataclass
    class Config(Settings):
        threshold: float = 0.9
        """The paper's."""

        def __post_init__(self) -> None:
            if not 0 < self.threshold < 1:
                raise ValueError(f"threshold={self.threshold} must lie between 0 and 1, as a cosine does.")

    config: "Duplication.Config"

    def compute(self, saes: Sequence[ResultRow], source: ActivationSource | None) -> Table:
        """One record per SAE; M^2 D work each. Shares are None where no latent fired."""
        table = []
        for row in saes:
            geometry = decoder_geometry(row.load().decoder_weight(), row.num_experts, row.firing_counts, row.num_shared)
            live = int(geometry.alive_M.sum())
            shares = geometry.duplicate_shares(self.config.threshold) if live else dict.fromkeys(("any", "within", "across"), math.nan)
            sizes = {"sae": row.name, **row.kind._asdict(), "latents": row.num_latents, "k": row.k, "seed": row.seed, "live": live}
            measures = {"duplicates": shares["any"], "within": shares["within"], "across": shares["across"]}
            table.append(sizes | measures | {"nearest_cosine": float(geometry.nearest_M.double().nanmean())})
        return table

    @styled
    def draw(self, table: Table) -> "Figure":
        """One line per SAE: its share of duplicates, and its mean cosine."""
        labels = {
            "duplicates": f"share of live latents with a\nneighbour of cosine > {self.config.threshold:g}",
            "nearest_cosine": "mean highest cosine",
        }
        figure, axes = panels(len(labels), 1, width=3.4, height=0.9 + 0.24 * len(table), sharey=True)
        for axis, (measure, label) in zip(axes, labels.items(), strict=True):
            known = [(place, record) for place, record in enumerate(table) if record[measure] is not None]
            for place, record in known:
                axis.plot(record[measure], place, clip_on=False, **look(*Kind.of(record)).style())
            log_if_wide(axis, [record[measure] for _, record in known] or [1.0])
            axis.set_xlabel(label)
            axis.grid(axis="x", linewidth=0.4, color="0.88")
        axes[0].xaxis.set_major_formatter(percent())
        if axes[0].get_xscale() == "linear":  # shares begin at 0, also where all are 0
            axes[0].set_xlim(0, max(0.01, 1.1 * max((record["duplicates"] or 0.0 for record in table), default=0.0)))
        axes[0].set_yticks(range(len(table)), [record["sae"] for record in table])
        axes[0].set_ylim(len(table) - 0.5, -0.5)
        return figure
