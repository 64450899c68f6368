"""What a chunk would take on a GPU that is not at hand: arithmetic, not a measurement.

A roofline: operations over the rate of matrix products and of attention, elementwise bytes over the rate of memory, and
a gap between launches that a CUDA graph makes. The rates are the GPU's peaks times the shares that an H200 reached
(docs/results/gpu); bytes and launches are those that tests/core/test_launches.py counts for a steady chunk.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.geometry import TileLayout


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peaks: operations a second of dense bfloat16 products, bytes a second of memory."""

    name: str
    operations: float
    bandwidth: float


H200 = Gpu(name="H200", operations=989e12, bandwidth=4.8e12)
H100 = Gpu(name="H100 SXM", operations=989e12, bandwidth=3.35e12)
GPUS = (H100, H200)
PRODUCTS, DENSE, SPARSE = (rate / H200.operations for rate in (600e12, 505e12, 375e12))
"""Shares of the peak that linear layers, cuDNN's attention and the sparse kernel reach."""
ELEMENTWISE = 4e12 / H200.bandwidth
GAP_SECONDS = 1.1e-6
MOVED = {"sparse": 29, "dense": 26}
"""Times that a layer's pass reads or writes its tokens outside of products and attention."""
LAUNCHES = {"sparse": 27, "dense": 23}
"""Of a layer and pass."""


@dataclass(frozen=True, kw_only=True)
class ChunkSizes:
    """Sizes of a model and its chunk: latent frames, token rows and columns; channels and layers; tokens of the text;
    passes of a chunk, the clean one included."""

    frames: int
    rows: int
    cols: int
    dim: int
    ffn_dim: int
    layers: int
    text_tokens: int
    passes: int
    number_bytes: int = 2

    @property
    def tokens(self) -> int:
        """Of a chunk."""
        return self.frames * self.rows * self.cols


@dataclass(frozen=True)
class ChunkSeconds:
    """Seconds of one chunk by what they go into."""

    products: float
    attention: float
    elementwise: float
    gaps: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def count_keys(memory: MemoryConfig, sizes: ChunkSizes, chunk: int) -> int:
    """Tokens that a query of chunk number `chunk` (from 0) attends to."""
    frame, frames = sizes.rows * sizes.cols, (chunk + 1) * sizes.frames
    held = frames if memory.window is None else min(frames, memory.window)
    if memory.kind == "heavy_hitter":
        return held * frame + min(memory.persistent_tokens, (frames - held) * frame)
    if memory.kind != "sparse":
        return held * frame
    blocks = TileLayout(sizes.frames, sizes.rows, sizes.cols, memory.tile).num_blocks
    held, full = held // sizes.frames * blocks, memory.window_frames // sizes.frames * blocks
    chosen = min(held, max(1, math.ceil(memory.density * full)))
    persistent = min(memory.persistent_blocks, (chunk + 1) * blocks - held)
    return (persistent + chosen) * math.prod(memory.tile)


def project_chunk(memory: MemoryConfig, sizes: ChunkSizes, chunk: int, gpu: Gpu) -> ChunkSeconds:
    """Seconds of chunk number `chunk` (from 0) of a rollout, decoding not included."""
    n, dim, passes = sizes.tokens, sizes.dim, sizes.layers * sizes.passes
    keys, kind = count_keys(memory, sizes, chunk), "sparse" if memory.kind == "sparse" else "dense"
    rate = DENSE
    if kind == "sparse":  # tiles are padded to a power of two, on either side
        tile = math.prod(memory.tile)
        rate = SPARSE * (tile / (1 << (tile - 1).bit_length())) ** 2
    own = 4 * n * keys * dim / (rate * gpu.operations)
    text = 4 * n * sizes.text_tokens * dim / (DENSE * gpu.operations)
    return ChunkSeconds(
        products=passes * 2 * n * (6 * dim**2 + 2 * dim * sizes.ffn_dim) / (PRODUCTS * gpu.operations),
        attention=passes * (own + text),
        elementwise=passes * MOVED[kind] * n * dim * sizes.number_bytes / (ELEMENTWISE * gpu.bandwidth),
        gaps=passes * LAUNCHES[kind] * GAP_SECONDS,
    )
