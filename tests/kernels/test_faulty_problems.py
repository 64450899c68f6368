"""Problems at the edge of what the kernels take, and beyond it: one result or one error, whatever the backend.

Run as it is for the reference and the CPU, and by test_triton_interpreter.py for Triton, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_forcing.errors import SparseForcingError
from sparse_forcing.kernels import block_selection as selection
from sparse_forcing.kernels.block_sparse_attention import block_sparse_attention
from sparse_forcing.kernels.block_sparse_attention.interface import block_sparse_attention_backward
from sparse_forcing.kernels.values import checked_values, reads_values

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ATTENTION = ("triton",) if INTERPRETED else ("reference", "cpu")
SELECTION = ("triton",) if INTERPRETED else ("reference",)
B, H, NQ, TQ, S, T, D = 1 if INTERPRETED else 2, 2, 3, 5, 4, 6, 8  # the interpreter is slow
NAN = float("nan")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs() -> list[Tensor]:
    return [normal(B, H, n, t, D, seed=seed) for seed, (n, t) in enumerate(((NQ, TQ), (S, T), (S, T)))]


def lists(*entries: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(entries, dtype=dtype).expand(B, H, NQ, -1)


def attend(backend: str, index: Tensor, *, tensors: list[Tensor] | None = None, **options: object) -> list[Tensor]:
    """out, lse, mass and the three gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (tensors or inputs())]
    got = block_sparse_attention(*leaves, index, return_mass=True, backend=backend, **options)
    seen = got.lse.masked_fill(got.lse == float("-inf"), 0)
    grads = torch.autograd.grad(got.out.square().sum() + seen.sum(), leaves)
    return [x.detach() for x in (*got, *grads)]


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


# --- lists, sizes and scales that mean nothing ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize(
    ("index", "message"),
    [
        (lists(1, 0, 0, 1, dtype=torch.bool), "block_index is .*torch.bool, expected whole numbers"),
        (lists(0, 3, dtype=torch.float32), "block_index is .*torch.float32, expected whole numbers"),
        (lists(0, 3, dtype=torch.float16), "block_index is .*torch.float16, expected whole numbers"),
        (lists(0, 4), "block_index lists slot 4 of a pool of 4 slots"),
        (lists(0, 2**32 + 1, dtype=torch.int64), "block_index lists slot 4294967297 of a pool of 4"),
        (lists(0, -(2**32) + 1, dtype=torch.int64), "block_index holds -4294967295; an unused entry is -1"),
        (lists(0, -2), "block_index holds -2; an unused entry is -1"),
        (lists(-1, 0, 2), "a slot after an unused entry"),
        (lists(0, -1, 2), "a slot after an unused entry"),
        (lists(0, 255, dtype=torch.uint8), "lists slot 255 of a pool of 4"),
    ],
)
def test_lists_that_are_no_lists(index, message, backend):
    with pytest.raises(SparseForcingError, match=message):
        attend(backend, index)


@pytest.mark.parametrize("backend", ATTENTION)
def test_what_is_no_tensor_or_of_8_bits(backend):
    with pytest.raises(SparseForcingError, match="block_index is a list, expected a tensor"):
        attend(backend, lists(0, 3).tolist())
    x = torch.zeros(1, 1, 1, 16, 16).to(torch.float8_e4m3fn)
    with pytest.raises(SparseForcingError, match=r"query is .* expected floating point .* of 16 bits or more"):
        block_sparse_attention(x, x, x, torch.zeros(1, 1, 1, 1, dtype=torch.int32), backend=backend)


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize(
    "scale", [0, 0.0, -1.0, NAN, float("inf"), "half", 1e300, 10**400, 1j, torch.tensor([0.3, 0.2])]
)
def test_scales_that_are_none(scale, backend):
    with pytest.raises(SparseForcingError, match=r"scale is .*, expected a positive, finite number or None"):
        attend(backend, lists(0, 1), scale=scale)


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_sizes": torch.tensor([5, 6, 5]).int()}, "query_sizes holds 6, expected 0 to 5: rows of a query block"),
        ({"query_sizes": torch.tensor([5, -1, 5]).int()}, "query_sizes holds -1, expected 0 to 5"),
        ({"key_sizes": torch.full((B, H, S), 7).int()}, "key_sizes holds 7, expected 0 to 6: tokens of a slot"),
        ({"num_persistent": 2}, "the first 2 entries of block_index are not the same"),
        ({"num_persistent": 1.5}, "at least num_persistent = 1.5 entries"),
        ({"num_persistent": -1}, "at least num_persistent = -1 entries"),
    ],
)
def test_sizes_and_promises_that_do_not_hold(options, message, backend):
    index = lists(0, 1, 2).clone()
    index[0, 1, 2, 1] = 3
    with pytest.raises(SparseForcingError, match=message):
        attend(backend, index, **options)


