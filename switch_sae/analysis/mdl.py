"""Description length: how many bits a token takes when an SAE and codes that a receiver can decode describe it, down to equal distortions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from switch_sae.activations.base import ActivationSource
from switch_sae.analysis.base import Analysis, Table
from switch_sae.analysis.codes.comparison import Comparison
from switch_sae.analysis.codes.figure import draw_lengths
from switch_sae.analysis.codes.lengths import Half, Lengths, Task, gaussian_curve, lengths_of
from switch_sae.analysis.findings import chosen, compact
from switch_sae.analysis.observed import Sample, Seen, observe
from switch_sae.checks import Settings, all_at_least
from switch_sae.countdown import Countdown
from switch_sae.files import tell
from switch_sae.results.rows import ResultRow
from switch_sae.rows import NormLimit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = tuple(2.0 ** (power / 2) for power in range(-4, 9))
"""Of values, in root mean squares of a coordinate of the centred activations: 1/4 to 16."""
CLASSES = 16
"""Of a dense SAE where no SAE has experts."""


class DescriptionLength(Analysis):
    """Bits per token: L(route) + L(support | route) + L(values, to a step) + L(residual, down to a distortion), with every law fitted on documents A
    and paid on documents B (Ayonrinde et al., arXiv 2410.11179, with codes that know of routes and of exact numbers of latents).

    The distortion is the squared error over the variance of the activations, as FVU is. At each the step is the one that is shortest on A, and
    reverse water-filling codes what is left of the residual. The null is the same without an SAE: a Gaussian code of the activations themselves.
    A dense SAE may use a code with latent classes over its supports, as many as there are experts: what routes give for nothing.
    """

    @dataclass
    class Config(Settings):
        rows: int = 20_000
        """Half of them fit, half of them pay."""
        distortions: list[float] = field(default_factory=lambda: [0.02, 0.05, 0.1, 0.15, 0.2, 0.3])
        shown: float = 0.1
        """The distortion of the printed table and of the figure's bars; one of `distortions`."""
        classes: int | None = None
        """Latent classes of dense SAEs; None is the number of experts of each SAE that has some, or 16."""
        within: int = 2
        """Latent classes in each expert, of which a Switch SAE has as many more."""

        def __post_init__(self) -> None:
            all_at_least(self, rows=2, classes=2, within=1)
            if not self.distortions or not all(0 < share < 1 for share in self.distortions):
                raise ValueError(f"distortions={self.distortions} must be shares of the variance between 0 and 1, such as [0.05, 0.1].")
            if self.shown not in self.distortions:
                raise ValueError(f"shown={self.shown} must be one of distortions={self.distortions}.")

    needs, each_alone = "rows", False
    config: "DescriptionLength.Config"

    def compute(self, saes: Sequence[ResultRow], source: ActivationSource | None) -> Table:
        """Records of parts "support" (bits of each code of supports), "parts" and "total" (at each distortion), "saved" and "saved over seeds" (of
        routed against dense SAEs) and "model". Raises ValueError for SAEs of several experts per token."""
        for row in saes:
            if row.kind.experts_per_token > 1:
                raise ValueError(
                    f"{row.name} takes {row.kind.experts_per_token} experts per token; description lengths are known for one, whose latents say "
                    "which it is. Leave it out."
                )
        sample, seen = observe(saes, source, self.config.rows)
        task, left_out = self._task(sample)
        ahead = Countdown("description lengths", len(seen), "SAEs", tell)
        starts: dict[int, torch.Tensor] = {}
        for one in seen:
            if one.routing is not None and one.row.num_experts > 1:
                starts.setdefault(one.row.num_experts, one.expert_T())
        found: list[Lengths] = []
        for number, one in enumerate(seen):
            found.append(lengths_of(task, one, self._classes(one, starts), starts))
            ahead(number + 1)
        variance = float((sample.rows.target_TD[task.paid.row_T] / task.unit).var(0, correction=0).sum())
        comparison = Comparison(found, task, gaussian_curve(task), self.config.distortions, variance)
        note = f"{left_out} rows of huge norm left out" if left_out else ""
        return comparison.table(note)

    def _classes(self, one: Seen, starts: dict[int, torch.Tensor]) -> list[int]:
        if one.row.num_experts > 1:
            return [self.config.within * one.row.num_experts] if self.config.within > 1 else []
        return [self.config.classes] if self.config.classes else sorted(starts) or [CLASSES]

    def _task(self, sample: Sample) -> tuple[Task, int]:
        inlier_T = NormLimit.of(sample.rows).inlier_T(sample.rows)
        fitted, paid = (Half.of(sample, row_T[inlier_T[row_T]]) for row_T in sample.halves())
        unit = float(sample.rows.target_TD[fitted.row_T].var(0, correction=0).mean().sqrt())
        return Task(sample, fitted, paid, STEPS, unit, sample.token_T is not None), int((~inlier_T).sum())

    def shown(self, table: Table) -> Table:
        """Totals and savings at one distortion."""
        return compact([record for record in chosen(table, part=("total", "saved", "saved over seeds")) if record["at"] in (self.config.shown, "")])

    def draw(self, table: Table) -> "Figure":
        """Rate-distortion curves, parts of the code, and what routed SAEs save."""
        return draw_lengths(table, self.config.shown)
