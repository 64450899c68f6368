"""Gradients of a pass do not depend on whether autograd keeps the pool or the history it is rebuilt from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_forcing.memory import MemoryConfig, SparseMemory

from .conftest import CHANNELS, CHUNK, COLS, ROWS

TILES = {"even": (3, 2, 2), "ragged": (3, 3, 4)}


def gradients(run, memory: SparseMemory, chunks: int) -> list[Tensor]:
    """Gradients of every parameter from the last chunk's pass alone, after a rollout on fixed latents."""
    torch.manual_seed(5)
    latents = torch.randn(chunks, 2, CHANNELS, CHUNK, 2 * ROWS, 2 * COLS, dtype=torch.float64)
    time = torch.full((2,), 600.0, dtype=torch.float64)
    for chunk, x in enumerate(latents):
        memory.begin_chunk(CHUNK)
        last = chunk == chunks - 1
        with torch.set_grad_enabled(last):
            out = run.model(x, time, run.text, policy=memory.denoising_pass())
        with torch.no_grad():
            if not last:
                run.model(0.9 * x, 0 * time, run.text, policy=memory.clean_pass())
    run.model.zero_grad()
    out.square().mean().backward()
    return [p.grad.clone() for p in run.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("chunks", [1, 4, 14])
def test_history_gives_the_gradients_of_the_pool(run, chunks: int, tile: str, checkpointing: bool) -> None:
    """14 chunks are twice the horizon, so keys move in time, and the history has been replaced by the pool once."""
    config = MemoryConfig(
        kind="sparse", window_frames=6, tile=TILES[tile], persistent_blocks=2, density=0.5, positions="relative"
    )
    # Writes new pools that carry the gradient; the past, whose passes have none, carries none either.
    expected = gradients(run, run.make(config, cache_gradient="straight_through"), chunks)
    memory = run.make(config, cache_gradient="detached")
    run.model.gradient_checkpointing = checkpointing
    try:
        found = gradients(run, memory, chunks)
    finally:
        run.model.gradient_checkpointing = False
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    histories = [state.history for state in memory.layers if state is not None]
    assert all(0 <= history.blocks <= 5 * memory.num_slots for history in histories)
    assert all((len(history.keys) < chunks - 1) == (chunks == 14) for history in histories)


def test_passes_without_gradients_keep_no_graph(run) -> None:
    config = MemoryConfig(kind="sparse", window_frames=6, tile=TILES["even"], persistent_blocks=2, density=0.5)
    memory = run.make(config, cache_gradient="detached")
    gradients(run, memory, 3)
    for state in memory.layers:
        assert state is not None
        assert not any(x.requires_grad for x in (state.keys, state.values, *state.history.keys, *state.history.values))
