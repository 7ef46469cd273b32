"""Sparse autoencoder architectures. Add one by adding a file and a line to `SAES`."""

from switch_sae.choices import Choice
from switch_sae.models.base import DenseLatents, Flops, Latents, Recipe, SAEOutput, SparseAutoencoder, SparseLatents
from switch_sae.models.batch_topk import BatchTopKSAE
from switch_sae.models.gated import GatedSAE
from switch_sae.models.jumprelu import JumpReLUSAE
from switch_sae.models.matryoshka import MatryoshkaSAE
from switch_sae.models.relu import ReLUSAE
from switch_sae.models.routers import ROUTERS, Router, Routing
from switch_sae.models.switch import SwitchSAE
from switch_sae.models.topk import TopKSAE

SAES: Choice[SparseAutoencoder] = Choice(
    "SAE architecture",
    "architecture",
    {
        "switch": SwitchSAE,
        "topk": TopKSAE,
        "batch_topk": BatchTopKSAE,
        "matryoshka": MatryoshkaSAE,
        "relu": ReLUSAE,
        "gated": GatedSAE,
        "jumprelu": JumpReLUSAE,
    },
)

__all__ = [
    "ROUTERS",
    "SAES",
    "BatchTopKSAE",
    "DenseLatents",
    "Flops",
    "GatedSAE",
    "JumpReLUSAE",
    "Latents",
    "MatryoshkaSAE",
    "ReLUSAE",
    "Recipe",
    "Router",
    "Routing",
    "SAEOutput",
    "SparseAutoencoder",
    "SparseLatents",
    "SwitchSAE",
    "TopKSAE",
]
