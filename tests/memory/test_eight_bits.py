"""Blocks in 8 bits: exact bytes, small errors that do not grow as keys move, every rule of retention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig, MemoryGeometry, SparseMemory, make_memory
from sparse_forcing.memory.config import parse_memory
from sparse_forcing.memory.eight_bit import EightBitMemory
from sparse_forcing.memory.slots import round_blocks, widen_blocks
from sparse_forcing.model.rope import shift_time

from .conftest import CHUNK, LAYERS, Rollout
from .test_retention import NAMES, RAGGED, Feed, config, kept

EXACT = MemoryConfig(tile=(3, 2, 3), density=0.5, window_frames=6, persistent_blocks=3)
SMALL = replace(EXACT, cache_dtype="int8")


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_rounding_is_to_a_127th_of_each_channels_largest() -> None:
    blocks = torch.randn(2, 3, 4, 60, 16, dtype=torch.float64) * torch.logspace(-3, 3, 16)
    blocks[0, 0, 0] = 0
    codes, scales = round_blocks(blocks)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.int8, blocks.shape, (2, 3, 4, 16))
    back = widen_blocks(codes, scales, torch.float64)
    step = blocks.abs().amax(-2, keepdim=True) / 127
    assert ((back - blocks).abs() <= step * 0.51).double().mean() > 0.99  # scales of 8 bits may clip a largest number
    assert ((back - blocks).abs() <= step).all()
    assert relative(back, blocks) < 0.01
    assert not back[0, 0, 0].any()


@pytest.mark.parametrize("tile", [(3, 2, 3), (3, 3, 4)])
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_a_rollout_in_8_bits_is_almost_the_exact_one(run: Rollout, tile: tuple, positions: str) -> None:
    settings = {"tile": tile, "positions": positions}
    exact = run(replace(EXACT, **settings), 8, horizon=9)
    got = run(replace(SMALL, **settings), 8, horizon=9)
    assert torch.equal(got[:, :CHUNK], exact[:, :CHUNK])  # nothing is remembered yet
    errors = [relative(x, y) for x, y in zip(got.split(CHUNK, 1)[1:], exact.split(CHUNK, 1)[1:])]
    assert 0 < min(errors)
    assert max(errors) < 0.03


@torch.inference_mode()  # as the rollout has left the memory on a CPU
def test_keys_are_turned_once_however_often_they_move(run: Rollout) -> None:
    """Rounded when they were made: what a block holds is that, at its place, and not what ten roundings left of it."""
    run(SMALL, 3, horizon=9)
    memory = run.memory
    assert isinstance(memory, EightBitMemory)
    state = memory.layers[1]
    slots = state.window[:, :, :2]
    before, at = state.read("keys", slots), state.position.gather(2, slots).clone()
    codes = state.packed_keys.clone()
    for _ in range(4):
        memory._move_positions(-1)
    state = memory.layers[1]
    assert torch.equal(state.packed_keys, codes)
    moved = state.position.gather(2, slots) - at
    assert moved.min() < -1
    torch.testing.assert_close(state.read("keys", slots), shift_time(before, moved[..., None]))


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_bytes_are_counted_exactly(dtype: torch.dtype, batch: int) -> None:
    def held(settings: MemoryConfig) -> tuple[int, SparseMemory]:
        feed = Feed(settings, dtype=dtype, batch=batch)(5)
        return feed.memory.cache_bytes, feed.memory

    (exact, plain), (small, memory) = held(EXACT), held(SMALL)
    state, item = memory.layers[0], torch.finfo(dtype).bits // 8
    b, h, slots, tokens, dim = state.packed_keys.shape
    pool, codes = 2 * b * h * slots * tokens * dim, 2 * b * h * slots * (tokens * dim + 2 * dim)
    assert state.keys.numel() * 2 == pool
    saved = item * pool - codes - 8 * b * h * slots  # of each layer
    assert plain.layers[0].nbytes - state.nbytes == saved
    assert exact - small == LAYERS * saved - item * pool  # the pool that all read from is another one
    seen = {x.data_ptr(): x.nbytes for layer in memory.layers for x in vars(layer).values() if isinstance(x, Tensor)}
    assert sum(seen.values()) == small


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_works_on_blocks_in_8_bits(name: str) -> None:
    kept_by = []
    for settings in (config(name), config(name, cache_dtype="int8"), config(name, RAGGED, cache_dtype="int8")):
        kept_by.append(kept(Feed(settings)(6).memory))
    assert kept_by[0].shape == kept_by[1].shape
    assert (kept_by[0] == kept_by[1]).double().mean() > 0.8  # of blocks that are worth nearly the same either may stay
    assert (kept_by[2] >= 0).all()


def test_what_8_bits_are_not_for() -> None:
    with pytest.raises(ConfigError, match=r"memory\.cache_dtype: expected int8 or nothing, got 'int4'"):
        MemoryConfig(cache_dtype="int4")
    with pytest.raises(ConfigError, match="cache_dtype: int8 is for inference"):
        make_memory(
            SMALL,
            MemoryGeometry(rows=4, cols=6, num_layers=1, chunk_frames=3, horizon_frames=9),
            cache_gradient="detached",
        )
    assert parse_memory("sparse:,,,,int8", EXACT) == SMALL
