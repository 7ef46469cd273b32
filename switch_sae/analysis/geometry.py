"""The geometry of features: where neighbours and copies of latents lie, how large a dictionary really is, and how sparse codes are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.activations.base import ActivationSource
from switch_sae.analysis.base import Analysis, Table
from switch_sae.analysis.features.copies import Pairs, close_pairs, cluster_sizes, clusters, expected_highest, relabelled, spectral_size
from switch_sae.analysis.features.figure import geometry_figure
from switch_sae.analysis.features.maps import layout, preservation
from switch_sae.analysis.features.neighbours import decoder_geometry
from switch_sae.analysis.features.sparseness import MEASURES, Sums, sums_of
from switch_sae.analysis.findings import compact, finding
from switch_sae.analysis.observed import Seen, observe
from switch_sae.checks import Settings, all_at_least
from switch_sae.countdown import Countdown
from switch_sae.files import tell
from switch_sae.metrics.bootstrap import effective_documents, intervals, middle_of
from switch_sae.results.rows import ResultRow
from switch_sae.style import styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECILES = 10
DRAWS = 200
"""Relabellings behind the intervals of nulls."""
LARGEST_SHOWN = 5
"""Clusters of so many rows and more are counted together."""
COSINES = (0.7, 0.8, 0.9)
"""At which copies and components are counted, beside `threshold`."""
FEWEST = DECILES
"""Live latents without which nothing is said."""
SIMILAR_WIDTH = 1.1
"""A dense SAE is compared with at most so many times more or fewer latents."""


class FeatureGeometry(Analysis):
    """Neighbours in the own and in other experts, copies by firing rate, the size of the dictionary, maps, and sparseness, beside their nulls.

    Live latents are those that fire on the sample. Experts drawn at random, of the same sizes, are the null of everything that compares experts; a
    dense SAE cut into as many blocks, in the order of its latents, is a second one that was really trained.
    """

    @dataclass
    class Config(Settings):
        rows: int = 20_000
        threshold: float = 0.9
        """Two latents are copies above this cosine of their decoder rows (Mudide et al., arXiv 2410.08201)."""
        shown: int = 1000
        """Latents on a map; 0 for no maps."""
        neighbours: int = 10
        """Nearest ones whose preservation by a map is measured."""
        replicates: int = 1000
        """Resamples of documents behind intervals."""

        def __post_init__(self) -> None:
            all_at_least(self, rows=2, shown=0, neighbours=1, replicates=0)
            if not 0.5 <= self.threshold < 1:
                raise ValueError(f"threshold={self.threshold} must lie between 0.5 and 1, as a cosine of copies does. The paper's is 0.9.")

    needs = "rows"
    each_alone = False
    config: "FeatureGeometry.Config"

    def compute(self, saes: Sequence[ResultRow], source: ActivationSource | None) -> Table:
        """Findings of all SAEs, and the points of maps of the first routed and the first dense one. Work: M^2 D per SAE and weight, four times."""
        sample, seen = observe(saes, source, self.config.rows)
        features = [Features.of(one) for one in seen]
        routed = sorted({each.experts for each in features if each.experts > 1})
        ahead, table = Countdown("comparing rows", len(features), "SAEs", tell), []
        for done, each in enumerate(features):
            if len(each.live_L) < FEWEST:
                why = f"only {len(each.live_L)} latents fire on {len(sample):,} rows; at least {FEWEST} are needed"
                table.append(finding(each.row, "size", "live", float(len(each.live_L)), n=each.row.num_latents, note=why))
                continue
            partner = dense_partner(each, features)
            copies = close_pairs(each.decoder_LD, self._cosines[0])
            table += _neighbours(each, routed)
            table += self._copies(each, copies, partner)
            table += self._sizes(each, copies)
            ahead(done + 1)
        table += self._maps([each for each in features if len(each.live_L) >= FEWEST])
        table += self._sparseness(features, sample.document_T)
        return [{**record, **{name: record.get(name) for name in ("x", "y", "expert")}} for record in table]

    @property
    def _cosines(self) -> list[float]:
        return sorted({*COSINES, self.config.threshold})

    def _copies(self, each: "Features", pairs: Pairs, partner: "Features | None") -> Table:
        row, live, tau = each.row, len(each.live_L), self.config.threshold
        records = []
        for at in self._cosines:
            share = float(pairs.above(at).touched(live).double().mean())
            records.append(finding(row, "copies", "any", share, at=at, n=live))
        pairs = pairs.above(tau)
        copied_L = pairs.touched(live)
        if each.experts > 1:
            own = pairs.where((each.expert_L[pairs.first_P] >= 0) & (each.expert_L[pairs.second_P] >= 0))
            null = {
                name: torch.tensor([float(_of_kind(own, expert_L, name).touched(live).double().mean()) for expert_L in _shuffled(each.expert_L)])
                for name in ("within", "across")
            }
            for name, null_R in null.items():
                value = float(_of_kind(own, each.expert_L, name).touched(live).double().mean())
                records.append(finding(row, "copies", name, value, at=tau, null=float(null_R.mean()), null_interval=middle_of(null_R), n=live))
            if row.num_shared:
                with_shared = pairs.where((each.expert_L[pairs.first_P] < 0) != (each.expert_L[pairs.second_P] < 0))
                value = float((with_shared.touched(live) & (each.expert_L >= 0)).double().mean())
                records.append(finding(row, "copies", "with_shared", value, at=tau, n=live, note="an expert's latent that copies a shared one"))
        label_L = clusters(pairs, live)
        size_C = cluster_sizes(label_L)
        for size in range(1, LARGEST_SHOWN + 1):
            of_size_C = size_C >= size if size == LARGEST_SHOWN else size_C == size
            value = float(size_C[of_size_C].sum()) / live
            records.append(finding(row, "copies", "in_clusters", value, at=f"{size}{'+' if size == LARGEST_SHOWN else ''}", n=int(of_size_C.sum())))
        records.append(finding(row, "copies", "per_concept", live / len(size_C), at=tau, n=len(size_C)))
        records.append(finding(row, "copies", "largest_cluster", float(size_C.max()), at=tau, n=len(size_C)))
        return records + self._by_rate(each, copied_L, partner)

    def _by_rate(self, each: "Features", copied_L: Tensor, partner: "Features | None") -> Table:
        """Shares of copied latents by deciles of firing rate. The null, copies that know nothing of rates, is the share of all latents, with the
        interval of a random tenth of them; beside it the dense SAE's share among as many latents of the same rates."""
        records, overall = [], float(copied_L.double().mean())
        theirs_L = None
        if partner is not None:
            matched_L = nearest_rate(each.rate_L, partner.rate_L)
            theirs_L = close_pairs(partner.decoder_LD, self.config.threshold).touched(len(partner.live_L))[matched_L]
        null_QR = torch.tensor([[float(part.double().mean()) for part in drawn_L.tensor_split(DECILES)] for drawn_L in relabelled(copied_L, DRAWS)])
        for decile, part_l in enumerate(each.rate_L.argsort(stable=True).tensor_split(DECILES)):
            rate, note = float(each.rate_L[part_l].mean()), f"decile {decile + 1}"
            interval = middle_of(null_QR[:, decile])
            value = float(copied_L[part_l].double().mean())
            records.append(finding(each.row, "by_rate", "any", value, at=rate, null=overall, null_interval=interval, n=len(part_l), note=note))
            if theirs_L is not None and partner is not None:
                value = float(theirs_L[part_l].double().mean())
                records.append(finding(each.row, "by_rate", "dense_of_same_rate", value, against=partner.row.name, at=rate, n=len(part_l), note=note))
        if theirs_L is None and each.experts > 1:
            note = f"no dense SAE of about {each.row.num_latents:,} latents was given"
            records.append(finding(each.row, "by_rate", "dense_of_same_rate", None, note=note))
        return records

    def _sizes(self, each: "Features", pairs: Pairs) -> Table:
        row, live = each.row, len(each.live_L)
        records = [finding(row, "size", "live", float(live), n=row.num_latents)]
        for tau in self._cosines:
            records.append(finding(row, "size", "components", float(len(clusters(pairs.above(tau), live).unique())), at=tau, n=live))
        noise_LD = torch.randn(each.decoder_LD.shape, generator=torch.Generator().manual_seed(0))
        for at, unit_LD in each.weights.items():
            null = spectral_size(F.normalize(noise_LD, dim=1))
            records.append(finding(row, "size", "spectrum", spectral_size(unit_LD), at=at, null=null, n=live, note="null: random directions"))
        return records

    def _maps(self, features: "Sequence[Features]") -> Table:
        if not self.config.shown or not features:
            return []
        firsts = [next((each for each in features if (each.experts > 1) == is_routed), None) for is_routed in (True, False)]
        records = []
        for each, kind in zip(firsts, ("routed", "dense"), strict=True):
            if each is None:
                other = next(known for known in firsts if known is not None)
                records.append(finding(other.row, "map", "preservation", None, against=kind, note=f"no {kind} SAE was given"))
                continue
            blocks = next((known.experts for known in firsts if known is not None and known.experts > 1), 1)
            expert_L = each.expert_L if each.experts > 1 else each.blocks(blocks)
            for at, unit_LD in each.weights.items():
                records += self._map(each, at, unit_LD, expert_L, kind if each.experts > 1 else f"{kind}, {blocks} blocks")
        return records

    def _map(self, each: "Features", at: str, unit_LD: Tensor, expert_L: Tensor, kind: str) -> Table:
        place_S = torch.linspace(0, len(unit_LD) - 1, min(self.config.shown, len(unit_LD))).round().long().unique()
        unit_SD = unit_LD[place_S]
        xy_S2 = layout(unit_SD)
        k = min(self.config.neighbours, len(place_S) - 2)
        kept, chance = preservation(unit_SD, xy_S2, k), k / (len(place_S) - 1)
        points = [
            finding(each.row, "map", "point", None, against=kind, at=at, n=int(each.live_L[place]))
            | {"x": round(x, 3), "y": round(y, 3), "expert": int(expert_L[place])}
            for place, (x, y) in zip(place_S.tolist(), xy_S2.tolist(), strict=True)
        ]
        return [finding(each.row, "map", "preservation", kept, against=kind, at=at, null=chance, n=len(place_S), note=f"k={k}"), *points]

    def _sparseness(self, features: "Sequence[Features]", document_T: Tensor) -> Table:
        """Before and after the gate, and less the dense SAE's; intervals over documents."""
        codes: dict[str, Sums] = {}
        for place, each in enumerate(features):
            one = each.seen
            for when, latents in {"before": one.ungated(), "after": one.latents}.items():
                if when == "after" or latents is not one.latents:
                    codes[f"{place} {when}"] = sums_of(latents, document_T, one.expert_M, None if one.routing is None else one.routing.expert_TS)
        value: dict[str, float] = {}
        slope: dict[str, Tensor] = {}
        for name, sums in codes.items():
            values, slopes = sums.slopes()
            value |= {f"{name} {measure}": number for measure, number in values.items()}
            slope |= {f"{name} {measure}": slope_N for measure, slope_N in slopes.items()}
        partners = {place: dense_partner(each, features) for place, each in enumerate(features)}
        for place, dense in partners.items():
            if dense is not None:
                other = next(number for number, each in enumerate(features) if each is dense)
                for measure in MEASURES:
                    mine, theirs, less = (f"{who} {measure}" for who in (f"{place} after", f"{other} after", f"{place} less"))
                    value[less], slope[less] = value[mine] - value[theirs], slope[mine] - slope[theirs]

        def resampled(weights_RN: Tensor) -> dict[str, Tensor]:
            return {name: value[name] + (weights_RN - 1) @ slope_N for name, slope_N in slope.items()}

        spans = intervals(resampled, int(document_T.max()) + 1, self.config.replicates, effective=effective_documents(document_T.bincount()))
        records = []
        for place, each in enumerate(features):
            dense = partners[place]
            named = {"after": "after the gate", "before": "before the gate"} if f"{place} before" in codes else {"after": ""}
            named |= {} if dense is None else {"less": f"less {dense.row.name}"}
            for (when, against), measure in product(named.items(), MEASURES):
                key = f"{place} {when} {measure}"
                number, note = _number(value[key]), "" if math.isfinite(value[key]) else "no latent fires"
                span = spans.get(key)
                records.append(finding(each.row, "sparseness", measure, number, against=against, interval=span, n=len(document_T), note=note))
        return records

    def shown(self, table: Table) -> Table:
        """Without the points of maps and the curves."""
        return compact([record for record in table if record["measure"] != "point" and record["part"] != "by_rate"])

    @styled
    def draw(self, table: Table) -> "Figure":
        """Lines of SAEs with marks for their seeds and grey nulls, copies by firing rate, and maps."""
        return geometry_figure(table, self.config.threshold)


