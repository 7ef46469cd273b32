"""Makes Triton's interpreter (TRITON_INTERPRET=1) right for bfloat16, strict about what a GPU leaves undefined, and fast enough for tests.

What the interpreter of triton 3.6 to 3.9 does, and what it does after `install`:

=================================  ==========================================================  ========================================
in a kernel                        before                                                      after
=================================  ==========================================================  ========================================
`tl.dot` of bfloat16               silently multiplies the bit patterns as integers            right (operands widened exactly)
bfloat16 arithmetic, sums          likewise wrong                                              raises: cast to float32 after the load
float32 cast to bfloat16           cut off                                                     rounded to nearest, ties to even
integers cast to bfloat16          likewise wrong                                              right
masked load without `other=`       gives 0, where a GPU gives whatever the register held       NaN, or the largest integer
`tl.sort`, `tl.topk` of integers   seconds (a Python loop per element)                         numpy's sort
`range` over run-time bounds       raises on triton 3.6 with numpy >= 2.4                      works
bfloat16 constants                 raise on triton 3.6                                         work
calls of `tl.sum`, `tl.zeros`...   patch all of `triton.language` again, a millisecond each    patched once
=================================  ==========================================================  ========================================
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

UINT16 = np.dtype(np.uint16)
BF16_NAN = np.uint16(0x7FC0)
ROUND_TO_ZERO = interpreter._ir.ROUNDING_MODE.RTZ


def install() -> None:
    """Patches this process. To be called once, after TRITON_INTERPRET=1 was set and before the first launch."""
    _patch_language_once()
    _right_bfloat16()
    _poison_masked_loads()
    _fast_sorts()


def _patch_language_once() -> None:
    """The interpreter replaces the functions of `triton.language` around every launch and in every device function; here once, for good."""
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    scope._changes.clear()
    for tensor_type in {tl.tensor, tl.core.tensor}:
        tensor_type.__index__ = lambda self: int(self.handle.data.item())
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.data.dtype == UINT16 and handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    """bfloat16 bits to the same numbers in float32."""
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if _is_bf16(handle) else handle


def _rounded_to_bf16(float32: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16 numbers, ties to even."""
    bits = float32.view(np.uint32)
    nearest = ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(float32), BF16_NAN, nearest)


def _right_bfloat16() -> None:
    create_dot = InterpreterBuilder.create_dot
    cast_impl, create_fp_to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    binary_op, unary_op = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
        return create_dot(self, _widened(a), _widened(b), d, *options)

    def cast(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if dst_type.scalar != tl.bfloat16 or src.dtype.scalar == tl.bfloat16:
            return cast_impl(self, src, dst_type)
        if src.dtype.scalar != tl.float32:
            src = cast_impl(self, src, tl.float32)
        return TensorHandle(_rounded_to_bf16(src.data), tl.bfloat16)

    def cast_with_rounding(self: Any, src: TensorHandle, dst_type: Any, rounding: Any) -> TensorHandle:
        if dst_type.scalar == tl.bfloat16 and rounding != ROUND_TO_ZERO:
            return cast(self, src, dst_type)
        return create_fp_to_fp(self, src, dst_type, rounding)

    def refuse(*handles: TensorHandle) -> None:
        if any(map(_is_bf16, handles)):
            raise TypeError("arithmetic on bfloat16: the interpreter would compute on its bits. Cast to float32 right after the load.")

    def binary(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        refuse(lhs, rhs)
        return binary_op(self, lhs, rhs, op)

    def unary(self: Any, arg: TensorHandle, op: Any) -> TensorHandle:
        refuse(arg)
        return unary_op(self, arg, op)

    def strict(method: Any) -> Any:
        def apply_impl(self: Any, inputs: Any) -> Any:
            refuse(*(tensor.handle for tensor in inputs))
            return method(self, inputs)

        return apply_impl

    def constant(self: Any, value: float) -> TensorHandle:
        return self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp = cast, cast_with_rounding
    InterpreterBuilder.binary_op, InterpreterBuilder.unary_op = binary, unary
    interpreter.ReduceOps.apply_impl = strict(interpreter.ReduceOps.apply_impl)
    interpreter.ScanOps.apply_impl = strict(interpreter.ScanOps.apply_impl)
    InterpreterBuilder.get_bf16 = constant


def _poison_masked_loads() -> None:
    create_masked_load = InterpreterBuilder.create_masked_load

    def masked_load(self: Any, ptrs: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *options: Any, **named: Any) -> TensorHandle:
        if other is None and not mask.data.all():
            dtype = ptrs.get_element_ty()
            np_dtype = np.dtype(interpreter._get_np_dtype(dtype))
            if dtype == tl.bfloat16:
                poison: Any = BF16_NAN
            elif np_dtype.kind == "f":
                poison = np.nan
            else:
                poison = True if np_dtype.kind == "b" else np.iinfo(np_dtype).max
            other = TensorHandle(np.full(ptrs.data.shape, poison, np_dtype), dtype)
        return create_masked_load(self, ptrs, mask, other, *options, **named)

    InterpreterBuilder.create_masked_load = masked_load


def _fast_sorts() -> None:
    sort_impl = tl.standard.sort_impl

    def sort(x: tl.tensor, k: Any = None, dim: Any = None, descending: Any = False) -> tl.tensor:
        k, dim, descending = (getattr(option, "value", option) for option in (k, dim, descending))
        if not x.dtype.is_int():
            return sort_impl(x, k=k, dim=dim, descending=descending)
        size = x.shape[-1]
        if dim not in (None, len(x.shape) - 1) or (k is not None and (k & (k - 1) or not 0 < k <= size)):
            raise ValueError(f"sort of dimension {dim} of shape {x.shape} for k={k}: only the last dimension, and a power of two up to its size.")
        data = np.sort(x.handle.data, axis=-1)
        data = np.ascontiguousarray((data[..., ::-1] if descending else data)[..., :k])
        return tl.core.tensor(TensorHandle(data, x.dtype), tl.block_type(x.dtype, list(data.shape)))

    tl.standard.sort_impl = sort