@pytest.mark.parametrize("backend", ATTENTION)
def test_the_backward_call_refuses_what_the_forward_does(backend):
    tensors, index = inputs(), lists(0, 3)
    got = block_sparse_attention(*tensors, index, backend=backend)
    with pytest.raises(SparseForcingError, match="lists slot 4 of a pool of 4"):
        block_sparse_attention_backward(got.out, *tensors, index + 1, out=got.out, lse=got.lse, backend=backend)


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("what", ["grad_out", "out", "lse"])
@pytest.mark.parametrize("spoil", [lambda x: x[..., :-1], lambda x: x.double(), lambda x: x.to("meta"), lambda x: None])
def test_the_backward_call_refuses_what_is_no_outcome(spoil, what, backend):
    """Triton read beyond the end of what is too short."""
    tensors, index = inputs(), lists(0, 3)
    got = block_sparse_attention(*tensors, index, backend=backend)
    given = {"grad_out": got.out, "out": got.out, "lse": got.lse}
    with pytest.raises(SparseForcingError, match=f"block_sparse_attention: {what} is .* expected"):
        grad_out, *rest = (given | {what: spoil(given[what])}).values()
        block_sparse_attention_backward(grad_out, *tensors, index, out=rest[0], lse=rest[1], backend=backend)


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("what", ["query_sizes", "key_sizes"])
def test_sizes_are_tensors(what, backend):
    with pytest.raises(SparseForcingError, match=f"{what} is a list, expected a tensor"):
        attend(backend, lists(0, 3), **{what: [1, 2, 3]})


@pytest.mark.parametrize("backend", ATTENTION)
def test_sparse_tensors_are_refused(backend):
    query, *pools = inputs()
    with pytest.raises(SparseForcingError, match=r"query has the layout .*sparse_coo, expected a dense tensor"):
        block_sparse_attention(query.to_sparse(), *pools, lists(0, 3), backend=backend)


def test_values_are_read_where_that_is_asked_for_or_free():
    listed, broken = lists(0, 1), lists(0, 1).clone()
    broken[0, 0, 0, 0] = 2
    with checked_values(False):
        assert not reads_values(listed)
        block_sparse_attention(*inputs(), broken, num_persistent=1, backend="reference")
    with checked_values(), pytest.raises(SparseForcingError, match="num_persistent"):
        block_sparse_attention(*inputs(), broken, num_persistent=1, backend="reference")
    assert not reads_values(torch.empty(1, device="meta"))


# --- odd problems that have an answer -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.int64] if INTERPRETED else [torch.int64, torch.int16, torch.int8, torch.uint8])
def test_lists_of_any_integers(dtype, backend):
    same(attend(backend, lists(3, 1, dtype=dtype)), attend("reference", lists(3, 1)))


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize(
    ("sizes", "index"),
    [
        ({"S": 0}, (-1, -1, -1)),
        ({"T": 0}, (2, 0)),
        ({"T": 0}, (0, -1)),
        ({"S": 0}, ()),
        ({}, ()),
        ({}, (-1, -1)),
        ({"NQ": 0}, (0,)),
        ({"TQ": 0}, (0,)),
        ({"B": 0}, (0,)),
        ({"H": 0}, (0,)),
    ],
)
def test_nothing_to_attend_gives_zeros(sizes, index, backend):
    n = {"B": B, "H": H, "NQ": NQ, "TQ": TQ, "S": S, "T": T} | sizes
    tensors = [normal(n["B"], n["H"], n[a], n[b], D) for a, b in (("NQ", "TQ"), ("S", "T"), ("S", "T"))]
    rows = torch.tensor(index, dtype=torch.int32).expand(n["B"], n["H"], n["NQ"], -1)
    out, lse, mass, *grads = attend(backend, rows, tensors=tensors)
    assert out.shape == tensors[0].shape
    assert bool((lse == float("-inf")).all())
    assert mass.shape == rows.shape
    assert [x.shape for x in grads] == [x.shape for x in tensors]
    assert not any(x.any() for x in (out, mass, *grads))


