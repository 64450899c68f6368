"""block_sparse_attention: the reference and the CPU path against a float64 loop, output, lse, mass and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_forcing.kernels.block_sparse_attention import block_sparse_attention
from sparse_forcing.kernels.block_sparse_attention.cpu import arithmetic as cpu_arithmetic
from sparse_forcing.kernels.block_sparse_attention.cpu import backend as cpu
from sparse_forcing.kernels.block_sparse_attention.cpu import backward as cpu_backward
from sparse_forcing.kernels.block_sparse_attention.cpu import forward as cpu_forward
from sparse_forcing.kernels.block_sparse_attention.cpu import fused as cpu_fused
from sparse_forcing.kernels.block_sparse_attention.cpu import pieces as cpu_pieces
from sparse_forcing.kernels.block_sparse_attention.cpu import small as cpu_small
from tests.kernels.attention_problems import TOLERANCE, Problem, by_hand, error, output_gradients, problem

BACKENDS = ("reference", "cpu")
NAN = float("nan")


@pytest.fixture(params=["all at once", "one piece", "many pieces"])
def pieces(request, monkeypatch):
    """The CPU path as it is, without the one for small problems, and cut as finely as it goes, with wide pieces over
    the persistent entries."""
    if request.param == "one piece":
        monkeypatch.setattr(cpu_small, "GATHERED_BYTES", 0)
    cut_fine(monkeypatch.setattr) if request.param == "many pieces" else None


def cut_fine(setattr_):
    setattr_(cpu_small, "GATHERED_BYTES", 0)
    setattr_(cpu_arithmetic, "PIECE_BYTES", 1)
    setattr_(cpu_backward, "GROUP_BYTES", 1)
    setattr_(cpu_pieces, "WIDE_SCORES", 0)
    setattr_(cpu_pieces, "WIDE_ROWS", 12)
    setattr_(cpu_fused, "PIECE_BYTES", 1)
    setattr_(cpu_fused, "WHOLE_ROWS", 12)


def check(p: Problem, backend: str, tolerance: float | None = None) -> None:
    """Output, lse, mass and every gradient of p against the float64 loop, and output and lse once more where nothing
    else is wanted; p's own tensors may be of any type."""
    tolerance = TOLERANCE[p.query.dtype] if tolerance is None else tolerance
    exact_inputs = [x.detach().double().requires_grad_() for x in p.inputs]
    wanted = by_hand(p.with_inputs(*exact_inputs))
    grads = output_gradients(p, wanted[1])
    wanted_grads = [torch.zeros_like(x) for x in exact_inputs]
    if wanted[0].requires_grad:  # some row sees some key
        wanted_grads = torch.autograd.grad(wanted[:2], exact_inputs, grads)

    inputs = [x.detach().requires_grad_() for x in p.inputs]
    got = block_sparse_attention(*inputs, p.block_index, **p.options, return_mass=True, backend=backend)
    assert got.out.dtype == p.query.dtype
    for name, mine, exact in zip(got._fields, got, wanted):
        assert error(mine, exact) < tolerance, name
    got_grads = torch.autograd.grad(got[:2], inputs, (grads[0].to(got.out.dtype), grads[1].to(got.lse.dtype)))
    for name, mine, exact in zip(("query", "key", "value"), got_grads, wanted_grads):
        assert error(mine, exact) < 2 * tolerance, f"gradient of {name}"
        assert mine.dtype == p.query.dtype

    alone = block_sparse_attention(*p.inputs, p.block_index, **p.options, backend=backend)
    assert alone.out.dtype == p.query.dtype
    for name, mine, exact in zip(got._fields, alone[:2], wanted):
        assert error(mine, exact) < tolerance, f"{name} alone"


