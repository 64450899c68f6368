"""How the Triton kernels of block selection are launched: grids, tiles and arguments, without running anything."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.kernels.block_selection.gpu import kernels
from sparse_forcing.kernels.block_selection.reference import Pools
from sparse_forcing.kernels.triton_runtime import Launch, power_of_two, prepare, target

_ONE_STAGE = {"num_stages": 1}


def plan_pool(
    x: Tensor, sizes: Tensor | None, weights: Tensor | None, dtype: torch.dtype = torch.float32
) -> tuple[Launch, Tensor]:
    """The pooling launch and its result, [B, H, N, D] of `dtype`; the sums are float32."""
    B, H, N, T, D = x.shape
    pooled = torch.empty((B, H, N, D), dtype=dtype, device=x.device)
    args = {
        "x": x, "pooled": pooled, "heads": H, "blocks": N, "T": T, "D": D,
        "sizes": None if sizes is None else sizes.expand(B, H, N).contiguous(), "RAGGED": sizes is not None,
        "weights": None if weights is None else weights.contiguous(), "WEIGHTED": weights is not None,
        "BLOCK_T": power_of_two(T), "BLOCK_D": power_of_two(D),
        **{f"sx{axis}": stride for axis, stride in zip("bhntd", x.stride())},
    }  # fmt: skip
    return prepare(kernels.pool_kernel, N, B * H, args, num_warps=4, **_ONE_STAGE), pooled


def plan_store(
    keys: Tensor, values: Tensor, rows: Tensor, pools: Pools, sizes: Tensor | None, weights: Tensor | None
) -> Launch:
    """The launch that writes a chunk's blocks [B, H, n, T, D] into its pools."""
    B, H, N, T, D = keys.shape
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    args = {
        "keys": keys, "values": values, "rows": rows.contiguous(), "sizes": sizes,
        "weights": None if weights is None else weights.contiguous(), "key_pool": pools.keys,
        "value_pool": pools.values, "pooled_keys": pools.representatives, "pooled_values": pools.value_representatives,
        **{f"sk{axis}": step for axis, step in zip("bhnt", keys.stride())},
        **{f"sv{axis}": step for axis, step in zip("bhnt", values.stride())},
        "heads": H, "blocks": N, "T": T, "D": D, "BLOCK_T": power_of_two(T), "BLOCK_D": power_of_two(D),
        "RAGGED": sizes is not None, "WEIGHTED": weights is not None,
        "POOL_VALUES": pools.value_representatives is not None,
    }  # fmt: skip
    return prepare(kernels.store_kernel, N, B * H, args, num_warps=4, **_ONE_STAGE)


def _rows_and_warps(window: int) -> tuple[int, int, int]:
    """(rows per program, padded window, warps): the keys stay within about 64 registers per thread."""
    padded = max(16, power_of_two(window))
    return 16, padded, 4 if padded <= 256 else 8 if padded <= 512 else 16


def plan_choose(
    q: Tensor,
    k: Tensor,
    top_k: int,
    own: Tensor | None,
    scale: float,
    arch: str | None = None,
    *,
    persistent_slots: Tensor | None = None,
    window_slots: Tensor | None = None,
) -> tuple[Launch, Tensor]:
    """The fused scores + top-K launch and its result: positions, or lists where slots are given."""
    B, H, Nq, D = q.shape
    window = k.shape[-2]
    rows, padded, warps = _rows_and_warps(window)
    kept = min(top_k, window)
    persistent = 0 if persistent_slots is None else persistent_slots.shape[-1]
    chosen = torch.empty((B, H, Nq, persistent + kept), dtype=torch.int32, device=q.device)
    amd = (arch or target(q.device)).startswith("gfx")  # knows no tf32x3; without it NVIDIA's code spills
    args = {
        "query_blocks_ptr": q.contiguous(), "key_blocks_ptr": k.to(q.dtype).contiguous(), "own": own,
        "persistent_slots": None if persistent_slots is None else persistent_slots.contiguous(),
        "window_slots": None if window_slots is None else window_slots.contiguous(), "chosen": chosen, "scale": scale,
        "query_blocks": Nq, "window": window, "kept": kept, "persistent": persistent, "D": D, "STEP": 16, "ROWS": rows,
        "BLOCK_N": padded, "BLOCK_P": 64, "OWN": own is not None, "SLOTS": window_slots is not None,
        "PRECISION": "tf32" if q.dtype != torch.float32 else "ieee" if amd else "tf32x3",
    }  # fmt: skip
    return prepare(kernels.choose_kernel, -(-Nq // rows), B * H, args, num_warps=warps, **_ONE_STAGE), chosen


def plan_select(scores: Tensor, top_k: int, own: Tensor | None) -> tuple[Launch, Tensor]:
    """The top-K launch on stored scores and its result."""
    B, H, Nq, window = scores.shape
    _, padded, warps = _rows_and_warps(window)
    kept = min(top_k, window)
    selected = torch.empty((B, H, Nq, kept), dtype=torch.int32, device=scores.device)
    args = {
        "scores_ptr": scores, "own": own, "selected": selected, "query_blocks": Nq, "window": window, "kept": kept,
        "ROWS": 4, "BLOCK_N": padded, "OWN": own is not None,
    }  # fmt: skip
    return prepare(kernels.select_kernel, -(-Nq // 4), B * H, args, num_warps=warps, **_ONE_STAGE), selected


def plan_update(slots: Tensor, importance: Tensor, kept: int) -> tuple[Launch, Tensor, Tensor]:
    """The Top-C launch and its two results."""
    B, H, candidates = slots.shape
    winners = torch.empty((B, H, kept), dtype=slots.dtype, device=slots.device)
    losers = torch.empty((B, H, candidates - kept), dtype=slots.dtype, device=slots.device)
    args = {
        "slots": slots.contiguous(), "importance": importance.detach().float().contiguous(), "kept_slots": winners,
        "freed_slots": losers, "candidates": candidates, "capacity": kept,
        "BLOCK_N": power_of_two(candidates),
    }  # fmt: skip
    return prepare(kernels.update_kernel, 1, B * H, args, num_warps=4, **_ONE_STAGE), winners, losers
