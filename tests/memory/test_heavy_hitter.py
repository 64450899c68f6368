"""Heavy hitters: which tokens stay, where their keys are in time, what they cost; training through them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_forcing.memory import HeavyHitterMemory, MemoryConfig, MemoryGeometry
from sparse_forcing.memory.heavy_hitter import attention_mass
from sparse_forcing.model.attention import ParallelAttention
from sparse_forcing.model.rope import apply_rotary, rotary_table

from .conftest import CHANNELS, CHUNK, COLS, ROWS
from .test_cached_equals_parallel import CHUNKS, FRAMES, cached_flows, parallel_flow

BATCH, HEADS, DIM = 2, 3, 16


def config(tokens: int, window: int, **knobs) -> MemoryConfig:
    return MemoryConfig(kind="heavy_hitter", persistent_blocks=tokens, tile=(1, 1, 1), window_frames=window, **knobs)


def made(memory: MemoryConfig, rows: int, cols: int, chunk: int = 2, horizon: int = 100) -> HeavyHitterMemory:
    geometry = MemoryGeometry(rows=rows, cols=cols, num_layers=1, chunk_frames=chunk, horizon_frames=horizon)
    return HeavyHitterMemory(memory, geometry)


class Feed:
    """Feeds chunks straight into a one-layer memory; a value is the number of its token since the video began."""

    def __init__(self, memory: HeavyHitterMemory) -> None:
        self.memory, self.seen = memory, 0
        self.generator = torch.Generator().manual_seed(7)

    def normal(self, tokens: int) -> Tensor:
        return torch.randn(BATCH, tokens, HEADS, DIM, generator=self.generator, dtype=torch.float64)

    def chunk(self, frames: int, query: Tensor | None = None, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Denoising with other queries and keys first, then the clean pass; returns its queries and keys."""
        tokens = frames * self.memory.geometry.tokens_per_frame
        self.memory.begin_chunk(frames)
        value = torch.arange(self.seen, self.seen + tokens, dtype=torch.float64)
        value = value[None, :, None, None].expand(BATCH, -1, HEADS, DIM)
        self.memory.attend(0, 9 * self.normal(tokens), self.normal(tokens), value, clean=False)
        query = 3 * self.normal(tokens) if query is None else query
        key = self.normal(tokens) if key is None else key
        self.memory.attend(0, query, key, value, clean=True)
        self.seen += tokens
        return query, key

    def numbers(self) -> Tensor:
        """[B, H, S] tokens in the cache, the current chunk's last."""
        return self.memory.cached(0)[1][..., 0].transpose(1, 2).long()

    def heavy(self) -> Tensor:
        return self.numbers()[:, :, : self.memory.num_heavy]


def plain_winners(chunks: list[tuple[Tensor, Tensor]], window: list[int], budget: int, b: int, h: int) -> list[int]:
    """Heavy hitters of one head by a loop over queries: dictionaries, no tensors of state.

    chunks: queries and keys of every clean pass; window: for each chunk, the first token inside the window then.
    """
    keys: list[Tensor] = []
    mass: dict[int, float] = {}
    kept: list[int] = []
    for (query, key), first in zip(chunks, window):
        leaving = [token for token in sorted(mass) if token < first and token not in kept]
        kept = sorted(sorted(kept + leaving, key=lambda token: (-mass[token], token))[:budget])
        keys += list(key[b, :, h])
        visible = kept + list(range(first, len(keys)))
        mass = {token: mass.get(token, 0.0) for token in visible}
        for row in query[b, :, h]:
            weights = [math.exp(float(row @ keys[token]) / math.sqrt(DIM)) for token in visible]
            for token, weight in zip(visible, weights):
                mass[token] += weight / sum(weights)
    return kept


@pytest.mark.parametrize(
    ("rows", "cols", "frames", "window", "budget"),
    [
        (1, 5, [2, 2, 2, 2, 2], 4, 7),
        (2, 3, [1, 3, 3, 3], 5, 11),  # a short first chunk; the window cuts chunks
        (3, 1, [2, 2, 2, 2], 2, 4),  # nothing but the current chunk
        (1, 2, [3, 3, 3], 4, 100),  # more room than tokens
    ],
)
def test_winners_are_the_heaviest_by_a_plain_computation(rows, cols, frames, window, budget) -> None:
    feed = Feed(made(config(budget, window, positions="absolute"), rows, cols, chunk=max(frames)))
    chunks, firsts = [], []
    for count, chunk in enumerate(frames, 1):
        chunks.append(feed.chunk(chunk))
        firsts.append(max(0, sum(frames[:count]) - window) * rows * cols)
        found = feed.heavy()
        for b in range(BATCH):
            for h in range(HEADS):
                assert found[b, h].tolist() == plain_winners(chunks, firsts, budget, b, h)
        newest = torch.arange(firsts[-1], feed.seen)
        assert (feed.numbers()[:, :, feed.memory.num_heavy :] == newest).all(), "the window holds the newest tokens"
    if budget < 100:
        assert len({tuple(x) for x in found.flatten(0, 1).tolist()}) > 1, "heads choose on their own"