SHAPES = {
    "odd": problem(),
    "one block": problem(1, 1, 1, 3, 1, 4, 5, 1),
    "one row, one key": problem(1, 2, 3, 1, 4, 1, 2, 2),
    "full lists": problem(2, 2, 3, 4, 5, 6, 7, 5),
    "no list entries": problem(M=0),
    "short and empty lists": problem(short_lists=True, seed=3),
    "ragged": problem(ragged=True),
    "ragged, short lists": problem(ragged=True, short_lists=True, seed=1),
    "persistent": problem(2, 2, 5, 8, 9, 8, 16, 6, persistent=3),
    "persistent only": problem(1, 2, 5, 8, 9, 8, 16, 4, persistent=4),
    "persistent, ragged": problem(2, 2, 5, 8, 9, 8, 16, 6, persistent=2, ragged=True, short_lists=True),
    "64-token blocks": problem(1, 2, 3, 64, 6, 64, 64, 4, persistent=1),
    "60-token blocks": problem(1, 1, 2, 60, 4, 60, 32, 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_float64_equals_the_loop(name, backend, pieces):
    check(SHAPES[name], backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["odd", "ragged, short lists", "persistent, ragged", "64-token blocks"])
def test_other_types(name, dtype, pieces):
    p = SHAPES[name]
    check(p.with_inputs(*(x.to(dtype) for x in p.inputs)), "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_shape_and_list(backend, data):
    sizes = [
        data.draw(st.integers(1, top), label=name)
        for name, top in zip("B H Nq Tq S T D".split(), (2, 3, 5, 9, 6, 9, 20))
    ]
    entries = data.draw(st.integers(0, sizes[4]), label="M")
    p = problem(
        *sizes,
        entries,
        persistent=data.draw(st.integers(0, entries), label="persistent"),
        ragged=data.draw(st.booleans(), label="ragged"),
        short_lists=data.draw(st.booleans(), label="short"),
        seed=data.draw(st.integers(0, 99), label="seed"),
    )
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans(), label="many pieces"):
            cut_fine(patch.setattr)
        check(p, backend, tolerance=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_density_one_is_dense_attention(backend, pieces):
    p = problem(2, 2, 6, 16, 6, 16, 32, 6, dtype=torch.float32)
    got = block_sparse_attention(*p.inputs, p.block_index, backend=backend).out.flatten(2, 3)
    dense = F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in p.inputs))
    assert error(got, dense) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 3e-4), (torch.bfloat16, 8e-3)]
)
def test_large_logits(backend, dtype, tolerance, pieces):
    """Scores of several hundred: float32 scores have an absolute error near 1e-5, which the exponential passes on."""
    check(problem(1, 2, 3, 8, 5, 8, 32, 4, persistent=2, scale=30.0, dtype=dtype), backend, tolerance)


@pytest.mark.parametrize("persistent", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height", [-900.0, -95.0, -70.0, 50.0, 70.0, 900.0])
@pytest.mark.parametrize(
    "where", [slice(0, 1), slice(1, 2), slice(3, 4), slice(0, 4)], ids=["first", "second", "last", "all"]
)
def test_scores_far_from_zero_in_any_piece(where, height, dtype, persistent, pieces):
    """Scores near `height` in some listed blocks: the running maximum must set in when, and only when, it is needed."""
    p = problem(1, 2, 4, 8, 6, 8, 16, 4, persistent=persistent, scale=1.0, dtype=torch.float64, seed=3)
    query, key_pool = p.query.clone(), 0.2 * p.key_pool
    query[..., 0] = 1
    for b, h, i in torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(4)).tolist():
        key_pool[b, h, p.block_index[b, h, i, where].long(), :, 0] = height
    p = p.with_inputs(*(x.to(dtype) for x in (query, key_pool, p.value_pool)))
    check(p, "cpu", {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 8e-3}[dtype])


def test_the_running_maximum_sets_in_only_when_sums_leave_the_safe_range(monkeypatch):
    monkeypatch.setattr(cpu_small, "GATHERED_BYTES", 0)
    raised = []
    raise_peak = cpu_forward._raise_peak
    monkeypatch.setattr(cpu_forward, "_raise_peak", lambda s, *rest: (raised.append(s.shape), raise_peak(s, *rest))[1])
    p = problem(1, 2, 4, 8, 6, 8, 16, 4, dtype=torch.float32)
    block_sparse_attention(*p.inputs, p.block_index, backend="cpu")
    assert not raised
    for scale in (1e-3, 0.25):  # scores of all signs: their largest is above zero, so only the upper end is reached
        block_sparse_attention(*p.inputs, p.block_index, scale=scale, backend="cpu")
        assert not raised
    block_sparse_attention(*p.inputs, p.block_index, scale=30.0, backend="cpu")
    assert raised