@dataclass(frozen=True, eq=False)
class Features:
    """The live latents of one SAE."""

    seen: Seen
    live_L: Tensor
    """Their numbers."""
    rate_L: Tensor
    """The share of rows on which each fires."""
    expert_L: Tensor
    weights: dict[str, Tensor]
    """Unit decoder rows, and encoder rows where there is an encoder."""

    @classmethod
    def of(cls, seen: Seen) -> "Features":
        count_M = seen.latents.firing_counts()
        live_L = (count_M > 0).nonzero()[:, 0]
        raw: dict[str, Tensor] = {"decoder": seen.sae.decoder_weight()}
        if seen.sae.has_encoder:
            raw["encoder"] = seen.sae.W_enc.T
        weights = {name: F.normalize(weight_MD.detach()[live_L].float(), dim=1) for name, weight_MD in raw.items()}
        return cls(seen, live_L, count_M[live_L].double() / len(seen.recon_TD), seen.expert_M[live_L], weights)

    @property
    def row(self) -> ResultRow:
        return self.seen.row

    @property
    def experts(self) -> int:
        return self.row.num_experts

    @property
    def decoder_LD(self) -> Tensor:
        return self.weights["decoder"]

    def blocks(self, number: int) -> Tensor:
        """The block of each live latent where all M latents, in their order, are cut into so many."""
        return self.live_L * number // self.row.num_latents


