"""Sparse autoencoder architectures. Add one by adding a file and a line to `SAES`."""

from switch_sae.choices import Choice
from switch_sae.models.base import Flops, Recipe, SAEOutput, SparseAutoencoder
from switch_sae.models.batch_topk import BatchTopKSAE
from switch_sae.models.gated import GatedSAE
from switch_sae.models.inference import Inference, why_no_inference, with_inference
from switch_sae.models.jumprelu import JumpReLUSAE
from switch_sae.models.kron import KronSAE
from switch_sae.models.latents import DenseLatents, Latents, SparseLatents
from switch_sae.models.matryoshka import MatryoshkaSAE
from switch_sae.models.product_keys import ProductKeysSAE
from switch_sae.models.product_keys_exact import ProductKeysExactSAE
from switch_sae.models.pursuit import PursuitSAE
from switch_sae.models.relu import ReLUSAE
from switch_sae.models.routers import ROUTERS, Router, Routing
from switch_sae.models.shared_pool import SharedPoolSAE
from switch_sae.models.sketch import SketchSAE
from switch_sae.models.switch import SwitchSAE
from switch_sae.models.switch_batch_topk import SwitchBatchTopKSAE
from switch_sae.models.switch_pursuit import SwitchPursuitSAE
from switch_sae.models.switch_refit import SwitchRefitSAE
from switch_sae.models.switch_scale import SwitchScaleSAE
from switch_sae.models.switch_shared import SwitchSharedSAE
from switch_sae.models.switch_transcoder import SwitchTranscoderSAE
from switch_sae.models.topk import TopKSAE
from switch_sae.models.transcoder import TranscoderSAE

SAES: Choice[SparseAutoencoder] = Choice(
    "SAE architecture",
    "architecture",
    {
        "switch": SwitchSAE,
        "switch_refit": SwitchRefitSAE,
        "switch_pursuit": SwitchPursuitSAE,
        "topk": TopKSAE,
        "batch_topk": BatchTopKSAE,
        "matryoshka": MatryoshkaSAE,
        "pursuit": PursuitSAE,
        "relu": ReLUSAE,
        "gated": GatedSAE,
        "jumprelu": JumpReLUSAE,
        "shared_pool": SharedPoolSAE,
        "sketch": SketchSAE,
        "transcoder": TranscoderSAE,
        "switch_transcoder": SwitchTranscoderSAE,
        "kron": KronSAE,
        "product_keys": ProductKeysSAE,
        "product_keys_exact": ProductKeysExactSAE,
        "switch_shared": SwitchSharedSAE,
        "switch_batch_topk": SwitchBatchTopKSAE,
        "switch_scale": SwitchScaleSAE,
    },
)

__all__ = [
    "ROUTERS",
    "SAES",
    "BatchTopKSAE",
    "DenseLatents",
    "Flops",
    "GatedSAE",
    "Inference",
    "JumpReLUSAE",
    "KronSAE",
    "Latents",
    "MatryoshkaSAE",
    "ProductKeysExactSAE",
    "ProductKeysSAE",
    "PursuitSAE",
    "ReLUSAE",
    "Recipe",
    "Router",
    "Routing",
    "SAEOutput",
    "SharedPoolSAE",
    "SketchSAE",
    "SparseAutoencoder",
    "SparseLatents",
    "SwitchBatchTopKSAE",
    "SwitchPursuitSAE",
    "SwitchRefitSAE",
    "SwitchSAE",
    "SwitchScaleSAE",
    "SwitchSharedSAE",
    "SwitchTranscoderSAE",
    "TopKSAE",
    "TranscoderSAE",
    "why_no_inference",
    "with_inference",
]