@pytest.fixture
def fused_calls(monkeypatch):
    """The path of CPUs with matrix units, and a list that grows with every call that takes it."""
    calls, forward = [], cpu_fused.forward
    monkeypatch.setattr(cpu, "has_matrix_units", lambda: True)
    monkeypatch.setattr(cpu_fused, "forward", lambda *inputs: (calls.append(len(inputs)), forward(*inputs))[1])
    return calls


FUSED = [name for name, p in SHAPES.items() if p.key_sizes is None and p.block_index.numel() and "short" not in name]


@pytest.mark.parametrize("scale", [None, 30.0])
@pytest.mark.parametrize("name", FUSED)
def test_the_fused_forward_equals_the_loop(name, scale, fused_calls, pieces):
    p = replace(SHAPES[name], scale=scale)
    p = p.with_inputs(*(x.bfloat16() for x in p.inputs))
    wanted, got = by_hand(p), block_sparse_attention(*p.inputs, p.block_index, **p.options, backend="cpu")
    assert fused_calls
    assert got.out.dtype == torch.bfloat16
    assert got.lse.dtype == torch.float32
    assert error(got.out, wanted[0]) < TOLERANCE[torch.bfloat16]
    assert error(got.lse, wanted[1]) < 1e-5  # its exponential is an approximation


def test_the_fused_forward_takes_padded_queries_and_unlisted_blocks_full_of_nan(fused_calls, pieces):
    p = problem(2, 2, 5, 8, 20, 8, 16, 6, persistent=3)
    p = replace(p, query_sizes=torch.tensor([8, 0, 3, 8, 5]).int())
    wanted = by_hand(p.with_inputs(*(x.bfloat16() for x in p.inputs)))
    query, key_pool, value_pool = (x.bfloat16() for x in p.inputs)
    query = query.masked_fill(p.padded_rows.unsqueeze(-1), NAN)
    listed = torch.zeros(key_pool.shape[:3], dtype=torch.bool).scatter(-1, p.block_index.flatten(2).long(), True)
    assert not listed.all()
    key_pool, value_pool = (x.masked_fill(~listed[..., None, None], NAN) for x in (key_pool, value_pool))
    got = block_sparse_attention(query, key_pool, value_pool, p.block_index, **p.options, backend="cpu")
    assert fused_calls
    assert error(got.out, wanted[0]) < TOLERANCE[torch.bfloat16]
    assert torch.equal(got.lse == float("-inf"), p.padded_rows.expand_as(got.lse))
    assert not got.out[p.padded_rows.expand_as(got.lse)].any()
    assert error(got.lse, wanted[1]) < 1e-5  # its exponential is an approximation


@pytest.mark.parametrize("what", ["mass", "gradients", "padded keys", "short lists", "float32"])
def test_what_the_fused_forward_cannot_give_comes_from_the_pieces(what, fused_calls):
    p = SHAPES[{"padded keys": "ragged", "short lists": "short and empty lists"}.get(what, "odd")]
    p = p.with_inputs(*(x.to(torch.float32 if what == "float32" else torch.bfloat16) for x in p.inputs))
    inputs = [x.requires_grad_(what == "gradients") for x in p.inputs]
    got = block_sparse_attention(*inputs, p.block_index, **p.options, return_mass=what == "mass", backend="cpu")
    assert not fused_calls
    assert error(got.out.detach(), by_hand(p)[0].detach()) < TOLERANCE[p.query.dtype]


def test_without_matrix_units_nothing_is_fused(fused_calls, monkeypatch):
    monkeypatch.setattr(cpu, "has_matrix_units", lambda: False)
    p = SHAPES["odd"]
    block_sparse_attention(*(x.bfloat16() for x in p.inputs), p.block_index, backend="cpu")
    assert not fused_calls


@pytest.fixture
def small_sums(monkeypatch):
    """What the path for small problems summed, call by call; None where that would not be exact."""
    found, sums = [], cpu_small.sums
    monkeypatch.setattr(cpu_small, "sums", lambda *inputs: (found.append(sums(*inputs)), found[-1])[1])
    return found


