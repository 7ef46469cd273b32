"""What trains beside an SAE, on the same batches: the controls that differ from it in one thing."""

from dataclasses import replace
from enum import Enum
from typing import Any

from switch_sae.checks import typed
from switch_sae.models import SAES
from switch_sae.models.widths import Match, dense_reference, matched, reference_of


class Baseline(Enum):
    """A dense TopK SAE that is matched in one cost, or the same SAE with one part held fixed."""

    flop_matched = "flop_matched"
    """Dense TopK of the width that costs as many FLOPs per token of training, router included."""
    width_matched = "width_matched"
    """Dense TopK with as many latents in all."""
    parameter_matched = "parameter_matched"
    """Dense TopK with as many parameters."""
    frozen_router = "frozen_router"
    """The same SAE with its router frozen at its random start."""


_MATCHES = {Baseline.flop_matched: Match.flops, Baseline.width_matched: Match.width, Baseline.parameter_matched: Match.parameters}


def usual_baselines(config: Any) -> list[Baseline]:
    """What an SAE trains beside unless something else is asked for: a dense one has no routing to judge."""
    if not hasattr(config, "router"):
        return []
    return [baseline for baseline in (Baseline.flop_matched, Baseline.frozen_router) if why_no_baseline(config, baseline) is None]


def why_no_baseline(config: Any, baseline: Baseline) -> str | None:
    """Why an SAE has no such baseline; None where it has."""
    key, baseline = SAES.key_of(config), typed("baseline", Baseline, baseline)
    if baseline is Baseline.frozen_router:
        if not hasattr(config, "router"):
            return f"{key} has no router"
        if not getattr(config.router, "train", False):
            return "its router is not trained"
        return None
    if not hasattr(config, "k"):
        return f"{key} has no fixed number of active latents (k) that a dense TopK SAE could share"
    return "it is the dense TopK SAE that others are compared with" if key == reference_of(key) else None


def baseline_config(config: Any, baseline: Baseline, d_in: int) -> Any:
    """The config of the control. Raises ValueError where `why_no_baseline` has a reason, but for a router that is frozen already."""
    baseline = typed("baseline", Baseline, baseline)
    is_frozen = baseline is Baseline.frozen_router and getattr(getattr(config, "router", None), "train", None) is False
    if not is_frozen and (why := why_no_baseline(config, baseline)):
        raise ValueError(f"there is no {baseline.name} for this SAE: {why}.")
    if baseline is Baseline.frozen_router:
        untaught = {"distill": 0.0} if hasattr(config, "distill") else {}
        return replace(config, router=replace(config.router, train=False), **untaught)
    return matched(dense_reference(config), config, _MATCHES[baseline], d_in)
