"""Rollouts under every memory: equalities between kinds, positions, bytes."""

from __future__ import annotations

import pytest
import torch

from sparse_forcing.config import build_config
from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig

TILES = [(3, 2, 3), (3, 3, 4), (1, 4, 6), (2, 3, 5)]


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tile", TILES)
def test_sparse_with_everything_in_the_window_equals_full(run, tile):
    expected = run(MemoryConfig(kind="full"), 4)
    close(run(MemoryConfig(tile=tile, density=1.0, window_frames=12, persistent_blocks=0), 4), expected)


@pytest.mark.parametrize("tile", TILES)
def test_sparse_that_persists_every_block_equals_full(run, tile):
    expected = run(MemoryConfig(kind="full"), 5)
    close(run(MemoryConfig(tile=tile, density=1.0, window_frames=6, persistent_blocks=200), 5), expected)


@pytest.mark.parametrize("tile", TILES)
def test_sparse_without_persistent_blocks_and_full_density_equals_window(run, tile):
    expected = run(MemoryConfig(kind="window", window_frames=6), 5)
    close(run(MemoryConfig(tile=tile, density=1.0, window_frames=6, persistent_blocks=0), 5), expected)


def test_sparsity_changes_the_result(run):
    dense = run(MemoryConfig(kind="window", window_frames=6), 4)
    sparse = run(MemoryConfig(tile=(3, 2, 3), density=0.25, window_frames=6, persistent_blocks=2), 4)
    assert (dense - sparse)[:, :3].abs().max() > 1e-6, "selection must bite inside the first chunk already"


@pytest.mark.parametrize(
    "config",
    [
        MemoryConfig(kind="full"),
        MemoryConfig(kind="window", window_frames=7),
        MemoryConfig(kind="sink", window_frames=7, sink_frames=1),
        MemoryConfig(tile=(3, 2, 3), density=0.5, window_frames=6, persistent_blocks=3),
        MemoryConfig(tile=(2, 3, 4), density=0.5, window_frames=6, persistent_blocks=3, retention="mass"),
        MemoryConfig(kind="heavy_hitter", tile=(1, 3, 5), window_frames=7, persistent_blocks=2),
    ],
    ids=["full", "window", "sink", "sparse", "sparse-mass", "heavy-hitter"],
)
@pytest.mark.parametrize("cache_gradient", ["detached", "straight_through", "clean"])
def test_training_caches_hold_the_values_of_inference(run, config, cache_gradient):
    close(run(config, 5, cache_gradient=cache_gradient), run(config, 5))


@pytest.mark.parametrize("kind", ["window", "sparse"])
def test_relative_positions_of_a_window_equal_absolute_ones_beyond_the_horizon(run, kind):
    """Rotary attention depends on distances only: re-phasing a window must not change anything."""
    knobs = {"kind": kind, "window_frames": 6, "tile": (3, 2, 3), "density": 0.5, "persistent_blocks": 0}
    absolute = run(MemoryConfig(**knobs, positions="absolute"), 7, horizon=9)
    close(run(MemoryConfig(**knobs, positions="relative"), 7, horizon=9), absolute)
    assert run.memory.chunk_position == 6, "the current chunk stays at the end of the horizon"


@pytest.mark.parametrize(
    "config",
    [
        MemoryConfig(kind="sink", window_frames=6, sink_frames=2),
        MemoryConfig(tile=(3, 2, 3), window_frames=6, persistent_blocks=3),
    ],
    ids=["sink", "sparse"],
)
def test_relative_positions_bound_the_distance_of_what_stays(run, config):
    inside = run(config, 3, horizon=9)
    close(inside, run(MemoryConfig(**{**config.__dict__, "positions": "absolute"}), 3, horizon=9))
    beyond = run(config, 7, horizon=9)
    absolute = run(MemoryConfig(**{**config.__dict__, "positions": "absolute"}), 7, horizon=9)
    close(beyond[:, :9], absolute[:, :9])
    assert (beyond - absolute)[:, 12:].abs().max() > 1e-9
    if config.kind == "sink":
        assert run.make(config).positions == []
        assert run(config, 7, horizon=9) is not None
        assert run.memory.positions[:2] == [0, 1]


