"""Blocks of a pool by their slots: what is put there is read there, and nothing else changes."""

from __future__ import annotations

import torch

from sparse_forcing.memory.slots import gather_slots, put_slots_, slot_index


def test_blocks_put_into_slots_are_read_there_and_the_others_stay() -> None:
    pools = [torch.randn(2, 3, 7, 4, 5), torch.randn(2, 3, 7, 5, dtype=torch.bfloat16)]
    before = [pool.clone() for pool in pools]
    slots = torch.rand(2, 3, 7).argsort(-1)[:, :, :4]  # other ones for each head
    blocks = [torch.randn(2, 4, 4, 3, 5).permute(0, 3, 1, 2, 4), torch.randn(2, 3, 4, 5)]
    put_slots_(pools, slots, blocks)
    for pool, old, new in zip(pools, before, blocks):
        assert torch.equal(gather_slots(pool, slots), new.to(pool.dtype))
        assert torch.equal(pool, old.scatter(2, slot_index(slots, new), new.to(pool.dtype)))
