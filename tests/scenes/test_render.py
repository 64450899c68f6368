"""Scenes: sampling, the held-out split, trajectories, drawing."""

from __future__ import annotations

from math import pi

import pytest
import torch

from sparse_forcing.errors import ConfigError
from sparse_forcing.scenes.render import RING_HOLE, coverage, render, trajectories
from sparse_forcing.scenes.sample import SHAPE_SCALE, SceneBatch, batch_from_scenes, is_any, sample_scenes
from sparse_forcing.scenes.vocabulary import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOUR_RGB,
    COLOURS,
    MOTIONS,
    RESIZING,
    SHAPES,
    SPINNING,
    SPINNING_SHAPES,
    Scene,
    SceneObject,
    has_held_out,
    is_held_out,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _one(motion: str, shape: str = "square", size: str | None = "medium", colour: str = "red") -> Scene:
    return Scene(background="white", objects=(SceneObject(colour=colour, shape=shape, size=size, motion=motion),))


def _mask(video: torch.Tensor) -> torch.Tensor:
    """Pixels mostly covered by an object; the background of these scenes is white."""
    return (video < -0.3).any(-3)


def test_render_is_seeded_and_has_the_documented_form():
    first, again, other = (
        render(sample_scenes(6, _generator(seed), two_object_fraction=0.5), 5, 32) for seed in (1, 1, 2)
    )
    assert first.shape == (6, 5, 3, 32, 32)
    assert first.dtype == torch.float32
    assert first.min() >= -1
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_render_start_continues_the_same_film():
    scenes = sample_scenes(12, _generator(), two_object_fraction=0.3, split="all")
    whole = render(scenes, 48, 32)
    assert torch.allclose(whole[:, 17:25], render(scenes, 8, 32, start=17), atol=1e-4)
    starts = torch.arange(12) * 3
    each = render(scenes, 4, 32, start=starts)
    for item, start in enumerate(starts.tolist()):
        assert torch.allclose(whole[item, start : start + 4], each[item], atol=1e-4)


def test_render_shows_the_same_scene_at_every_size():
    scenes = sample_scenes(20, _generator(3), two_object_fraction=0.5, split="all")
    large = render(scenes, 2, 128).flatten(0, 1)
    small = render(scenes, 2, 64).flatten(0, 1)
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.01


def test_render_paints_the_named_colours():
    for colour in COLOURS:
        for background in BACKGROUNDS:
            item = SceneObject(colour=colour, shape="circle", size="large", motion="stays still")
            video = render(batch_from_scenes([Scene(background=background, objects=(item,))], _generator()), 1, 64)
            seen = {tuple(pixel) for pixel in ((video[0, 0] + 1) * 127.5).round().int().flatten(1).T.tolist()}
            assert COLOUR_RGB[colour] in seen
            assert BACKGROUND_RGB[background] in seen


@pytest.mark.parametrize(("frames", "side"), [(0, 64), (4, 0)])
def test_render_refuses_an_empty_video(frames: int, side: int):
    with pytest.raises(ConfigError, match="at least 1"):
        render(sample_scenes(1, _generator()), frames, side)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", pi),
        ("square", 4),
        ("triangle", 3 * 3**0.5 / 4),
        ("star", 1.12257),  # pentagram of circumradius 1
        ("ring", pi * (1 - RING_HOLE**2)),
    ],
)
@pytest.mark.parametrize("angle", [0.0, 0.4])
def test_coverage_has_the_area_of_the_shape_anywhere_on_the_torus(shape: str, area: float, angle: float):
    radius = torch.tensor([0.2, 0.2])
    x, y = torch.tensor([0.5, 0.03]), torch.tensor([0.4, 0.98])
    cover = coverage(shape, x, y, radius, torch.full((2,), angle), 256)
    expected = area * (0.2 * SHAPE_SCALE[shape]) ** 2
    assert cover.mean((1, 2)) == pytest.approx(torch.full((2,), expected), rel=0.01)


