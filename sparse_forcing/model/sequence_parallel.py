"""One video over several processes: tokens are split for what each token does alone, heads for attention.

Source: DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509). Before the blocks each process keeps its part of the
tokens. In every self-attention an all-to-all turns queries, keys and values of some tokens and all heads into those of
all tokens and some heads, which the policy (a rollout memory) then attends with: every process has the cache of its
heads. A second all-to-all turns the result back. After the blocks all tokens are gathered. Parts differ by one where
they cannot be equal. What is outside the blocks is computed by every process alike.

Legend: B batch, L tokens, H heads, D head dim, C channels; L_r, H_r: those of process r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.launch import PATIENCE
from sparse_forcing.model.attention import AttentionPolicy, TokenOrder
from sparse_forcing.model.rope import Rotary
from sparse_forcing.model.selector import BlockSelector
from sparse_forcing.processes import explain_lost_peers


def even_parts(count: int, parts: int) -> list[int]:
    """`count` as a sum of `parts` numbers that differ by at most one, the larger ones first."""
    return [count // parts + (part < count % parts) for part in range(parts)]


class SequenceParallel:
    """The processes that run a transformer together; set as its `sequence_parallel` on each of them.

    Args:
        heads: attention heads of the transformer.
        group: the processes; all of the launch when None.

    Raises:
        ConfigError: there are more processes than heads.
    """

    def __init__(self, heads: int, group: Any = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        check_processes(heads, self.size)
        self._heads = even_parts(heads, self.size)

    @classmethod
    def of_launch(cls, heads: int, device: torch.device) -> SequenceParallel:
        """All processes of the launch, with what moves tensors of this device between them."""
        return cls(heads, dist.new_group(backend="nccl", timeout=PATIENCE) if device.type == "cuda" else None)

    @property
    def heads(self) -> slice:
        """The heads whose attention this process computes."""
        first = sum(self._heads[: self.rank])
        return slice(first, first + self._heads[self.rank])

    def own_selectors(self, selectors: Sequence[BlockSelector] | None) -> list[BlockSelector] | None:
        """The selectors of this process's heads, for its memory."""
        return None if selectors is None else [selector.of_heads(self.heads) for selector in selectors]

    def same_generator(self, device: torch.device) -> torch.Generator:
        """A generator on the CPU with a seed that the first process draws: noise must be equal everywhere."""
        seed = torch.randint(2**62, (1,)).to(device)
        with explain_lost_peers(self.size):
            dist.broadcast(seed, 0 if self.group is None else dist.get_global_rank(self.group, 0), self.group)
        return torch.Generator().manual_seed(int(seed.item()))

    def split(self, tokens: Tensor, rotary: Rotary, policy: AttentionPolicy) -> tuple[Tensor, Rotary, AttentionPolicy]:
        """This process's part of tokens [B, L, C] and of their rotary table, and the policy that the blocks call.

        Raises:
            ConfigError: gradients are wanted, or there are fewer tokens than processes.
        """
        if tokens.requires_grad:
            raise ConfigError(
                "sequence parallelism: has no gradients; train with FSDP, and run it under torch.no_grad()"
            )
        if tokens.shape[1] < self.size:
            raise ConfigError(f"sequence parallelism: {tokens.shape[1]} tokens for {self.size} processes; start fewer")
        lengths = even_parts(tokens.shape[1], self.size)
        first = sum(lengths[: self.rank])
        own = slice(first, first + lengths[self.rank])
        part = Rotary(rotary.cos[own], rotary.sin[own])
        return tokens[:, own], part, _AttentionOfHeads(self, policy, lengths)

    def join(self, tokens: Tensor, count: int) -> Tensor:
        """All `count` tokens [B, L, C] from every process's part [B, L_r, C]."""
        lengths = even_parts(count, self.size)
        padded = torch.nn.functional.pad(tokens, (0, 0, 0, max(lengths) - tokens.shape[1])).contiguous()
        found = [torch.empty_like(padded) for _ in lengths]
        with explain_lost_peers(self.size):
            dist.all_gather(found, padded, group=self.group)
        return torch.cat([part[:, :length] for part, length in zip(found, lengths)], 1)

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
        """Three times [B, L_r, H, D] -> [B, L, H_r, D]."""
        packed = torch.stack([query, key, value])
        own, batch, dim = self._heads[self.rank], packed.shape[1], packed.shape[4]
        parts = self._exchange(packed.split(self._heads, 3), [(3, batch, length, own, dim) for length in lengths])
        return torch.cat(parts, 2).unbind(0)

    def to_tokens(self, attended: Tensor, lengths: list[int]) -> Tensor:
        """[B, L, H_r, D] -> [B, L_r, H, D]."""
        batch, _, _, dim = attended.shape
        shapes = [(batch, lengths[self.rank], heads, dim) for heads in self._heads]
        return torch.cat(self._exchange(attended.split(lengths, 1), shapes), 2)

    def _exchange(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send part r to process r; returns what each of them sent here, in these shapes."""
        sent, received = [part.numel() for part in parts], [math.prod(shape) for shape in shapes]
        buffer = torch.cat([part.reshape(-1) for part in parts])
        found = buffer.new_empty(sum(received))
        with explain_lost_peers(self.size):
            dist.all_to_all_single(found, buffer, received, sent, group=self.group)
        return [part.view(shape) for part, shape in zip(found.split(received), shapes)]


def check_processes(heads: int, processes: int) -> None:
    """Raise ConfigError where a process would have no head."""
    if processes > heads:
        raise ConfigError(
            f"sequence parallelism: {processes} processes cannot share {heads} attention heads; start at most {heads}"
        )


class _AttentionOfHeads:
    """The policy of a pass, asked for this process's heads and all tokens."""

    def __init__(self, parallel: SequenceParallel, policy: AttentionPolicy, lengths: list[int]) -> None:
        self.parallel, self.policy, self.lengths = parallel, policy, lengths

    def token_order(self, device: torch.device) -> TokenOrder | None:
        return self.policy.token_order(device)

    def rotary(self, rows: int, cols: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Rotary:
        return self.policy.rotary(rows, cols, head_dim, dtype, device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """[B, L_r, H, D] -> [B, L_r, H, D]."""
        own = self.parallel.to_heads(query, key, value, self.lengths)
        found = self.policy.attend(layer, *own)
        return None if found is None else self.parallel.to_tokens(found, self.lengths)
