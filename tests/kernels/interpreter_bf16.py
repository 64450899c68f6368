"""Make bfloat16 mean bfloat16 in Triton's CPU interpreter (TRITON_INTERPRET=1), for tests.

The interpreter keeps bfloat16 as uint16 bit patterns in numpy arrays and, as of Triton 3.6 to 3.9, multiplies those
bits as integers in `tl.dot` and truncates when it narrows float32. `install()` replaces the three operations the
kernels use: a product widens its operands first, and narrowing rounds to nearest even, as the hardware does.
Elementwise arithmetic on bfloat16 cannot be rescued that way, so it raises: kernels must widen to float32 before they
compute.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_CASTS = (
    "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui", "create_fp_ext", "create_fp_trunc",
)  # fmt: skip


def widen(bits: np.ndarray) -> np.ndarray:
    """uint16 bfloat16 bits -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bfloat16 bits, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def install() -> None:
    """Patch the interpreter of this process, once. Call it before the first kernel runs."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_bf16_installed", False):
        return
    cast, binary, narrow_or_widen = builder.cast_impl, builder.binary_op, builder.create_fp_to_fp

    def create_dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        # Summed in float64, then rounded: how numpy sums in float32 depends on the CPU, and on some CPUs a b and the
        # transpose of b' a' differ, which on GPUs they do not: forward and backward see the same scores.
        left, right = ((widen(x.data) if _is_bf16(x) else x.data).astype(np.float64) for x in (a, b))
        return interpreter.TensorHandle((left @ right).astype(total.data.dtype) + total.data, total.dtype.scalar)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        before, after = source.dtype.scalar, kind.scalar
        if (before, after) == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widen(source.data), after)
        if (before, after) == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(narrow(source.data), after)
        return cast(self, source, kind)

    def create_fp_to_fp(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        if {source.dtype.scalar, kind.scalar} == {tl.bfloat16, tl.float32}:
            return cast_impl(self, source, kind)
        return narrow_or_widen(self, source, kind, rounding)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if _is_bf16(left) or _is_bf16(right):
            raise TypeError("bfloat16 arithmetic is wrong in Triton's interpreter: widen to float32 in the kernel")
        return binary(self, left, right, op)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.create_fp_to_fp, builder.binary_op = create_fp_to_fp, binary_op
    for name in _CASTS:  # these captured the old cast when the class was made
        setattr(builder, name, lambda self, source, kind: self.cast_impl(source, kind))
    _index_scalars()
    builder._bf16_installed = True


def _index_scalars() -> None:
    """Triton 3.6 turns one-element arrays into loop bounds with int(), which numpy 2.5 refuses."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