@pytest.mark.parametrize("backend", ATTENTION)
def test_an_empty_pool_has_no_slot_to_list(backend):
    tensors = [x if i == 0 else x[:, :, :0] for i, x in enumerate(inputs())]
    with pytest.raises(SparseForcingError, match="lists slot 0 of a pool of 0 slots"):
        attend(backend, lists(0), tensors=tensors)


@pytest.mark.parametrize("backend", ATTENTION)
def test_a_slot_listed_twice_counts_twice(backend):
    query, key_pool, value_pool = inputs()
    twice = attend(backend, lists(1, 3, 1))
    apart = attend(
        "reference", lists(1, 3, 4), tensors=[query, *(torch.cat([x, x[:, :, 1:2]], 2) for x in (key_pool, value_pool))]
    )
    same(twice[:4], apart[:4])
    for mine, exact in zip(twice[4:], apart[4:]):
        exact[:, :, 1] += exact[:, :, 4]
        torch.testing.assert_close(mine, exact[:, :, :4], rtol=1e-4, atol=1e-5)


EXPANDED: list[Callable[[Tensor], Tensor]] = [
    lambda x: x[:1, :1].expand(B, H, S, T, D),
    lambda x: x[:, :1].expand(B, H, S, T, D),
    lambda x: x[:1].expand(B, H, S, T, D),
    lambda x: x[:, :, :1].expand(B, H, S, T, D),
    lambda x: x[:, :, :, :1].expand(B, H, S, T, D),
    lambda x: x[..., :1].expand(B, H, S, T, D),
    lambda x: x[:, :1],
    lambda x: x[:1, :1],
]


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("expand", EXPANDED[::3] if INTERPRETED else EXPANDED)
@pytest.mark.parametrize("which", ["both"] if INTERPRETED else ["key", "value", "both"])
def test_gradients_of_expanded_pools(which, expand, backend):
    def gradients(backend: str) -> list[Tensor]:
        query, *pools = (x.requires_grad_() for x in inputs())
        parts = [expand(x) if which in (name, "both") else x for name, x in zip(("key", "value"), pools)]
        got = block_sparse_attention(query, *parts, lists(2, 0), num_persistent=1, backend=backend)
        return [got.out.detach(), *torch.autograd.grad(got.out.square().sum() + got.lse.sum(), (query, *pools))]

    same(gradients(backend), gradients("reference"))


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("expand", EXPANDED[-1:] if INTERPRETED else EXPANDED)
def test_the_backward_call_takes_expanded_pools(expand, backend):
    query, *pools = inputs()
    key_pool, value_pool = map(expand, pools)
    leaves = [x.clone().requires_grad_() for x in (query, key_pool, value_pool)]
    got = block_sparse_attention(*leaves, lists(2, 0), backend="reference")
    wanted = torch.autograd.grad(got.out, leaves, normal(*got.out.shape, seed=9))
    found = block_sparse_attention_backward(
        normal(*got.out.shape, seed=9),
        query,
        key_pool,
        value_pool,
        lists(2, 0),
        out=got.out,
        lse=got.lse,
        backend=backend,
    )
    same(list(found), list(wanted))


def spread(x: Tensor) -> Tensor:
    """The same values in a view with NaN around them and other strides."""
    padded = torch.full((*[n + 2 for n in x.shape],), NAN).transpose(1, 3).contiguous().transpose(1, 3)
    view = padded[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)


