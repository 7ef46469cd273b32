"""Sparse autoencoder architectures. Add one by adding a file and a line to `SAES`."""

from typing import Any

from switch_sae.models.base import DenseLatents, Flops, Recipe, Routing, SAEOutput, SparseAutoencoder, SparseLatents
from switch_sae.models.switch import SwitchSAE
from switch_sae.models.topk import TopKSAE

SAES: dict[str, Any] = {"switch": SwitchSAE, "topk": TopKSAE}

__all__ = ["SAES", "DenseLatents", "Flops", "Recipe", "Routing", "SAEOutput", "SparseAutoencoder", "SparseLatents", "SwitchSAE", "TopKSAE"]