@pytest.mark.parametrize("what", ["distinct", "listed twice", "NaN not listed", "far from zero", "NaN listed"])
def test_small_lists_are_gathered_at_once_where_that_is_exact(what, small_sums):
    p = problem(2, 2, 4, 8, 6, 8, 16, 4, dtype=torch.float32, persistent=2)
    if what == "listed twice":
        p.block_index[..., 3] = p.block_index[..., 2]
    if what == "far from zero":
        p = replace(p, scale=30.0)
    query, *pools = (x.clone() for x in p.inputs)
    if what.startswith("NaN"):
        p.block_index[...] = torch.arange(4)
    wanted = by_hand(p)
    if what.startswith("NaN"):
        for pool in pools:
            pool[:, :, 3 if what == "NaN listed" else 5] = NAN
    got = block_sparse_attention(query, *pools, p.block_index, scale=p.scale, num_persistent=2, backend="cpu")
    if what == "NaN listed":
        assert got.out.isnan().all()
        assert got.lse.isnan().all()
    else:
        tolerance = 1e-4 if what == "far from zero" else TOLERANCE[torch.float32]
        assert error(got.out, wanted[0]) < tolerance
        assert error(got.lse, wanted[1]) < tolerance
    assert [each is not None for each in small_sums] == [what not in ("far from zero", "NaN listed")]


def test_values_of_any_size_survive_large_scores():
    p = problem(1, 2, 4, 8, 6, 8, 16, 4, scale=6.0, dtype=torch.float32)
    wanted = by_hand(p)[0]
    got = block_sparse_attention(p.query, p.key_pool, 1e15 * p.value_pool, p.block_index, scale=6.0, backend="cpu").out
    assert error(got / 1e15, wanted) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_poisoned_padding_changes_nothing(backend, pieces):
    p = problem(2, 2, 5, 8, 9, 8, 16, 6, persistent=2, ragged=True, short_lists=True, seed=5)
    rows, keys = p.padded_rows.unsqueeze(-1), p.padded_keys.unsqueeze(-1).clone()
    unlisted = torch.ones(p.key_pool.shape[:3], dtype=torch.bool)
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        unlisted[b, h, p.block_index[b, h][p.block_index[b, h] >= 0].unique().long()] = False
    keys |= unlisted[..., None, None]
    clean = p.with_inputs(p.query.masked_fill(rows, 0), *(x.masked_fill(keys, 0) for x in p.inputs[1:]))
    dirty = p.with_inputs(p.query.masked_fill(rows, NAN), *(x.masked_fill(keys, NAN) for x in p.inputs[1:]))
    results = []
    for case, filler in ((clean, 0.0), (dirty, NAN)):
        inputs = [x.clone().requires_grad_() for x in case.inputs]
        got = block_sparse_attention(*inputs, p.block_index, **p.options, return_mass=True, backend=backend)
        grad_out = torch.ones_like(got.out).masked_fill(rows, filler)
        grad_lse = torch.ones_like(got.lse).masked_fill(got.lse == float("-inf"), filler)
        results.append([*got, *torch.autograd.grad(got[:2], inputs, (grad_out, grad_lse))])
    for mine, exact in zip(*reversed(results)):
        assert torch.equal(mine, exact)
    out, lse, _, *grads = results[1]
    assert not out.masked_select(rows).any()
    assert lse.masked_select(p.padded_rows).eq(float("-inf")).all()
    for grad, padding in zip(grads, (rows, keys, keys)):
        assert not grad.masked_select(padding).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, pieces):
    p = problem(2, 3, 4, 8, 7, 8, 16, 4, persistent=1)
    wanted = block_sparse_attention(*p.inputs, p.block_index, backend=backend).out
    token_major = [x.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4) for x in p.inputs]
    spread = [torch.stack((x, x.new_full((), NAN).expand_as(x)), -1)[..., 0] for x in p.inputs]
    longer = [F.pad(x, (0, 0, 0, 0, 2, 3), value=NAN)[:, :, 2 : 2 + x.shape[2]] for x in p.inputs]
    index = F.pad(p.block_index, (1, 1))[..., 1:-1]
    for query, key_pool, value_pool in (token_major, spread, longer):
        assert not query.is_contiguous()
        got = block_sparse_attention(query, key_pool, value_pool, index, backend=backend).out
        assert error(got, wanted) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_pools_shared_by_heads_or_batch(backend):
    p = problem(2, 3, 4, 8, 7, 8, 16, 4)
    for shared in (p.key_pool[:, :1], p.key_pool[:1], p.key_pool[:1, :1]):
        key_pool = shared.clone().requires_grad_()
        whole = shared.expand_as(p.key_pool).contiguous().requires_grad_()
        got = block_sparse_attention(p.query, key_pool, p.value_pool, p.block_index, backend=backend).out
        wanted = block_sparse_attention(p.query, whole, p.value_pool, p.block_index, backend=backend).out
        assert error(got, wanted) < 1e-14
        got.sum().backward()
        wanted.sum().backward()
        assert key_pool.grad is not None
        assert whole.grad is not None
        assert error(key_pool.grad, whole.grad.sum_to_size(shared.shape)) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_mass_sums_to_the_rows_that_see_something(backend, pieces):
    p = problem(2, 2, 5, 8, 9, 8, 16, 6, persistent=2, ragged=True, short_lists=True, seed=2)
    got = block_sparse_attention(*p.inputs, p.block_index, **p.options, return_mass=True, backend=backend)
    assert got.mass is not None
    assert not got.mass.requires_grad
    assert not got.mass[p.block_index < 0].any()
    assert torch.allclose(got.mass.sum(-1), got.lse.isfinite().sum(-1).double())
    assert block_sparse_attention(*p.inputs, p.block_index, **p.options, backend=backend).mass is None