@pytest.mark.parametrize("backend", ATTENTION)
def test_strided_views_between_nan(backend):
    index = torch.stack([lists(3, 0, -1), lists(1, 2, 3)], -1).transpose(-1, -2)[..., 0, :]
    sizes = torch.tensor([[[3, 9], [6, 9], [0, 9], [5, 9]]], dtype=torch.int32)[..., 0].expand(B, H, S)
    rows = torch.tensor([[5, 9], [2, 9], [0, 9]], dtype=torch.int32)[:, 0]

    def run(backend: str, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in inputs()]
        got = block_sparse_attention(
            *map(change, leaves), index, query_sizes=rows, key_sizes=sizes, return_mass=True, backend=backend
        )
        # A gradient with strides and NaN where there is no row.
        upstream = torch.ones(B, H, NQ, D, TQ).transpose(-1, -2).clone(memory_format=torch.preserve_format)
        upstream.masked_fill_((torch.arange(TQ) >= rows[:, None])[..., None], NAN)
        assert not upstream.is_contiguous()
        return [x.detach() for x in (*got, *torch.autograd.grad(got.out, leaves, upstream))]

    same(run(backend, spread), run("reference", lambda x: x))


@pytest.mark.parametrize("backend", ATTENTION)
def test_nan_in_what_is_not_seen_changes_nothing_and_in_what_is_seen_stays_in_its_rows(backend):
    query, key_pool, value_pool = inputs()
    wanted = attend("reference", lists(3, 1))
    poisoned = [query, *(x.index_fill(2, torch.tensor([0, 2]), NAN) for x in (key_pool, value_pool))]
    same(attend(backend, lists(3, 1), tensors=poisoned), wanted)
    query = query.clone()
    query[0, 0, 1, 2] = NAN
    got = block_sparse_attention(query, key_pool, value_pool, lists(3, 1), backend=backend)
    bad = torch.zeros(got.lse.shape, dtype=torch.bool)
    bad[0, 0, 1, 2] = True
    assert torch.equal(got.lse.isnan(), bad)
    assert torch.equal(got.out.isnan().all(-1), bad)
    leaves = [x.requires_grad_() for x in (query, key_pool, value_pool)]
    out = block_sparse_attention(*leaves, lists(3, 1), backend=backend).out
    dq, dk, _ = torch.autograd.grad(out.sum(), leaves)
    assert torch.equal(dq.isnan().all(-1), bad)
    assert bool(dk[0, 0, [1, 3]].isnan().all())  # a lost NaN would train on
    assert not dk[0, 1].isnan().any()
    torch.testing.assert_close(got.out[~bad], wanted[0][~bad], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_what_is_not_finite_shows_in_the_same_places_without_gradients(which, bad):
    tensors = inputs()
    tensors[which][0, 0, 1, 2, 3] = bad
    wanted, got = (block_sparse_attention(*tensors, lists(3, 1), backend=name) for name in ("reference", "cpu"))
    for mine, exact in zip(got[:2], wanted):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5, equal_nan=True)


# --- gradients of gradients -----------------------------------------------------------------------------------------


