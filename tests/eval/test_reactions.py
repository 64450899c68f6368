"""Every metric of the offline suite moves the way it should, and further the stronger the damage."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch

from sparse_forcing.eval.measuring.registry import suite_metrics
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.scenes.render import render
from sparse_forcing.scenes.sample import batch_from_scenes
from sparse_forcing.scenes.vocabulary import Scene, SceneObject
from tests.eval.conftest import clip_of, moving_disc, score

FRAMES = moving_disc()
OTHER = moving_disc(seed=5, color=(30, 90, 200))
BLUE = moving_disc(color=(30, 90, 220))
Damage = Callable[[float], np.ndarray]


def freeze(strength: float) -> np.ndarray:
    """The last `strength` of the clip stands still."""
    last = round(len(FRAMES) * (1 - strength))
    return FRAMES[np.minimum(np.arange(len(FRAMES)), max(0, last - 1))]


def shuffle(strength: float) -> np.ndarray:
    """Frames displaced by up to `strength` of the clip."""
    random = np.random.default_rng(0)
    return FRAMES[np.argsort(np.arange(len(FRAMES)) + random.uniform(0, strength * len(FRAMES), len(FRAMES)))]


def noise(strength: float) -> np.ndarray:
    """Gaussian noise that is new in every frame."""
    grain = np.random.default_rng(0).normal(0, 60 * strength, FRAMES.shape)
    return np.clip(FRAMES + grain, 0, 255).astype(np.uint8)


def blur(strength: float) -> np.ndarray:
    """Gaussian blur."""
    return np.stack([cv2.GaussianBlur(frame, (0, 0), 0.01 + 4 * strength) for frame in FRAMES])


def color_drift(strength: float) -> np.ndarray:
    """Colours that move away steadily."""
    ramp = np.linspace(0, 80 * strength, len(FRAMES))[:, None, None, None] * np.array([1.0, 0.1, -0.7])
    return np.clip(FRAMES + ramp, 0, 255).astype(np.uint8)


def identity_switch(strength: float) -> np.ndarray:
    """The disc turns into another one half way."""
    later = (np.arange(len(FRAMES)) >= len(FRAMES) // 2)[:, None, None, None]
    return np.where(later, (1 - strength) * FRAMES + strength * BLUE, FRAMES).astype(np.uint8)


def cut(strength: float) -> np.ndarray:
    """Another scene half way."""
    later = (np.arange(len(FRAMES)) >= len(FRAMES) // 2)[:, None, None, None]
    return np.where(later, (1 - strength) * FRAMES + strength * OTHER, FRAMES).astype(np.uint8)


def speed_up(strength: float) -> np.ndarray:
    """Up to five times the speed."""
    return moving_disc(speed=1 + 4 * strength)


def darken(strength: float) -> np.ndarray:
    """Less light."""
    return (FRAMES * (1 - 0.8 * strength)).astype(np.uint8)


def fade_to_gray(strength: float) -> np.ndarray:
    """Colours that go, at equal brightness."""
    gray = FRAMES.mean(-1, keepdims=True)
    return ((1 - strength) * FRAMES + strength * gray).astype(np.uint8)


def still_switch(strength: float) -> np.ndarray:
    """`identity_switch` of a picture that does not move."""
    return identity_switch(strength)[[0] * 16 + [16] * 16] if strength else FRAMES[[0] * 32]


def still_cut(strength: float) -> np.ndarray:
    """`cut` from one picture that does not move to another."""
    return cut(strength)[[0] * 16 + [16] * 16] if strength else FRAMES[[0] * 32]


CASES = [
    (darken, "brightness", "falls"),
    (fade_to_gray, "saturation", "falls"),
    (freeze, "moving_share", "falls"),
    (freeze, "motion_magnitude", "falls"),
    (shuffle, "warp_smoothness", "falls"),
    (shuffle, "pixel_stability", "falls"),
    (shuffle, "motion_magnitude", "rises"),
    (noise, "pixel_stability", "falls"),
    (noise, "warp_smoothness", "falls"),
    (noise, "picture_quality", "falls"),
    (noise, "detail", "rises"),
    (blur, "detail", "falls"),
    (blur, "contrast", "falls"),
    (color_drift, "color_stability", "falls"),
    (color_drift, "appearance_consistency", "falls"),
    (identity_switch, "appearance_consistency", "falls"),
    (identity_switch, "shot_continuity", "falls"),
    (identity_switch, "color_stability", "falls"),
    (cut, "shot_continuity", "falls"),
    (cut, "appearance_consistency", "falls"),
    (cut, "pixel_stability", "falls"),
    (speed_up, "motion_magnitude", "rises"),
    (speed_up, "pixel_stability", "falls"),
]


@pytest.mark.parametrize(("damage", "name", "direction"), CASES, ids=[f"{c[0].__name__}-{c[1]}" for c in CASES])
def test_a_metric_is_monotone_in_the_strength(damage: Damage, name: str, direction: str) -> None:
    values = np.array([score(name, damage(strength)) for strength in (0.0, 0.25, 0.5, 1.0)])
    steps = np.diff(values) if direction == "rises" else -np.diff(values)
    assert (steps > 0).all(), values


def colors(images: torch.Tensor) -> torch.Tensor:
    """A network whose features are the mean colours of a 4 x 4 grid of places."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


