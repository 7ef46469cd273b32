"""Records of description lengths: each code of each SAE at each distortion, and what routed SAEs save against dense ones, over documents and seeds.

Shapes: R resamples, N documents, P distortions.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from switch_sae.analysis.base import Table
from switch_sae.analysis.codes.lengths import BACK, EXACT, INDEPENDENT, UNIFORM, Lengths, Task, classes_named
from switch_sae.analysis.codes.rate_distortion import Curve
from switch_sae.analysis.findings import finding
from switch_sae.analysis.observed import series
from switch_sae.metrics.bootstrap import effective_documents, intervals, t_quantile
from switch_sae.results.rows import grouped

SHORTEST = "shortest"
"""The code that is shortest on the documents that were fitted."""
WITH_CLASSES = "exact k, dense with classes"
"""The control: routes of a routed SAE against as many latent classes of a dense one."""
WEIGHT_BITS = 16
"""Of each of an SAE's own parameters, where they are counted."""


class Comparison:
    """Bits per token of several SAEs on the same documents."""

    def __init__(self, found: Sequence[Lengths], task: Task, without: Curve, distortions: Sequence[float], variance: float) -> None:
        self.found, self.task, self.without, self.variance = found, task, without, variance
        self.distortions = list(distortions)
        self.at_P = torch.tensor(distortions, dtype=torch.float64)
        self.tokens_N = task.paid.tokens_N
        self.step_SP = [self._steps(lengths) for lengths in found]

    def _steps(self, lengths: Lengths) -> list[int]:
        """[P] the step that is shortest on the documents that were fitted."""
        tokens_N = self.task.fitted.tokens_N
        one_1N = torch.ones(1, len(tokens_N), dtype=torch.float64)
        variance = float(self.task.target_TD.shape[1])
        bits_SP = torch.cat([curve.at(self.at_P, one_1N, tokens_N, variance) for curve in lengths.fitted_curves])
        return bits_SP.argmin(0).tolist()

    def _rest(self, number: int, weights_RN: Tensor) -> Tensor:
        """[R, P] values and residual."""
        found, chosen_P = self.found[number], self.step_SP[number]
        columns = {step: found.curves[step].at(self.at_P, weights_RN, self.tokens_N, self.variance) for step in set(chosen_P)}
        return torch.stack([columns[step][:, place] for place, step in enumerate(chosen_P)], 1)

    def _numbers(self, weights_RN: Tensor) -> dict[tuple[Any, ...], Tensor]:
        """[R] each, by what they are."""
        tokens_R = weights_RN @ self.tokens_N
        numbers: dict[tuple[Any, ...], Tensor] = {}
        bare_RP = self.without.at(self.at_P, weights_RN, self.tokens_N, self.variance)
        for place in range(len(self.distortions)):
            numbers["null", place] = bare_RP[:, place]
        for number, lengths in enumerate(self.found):
            rest_RP = self._rest(number, weights_RN)
            for code, (route_N, support_N) in lengths.supports.items():
                route_R, support_R = weights_RN @ route_N / tokens_R, weights_RN @ support_N / tokens_R
                numbers["route", number, code], numbers["support", number, code] = route_R, route_R + support_R
                for place in range(len(self.distortions)):
                    numbers["total", number, code, place] = route_R + support_R + rest_RP[:, place]
        for routed, dense in self._pairs():
            for name, (mine, other) in self._codes(routed, dense).items():
                for place in range(len(self.distortions)):
                    numbers["saved", routed, dense, name, place] = numbers["total", dense, other, place] - numbers["total", routed, mine, place]
        return numbers

    def _pairs(self) -> list[tuple[int, int]]:
        """(routed, dense) of one seed; of any where no seed is common."""
        sides = grouped(range(len(self.found)), lambda number: self.found[number].seen.row.num_experts > 1)
        pairs = list(product(sides.get(True, []), sides.get(False, [])))
        alike = [(a, b) for a, b in pairs if self.found[a].seen.row.seed == self.found[b].seen.row.seed]
        return alike or pairs

    def _codes(self, routed: int, dense: int) -> dict[str, tuple[str, str]]:
        """By name of the comparison: the codes of both sides."""
        mine, other = self.found[routed].supports, self.found[dense].supports
        own = self.found[routed].seen.row.num_experts
        classes = classes_named(own) if classes_named(own) in other else next((code for code in other if code.endswith(" classes")), EXACT)
        codes = {name: (name, name) for name in (UNIFORM, INDEPENDENT, EXACT)}
        codes[WITH_CLASSES] = (EXACT, classes)
        if EXACT + BACK in mine and classes + BACK in other:
            codes["both look back, dense with classes"] = (EXACT + BACK, classes + BACK)
        codes[SHORTEST] = (self._shortest(routed), self._shortest(dense))
        return codes

    def _shortest(self, number: int) -> str:
        fitted = self.found[number].fitted
        return min(fitted, key=lambda code: fitted[code])

    def table(self, note: str) -> Table:
        """All records."""
        one_1N = torch.ones(1, len(self.tokens_N), dtype=torch.float64)
        value = {key: float(number_R) for key, number_R in self._numbers(one_1N).items()}
        names = {repr(key): key for key in value}
        spans = intervals(
            lambda weights_RN: {repr(key): number_R for key, number_R in self._numbers(weights_RN).items()},
            len(self.tokens_N),
            effective=effective_documents(self.tokens_N),
        )
        span = {names[name]: interval for name, interval in spans.items()}
        table: Table = []
        for number, lengths in enumerate(self.found):
            table += self._of_one(number, lengths, value, span, note)
        saved = {key: bits for key, bits in value.items() if key[0] == "saved"}
        for (_, routed, dense, name, place), bits in saved.items():
            codes = self._codes(routed, dense)[name]
            row, other = self.found[routed].seen.row, self.found[dense].seen.row
            key = ("saved", routed, dense, name, place)
            n, words = int(self.tokens_N.sum()), "; dense: ".join(codes)
            at = self.distortions[place]
            table.append(finding(row, "saved", name, bits, against=other.name, at=at, interval=span.get(key), n=n, note=words))
        table += self._over_seeds(saved)
        if not saved:
            row = self.found[0].seen.row
            table.append(finding(row, "saved", SHORTEST, None, note="needs a dense SAE and one with experts among the runs"))
        return table

    def _of_one(self, number: int, lengths: Lengths, value: dict[Any, float], span: dict[Any, Any], note: str) -> Table:
        row, n = lengths.seen.row, int(self.tokens_N.sum())
        table: Table = []
        for code in lengths.supports:
            for measure in ("support", "route"):
                bits, interval = value[measure, number, code], span.get((measure, number, code))
                table.append(finding(row, "support", code, bits, against=measure, interval=interval, n=n, note=note))
            for place, distortion in enumerate(self.distortions):
                bits, interval = value["total", number, code, place], span.get(("total", number, code, place))
                null, null_interval = value["null", place], span.get(("null", place))
                record = finding(row, "total", code, bits, at=distortion, interval=interval, null=null, null_interval=null_interval, n=n, note=note)
                table.append(record)
        best = self._shortest(number)
        for place, (distortion, step) in enumerate(zip(self.distortions, self.step_SP[number], strict=True)):
            values = float(lengths.values_N[step].sum()) / n
            parts = {"route": value["route", number, best], "support": value["support", number, best] - value["route", number, best]}
            parts |= {"values": values, "residual": value["total", number, best, place] - value["support", number, best] - values}
            parts["step"] = self.task.steps[step]
            table += [finding(row, "parts", name, bits, at=distortion, against=best, n=n, note=lengths.ways[step]) for name, bits in parts.items()]
        weights = sum(parameter.numel() for parameter in lengths.seen.sae.parameters())
        words = f"bits in all at {WEIGHT_BITS} a weight, not in any total: divide by the number of tokens that are described"
        table.append(finding(row, "model", "SAE", float(WEIGHT_BITS * weights), n=weights, note=words))
        numbers = lengths.parameters[best] + lengths.parameters["values"] + lengths.parameters["residual"]
        bits = numbers * 0.5 * math.log2(float(self.task.fitted.tokens_N.sum()))
        words = "bits in all at half the logarithm of the tokens that were fitted for each number, not in any total"
        table.append(finding(row, "model", "laws of the code", bits, against=best, n=numbers, note=words))
        return table

    def _over_seeds(self, saved: dict[tuple[Any, ...], float]) -> Table:
        """Means over pairs of seeds, with t intervals."""

        def kinds(key: tuple[Any, ...]) -> tuple[Any, ...]:
            _, routed, dense, name, place = key
            return series(self.found[routed].seen.row), series(self.found[dense].seen.row), name, place

        table: Table = []
        for (_, other, name, place), keys in grouped(saved, kinds).items():
            bits = torch.tensor([saved[key] for key in keys], dtype=torch.float64)
            n, reach = len(bits), None
            if n > 1:
                reach = t_quantile(0.95, n - 1) * float(bits.std()) / math.sqrt(n)
            mean = float(bits.mean())
            interval = None if reach is None else (mean - reach, mean + reach)
            row = self.found[keys[0][1]].seen.row
            note = "" if n > 1 else "one pair of seeds: no interval over seeds"
            if row.seed != self.found[keys[0][2]].seen.row.seed:
                note = "pairs of different seeds"
            table.append(finding(row, "saved over seeds", name, mean, against=other, at=self.distortions[place], interval=interval, n=n, note=note))
        return table
