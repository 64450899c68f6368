"""How the kernels of the row operations are launched: grids and arguments, without running anything."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.kernels.token_rows.gpu import kernels
from sparse_forcing.kernels.triton_runtime import Launch, power_of_two, prepare

_ONE_STAGE = {"num_stages": 1}
TURN_ROWS = 32


def _warps(channels: int) -> int:
    """At most 16 numbers of a row in each thread."""
    return min(16, max(4, power_of_two(channels) // 512))


def plan_norm_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> tuple[Launch, Tensor]:
    """The launch and its result [B, L, H, D]."""
    B, L, C = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    pairs = cos.shape[-1]
    out = torch.empty((B, L, C // (2 * pairs), 2 * pairs), dtype=x.dtype, device=x.device)
    args = {
        "x": x, "weight": weight.contiguous(), "cos": cos.contiguous(), "sin": sin.contiguous(), "out": out,
        "eps": eps, "tokens": L, "sxb": x.stride(0), "sxl": x.stride(1), "C": C, "PAIRS": pairs,
        "BLOCK_C": power_of_two(C),
    }  # fmt: skip
    return prepare(kernels.norm_rotate_kernel, L, B, args, num_warps=_warps(C), **_ONE_STAGE), out


def plan_add_norm(
    x: Tensor, update: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, *, modulates: bool
) -> tuple[Launch, Tensor, Tensor]:
    """The launch and its results (y, h), both [B, L, C]."""
    B, L, C = x.shape
    x, update = (part if part.stride(-1) == 1 else part.contiguous() for part in (x, update))
    y, h = (torch.empty((B, L, C), dtype=x.dtype, device=x.device) for _ in range(2))
    vectors: dict[str, Tensor | None] = {}
    steps: dict[str, int] = {}
    for name, vector in {"gate": gate, "shift": shift, "scale": scale}.items():
        if vector is not None and vector.stride(-1) != 1:
            vector = vector.contiguous()
        vectors[name] = vector
        steps[f"s{name}"] = 0 if vector is None or vector.dim() == 1 or len(vector) == 1 else vector.stride(0)
    args = {
        "x": x, "update": update, **vectors, "y": y, "h": h, "eps": eps, "tokens": L, "sxb": x.stride(0),
        "sxl": x.stride(1), "sub": update.stride(0), "sul": update.stride(1), **steps, "C": C,
        "BLOCK_C": power_of_two(C), "GATED": gate is not None, "MODULATES": modulates,
    }  # fmt: skip
    return prepare(kernels.add_norm_kernel, L, B, args, num_warps=_warps(C), **_ONE_STAGE), y, h


def plan_turn_time(keys: Tensor, cos: Tensor, sin: Tensor) -> Launch:
    """The launch, which writes into keys [A, B, C, D]; cos and sin [A, B, C, P] float32, of equal strides."""
    A, B, C, _ = keys.shape
    assert B * C + TURN_ROWS < 2**31, "rows of one sample and head are counted in 32 bits"
    assert keys.stride(-1) == cos.stride(-1) == 1, "keys and turns lie along their last dimension"
    args = {
        "keys": keys, "cos": cos, "sin": sin, "inner": C, "rows": B * C,
        **{f"sk{axis}": step for axis, step in zip("abc", keys.stride())},
        **{f"st{axis}": step for axis, step in zip("abc", cos.stride())},
        "PAIRS": cos.shape[-1], "BLOCK_P": power_of_two(cos.shape[-1]), "ROWS": TURN_ROWS,
    }  # fmt: skip
    return prepare(kernels.turn_time_kernel, -(-B * C // TURN_ROWS), A, args, num_warps=4, **_ONE_STAGE)