def test_sparse_bytes_are_bounded_and_full_bytes_grow(run):
    sparse = MemoryConfig(tile=(3, 2, 3), density=0.5, window_frames=6, persistent_blocks=3)
    run(sparse, 4)
    at_four = run.memory.cache_bytes
    run(sparse, 9)
    assert run.memory.cache_bytes == at_four
    run(MemoryConfig(kind="full"), 4)
    full_at_four = run.memory.cache_bytes
    run(MemoryConfig(kind="full"), 9)
    assert run.memory.cache_bytes > 1.5 * full_at_four


def test_cache_bytes_count_every_tensor_a_memory_holds(run):
    config = MemoryConfig(tile=(3, 2, 3), density=0.5, window_frames=6, persistent_blocks=3)
    run(config, 4)
    held = sum(
        value.nbytes for state in run.memory.layers for value in vars(state).values() if isinstance(value, torch.Tensor)
    )
    assert run.memory.cache_bytes == held


def test_slots_are_never_shared_and_hold_the_blocks_they_name(run):
    config = MemoryConfig(tile=(3, 2, 3), density=0.5, window_frames=6, persistent_blocks=3)
    run(config, 8)
    memory = run.memory
    per_chunk = memory.layout.num_blocks
    for state in memory.layers:
        slots = torch.cat([state.persistent, state.window], 2)
        assert slots.shape[2] == memory.num_slots
        assert (slots.sort(2).values == torch.arange(memory.num_slots)).all()
        origin = state.origin.gather(2, slots)
        newest = torch.arange(8 * per_chunk - state.window.shape[2], 8 * per_chunk)
        assert (origin[:, :, 3:] == newest).all(), "the window holds the newest blocks in order"
        assert (origin[:, :, :3] < newest[0]).all()
        assert (origin[:, :, :3].diff(dim=2) > 0).all()


def test_persistent_blocks_differ_between_heads(run):
    run(MemoryConfig(tile=(3, 2, 3), density=0.5, window_frames=6, persistent_blocks=3), 8)
    state = run.memory.layers[-1]
    origin = state.origin.gather(2, state.persistent)
    assert (origin[:, 0] != origin[:, 1]).any()


def test_persistent_map_counts_layers_and_heads(run):
    config = MemoryConfig(tile=(3, 2, 3), density=0.5, window_frames=6, persistent_blocks=3)
    run(config, 2)
    assert run.memory.persistent_map() is None
    run(config, 5)
    lit = run.memory.persistent_map()
    assert lit.shape == (3, 4, 6)
    assert 0 < lit.max() <= 1
    apart = torch.stack([run.memory.persistent_map(chunk) for chunk in range(5)])
    assert apart[-1].max() == 0, "nothing of the window persists"
    assert (apart.sum(0) >= lit - 1e-6).all()
    assert (apart.max(0).values <= lit + 1e-6).all()


def test_a_chunk_longer_than_the_window_is_refused(run):
    with pytest.raises(ConfigError, match="window_frames"):
        run(MemoryConfig(kind="window", window_frames=2), 1)


@pytest.mark.parametrize(
    ("knobs", "name"),
    [
        ({"kind": "ring"}, "kind"),
        ({"density": 0.0}, "density"),
        ({"density": float("nan")}, "density"),
        ({"tile": (0, 2, 2)}, "tile"),
        ({"persistent_blocks": -1}, "persistent_blocks"),
        ({"kind": "sink", "sink_frames": 6}, "sink_frames"),
        ({"positions": "rotary"}, "positions"),
    ],
)
def test_bad_memory_settings_name_the_setting(knobs, name):
    with pytest.raises(ConfigError, match=name):
        MemoryConfig(**knobs)


def test_former_names_of_the_retention_rule_are_told_the_new_ones():
    with pytest.raises(ConfigError, match=r"importance: this setting is called .*retention now"):
        build_config(MemoryConfig, {"importance": "coarse"})
    with pytest.raises(ConfigError, match="'coarse' is called 'paper' now"):
        MemoryConfig(retention="coarse")
    with pytest.raises(ConfigError, match=r"expected one of .*mass, paper"):
        MemoryConfig(retention="best")
