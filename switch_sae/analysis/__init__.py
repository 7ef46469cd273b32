"""Looking into trained SAEs: geometry of decoders, recovery of a known dictionary, the text behind latents and experts,
scaling laws, and the PCA control. Add an analysis that `make analyze` knows by adding a file and a line to `ANALYSES`."""

from collections.abc import Mapping, Sequence
from typing import Any

from switch_sae.analysis.base import Analysis, OpenSource, Table, kept_table
from switch_sae.analysis.duplication import Duplication
from switch_sae.analysis.fates import Fates
from switch_sae.analysis.geometry import FeatureGeometry
from switch_sae.analysis.matching import Matching
from switch_sae.analysis.mdl import DescriptionLength
from switch_sae.analysis.recurrence import Recurrence
from switch_sae.analysis.regret import Regret
from switch_sae.analysis.router import RouterGeometry
from switch_sae.analysis.screening import Screening
from switch_sae.analysis.similarity import Similarity
from switch_sae.choices import Choice
from switch_sae.results.rows import ResultRow
from switch_sae.results.source import source_of

ANALYSES: Choice[Analysis] = Choice(
    "analysis",
    "name",
    {
        "duplication": Duplication,
        "recurrence": Recurrence,
        "router": RouterGeometry,
        "similarity": Similarity,
        "matching": Matching,
        "fates": Fates,
        "mdl": DescriptionLength,
        "regret": Regret,
        "screening": Screening,
        "geometry": FeatureGeometry,
    },
)

__all__ = ["ANALYSES", "Analysis", "Table", "analyze", "build_analysis"]


def build_analysis(name: str, settings: Mapping[str, Any] | None = None) -> Analysis:
    """One of `ANALYSES` with settings of its `Config`. Raises ValueError for a name or a setting that does not exist."""
    return ANALYSES.build(ANALYSES.from_plain({"name": name, **(settings or {})}))


def analyze(name: str, saes: Sequence[ResultRow], settings: Mapping[str, Any] | None = None, open_source: OpenSource | None = source_of) -> Table:
    """The table of an analysis of finished SAEs, from their run folders where weights and settings are the same as before.

    `open_source` gives the activations of a row's run, for an analysis that needs them; by default they are opened as its config says. Raises
    ValueError for no SAEs, for SAEs without weights and for mistakes in name, settings or needs.
    """
    if not saes:
        raise ValueError(f"there are no SAEs to analyse. Give folders of finished runs to {name}.")
    analysis = build_analysis(name, settings)
    groups = [[row] for row in saes] if analysis.each_alone else [saes]
    return [record for group in groups for record in kept_table(analysis, name, group, open_source)]
