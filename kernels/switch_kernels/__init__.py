"""Operations on tensors for mixture-of-experts sparse autoencoders. They know nothing of SAEs, language models or configuration.

Imported as `switch_kernels`: `kernels/` is a source root, not a package (transformers imports any top-level module called `kernels`).

Shapes: T tokens in arrival order, N rows in expert order, D activation size, E experts, F latents per expert, M = E*F, K active latents.
"""

from switch_kernels.backend import PYTORCH, Backend, Execution, Moments, Precision, resolve
from switch_kernels.decode import sparse_decode, sparse_decode_reference
from switch_kernels.dispatch import Dispatch
from switch_kernels.encode import Selection, encode_topk, encode_topk_reference
from switch_kernels.group import ALONE, Group, ProcessGroup
from switch_kernels.latent_order import LatentOrder
from switch_kernels.plan import GradientMode, Plan, Regime, choose_plan
from switch_kernels.spec import KERNELS, KernelSpec, Shape

__all__ = [
    "ALONE",
    "KERNELS",
    "PYTORCH",
    "Backend",
    "Dispatch",
    "Execution",
    "GradientMode",
    "Group",
    "KernelSpec",
    "LatentOrder",
    "Moments",
    "Plan",
    "Precision",
    "ProcessGroup",
    "Regime",
    "Selection",
    "Shape",
    "choose_plan",
    "encode_topk",
    "encode_topk_reference",
    "resolve",
    "sparse_decode",
    "sparse_decode_reference",
]
