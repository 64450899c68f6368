"""The Triton backend of block selection; same functions and shapes as reference.py, no host synchronisation.

Bytes: `pool_blocks` reads x once and writes 1 / T of it; `choose_blocks` reads the block vectors (again 1 / T) and
writes the selected positions. README.md counts them for the 4680 x 32760 case.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparse_forcing.kernels.block_selection import reference
from sparse_forcing.kernels.block_selection.gpu.launch import (
    plan_choose,
    plan_pool,
    plan_select,
    plan_store,
    plan_update,
)
from sparse_forcing.kernels.block_selection.reference import Pools
from sparse_forcing.kernels.block_sparse_attention.reference import valid_tokens
from sparse_forcing.kernels.triton_runtime import LIBRARY, Launch, active, register_op, why_unfit

MAX_WINDOW = 2048  # blocks whose scores fit in registers; a longer window is scored and selected in torch
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_why_unfit = functools.lru_cache(why_unfit)  # a rollout asks three times in every layer of every pass


def why_unavailable(tensor: Tensor) -> str | None:
    """Reason why the kernels cannot run on this tensor, or None."""
    if tensor.dtype not in _DTYPES:
        return f"no kernel for {tensor.dtype}"
    return _why_unfit(tensor.device)


def pool_blocks(x: Tensor, sizes: Tensor | None, weights: Tensor | None, projection: Tensor | None) -> Tensor:
    """[B, H, N, T, D] -> [B, H, N, D] in x's dtype; differentiable in x, weights and projection."""
    pooled = pool_op(x, sizes, weights, x.dtype if projection is None else torch.float32)
    if projection is not None:
        pooled = torch.einsum("bhnd,hde->bhne", pooled, projection.to(pooled.dtype))
    return pooled.to(x.dtype)


def store_blocks(
    keys: Tensor, values: Tensor, rows: Tensor, pools: Pools, sizes: Tensor | None, weights: Tensor | None
) -> None:
    """Blocks [B, H, n, T, D] into the rows [B, H, n] of the pools, with their means, in one launch."""
    store_op(keys, values, rows, *pools, sizes, weights)


def select_blocks(scores: Tensor, top_k: int, own: Tensor | None) -> Tensor:
    """[B, H, Nq, Nk] -> [B, H, Nq, min(top_k, Nk)] int32 window positions, ascending."""
    if not 0 < scores.shape[-1] <= MAX_WINDOW or scores.numel() == 0:
        return reference.select_blocks(scores, top_k, own)
    return select_op(scores.detach().float().contiguous(), top_k, own)


def choose_blocks(query_blocks: Tensor, key_blocks: Tensor, top_k: int, own: Tensor | None, scale: float) -> Tensor:
    """Scores and top-K fused: [B, H, Nq, D] x [B, H, Nk, D] -> [B, H, Nq, min(top_k, Nk)] int32, ascending."""
    if not _fuses(query_blocks, key_blocks):
        scores = reference.block_scores(query_blocks, key_blocks, scale)
        return reference.select_blocks(scores, top_k, own)
    return choose_op(query_blocks.detach(), key_blocks.detach(), None, None, top_k, own, scale)


def choose_lists(
    query_blocks: Tensor,
    key_blocks: Tensor,
    persistent_slots: Tensor,
    window_slots: Tensor,
    top_k: int,
    own: Tensor | None,
    scale: float,
) -> Tensor:
    """`choose_blocks`, written as the attention's lists [B, H, Nq, P + min(top_k, Nk)] int32 in the same launch."""
    if not _fuses(query_blocks, key_blocks):
        selected = choose_blocks(query_blocks, key_blocks, top_k, own, scale)
        return reference.build_block_index(persistent_slots, window_slots, selected)
    return choose_op(query_blocks.detach(), key_blocks.detach(), persistent_slots, window_slots, top_k, own, scale)


def _fuses(query_blocks: Tensor, key_blocks: Tensor) -> bool:
    fits = 0 < key_blocks.shape[-2] <= MAX_WINDOW and key_blocks.shape[:2] == query_blocks.shape[:2]
    return fits and key_blocks.dtype == query_blocks.dtype and query_blocks.numel() > 0


def update_persistent(candidate_slots: Tensor, importance: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Top-C: [B, H, Nc] slots -> (kept [B, H, min(C, Nc)], freed [B, H, rest]), both in candidate order."""
    candidates = candidate_slots.shape[-1]
    kept = min(capacity, candidates)
    if kept in (0, candidates) or candidates > MAX_WINDOW:
        return reference.update_persistent(candidate_slots, importance, capacity)
    return update_op(candidate_slots, importance.detach(), kept)


def _run(launch: Launch, device: torch.device) -> None:
    with active(device):
        launch.run()


# Choices have no gradient: their inputs are detached above.


def _pool(x: Tensor, sizes: Tensor | None, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, H, N, T, D] -> weighted mean [B, H, N, D] of `dtype` (no projection)."""
    launch, pooled = plan_pool(x, sizes, weights, dtype)
    if pooled.numel() > 0:
        _run(launch, x.device)
    return pooled


def _pool_fake(x: Tensor, sizes: Tensor | None, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:3], x.shape[4]), dtype=dtype)


