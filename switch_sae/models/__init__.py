"""Sparse autoencoder architectures. Add one by adding a file and a line to `SAES`."""

from switch_sae.models.base import Flops, Routing, SAEOutput, SparseAutoencoder, SparseLatents
from switch_sae.models.switch import SwitchSAE
from switch_sae.models.topk import TopKSAE

SAES: dict[str, type[TopKSAE]] = {"switch": SwitchSAE, "topk": TopKSAE}

__all__ = ["SAES", "Flops", "Routing", "SAEOutput", "SparseAutoencoder", "SparseLatents", "SwitchSAE", "TopKSAE"]