def penalty(backend: str, dtype: torch.dtype, orders: int) -> list[Tensor]:
    """Gradients of a gradient penalty through out and lse, `orders` deep, ragged, with an empty row."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs()]
    index = lists(1, 3, 0).clone()
    index[0, 0, 1] = -1
    got = block_sparse_attention(
        *leaves,
        index,
        backend=backend,
        query_sizes=torch.tensor([5, 5, 2]).int(),
        key_sizes=torch.tensor([6, 4, 0, 3]).int().expand(B, H, S),
    )
    value = got.out.square().sum() + got.lse.masked_fill(got.lse == float("-inf"), 0).sin().sum()
    for order in range(orders):
        grads = torch.autograd.grad(value, leaves, create_graph=order + 1 < orders)
        value = torch.stack([x.square().sum() for x in grads]).sum()
    return [x.detach() for x in grads]


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("orders", [2] if INTERPRETED else [2, 3])
def test_gradients_of_gradients(orders, backend):
    exact = penalty("reference", torch.float64, orders)
    for mine, wanted in zip(penalty(backend, torch.float32, orders), exact):
        assert bool(wanted.any())
        assert float((mine - wanted).norm()) <= 1e-4 * float(wanted.norm())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_second_gradients_are_those_of_finite_differences(backend):
    leaves = [normal(1, 1, n, 2, 2, seed=n, dtype=torch.float64).requires_grad_() for n in (1, 2, 3)]
    leaves[1] = normal(1, 1, 3, 2, 2, seed=5, dtype=torch.float64).requires_grad_()
    index = torch.tensor([[[[2, 0]]]])
    assert torch.autograd.gradgradcheck(lambda *x: block_sparse_attention(*x, index, backend=backend)[:2], leaves)


@pytest.mark.parametrize("backend", ATTENTION)
def test_the_backward_call_can_be_differentiated(backend):
    results = []
    for name in (backend, "reference"):
        leaves = [x.requires_grad_() for x in inputs()]
        upstream = normal(*leaves[0].shape, seed=9).requires_grad_()
        got = block_sparse_attention(*leaves, lists(1, 3), backend=name)
        grads = block_sparse_attention_backward(
            upstream, *leaves, lists(1, 3), out=got.out.detach(), lse=got.lse.detach(), backend=name
        )
        results.append(torch.autograd.grad(torch.stack([x.square().sum() for x in grads]).sum(), [*leaves, upstream]))
    same(list(results[0]), list(results[1]))


@pytest.mark.parametrize("backend", SELECTION)
def test_second_gradients_of_pooling(backend):
    x, weights = normal(1, 2, 3, 4, 8).requires_grad_(), normal(2, 4, seed=1).requires_grad_()
    results = []
    for name in (backend, "reference"):
        pooled = selection.pool_blocks(x, torch.tensor([4, 2, 0]), weights, backend=name)
        grads = torch.autograd.grad(pooled.square().sum(), (x, weights), create_graph=True)
        results.append(torch.autograd.grad(grads[0].square().sum() + grads[1].square().sum(), (x, weights)))
    same(list(results[0]), list(results[1]))


# --- selection ------------------------------------------------------------------------------------------------------


def blocks(n: int, seed: int = 0) -> Tensor:
    return normal(1, 2, n, D, seed=seed)


def slots(*entries: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(entries, dtype=dtype).expand(1, 2, -1)


@pytest.mark.parametrize("backend", SELECTION)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_slots": slots(1, 2, 3)}, r"window_slots is \[1, 2, 3\], expected \[1, 2, 5\], a slot each"),
        ({"window_slots": slots(1, 2, 3, 4, 5, 6)}, r"window_slots is \[1, 2, 6\], expected \[1, 2, 5\]"),
        ({"window_slots": slots(1, 2, 3, 4, 5)[:, :1]}, r"window_slots is \[1, 1, 5\], expected \[1, 2, 5\]"),
        ({"window_slots": slots(1, 0, 1, 1, 0, dtype=torch.bool)}, "window_slots is .*bool, expected whole numbers"),
        ({"window_slots": slots(1, 2, 3, 4, 5, dtype=torch.float32)}, "window_slots is .*float32, expected whole"),
        ({"window_slots": slots(1, 2, 3, 4, 2**31)}, "window_slots holds 2147483648, expected 0 to 2147483647"),
        ({"window_slots": slots(1, 2, 3, -1, 5)}, "window_slots holds -1, expected 0 to"),
        ({"persistent_slots": slots(7, -1)}, "persistent_slots holds -1, expected 0 to"),
        ({"persistent_slots": slots(7)[0]}, r"persistent_slots is \[2, 1\], expected \[1, 2, P\]"),
        ({"persistent_slots": slots(7, dtype=torch.float64)}, "persistent_slots is .*float64, expected whole"),
        ({"window_slots": [[[1, 2, 3, 4, 5]]]}, "window_slots is a list, expected a tensor"),
        ({"own": [0, 1]}, "own is a list, expected a tensor"),
        ({"query_blocks": None}, "query_blocks is a NoneType, expected a tensor"),
        ({"top_k": 2.5}, "top_k is 2.5, expected a whole number"),
        ({"top_k": 0}, "top_k is 0, expected a whole number, at least 1"),
        ({"own": torch.tensor([0.0, 1.0])}, "own is .*float32, expected whole numbers"),
        ({"own": torch.tensor([0, 1, 2])}, r"own is \[3\], expected one window position"),
        ({"key_blocks": normal(1, 2, 5, D + 1)}, r"key_blocks is \[1, 2, 5, 9\]"),
        ({"key_blocks": normal(1, 1, 5, D)}, r"B and H of query_blocks \[1, 2, 2, 8\] are not those"),
    ],
)
def test_lists_are_not_made_of_what_does_not_fit(change, message, backend):
    good = {
        "query_blocks": blocks(2),
        "key_blocks": blocks(5, 1),
        "persistent_slots": slots(9, 8),
        "top_k": 2,
        "window_slots": slots(1, 2, 3, 4, 5),
    }
    selection.choose_lists(**good, backend=backend)
    with pytest.raises(SparseForcingError, match=f"choose_lists: {message}"):
        selection.choose_lists(**good | change, backend=backend)


@pytest.mark.parametrize("backend", SELECTION)
def test_pooling_and_updates_take_tensors_and_whole_numbers(backend):
    with pytest.raises(SparseForcingError, match="pool_blocks: sizes is a list, expected a tensor"):
        selection.pool_blocks(normal(1, 2, 3, 4, D), [4, 4, 1], backend=backend)
    for capacity in (2.5, None, "2", -1):
        with pytest.raises(SparseForcingError, match=f"update_persistent: capacity {capacity}"):
            selection.update_persistent(slots(1, 2, 3), normal(1, 2, 3), capacity, backend=backend)


def test_positions_outside_the_window_are_named():
    with pytest.raises(
        SparseForcingError, match="selected holds 3, expected 0 to 2: positions in a window of 3 blocks"
    ):
        selection.build_block_index(slots(9), slots(1, 2, 3), torch.tensor([0, 3]).expand(1, 2, 1, 2))
    with pytest.raises(SparseForcingError, match="pool_blocks: sizes holds 5, expected 0 to 4"):
        selection.pool_blocks(normal(1, 2, 3, 4, D), torch.tensor([4, 5, 0]))


@pytest.mark.parametrize("backend", SELECTION)
@pytest.mark.parametrize("scale", [0.0, -2.0, NAN])
def test_scores_need_a_scale(scale, backend):
    with pytest.raises(SparseForcingError, match="choose_blocks: scale is"):
        selection.choose_blocks(blocks(2), blocks(5), top_k=2, scale=scale, backend=backend)


@pytest.mark.parametrize("backend", SELECTION)
def test_a_score_that_is_nan_counts_as_the_highest(backend):
    scores = torch.tensor([[[[1.0, NAN, 3.0, -NAN, 2.0], [NAN, 1.0, float("inf"), 0.0, 0.0]]]])
    scores[0, 0, 0, 3] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # NaN with its sign set
    for top_k in (1, 2, 3):
        found = selection.select_blocks(scores, top_k, backend=backend)
        assert torch.equal(found, selection.select_blocks(scores, top_k, backend="reference"))
        assert torch.equal(found[..., 0, :], torch.tensor([[[1], [1, 3], [1, 2, 3]][top_k - 1]]).int()[None])
    held = selection.update_persistent(slots(4, 5, 6, 7, 8)[:, :1], scores[:, :, 0], 3, backend=backend)
    assert [x.tolist() for x in held] == [[[[5, 6, 7]]], [[[4, 8]]]]


@pytest.mark.parametrize("backend", SELECTION)
def test_blocks_of_two_types_are_scored_as_they_are(backend):
    query, key = blocks(3).bfloat16(), blocks(7, 1)
    wanted = selection.choose_blocks(query, key, top_k=3, backend="reference")
    assert torch.equal(selection.choose_blocks(query, key, top_k=3, backend=backend), wanted)


@pytest.mark.parametrize("backend", SELECTION)
def test_strided_slots_and_blocks(backend):
    query, key = (blocks(n, n).transpose(1, 2).contiguous().transpose(1, 2) for n in (3, 7))
    window = torch.stack([slots(*range(10, 17)), slots(*range(7))], -1)[..., 0]
    wanted = selection.choose_lists(
        query.contiguous(), key.contiguous(), slots(3), window.contiguous(), top_k=2, backend="reference"
    )
    assert torch.equal(selection.choose_lists(query, key, slots(3), window, top_k=2, backend=backend), wanted)
