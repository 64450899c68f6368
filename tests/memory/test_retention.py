"""Every rule of retention goes through the same table, beside what each of them promises alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig, MemoryGeometry, SparseMemory, make_memory
from sparse_forcing.memory.retention import RULES, BlockView
from sparse_forcing.memory.retention.diversity import cosines, eliminate
from sparse_forcing.memory.retention.learned import RetentionTeacher
from sparse_forcing.memory.retention.oracle import AttentionRecorder, OracleRule
from sparse_forcing.model.selector import BlockSelector
from sparse_forcing.model.transformer import CausalWanTransformer3DModel

from .conftest import CHUNK, LAYERS
from .retention_references import REFERENCES, Block, Moment

EVEN, RAGGED, THIN = (3, 2, 3), (2, 3, 4), (1, 2, 6)
NAMES = sorted(RULES)
every_rule = pytest.mark.parametrize("name", NAMES)


def config(name: str, tile: tuple[int, int, int] = EVEN, **knobs) -> MemoryConfig:
    return MemoryConfig(
        **{"tile": tile, "window_frames": 6, "density": 0.5, "persistent_blocks": 3, "retention": name} | knobs
    )


def selectors(settings: MemoryConfig, head_dim: int) -> list[BlockSelector] | None:
    """What a rule that learns needs of a model: selectors whose retention heads say something."""
    if not RULES[settings.retention].learned:
        return None
    torch.manual_seed(3)
    made = [
        BlockSelector(2, math.prod(settings.tile), head_dim, learned_retention=True).double() for _ in range(LAYERS)
    ]
    for selector in made:
        torch.nn.init.normal_(selector.retention.out)
    return made


def kept(memory: SparseMemory) -> Tensor:
    """[layers, B, H, P] numbers of the persistent blocks."""
    return torch.stack([state.origin.gather(2, state.persistent) for state in memory.layers])


class Feed:
    """Random queries, keys and values straight into a memory of one layer: what a rule sees without a model around it.

    `seen` [chunk] holds the three [B, L, H, D]; batch and dtype may be changed without changing a sample's numbers.
    """

    rows, cols, heads, dim = 4, 6, 2, 8

    def __init__(self, settings: MemoryConfig, *, batch: int = 2, dtype: torch.dtype = torch.float32, **kwargs) -> None:
        geometry = MemoryGeometry(
            rows=self.rows, cols=self.cols, num_layers=LAYERS, chunk_frames=CHUNK, horizon_frames=12
        )
        kwargs = {"selectors": selectors(settings, self.dim)} | kwargs
        memory = make_memory(settings, geometry, backend="reference", **kwargs)
        assert isinstance(memory, SparseMemory)
        self.memory = memory
        self.batch, self.dtype = batch, dtype
        self.seen: list[tuple[Tensor, ...]] = []
        self.record: list[list[Tensor]] = []

    def tokens(self, frames: int, chunk: int) -> tuple[Tensor, ...]:
        shape = (frames * self.rows * self.cols, self.heads, self.dim)
        samples = [torch.randn(3, *shape, generator=torch.Generator().manual_seed(chunk + 100 * i)) for i in (0, 1)]
        return tuple(x.to(self.dtype) for x in torch.stack(samples[: self.batch], 1))

    def __call__(self, chunks: int | list[int]) -> Feed:
        """Go on for some chunks (or chunks of these lengths); `record` [chunk][layer] is what persists in each."""
        for frames in [CHUNK] * chunks if isinstance(chunks, int) else chunks:
            self.memory.begin_chunk(frames)
            self.seen.append(self.tokens(frames, len(self.seen)))
            for layer in range(LAYERS):
                for clean in (False, True):
                    policy = self.memory.clean_pass() if clean else self.memory.denoising_pass()
                    policy.attend(layer, *self.seen[-1])
            self.record.append(list(kept(self.memory)))
        return self


@every_rule
@pytest.mark.parametrize("capacity", [0, 1, 5, 200])
def test_the_set_is_bounded_and_holds_what_left_the_window(name: str, capacity: int) -> None:
    """200 blocks are more than ever leave: nothing may be lost then."""
    feed = Feed(config(name, persistent_blocks=capacity))(6)
    left = 4 * feed.memory.layout.num_blocks
    numbers, size = kept(feed.memory), feed.memory.cache_bytes
    assert numbers.shape[-1] == min(capacity, left)
    assert (numbers < left).all()
    assert (numbers.diff(dim=-1) > 0).all(), "in the order of time, none twice"
    assert feed(3).memory.cache_bytes == size or capacity == 200


@every_rule
def test_what_is_gone_never_comes_back(name: str) -> None:
    feed = Feed(config(name, THIN, persistent_blocks=7))(7)
    n = feed.memory.layout.num_blocks
    for chunk in range(3, 7):
        leaving = range((chunk - 2) * n, (chunk - 1) * n)
        for old, new in zip(feed.record[chunk - 1], feed.record[chunk]):
            for before, after in zip(old.flatten(0, 1).tolist(), new.flatten(0, 1).tolist()):
                assert set(after) <= {*before, *leaving}


@every_rule
@pytest.mark.parametrize(("tile", "dtype"), [(EVEN, torch.float32), (RAGGED, torch.bfloat16)])
def test_choices_repeat_and_do_not_depend_on_the_batch(
    name: str, tile: tuple[int, int, int], dtype: torch.dtype
) -> None:
    first, again = (Feed(config(name, tile), dtype=dtype)(6) for _ in range(2))
    alone = Feed(config(name, tile), dtype=dtype, batch=1)(6)
    for a, b, c in zip(first.record, again.record, alone.record):
        for x, y, z in zip(a, b, c):
            assert torch.equal(x, y)
            assert torch.equal(x[:1], z)


@every_rule
@pytest.mark.parametrize(
    ("cache_gradient", "tile"), [("detached", RAGGED), ("straight_through", EVEN), ("clean", EVEN)]
)
def test_training_keeps_the_blocks_of_inference(
    run, name: str, cache_gradient: str, tile: tuple[int, int, int]
) -> None:
    settings = config(name, tile, positions="relative")
    learned = selectors(settings, 16)
    expected = run(settings, 6, horizon=9, selectors=learned)
    blocks = kept(run.memory)
    found = run(settings, 6, horizon=9, selectors=learned, cache_gradient=cache_gradient)
    assert torch.equal(kept(run.memory), blocks)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every_rule
def test_checkpointed_gradients_see_the_blocks_of_their_pass(run, name: str) -> None:
    """A layer that is run again in the backward pass, when the memory has moved on, has the gradients of the first."""
    from .test_history import gradients

    found = []
    for checkpointing in (False, True):
        run.model.gradient_checkpointing = checkpointing
        try:
            memory = run.make(config(name), cache_gradient="detached", horizon=9, selectors=selectors(config(name), 16))
            found.append(gradients(run, memory, 5))
        finally:
            run.model.gradient_checkpointing = False
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def moment_of(feed: Feed, layer: int, sample: int, head: int, known: dict[int, Block]) -> Moment:
    """After the last chunk; its blocks join those `known`."""
    memory, n = feed.memory, feed.memory.layout.num_blocks
    state, layout, selection = memory.layers[layer], memory.layout, memory.selection
    query, key, value = (layout.to_blocks(x)[sample, head] for x in feed.seen[-1])
    sizes, first = layout.sizes.tolist(), (len(feed.seen) - 1) * n
    for i, size in enumerate(sizes):
        frame = memory.chunk_position + int(layout.first_frame[i])
        known[first + i] = Block(first + i, frame, key[i, :size], value[i, :size])
    numbers = state.origin.gather(2, state.slots)[sample, head].tolist()
    pooled = selection.pool(layout, layer, layout.to_blocks(feed.seen[-1][0]), "query")
    slots = selection.lists(state, selection.compare(layer, state, pooled, again=False)[1])[sample, head].long()
    lists = [set(row) for row in state.origin[sample, head][slots].tolist()]
    made = selection.selectors
    return Moment(
        [query[i, :size] for i, size in enumerate(sizes)],
        [known[number] for number in numbers],
        state.persistent.shape[2],
        memory.plan.frame_blocks,
        lists,
        layer,
        head,
        made and made[layer].retention,
    )


@every_rule
@pytest.mark.parametrize("tile", [EVEN, RAGGED, THIN])
def test_the_choice_is_that_of_a_slow_plain_reference(name: str, tile: tuple[int, int, int]) -> None:
    settings = config(name, tile, persistent_blocks=5, positions="absolute", retention_seed=3)
    feed = Feed(settings, dtype=torch.float64)
    plain = {
        (layer, b, h): (REFERENCES[name](settings), {})
        for layer in range(LAYERS)
        for b in range(2)
        for h in range(Feed.heads)
    }
    expected: dict[tuple[int, int, int], set[int]] = {}
    for _ in range(5):
        feed(1)
        if expected:
            for (layer, b, h), numbers in expected.items():
                assert set(feed.record[-1][layer][b, h].tolist()) == numbers, (layer, b, h)
        for (layer, b, h), (rule, blocks) in plain.items():
            moment = moment_of(feed, layer, b, h, blocks)
            rule.observe(moment)
            per_chunk = feed.memory.layout.num_blocks
            leaving = per_chunk if len(feed.seen) >= 2 else 0
            candidates = moment.blocks[: moment.persistent + leaving]
            if len(candidates) > 5:
                expected[layer, b, h] = rule.keep(moment, candidates, 5)
            else:
                expected[layer, b, h] = {block.number for block in candidates}


@every_rule
def test_a_short_first_chunk_and_long_rollouts(name: str) -> None:
    """Two dozen chunks are six horizons; every number stays finite."""
    feed = Feed(config(name, THIN, persistent_blocks=4, positions="relative"))([1] + [CHUNK] * 24)
    assert kept(feed.memory).shape[-1] == 4
    for state in feed.memory.layers:
        assert state.retained.isfinite().all()
        assert state.keys.isfinite().all()


@every_rule
def test_state_of_a_slot_begins_anew_with_its_block(name: str) -> None:
    feed = Feed(config(name, persistent_blocks=2))(7)
    feed.memory.begin_chunk(CHUNK)
    for state in feed.memory.layers:
        own = state.own_slots(feed.memory.layout)
        fresh = state.retained.gather(2, own[..., None].expand(*own.shape, state.retained.shape[-1]))
        assert (fresh == RULES[name].fresh).all()


def test_every_rule_has_a_reference() -> None:
    assert set(REFERENCES) == set(RULES)


def test_settings_of_rules_are_checked() -> None:
    for knobs in ({"retention_decay": 1.5}, {"retention_weight": -0.1}, {"retention": "newest"}):
        with pytest.raises(ConfigError, match=next(iter(knobs))):
            MemoryConfig(**knobs)


# Each rule alone.


def view(values: Tensor, **suppliers: Tensor) -> BlockView:
    """Blocks whose mean values [B, H, N, D] are given."""
    shape = values.shape[:3]
    found = {"pooled_values": values} | suppliers
    return BlockView(
        layer=0,
        chunk=5,
        frame_blocks=1,
        num_persistent=0,
        origin=torch.arange(shape[2]).expand(shape),
        first_frame=torch.zeros(shape),
        state=torch.zeros(*shape, 1),
        suppliers={name: lambda x=x: x for name, x in found.items()},
    )


def test_first_and_recent_are_exact() -> None:
    n, after = 4, 8
    for name, numbers in (("first", range(5)), ("recent", range(6 * n - 5, 6 * n))):
        feed = Feed(config(name, persistent_blocks=5))(after)
        assert feed.memory.layout.num_blocks == n
        assert (kept(feed.memory) == torch.tensor(list(numbers))).all()


def test_random_is_a_uniform_sample_of_all_that_left() -> None:
    """Chi-squared over 800 seeds and heads: each of 48 blocks is kept equally often, whenever it left."""
    counts, capacity, trials = torch.zeros(48), 6, 400
    for seed in range(trials):
        rule = RULES["random"](MemoryConfig(retention="random", retention_seed=seed))
        numbers = torch.arange(48).expand(1, 2, 48)
        chosen = torch.zeros(1, 2, 0, dtype=torch.long)
        for chunk in numbers.split(8, -1):  # as the memory does it
            candidates = torch.cat([chosen, chunk], -1)
            blocks = replace(view(torch.zeros(*candidates.shape, 1)), origin=candidates)
            best = rule.scores(blocks, capacity).topk(min(capacity, candidates.shape[-1])).indices
            chosen = candidates.gather(-1, best)
        counts += torch.bincount(chosen.flatten(), minlength=48)
    expected = 2 * trials * capacity / 48
    spread = ((counts - expected) ** 2 / (expected * (1 - capacity / 48))).sum()
    assert 20 < spread < 83, "chi-squared with 47 degrees of freedom: 0.1 % on either side"


def test_random_differs_between_heads_layers_and_seeds() -> None:
    choices = [
        kept(Feed(config("random", THIN, retention_seed=seed, persistent_blocks=8))(8).memory) for seed in (1, 2)
    ]
    assert not torch.equal(choices[0], choices[1])
    assert not torch.equal(choices[0][0], choices[0][1])
    assert not torch.equal(choices[0][:, :, 0], choices[0][:, :, 1])
    assert torch.equal(choices[0][:, 0], choices[0][:, 1]), "and not between the videos of a batch"


def test_diversity_keeps_the_odd_block_and_one_of_two_equals() -> None:
    torch.manual_seed(0)
    ground, odd = torch.randn(16), torch.randn(16)
    values = (ground + 0.01 * torch.randn(1, 1, 12, 16)).clone()
    values[:, :, 4] = values[:, :, 9] = odd
    rule = RULES["diversity"](MemoryConfig())
    chosen = rule.scores(view(values), 2)[0, 0].nonzero().flatten().tolist()
    assert len(chosen) == 2
    assert 4 in chosen, "the first of the two equals"
    assert 9 not in chosen


def test_elimination_of_thousands_is_that_of_the_plain_loop() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(1, 1, 1200, 4, dtype=torch.float64)
    similarity = cosines(vectors)
    found = eliminate(similarity, 1150)[0, 0]
    left, matrix = list(range(1200)), similarity[0, 0].clone().fill_diagonal_(-9)
    for _ in range(50):
        part = matrix[left][:, left].amax(-1)
        worst = max(range(len(left)), key=lambda i: (float(part[i]), i))
        del left[worst]
    assert found.nonzero().flatten().tolist() == left


def test_combined_lies_between_its_two_parts() -> None:
    runs = {
        weight: kept(Feed(config("combined", THIN, retention_weight=weight, persistent_blocks=8))(8).memory)
        for weight in (0.0, 0.5, 1.0)
    }
    assert torch.equal(runs[0.0], kept(Feed(config("diversity", THIN, persistent_blocks=8))(8).memory))
    assert torch.equal(runs[1.0], kept(Feed(config("accumulated", THIN, persistent_blocks=8))(8).memory))
    assert not torch.equal(runs[0.5], runs[0.0])
    assert not torch.equal(runs[0.5], runs[1.0])


def test_change_keeps_what_moved() -> None:
    """Two places, six steps in time; the second place is still but between the third and the fourth step."""
    values = torch.ones(1, 1, 12, 4)
    values[:, :, 7::2] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    rule = RULES["change"](MemoryConfig())
    blocks = replace(view(values), frame_blocks=2)
    worth = rule.scores(replace(blocks, state=rule.observe(blocks)), 2)
    assert worth[0, 0].topk(2).indices.sort().values.tolist() == [5, 7]
    assert worth[0, 0].count_nonzero() == 2


def test_the_oracle_keeps_what_a_full_cache_attends_to_later() -> None:
    everything = config("mass", density=1.0, persistent_blocks=200)
    recorder = AttentionRecorder(everything)
    full = Feed(everything, rule=recorder)(8)
    full.memory.begin_chunk(CHUNK)  # the last chunk is noted
    future = {key: recorder.later(*key) for key in recorder.noted}
    n = full.memory.layout.num_blocks
    assert future[0, 3].shape == (2, Feed.heads, 4 * n)
    settings = config("paper", persistent_blocks=3)
    feed = Feed(settings, rule=OracleRule(settings, future))(5)
    worth = future[1, 3]  # when the fifth chunk begins, the fourth is finished and the first three have left
    chosen = kept(feed.memory)[1]
    assert worth[..., : 3 * n].gather(2, chosen).sum() > worth[..., : 3 * n].mean() * chosen.numel()
    candidates = torch.cat([feed.record[3][1], torch.arange(2 * n, 3 * n).expand(2, Feed.heads, n)], 2)
    best = candidates.gather(2, worth.gather(2, candidates).topk(3).indices).sort(-1).values
    assert torch.equal(chosen, best)


def test_a_head_learns_from_a_memory_of_everything_what_will_be_attended_to() -> None:
    """Every fourth block has keys that all queries look for; only old attention and its key tell which."""
    everything = config("learned", density=1.0, persistent_blocks=200)
    made = selectors(everything, Feed.dim)
    assert made is not None
    teacher = RetentionTeacher(everything)
    Wanted(everything, rule=teacher, selectors=made)(7).memory.begin_chunk(CHUNK)
    heads = torch.nn.ModuleList(selector.retention for selector in made)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(teacher.loss(made))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]

    def caught(name: str) -> float:
        """Later mass of what a memory of two blocks keeps in the fourth chunk, of that of all that had left."""
        settings = config(name, persistent_blocks=2)
        numbers = kept(Wanted(settings, selectors=made)(5).memory)
        later = torch.stack([teacher.later(layer, 3)[..., : 3 * 4] for layer in range(LAYERS)])
        return float(later.gather(3, numbers).sum() / later.sum())

    assert caught("learned") > 1.2 * max(caught("first"), caught("random"))


class Wanted(Feed):
    def tokens(self, frames: int, chunk: int) -> tuple[Tensor, ...]:
        query, key, value = super().tokens(frames, chunk)
        layout = self.memory.layout
        blocks = layout.to_blocks(key).clone()
        direction = torch.zeros(self.dim).index_fill_(0, torch.tensor([self.dim - 1]), 3.0)  # turns slowly in time
        blocks[:, :, chunk % 4] += direction
        return query + direction, layout.from_blocks(blocks), value


def test_the_learned_rule_needs_a_model_with_heads() -> None:
    with pytest.raises(ConfigError, match="needs a model with a trained retention head"):
        Feed(config("learned"), selectors=None)
    with pytest.raises(ConfigError, match="learned_retention: is part of a block selector"):
        CausalWanTransformer3DModel(num_layers=1, learned_retention=True)


def test_a_model_gets_heads_only_if_its_config_says_so() -> None:
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 16,
        "ffn_dim": 48,
        "num_layers": 1,
        "selector_tokens": 6,
    }
    old, new = CausalWanTransformer3DModel(**sizes), CausalWanTransformer3DModel(**sizes, learned_retention=True)
    added = set(new.state_dict()) - set(old.state_dict())
    assert added == {"blocks.0.selector.retention.hidden", "blocks.0.selector.retention.out"}
    assert not set(old.state_dict()) - set(new.state_dict())