class MeanColor:
    encode_image = staticmethod(colors)
    extract_features = staticmethod(lambda images: torch.nn.functional.adaptive_avg_pool2d(images, 4))


NETWORK_CASES = [
    ("subject_consistency", {"dino": colors}, still_cut, "falls"),
    ("subject_consistency", {"dino": colors}, still_switch, "falls"),
    ("subject_consistency", {"dino": colors}, color_drift, "falls"),
    ("background_consistency", {"clip_b32": MeanColor()}, still_cut, "falls"),
    ("background_consistency", {"clip_b32": MeanColor()}, still_switch, "falls"),
    ("imagenet_consistency", {"efficientnet": MeanColor()}, cut, "falls"),
    ("motion_smoothness", {"interpolator": lambda a, b: (a + b) / 2}, shuffle, "falls"),
    ("motion_smoothness", {"interpolator": lambda a, b: (a + b) / 2}, noise, "falls"),
    ("motion_smoothness", {"interpolator": lambda a, b: (a + b) / 2}, speed_up, "falls"),
    ("temporal_flickering", {}, noise, "falls"),
    ("temporal_flickering", {}, shuffle, "falls"),
    ("temporal_flickering", {}, freeze, "rises"),
]


@pytest.mark.parametrize(("name", "networks", "damage", "direction"), NETWORK_CASES)
def test_a_network_metric_reacts_through_its_network(name: str, networks: dict, damage: Damage, direction: str) -> None:
    """With features and frames that mean something by construction: what is tested is everything around the network."""
    values = np.array([score(name, damage(strength), Resources(networks=networks)) for strength in (0, 0.25, 0.5, 1)])
    steps = np.diff(values) if direction == "rises" else -np.diff(values)
    assert (steps > 0).all(), values


def test_flow_magnitude_and_dynamic_degree_follow_the_flow() -> None:
    """A network that answers with a flow of known size: the magnitude is that size, the verdict turns at its bar."""
    magnitudes, verdicts = [], []
    large = FRAMES.repeat(2, axis=1).repeat(2, axis=2)  # RAFT needs 121 pixels
    for size in (0.5, 2.0, 4.0, 9.0):
        flow = lambda first, second, iterations, size=size: torch.full((1, 2, *first.shape[2:]), size / 2**0.5)  # noqa: E731
        resources = Resources(networks={"raft": flow})
        magnitudes.append(score("flow_magnitude", large, resources))
        verdicts.append(score("dynamic_degree", large, resources))
    assert magnitudes == pytest.approx([size * 8 / 128 for size in (0.5, 2.0, 4.0, 9.0)], rel=1e-5)  # sides a second
    assert verdicts == [0, 0, 1, 1]  # the bar is 3 pixels at 128


def test_the_caption_judge_reacts_to_what_contradicts_the_caption() -> None:
    scene = Scene(
        background="white", objects=(SceneObject(colour="red", shape="square", size="medium", motion="moves right"),)
    )
    scenes = batch_from_scenes([scene], torch.Generator().manual_seed(0))
    frames = render(scenes, 40, 64)[0].permute(0, 2, 3, 1).numpy()
    frames = ((frames + 1) * 127.5).round().astype(np.uint8)
    prompt = "a medium red square moves to the right on a white background"
    swapped = frames[..., ::-1]  # blue
    shares = [score("caption_match", clip, prompt=prompt) for clip in (frames, frames[::-1], swapped[::-1])]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 3
    assert [score("caption_all", clip, prompt=prompt) for clip in (frames, swapped)] == [1, 0]


def test_a_plain_picture_has_no_picture_quality() -> None:
    plain = np.full((4, 64, 64, 3), 90, np.uint8)
    metric = {entry.name: entry for entry in suite_metrics("offline")}["picture_quality"]
    assert metric.compute(clip_of(plain).whole(), Resources()).value is None


@pytest.mark.parametrize("shape", [(3, 1, 1), (4, 7, 5), (5, 16, 200), (3, 130, 33)])
def test_odd_sizes_are_measured(shape: tuple[int, int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    resources = Resources()
    for metric in suite_metrics("offline"):
        usable = not any(resources.missing(name) for name in metric.needs)
        if usable and not metric.needs_text and len(frames) >= metric.min_frames:
            value = metric.compute(clip_of(frames).whole(), resources).value
            assert value is None or np.isfinite(value), metric.name
