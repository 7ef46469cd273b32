"""Tiny configs of every architecture and every router: what the contract tests run over."""

from dataclasses import replace
from typing import Any

from switch_sae.models import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    KronSAE,
    MatryoshkaSAE,
    ProductKeysExactSAE,
    ProductKeysSAE,
    PursuitSAE,
    ReLUSAE,
    SharedPoolSAE,
    SketchSAE,
    SwitchBatchTopKSAE,
    SwitchPursuitSAE,
    SwitchRefitSAE,
    SwitchSAE,
    SwitchScaleSAE,
    SwitchSharedSAE,
    SwitchTranscoderSAE,
    TopKSAE,
    TranscoderSAE,
)
from switch_sae.models.routers import Gate, SoftmaxRouter
from switch_sae.models.routers.bias_balanced import BiasBalancedRouter
from switch_sae.models.routers.competition import CompetitionRouter
from switch_sae.models.routers.cosine_kmeans import CosineKMeansRouter
from switch_sae.models.routers.renormalised import RenormalisedRouter, Scores
from switch_sae.models.routers.sigmoid import SigmoidRouter
from switch_sae.models.routers.two_level import TwoLevelRouter

ARCHITECTURES: dict[str, Any] = {
    "topk": TopKSAE.Config(num_latents=48, k=4),
    "switch": SwitchSAE.Config(num_latents=48, k=4, num_experts=4),
    "batch_topk": BatchTopKSAE.Config(num_latents=48, k=4),
    "pursuit": PursuitSAE.Config(num_latents=48, k=4, blocks=2),
    "switch_refit": SwitchRefitSAE.Config(num_latents=48, k=4, num_experts=4, shared=8),
    "switch_pursuit": SwitchPursuitSAE.Config(num_latents=48, k=4, blocks=2, num_experts=4),
    "matryoshka": MatryoshkaSAE.Config(num_latents=48, k=4),
    "relu": ReLUSAE.Config(num_latents=48),
    "gated": GatedSAE.Config(num_latents=48),
    "jumprelu": JumpReLUSAE.Config(num_latents=48),
    "shared_pool": SharedPoolSAE.Config(num_latents=48, k=4, num_lists=4, multiplicity=2, sample=1 / 8, list_tokens=192, settle=0),
    "sketch": SketchSAE.Config(num_latents=48, k=4, rank=3, candidates=12),
    "transcoder": TranscoderSAE.Config(num_latents=48, k=4),
    "switch_transcoder": SwitchTranscoderSAE.Config(num_latents=48, k=4, num_experts=4),
    "kron": KronSAE.Config(num_latents=48, k=4, m=4, n=4),
    "product_keys": ProductKeysSAE.Config(num_latents=48, k=4, keys=4),
    "product_keys_exact": ProductKeysExactSAE.Config(num_latents=48, k=4, keys=4, candidates=16),
    "switch_shared": SwitchSharedSAE.Config(num_latents=48, k=4, num_experts=4, shared=8),
    "switch_batch_topk": SwitchBatchTopKSAE.Config(num_latents=48, k=4, num_experts=4),
    "switch_scale": SwitchScaleSAE.Config(num_latents=48, k=4, num_experts=4, omega=0.1),  # at 0, T has no gradient yet
}
"""By key of `SAES`."""
ROUTED: dict[str, Any] = {
    "softmax": SoftmaxRouter.Config(),
    "softmax hard": SoftmaxRouter.Config(gate=Gate.hard),
    "softmax straight_through": SoftmaxRouter.Config(gate=Gate.straight_through),
    "sigmoid": SigmoidRouter.Config(),
    "bias_balanced": BiasBalancedRouter.Config(),
    "competition": CompetitionRouter.Config(),
    "cosine_kmeans": CosineKMeansRouter.Config(decay=0.9),
    "renormalised": RenormalisedRouter.Config(),
    "renormalised relu": RenormalisedRouter.Config(scores=Scores.relu),
    "two_level": TwoLevelRouter.Config(),
}
"""Every router, by key of `ROUTERS`, with every gate of softmax behind it."""


def switch(router: str, experts_per_token: int = 1, **changes: Any) -> Any:
    """The Switch SAE of `ARCHITECTURES` with another router."""
    return replace(ARCHITECTURES["switch"], router=replace(ROUTED[router]), experts_per_token=experts_per_token, **changes)


CONTRACTS = (
    {name: config for name, config in ARCHITECTURES.items() if name != "switch"}
    | {f"switch, {router}": switch(router) for router in ROUTED}
    | {f"{name}, {way}": replace(ARCHITECTURES[name], inference=way) for name in ("topk", "switch") for way in ("refit", "pursuit")}
    | {"product_keys_exact, gated": replace(ARCHITECTURES["product_keys_exact"], gate="score")}
    | {"product_keys_exact, refit": replace(ARCHITECTURES["product_keys_exact"], inference="refit")}
    | {"batch_topk, refit": replace(ARCHITECTURES["batch_topk"], inference="refit")}
    | {"switch_pursuit, stop, shared": replace(ARCHITECTURES["switch_pursuit"], stop=True, shared=8, coherence=0.1)}
    | {"switch_pursuit, two experts, stop, shared": replace(ARCHITECTURES["switch_pursuit"], experts_per_token=2, stop=True, shared=8, coherence=0.1)}
    | {
        "switch, two experts, pursuit": replace(
            ARCHITECTURES["switch"], router=replace(ROUTED["competition"]), experts_per_token=2, inference="pursuit"
        )
    }
    | {"shared_pool, two lists": replace(ARCHITECTURES["shared_pool"], lists_per_token=2, router=replace(ROUTED["softmax"]))}
    | {f"shared_pool, {lists} lists": replace(ARCHITECTURES["shared_pool"], lists=lists) for lists in ("energy", "random")}
    | {f"shared_pool, {way}": replace(ARCHITECTURES["shared_pool"], inference=way) for way in ("refit", "pursuit")}
    | {"sketch, refit": replace(ARCHITECTURES["sketch"], inference="refit")}
    | {"switch, two experts, gates after selection": switch("softmax", 2, gate_in_selection=False)}
    | {"switch_shared, two experts": replace(ARCHITECTURES["switch_shared"], experts_per_token=2, gate_in_selection=False)}
    | {"switch_batch_topk, two experts, shared": replace(ARCHITECTURES["switch_batch_topk"], experts_per_token=2, shared=8, gate_in_selection=False)}
    | {f"switch, {router}, two experts per token": switch(router, 2) for router in ROUTED}
)
"""Everything that the contract holds for."""
