"""The custom op behind block_sparse_attention: torch.library's checks, fake tensors, compile, checkpoint, bad input."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from sparse_forcing.errors import ConfigError
from sparse_forcing.kernels.block_sparse_attention import block_sparse_attention, why_unavailable
from sparse_forcing.kernels.block_sparse_attention.ops import forward_op
from tests.kernels.attention_problems import error, problem


@pytest.mark.parametrize(
    ("dtype", "return_mass", "ragged"),
    [(torch.float64, False, False), (torch.float64, True, True), (torch.bfloat16, False, True)],
)
def test_opcheck(dtype, ragged, return_mass):
    p = problem(1, 2, 3, 4, 5, 4, 8, 3, dtype=dtype, ragged=ragged, short_lists=ragged)
    inputs = [x.clone().requires_grad_() for x in p.inputs]
    torch.library.opcheck(
        forward_op,
        (*inputs, p.block_index, p.query_sizes, p.key_sizes, 0.3, 0, return_mass, True, "cpu"),
        atol=1e-12,
        rtol=1e-12,
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fake_tensors_have_the_real_shapes(dtype, backend):
    p = problem(dtype=dtype, ragged=True)
    real = block_sparse_attention(*p.inputs, p.block_index, **p.options, return_mass=True, backend=backend)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake_inputs = [mode.from_tensor(x) for x in p.inputs]
        options = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in p.options.items()}
        index = mode.from_tensor(p.block_index)
        fake = block_sparse_attention(*fake_inputs, index, **options, return_mass=True, backend=backend)
    for mine, exact in zip(fake, real):
        assert mine is not None
        assert (mine.shape, mine.dtype, mine.stride()) == (exact.shape, exact.dtype, exact.stride())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiles_into_one_graph(backend):
    p = problem(1, 2, 3, 4, 5, 4, 8, 3, persistent=1)

    def loss(query, key_pool, value_pool):
        got = block_sparse_attention(query, key_pool, value_pool, p.block_index, num_persistent=1, backend=backend)
        return got.out.square().sum() + got.lse.sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in p.inputs]
        grads.append(torch.autograd.grad(function(*inputs), inputs))
    for mine, exact in zip(*grads):
        assert error(mine, exact) < 1e-13


def test_checkpoint_recomputes_it():
    p = problem()
    grads = []
    for use in (False, True):
        inputs = [x.clone().requires_grad_() for x in p.inputs]

        def attend(*tensors):
            return block_sparse_attention(*tensors, p.block_index).out

        out = checkpoint(attend, *inputs, use_reentrant=False) if use else attend(*inputs)
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
    for mine, exact in zip(*grads):
        assert torch.equal(mine, exact)


def test_auto_takes_the_cpu_path_here(monkeypatch):
    from sparse_forcing.kernels.block_sparse_attention.cpu import backend as cpu

    p = problem()
    calls = []
    real = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *args: calls.append(1) or real(*args))
    block_sparse_attention(*p.inputs, p.block_index, return_mass=True)
    assert calls


def test_a_forced_backend_that_cannot_run_says_why():
    p = problem()
    reason = why_unavailable("triton", p.query)
    if reason is None:
        pytest.skip("Triton runs here")
    with pytest.raises(ConfigError, match=r"backend 'triton' cannot run here: .+"):
        block_sparse_attention(*p.inputs, p.block_index, backend="triton")
    with pytest.raises(ConfigError, match="unknown backend 'cuda'; choose one of auto"):
        block_sparse_attention(*p.inputs, p.block_index, backend="cuda")
    with pytest.raises(ConfigError, match="'cpu' cannot run here: the tensors are on meta"):
        block_sparse_attention(*(x.to("meta") for x in (*p.inputs, p.block_index)), backend="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 4, 5)}, "query is .* expected floating point"),
        ({"query": torch.zeros(2, 3, 4, 5, 8).int()}, "query is .* expected floating point"),
        ({"key_pool": torch.zeros(2, 3, 7, 6, 9).double()}, "key_pool is .* to match query"),
        ({"value_pool": torch.zeros(2, 3, 7, 6, 8)}, "value_pool is .*float32, expected torch.float64"),
        ({"value_pool": torch.zeros(2, 3, 8, 6, 8).double()}, "value_pool is .* the shape of key_pool"),
        ({"block_index": torch.zeros(2, 3, 5, 4).int()}, r"block_index is .* expected int32 \[2, 3, 4, M\]"),
        ({"query_sizes": torch.zeros(3).int()}, r"query_sizes is .* expected int32 \[4\]"),
        ({"key_sizes": torch.zeros(2, 3, 7).long()}, "key_sizes is .*int64, expected int32"),
        ({"num_persistent": 5}, "block_index .* at least num_persistent = 5"),
    ],
)
def test_bad_shapes_and_types_are_named(change, message):
    p = problem()
    arguments = {
        "query": p.query,
        "key_pool": p.key_pool,
        "value_pool": p.value_pool,
        "block_index": p.block_index,
    } | change
    with pytest.raises(ValueError, match=f"block_sparse_attention: {message}"):
        block_sparse_attention(**arguments)
