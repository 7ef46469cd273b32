"""What "matched" means: an SAE costs what its reference does, to within the multiple that its width must be of, for every architecture and router."""

from dataclasses import replace

import pytest
from configs import ARCHITECTURES, CONTRACTS, switch

from switch_sae.models import SAES, SwitchSAE, TopKSAE
from switch_sae.models.baselines import Baseline, baseline_config, usual_baselines, why_no_baseline
from switch_sae.models.factored import FactoredSAE
from switch_sae.models.routers import SoftmaxRouter
from switch_sae.models.sketch import SketchSAE
from switch_sae.models.widths import Match, cost, dense_reference, matched, parameters, reference_of

D = 16
CASES = CONTRACTS | {"switch, frozen": replace(ARCHITECTURES["switch"], router=SoftmaxRouter.Config(train=False))}
REFERENCE = TopKSAE.Config(num_latents=256, k=4)
MEASURES = {
    Match.width: lambda config: config.num_latents,
    Match.flops: lambda config: SAES.build(config, D).flops().total,
    Match.active: lambda config: SAES.build(config, D).flops().encode,
    Match.parameters: lambda config: sum(p.numel() for p in SAES.build(config, D).parameters()),
}


@pytest.mark.parametrize("match", list(MEASURES))
@pytest.mark.parametrize("name", list(CASES))
def test_an_sae_costs_what_its_reference_does_to_within_one_step_of_width(name, match):
    measure, config = MEASURES[match], CASES[name]
    found = matched(config, REFERENCE, match, D)
    assert replace(found, num_latents=config.num_latents) == config and found.num_latents % config.width_step == 0
    wanted, cost_of = measure(REFERENCE), lambda width: measure(replace(config, num_latents=width))
    error = abs(cost_of(found.num_latents) - wanted)
    assert error <= abs(cost_of(found.num_latents + config.width_step) - wanted)
    if found.num_latents > config.least_latents:
        one_less = cost_of(found.num_latents - config.width_step)
        assert error < abs(one_less - wanted) or error == 0 or one_less == cost_of(found.num_latents)  # sizes of lists are rounded up
    assert cost_of(found.num_latents + config.width_step) > wanted or error == 0


@pytest.mark.parametrize("name", list(CASES))
def test_the_fewest_latents_fit_and_fewer_do_not(name):
    config = CASES[name]
    replace(config, num_latents=config.least_latents)
    with pytest.raises(ValueError, match="num_latents"):
        replace(config, num_latents=config.least_latents - config.width_step)


def test_costs_are_those_of_the_sae_itself():
    for config in CASES.values():
        assert cost(config, D) == SAES.build(config, D).flops() and parameters(config, D) == MEASURES[Match.parameters](config)


@pytest.mark.parametrize("slots", [1, 2])
def test_the_active_width_is_what_a_token_sees(slots):
    found = matched(switch("softmax", slots), REFERENCE, Match.active, D)
    assert found.num_latents == 256 * 4 // slots and cost(found, D).encode == cost(REFERENCE, D).encode


@pytest.mark.parametrize(("trained", "slots"), [(True, 1), (False, 1), (True, 3), (False, 3)])
def test_the_flop_matched_dense_sae_costs_the_same_to_the_last_flop(trained, slots):
    config = SwitchSAE.Config(num_latents=512, k=8, num_experts=8, experts_per_token=slots, router=SoftmaxRouter.Config(train=trained))
    dense = baseline_config(config, Baseline.flop_matched, 32)
    assert cost(dense, 32).total == cost(config, 32).total
    # Per token 2D(SF + E) forward and 4DE backward on encoder and router, against 2DM of a dense encoder.
    assert dense.num_latents == slots * 64 + (24 if trained else 8)
    assert baseline_config(config, Baseline.width_matched, 32).num_latents == 512
    assert baseline_config(config, Baseline.parameter_matched, 32).num_latents == 512 + round((8 * 32 + 32) / 65)


@pytest.mark.parametrize("baseline", list(Baseline))
@pytest.mark.parametrize("name", list(CASES))
def test_every_architecture_has_its_baselines_or_says_why_not(name, baseline):
    config = CASES[name]
    reason = why_no_baseline(config, baseline)
    has_k, is_routed, is_reference = hasattr(config, "k"), hasattr(config, "router"), SAES.key_of(config) in ("topk", "transcoder")
    trains_its_router = is_routed and getattr(config.router, "train", False)
    assert (reason is None) == (trains_its_router if baseline is Baseline.frozen_router else has_k and not is_reference)
    if reason == "its router is not trained" and hasattr(
        config.router, "train"
    ):  # runs of earlier versions have such a baseline: it is the SAE again
        assert baseline_config(config, baseline, D) == config
        return
    if reason is not None:
        with pytest.raises(ValueError) as caught:
            baseline_config(config, baseline, D)
        assert reason in str(caught.value) and baseline.name in str(caught.value)
        return
    found = baseline_config(config, baseline, D)
    if baseline is Baseline.frozen_router:
        assert found == replace(config, router=replace(config.router, train=False)) and cost(found, D).total < cost(config, D).total
        return
    assert type(found) is SAES.config_of(reference_of(SAES.key_of(config)))
    assert all(getattr(found, key) == getattr(config, key, getattr(found, key)) for key in ("k", "encoder_bias", "encoder_init", "auxk", "inference"))
    match = {Baseline.flop_matched: Match.flops, Baseline.width_matched: Match.width, Baseline.parameter_matched: Match.parameters}[baseline]
    measure = MEASURES[match]
    one_latent = measure(replace(found, num_latents=found.num_latents + 1)) - measure(found)
    assert abs(measure(found) - measure(config)) <= one_latent / 2
    has_one_encoder = SAES[SAES.key_of(config)].has_encoder and not isinstance(config, FactoredSAE.Config | SketchSAE.Config)
    if not is_routed and config.inference is None and has_one_encoder:
        assert found.num_latents == config.num_latents, "dense SAEs of one encoder cost the same"


def test_the_usual_baselines_are_those_that_say_what_routing_is_worth():
    both, dense = [Baseline.flop_matched, Baseline.frozen_router], [Baseline.flop_matched]
    expected = {
        name: (dense if "cosine_kmeans" in name or "frozen" in name else both) if name.startswith(("switch", "shared_pool")) else [] for name in CASES
    }
    assert {name: usual_baselines(config) for name, config in CASES.items()} == expected


def test_what_cannot_be_matched_says_why():
    with pytest.raises(ValueError, match=r"no width matches in flops: with num_latents=256, the fewest .*Use fewer experts or a wider reference"):
        matched(SwitchSAE.Config(num_latents=512, k=4, num_experts=64), TopKSAE.Config(num_latents=8, k=4), Match.flops, D)
    with pytest.raises(ValueError, match="widths of equal time are measured, not computed"):
        matched(REFERENCE, REFERENCE, Match.time, D)
    with pytest.raises(ValueError, match=r"relu has no fixed number of active latents.*Use baselines=\[\]"):
        dense_reference(ARCHITECTURES["relu"])
    assert matched(REFERENCE, REFERENCE, Match.flops, D) == REFERENCE
