"""Triton kernels under the interpreter, against float64. Run by test_triton_interpreter.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from tests.kernels import interpreter_bf16

interpreter_bf16.install()

from sparse_forcing.errors import SparseForcingError  # noqa: E402
from sparse_forcing.kernels import triton_runtime  # noqa: E402
from sparse_forcing.kernels.block_selection import reference as selection_reference  # noqa: E402
from sparse_forcing.kernels.block_selection.gpu import backend as selection  # noqa: E402
from sparse_forcing.kernels.block_sparse_attention import block_sparse_attention  # noqa: E402
from sparse_forcing.kernels.block_sparse_attention.gpu.launch import plan_forward  # noqa: E402
from sparse_forcing.kernels.block_sparse_attention.gpu.lists import inverse_lists  # noqa: E402
from sparse_forcing.kernels.token_rows import reference as rows_reference  # noqa: E402
from sparse_forcing.kernels.token_rows.gpu import backend as rows  # noqa: E402
from tests.kernels.triton_jobs.common import (  # noqa: E402
    TOLERANCE,
    answer,
    check,
    error,
    float32_scores,
    guarded,
    measured,
    problem,
    strided,
)

torch.set_num_threads(1)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("p", "variant"),
    [
        pytest.param(problem(2, 2, 3, 15, 5, 13, 24, ragged=True), "pointer", id="float32-ragged"),
        pytest.param(problem(dtype=F16), "pointer", id="float16"),
        pytest.param(problem(H=1, Tq=60, T=60, D=64, dtype=BF16), "pointer", id="bfloat16-60-tokens"),
        pytest.param(problem(H=1, Tq=64, T=64, D=64, dtype=BF16), "tma", id="tma-64-tokens"),
        pytest.param(problem(H=1, Tq=60, T=60, D=80, dtype=F16), "tma", id="tma-60-tokens-head-80"),
    ],
)
def test_forward_mass_and_gradients(p, variant):
    check(p, measured(p, variant, variant, mass=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 5, 1, 3, 4, 1), (1, 3, 2, 32, 4, 7, 8, 4), (2, 1, 4, 5, 6, 48, 100, 5)])
def test_pointer_kernels_at_odd_shapes(shape, dtype):
    p = problem(*shape, dtype=dtype, ragged=True, seed=3)
    check(p, measured(p, "pointer", "pointer", mass=True))


@pytest.mark.slow
def test_largest_head_dim():
    p = problem(1, 1, 2, 16, 3, 16, 256, 2, lengths=[2, 1])
    check(p, measured(p, "pointer", "pointer"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "p",
    [
        pytest.param(problem(1, 1, 2, 40, 4, 37, 24, 3, ragged=True, seed=2), id="float32"),
        pytest.param(problem(1, 1, 2, 70, 3, 90, 24, 2, dtype=F16, ragged=True, seed=2), id="float16-128-tokens"),
        pytest.param(problem(1, 1, 2, 60, 3, 60, 136, 2, dtype=BF16, ragged=True, seed=2), id="bfloat16-head-dim-136"),
    ],
)
def test_blocks_larger_than_a_tile(p):
    for arch in ("sm_80", "sm_90", "gfx942"):
        check(p, measured(p, "pointer", "pointer", mass=True, arch=arch))


@pytest.mark.slow
@pytest.mark.parametrize("ragged", ["query_sizes", "key_sizes"])
def test_hopper_plan_where_one_side_is_ragged(ragged):
    p = problem(1, 2, 3, 60, 4, 60, 64, 3, dtype=BF16, ragged=True, seed=4)
    p = p._replace(**{"query_sizes": None, "key_sizes": None, ragged: getattr(p, ragged)})
    check(p, measured(p, None, "auto", arch="sm_90"))


@pytest.mark.parametrize(("slots", "lengths"), [(5, [0, 0, 0]), (1, [1, 0, 1]), (3, [3, 3, 3])])
def test_empty_single_and_full_lists(slots, lengths):
    p = problem(S=slots, M=max(slots, 1), lengths=lengths)
    check(p, measured(p, "pointer", "pointer", mass=True))


def test_density_one_equals_dense_attention():
    p = problem(1, 2, 3, 16, 3, 16, 32, 3, lengths=[3, 3, 3])
    found = measured(p, "pointer", None)["out"]
    flat = [x.double().flatten(2, 3) for x in (p.query, p.key_pool, p.value_pool)]
    dense = torch.nn.functional.scaled_dot_product_attention(*flat)
    assert error(found.flatten(2, 3), dense) < 1e-6


# Large logits: scale at head dim 32 that gives scores a standard deviation of 30 and of 170 (up to 800). The gradient
# goes through out alone: then that of a score, p (dp - <dout, out>), is a difference of nearly equal terms.
LARGE = [30 / 32**0.5, 30.0]


@pytest.mark.slow
@pytest.mark.parametrize("scale", LARGE)
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_large_logits_in_16_bits(dtype, scale):
    p = problem(1, 2, 3, 16, 5, 16, 32, 3, dtype=dtype, scale=scale, lengths=[3, 2, 3])
    wanted = answer(p, through_lse=False)
    check(p, measured(p, "pointer", "pointer", through_lse=False), wanted)
    rounded = measured(p, "pointer", "pointer", through_lse=False, keep_rest=False)
    assert error(rounded["dq"], wanted["dq"]) > TOLERANCE[dtype]  # what <dout, out> of the rounded out would cost


@pytest.mark.slow
def test_large_logits_in_16_bits_on_hopper():
    p = problem(1, 1, 2, 64, 3, 64, 64, 2, dtype=BF16, scale=30 / 8, lengths=[2, 2])
    check(p, measured(p, "tma", "tma", through_lse=False), answer(p, through_lse=False))


@pytest.mark.slow
@pytest.mark.parametrize("scale", LARGE)
def test_large_logits_in_float32(scale):
    """1e-6, or as good as float32 scores allow: 1.5 times the error of float64 arithmetic on such scores."""
    p = problem(1, 4, 3, 16, 5, 16, 32, 3, scale=scale, lengths=[3, 3, 3])
    wanted = answer(p, through_lse=False)
    found, best = measured(p, "pointer", "pointer", through_lse=False), float32_scores(p)
    for name, tensor in found.items():
        allowed = max(1e-6, 1.5 * error(best[name], wanted[name]))
        assert error(tensor, wanted[name]) <= allowed, (name, error(tensor, wanted[name]), allowed)
    assert max(error(found[name], wanted[name]) for name in ("out", "lse", "dv")) <= 1e-6
    assert max(error(best[name], wanted[name]) for name in ("dq", "dk")) > 1e-6  # or the allowance is not needed


def test_padding_may_hold_nan():
    p = problem(Tq=12, T=12, ragged=True, seed=1)
    wanted = answer(p)
    rows, tokens = torch.arange(12) >= p.query_sizes[:, None], torch.arange(12) >= p.key_sizes[..., None]
    p.query[:, :, rows] = float("nan")
    p.key_pool[tokens] = float("nan")
    p.value_pool[tokens] = float("nan")
    check(p, measured(p, "pointer", "pointer", mass=True), wanted)


def test_strided_inputs_between_nan():
    p = problem(Tq=13, T=11, D=24, seed=2)
    check(p, measured(strided(p), "pointer", "pointer", mass=True), answer(p))


@pytest.mark.parametrize("variant", ["pointer", "tma"])
def test_strides_beyond_32_bits(variant):
    tokens = 64 if variant == "tma" else 16
    p = problem(1, 1, 2, tokens, 3, tokens, 16, 2, dtype=F16, lengths=[2, 2])
    far = 2**30 + 64  # third slot at 2^31: untouched pages of the buffer cost no memory
    try:
        buffer = torch.empty(2 * far + tokens * 16, dtype=F16)
    except RuntimeError:
        pytest.skip("the machine does not reserve 4 GiB of address space")
    pool = buffer.as_strided((1, 1, 3, tokens, 16), (0, 0, far, 16, 1))
    pool.copy_(p.key_pool)
    if variant == "tma":  # full blocks are read as one matrix; a far head takes the same arithmetic
        p = problem(1, 2, 2, tokens, 2, tokens, 16, 2, dtype=F16, lengths=[2, 2])
        pool = buffer.as_strided((1, 2, 2, tokens, 16), (0, 2 * far - 2048, tokens * 16, 16, 1))
        pool.copy_(p.key_pool)
    check(p, measured(p._replace(key_pool=pool), variant, variant))


def test_two_runs_agree_bitwise():
    p = problem(S=3, M=3, dtype=BF16)
    first, second = (measured(p, "pointer", "pointer", mass=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_lists(data):
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    Nq, S = number(1, 4), number(1, 6)
    M = number(1, S)
    lengths = [number(0, M) for _ in range(Nq)]
    p = problem(
        number(1, 2),
        number(1, 2),
        Nq,
        number(1, 20),
        S,
        number(1, 20),
        number(1, 40),
        M,
        ragged=data.draw(st.booleans()),
        seed=number(0, 99),
        lengths=lengths,
    )
    check(p, measured(p, "pointer", "pointer", mass=True))


def test_heads_on_two_axes_of_the_grid(monkeypatch):
    p = problem(2, 3, 2, 5, 3, 5, 8, 2, ragged=True)
    monkeypatch.setattr(triton_runtime, "AXIS_ENDS", 3)
    triton_runtime._head_axes.cache_clear()
    check(p, measured(p, "pointer", "pointer", mass=True))
    q, k = _scores(1, 2, 3, 3, 8), _scores(2, 2, 3, 5, 8)
    with guarded():
        found = selection.choose_blocks(q, k, 2, None, 0.25)
    triton_runtime._head_axes.cache_clear()
    wanted = selection_reference.block_scores(q, k, 0.25)
    assert torch.equal(found, selection_reference.select_blocks(wanted, 2, None))


def test_public_call_differentiates_through_out_and_lse():
    p = problem(2, 2, 3, 16, 5, 16, 32, 3, ragged=True)
    leaves = [x.clone().requires_grad_() for x in (p.query, p.key_pool, p.value_pool)]
    result = block_sparse_attention(
        *leaves, p.block_index, query_sizes=p.query_sizes, key_sizes=p.key_sizes, return_mass=True, backend="triton"
    )
    wanted = answer(p)
    grad_lse = torch.Generator().manual_seed(99)
    grad_out = torch.randn(p.query.shape, generator=grad_lse)
    grad_rows = torch.randn(p.query.shape[:-1], generator=grad_lse).masked_fill(result.lse == float("-inf"), 0)
    grads = torch.autograd.grad((result.out, result.lse), leaves, (grad_out, grad_rows))
    check(p, dict(zip(("out", "lse", "mass", "dq", "dk", "dv"), (*result, *grads))), wanted)


def test_empty_list_dimension_and_impossible_sizes():
    p = problem(M=1)
    result = block_sparse_attention(p.query, p.key_pool, p.value_pool, p.block_index[..., :0], backend="triton")
    assert not result.out.any()
    assert bool((result.lse == float("-inf")).all())
    with pytest.raises(SparseForcingError, match="head dim"):
        plan_forward(problem(D=300), "interpreter")


def test_inverse_lists_name_every_visitor_in_order():
    p = problem(2, 3, 6, 1, 7, 1, 1, 4, seed=5)
    start, visitors = inverse_lists(p.block_index, 7)
    for b, h, slot in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(7)).tolist():
        found = visitors[b, h, start[b, h, slot] : start[b, h, slot + 1]].tolist()
        assert found == [i for i in range(6) if slot in p.block_index[b, h, i].tolist()]


# --- selection ------------------------------------------------------------------------------------------------------


def _scores(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float() / 2  # many ties


@pytest.mark.parametrize(("window", "top_k"), [(23, 6), (16, 1), (5, 9)])
def test_selection_equals_the_reference_with_ties(window, top_k):
    scores = _scores(window, 1, 2, 5, window)
    scores[0, 0, 0, 0] = -0.0
    for own in (None, torch.tensor([0, window - 1, 2, -1, 3])):
        with guarded():
            found = selection.select_blocks(scores, top_k, own)
        assert torch.equal(found, selection_reference.select_blocks(scores, top_k, own))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_fused_scores_and_selection_equal_the_reference(dtype):
    q, k = _scores(1, 1, 2, 19, 24).to(dtype), _scores(2, 1, 2, 37, 24).to(dtype)  # exact in bfloat16
    own = torch.arange(19)
    with guarded():
        found = selection.choose_blocks(q, k, 7, own, 0.25)
    assert torch.equal(found, selection_reference.select_blocks(selection_reference.block_scores(q, k, 0.25), 7, own))


@pytest.mark.parametrize("persistent", [0, 70, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("top_k", [1, 40, pytest.param(7, marks=pytest.mark.slow)])
def test_lists_written_with_the_choice_equal_the_reference(persistent, top_k):
    q, k = _scores(1, 2, 2, 19, 24), _scores(2, 2, 2, 37, 24)
    slots = torch.stack([torch.randperm(persistent + 37) for _ in range(4)]).view(2, 2, -1)
    held, window = slots[..., :persistent], slots[..., persistent:]
    own = torch.arange(18, 37)
    with guarded():
        found = selection.choose_lists(q, k, held, window, top_k, own, 0.25)
    selected = selection_reference.select_blocks(selection_reference.block_scores(q, k, 0.25), top_k, own)
    wanted = selection_reference.build_block_index(held, window, selected)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("capacity", [0, 1, 5, 12, 13, 20])
def test_memory_update_equals_the_reference(capacity):
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:26].reshape(1, 2, 13).to(torch.int32)
    importance = _scores(3, 1, 2, 13)
    with guarded():
        found = selection.update_persistent(slots, importance, capacity)
    wanted = selection_reference.update_persistent(slots, importance, capacity)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize("sizes", [None, torch.tensor([5, 0, 3], dtype=torch.int32)])
@pytest.mark.parametrize("weighted", [False, True])
def test_pooling_and_its_gradients_equal_the_reference(sizes, weighted):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 3, 5, 24, generator=generator)
    extra = (
        [torch.randn(2, 5, generator=generator), torch.randn(2, 24, 24, generator=generator)]
        if weighted
        else [None, None]
    )
    results = []
    for module, dtype in ((selection, torch.float32), (selection_reference, torch.float64)):
        leaves = [None if t is None else t.clone().to(dtype).requires_grad_() for t in (x, *extra)]
        with guarded():
            pooled = module.pool_blocks(leaves[0], sizes, leaves[1], leaves[2])
        results.append((pooled, *torch.autograd.grad(pooled.square().sum(), [t for t in leaves if t is not None])))
    for found, exact in zip(*results):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_pooling_rounds_a_mean_once(dtype):
    x = torch.randint(-64, 64, (1, 2, 3, 8, 24), generator=torch.Generator().manual_seed(0)).to(dtype)  # exact sums
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    with guarded():
        found = selection.pool_blocks(leaves[0], None, None, None)
    wanted = selection_reference.pool_blocks(leaves[1], None, None, None)
    assert found.dtype == dtype
    assert torch.equal(found, wanted)
    grads = [torch.autograd.grad(pooled.square().sum(), leaf)[0] for pooled, leaf in zip((found, wanted), leaves)]
    assert torch.equal(*grads)


@pytest.mark.slow
def test_selection_and_update_are_ops_that_know_their_shapes():
    """opcheck: schema, no aliasing, and a fake kernel that agrees with the real one."""
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    own = torch.tensor([0, 1, 2, 3, -1])
    slots, importance = torch.arange(12).view(1, 2, 6), torch.randn(1, 2, 6)
    for op, arguments in (
        (selection.pool_op, (torch.randn(1, 2, 5, 4, 8), None, torch.randn(2, 4), BF16)),
        (selection.choose_op, (q, k, None, None, 4, own, 0.5)),
        (selection.choose_op, (q, k, None, None, 20, None, 0.5)),
        (selection.choose_op, (q, k, torch.zeros(1, 2, 3).long(), torch.zeros(1, 2, 9).long(), 4, own, 0.5)),
        (selection.select_op, (torch.randn(1, 2, 5, 9), 4, own)),
        (selection.update_op, (slots, importance, 2)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_products_do_not_depend_on_the_order_of_their_factors():
    """Backward kernels compute the scores transposed; they must be those of the forward, as on a GPU."""

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(len(a), b.shape[1])
        left, right, zero = (interpreter.TensorHandle(x.numpy(), tl.float32) for x in (a, b, total))
        return torch.from_numpy(interpreter.interpreter_builder.create_dot(left, right, zero, None, 0).data)

    a, b = torch.randn(16, 32), torch.randn(32, 16)
    assert torch.equal(product(a, b), product(b.T.contiguous(), a.T.contiguous()).T)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("shape", "heads"), [((2, 5, 48), 3), ((1, 3, 96), 2), ((1, 2, 10), 1)])
def test_norm_rotate_is_the_norm_then_the_rotation(dtype, shape, heads):
    B, L, C = shape
    x = torch.randn(B, L + 1, C + 3).to(dtype)[:, 1:, :C]
    weight = torch.randn(C).to(dtype)
    angles = torch.randn(L, C // heads // 2)
    wanted = rows_reference.norm_rotate(x.double(), weight.double(), 1e-6, angles.cos().double(), angles.sin().double())
    with guarded():
        found = rows.norm_rotate(x, weight, 1e-6, angles.cos(), angles.sin())
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    assert error(found, wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("modulates", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_add_norm_is_the_sum_and_its_norm(dtype, modulates, gated):
    B, L, C = 2, 3, 45
    x, update = (torch.randn(B, L, C + 1).to(dtype)[..., :C] for _ in range(2))
    table = torch.randn(B, 1, 3, C).to(dtype)
    gate, shift, scale = table.unbind(2)
    if not modulates:
        shift, scale = shift[0, 0], scale[0, 0]
    inputs = (x, update, gate if gated else None, shift, scale)
    wanted = rows_reference.add_norm(
        *(None if part is None else part.double() for part in inputs), 1e-6, modulates=modulates
    )
    with guarded():
        found = rows.add_norm(*inputs, 1e-6, modulates=modulates)
    for part, expected in zip(found, wanted):
        assert part.dtype == dtype
        assert error(part, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_keys_are_turned_in_place_and_nothing_else_is(dtype):
    frequencies = 10_000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    pool = torch.randn(2, 3, 5, 4, 9).to(dtype)
    cases = [(pool, torch.randint(-9, 9, (2, 3, 5))[..., None]), (pool[:, :, :, 0], torch.randint(-9, 9, (2, 3, 5)))]
    cases.append((pool[:, 0, :4], torch.tensor([[0], [-3], [-3], [5]])))  # whole rows, as a dense cache has
    for keys, frames in cases:
        before = pool.clone()
        wanted = keys.double().clone()
        wanted[..., :6] = rows_reference.turn_time(wanted, frames, frequencies)
        rows.turn_time_(keys, frames, frequencies)
        assert error(keys, wanted) <= TOLERANCE[dtype]
        keys.copy_(torch.zeros_like(keys))
        where = torch.zeros_like(pool).copy_(pool) == 0
        assert torch.equal(pool[~where], before[~where]), "something beside the keys was written to"
        pool.copy_(before)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("selector", [True, False])
def test_blocks_are_stored_with_their_means(dtype, ragged, selector):
    B, H, n, S, T, D = 2, 3, 2, 4, 7, 10
    keys, values = (
        torch.randn(B, n * T, H, D + 2).to(dtype)[..., :D].transpose(1, 2).unflatten(2, (n, T)) for _ in "kv"
    )
    slots = torch.rand(B, H, S).argsort(-1)[..., :n]
    places = slots + S * torch.arange(B * H).view(B, H, 1)
    sizes = torch.tensor([T, 3], dtype=torch.int32) if ragged else None
    weights = torch.randn(H, T).to(dtype) if selector else None

    def pools(of: torch.dtype) -> selection_reference.Pools:
        block, mean = torch.full((B, H, S, T, D), 5.0, dtype=of), torch.full((B, H, S, D), 5.0, dtype=of)
        return selection_reference.Pools(block, block.clone(), mean, mean.clone() if selector else None)

    found, wanted = pools(dtype), pools(torch.float64)
    selection.store_blocks(keys, values, places, found, sizes, weights)
    selection_reference.store_blocks(
        keys.double(), values.double(), places, wanted, sizes, None if weights is None else weights.double()
    )
    for part, expected in zip(found, wanted):
        assert part is None or error(part, expected) <= TOLERANCE[dtype]
