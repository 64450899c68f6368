"""Problems of the attention benchmark: a shape, random tensors of it, and attention over them, sparse and dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_forcing.kernels.block_selection import build_block_index, select_blocks
from sparse_forcing.kernels.block_sparse_attention import block_sparse_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key and value blocks -> output blocks


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a problem: queries and window keys in tokens, blocks of `block` tokens, `persistent` tokens per head."""

    heads: int
    head_dim: int
    queries: int
    keys: int
    persistent: int = 0
    block: int = 64

    @property
    def name(self) -> str:
        kept = f" + {self.persistent}" if self.persistent else ""
        return f"{self.heads} x {self.head_dim}, {self.queries} x {self.keys}{kept}"

    def ideal(self, density: float) -> float:
        return (self.persistent + self.keys) / (self.persistent + density * self.keys)

    def flops(self, backward: bool) -> float:
        """FLOPs of dense attention; its backward is 2.5 times its forward (five matrix products instead of two)."""
        return 4 * self.heads * self.queries * (self.persistent + self.keys) * self.head_dim * (3.5 if backward else 1)


@dataclass
class Inputs:
    """Query blocks, the pool (persistent slots first) and random lists."""

    shape: Shape
    query: Tensor  # [1, H, Nq, T, D]
    key_pool: Tensor  # [1, H, S, T, D]
    value_pool: Tensor
    grad: Tensor

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        def normal(tokens: int) -> Tensor:
            return torch.randn(
                1, shape.heads, tokens // shape.block, shape.block, shape.head_dim, device=device, dtype=dtype
            )

        slots = shape.persistent + shape.keys
        return cls(shape, normal(shape.queries), normal(slots), normal(slots), normal(shape.queries))

    @property
    def num_persistent(self) -> int:
        return self.shape.persistent // self.shape.block

    def lists(self, density: float) -> Tensor:
        """[1, H, Nq, P + K] int32."""
        window = self.shape.keys // self.shape.block
        scores = torch.rand(*self.query.shape[:3], window, device=self.query.device)
        selected = select_blocks(scores, max(1, round(density * window)))
        slots = torch.arange(self.key_pool.shape[2], device=self.query.device, dtype=torch.int32)
        slots = slots.expand(1, self.shape.heads, -1)
        return build_block_index(slots[..., : self.num_persistent], slots[..., self.num_persistent :], selected)

    def sparse(self, index: Tensor, backend: str) -> Attend:
        return lambda q, k, v: (
            block_sparse_attention(q, k, v, index, num_persistent=self.num_persistent, backend=backend).out
        )

    def dense(self, mask: Tensor | None = None) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q_BHND, k_BHND, v_BHND = (x.flatten(2, 3) for x in (q, k, v))
            return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=mask).view_as(q)

        return attend

    def mask(self, index: Tensor) -> Tensor:
        """[1, H, queries, slots in tokens] bool: what a masked dense attention needs for the same result."""
        listed = torch.zeros(*index.shape[:3], self.key_pool.shape[2], dtype=torch.bool, device=index.device)
        listed.scatter_(-1, index.long(), True)
        return listed.repeat_interleave(self.shape.block, 2).repeat_interleave(self.shape.block, 3)
