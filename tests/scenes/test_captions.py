"""Scenes to captions and back."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_forcing.errors import SparseForcingError
from sparse_forcing.scenes.captions import (
    canonical_caption,
    caption,
    caption_words,
    parse_caption,
    vocabulary_words,
)
from sparse_forcing.scenes.sample import sample_scenes
from sparse_forcing.scenes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    COLUMN_MOTIONS,
    MOTIONS,
    RESIZING,
    ROW_MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
)


def _object(motions: tuple[str, ...]) -> st.SearchStrategy[SceneObject]:
    def close(item: SceneObject) -> SceneObject:
        return replace(item, size=None) if item.motion in RESIZING else item

    names = (st.sampled_from(values) for values in (COLOURS, SHAPES, SIZES, motions))
    return st.builds(SceneObject, **dict(zip(("colour", "shape", "size", "motion"), names, strict=True))).map(close)


def _scene() -> st.SearchStrategy[Scene]:
    one = st.tuples(_object(MOTIONS))
    two = st.one_of(*(st.tuples(_object(lanes), _object(lanes)) for lanes in (ROW_MOTIONS, COLUMN_MOTIONS)))
    two = two.filter(lambda pair: pair[0].colour != pair[1].colour)
    return st.builds(Scene, background=st.sampled_from(BACKGROUNDS), objects=one | two)


def _sorted(scene: Scene) -> Scene:
    return replace(scene, objects=tuple(sorted(scene.objects, key=lambda item: str(item.colour))))


@given(scene=_scene(), seed=st.integers(0, 2**32))
@settings(max_examples=400, deadline=None)
def test_parse_caption_reads_every_caption(scene: Scene, seed: int):
    text = caption(scene, random.Random(seed), size_dropout=0.0)
    assert _sorted(parse_caption(text)) == _sorted(scene)
    assert parse_caption(f"  {text.upper().replace(',', ' ;')}!! ") == parse_caption(text)
    assert set(caption_words(text)) <= set(vocabulary_words())


@given(scene=_scene())
@settings(max_examples=200, deadline=None)
def test_canonical_caption_is_read_back_in_order(scene: Scene):
    assert parse_caption(canonical_caption(scene)) == scene


def test_size_dropout_leaves_the_size_open():
    item = SceneObject(colour="red", shape="star", size="large", motion="grows")
    scene = Scene(background="black", objects=(replace(item, motion="moves up"),))
    rng = random.Random(0)
    sizes = [parse_caption(caption(scene, rng, size_dropout=0.3)).objects[0].size for _ in range(400)]
    assert set(sizes) == {"large", None}
    assert 0.2 < sizes.count(None) / 400 < 0.4


def test_captions_vary_for_every_motion():
    rng = random.Random(0)
    for motion in MOTIONS:
        scene = Scene(background="gray", objects=(SceneObject(colour="red", shape="square", motion=motion),))
        assert len({caption(scene, rng).lower().rstrip(".") for _ in range(600)}) > 150


def test_vocabulary_is_small_and_fully_used():
    rng = random.Random(1)
    scenes = sample_scenes(6000, torch.Generator().manual_seed(0), two_object_fraction=0.4, split="all").scenes()
    used = {word for scene in scenes for word in caption_words(caption(scene, rng))}
    assert sorted(used) == vocabulary_words()
    assert len(used) < 160


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A RED DISC moves UPWARDS, on grey!", "gray|red|circle||moves up"),
        ("little violet hoop, orbits anti-clockwise, navy blue", "navy|purple|ring|small|orbits counterclockwise"),
        ("green star spinning counter clockwise, dark green", "dark green|green|star||spins counterclockwise"),
        (
            "moving around the centre clockwise over white: a big blue square",
            "white|blue|square|large|orbits clockwise",
        ),
        ("a pink triangle that gets smaller on brown", "brown|pink|triangle||shrinks"),
        ("a medium-sized cyan ring does not move, black backdrop", "black|cyan|ring|medium|stays still"),
    ],
)
def test_parse_caption_reads_free_wordings(text: str, expected: str):
    scene = parse_caption(text)
    (item,) = scene.objects
    found = (scene.background, item.colour, item.shape, item.size, item.motion)
    assert "|".join(name or "" for name in found) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no shape"),
        ("a cat", "unknown words cat"),
        ("a red\n" * 9999, "no shape"),
        ("a red moves up on black", "no shape"),
        ("a circle moves up on black", "no colour"),
        ("a red circle on black", "no motion"),
        ("a red circle moves up", "no background"),
        ("a red circle moves on black", "no direction"),
        ("a red circle moves up and left on black", "2 values for one direction"),
        ("a red circle moves up and spins clockwise on black", "2 values for one motion"),
        ("a red circle moves up on a blue background", "2 values for one colour"),
        ("a red circle moves up on black over white", "2 values for one background"),
        ("a tiny huge red circle moves up on black", "2 values for one size"),
        ("a small red circle grows on black", "no fixed size"),
        ("a red circle and a blue star moves up on black", "no motion"),
        ("a red circle, a blue star and a pink ring moving up on black", "3 shapes"),
    ],
)
def test_parse_caption_names_what_is_wrong(text: str, message: str):
    with pytest.raises(SparseForcingError, match=message) as caught:
        parse_caption(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_parse_caption_requires_only_what_it_is_told():
    scene = parse_caption("a circle", required=())
    assert scene == Scene(objects=(SceneObject(shape="circle"),))


def test_captions_do_not_import_torch():
    code = "import sys, sparse_forcing.scenes.captions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
