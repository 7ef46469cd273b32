"""The sections of the router analysis about one SAE with experts: numbers with their nulls and intervals, as findings.

Shapes: T rows, D activation size, E experts, F latents per expert, S rows in a sum.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.analysis.base import Table
from switch_sae.analysis.findings import finding
from switch_sae.analysis.observed import Sample, Seen
from switch_sae.analysis.pca import mean_and_covariance
from switch_sae.analysis.recovery import cosines
from switch_sae.analysis.router_geometry import rows as router_rows
from switch_sae.analysis.router_geometry.sparse_regression import rotation, similar_in_frequency, sparse_sums, sums_of
from switch_sae.analysis.router_geometry.statistics import flipped, following, information, null_of, over_documents, transition_counts
from switch_sae.metrics.bootstrap import middle_of
from switch_sae.models import SparseAutoencoder
from switch_sae.models.routers import Router
from switch_sae.results.rows import ResultRow

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows or features at which curves are given."""
NOISE = (0.01, 0.03)
"""Norms of noise, as shares of the root mean square distance of activations from their mean."""


@dataclass(frozen=True)
class Routed:
    """An SAE with experts on the sample's rows, and its router as centred directions."""

    seen: Seen
    raw_ED: Tensor
    rows_ED: Tensor
    """Centred: what decides between experts."""
    what: str
    """What the rows are."""

    @classmethod
    def of(cls, seen: Seen) -> "Routed":
        raw_ED, what = router_rows.raw_rows(seen.sae.router)  # type: ignore[arg-type]
        return cls(seen, raw_ED, router_rows.centred(raw_ED), what)

    @property
    def note(self) -> str:
        return "" if self.what == Router.directions_are else f"directions are the {self.what}"

    def expert_T(self) -> Tensor:
        return self.seen.expert_T()

    @torch.no_grad()
    def routes(self, x_TD: Tensor) -> Tensor:
        """The (likeliest) expert of raw activations."""
        router, scale = self.seen.sae.router, self.seen.sae.activation_scale
        return torch.cat([router.route(rows * scale).expert_TS[:, 0].cpu() for rows in x_TD.split(2048)])  # type: ignore[union-attr,operator]

    def expert_rows(self, side: str) -> Tensor | None:
        """[E, F, D] rows of the experts' "encoder" or "decoder", without shared ones; None for an encoder that there is not."""
        weight_MD = rows_of(self.seen.sae, side)
        return None if weight_MD is None else weight_MD[self.seen.sae.num_shared :].view(self.seen.sae.num_experts, -1, weight_MD.shape[1])


def rows_of(sae: SparseAutoencoder, side: str) -> Tensor | None:
    """[M, D] rows of the "encoder" or the "decoder"; None where there is no encoder."""
    weight_MD = sae.decoder_weight() if side == "decoder" else getattr(sae, "W_enc_MD", None)
    return None if weight_MD is None else weight_MD.detach().cpu().float()


def live_rows(row: ResultRow, sae: SparseAutoencoder, side: str) -> tuple[Tensor, Tensor]:
    """(rows of latents that fired in evaluation, how often); none where there is no encoder."""
    counts_M, weight_MD = row.firing_counts, rows_of(sae, side)
    if weight_MD is None:
        return torch.zeros(0, sae.d_in), counts_M[:0]
    return weight_MD[counts_M > 0], counts_M[counts_M > 0]


def alike(one: Routed, again: Seen | None, most: int, draws: int) -> Table:
    """R^2 of centred router rows from few router rows of another seed: as much of them as recurs."""
    if again is None:
        return [finding(one.seen.row, "sparsity", "R2 another seed", None, note="no second seed of this SAE")]
    rows_ED, (E, D) = Routed.of(again).rows_ED, one.rows_ED.shape
    size, generator = min(most, D, max(1, E - 1)), torch.Generator().manual_seed(0)
    turned = torch.cat([one.rows_ED @ rotation(D, generator).float() for _ in range(draws)])
    nulls = {"rotated": sparse_sums(turned, rows_ED, size).r2_RS.view(draws, E, size).mean(1)}
    return _curves(one, "R2 another seed", again.name, sparse_sums(one.rows_ED, rows_ED, size).r2_RS.mean(0), nulls, None, one.note)


