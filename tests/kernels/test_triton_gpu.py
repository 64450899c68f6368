"""The Triton kernels on a real GPU: the first thing to run on one. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from sparse_forcing.kernels.block_sparse_attention import block_sparse_attention, checked_values, reference
from sparse_forcing.kernels.block_sparse_attention.problem import Problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")


def _inputs(tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    B, H, Nq, S, M = 2, 3, 7, 12, 8
    tensors = [torch.randn(B, H, n, tokens, head_dim, generator=generator) for n in (Nq, S, S)]
    index = torch.rand(B, H, Nq, S, generator=generator).argsort(-1)[..., :M].to(torch.int32)
    index[..., 2, 3:] = -1
    index[0, 0, 4] = -1
    return [x.to("cuda", dtype).requires_grad_() for x in tensors], index.cuda()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "head_dim"), [(64, 128), (60, 128), (60, 64), (16, 32), (64, 256), (90, 40)])
@pytest.mark.parametrize("persistent", [0, 8], ids=["lists", "shared"])
def test_output_mass_and_gradients(tokens, head_dim, dtype, persistent):
    leaves, index = _inputs(tokens, head_dim, dtype)
    if persistent:
        index = index[:, :, 1:2].expand_as(index).contiguous()
    result = block_sparse_attention(*leaves, index, num_persistent=persistent, backend="triton")
    mass = block_sparse_attention(*leaves, index, return_mass=True, backend="triton").mass
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    out, lse, wanted_mass = reference.forward(Problem(*doubles, index, None, None, head_dim**-0.5, 0), True)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    found = torch.autograd.grad(result.out, leaves, grad)
    wanted = torch.autograd.grad(out, doubles, grad.double())
    tolerance = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 5e-3}[dtype]
    pairs = [(result.out, out), (result.lse.exp(), lse.exp()), (mass, wanted_mass), *zip(found, wanted)]
    for a, b in pairs:
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gradients_at_large_logits(head_dim, dtype):
    leaves, _ = _inputs(64, head_dim, dtype)
    index = torch.arange(8, dtype=torch.int32, device="cuda").expand(2, 3, 7, 8).contiguous()
    scale = 30 * head_dim**-0.5
    out = block_sparse_attention(*leaves, index, scale=scale, backend="triton").out
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    wanted_out = reference.forward(Problem(*doubles, index, None, None, scale, 0))[0]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    found = (out, *torch.autograd.grad(out, leaves, grad))
    wanted = (wanted_out, *torch.autograd.grad(wanted_out, doubles, grad.double()))
    tolerance = {torch.float16: 5e-4, torch.bfloat16: 5e-3}[dtype]
    for a, b in zip(found, wanted):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_compiles_into_one_graph():
    leaves, index = _inputs(64, 128, torch.bfloat16)

    def loss(*tensors):
        return block_sparse_attention(*tensors, index, backend="triton").out.float().square().sum()

    grads = [torch.autograd.grad(f(*leaves), leaves) for f in (loss, torch.compile(loss, fullgraph=True))]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_two_backward_passes_agree_bitwise():
    leaves, index = _inputs(64, 128, torch.bfloat16)
    grads = [
        torch.autograd.grad(block_sparse_attention(*leaves, index, backend="triton").out.float().square().sum(), leaves)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_selection_equals_the_reference():
    from sparse_forcing.kernels.block_selection import choose_blocks, choose_lists, pool_blocks, update_persistent

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 40, 60, 128, generator=generator).cuda()
    torch.testing.assert_close(pool_blocks(x, backend="triton"), pool_blocks(x, backend="reference"))
    q, k = (torch.randint(-3, 4, (1, 3, n, 128), generator=generator).bfloat16().cuda() for n in (19, 546))
    own = torch.arange(19, device="cuda")
    both = [choose_blocks(q, k, top_k=137, own=own, backend=b) for b in ("triton", "reference")]
    assert torch.equal(*both)
    named = torch.randperm(610, generator=generator).cuda().expand(1, 3, 610)
    lists = [
        choose_lists(q, k, named[..., :64], named[..., 64:], top_k=137, own=own, backend=b)
        for b in ("triton", "reference")
    ]
    assert torch.equal(*lists)
    slots = torch.arange(142, dtype=torch.int32, device="cuda").expand(1, 3, 142).contiguous()
    importance = torch.randint(0, 9, (1, 3, 142), generator=generator).float().cuda()
    for a, b in zip(*(update_persistent(slots, importance, 64, backend=b) for b in ("triton", "reference"))):
        assert torch.equal(a, b)


def test_forward_can_be_captured_in_a_cuda_graph():
    leaves, index = _inputs(64, 128, torch.bfloat16)
    leaves = [x.detach() for x in leaves]
    wanted = block_sparse_attention(*leaves, index, backend="triton").out  # also compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = block_sparse_attention(*leaves, index, backend="triton").out
    found.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)


def test_a_call_never_waits_for_the_gpu_unless_values_are_to_be_checked():
    leaves, index = _inputs(64, 128, torch.bfloat16)
    block_sparse_attention(*leaves, index, backend="triton").out.float().sum().backward()  # compiles
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with checked_values(False):
            block_sparse_attention(*leaves, index, backend="triton").out.float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    with checked_values(), pytest.raises(ValueError, match="slot 12 of a pool of 12"):
        block_sparse_attention(*leaves, index.clamp(min=0) + 1, backend="triton")


def test_more_heads_than_a_second_grid_axis_holds():
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 33000, n, 16, 16, device="cuda", generator=generator) for n in (1, 2, 2))
    index = torch.tensor([1], device="cuda", dtype=torch.int32).expand(2, 33000, 1, 1)
    found = block_sparse_attention(q, k, v, index, backend="triton").out
    wanted = torch.nn.functional.scaled_dot_product_attention(q[:, :, 0], k[:, :, 1], v[:, :, 1])
    torch.testing.assert_close(found[:, :, 0], wanted)
