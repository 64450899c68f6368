"""The rules of retention again, as plainly as can be: one head at a time, lists and loops, one whole rollout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.rope import shift_time
from sparse_forcing.model.selector import RetentionHead


@dataclass
class Block:
    """What a head knows of a block: number since the start, first frame, keys and values [T, D] of its real tokens."""

    number: int
    frame: int
    keys: Tensor
    values: Tensor

    @property
    def value(self) -> Tensor:
        return self.values.mean(0)


@dataclass
class Moment:
    """After a clean pass: its query blocks [n][T, D], all blocks in memory in the order of time, the number of those
    that persist, the blocks of a frame, for each query block the numbers of the blocks that it attends to, and the
    layer's retention head."""

    queries: list[Tensor]
    blocks: list[Block]
    persistent: int
    frame_blocks: int
    lists: list[set[int]]
    layer: int
    head: int
    retention: RetentionHead | None = None


def block_attention(moment: Moment, blocks: list[Block]) -> list[float]:
    totals = [0.0] * len(blocks)
    for query in moment.queries:
        scores = [float(query.mean(0) @ b.keys.mean(0)) / math.sqrt(len(query[0])) for b in blocks]
        whole = sum(math.exp(s) for s in scores)
        totals = [t + math.exp(s) / whole for t, s in zip(totals, scores)]
    return totals


def true_mass(moment: Moment) -> dict[int, float]:
    found = {b.number: 0.0 for b in moment.blocks}
    for query, visible in zip(moment.queries, moment.lists):
        seen = [b for b in moment.blocks if b.number in visible]
        for row in query:
            logits = [(row @ b.keys.T / math.sqrt(len(row))).exp().sum() for b in seen]
            for block, share in zip(seen, logits):
                found[block.number] += float(share / sum(logits))
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


class Paper:
    def __init__(self, config: MemoryConfig) -> None:
        self.config = config

    def observe(self, moment: Moment) -> None: ...

    def keep(self, moment: Moment, candidates: list[Block], capacity: int) -> set[int]:
        """Numbers of the blocks that stay."""
        scores = self.worth(moment, candidates)
        order = sorted(range(len(candidates)), key=lambda i: (-scores[i], i))
        return {candidates[i].number for i in order[:capacity]}

    def worth(self, moment: Moment, candidates: list[Block]) -> list[float]:
        return block_attention(moment, candidates)


class Mass(Paper):
    def worth(self, moment: Moment, candidates: list[Block]) -> list[float]:
        mass = true_mass(moment)
        return [mass[b.number] for b in candidates]


class Accumulated(Paper):
    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.sums: dict[int, float] = {}

    def observe(self, moment: Moment) -> None:
        for block, found in zip(moment.blocks, block_attention(moment, moment.blocks)):
            self.sums[block.number] = self.config.retention_decay * self.sums.get(block.number, 0.0) + found

    def worth(self, moment: Moment, candidates: list[Block]) -> list[float]:
        return [self.sums[b.number] for b in candidates]


class Recent(Paper):
    def worth(self, moment: Moment, candidates: list[Block]) -> list[float]:
        return [b.number for b in candidates]


class First(Paper):
    def worth(self, moment: Moment, candidates: list[Block]) -> list[float]:
        return [-b.number for b in candidates]


class Random(Paper):
    def worth(self, moment: Moment, candidates: list[Block]) -> list[float]:
        def mix(x: int) -> int:
            for _ in range(2):
                x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
            return x ^ (x >> 16)

        def number(*parts: int) -> int:
            x = mix(self.config.retention_seed % 2**32)
            for part in parts:
                x = mix((x + part + 1) % 2**32)
            return x >> 8

        return [number(moment.layer, moment.head, b.number) for b in candidates]


class Diversity(Paper):
    weight = 0.0

    def keep(self, moment: Moment, candidates: list[Block], capacity: int) -> set[int]:
        relevance = self.relevance(moment, candidates)
        left = list(range(len(candidates)))
        while len(left) > capacity:

            def worth(i: int, left: list[int] = left) -> float:
                nearest = max(cosine(candidates[i].value, candidates[j].value) for j in left if j != i)
                return self.weight * relevance[i] - (1 - self.weight) * nearest

            left.remove(min(left, key=lambda i: (worth(i), -i)))
        return {candidates[i].number for i in left}

    def relevance(self, moment: Moment, candidates: list[Block]) -> list[float]:
        return [0.0] * len(candidates)


class Combined(Diversity, Accumulated):
    def relevance(self, moment: Moment, candidates: list[Block]) -> list[float]:
        self.weight = self.config.retention_weight
        sums = self.worth(moment, candidates)
        return [s / max(sums) for s in sums]


class Change(Paper):
    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.changes: dict[int, float] = {}

    def observe(self, moment: Moment) -> None:
        window = moment.blocks[moment.persistent :]
        for before, after in zip(window, window[moment.frame_blocks :]):
            change = 1 - cosine(before.value, after.value)
            for block in (before, after):
                self.changes[block.number] = max(self.changes.get(block.number, 0.0), change)

    def worth(self, moment: Moment, candidates: list[Block]) -> list[float]:
        return [self.changes.get(b.number, 0.0) for b in candidates]


class Learned(Paper):
    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.unused: dict[int, int] = {}

    def observe(self, moment: Moment) -> None:
        attention = block_attention(moment, moment.blocks)
        for block, found in zip(moment.blocks, attention):
            even = sum(attention) / len(attention)
            self.unused[block.number] = 0 if found >= even else self.unused.get(block.number, 0) + 1

    def worth(self, moment: Moment, candidates: list[Block]) -> list[float]:
        assert moment.retention is not None
        hidden, out = (x[moment.head].detach().double() for x in (moment.retention.hidden, moment.retention.out))
        found = []
        for block in candidates:
            pooled = shift_time(block.keys.mean(0), torch.tensor(-block.frame))
            parts = [x / x.norm() * math.sqrt(len(x)) for x in (pooled, block.value)]
            rest = torch.tensor([math.log(1 + self.unused[block.number]), 1.0], dtype=torch.float64)
            found.append(float((torch.cat([*parts, rest]) @ hidden).tanh() @ out))
        return found


REFERENCES: dict[str, Callable[[MemoryConfig], Paper]] = {
    "paper": Paper, "mass": Mass, "accumulated": Accumulated, "recent": Recent, "first": First, "random": Random,
    "diversity": Diversity, "combined": Combined, "change": Change, "learned": Learned,
}  # fmt: skip