def test_upright_triangle_and_star_point_up():
    for shape in ("triangle", "star"):
        cover = coverage(shape, *(torch.tensor([value]) for value in (0.5, 0.5, 0.2, 0.0)), 200)[0]
        rows = cover.sum(1)
        covered = (rows > 0.5).nonzero()[:, 0]
        assert rows[covered[0]] < 4
        assert cover[covered[0]].argmax() == pytest.approx(100, abs=2)
        assert covered[0] == pytest.approx(100 - 40 * SHAPE_SCALE[shape], abs=3)


def test_angle_turns_clockwise_on_the_screen():
    # The upper corner of the triangle goes to the right.
    turned = coverage("triangle", *(torch.tensor([value]) for value in (0.5, 0.5, 0.2, 0.3)), 200)[0]
    top = turned.sum(1).nonzero()[0, 0]
    assert turned[top].argmax() > 105


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moves right", 0, 1), ("moves left", 0, -1), ("moves up", 1, -1), ("moves down", 1, 1)],
)
def test_directions_keep_a_constant_speed_for_a_minute(motion: str, axis: int, sign: int):
    path = trajectories(batch_from_scenes([_one(motion)] * 8, _generator()), 480)
    step = (path[axis].diff(dim=-1) + 0.5) % 1 - 0.5
    assert ((step * sign > 0.0195) & (step * sign < 0.0405)).all()
    assert step.std(-1).max() < 1e-5
    assert torch.equal(path[1 - axis], path[1 - axis][..., :1].expand_as(path[1 - axis]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("motion", ["bounces left and right", "bounces up and down"])
def test_bounces_turn_at_the_edges_and_within_every_clip(motion: str, shape: str):
    scenes = batch_from_scenes([_one(motion, shape, size) for size in ("small", "medium", "large")] * 4, _generator())
    mask = _mask(render(scenes, 120, 64))
    along, across = (-1, -2) if motion == "bounces left and right" else (-2, -1)
    edges = mask.any(across)
    assert edges.float().argmax(-1).min(1).values.max() <= 4
    assert edges.flip(-1).float().argmax(-1).min(1).values.max() <= 4
    assert not (mask.select(along, 0).any(-1) & mask.select(along, -1).any(-1)).any()  # nothing wraps
    position = trajectories(scenes, 400)[0 if along == -1 else 1][:, 0]
    turns = (position.diff(dim=-1).sign().diff(dim=-1) != 0).unfold(1, 38, 1)
    assert turns.any(-1).all()


@pytest.mark.parametrize(("motion", "sign"), [("orbits clockwise", 1), ("orbits counterclockwise", -1)])
def test_orbits_turn_around_the_frame_centre_and_stay_inside(motion: str, sign: int):
    scenes = batch_from_scenes([_one(motion, shape, "large") for shape in SHAPES], _generator())
    x, y, _, angle = trajectories(scenes, 200)
    bearing = torch.atan2(y - 0.5, x - 0.5)
    step = (bearing.diff(dim=-1) + pi) % (2 * pi) - pi
    assert ((step * sign > 2 * pi / 33) & (step * sign < 2 * pi / 19)).all()
    assert angle.abs().max() == 0
    video = render(scenes, 40, 64)
    assert not (_mask(video)[..., 0].any(-1) & _mask(video)[..., -1].any(-1)).any()


def test_grows_and_shrinks_run_between_small_and_large_then_hold():
    scenes = batch_from_scenes([_one("grows", size=None), _one("shrinks", size=None)], _generator())
    radius = trajectories(scenes, 480)[2][:, 0]
    assert radius[0, 0] == pytest.approx(0.117, rel=0.05)
    assert radius[1, 0] == pytest.approx(0.242, rel=0.05)
    assert radius[0, 40:] == pytest.approx(radius[0, 40].expand(440))
    assert radius[:, -1] == pytest.approx(torch.tensor([0.242, 0.117]), rel=0.05)
    assert (radius[0].diff() >= 0).all()
    assert (radius[1].diff() <= 0).all()
    assert scenes.size.tolist() == [[-1], [-1]]


def test_spins_turn_only_shapes_whose_rotation_shows():
    scenes = sample_scenes(3000, _generator(), split="all")
    spinning = [scene.objects[0] for scene in scenes.scenes() if scene.objects[0].motion in SPINNING]
    assert {item.shape for item in spinning} == set(SPINNING_SHAPES)
    angle = trajectories(scenes, 2)[3][:, 0]
    turned = angle[:, 1] != angle[:, 0]
    assert turned.tolist() == [scene.objects[0].motion in SPINNING for scene in scenes.scenes()]


def test_two_objects_never_touch():
    scenes = sample_scenes(150, _generator(5), two_object_fraction=1.0, split="all")
    x, y, radius, angle = trajectories(scenes, 100)
    cover = torch.zeros(2, 150, 100, 48, 48, dtype=torch.bool)
    for place in range(2):
        for number, shape in enumerate(SHAPES):
            chosen = scenes.shape[:, place] == number
            path = (value[chosen, place] for value in (x, y, radius, angle))
            cover[place, chosen] = coverage(shape, *path, 48) > 0.3
    assert not (cover[0] & cover[1]).any()
    for scene in scenes.scenes():
        assert scene.objects[0].colour != scene.objects[1].colour


def test_split_keeps_held_out_combinations_apart():
    train = sample_scenes(2000, _generator(), two_object_fraction=0.3, split="train")
    held = sample_scenes(500, _generator(), two_object_fraction=0.3, split="heldout")
    assert not any(has_held_out(scene) for scene in train.scenes())
    assert all(has_held_out(scene) for scene in held.scenes())
    assert 0.25 < train.present[:, 1].float().mean() < 0.35


def test_held_out_hash_never_changes_and_takes_a_tenth():
    shape = torch.Size((len(COLOURS), len(SHAPES), len(BACKGROUNDS), len(MOTIONS)))
    grid = torch.cartesian_prod(*(torch.arange(length) for length in shape)).unbind(-1)
    held = is_held_out(*grid)
    assert 0.08 < held.float().mean() < 0.12
    numbers = [tuple(int(value[row]) for value in grid) for row in range(0, 3120, 7)]
    assert [bool(is_held_out(*row)) for row in numbers] == held[::7].tolist()
    assert held.nonzero()[:5, 0].tolist() == [0, 7, 11, 22, 25]


def test_motions_of_one_object_scenes_are_drawn_by_their_weights():
    weights = {"orbits clockwise": 6.0, "stays still": 0.0}
    batch = sample_scenes(8000, _generator(3), two_object_fraction=0.2, split="all", motion_weights=weights)
    two = batch.present[:, 1]
    share = torch.bincount(batch.motion[~two, 0], minlength=len(MOTIONS)) / (~two).sum()
    assert share[MOTIONS.index("stays still")] == 0
    assert abs(share[MOTIONS.index("orbits clockwise")] - 6 / 17) < 0.02
    assert (share[MOTIONS.index("grows")] - 1 / 17).abs() < 0.01
    assert (batch.motion[two] == MOTIONS.index("stays still")).any()
    even, none = (sample_scenes(8, _generator(3), motion_weights=w) for w in ({}, None))
    assert even.motion.shape == none.motion.shape


def test_shapes_are_drawn_by_their_weights_and_only_some_spin():
    batch = sample_scenes(
        8000, _generator(3), two_object_fraction=0.2, split="all", shape_weights={"star": 4, "ring": 0}
    )
    spins = is_any(batch.motion, SPINNING, MOTIONS) & batch.present
    others = ~is_any(batch.motion, SPINNING, MOTIONS) & batch.present
    counts = [torch.bincount(batch.shape[which], minlength=len(SHAPES)) for which in (spins, others)]
    spinning, rest = ({name: float(n / count.sum()) for name, n in zip(SHAPES, count)} for count in counts)
    assert {name for name, share in spinning.items() if share} == set(SPINNING_SHAPES)
    assert spinning["star"] == pytest.approx(4 / (3 + len(SPINNING_SHAPES)), abs=0.03)
    assert rest["ring"] == 0
    assert rest["star"] == pytest.approx(4 / 7, abs=0.02)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"motion_weights": {"hops": 1.0}}, "motion_weights: unknown motion 'hops'; choose"),
        ({"motion_weights": {"grows": -1.0}}, "motion_weights: grows has weight -1"),
        ({"motion_weights": dict.fromkeys(MOTIONS, 0.0)}, "at least one motion"),
        ({"shape_weights": {"heart": 1.0}}, "shape_weights: unknown shape 'heart'; choose"),
        ({"shape_weights": dict.fromkeys(SPINNING_SHAPES, 0.0)}, "or nothing can spin"),
    ],
)
def test_impossible_weights_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        sample_scenes(1, _generator(0), **weights)


