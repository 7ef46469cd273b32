"""How much of a code survives a little noise."""

from typing import NamedTuple

import torch
from torch import Tensor

from switch_sae.activations.base import EvaluationSet
from switch_sae.metrics.forward import chunks, device_of, outputs, run
from switch_sae.metrics.probe import Halves, Probe, Quotients, Sample
from switch_sae.models import Latents, SAEOutput, SparseAutoencoder, SparseLatents

MOST_ROWS = 12_000
LEVELS = {"1pct": 0.01, "3pct": 0.03}


class Stability(Probe):
    """Codes z of x and z' of x + level ||x - mean(x)|| u, u uniform on the unit sphere, the same for both levels (1 % and 3 %) and for every SAE; on
    at most 12,000 rows that are no outliers, evenly taken.

    jaccard = mean_t |I n I'| / |I u I'| over the supports I = {m: z_m != 0}, 1 where both are empty; code_change = mean_t ||z - z'|| / ||z|| over
    rows with z != 0; route_flips = share of rows whose set of experts changes, where there are experts. Intervals over documents.
    """

    def __init__(self, evaluation_set: EvaluationSet, halves: Halves | None) -> None:
        self.sample = Sample.of(evaluation_set, MOST_ROWS)
        x_TD = self.sample.rows.x_TD.cpu()
        noise_TD = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(0))
        size_T = torch.linalg.vector_norm(x_TD - self.sample.mean.x_TD.to(x_TD.dtype), dim=1)
        self.noise_TD = noise_TD * (size_T / torch.linalg.vector_norm(noise_TD, dim=1))[:, None]
        """u times the norm of the centred row."""

    def measure(self, sae: SparseAutoencoder) -> Quotients:
        rows, found = self.sample.rows, dict[str, list[tuple[Tensor, Tensor]]]()
        for chosen in chunks(len(rows)):
            _, clean = outputs(sae, rows[chosen])
            for name, level in LEVELS.items():
                x_TD = rows.x_TD[chosen] + level * self.noise_TD[chosen].to(rows.x_TD)
                for measure, columns in _numbers(clean, run(sae, x_TD.to(device_of(sae)))).items():
                    found.setdefault(f"{measure}_{name}", []).append(columns)
        return self.sample.quotients({name: (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])) for name, parts in found.items()})


class Change(NamedTuple):
    """From a code z to a code z' of the same rows, [T] each, float64."""

    both_T: Tensor
    """Latents that fire in both."""
    either_T: Tensor
    norm_T: Tensor
    """||z||."""
    change_T: Tensor
    """||z - z'||."""


def compare(first: Latents, second: Latents) -> Change:
    """What changes between two codes of the same rows."""
    tokens = len(first.values)
    if isinstance(first, SparseLatents) and isinstance(second, SparseLatents):
        # One list of both: sorted by latent, the two values of a latent that fires in both stand beside each other.
        values_TK = torch.cat([first.values_TK, second.values_TK], dim=1)
        slot_K = torch.arange(values_TK.shape[1])
        index_TK = torch.where(values_TK != 0, torch.cat([first.indices_TK, second.indices_TK], dim=1), first.num_latents + slot_K)
        index_TK, order_TK = index_TK.sort(dim=1)
        of_first_TK = order_TK < first.values_TK.shape[1]
        values_TK = values_TK.gather(1, order_TK).double()
        a_TK, b_TK = values_TK * of_first_TK, values_TK * ~of_first_TK
        pair_TK = index_TK[:, 1:] == index_TK[:, :-1]
        for side_TK in (a_TK, b_TK):  # a pair's first place takes both values
            side_TK[:, :-1] += side_TK[:, 1:] * pair_TK
            side_TK[:, 1:].masked_fill_(pair_TK, 0)
        row_P, slot_P = (values_TK != 0).nonzero(as_tuple=True)
        a_P, b_P = a_TK[row_P, slot_P], b_TK[row_P, slot_P]
    else:
        first_TM, second_TM = first.to_dense(), second.to_dense()
        row_P, latent_P = ((first_TM != 0) | (second_TM != 0)).nonzero(as_tuple=True)
        a_P, b_P = first_TM[row_P, latent_P].double(), second_TM[row_P, latent_P].double()

    def summed(values_P: Tensor) -> Tensor:
        return torch.zeros(tokens, dtype=torch.float64).index_add_(0, row_P, values_P.double())

    both_T, either_T = summed((a_P != 0) & (b_P != 0)), summed((a_P != 0) | (b_P != 0))
    return Change(both_T, either_T, summed(a_P.square()).sqrt(), summed((a_P - b_P).square()).sqrt())


def _numbers(clean: SAEOutput, noisy: SAEOutput) -> dict[str, tuple[Tensor, Tensor]]:
    """What each row adds to the numbers, above and below."""
    both_T, either_T, norm_T, change_T = compare(clean.latents.cpu(), noisy.latents.cpu())
    every_T, fires_T = torch.ones_like(both_T), norm_T > 0
    numbers = {
        "jaccard": (torch.where(either_T > 0, both_T / either_T.clamp_min(1), 1.0), every_T),
        "code_change": (torch.where(fires_T, change_T / norm_T, 0.0), fires_T.double()),
    }
    if clean.routing is not None and noisy.routing is not None and clean.routing.probs_TE.shape[1] > 1:
        before_TS, after_TS = (routing.expert_TS.cpu().sort(dim=1).values for routing in (clean.routing, noisy.routing))
        numbers["route_flips"] = ((before_TS != after_TS).any(dim=1).double(), every_T)
    return numbers