def sparsity(one: Routed, dense: Seen, twin: ResultRow | None, sample: Sample, most: int, draws: int) -> Table:
    """R^2 of centred router rows from few rows of a dense SAE, against dictionaries that mean nothing and rows that nobody chose.

    `encoder` and `decoder` compare directions; `encoder on tokens` compares what they give on activations, logits with pre-activations (directions in
    the metric of the covariance). The ceiling is what as many rows explain of a latent of the same dense SAE trained with another seed.
    """
    table: Table = []
    row, against, (E, D) = one.seen.row, dense.name, one.rows_ED.shape
    root_DD, components_DD = _root_and_components(sample.rows.x_TD)
    twin_sae = dense.sae if twin is None else twin.load()
    for measure, side in (("encoder", "encoder"), ("encoder >= 0", "encoder"), ("decoder", "decoder"), ("encoder on tokens", "encoder")):
        rows_MD, count_M = live_rows(dense.row, dense.sae, side)
        if len(rows_MD) < 2:
            table.append(finding(row, "sparsity", f"R2 {measure}", None, against=against, note=f"{dense.name} has no live {side} rows"))
            continue
        size, generator = min(most, D, len(rows_MD)), torch.Generator().manual_seed(0)
        metric_DD = root_DD if measure == "encoder on tokens" else torch.eye(D)
        known_MD, target_ED = rows_MD @ metric_DD, one.rows_ED @ metric_DD

        def curve(target_RD: Tensor, dictionary_MD: Tensor, size: int = size, signs: bool = measure != "encoder >= 0") -> Tensor:
            return sparse_sums(target_RD, dictionary_MD, size, nonnegative=not signs).r2_RS

        found = sparse_sums(target_ED, known_MD, size, nonnegative=measure == "encoder >= 0")
        turns = [rotation(D, generator).float() for _ in range(draws)]
        if metric_DD is root_DD:
            turned = torch.stack([curve(target_ED, rows_MD @ turn_DD @ root_DD).mean(0) for turn_DD in turns])
        else:  # to turn the rows one way is to turn the targets the other way, all of them at once
            turned = curve(torch.cat([target_ED @ turn_DD for turn_DD in turns]), known_MD).view(draws, E, size).mean(1)
        drawn = (torch.randn(rows_MD.shape, generator=generator) @ root_DD.T @ metric_DD for _ in range(draws))
        nulls = {"rotated": turned, "gaussian": torch.stack([curve(target_ED, random_MD).mean(0) for random_MD in drawn])}
        if bool((found.index_RS >= 0).all()) and measure != "encoder >= 0":
            others = [similar_in_frequency(found.index_RS, count_M, generator) for _ in range(draws)]
            nulls["frequency"] = torch.stack([sums_of(target_ED, known_MD, index_RS).mean(0) for index_RS in others])
        ceiling_S, note = None, "no ceiling: no second seed of the dense SAE"
        if twin is not None and len(theirs_MD := live_rows(twin, twin_sae, side)[0]) > 0:
            latents_E = torch.randperm(len(theirs_MD), generator=generator)[:E]
            ceiling_S, note = curve(theirs_MD[latents_E] @ metric_DD, known_MD).mean(0), one.note
        table += _curves(one, f"R2 {measure}", against, found.r2_RS.mean(0), nulls, ceiling_S, note)
    size, generator = min(most, D), torch.Generator().manual_seed(0)
    turned = torch.cat([one.rows_ED @ rotation(D, generator).float() for _ in range(draws)])
    nulls = {"rotated": sparse_sums(turned, components_DD, size).r2_RS.view(draws, E, size).mean(1)}
    return table + _curves(one, "R2 components", "PCA", sparse_sums(one.rows_ED, components_DD, size).r2_RS.mean(0), nulls, None, one.note)


