"""The two parts of activation space of a router: the span of its centred rows, which it sees (control), and the rest, which it does not (content).

After Ye, Yuan & Sharkey (arXiv 2604.17837). Shapes: T rows, D activation size, R rank, C things to be read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.analysis.base import Table
from switch_sae.analysis.findings import finding
from switch_sae.analysis.observed import Sample, Seen
from switch_sae.analysis.pca import mean_and_covariance
from switch_sae.analysis.router_geometry import subspaces
from switch_sae.analysis.router_geometry.parts import Routed
from switch_sae.analysis.router_geometry.statistics import over_documents
from switch_sae.metrics.bootstrap import middle_of
from switch_sae.metrics.forward import run


def control(
    one: Routed, sample: Sample, wanted: "Sequence[Wanted]", draws: int, swaps: int, halves: tuple[Tensor, Tensor], dense: Seen | None
) -> Table:
    """What lies in the span of centred router rows and what in the rest, against random subspaces and first components of the same rank."""
    row, x_TD = one.seen.row, sample.rows.x_TD
    basis_DR = subspaces.span(one.rows_ED)
    rank = basis_DR.shape[1]
    if not 0 < rank < x_TD.shape[1]:
        return [finding(row, "control", "rank", float(rank), note="the router's rows span nothing, or everything, so there are no two parts")]
    generator = torch.Generator().manual_seed(0)
    components_DR = torch.linalg.eigh(mean_and_covariance(x_TD[halves[0]])[1]).eigenvectors[:, -rank:]
    randoms = [subspaces.random_span(len(basis_DR), rank, generator) for _ in range(draws)]
    table = [finding(row, "control", "rank", float(rank), note=one.note)]
    centre_D = x_TD[halves[0]].double().mean(0)
    parts = {"x": x_TD.double() - centre_D}
    if sample.rows.target_TD is x_TD:
        parts["error"] = one.seen.recon_TD.double() - x_TD
        if dense is not None:
            parts["error of dense"] = dense.recon_TD.double() - x_TD
    for name, value_TD in parts.items():
        inside, whole = subspaces.energy_share(value_TD, basis_DR)
        value, interval = over_documents(sample.document_T, {"share": (inside, whole)})["share"]
        for null, bases in (("random", randoms), ("components", [components_DR])):
            shares = torch.tensor([float(above.sum() / below.sum()) for above, below in (subspaces.energy_share(value_TD, each) for each in bases)])
            extra = {"null": float(shares.mean()), "null_interval": middle_of(shares) if len(shares) > 1 else None, "n": len(sample)}
            table.append(finding(row, "control", f"share of {name}", value, against=f"null {null}", interval=interval, **extra))  # type: ignore[arg-type]
    for one_wanted in wanted:
        table += _readable(one, sample, one_wanted, basis_DR, components_DR, randoms)
    return table + _swap(one, sample, halves[1], basis_DR, {"random": randoms[0], "components": components_DR}, swaps)


@dataclass(frozen=True)
class Wanted:
    """Something to be read from activations, fitted on some rows and scored on others."""

    name: str
    fit_rows: Tensor
    score_rows: Tensor
    moments: subspaces.Moments
    """Of the rows that it is fitted on."""
    truth_SC: Tensor
    """Of the rows that it is scored on."""
    is_label: bool
    """One of C classes, so that the largest wins; else C numbers."""

    @classmethod
    def of(cls, name: str, sample: Sample, halves: tuple[Tensor, Tensor], value_TC: Tensor, is_label: bool) -> "Wanted":
        """Rows without any class are left out where it is a label."""
        fit, score = (rows[value_TC[rows].sum(1) > 0] if is_label else rows for rows in halves)
        return cls(name, fit, score, subspaces.moments(sample.rows.x_TD[fit], value_TC[fit]), value_TC[score], is_label)

    def scores(self, x_TD: Tensor, basis_DR: Tensor) -> tuple[Tensor, Tensor]:
        """(numerator, denominator) per scored row of what is lost: mistakes over rows, squared error over variance."""
        read_SC = subspaces.read(x_TD[self.score_rows], self.moments.reader(basis_DR))
        if self.is_label:
            return (read_SC.argmax(1) != self.truth_SC.argmax(1)).double(), torch.ones(len(read_SC), dtype=torch.float64)
        return subspaces.squared_errors(read_SC, self.truth_SC, self.moments.variance_C)


def _readable(one: Routed, sample: Sample, wanted: Wanted, basis_DR: Tensor, components_DR: Tensor, randoms: Sequence[Tensor]) -> Table:
    row, x_TD, table = one.seen.row, sample.rows.x_TD, []
    measure = ("accuracy" if wanted.is_label else "R2") + f" {wanted.name}"
    everything = 1 - _lost(wanted, x_TD, torch.eye(len(basis_DR), dtype=torch.float64))
    for part, turn in (("control", lambda each: each), ("content", subspaces.complement)):
        lost = wanted.scores(x_TD, turn(basis_DR))
        value, interval = over_documents(sample.document_T[wanted.score_rows], {"lost": lost})["lost"]
        kept = None if interval is None else (1 - interval[1], 1 - interval[0])
        for null, bases in (("random", randoms), ("components", [components_DR])):
            values = torch.tensor([1 - _lost(wanted, x_TD, turn(each)) for each in bases])
            extra = {"null": float(values.mean()), "null_interval": middle_of(values) if len(values) > 1 else None, "n": len(wanted.score_rows)}
            table.append(
                finding(row, "control", measure, 1 - value, against=f"{part}, null {null}", interval=kept, ceiling=everything, **extra)  # type: ignore[arg-type]
            )
    return table


def _lost(wanted: Wanted, x_TD: Tensor, basis_DR: Tensor) -> float:
    above, below = wanted.scores(x_TD, basis_DR)
    return float(above.sum() / below.sum())


def _swap(one: Routed, sample: Sample, rows: Tensor, basis_DR: Tensor, others: dict[str, Tensor], swaps: int) -> Table:
    """x' = x + P (partner - x), P the projection on the control part: another expert reads the same content."""
    row = one.seen.row
    if sample.rows.target_TD is not sample.rows.x_TD:
        return [finding(row, "control", "swap, FVU", None, note="a transcoder's target is not what was swapped")]
    generator = torch.Generator().manual_seed(1)
    rows = rows[torch.randperm(len(rows), generator=generator)[:swaps]]
    partner = rows[torch.randperm(len(rows), generator=generator)]
    expert_T = one.expert_T()
    differs = expert_T[rows] != expert_T[partner]
    rows, partner = rows[differs], partner[differs]
    if len(rows) < 2:
        return [finding(row, "control", "swap, FVU", None, note="all rows have one route, so there is nothing to swap")]
    x_SD, document_S = sample.rows.x_TD[rows], sample.document_T[rows]
    mean_D = sample.rows.x_TD.mean(0)
    content_DC = subspaces.complement(basis_DR).float()
    found = {}
    for name, swapped_DR in {"none": None, "control": basis_DR, **others}.items():
        moved_SD = x_SD
        if swapped_DR is not None:
            moved_SD = x_SD + ((sample.rows.x_TD[partner] - x_SD).double() @ swapped_DR @ swapped_DR.T).float()
        recon_SD = torch.cat([run(one.seen.sae, part).recon_TD.cpu() for part in moved_SD.split(2048)])
        error_SD, away_SD = recon_SD - moved_SD, moved_SD - mean_D
        taken_S = one.routes(moved_SD)
        ratios: dict[str, tuple[Tensor, Tensor | None]] = {
            "route of the partner": ((taken_S == expert_T[partner]).float(), None),
            "route kept": ((taken_S == expert_T[rows]).float(), None),
            "FVU": (error_SD.square().sum(1), away_SD.square().sum(1)),
            "FVU of the content": ((error_SD @ content_DC).square().sum(1), (away_SD @ content_DC).square().sum(1)),
        }
        found[name] = over_documents(document_S, ratios)
    table = []
    for measure in found["none"]:
        for name in ("none", *others):
            null, null_interval = found[name][measure]
            value, interval = found["control"][measure]
            extra = {"interval": interval, "null": null, "null_interval": null_interval, "n": len(rows)}
            label = "no swap" if name == "none" else f"swap of {name}"
            table.append(finding(row, "control", f"swap, {measure}", value, against=label, note=one.note, **extra))  # type: ignore[arg-type]
    return table