def test_sample_covers_the_vocabulary_evenly():
    scenes = sample_scenes(6500, _generator(), split="all")
    for values, count in ((scenes.colour, 8), (scenes.background, 6), (scenes.motion, 13)):
        share = torch.bincount(values.flatten(), minlength=count) / 6500
        assert (share * count).min() > 0.8
        assert (share * count).max() < 1.2
    sizes = scenes.size[scenes.size >= 0]
    assert (torch.bincount(sizes) / len(sizes) * 3).min() > 0.9


def test_scenes_survive_the_trip_through_names():
    scenes = sample_scenes(300, _generator(), two_object_fraction=0.5, split="all").scenes()
    assert batch_from_scenes(scenes, _generator(9)).scenes() == scenes


def test_open_sizes_are_drawn_and_always_fit():
    items = tuple(SceneObject(colour=colour, shape="star", motion="stays still") for colour in ("red", "blue"))
    large = SceneObject(colour="cyan", shape="star", size="large", motion="moves up")
    drawn = batch_from_scenes([Scene(background="gray", objects=items)] * 60, _generator())
    assert sorted({tuple(pair) for pair in drawn.size.tolist()}) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    beside_large = batch_from_scenes([Scene(background="gray", objects=(large, items[0]))] * 9, _generator())
    assert {tuple(pair) for pair in beside_large.size.tolist()} == {(2, 0)}
    assert len(batch_from_scenes([_one("moves up", size=None)] * 40, _generator()).size.unique()) == 3