def _root_and_components(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(L with L L^T the covariance, principal components as rows), float32."""
    covariance_DD = mean_and_covariance(x_TD)[1]
    ridge = 1e-9 * covariance_DD.diagonal().mean() * torch.eye(len(covariance_DD), dtype=torch.float64)
    return torch.linalg.cholesky(covariance_DD + ridge).float(), torch.linalg.eigh(covariance_DD).eigenvectors.T.float().contiguous()


def _curves(one: Routed, measure: str, against: str, value_S: Tensor, nulls: dict[str, Tensor], ceiling_S: Tensor | None, note: str) -> Table:
    """A record per null and size, and the size at which half is explained."""
    row, table = one.seen.row, []
    for null, value_NS in nulls.items():
        name = f"{against}, null {null}"
        for s in (size - 1 for size in SIZES if size <= len(value_S)):
            ceiling = None if ceiling_S is None else float(ceiling_S[s])
            numbers = {"null": float(value_NS[:, s].mean()), "null_interval": middle_of(value_NS[:, s]), "ceiling": ceiling}
            table.append(finding(row, "sparsity", measure, float(value_S[s]), against=name, at=s + 1, n=len(one.rows_ED), note=note, **numbers))  # type: ignore[arg-type]
        half = half_explained(value_S)
        halves = [half_explained(value_s) for value_s in value_NS]
        known = torch.tensor([value for value in halves if value is not None], dtype=torch.float64)
        complete = bool(len(known) == len(halves))
        table.append(
            finding(
                row,
                "sparsity",
                f"rows for half, {measure.removeprefix('R2 ')}",
                half,
                against=name,
                null=float(known.mean()) if complete else None,
                null_interval=middle_of(known) if complete else None,
                ceiling=None if ceiling_S is None else half_explained(ceiling_S),
                n=len(one.rows_ED),
                note=note if half is not None and complete else f"not reached with {len(value_S)} rows",
            )
        )
    return table


def half_explained(r2_S: Tensor, share: float = 0.5) -> float | None:
    """How many rows explain half, between whole numbers by a straight line; None where all of them do not."""
    if float(r2_S[-1]) < share:
        return None
    s = int((r2_S >= share).int().argmax())
    before, here = (float(r2_S[s - 1]) if s else 0.0), float(r2_S[s])
    return s + (share - before) / (here - before)


def coupling(one: Routed, dense: Seen | None, sample: Sample, draws: int) -> Table:
    """Whether router rows point to what their own experts read and write, more than to what others do; nulls deal the experts out at random.

    `dense encoder` and `dense decoder` are the control: latents of the dense SAE, each counted to the expert for whose tokens it fires most.
    """
    seen, row, sae = one.seen, one.seen.row, one.seen.sae
    expert_T, table = one.expert_T(), []
    scores = {"tokens' mean": router_rows.cosines_with_tokens(one.rows_ED, sample.rows.x_TD, expert_T)}
    for side, known_EFD in (("encoder", encoder_EFD := one.expert_rows("encoder")), ("decoder", decoder_EFD := one.expert_rows("decoder"))):
        if known_EFD is not None:
            scores |= {f"{side} {name}": value for name, value in router_rows.cosines_with_experts(one.rows_ED, known_EFD).items()}
    for side in ("encoder", "decoder"):
        weight_MD = None if dense is None else rows_of(dense.sae, side)
        if dense is not None and weight_MD is not None:
            mean_ED = router_rows.mean_rows(weight_MD, dense.latents, expert_T, len(one.rows_ED))
            scores[f"dense {side} centred mean"] = cosines(one.rows_ED, router_rows.centred(mean_ED))
    for name, score_EE in scores.items():
        table += _own_against_others(one, f"cosine {name}", score_EE, draws, one.note)
    note = one.note if encoder_EFD is not None else "no encoder: products with decoder rows"
    bias_M = None if encoder_EFD is None else getattr(sae, "b_enc_M", None)
    bias_EF = None if bias_M is None else bias_M.detach().cpu().float()[sae.num_shared :].view(sae.num_experts, -1)
    weight_EFD = decoder_EFD if encoder_EFD is None else encoder_EFD
    assert weight_EFD is not None
    x_TD = sample.rows.x_TD * sae.activation_scale.cpu() - sae.b_in_D.detach().cpu()
    sums = router_rows.expert_sums(x_TD, weight_EFD, bias_EF, sae.k or 16)
    score_TE = x_TD @ one.rows_ED.T
    for name, sum_TE in sums.items():
        table += _own_against_others(
            one, f"correlation {name}", router_rows.correlations(score_TE, sum_TE - sum_TE.mean(1, keepdim=True)), draws, note
        )
    strongest_T = sums["top k"].argmax(1)
    agrees, interval = over_documents(sample.document_T, {"share": ((strongest_T == expert_T).float(), None)})["share"]
    shares = [torch.bincount(route_T, minlength=seen.row.num_experts) / len(route_T) for route_T in (strongest_T, expert_T)]
    table.append(
        finding(row, "coupling", "strongest expert is routed", agrees, interval=interval, null=float(shares[0] @ shares[1]), n=len(sample), note=note)
    )
    root_DD, generator = _root_and_components(sample.rows.x_TD)[0], torch.Generator().manual_seed(0)
    random = torch.tensor([router_rows.mean_similarity(torch.randn(one.raw_ED.shape, generator=generator) @ root_DD.T) for _ in range(draws)])
    balance = router_rows.balance_of(row.config)
    similarity = router_rows.mean_similarity(one.raw_ED)
    extra = {"null": float(random.mean()), "null_interval": middle_of(random), "n": len(one.raw_ED), "note": one.note}
    table.append(finding(row, "coupling", "similarity of rows", similarity, against=f"balance: {balance}", **extra))  # type: ignore[arg-type]
    return table


def _own_against_others(one: Routed, measure: str, score_EE: Tensor, draws: int, note: str) -> Table:
    own, others, auc = router_rows.own_and_others(score_EE)
    null_own, null_auc = router_rows.relabelled(score_EE, draws)
    row, n = one.seen.row, len(score_EE)
    return [
        finding(row, "coupling", measure, own, against="own", null=others, null_interval=middle_of(null_own), n=n, note=note),
        finding(row, "coupling", f"AUC {measure}", auc, against="others", null=0.5, null_interval=middle_of(null_auc), n=n, note=note),
    ]


def margins(one: Routed, sample: Sample, permutations: int) -> Table:
    """How sure routes are, what flips them, and how they follow each other in text."""
    seen, row, x_TD, expert_T = one.seen, one.seen.row, sample.rows.x_TD, one.expert_T()
    table: Table = []
    assert seen.routing is not None
    best_T2 = seen.routing.probs_TE.topk(2, dim=1).values
    margin_T = best_T2[:, 0] - best_T2[:, 1]
    if bool((margin_T != margin_T[0]).any()):
        value, interval = over_documents(sample.document_T, {"margin": (margin_T, None)})["margin"]
        table.append(finding(row, "margins", "p1 - p2", value, against="mean", interval=interval, n=len(sample)))
        for share in (0.1, 0.5, 0.9):
            table.append(finding(row, "margins", "p1 - p2", float(margin_T.quantile(share)), against="quantile", at=share, n=len(sample)))
    else:
        table.append(finding(row, "margins", "p1 - p2", None, note="its shares are the same for all rows, so they have no margin"))
    away = float((x_TD.double() - x_TD.double().mean(0)).square().sum(1).mean().sqrt())
    flips = {f"flips, noise {share:.0%}": flipped(expert_T, one.routes, x_TD, torch.full((len(x_TD),), share * away), seed=0) for share in NOISE}
    if sample.rows.target_TD is x_TD:
        flips["flips, reconstruction"] = one.routes(seen.recon_TD) != expert_T
        flips["null"] = flipped(expert_T, one.routes, x_TD, (seen.recon_TD - x_TD).norm(dim=1), seed=1)
    found = over_documents(sample.document_T, {name: (value_T.float(), None) for name, value_T in flips.items()})
    for name in (name for name in flips if name != "null"):
        of_error = name == "flips, reconstruction"
        extra = {"null": found["null"][0], "null_interval": found["null"][1], "against": "noise of the error's norm"} if of_error else {}
        table.append(finding(row, "margins", name, found[name][0], interval=found[name][1], n=len(sample), **extra))  # type: ignore[arg-type]
    return table + _along_text(one, sample, permutations)


def _along_text(one: Routed, sample: Sample, permutations: int) -> Table:
    row, expert_T, E = one.seen.row, one.expert_T(), one.seen.row.num_experts
    pairs = following(sample.context_T)
    if len(pairs[0]) < 2:
        missing = "these activations have no order along a text"
        return [finding(row, "margins", name, None, note=missing) for name in ("flips, next token", "information, next token")]

    def bits(route_T: Tensor) -> float:
        return information(transition_counts(route_T, pairs, E))

    flips_P = (expert_T[pairs[0]] != expert_T[pairs[1]]).float()
    value, interval = over_documents(sample.document_T[pairs[0]], {"flips": (flips_P, None)})["flips"]
    mixed = null_of(lambda route_T: float((route_T[pairs[0]] != route_T[pairs[1]]).float().mean()), expert_T, sample.document_T, permutations)
    n, known = len(pairs[0]), {"null": float(mixed.mean()), "null_interval": middle_of(mixed)}
    table = [finding(row, "margins", "flips, next token", value, against="shuffled in documents", interval=interval, n=n, **known)]  # type: ignore[arg-type]
    nulls = {"shuffled in documents": sample.document_T}
    if sample.token_T is not None:
        nulls["shuffled among equal tokens"] = sample.token_T
    for name, block_T in nulls.items():
        null = null_of(bits, expert_T, block_T, permutations)
        extra = {"null": float(null.mean()), "null_interval": middle_of(null), "n": n}
        table.append(finding(row, "margins", "information, next token", bits(expert_T), against=name, **extra))  # type: ignore[arg-type]
    return table
