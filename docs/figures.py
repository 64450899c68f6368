"""Draw the figures of docs/concepts.md from rollouts of the embedded model `tiny`: `python docs/figures.py`.

Attention to the past is measured on a rollout with the full cache: its memory is the ordinary dense one, which also
writes down where the attention of every clean pass goes, block by block.

Legend: H heads, n blocks of a chunk, N blocks of the video, L tokens of a chunk.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import torch
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from sparse_forcing import SparseForcingPipeline
from sparse_forcing.kernels.block_selection import block_scores, pool_blocks, select_blocks
from sparse_forcing.memory import DenseMemory, MemoryConfig, MemoryGeometry, RolloutMemory, SparseMemory
from sparse_forcing.memory.slots import gather_slots
from sparse_forcing.model.geometry import TileLayout
from sparse_forcing.sampling.noise import SeededNoise
from sparse_forcing.sampling.rollout import RolloutChunk, rollout

PROMPT = "a large yellow star orbits clockwise on a navy background"
DENSITY = 0.25
BLUE, AMBER, GREY = "#2f6fb2", "#f0a020", "#e4e4e8"
STYLE = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150}


class RecordingMemory(DenseMemory):
    """A dense memory that writes down the block attention of its clean passes.

    Attributes:
        mass: per layer, [H, n, blocks so far] of each chunk: the share of a query block's attention that a block gets.
        tokens: per layer, the last chunk's queries [H, L, D] and all keys [H, tokens, D], both in the order of blocks.
    """

    def __init__(self, config: MemoryConfig, geometry: MemoryGeometry, tile: tuple[int, int, int]) -> None:
        super().__init__(config, geometry)
        self.tiles = TileLayout(geometry.chunk_frames, geometry.rows, geometry.cols, tile)
        self.mass: list[list[Tensor]] = [[] for _ in range(geometry.num_layers)]
        self.tokens: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, clean: bool, **rest: Any) -> Tensor:
        out = super().attend(layer, query, key, value, clean=clean, **rest)
        if clean:
            q, k = self._in_blocks(query), self._in_blocks(self.cached(layer)[0])
            attention = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
            blocks = attention.unflatten(2, (-1, self.tiles.block_tokens)).sum(3)
            self.mass[layer].append(blocks.unflatten(1, (self.tiles.num_blocks, -1)).mean(2))
            self.tokens[layer] = q, k
        return out

    def _in_blocks(self, x: Tensor) -> Tensor:
        """[1, tokens, H, D] of whole chunks, frame by frame -> [H, tokens, D], block by block."""
        return (
            torch.cat([part[:, self.tiles.order] for part in x.split(self.tiles.num_tokens, 1)], 1)[0]
            .transpose(0, 1)
            .float()
        )

    def maps(self) -> Tensor:
        """[layers, H, N, N] block attention, 0 where a block lies in the future."""
        total = len(self.mass[0]) * self.tiles.num_blocks
        rows = [[torch.nn.functional.pad(part, (0, total - part.shape[-1])) for part in layer] for layer in self.mass]
        return torch.stack([torch.cat(layer, 1) for layer in rows])


class Tiny:
    """The embedded model and a seed: every figure shows the same kind of rollout."""

    def __init__(self, chunks: int, seed: int) -> None:
        self.pipe, self.chunks, self.seed = SparseForcingPipeline.from_pretrained("tiny"), chunks, seed
        self.memory = self.pipe.default_memory
        self.latent_size = self.pipe.geometry.latent_size(self.pipe.defaults.height, self.pipe.defaults.width)

    def geometry(self) -> MemoryGeometry:
        rows, cols = self.pipe.geometry.token_size(*self.latent_size)
        model = self.pipe.transformer.config
        return MemoryGeometry(
            rows=rows,
            cols=cols,
            num_layers=model.num_layers,
            chunk_frames=model.chunk_frames,
            horizon_frames=model.horizon_frames,
        )

    @torch.no_grad()
    def rollout(self, memory: RolloutMemory) -> Any:
        """Generate through `memory`, chunk by chunk."""
        noise = SeededNoise(
            [torch.Generator().manual_seed(self.seed)],
            (self.pipe.autoencoder.latent_channels, *self.latent_size),
            self.pipe.device,
            self.pipe.dtype,
        )
        chunks = [self.pipe.geometry.chunk_frames] * self.chunks
        yield from rollout(
            self.pipe.transformer, self.pipe.encode_prompt([PROMPT]), chunks, memory, noise, self.pipe.defaults.sampler
        )


def measure_dense(tiny: Tiny) -> RecordingMemory:
    """The block attention of a rollout with the full cache."""
    memory = RecordingMemory(MemoryConfig(kind="full"), tiny.geometry(), tiny.memory.tile)
    parts: list[RolloutChunk] = list(tiny.rollout(memory))
    assert len(parts) == tiny.chunks
    return memory


def window_mask(chunks: int, blocks: int, window_chunks: int) -> Tensor:
    """[N, N] bool: the pairs of blocks that lie within the local window."""
    chunk = torch.arange(chunks * blocks) // blocks
    age = chunk[:, None] - chunk[None]
    return (age >= 0) & (age < window_chunks)


def find_striped_and_diagonal(maps: Tensor, blocks: int, window: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """(layer, head) of the two heads that show the patterns best, by these measures rather than by eye.

    Stripes: how unevenly old blocks are attended to (spread of the columns' means, over their mean), times the share of
    the map's variance that the columns explain; both on the later half of the queries and the blocks that all of them
    have beyond their window. Diagonal: the share of attention that stays in the window and at the query's own place.
    """
    size, heads = maps.shape[-1], maps.shape[1]
    place = torch.arange(size) % blocks
    rows = maps[:, :, size // 2 :, : int(window[size // 2].int().argmax())]
    rows = rows / rows.mean(3, keepdim=True)
    columns = rows.mean(2)
    stripes = columns.std(-1) * columns.var(-1) / rows.flatten(2).var(-1)
    diagonal = (maps * (window & (place[:, None] == place[None]))).sum((2, 3)) / maps.sum((2, 3))
    first, second = divmod(int(stripes.argmax()), heads), divmod(int(diagonal.argmax()), heads)
    return first, second


def draw_attention(memory: RecordingMemory, window_chunks: int, target: Path) -> tuple[int, int]:
    """Attention to the whole history, of the head with the clearest stripes and the one with the clearest diagonal.

    Returns the latter as (layer, head).
    """
    maps, n = memory.maps(), memory.tiles.num_blocks
    chunks = maps.shape[-1] // n
    window = window_mask(chunks, n, window_chunks)
    striped, diagonal = find_striped_and_diagonal(maps, n, window)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.3), layout="constrained", sharey=True)
    titles = ("long-range: vertical stripes", "local: a diagonal")
    visible = (torch.arange(chunks).repeat_interleave(n) + 1)[:, None] * n
    future = np.repeat(np.repeat(np.triu(np.ones((chunks, chunks), bool), 1), n, 0), n, 1)
    for axis, (layer, head), title in zip(axes, (striped, diagonal), titles):
        relative = (maps[layer, head] * visible).numpy()
        shown = axis.imshow(
            np.ma.masked_array(relative, future),
            vmin=0,
            vmax=np.percentile(relative[~future], 99),
            cmap="magma_r",
            interpolation="nearest",
            extent=(0, chunks, chunks, 0),
        )
        for row in range(chunks):
            first = max(0, row - window_chunks + 1)
            axis.add_patch(Rectangle((first, row), row + 1 - first, 1, fill=False, edgecolor=BLUE, linewidth=0.7))
        axis.set(title=f"{title} (layer {layer + 1}, head {head + 1})", xlabel="key blocks, by chunk")
        bar = figure.colorbar(shown, ax=axis, shrink=0.8, extend="max")
    bar.set_label("attention, times that of a uniform spread")
    axes[0].set_ylabel("query blocks, by chunk")
    window_patch = Patch(facecolor="none", edgecolor=BLUE, label="local window")
    axes[1].legend(handles=[window_patch], loc="upper right", frameon=False)
    save(figure, target)
    return diagonal


def draw_selection(memory: RecordingMemory, head: tuple[int, int], window_chunks: int, target: Path) -> None:
    """One chunk's attention inside its window, and the blocks that a top-K of pooled scores keeps of it."""
    layer, index = head
    tiles, n = memory.tiles, memory.tiles.num_blocks
    size = window_chunks * n
    query, key = (x[None, index : index + 1] for x in memory.tokens[layer])
    query, key = (x.unflatten(2, (-1, tiles.block_tokens)) for x in (query, key[:, :, -size * tiles.block_tokens :]))
    scores = block_scores(pool_blocks(query), pool_blocks(key))
    top_k = max(1, round(DENSITY * size))
    chosen = select_blocks(scores, top_k, torch.arange(size - n, size))[0, 0]
    mass = memory.mass[layer][-1][index, :, -size:]
    mass = mass / mass.sum(1, keepdim=True)
    kept = torch.zeros_like(mass).scatter(1, chosen.long(), 1.0)
    recall = float((mass * kept).sum(1).mean())
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained", sharey=True)
    for axis, shown, title in (
        (axes[0], mass, "attention inside the window"),
        (axes[1], mass * kept, f"the {top_k} of {size} blocks with the best scores: {recall:.0%} of it"),
    ):
        image = axis.imshow(shown.numpy(), vmin=0, vmax=float(mass.max()), cmap="magma_r", interpolation="nearest")
        axis.set(title=title, xlabel="key blocks of the window", xticks=range(0, size, 2), yticks=range(0, n, 2))
        axis.axvline(size - n - 0.5, color="black", linewidth=0.8, linestyle=":")
    for row, columns in enumerate(chosen.tolist()):
        for column in columns:
            axes[1].add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=BLUE, linewidth=1.1))
    axes[0].set_ylabel("query blocks")
    figure.colorbar(image, ax=axes, shrink=0.9).set_label("share of the row")
    save(figure, target)


