"""What block selection refuses: shapes, types and devices that do not fit, and positions and slots that name nothing.

Shape legend: reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.errors import SparseForcingError
from sparse_forcing.kernels.values import require_integers, require_range, require_scale, require_tensors

LARGEST_SLOT = 2**31 - 1  # lists are int32


def check_pooling(x: Tensor, sizes: Tensor | None, weights: Tensor | None, projection: Tensor | None) -> None:
    """Refuse what `pool_blocks` cannot take."""
    optional = ("sizes", "weights", "projection")
    require_tensors("pool_blocks", optional=optional, x=x, sizes=sizes, weights=weights, projection=projection)
    if x.dim() != 5 or not x.is_floating_point():
        raise SparseForcingError(
            f"pool_blocks: x is {list(x.shape)} {x.dtype}, expected floating point [B, H, N, T, D]"
        )
    _, H, N, T, D = x.shape
    if sizes is not None and sizes.shape not in ((N,), x.shape[:3]):
        raise SparseForcingError(f"pool_blocks: sizes is {list(sizes.shape)}, expected [{N}] or {list(x.shape[:3])}")
    if weights is not None and weights.shape != (H, T):
        raise SparseForcingError(f"pool_blocks: weights is {list(weights.shape)}, expected [{H}, {T}]")
    if projection is not None and projection.shape != (H, D, D):
        raise SparseForcingError(f"pool_blocks: projection is {list(projection.shape)}, expected [{H}, {D}, {D}]")
    if sizes is not None:
        require_integers("pool_blocks", "sizes", sizes)
        require_range("pool_blocks", "sizes", sizes, 0, T, "tokens of a block")
    check_devices("pool_blocks", x, sizes, weights, projection)


def check_lists(persistent_slots: Tensor, window_slots: Tensor, selected: Tensor) -> None:
    """Refuse what `build_block_index` cannot take."""
    require_tensors(
        "build_block_index", persistent_slots=persistent_slots, window_slots=window_slots, selected=selected
    )
    if selected.dim() != 4:
        raise SparseForcingError(f"build_block_index: selected is {list(selected.shape)}, expected [B, H, Nq, K]")
    B, H, _, _ = selected.shape
    require_integers("build_block_index", "selected", selected)
    check_slots("build_block_index", "persistent_slots", persistent_slots, (B, H), None)
    check_slots("build_block_index", "window_slots", window_slots, (B, H), None)
    window = window_slots.shape[2]
    require_range("build_block_index", "selected", selected, 0, window - 1, f"positions in a window of {window} blocks")
    check_devices("build_block_index", selected, persistent_slots, window_slots)


def check_choice(name: str, top_k: int, own: Tensor | None, blocks: Tensor) -> None:
    """Refuse a number to keep or own positions that do not fit blocks [B, H, Nq, ...]."""
    if not isinstance(top_k, (int, torch.SymInt)) or top_k < 1:
        raise SparseForcingError(f"{name}: top_k is {top_k}, expected a whole number, at least 1")
    require_tensors(name, optional=("own",), own=own)
    if own is not None:
        if own.shape != (blocks.shape[2],):
            raise SparseForcingError(f"{name}: own is {list(own.shape)}, expected one window position per query block")
        require_integers(name, "own", own)
        check_devices(name, blocks, own)


def check_slots(operation: str, name: str, slots: Tensor, heads: tuple[int, int], length: int | None) -> None:
    """Refuse what does not name slots of a pool for every head, `length` of them."""
    if slots.dim() != 3 or slots.shape[:2] != heads or (length is not None and slots.shape[2] != length):
        wanted = "P" if length is None else length
        raise SparseForcingError(
            f"{operation}: {name} is {list(slots.shape)}, expected [{heads[0]}, {heads[1]}, {wanted}], a slot each"
        )
    require_integers(operation, name, slots)
    require_range(operation, name, slots, 0, LARGEST_SLOT, "slots of a pool")


def check_scale(operation: str, scale: float | None, query_blocks: Tensor, key_blocks: Tensor) -> float:
    """The factor on the scores; refuses blocks whose shapes do not fit."""
    require_tensors(operation, query_blocks=query_blocks, key_blocks=key_blocks)
    for what, x in (("query_blocks", query_blocks), ("key_blocks", key_blocks)):
        if x.dim() != 4 or not x.is_floating_point() or x.shape[-1] != query_blocks.shape[-1] or not x.shape[-1]:
            raise SparseForcingError(
                f"{operation}: {what} is {list(x.shape)} {x.dtype}, expected floating [B, H, N, D], one D for both"
            )
    if key_blocks.shape[:2] != query_blocks.shape[:2]:
        raise SparseForcingError(
            f"{operation}: B and H of query_blocks {list(query_blocks.shape)} are not those of key_blocks "
            f"{list(key_blocks.shape)}"
        )
    check_devices(operation, query_blocks, key_blocks)
    return require_scale(operation, scale, query_blocks.shape[-1])


def check_devices(operation: str, first: Tensor, *others: Tensor | None) -> None:
    """Refuse tensors on several devices."""
    for x in others:
        if x is not None and x.device != first.device:
            raise SparseForcingError(f"{operation}: inputs on {first.device} and {x.device}")
