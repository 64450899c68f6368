"""Entry points of block selection: compress blocks, score them, keep the best, and update the persistent set.

One chunk of a rollout uses them in this order (Sparse Forcing, arXiv 2604.21221, sections 3 and 4):

    pool_blocks -> choose_lists (= block_scores + select_blocks + build_block_index) -> block_sparse_attention
    after the clean pass: block_scores or the exact block mass -> block_importance -> update_persistent

`pool_blocks` and `block_scores` are differentiable; the choice is not. A score that is NaN counts as the highest.
Nothing synchronises with the host: what slots and positions name is checked on a CPU, and on a GPU inside
`checked_values()` (kernels/values.py). A faster backend is the module `gpu/backend.py` with `why_unavailable(tensor) ->
str | None` and functions named and shaped as in `reference`; "auto" uses it on a GPU when it can run.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError, SparseForcingError
from sparse_forcing.kernels.block_selection import reference
from sparse_forcing.kernels.block_selection.checks import (
    check_choice,
    check_devices,
    check_lists,
    check_pooling,
    check_scale,
    check_slots,
)
from sparse_forcing.kernels.block_selection.reference import Pools
from sparse_forcing.kernels.values import checked_values, require_integers, require_range, require_tensors

__all__ = [
    "BACKENDS",
    "Pools",
    "block_importance",
    "block_scores",
    "build_block_index",
    "checked_values",
    "choose_blocks",
    "choose_lists",
    "pool_blocks",
    "select_blocks",
    "store_blocks",
    "update_persistent",
    "why_unavailable",
]
BACKENDS = ("auto", "triton", "reference")


def pool_blocks(
    x: Tensor,
    sizes: Tensor | None = None,
    weights: Tensor | None = None,
    projection: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Compress each block to one vector: phi(x) [B, H, N, D] of x [B, H, N, T, D].

    Args:
        sizes: [N] or [B, H, N], real tokens of each block; None means T everywhere. A block of size 0 gives 0.
        weights: [H, T] learned position weights, normalised by their absolute sum over real tokens; None (or ones)
            is the mean.
        projection: [H, D, D] linear map applied per head as `c @ projection[h]`; None is the identity.
    """
    check_pooling(x, sizes, weights, projection)
    return _backend(backend, x).pool_blocks(x, sizes, weights, projection)