def draw_memory(tiny: Tiny, target: Path) -> None:
    """What two heads of the sparse memory hold as the video goes on, of all heads the one whose persistent blocks are
    oldest, and the one in the middle."""
    memory = SparseMemory(tiny.memory, tiny.geometry(), selectors=tiny.pipe.transformer.selectors)
    persistent, window = [], []  # per chunk, [layers, H, blocks] numbers of blocks
    for _ in tiny.rollout(memory):
        states = [state for state in memory.layers if state is not None]
        persistent.append(torch.stack([gather_slots(state.origin, state.persistent)[0] for state in states]))
        window.append(torch.stack([gather_slots(state.origin, state.window)[0] for state in states]))
    n = memory.layout.num_blocks
    ages = [index - kept.float() // n for index, kept in enumerate(persistent) if kept.shape[2]]
    age = torch.stack([part.mean(2) for part in ages]).mean(0)  # [layers, H]
    order = age.flatten().argsort(descending=True)
    heads = [divmod(int(order[place]), age.shape[1]) for place in (0, len(order) // 2)]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
    for axis, (layer, head) in zip(axes, heads):
        held = [(kept[layer, head], recent[layer, head]) for kept, recent in zip(persistent, window)]
        _draw_held(axis, held, n)
        axis.set_title(f"layer {layer + 1}, head {head + 1}: {age[layer, head]:.1f} chunks old on average")
    axes[0].set_ylabel("chunk being generated")
    names = (("local window", BLUE), ("persistent", AMBER), ("dropped", GREY))
    axes[1].legend(handles=[Patch(color=color, label=name) for name, color in names], loc="upper right", frameon=False)
    save(figure, target)


def _draw_held(axis: Any, held: list[tuple[Tensor, Tensor]], blocks: int) -> None:
    """A row for every chunk: which blocks of the video are (persistent, in the window), by their numbers."""
    chunks = len(held)
    picture = (np.arange(chunks * blocks) // blocks <= np.arange(chunks)[:, None]).astype(int)  # 0 future, 1 dropped
    for row, (persistent, window) in enumerate(held):
        picture[row, window], picture[row, persistent] = 2, 3
    colors = ListedColormap(["white", GREY, BLUE, AMBER])
    axis.imshow(
        picture,
        cmap=colors,
        norm=BoundaryNorm(range(5), 4),
        aspect="auto",
        interpolation="nearest",
        extent=(0, chunks, chunks, 0),
    )
    axis.hlines(range(1, chunks), 0, chunks, color="white", linewidth=0.6)
    axis.set_xlabel("blocks of the video, by their chunk")


def draw_overlay(tiny: Tiny, target: Path) -> None:
    """Frames of a video, and under them where in the picture the persistent blocks come from."""
    generator = torch.Generator().manual_seed(tiny.seed)
    frames = tiny.pipe.geometry.chunk_pixel_frames * tiny.chunks
    chunks = list(tiny.pipe.stream(PROMPT, num_frames=frames, generator=generator))
    chosen = [chunks[i] for i in np.linspace(min(3, len(chunks) - 1), len(chunks) - 1, 6).astype(int)]
    figure, axes = plt.subplots(2, len(chosen), figsize=(9, 3.2), layout="constrained")
    for column, chunk in zip(axes.T, chosen):
        frame = chunk.frames[-1]
        column[0].imshow(frame, interpolation="nearest")
        column[1].imshow(frame.mean(-1), cmap="gray", vmin=0, vmax=1.5, interpolation="nearest")
        if chunk.persistent is not None:
            shown = column[1].imshow(chunk.persistent[-1], cmap="inferno", vmin=0, vmax=0.8, alpha=0.6)
        for axis in column:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        column[0].set_title(f"{(chunk.index + 1) * len(chunk.frames) / tiny.pipe.fps:.0f} s")
    bar = figure.colorbar(shown, ax=axes[1], shrink=0.9)
    bar.set_label("heads that keep\na block from here")
    bar.formatter = matplotlib.ticker.PercentFormatter(1)
    save(figure, target)


def save(figure: Any, target: Path) -> None:
    figure.savefig(target, metadata={"Software": None})
    plt.close(figure)
    print(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "figures")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(STYLE)
    tiny = Tiny(arguments.chunks, arguments.seed)
    window_chunks = tiny.memory.window_frames // tiny.pipe.geometry.chunk_frames
    dense = measure_dense(tiny)
    head = draw_attention(dense, window_chunks, arguments.output / "attention.png")
    draw_selection(dense, head, window_chunks, arguments.output / "selection.png")
    draw_memory(tiny, arguments.output / "memory.png")
    draw_overlay(tiny, arguments.output / "overlay.png")


if __name__ == "__main__":
    main()