def dense_partner(each: Features, features: Sequence[Features]) -> Features | None:
    """For a routed SAE the dense one of about its width, of the same seed if there is one; None for others."""
    if each.experts == 1:
        return None

    def distance(other: Features) -> tuple[float, bool]:
        return abs(math.log(other.row.num_latents / each.row.num_latents)), other.row.seed != each.row.seed

    near = [other for other in features if other.experts == 1 and len(other.live_L) and distance(other)[0] <= math.log(SIMILAR_WIDTH)]
    return min(near, key=distance, default=None)


def nearest_rate(rate_L: Tensor, other_l: Tensor) -> Tensor:
    """[L] the place of the closest of the other rates; equal ones are taken in turn, so that none stands for all."""
    sorted_l, place_l = other_l.sort(stable=True)
    right_L = torch.searchsorted(sorted_l, rate_L).clamp(max=len(sorted_l) - 1)
    left_L = (right_L - 1).clamp(min=0)
    best_L = torch.where((sorted_l[left_L] - rate_L).abs() < (sorted_l[right_L] - rate_L).abs(), left_L, right_L)
    first_L = torch.searchsorted(sorted_l, sorted_l[best_L])
    equal_L = torch.searchsorted(sorted_l, sorted_l[best_L], right=True) - first_L
    return place_l[first_L + torch.arange(len(rate_L)) % equal_L]