LARGE = SceneObject(colour="red", shape="star", size="large", motion="moves up")


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (_one("flies"), "motion is 'flies'"),
        (_one("moves up", shape="blob"), "shape is 'blob'"),
        (_one("spins clockwise", shape="ring"), "cannot be seen"),
        (Scene(background=None, objects=(LARGE,)), "background is None"),
        (Scene(background="gray", objects=()), "one or two objects"),
        (Scene(background="gray", objects=(LARGE, LARGE)), "do not fit"),
        (Scene(background="gray", objects=(LARGE, _one("moves left").objects[0])), "same axis"),
    ],
)
def test_batch_from_scenes_names_what_is_wrong(scene: Scene, message: str):
    with pytest.raises(ConfigError, match=message):
        batch_from_scenes([scene], _generator())


@pytest.mark.parametrize(
    "bad", [{"batch": 0}, {"split": "test"}, {"two_object_fraction": 1.5}], ids=["batch", "split", "fraction"]
)
def test_sample_scenes_refuses_bad_settings(bad: dict):
    with pytest.raises(ConfigError):
        sample_scenes(**({"batch": 2} | bad), generator=_generator())


def test_select_keeps_the_chosen_scenes():
    scenes = sample_scenes(10, _generator(), two_object_fraction=0.5)
    part = scenes.select(torch.tensor([7, 2]))
    assert isinstance(part, SceneBatch)
    assert part.scenes() == [scenes.scenes()[7], scenes.scenes()[2]]
    assert len(part) == 2
    assert set(RESIZING) <= set(MOTIONS)
