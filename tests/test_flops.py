"""FLOPs that SAEs claim, against products counted as they are executed in a step of training."""

from dataclasses import replace

import pytest
import torch
from configs import ARCHITECTURES, switch
from counted import executed

from switch_sae.models import SAES
from switch_sae.models.switch_scale import STEP_TOKENS
from switch_sae.rows import Rows
from switch_sae.training import prepare

D, M, K = 48, 240, 8
CONFIGS = {
    "topk": ARCHITECTURES["topk"],
    "batch_topk": ARCHITECTURES["batch_topk"],
    "switch": ARCHITECTURES["switch"],
    "switch, competition": switch("competition"),
    "switch, competition, two experts": switch("competition", 2),
    "switch_batch_topk, competition, shared": replace(ARCHITECTURES["switch_batch_topk"], shared=8, router=replace(switch("competition").router)),
    "switch, two experts": switch("softmax", 2),
    "switch, two experts, gates after selection": switch("softmax", 2, gate_in_selection=False),
    "switch, renormalised": switch("renormalised relu", 2),
    "switch, two levels": switch("two_level", 2, num_experts=16, num_latents=M),
    "switch_shared": ARCHITECTURES["switch_shared"],
    "switch_shared, two experts": replace(ARCHITECTURES["switch_shared"], experts_per_token=2),
    "switch_shared, path": replace(ARCHITECTURES["switch_shared"], path_rank=5),
    "switch_shared, path first": replace(ARCHITECTURES["switch_shared"], path_rank=5, path_first=True),
    "switch_batch_topk": ARCHITECTURES["switch_batch_topk"],
    "switch_batch_topk, two experts, path first": replace(ARCHITECTURES["switch_batch_topk"], experts_per_token=2, path_rank=5, path_first=True),
    "switch_scale": ARCHITECTURES["switch_scale"],
}


def rows(seed: int, count: int) -> Rows:
    return Rows.of(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)) * 3 + torch.linspace(-2, 2, D))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_is_claimed_is_executed_within_2_percent(name):
    sae = SAES.build(replace(CONFIGS[name], num_latents=M, k=K), D, torch.Generator().manual_seed(1))
    prepare(sae, rows(7, 2048), normalize_activations=True)
    forward, total = executed(sae, rows(0, STEP_TOKENS))
    assert forward == pytest.approx(sae.flops().forward, rel=0.02)
    assert total == pytest.approx(sae.flops().total, rel=0.02)


def test_the_count_sees_what_is_executed():
    sae = SAES.build(replace(CONFIGS["switch"], num_latents=M, k=K), D, torch.Generator().manual_seed(1))
    prepare(sae, rows(7, 2048), normalize_activations=True)
    forward, total = executed(sae, rows(0, STEP_TOKENS))
    sae.W_dec_MD.requires_grad_(False)
    assert executed(sae, rows(0, STEP_TOKENS))[1] == pytest.approx(total - 2 * D * K, rel=1e-9) and forward < total
