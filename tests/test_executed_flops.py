"""Products that are executed, against those that `flops()` claims: within 2 %."""

import pytest
import torch
from counted import executed_flops

from switch_sae.models import SAES
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, M = 32, 2048, 1024

POOL = {"architecture": "shared_pool", "num_lists": 16, "multiplicity": 2}
CASES = {
    "topk": {"architecture": "topk"},
    "topk, frozen decoder": {"architecture": "topk", "train_decoder": False},
    "switch": {"architecture": "switch"},
    "switch, frozen decoder": {"architecture": "switch", "train_decoder": False},
    "switch, two experts, frozen k-means": {"architecture": "switch", "experts_per_token": 2, "router": {"kind": "cosine_kmeans", "decay": 1.0}},
    "batch_topk, frozen decoder": {"architecture": "batch_topk", "train_decoder": False},
    "shared_pool": POOL,
    "shared_pool, two lists, distilled": POOL | {"lists_per_token": 2, "distill": 0.1, "router": {"kind": "softmax"}},
    "shared_pool, energy": POOL | {"lists": "energy", "router": {"kind": "cosine_kmeans"}},
    "shared_pool, random, frozen decoder": POOL | {"lists": "random", "train_decoder": False},
    "sketch": {"architecture": "sketch", "rank": 3, "candidates": 100},
    "sketch, frozen decoder": {"architecture": "sketch", "rank": 6, "candidates": 50, "train_decoder": False},
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_claimed_is_executed(name):
    sae = SAES.build(SAES.from_plain({"num_latents": M, "k": 16, **CASES[name]}), D, torch.Generator().manual_seed(0))
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    prepare(sae, Rows.of(x), normalize_activations=True)
    claimed = sae.flops()
    trainer = Trainer(sae, TrainerConfig(lr=1e-4), total_steps=2, batch_size=T)
    assert executed_flops(lambda: trainer.step(Rows.of(x))) / T == pytest.approx(claimed.total, rel=0.02)
    sae.eval()
    with torch.no_grad():
        assert executed_flops(lambda: sae(x)) / T == pytest.approx(claimed.forward, rel=0.02)