def _neighbours(each: Features, cuts: Sequence[int]) -> Table:
    """For a routed SAE by its experts, for a dense one by blocks as many as the others have experts."""
    if each.experts > 1:
        return [record for at, unit_LD in each.weights.items() for record in _beside(each, at, unit_LD, each.expert_L, each.experts, "")]
    if not cuts:
        return [finding(each.row, "neighbours", "own_share", None, note="no routed SAE was given, so it is not known into how many blocks to cut")]
    return [
        record
        for number in cuts
        for at, unit_LD in each.weights.items()
        for record in _beside(each, at, unit_LD, each.blocks(number), number, f"cut into {number} blocks")
    ]


def _beside(each: Features, at: str, unit_LD: Tensor, expert_L: Tensor, experts: int, against: str) -> Table:
    unit_LD, expert_L = unit_LD[expert_L >= 0], expert_L[expert_L >= 0]
    live = len(unit_LD)
    nearest_L, within_L, across_L = nearest_rows(unit_LD, expert_L, experts)
    if live < 2:
        return [finding(each.row, "neighbours", "own_share", None, against=against, at=at, note="fewer than two live latents in experts")]
    null_R = torch.tensor([float((drawn_L == drawn_L[nearest_L]).double().mean()) for drawn_L in relabelled(expert_L, DRAWS)])
    size_E = expert_L.bincount().double()
    expected = float((size_E * (size_E - 1)).sum()) / (live * (live - 1))
    share = float((expert_L == expert_L[nearest_L]).double().mean())
    records = [finding(each.row, "neighbours", "own_share", share, against=against, at=at, null=expected, null_interval=middle_of(null_R), n=live)]
    null_within, null_across = expected_highest(unit_LD, expert_L)
    for name, cosine_L, null in (("cosine_within", within_L, null_within), ("cosine_across", across_L, null_across)):
        value = float(cosine_L.double().nanmean())
        records.append(finding(each.row, "neighbours", name, _number(value), against=against, at=at, null=_number(null), n=live))
    return records


def nearest_rows(unit_LD: Tensor, expert_L: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """[L] each: the nearest other row, the highest cosine in the own expert and in others (`decoder_geometry`), for rows in the order of experts."""
    padded = int(expert_L.bincount(minlength=experts).max())
    place_L = torch.arange(len(expert_L)) - torch.searchsorted(expert_L, expert_L) + expert_L * padded
    rows_MD = unit_LD.new_zeros(experts * padded, unit_LD.shape[1]).index_copy_(0, place_L, unit_LD)
    alive_M = torch.zeros(experts * padded).index_fill_(0, place_L, 1)
    geometry = decoder_geometry(rows_MD, experts, alive_M)
    back_M = torch.full((experts * padded,), -1).index_copy_(0, place_L, torch.arange(len(expert_L)))
    return back_M[geometry.nearest_latent_M[place_L]], geometry.within_M[place_L], geometry.across_M[place_L]


def _of_kind(pairs: Pairs, expert_L: Tensor, name: str) -> Pairs:
    same_P = expert_L[pairs.first_P] == expert_L[pairs.second_P]
    return pairs.where(same_P if name == "within" else ~same_P)


def _shuffled(expert_L: Tensor) -> list[Tensor]:
    """Experts in random orders; latents of none stay what they are."""
    routed_L = expert_L >= 0
    return [expert_L.masked_scatter(routed_L, drawn_l) for drawn_l in relabelled(expert_L[routed_L], DRAWS)]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