@torch.no_grad()
def store_blocks(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    pools: Pools,
    sizes: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Write a chunk's blocks [B, H, n, T, D], and what `pool_blocks` makes of them, into their slots, in place.

    Args:
        rows: [B, H, n] places of the blocks in the pools, whose first three dimensions are counted as one.
        pools: keys, values, and pooled keys; pooled values (plain means) where they are kept.
        sizes: [n], see `pool_blocks`. weights: [H, T] of keys.
    """
    check_pooling(keys, sizes, weights, None)
    require_tensors("store_blocks", values=values, rows=rows)
    if values.shape != keys.shape or rows.shape != keys.shape[:3]:
        raise SparseForcingError(
            f"store_blocks: values {list(values.shape)} and rows {list(rows.shape)} do not fit keys {list(keys.shape)}"
        )
    require_integers("store_blocks", "rows", rows)
    require_range("store_blocks", "rows", rows, 0, pools.keys.shape[:3].numel() - 1, "rows of the pools")
    if not all(pool is None or pool.is_contiguous() for pool in pools):
        raise SparseForcingError("store_blocks: the pools are not contiguous")
    check_devices("store_blocks", keys, values, rows, pools.keys)
    _backend(backend, keys).store_blocks(keys, values, rows, pools, sizes, weights)


def block_scores(query_blocks: Tensor, key_blocks: Tensor, scale: float | None = None) -> Tensor:
    """Raw scores scale * <q, k> [B, H, Nq, Nk] of block vectors [B, H, Nq, D] and [B, H, Nk, D], in float32.

    scale None means 1 / sqrt(D). The scores feed the top-K, the coarse branch and the distillation loss.
    """
    return reference.block_scores(
        query_blocks, key_blocks, check_scale("block_scores", scale, query_blocks, key_blocks)
    )


def select_blocks(scores: Tensor, top_k: int, own: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Window positions [B, H, Nq, min(top_k, Nk)] int32 of the highest scores [B, H, Nq, Nk], ascending.

    Ties go to the lower position. own [Nq]: window position of each query block itself, always kept (-1: none).
    """
    require_tensors("select_blocks", scores=scores)
    if scores.dim() != 4 or not scores.is_floating_point():
        raise SparseForcingError(
            f"select_blocks: scores is {list(scores.shape)} {scores.dtype}, expected floating point [B, H, Nq, Nk]"
        )
    check_choice("select_blocks", top_k, own, scores)
    return _backend(backend, scores).select_blocks(scores, top_k, own)


def choose_blocks(
    query_blocks: Tensor,
    key_blocks: Tensor,
    *,
    top_k: int,
    own: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """select_blocks(block_scores(...)) in one call; a fused backend never stores the whole score matrix."""
    scale = check_scale("choose_blocks", scale, query_blocks, key_blocks)
    check_choice("choose_blocks", top_k, own, query_blocks)
    module = _backend(backend, query_blocks)
    if hasattr(module, "choose_blocks"):
        return module.choose_blocks(query_blocks, key_blocks, top_k, own, scale)
    return module.select_blocks(reference.block_scores(query_blocks, key_blocks, scale), top_k, own)


def choose_lists(
    query_blocks: Tensor,
    key_blocks: Tensor,
    persistent_slots: Tensor,
    window_slots: Tensor,
    *,
    top_k: int,
    own: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """build_block_index(..., choose_blocks(...)) in one call; a fused backend does it in one launch."""
    require_tensors("choose_lists", persistent_slots=persistent_slots, window_slots=window_slots)
    scale = check_scale("choose_lists", None, query_blocks, key_blocks)
    check_choice("choose_lists", top_k, own, query_blocks)
    B, H, _, _ = query_blocks.shape
    check_slots("choose_lists", "persistent_slots", persistent_slots, (B, H), None)
    check_slots("choose_lists", "window_slots", window_slots, (B, H), key_blocks.shape[2])
    check_devices("choose_lists", query_blocks, key_blocks, persistent_slots, window_slots, own)
    module = _backend(backend, query_blocks)
    if hasattr(module, "choose_lists"):
        return module.choose_lists(query_blocks, key_blocks, persistent_slots, window_slots, top_k, own, scale)
    selected = module.select_blocks(reference.block_scores(query_blocks, key_blocks, scale), top_k, own)
    return reference.build_block_index(persistent_slots, window_slots, selected)


def build_block_index(persistent_slots: Tensor, window_slots: Tensor, selected: Tensor) -> Tensor:
    """Lists for the attention, [B, H, Nq, P + K] int32: the persistent slots, then the selected window slots.

    persistent_slots [B, H, P] and window_slots [B, H, Nk] name pool slots; selected [B, H, Nq, K] are positions in
    window_slots, so an ascending selection over a chronological window stays chronological.
    """
    check_lists(persistent_slots, window_slots, selected)
    return reference.build_block_index(persistent_slots, window_slots, selected)


def block_importance(scores_over_candidates: Tensor, query_sizes: Tensor | None = None) -> Tensor:
    """Importance [B, H, Nc] of each candidate: softmax over candidates of [B, H, Nq, Nc], summed over query blocks.

    query_sizes [Nq] weighs each query block by its real rows, which turns block attention into an estimate of the
    attention mass per token row; None gives every query block weight 1.
    """
    scores = scores_over_candidates
    require_tensors("block_importance", optional=("query_sizes",), scores=scores, query_sizes=query_sizes)
    if scores.dim() != 4 or not scores.is_floating_point():
        raise SparseForcingError(
            f"block_importance: scores is {list(scores.shape)} {scores.dtype}, expected floating point [B, H, Nq, Nc]"
        )
    if query_sizes is not None and query_sizes.shape != (scores.shape[2],):
        raise SparseForcingError(
            f"block_importance: query_sizes is {list(query_sizes.shape)}, expected [{scores.shape[2]}]"
        )
    return reference.block_importance(scores, query_sizes)


def update_persistent(
    candidate_slots: Tensor, importance: Tensor, capacity: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """P_t = TopC(P_{t-1} u E_t): split candidate_slots [B, H, Nc] into (kept [B, H, min(C, Nc)], freed [B, H, rest]).

    Both keep the candidates' order (chronological when the candidates are); the earlier candidate wins a tie.
    """
    require_tensors("update_persistent", candidate_slots=candidate_slots, importance=importance)
    if (
        not isinstance(capacity, (int, torch.SymInt))
        or capacity < 0
        or importance.shape != candidate_slots.shape
        or candidate_slots.dim() != 3
    ):
        raise SparseForcingError(
            f"update_persistent: capacity {capacity}, importance {list(importance.shape)} for candidates "
            f"{list(candidate_slots.shape)}; expected capacity >= 0 and equal shapes [B, H, Nc]"
        )
    require_integers("update_persistent", "candidate_slots", candidate_slots)
    check_devices("update_persistent", importance, candidate_slots)
    return _backend(backend, importance).update_persistent(candidate_slots, importance, capacity)


def why_unavailable(backend: str, tensor: Tensor) -> str | None:
    """Reason why `backend` cannot run on this tensor, or None when it can."""
    if backend == "reference":
        return None
    try:
        return _triton().why_unavailable(tensor)
    except ImportError as error:
        return f"import failed: {error}"


def _triton() -> ModuleType:
    return importlib.import_module("sparse_forcing.kernels.block_selection.gpu.backend")


def _backend(backend: str, tensor: Tensor) -> ModuleType:
    if backend not in BACKENDS:
        raise ConfigError(f"block selection: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        use_triton = tensor.device.type != "cpu" and why_unavailable("triton", tensor) is None
        return _triton() if use_triton else reference
    reason = why_unavailable(backend, tensor)
    if reason is not None:
        raise ConfigError(f"block selection: backend {backend!r} cannot run here: {reason}")
    return _triton() if backend == "triton" else reference