def test_num_persistent_is_only_a_hint(pieces):
    p = problem(2, 2, 5, 8, 9, 8, 16, 6, persistent=4)
    outs = [block_sparse_attention(*p.inputs, p.block_index, num_persistent=n, backend="cpu") for n in range(5)]
    for got in outs[1:]:
        assert error(got.out, outs[0].out) < 1e-14
        assert error(got.lse, outs[0].lse) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeatable(dtype, pieces):
    p = problem(2, 2, 6, 16, 12, 16, 32, 8, persistent=3, dtype=dtype)
    runs = []
    for _ in range(2):
        inputs = [x.clone().requires_grad_() for x in p.inputs]
        got = block_sparse_attention(*inputs, p.block_index, num_persistent=3, return_mass=True, backend="cpu")
        runs.append([*got, *torch.autograd.grad(got.out.float().sum() + got.lse.sum(), inputs)])
    for first, second in zip(*runs):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_lse_or_out_alone(backend):
    p = problem()
    for pick in (0, 1):
        exact_inputs = [x.clone().requires_grad_() for x in p.inputs]
        inputs = [x.clone().requires_grad_() for x in p.inputs]
        by_hand(p.with_inputs(*exact_inputs))[pick].square().sum().backward()
        block_sparse_attention(*inputs, p.block_index, backend=backend)[pick].square().sum().backward()
        for mine, exact in zip(inputs, exact_inputs):
            assert exact.grad is not None or pick == 1  # lse does not depend on the values
            wanted = torch.zeros_like(mine) if exact.grad is None else exact.grad
            assert mine.grad is None or error(mine.grad, wanted) < 1e-12


def test_query_alone_needs_gradients():
    p = problem()
    query = p.query.clone().requires_grad_()
    block_sparse_attention(query, *p.inputs[1:], p.block_index, backend="cpu").out.sum().backward()
    assert query.grad is not None
    assert replace(p, query=query).key_pool.grad is None


def test_scratch_memory_serves_inference_and_training_alike():
    p = problem(1, 2, 3, 4, 5, 4, 8, 3, dtype=torch.float32, seed=7)
    wider = problem(2, 3, 9, 16, 12, 16, 32, 8, dtype=torch.float32)
    with torch.inference_mode():
        block_sparse_attention(*wider.inputs, wider.block_index, backend="cpu")
    check(wider, "cpu")
    check(p, "cpu")
