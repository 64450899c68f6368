"""Step-by-step inference through the cache equals one parallel pass over [clean | noisy] under the memory's mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparse_forcing.memory import MemoryConfig, SparseMemory
from sparse_forcing.memory.retention import RULES
from sparse_forcing.model.attention import ParallelAttention, teacher_forcing_mask
from sparse_forcing.model.geometry import TileLayout

from .conftest import CHANNELS, CHUNK, COLS, ROWS
from .test_retention import selectors

CHUNKS = 5
FRAMES = CHUNK * CHUNKS
TIMESTEP = 600.0


def cached_flows(run, memory, noisy, clean):
    """Flow of every noisy chunk given the clean chunks before it, through the cache."""
    flows = []
    for x, x0 in zip(noisy.split(CHUNK, 2), clean.split(CHUNK, 2)):
        memory.begin_chunk(CHUNK)
        t = torch.full((len(x),), TIMESTEP, dtype=torch.float64)
        flows.append(run.model(x, t, run.text, policy=memory.denoising_pass()))
        run.model(x0, 0 * t, run.text, policy=memory.clean_pass())
    return torch.cat(flows, 2)


def parallel_flow(run, policy, noisy, clean):
    t = torch.full((len(noisy), FRAMES), TIMESTEP, dtype=torch.float64)
    return run.model(noisy, t, run.text, policy=policy, clean_hidden_states=clean)


@pytest.fixture(scope="module")
def latents():
    torch.manual_seed(3)
    return torch.randn(2, 2, CHANNELS, FRAMES, 2 * ROWS, 2 * COLS, dtype=torch.float64)


@pytest.mark.parametrize(
    "config",
    [
        MemoryConfig(kind="full"),
        MemoryConfig(kind="window", window_frames=6),
        MemoryConfig(kind="window", window_frames=7),
        MemoryConfig(kind="sink", window_frames=7, sink_frames=2),
    ],
    ids=["full", "window6", "window7", "sink"],
)
@torch.no_grad()
def test_dense_memories(run, latents, config):
    mask = teacher_forcing_mask([CHUNK] * CHUNKS, window=config.window, sink=config.sink)
    policy = ParallelAttention(2 * FRAMES, mask, torch.arange(FRAMES).repeat(2))
    expected = parallel_flow(run, policy, *latents)
    torch.testing.assert_close(cached_flows(run, run.make(config), *latents), expected, rtol=1e-10, atol=1e-10)


class RecordingMemory(SparseMemory):
    """Notes for every pass, layer, head and query block which blocks (counted from the start) are visible."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.record: dict[tuple[bool, int, int], torch.Tensor] = {}

    def attend(self, layer, query, key, value, *, clean, choices=None, ends=False):
        choices = {}
        out = super().attend(layer, query, key, value, clean=clean, choices=choices)
        index, origin = choices[layer], self.layers[layer].origin[:, :, None]
        self.record[clean, layer, self.next_frame // CHUNK] = origin.expand(-1, -1, index.shape[2], -1).gather(
            3, index.long()
        )
        return out


class RecordedMask(ParallelAttention):
    """[clean | noisy] attention under the recorded blocks, as one dense masked softmax per layer."""

    def __init__(self, memory: RecordingMemory) -> None:
        super().__init__(2 * FRAMES, None, torch.arange(FRAMES).repeat(2))
        self.memory = memory
        self.layout: TileLayout = memory.layout
        # Number of the block that each frame-major token of a chunk belongs to.
        blocks = torch.arange(self.layout.num_blocks).repeat_interleave(self.layout.sizes)
        self.block_of_token = blocks[self.layout.inverse]

    def attend(self, layer, query, key, value):
        n, tokens = self.layout.num_blocks, self.layout.num_tokens
        half = CHUNKS * tokens
        batch, _, heads, _ = query.shape
        mask = torch.zeros(batch, heads, 2 * half, 2 * half, dtype=torch.bool)
        for chunk in range(CHUNKS):
            for clean in (True, False):
                origin = self.memory.record[clean, layer, chunk]
                visible = torch.zeros(batch, heads, n, CHUNKS * n, dtype=torch.bool).scatter_(3, origin, True)
                rows = visible[:, :, self.block_of_token]
                numbers = (torch.arange(CHUNKS)[:, None] * n + self.block_of_token).flatten()
                rows = rows[:, :, :, numbers]
                start = chunk * tokens + (0 if clean else half)
                own = slice(chunk * tokens, (chunk + 1) * tokens)
                mask[:, :, start : start + tokens, :half] = rows
                if not clean:
                    mask[:, :, start : start + tokens, start : start + tokens] = rows[..., own]
                    mask[:, :, start : start + tokens, own] = False
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "config",
    [
        MemoryConfig(tile=(3, 2, 3), density=0.5, window_frames=6, persistent_blocks=3),
        MemoryConfig(tile=(2, 3, 4), density=0.3, window_frames=9, persistent_blocks=5),
        MemoryConfig(tile=(3, 2, 2), density=0.25, window_frames=6, persistent_blocks=4, retention="mass"),
        MemoryConfig(tile=(3, 2, 3), density=0.5, window_frames=6, persistent_blocks=0),
        MemoryConfig(tile=(3, 2, 3), density=1.0, window_frames=6, persistent_blocks=4),
    ],
    ids=["sparse", "ragged", "mass", "no-persistent", "dense-window"],
)
@torch.no_grad()
def test_sparse_memory(run, latents, config, backend):
    base = run.make(config)
    memory = RecordingMemory(config, base.geometry, backend=backend)
    flows = cached_flows(run, memory, *latents)
    expected = parallel_flow(run, RecordedMask(memory), *latents)
    torch.testing.assert_close(flows, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(RULES))
@torch.no_grad()
def test_every_rule_of_retention(run, latents, name):
    config = MemoryConfig(tile=(2, 3, 4), density=0.4, window_frames=6, persistent_blocks=4, retention=name)
    learned = selectors(config, 16)
    memory = RecordingMemory(
        config, run.make(config, selectors=learned).geometry, backend="reference", selectors=learned
    )
    flows = cached_flows(run, memory, *latents)
    expected = parallel_flow(run, RecordedMask(memory), *latents)
    torch.testing.assert_close(flows, expected, rtol=1e-9, atol=1e-9)
