"""Worlds: what returns, when, after how long, and that nothing of it shows in between."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sparse_forcing.errors import ConfigError
from sparse_forcing.scenes.vocabulary import COLOURS, SHAPES, SIZES
from sparse_forcing.scenes.worlds.batch import sample_worlds
from sparse_forcing.scenes.worlds.config import KINDS, WorldConfig
from sparse_forcing.scenes.worlds.draw import render_world
from sparse_forcing.scenes.worlds.identities import is_held_out_pair
from sparse_forcing.scenes.worlds.world import PARTLY, WHOLE

WINDOW = 16  # pixel frames of a window of four latent frames


def _asked(returns):
    """The return that the plan is about: the one out of sight for longest."""
    return max(returns, key=lambda entry: entry.gap)


@pytest.mark.parametrize("kind", KINDS)
def test_something_returns_within_every_clip(kind: str) -> None:
    for frames in (48, 80, 161):
        batch = sample_worlds(kind, 20, 3, WorldConfig(frames=frames))
        assert all(len(world.camera) == frames for world in batch.worlds)
        for returns in batch.returns:
            entry = _asked(returns)
            begin, end = entry.frames
            assert 0 < entry.first_seen[0] < entry.first_seen[1] <= entry.last_seen + 1 <= begin < end <= frames
            assert entry.gap >= 1
            assert begin - entry.last_seen > entry.gap
            assert len(entry.boxes) == end - begin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("windows", [0.5, 1, 2, 4, 8])
def test_gaps_are_as_long_as_asked_for(kind: str, windows: float) -> None:
    gap = int(windows * WINDOW)
    batch = sample_worlds(kind, 12, 1, WorldConfig(frames=gap + 72, gap=(gap, gap), objects=(1, 2)))
    assert {_asked(returns).gap for returns in batch.returns} == {gap}
    batch = sample_worlds(kind, 12, 1, WorldConfig(frames=gap + 96, gap=(gap, gap + 9), objects=(1, 2)))
    assert all(gap <= _asked(returns).gap <= gap + 9 for returns in batch.returns)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_object_shows_in_the_gap_and_all_of_it_at_the_return(kind: str) -> None:
    """Seen in the pixels: without the object the gap looks the same and the return does not."""
    for world, returns in zip(*_drawn(kind, 8)):
        entry = _asked(returns)
        looks = replace(world.items[entry.item].identity, colour="pink")
        other = replace(world.items[entry.item], identity=looks)
        items = [other if number == entry.item else item for number, item in enumerate(world.items)]
        changed = replace(world, items=tuple(items))
        gap = range(entry.last_seen + 1, entry.last_seen + 1 + entry.gap)
        assert torch.equal(render_world(world, 48, frames=gap), render_world(changed, 48, frames=gap))
        with_it, without = (render_world(world, 48, frames=range(*entry.frames), objects=on) for on in (True, False))
        boxes = torch.tensor(entry.boxes)
        assert boxes.min() >= 0
        assert boxes.max() <= 1
        assert ((with_it - without).abs().amax(1) > 0.2).any((1, 2)).all()


def _drawn(kind: str, count: int):
    batch = sample_worlds(kind, count, 11)
    return batch.worlds, batch.returns


@pytest.mark.parametrize("kind", KINDS)
def test_the_beginning_never_returns(kind: str) -> None:
    config = WorldConfig(frames=96, opening=12)
    batch = sample_worlds(kind, 30, 2, config)
    for world, returns in zip(batch.worlds, batch.returns):
        returning = {entry.item for entry in returns}
        begun = {item for frame in world.visible_boxes()[:12] for item in frame}
        assert not returning & begun
        assert all(entry.first_seen[0] >= 12 for entry in returns)


def test_revisited_objects_are_of_every_age_and_camera_paths_differ() -> None:
    batch = sample_worlds("revisit", 120, 4, WorldConfig(frames=120))
    assert {2, 3, 4, 5} <= {_asked(returns).item for returns in batch.returns}
    assert any(len(returns) > 2 for returns in batch.returns)
    assert {2, 3, 4} <= {round(max(map(abs, world.camera))) for world in batch.worlds}
    assert {-1, 1} == {1 if world.camera[0] < world.camera[1] else -1 for world in batch.worlds}
    assert len({world.camera for world in batch.worlds}) > 60


def test_a_camera_turns_only_at_the_wall_and_never_changes_its_speed() -> None:
    for world in sample_worlds("revisit", 40, 5, WorldConfig(frames=120)).worlds:
        moves = [later - earlier for earlier, later in pairwise(world.camera)]
        speed = abs(moves[0])
        turns = [frame for frame, (one, two) in enumerate(pairwise(moves), 1) if one * two <= 0]
        assert all(min(abs(move), abs(abs(move) - speed)) < 1e-6 for move in moves)
        assert 1 <= len(turns) <= 2
        wall = world.panels[0].boxes
        shows = [frame for frame in range(120) if wall[frame][0] < 1 and wall[frame][2] > 0]
        assert min(shows) < turns[0] - 1, "it turned before the wall was seen"


def test_distractors_pass_in_the_gap_and_do_not_return() -> None:
    def share(fraction: float) -> float:
        config = WorldConfig(frames=120, gap=(48, 60), distractor_fraction=fraction)
        batch = sample_worlds("reappear", 40, 4, config)
        assert all({entry.item for entry in returns} == {1} for returns in batch.returns)
        return sum(len(world.items) == 3 for world in batch.worlds) / 40

    assert share(0.0) == 0
    assert 0.2 < share(0.5) < 0.8
    assert share(1.0) > 0.9


@pytest.mark.parametrize("kind", ["revisit", "reappear", "parade"])
def test_objects_never_cover_each_other(kind: str) -> None:
    for world in sample_worlds(kind, 40, 8).worlds:
        for boxes in world.visible_boxes():
            found = list(boxes.values())
            for number, one in enumerate(found):
                for two in found[number + 1 :]:
                    assert one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]


def test_the_asked_one_of_a_parade_returns_when_the_prompt_says_so() -> None:
    asked = set()
    for count in (1, 2, 4, 8):
        batch = sample_worlds("parade", 16, 5, WorldConfig(frames=96, objects=(count,), align=4))
        for world, returns, schedule in zip(batch.worlds, batch.returns, batch.schedules()):
            (entry,) = returns
            assert len(world.items) == count
            first, question = schedule
            assert (first, question) == (0, entry.frames[0])
            assert question % 4 == 0
            ordinal = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")[entry.item]
            assert ordinal in schedule[question].lower()
            asked.add(ordinal)
    assert len(asked) == 8


def test_cups_swap_as_often_as_asked_for() -> None:
    def swaps(world) -> int:
        """Times at which some cup begins to move to the side."""
        left = [[box[0] for box in panel.boxes] for panel in world.panels]
        moves = [any(abs(line[t] - line[t - 1]) > 1e-9 for line in left) for t in range(1, world.frames)]
        return sum(moves)

    batch = sample_worlds("swaps", 12, 5, WorldConfig(frames=120, swaps=(4, 4)))
    assert all(4 * 5 <= swaps(world) <= 4 * 10 for world in batch.worlds)
    assert all(len(returns) == 1 for returns in batch.returns)


def test_held_out_pairs_return_only_in_their_split() -> None:
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES if is_held_out_pair(colour, shape)]
    assert len(pairs) == 8
    assert {colour for colour, _ in pairs} == set(COLOURS)
    assert {shape for _, shape in pairs} == set(SHAPES)
    for kind in KINDS:
        for split in ("train", "heldout", "all"):
            batch = sample_worlds(kind, 40, 6, WorldConfig(split=split))
            asked = [_asked(returns) for returns in batch.returns]
            held = {is_held_out_pair(entry.colour, entry.shape) for entry in asked}
            assert held == {"train": {False}, "heldout": {True}, "all": {True, False}}[split]
            assert {entry.size for entry in asked} == set(SIZES) - ({"large"} if kind == "swaps" else set())


def test_revisit_holds_out_every_object_that_returns() -> None:
    batch = sample_worlds("revisit", 60, 6, WorldConfig(frames=120, split="heldout"))
    entries = [entry for returns in batch.returns for entry in returns]
    assert len(entries) > 80
    assert all(is_held_out_pair(entry.colour, entry.shape) for entry in entries)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_too_short_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"12 frames are too few for {kind}"):
        sample_worlds(kind, 1, 0, WorldConfig(frames=12))
    with pytest.raises(ConfigError, match=f"80 frames are too few for {kind} with a gap of 79; the longest that fits"):
        sample_worlds(kind, 1, 0, WorldConfig(gap=(79, 79)))


def test_any_settings_give_what_was_asked_for_or_say_that_it_does_not_fit() -> None:
    rng, kept = random.Random(1), 0
    for index in range(1200):
        frames, least = rng.randint(18, 140), rng.randint(1, 70)
        config = WorldConfig(
            frames=frames,
            gap=rng.choice((None, (least, least), (least, least + 9))),
            align=rng.choice((1, 4, 12)),
            objects=rng.choice(((1, 2, 4, 8), (8,))),
            swaps=rng.choice((None, (2, 3))),
        )
        try:
            (returns,) = sample_worlds(rng.choice(KINDS), 1, 0, config, start=index).returns
        except ConfigError:
            continue
        kept += 1
        least, most = config.gap or (1, frames)
        assert least <= _asked(returns).gap <= most
        assert all(entry.first_seen[0] >= config.opening_frames for entry in returns)
    assert kept > 500


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 0}, "frames must be at least 1"),
        ({"gap": (9, 3)}, "least <= most"),
        ({"grounds": ("lava",)}, "grounds must be some of"),
        ({"split": "test"}, "unknown split"),
        ({"objects": (9,)}, "objects must lie between 1 and 8"),
        ({"swaps": (3, 1)}, "swaps"),
        ({"frame_noise": -1.0}, "frame_noise"),
        ({"align": 0}, "align"),
        ({"opening": 0}, "opening"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorldConfig(**settings)


def test_visibility_names_what_shows() -> None:
    (world,) = sample_worlds("reappear", 1, 0).worlds
    seen = world.visibility(1)
    assert seen[0] == 0
    assert {PARTLY, WHOLE} < set(seen)
