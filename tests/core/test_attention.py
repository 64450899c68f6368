"""Attention policies: grouped frames equal one explicit mask; masks say what method and references say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_forcing.model.attention import (
    ParallelAttention,
    TokenOrder,
    block_causal_mask,
    dense_attention,
    teacher_forcing_mask,
)

TOKENS = 3


def masked(query: Tensor, key: Tensor, value: Tensor, frame_mask: Tensor) -> Tensor:
    mask = frame_mask.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize(
    "mask",
    [
        block_causal_mask([3, 3, 1]),
        block_causal_mask([1, 2, 2, 2], window=3),
        block_causal_mask([2, 2, 2, 2], window=5, sink=1),
        teacher_forcing_mask([2, 2, 2]),
        torch.eye(5, dtype=torch.bool) | (torch.arange(5) == 3),
    ],
    ids=["causal", "window", "sink", "teacher forcing", "scattered"],
)
def test_grouped_frames_equal_the_explicit_mask(mask: Tensor) -> None:
    frames = len(mask)
    qkv = [torch.randn(2, frames * TOKENS, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found, expected = ParallelAttention(frames, mask).attend(0, *qkv), masked(*qkv, mask)
    torch.testing.assert_close(found, expected)
    probe = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * probe).sum(), qkv), torch.autograd.grad((expected * probe).sum(), qkv)
    ):
        torch.testing.assert_close(a, b)


def test_window_counts_the_chunk_and_the_sink() -> None:
    mask = block_causal_mask([2, 2, 2, 2], window=5, sink=1)
    visible = [row.nonzero().flatten().tolist() for row in mask[::2]]
    assert visible == [[0, 1], [0, 1, 2, 3], [0, 2, 3, 4, 5], [0, 4, 5, 6, 7]]


def test_window_smaller_than_a_chunk_still_shows_the_chunk() -> None:
    assert block_causal_mask([3, 3], window=1)[3].tolist() == [False] * 3 + [True] * 3


def test_teacher_forcing_hides_the_own_clean_chunk() -> None:
    mask = teacher_forcing_mask([2, 2])
    assert mask[6].tolist() == [True, True, False, False, False, False, True, True]
    assert mask[2].tolist() == [True] * 4 + [False] * 4


def test_bfloat16_on_a_cpu_is_computed_in_float32() -> None:
    qkv = [torch.randn(1, 8, 2, 16, dtype=torch.bfloat16) for _ in range(3)]
    exact = dense_attention(*(x.double() for x in qkv))
    found = dense_attention(*qkv)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_gradients_of_an_order_of_tokens_are_those_of_indexing() -> None:
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    layout, x = TokenOrder(order, order.argsort()), torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layout.arrange(x), x[:, order])
    assert torch.equal(layout.restore(layout.arrange(x)), x)
    assert torch.autograd.gradcheck(layout.arrange, x)
    assert torch.autograd.gradgradcheck(lambda x: layout.restore(x).square(), x)
