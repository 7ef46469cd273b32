"""What a one-shot encoder loses against better inference with the same dictionary."""

from contextlib import suppress

import torch
from torch import Tensor

from switch_sae.activations.base import EvaluationSet
from switch_sae.metrics.forward import sae_outputs, untouched
from switch_sae.metrics.probe import Halves, Probe, Quotients, Sample
from switch_sae.models.base import SparseAutoencoder
from switch_sae.models.inference import Inference, why_no_inference, with_inference
from switch_sae.models.threshold import calibrate, has_threshold

MOST_ROWS, CALIBRATION_STEP = 8192, 4


class _NoThreshold(Exception):
    """None gives the L0 that is asked for."""


class Amortisation(Probe):
    """FVU of the same weights by another inference: fvu_encoder, fvu_refit and fvu_pursuit = sum_t ||x_t - recon_t||^2 / sum_t ||x_t - mean(x)||^2 on
    at most 8,192 rows that are no outliers, evenly taken, with the mean of all of them. amortisation_gap = FVU by the SAE's own inference /
    fvu_pursuit - 1. Intervals over documents.

    All at equal L0: where a threshold decides it, every other inference gets the threshold with which it has the L0 of the SAE's own on every fourth
    of these rows. A number is missing where the SAE has no such inference (`why_no_inference`), or no threshold gives that L0.
    """

    def __init__(self, evaluation_set: EvaluationSet, halves: Halves | None) -> None:
        self.sample = Sample.of(evaluation_set, MOST_ROWS)
        target_TD = self.sample.rows.target_TD.cpu()
        self.variance_T = (target_TD.double() - self.sample.mean.target_TD).square().sum(1)

    def measure(self, sae: SparseAutoencoder) -> Quotients:
        own_T, active_T = self._scored(sae)
        l0 = float(active_T[::CALIBRATION_STEP].double().mean())
        error_T = {sae.inference: own_T}
        for way in Inference:
            if way is not sae.inference and why_no_inference(sae, way) is None:
                with untouched(sae), suppress(_NoThreshold):  # the threshold is shared with the SAE, which gets its own back
                    error_T[way] = self._scored(self._at_equal_l0(with_inference(sae, way), l0))[0]
        columns = {f"fvu_{way.name}": (error_T[way], self.variance_T) for way in Inference if way in error_T}
        if (best_T := error_T.get(Inference.pursuit)) is not None:
            columns["amortisation_gap"] = (own_T - best_T, best_T)
        return self.sample.quotients(columns)

    def _at_equal_l0(self, sae: SparseAutoencoder, l0: float) -> SparseAutoencoder:
        if has_threshold(sae):
            try:
                calibrate(sae, self.sample.rows[slice(None, None, CALIBRATION_STEP)], l0)
            except ValueError as error:
                raise _NoThreshold from error
        return sae

    def _scored(self, sae: SparseAutoencoder) -> tuple[Tensor, Tensor]:
        """(||x - recon||^2 in float64, active latents) of every row."""
        errors, active = [], []
        for _, target_TD, output in sae_outputs(sae, self.sample.rows):
            errors.append((target_TD.double() - output.recon_TD.double()).square().sum(1).cpu())
            active.append((output.latents.values != 0).sum(1).cpu())
        return torch.cat(errors), torch.cat(active)
