"""Block selection: pooling, scores, top-K and the persistent-set update, against plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_forcing.errors import ConfigError
from sparse_forcing.kernels.block_selection import (
    block_importance,
    block_scores,
    build_block_index,
    choose_blocks,
    choose_lists,
    pool_blocks,
    select_blocks,
    update_persistent,
)

B, H, N, T, D = 2, 3, 5, 6, 8


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tied_scores(*shape: int, seed: int) -> torch.Tensor:
    """Few distinct values, so that most rows have ties at the cut."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("per_head", [False, True])
def test_pooling_is_the_mean_over_real_tokens(per_head):
    x = normal(B, H, N, T, D)
    sizes = torch.randint(0, T + 1, (B, H, N) if per_head else (N,), generator=torch.Generator().manual_seed(1))
    pooled = pool_blocks(x, sizes)
    for b, h, n in torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(N)).tolist():
        size = int(sizes[b, h, n] if per_head else sizes[n])
        wanted = x[b, h, n, :size].mean(0) if size else torch.zeros(D).double()
        assert torch.allclose(pooled[b, h, n], wanted, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_selector_pools_exactly_the_mean(dtype):
    x = normal(B, H, N, T, D, dtype=dtype)
    identity = torch.eye(D).expand(H, D, D)
    sizes = torch.tensor([T, 1, 3, T, 2])
    assert torch.equal(pool_blocks(x, sizes, torch.ones(H, T), identity), pool_blocks(x, sizes))
    assert pool_blocks(x).dtype == dtype


def test_learned_weights_and_map():
    x, weights, projection = normal(B, H, N, T, D), normal(H, T, seed=1), normal(H, D, D, seed=2)
    sizes = torch.tensor([T, 1, 3, T, 2])
    pooled = pool_blocks(x, sizes, weights, projection)
    for h in range(H):
        for n, size in enumerate(sizes.tolist()):
            w = weights[h, :size]
            mean = (w[:, None] * x[:, h, n, :size]).sum(1) / w.abs().sum()
            assert torch.allclose(pooled[:, h, n], mean @ projection[h], atol=1e-14)


def test_gradients_of_pooling():
    tensors = normal(1, 2, 3, 4, 3), normal(2, 4, seed=1), normal(2, 3, 3, seed=2)
    sizes = torch.tensor([4, 1, 3])
    inputs = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda x, weights, projection: pool_blocks(x, sizes, weights, projection), inputs)


def test_padding_may_hold_nan():
    x, sizes = normal(B, H, N, T, D), torch.tensor([T, 0, 3, T, 2])
    padding = (torch.arange(T) >= sizes[:, None])[..., None]
    dirty = x.masked_fill(padding, float("nan")).requires_grad_()
    weights = torch.rand(H, T).double()
    pooled = pool_blocks(dirty, sizes, weights)
    assert torch.equal(pooled, pool_blocks(x.masked_fill(padding, 0), sizes, weights))
    pooled.sum().backward()
    assert dirty.grad is not None
    assert dirty.grad.isfinite().all()
    assert not dirty.grad.masked_select(padding).any()


def test_weights_that_cancel_stay_bounded():
    x = normal(1, 1, 1, 2, D)
    assert pool_blocks(x, None, torch.tensor([[1.0, -1.0]]).double()).abs().max() <= x.abs().max()
    assert not pool_blocks(x, None, torch.zeros(1, 2).double()).any()


def test_scores():
    q, k = normal(B, H, 4, D), normal(B, H, N, D, seed=1)
    assert torch.allclose(block_scores(q, k), torch.einsum("bhqd,bhkd->bhqk", q, k) / D**0.5)
    assert torch.allclose(block_scores(q, k, scale=2.0), torch.einsum("bhqd,bhkd->bhqk", q, k) * 2)
    assert block_scores(q.bfloat16(), k.bfloat16()).dtype == torch.float32


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 15), st.booleans(), st.integers(0, 99))
def test_top_k_is_what_python_sorts_out(query_blocks, window, top_k, with_own, seed):
    scores = tied_scores(1, 2, query_blocks, window, seed=seed)
    own = torch.arange(query_blocks) % (window + 1) - 1 if with_own else None  # -1: not in the window
    selected = select_blocks(scores, top_k, own)
    assert selected.dtype == torch.int32
    for h in range(2):
        for i in range(query_blocks):
            mine = None if own is None else int(own[i])
            order = sorted(range(window), key=lambda j: (j != mine, -float(scores[0, h, i, j]), j))
            assert selected[0, h, i].tolist() == sorted(order[:top_k])


def test_choosing_is_scoring_and_selecting():
    q, k = normal(B, H, N, D), normal(B, H, 2 * N, D, seed=1)
    own = torch.arange(N) + N
    assert torch.equal(choose_blocks(q, k, top_k=3, own=own), select_blocks(block_scores(q, k), 3, own))
    one = choose_blocks(q, k, top_k=1, own=own)
    assert torch.equal(one[..., 0].long(), own.expand(B, H, N))


