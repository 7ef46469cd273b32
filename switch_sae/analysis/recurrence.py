"""Which latents come back with another seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.activations.base import ActivationSource
from switch_sae.analysis.base import Analysis, Table
from switch_sae.analysis.features.neighbours import BLOCK_ELEMENTS
from switch_sae.checks import Settings
from switch_sae.results.kind import Kind
from switch_sae.results.rows import ResultRow
from switch_sae.results.summary import summary
from switch_sae.style import look, panels, percent, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Recurrence(Analysis):
    """For every pair of SAEs that differ only in their seed: shares of one's live latents for which the other has a live decoder row at a cosine of
    at least `close`, and `near`; and the mean of the largest cosine. The null (`null_...`) is the same against the other's rows after a random
    rotation, which keeps how they lie to each other and nothing else.
    """

    @dataclass
    class Config(Settings):
        close: float = 0.9
        near: float = 0.7

        def __post_init__(self) -> None:
            for name in ("close", "near"):
                if not 0 < getattr(self, name) < 1:
                    raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1, as a cosine does.")

    each_alone = False
    config: "Recurrence.Config"

    def compute(self, saes: Sequence[ResultRow], source: ActivationSource | None) -> Table:
        """One record per ordered pair; M^2 D work each. Raises ValueError where no two SAEs differ only in their seed."""
        table: Table = []
        for group in summary(saes):
            if len(group.rows) < 2:
                continue
            rows = {row.seed: row for row in group.rows}
            live = {seed: _live_rows(row) for seed, row in rows.items()}
            for seed, other in permutations(rows, 2):
                row = rows[seed]
                sizes = {"sae": row.name, **row.kind._asdict(), "latents": row.num_latents, "k": row.k, "seed": seed, "other_seed": other}
                sizes |= {"live": len(live[seed]), "other_live": len(live[other])}
                measures = self._measures(live[seed], live[other])
                null = self._measures(live[seed], live[other] @ _rotation(live[other].shape[1]))
                table.append(sizes | measures | {f"null_{name}": value for name, value in null.items()})
        if not table:
            raise ValueError("no two of these SAEs differ only in their seed, so nothing can recur. Give runs of at least two seeds.")
        return table

    def _measures(self, unit_MD: Tensor, other_MD: Tensor) -> dict[str, Any]:
        if not len(unit_MD) or not len(other_MD):
            return {"close": math.nan, "near": math.nan, "cosine": math.nan}
        nearest_M = torch.cat([(rows @ other_MD.T).amax(1) for rows in unit_MD.split(max(1, BLOCK_ELEMENTS // len(other_MD)))]).double()
        shares = {name: float((nearest_M >= getattr(self.config, name)).double().mean()) for name in ("close", "near")}
        return {**shares, "cosine": float(nearest_M.mean())}

    @styled
    def draw(self, table: Table) -> "Figure":
        """One line per SAE, a mark for each other seed; nulls are grey."""
        labels = {
            "close": f"share of live latents that recur\nat cosine ≥ {self.config.close:g}",
            "near": f"at cosine ≥ {self.config.near:g}",
            "cosine": "mean highest cosine",
        }
        names = list(dict.fromkeys(record["sae"] for record in table))
        figure, axes = panels(len(labels), 1, width=2.6, height=0.9 + 0.24 * len(names), sharey=True)
        for axis, (measure, label) in zip(axes, labels.items(), strict=True):
            for record in table:
                place = names.index(record["sae"])
                if record[measure] is not None:
                    axis.plot(record[f"null_{measure}"], place, "|", color="0.6", clip_on=False)
                    axis.plot(record[measure], place, clip_on=False, **look(*Kind.of(record)).style())
            axis.set_xlabel(label)
            axis.set_xlim(left=0)
            axis.grid(axis="x", linewidth=0.4, color="0.88")
        for axis in axes[:2]:
            axis.xaxis.set_major_formatter(percent())
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set_ylim(len(names) - 0.5, -0.5)
        return figure


def _live_rows(row: ResultRow) -> Tensor:
    """[live, D] decoder rows of unit norm."""
    weight_MD = row.load().decoder_weight().detach().float()
    counts = row.firing_counts
    return F.normalize(weight_MD if counts is None else weight_MD[counts > 0], dim=1)


def _rotation(size: int) -> Tensor:
    """A random orthogonal matrix, the same on every call."""
    gaussian = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()
