"""How sparse codes are: over latents for one row (population), and over rows for one latent (lifetime).

All measures are of r = |value| and unchanged when r is multiplied by a constant, so one gate per row changes no population measure; it changes
lifetime ones.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.models import SparseLatents

MEASURES = ("treves_rolls", "hoyer", "participation", "lifetime", "lifetime_in_expert", "evenness")


def population(latents: SparseLatents) -> dict[str, Tensor]:
    """[T] each, over the n = M latents of a row; NaN where none fired.

    * `treves_rolls`: a = (sum r / n)^2 / (sum r^2 / n) (Treves & Rolls 1991, Network 2:371), from 1 / n for a single latent to 1 for equal ones;
    * `hoyer`: (sqrt n - sum r / sqrt(sum r^2)) / (sqrt n - 1) (Hoyer 2004, JMLR 5:1457), from 0 for equal ones to 1 for a single one. It equals
      (sqrt n - sqrt(n a)) / (sqrt n - 1): the same order of rows, on another scale;
    * `participation`: (sum r^2)^2 / sum r^4, the number of latents that carry the energy (the participation ratio of r^2), from 1 to n.
    """
    r_TK, n = latents.values_TK.double().abs(), latents.num_latents
    first_T, second_T, fourth_T = (r_TK.pow(power).sum(1) for power in (1, 2, 4))
    root = math.sqrt(n)
    hoyer_T = (root - first_T / second_T.sqrt()) / (root - 1) if n > 1 else torch.full_like(first_T, torch.nan)
    return {"treves_rolls": first_T.square() / (n * second_T), "hoyer": hoyer_T, "participation": second_T.square() / fourth_T}


@dataclass(frozen=True)
class Sums:
    """Sums over documents from which all measures of one SAE follow, for any weights of documents."""

    population: dict[str, tuple[Tensor, Tensor]]
    """[N] each: sum over the rows on which something fired, and their number."""
    first_MN: Tensor
    """sum r, sparse [M, N] as the next two."""
    second_MN: Tensor
    fired_MN: Tensor
    rows_N: Tensor
    """Rows of each document."""
    expert_rows_EN: Tensor
    """Those sent to each expert; all rows in a last line, for latents that every row may use."""
    expert_M: Tensor
    """The line of `expert_rows_EN` for each latent."""

    def measures(self, weight_N: Tensor) -> dict[str, Tensor]:
        """Of documents that count so many times: means over rows for population measures, over latents that fired for the others. With T rows,

        * `lifetime`: S = (1 - (sum r / T)^2 / (sum r^2 / T)) / (1 - 1 / T) (Vinje & Gallant 2000, Science 287:1273; Rolls & Tovee 1995), 0 for a
          latent that is the same on all rows, 1 for one that fires once. It is close to 1 - firing rate;
        * `lifetime_in_expert`: the same over the T rows that were sent to the latent's expert, outside of which it cannot fire;
        * `evenness`: (sum r / F)^2 / (sum r^2 / F) over the F rows on which it fired: 1 where its values there are equal, whatever its rate.
        """
        live_L = self.fired_MN.sum(1).to_dense().nonzero()[:, 0]
        first_L, second_L, fired_L = ((sums_MN @ weight_N[:, None])[live_L, 0] for sums_MN in (self.first_MN, self.second_MN, self.fired_MN))
        square_L, rows = first_L.square() / second_L, self.rows_N.double() @ weight_N
        own_L = (self.expert_rows_EN.double() @ weight_N)[self.expert_M[live_L]]
        enough_L = own_L > 1  # one row says nothing of how selective a latent is
        found = {name: (sum_N @ weight_N) / (count_N @ weight_N) for name, (sum_N, count_N) in self.population.items()}
        found["lifetime"] = ((1 - square_L / rows) / (1 - 1 / rows)).mean()
        found["lifetime_in_expert"] = ((1 - square_L / own_L) / (1 - 1 / own_L))[enough_L].mean()
        found["evenness"] = (square_L / fired_L).mean()
        return found

    def slopes(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Each measure, and how it changes with the weight of each document, [N]: with these, measure + slope (weight - 1) is what a resample gives
        to first order (the infinitesimal jackknife; Efron 1982, SIAM 38, ch. 6).

        A resample itself would be biased: it leaves latents that fire rarely with fewer different rows, which look more even and more selective.
        """
        weight_N = torch.ones(len(self.rows_N), dtype=torch.float64, requires_grad=True)
        measures = self.measures(weight_N)
        slopes = {name: torch.autograd.grad(value, weight_N, retain_graph=True)[0] for name, value in measures.items()}
        return {name: value.item() for name, value in measures.items()}, slopes


def sums_of(latents: SparseLatents, document_T: Tensor, expert_M: Tensor, expert_TS: Tensor | None) -> Sums:
    """The sums of one SAE's codes. `expert_M` is -1 for latents that every row may use, `expert_TS` the experts of each row, None without."""
    documents, experts = int(document_T.max()) + 1, 0 if expert_TS is None else int(expert_M.max()) + 1
    per_row = {}
    for name, value_T in population(latents).items():
        known_T = value_T.isfinite()
        counts = [torch.zeros(documents, dtype=torch.float64).index_add_(0, document_T, part) for part in (value_T.nan_to_num(0), known_T.double())]
        per_row[name] = (counts[0], counts[1])
    row_P, slot_P = latents.values_TK.nonzero(as_tuple=True)
    r_P = latents.values_TK[row_P, slot_P].double().abs()
    place_P = torch.stack([latents.indices_TK[row_P, slot_P], document_T[row_P]])

    def summed(value_P: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(place_P, value_P, (latents.num_latents, documents), check_invariants=True).coalesce()

    rows_N = document_T.bincount(minlength=documents)
    expert_rows_EN = torch.zeros(experts + 1, documents, dtype=torch.int64)
    for expert_T in () if expert_TS is None else expert_TS.T:
        expert_rows_EN.index_put_((expert_T, document_T), torch.ones_like(document_T), accumulate=True)
    expert_rows_EN[experts] = rows_N
    line_M = torch.full_like(expert_M, experts) if expert_TS is None else torch.where(expert_M < 0, experts, expert_M)
    return Sums(per_row, summed(r_P), summed(r_P.square()), summed(torch.ones_like(r_P)), rows_N, expert_rows_EN, line_M)
