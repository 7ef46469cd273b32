"""Products that are executed, against those that `flops()` claims: within 2 %."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from switch_sae.models import SAES
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, M = 32, 2048, 1024
ATEN = torch.ops.aten


class Products(TorchDispatchMode):
    """Counts the multiply-adds of matrix products and of weighted sums of rows, twice each."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "switch_kernels":  # looked into: it is made of others
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        with self:  # and so are matmul, linear, einsum, embedding_bag
            made = func.decompose(*args, **(kwargs or {}))
        if made is not NotImplemented:
            return made
        packet = func.overloadpacket
        if packet in (ATEN.mm, ATEN.bmm, ATEN.mv):
            self.flops += 2 * args[0].numel() * (args[1].shape[-1] if args[1].ndim > 1 else 1)
        elif packet in (ATEN.addmm, ATEN.baddbmm):
            self.flops += 2 * args[1].numel() * args[2].shape[-1]
        elif packet in (ATEN._embedding_bag, ATEN._embedding_bag_forward_only):
            self.flops += 2 * args[1].numel() * args[0].shape[1] * (args[0].numel() > 1)  # else sums of biases
        elif packet is ATEN._embedding_bag_per_sample_weights_backward:
            self.flops += 2 * args[2].numel() * args[0].shape[1]
        return func(*args, **(kwargs or {}))


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
    with Products() as training:
        trainer.step(Rows.of(x))
    assert training.flops / T == pytest.approx(claimed.total, rel=0.02)
    sae.eval()
    with Products() as scoring, torch.no_grad():
        sae(x)
    assert scoring.flops / T == pytest.approx(claimed.forward, rel=0.02)