def test_equal_tokens_keep_the_earlier_one() -> None:
    """Queries of zeros give every visible token the same."""
    feed = Feed(made(config(7, 2), 2, 2))
    for _ in range(4):
        feed.chunk(2, query=torch.zeros(BATCH, 8, HEADS, DIM, dtype=torch.float64))
    assert (feed.heavy() == torch.arange(7)).all()


def test_each_head_keeps_what_its_own_queries_look_at() -> None:
    feed = Feed(made(config(2, 2), 2, 3))
    query, key = torch.zeros(2, BATCH, 12, HEADS, DIM, dtype=torch.float64)
    query[..., 0] = 8
    stars = torch.tensor([[1, 7], [0, 11], [4, 5]])
    for h in range(HEADS):
        key[:, stars[h], h, 0] = 8
    feed.chunk(2, query, key)
    for _ in range(3):  # later chunks have no such tokens, and go on looking at the old ones
        feed.chunk(2, query, torch.zeros_like(key))
    assert (feed.heavy() == stars).all()


def test_attention_mass_in_pieces_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 13, 3, 8), torch.randn(2, 29, 3, 8)
    expected = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1) / math.sqrt(8)).softmax(-1).sum(2)
    for scores in (1, 4 * 29, 1 << 16):
        monkeypatch.setattr("sparse_forcing.memory.heavy_hitter.PIECE_SCORES", scores)
        torch.testing.assert_close(attention_mass(query, key), expected, rtol=1e-5, atol=1e-6)
    rounded = attention_mass(query.bfloat16(), key.bfloat16())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.sum(-1), torch.full((2, 3), 13.0))


