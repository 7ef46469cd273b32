"""Setting the threshold that decides an SAE's L0, on rows that are not those it is judged on.

A threshold as trained gives more latents on held-out text than in training (by 5 % with the stop rule of pursuit). To compare SAEs at
equal L0, it is set anew on some held-out rows, and L0 is measured on others.
"""

import math

import torch

from switch_sae.models.base import SparseAutoencoder
from switch_sae.rows import Rows

ROWS = 16_384
"""The most that are looked at, evenly spaced: the standard error of L0 is then about 0.4 %."""
_TOLERANCE, _STEPS = 2e-3, 24


def has_threshold(sae: SparseAutoencoder) -> bool:
    """Whether a threshold (its buffer `threshold`) decides how many latents are active in evaluation."""
    return sae.by_threshold


@torch.no_grad()
def calibrate(sae: SparseAutoencoder, rows: Rows, l0: float | None = None) -> float:
    """Sets `threshold` so that the mean L0 of these raw rows is `l0` (None: `sae.k`), within 0.2 % where it can be, and returns the L0 reached.

    Under the inference that the SAE has. Raises ValueError for an SAE without a threshold, for no rows, and where no threshold gives that L0.
    """
    if not has_threshold(sae):
        raise ValueError(f"the L0 of {type(sae).__name__} is not decided by a threshold: there is nothing to calibrate.")
    wanted = l0 if l0 is not None else float(sae.k or 0)
    if not wanted > 0 or not len(rows):
        raise ValueError(f"calibrating to l0={wanted} on {len(rows)} rows is not possible: give a positive number and some held-out rows.")
    chosen = rows[torch.arange(min(len(rows), ROWS)) * len(rows) // min(len(rows), ROWS)].to(sae.activation_scale.device)
    mode, before = sae.training, sae.threshold.clone()
    sae.eval()

    def excess(log_threshold: float) -> float:
        """log(L0 / wanted), which falls with the threshold."""
        sae.threshold.fill_(math.exp(log_threshold))
        active = sum(int((sae.encode(x_TD).values > 0).sum()) for x_TD in chosen.x_TD.split(2048))
        return math.log(max(active, 1) / len(chosen) / wanted)

    try:
        middle = math.log(max(float(before), 1e-3))
        found = {middle: excess(middle)}
        while abs(found[middle]) > _TOLERANCE and len(found) < _STEPS:
            above = max((at for at, value in found.items() if value > 0), default=None)
            below = min((at for at, value in found.items() if value < 0), default=None)
            if above is None or below is None:
                middle += math.copysign(0.5, found[middle])
            else:
                share = found[above] / (found[above] - found[below])
                middle = above + min(0.9, max(0.1, share)) * (below - above)
            found[middle] = excess(middle)
        if min(map(abs, found.values())) > 0.05:
            reached = wanted * math.exp(min(found.values(), key=abs))
            raise ValueError(
                f"no threshold gives a mean L0 of {wanted:g}: the nearest is {reached:.3g}. Ask for that, or allow more latents per token."
            )
        best = min(found, key=lambda at: abs(found[at]))
        sae.threshold.fill_(math.exp(best))
        return wanted * math.exp(found[best])
    except BaseException:
        sae.threshold.copy_(before)
        raise
    finally:
        sae.train(mode)