def test_lists_hold_the_persistent_slots_then_the_selected_window():
    persistent = torch.tensor([[[7, 3], [9, 1]]])
    window = torch.tensor([[[10, 11, 12], [20, 21, 22]]])
    selected = torch.tensor([[[[0, 2], [1, 2]], [[0, 1], [2, 0]]]]).int()
    index = build_block_index(persistent, window, selected)
    assert index.dtype == torch.int32
    assert index.tolist() == [[[[7, 3, 10, 12], [7, 3, 11, 12]], [[9, 1, 20, 21], [9, 1, 22, 20]]]]
    assert build_block_index(persistent[..., :0], window, selected).shape == (1, 2, 2, 2)
    q, k = normal(1, 2, 2, D), normal(1, 2, 3, D, seed=1)
    wanted = build_block_index(persistent, window, choose_blocks(q, k, top_k=2))
    assert torch.equal(choose_lists(q, k, persistent, window, top_k=2), wanted)


def test_importance_is_attention_summed_over_query_blocks():
    scores = normal(B, H, 4, N)
    assert torch.allclose(block_importance(scores), scores.softmax(-1).sum(2))
    sizes = torch.tensor([3, 0, 1, 5], dtype=torch.int32)
    weighted = block_importance(scores, sizes)
    assert torch.allclose(weighted, (scores.softmax(-1) * sizes[:, None]).sum(2))
    assert torch.allclose(weighted.sum(-1), torch.tensor(9.0).double())


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.integers(0, 12), st.integers(0, 14), st.integers(0, 99))
def test_the_best_candidates_persist_in_their_order(candidates, capacity, seed):
    slots = torch.randperm(50, generator=torch.Generator().manual_seed(seed))[: 2 * candidates].view(1, 2, candidates)
    importance = tied_scores(1, 2, candidates, seed=seed)
    kept, freed = update_persistent(slots, importance, capacity)
    assert kept.dtype == slots.dtype
    for h in range(2):
        order = sorted(range(candidates), key=lambda j: (-float(importance[0, h, j]), j))
        assert kept[0, h].tolist() == [int(slots[0, h, j]) for j in sorted(order[:capacity])]
        assert freed[0, h].tolist() == [int(slots[0, h, j]) for j in sorted(order[capacity:])]


def test_nothing_reads_a_tensor_on_the_host():
    """Under fake tensors there is nothing to read: `.item()` and data-dependent shapes raise."""
    with FakeTensorMode():
        blocks, sizes, own = torch.randn(B, H, N, T, D), torch.ones(N, dtype=torch.int32), torch.arange(N)
        pooled = pool_blocks(blocks, sizes, torch.ones(H, T), torch.ones(H, D, D))
        selected = choose_blocks(pooled, pooled, top_k=2, own=own)
        slots = torch.zeros(B, H, N, dtype=torch.int64)
        assert build_block_index(slots[..., :1], slots, selected).shape == (B, H, N, 3)
        kept, freed = update_persistent(slots, block_importance(block_scores(pooled, pooled), sizes), 2)
        assert (kept.shape[-1], freed.shape[-1]) == (2, N - 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pool_blocks(torch.zeros(2, 3, 4, 5)), "pool_blocks: x is"),
        (lambda: pool_blocks(torch.zeros(B, H, N, T, D), torch.zeros(T)), "pool_blocks: sizes is"),
        (lambda: pool_blocks(torch.zeros(B, H, N, T, D), None, torch.zeros(T)), "pool_blocks: weights is"),
        (lambda: pool_blocks(torch.zeros(B, H, N, T, D), None, None, torch.zeros(D, D)), "pool_blocks: projection is"),
        (lambda: block_scores(torch.zeros(B, H, N, D), torch.zeros(B, H, N, D + 1)), "block_scores"),
        (lambda: select_blocks(torch.zeros(B, H, N, N), 0), "select_blocks: top_k is 0"),
        (lambda: select_blocks(torch.zeros(B, H, N, N), 1, torch.arange(N - 1)), "select_blocks: own is"),
        (lambda: update_persistent(torch.zeros(B, H, 3), torch.zeros(B, H, 4), 1), "update_persistent"),
        (lambda: update_persistent(torch.zeros(B, H, 3), torch.zeros(B, H, 3), -1), "update_persistent: capacity -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_forced_backend_that_cannot_run_says_why():
    scores = torch.zeros(B, H, N, N)
    with pytest.raises(ConfigError, match="unknown backend 'cpu'; choose one of auto, triton, reference"):
        select_blocks(scores, 1, backend="cpu")
    with pytest.raises(ConfigError, match=r"backend 'triton' cannot run here: .+"):
        select_blocks(scores.to("meta"), 1, backend="triton")
