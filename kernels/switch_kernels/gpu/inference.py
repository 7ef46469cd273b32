"""Forward operations on the master weights, for evaluation and for autograd; training steps have their own path (`step.py`)."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_kernels.backend import Dot, operand_dtype
from switch_kernels.dispatch import Dispatch
from switch_kernels.gpu import sparse
from switch_kernels.gpu.dispatch import count_experts
from switch_kernels.gpu.encode import encode_pairs
from switch_kernels.gpu.launch import round_up


def operand(W_MD: Tensor, engine: Dot) -> Tensor:
    """W_MD as the kernels read it: in the operands' dtype, rows padded with zeros to a multiple of 8. Copies unless nothing has to change."""
    W_MD = W_MD.detach().to(operand_dtype(engine))
    pad = round_up(W_MD.shape[1], 8) - W_MD.shape[1]
    return F.pad(W_MD, (0, pad)) if pad else W_MD.contiguous()


_kept: "WeakKeyDictionary[torch.UntypedStorage, dict[Any, tuple[int, Tensor]]]" = WeakKeyDictionary()
"""By the memory of the weights: (their version, the operand). What belongs to freed weights is freed with them."""


def kept_operand(W_MD: Tensor, engine: Dot) -> Tensor:
    """As `operand`, made again only when the weights have changed: a call on few tokens would else read and write all of them.

    Must not be written to. PyTorch counts changes in place; changes through `.data` it does not, and after them this would be the old weights'.
    """
    if W_MD.is_inference() or (W_MD.is_cuda and torch.cuda.is_current_stream_capturing()):  # no version; memory that belongs to a graph
        return operand(W_MD, engine)
    key = (operand_dtype(engine), W_MD.dtype, W_MD.storage_offset(), W_MD.shape, W_MD.stride())
    kept = _kept.setdefault(W_MD.untyped_storage(), {})
    version, found = kept.get(key, (None, None))
    if found is None or version != W_MD._version:
        kept.pop(key, None)  # before there are two
        found = operand(W_MD, engine)
        if found.untyped_storage().data_ptr() != W_MD.untyped_storage().data_ptr():  # the weights themselves need no keeping, and would never die
            kept[key] = (W_MD._version, found)
    return found


def select_rows(centred_TD: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor | None, dispatch: Dispatch, k: int, engine: Dot) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each (token, slot) pair after ReLU, float32 [T * S, k], and their global indices, int64."""
    _check(centred_TD, W_enc_MD)
    expert_TS = dispatch.expert_TS.int()
    unit, nowhere_D = torch.ones((), device=centred_TD.device), torch.zeros(centred_TD.shape[1], device=centred_TD.device)
    b_enc_M = None if b_enc_M is None else b_enc_M.contiguous()
    experts, W_enc_MD = dispatch.num_experts, kept_operand(W_enc_MD, engine)
    counts_BE = count_experts(expert_TS, experts)
    found = encode_pairs(centred_TD.contiguous(), unit, nowhere_D, expert_TS, counts_BE, W_enc_MD, b_enc_M, experts, k, engine)
    return found.values_RK.float(), found.indices_RK.long()


def decode(values_TK: Tensor, indices_TK: Tensor, W_dec_MD: Tensor, engine: Dot) -> Tensor:
    """sum_s values[t, s] * W_dec[indices[t, s]], float32 [T, D]."""
    _check(values_TK, W_dec_MD)
    return sparse.sparse_decode(values_TK.contiguous(), indices_TK.contiguous(), kept_operand(W_dec_MD, engine), W_dec_MD.shape[1])


def _check(x: Tensor, W_MD: Tensor) -> None:
    for name, tensor in (("activations", x), ("weights", W_MD)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} have dtype {tensor.dtype}; the Triton backend takes float32 (operands are rounded inside). Use backend=torch.")