def test_keys_move_in_time_down_to_their_own_frame_of_a_chunk() -> None:
    """Horizon of three chunks: keys of the window stay right before the chunk, older ones at a bounded distance."""
    rows, cols, n = 2, 3, 6
    feed = Feed(made(config(9, 4, positions="relative"), rows, cols, horizon=6))
    raw: list[Tensor] = []
    for chunk in range(8):
        start = min(2 * chunk, 4)
        raw.append(feed.normal(2 * n))
        feed.chunk(
            2, key=apply_rotary(raw[-1], rotary_table(torch.arange(start, start + 2), rows, cols, DIM, torch.float64))
        )
        assert feed.memory.chunk_position == start
    plain, numbers = torch.cat(raw, 1), feed.numbers()
    # A window's token moves with its chunk; an older one went on moving until its chunk was at the very beginning.
    frames = numbers // n - 2 * 7 + 4
    frames = torch.where(torch.arange(frames.shape[2]) < feed.memory.num_heavy, numbers // n % 2, frames)
    for b in range(BATCH):
        for h in range(HEADS):
            for slot, token in enumerate(numbers[b, h].tolist()):
                table = rotary_table(frames[b, h, slot : slot + 1], rows, cols, DIM, torch.float64)
                table = type(table)(*(x[token % n, None] for x in table))
                expected = apply_rotary(plain[b, token, h][None, None], table)[0, 0]
                torch.testing.assert_close(feed.memory.cached(0)[0][b, slot, h], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rows", "cols", "window", "budget"), [(2, 3, 4, 5), (1, 7, 3, 20), (3, 3, 2, 0)])
def test_budget_holds_and_bytes_are_flat_and_exact(rows: int, cols: int, window: int, budget: int) -> None:
    feed, n, sizes = Feed(made(config(budget, window), rows, cols, horizon=8)), rows * cols, []
    for _ in range(9):
        feed.chunk(2)
        left = max(0, feed.seen - window * n)
        assert feed.heavy().shape == (BATCH, HEADS, min(budget, left))
        sizes.append(feed.memory.cache_bytes)
    full = budget + window * n
    assert sizes[-1] == BATCH * HEADS * (full * (2 * DIM * 8 + 8) + budget * 2 * 4)  # keys, values, mass; two tables
    filled = math.ceil((budget / n + window) / 2)
    assert len(set(sizes[filled:])) == 1
    assert (sizes[0] < sizes[-1]) == (full > 2 * n)


def test_as_many_keys_and_values_as_the_sparse_memory(run) -> None:
    sparse = MemoryConfig(tile=(3, 2, 3), window_frames=6, persistent_blocks=3)
    run(sparse, 6)
    expected = [state.keys.nbytes + state.values.nbytes for state in run.memory.layers]
    run(replace(sparse, kind="heavy_hitter"), 6)
    assert [sum(x.nbytes for x in run.memory.cached(layer)) for layer in range(2)] == expected


@pytest.mark.parametrize("window", [3, 5, 6])
def test_without_heavy_hitters_it_is_a_window_and_with_all_of_them_everything(run, window: int) -> None:
    expected = run(MemoryConfig(kind="window", window_frames=window), 5)
    torch.testing.assert_close(run(config(0, window), 5), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(run(config(500, window), 5), run(MemoryConfig(kind="full"), 5), rtol=1e-10, atol=1e-10)
    assert (run(config(20, window), 5) - expected).abs().max() > 1e-6


class Recording(HeavyHitterMemory):
    """Notes the heavy hitters of every layer and chunk as numbers of tokens (with absolute positions)."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.record: dict[tuple[int, int], Tensor] = {}

    def attend(self, layer, query, key, value, *, clean, choices=None, ends=False):
        if self.num_heavy:
            tables, n = self.tables[layer], self.geometry.tokens_per_frame
            self.record[layer, self.next_frame // CHUNK] = (tables.position * n + tables.place % n).long()
        return super().attend(layer, query, key, value, clean=clean)


class RecordedMask(ParallelAttention):
    """[clean | noisy] attention under the recorded tokens and the window, as one dense masked softmax per layer."""

    def __init__(self, memory: Recording) -> None:
        super().__init__(2 * FRAMES, None, torch.arange(FRAMES).repeat(2))
        self.memory = memory

    def attend(self, layer, query, key, value):
        n, window = ROWS * COLS, self.memory.config.window_frames
        (batch, _, heads, _), half = query.shape, FRAMES * n
        mask = torch.zeros(batch, heads, 2 * half, 2 * half, dtype=torch.bool)
        for chunk in range(CHUNKS):
            start, end = chunk * CHUNK * n, (chunk + 1) * CHUNK * n
            seen = torch.zeros(batch, heads, 1, half, dtype=torch.bool)
            seen[..., max(0, end - window * n) : start] = True
            if (layer, chunk) in self.memory.record:
                seen.scatter_(3, self.memory.record[layer, chunk].unsqueeze(2), True)
            for offset in (0, half):
                rows = slice(start + offset, end + offset)
                mask[:, :, rows, :half] = seen
                mask[:, :, rows, rows] = True
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize(("tokens", "window"), [(31, 6), (10, 7), (5, 3)])
@torch.no_grad()
def test_cached_equals_parallel_under_the_same_tokens(run, tokens: int, window: int) -> None:
    torch.manual_seed(3)
    latents = torch.randn(2, 2, CHANNELS, FRAMES, 2 * ROWS, 2 * COLS, dtype=torch.float64)
    chosen = config(tokens, window, positions="absolute")
    memory = Recording(chosen, run.make(chosen).geometry)
    flows = cached_flows(run, memory, *latents)
    assert len(memory.record) == 2 * (CHUNKS - math.ceil(window / CHUNK) + (window % CHUNK > 0))
    expected = parallel_flow(run, RecordedMask(memory), *latents)
    torch.testing.assert_close(flows, expected, rtol=1e-10, atol=1e-10)


def gradients(run, memory_config: MemoryConfig, cache_gradient: str, checkpointing: bool = False) -> list[Tensor]:
    """Gradients of every parameter from six chunks of a training rollout, beyond a horizon of four."""
    memory = run.make(memory_config, cache_gradient=cache_gradient, horizon=12)
    torch.manual_seed(5)
    latents = torch.randn(6, 2, CHANNELS, CHUNK, 2 * ROWS, 2 * COLS, dtype=torch.float64)
    time = torch.full((2,), 600.0, dtype=torch.float64)
    run.model.gradient_checkpointing = checkpointing
    try:
        loss = torch.zeros((), dtype=torch.float64)
        for x in latents:
            memory.begin_chunk(CHUNK)
            loss = loss + run.model(x, time, run.text, policy=memory.denoising_pass()).square().mean()
            with torch.no_grad():
                run.model(0.9 * x, 0 * time, run.text, policy=memory.clean_pass())
        run.model.zero_grad()
        loss.backward()
    finally:
        run.model.gradient_checkpointing = False
    return [p.grad.clone() for p in run.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("cache_gradient", ["detached", "straight_through"])
def test_training_through_it(run, cache_gradient: str) -> None:
    """Checkpointing changes nothing; nothing kept is a window; what is kept changes the gradients."""
    heavy = config(20, 6)
    found = gradients(run, heavy, cache_gradient)
    for a, b in zip(gradients(run, heavy, cache_gradient, checkpointing=True), found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    window = gradients(run, MemoryConfig(kind="window", window_frames=6), cache_gradient)
    for a, b in zip(gradients(run, config(0, 6), cache_gradient), window, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert max(float((a - b).abs().max()) for a, b in zip(found, window)) > 1e-6


def test_map_shows_where_the_tokens_come_from() -> None:
    feed = Feed(made(config(2, 2), 2, 3))
    query, key = torch.zeros(2, BATCH, 12, HEADS, DIM, dtype=torch.float64)
    query[..., 0], key[:, 4, :, 0], key[:, 11, 0, 0], key[:, 7, 1:, 0] = 8, 8, 8, 8
    feed.chunk(2, query, key)
    assert feed.memory.persistent_map() is None
    feed.chunk(2, query, torch.zeros_like(key))
    expected = torch.zeros(12)
    expected[[4, 11, 7]] = torch.tensor([1, 1 / 3, 2 / 3])
    torch.testing.assert_close(feed.memory.persistent_map(), expected.view(2, 2, 3))