def _pool_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _pool_differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    """With u_t = w_t / sum |w|:  dx_t = u_t dc,  du_t = <dc, x_t>,  dw_t = (du_t - sign(w_t) sum_s du_s u_s) / sum
    |w|."""
    x, sizes, weights = ctx.saved_tensors
    T = x.shape[3]
    if weights is None and sizes is None:
        return (grad / T).to(x.dtype).unsqueeze(-2).expand_as(x), None, None, None
    w = torch.ones((1, 1, 1, T), device=x.device) if weights is None else weights.float()[:, None, :]
    valid = valid_tokens(sizes, T)
    if valid is not None:
        w = w * valid
    total = torch.linalg.vector_norm(w, 1, -1, keepdim=True)
    total = total.masked_fill(total == 0, 1)
    u = w / total
    grad_x = (u.unsqueeze(-1) * grad.unsqueeze(-2)).to(x.dtype) if ctx.needs_input_grad[0] else None
    grad_w = None
    if ctx.needs_input_grad[2]:
        values = x.to(torch.float32, memory_format=torch.contiguous_format)
        if valid is not None:
            values = values.masked_fill(~valid.unsqueeze(-1), 0)
        du = (values @ grad.float().unsqueeze(-1)).squeeze(-1)
        dw = torch.addcmul(du, w.sign(), (du * u).sum(-1, keepdim=True), value=-1) / total
        grad_w = (dw if valid is None else dw * valid).sum(dim=(0, 2)).to(weights.dtype)
    return grad_x, None, grad_w, None


def _store(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    pooled_keys: Tensor,
    pooled_values: Tensor | None,
    sizes: Tensor | None,
    weights: Tensor | None,
) -> None:
    """See `store_blocks`."""
    if keys.numel():
        pools = Pools(key_pool, value_pool, pooled_keys, pooled_values)
        _run(plan_store(keys, values, rows, pools, sizes, weights), keys.device)


def _select(scores: Tensor, top_k: int, own: Tensor | None) -> Tensor:
    """Row-wise top-K of contiguous float32 scores [B, H, Nq, Nk] -> int32 [B, H, Nq, min(top_k, Nk)]."""
    launch, selected = plan_select(scores, top_k, own)
    _run(launch, scores.device)
    return selected


def _select_fake(scores: Tensor, top_k: int, own: Tensor | None) -> Tensor:
    return scores.new_empty((*scores.shape[:3], min(top_k, scores.shape[3])), dtype=torch.int32)


def _choose(
    query_blocks: Tensor,
    key_blocks: Tensor,
    persistent_slots: Tensor | None,
    window_slots: Tensor | None,
    top_k: int,
    own: Tensor | None,
    scale: float,
) -> Tensor:
    """Scores and top-K fused, [B, H, Nq, D] x [B, H, Nk, D]: see `choose_blocks`, and with slots `choose_lists`."""
    launch, chosen = plan_choose(
        query_blocks, key_blocks, top_k, own, scale, persistent_slots=persistent_slots, window_slots=window_slots
    )
    _run(launch, query_blocks.device)
    return chosen


def _choose_fake(
    query_blocks: Tensor,
    key_blocks: Tensor,
    persistent_slots: Tensor | None,
    window_slots: Tensor | None,
    top_k: int,
    *_: Any,
) -> Tensor:
    persistent = 0 if persistent_slots is None else persistent_slots.shape[-1]
    length = persistent + min(top_k, key_blocks.shape[2])
    return query_blocks.new_empty((*query_blocks.shape[:3], length), dtype=torch.int32)


def _update(candidate_slots: Tensor, importance: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Top-C of [B, H, Nc]: (winners [B, H, kept], losers [B, H, Nc - kept])."""
    launch, winners, losers = plan_update(candidate_slots, importance, kept)
    _run(launch, importance.device)
    return winners, losers


def _update_fake(candidate_slots: Tensor, importance: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    *lead, candidates = candidate_slots.shape
    return candidate_slots.new_empty((*lead, kept)), candidate_slots.new_empty((*lead, candidates - kept))


store_op = register_op(
    "store_blocks(Tensor keys, Tensor values, Tensor rows, Tensor(a!) key_pool, Tensor(b!) value_pool, "
    "Tensor(c!) pooled_keys, Tensor(d!)? pooled_values, Tensor? sizes, Tensor? weights) -> ()",
    _store,
    lambda *_: None,
)
pool_op = register_op(
    "pool_blocks(Tensor x, Tensor? sizes, Tensor? weights, ScalarType dtype) -> Tensor", _pool, _pool_fake
)
torch.library.register_autograd(pool_op, _pool_differentiate, setup_context=_pool_save, lib=LIBRARY)
select_op = register_op("select_blocks(Tensor scores, int top_k, Tensor? own) -> Tensor", _select, _select_fake)
choose_op = register_op(
    "choose_blocks(Tensor query_blocks, Tensor key_blocks, Tensor? persistent_slots, Tensor? window_slots, int top_k, "
    "Tensor? own, float scale) -> Tensor",
    _choose,
    _choose_fake,
)
update_op = register_op(
    "update_persistent(Tensor candidate_slots, Tensor importance, int kept) -> (Tensor, Tensor)", _update, _update_fake
)
