"""A textured scene with a moving disc, and clips made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparse_forcing.eval.measuring.frames import ArraySource
from sparse_forcing.eval.measuring.manifest import Entry
from sparse_forcing.eval.measuring.registry import all_metrics
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import Clip

SIDE, FPS = 64, 16.0


def moving_disc(
    frames: int = 32, *, speed: float = 1.0, color: tuple[int, int, int] = (220, 60, 40), seed: int = 0
) -> np.ndarray:
    """uint8 [F, 64, 64, 3]: a disc circling over a smooth random texture; one round in 80 frames at speed 1."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(40, 200, (9, 9, 3))
    at = np.linspace(0, 7.999, SIDE)
    low = at.astype(int)
    rest = (at - low)[:, None]
    rows = coarse[low] * (1 - rest[:, None]) + coarse[low + 1] * rest[:, None]
    texture = rows[:, low] * (1 - rest[None]) + rows[:, low + 1] * rest[None]
    texture = texture + random.normal(0, 6, texture.shape)
    y, x = np.mgrid[:SIDE, :SIDE]
    pictures = []
    for number in range(frames):
        angle = 2 * np.pi * speed * number / 80
        distance = np.hypot(x - 32 - 18 * np.sin(angle), y - 32 - 14 * np.cos(angle))
        cover = np.clip(11 - distance, 0, 1)[..., None]
        pictures.append(texture * (1 - cover) + np.array(color) * cover)
    return np.clip(np.stack(pictures), 0, 255).astype(np.uint8)


def clip_of(frames: np.ndarray, prompt: str | None = None, fps: float = FPS) -> Clip:
    """A clip in memory."""
    return Clip(source=ArraySource(frames), fps=fps, entry=Entry(video=Path("clip.mp4"), prompt=prompt))


def score(name: str, frames: np.ndarray, resources: Resources | None = None, prompt: str | None = None) -> float:
    """A metric's value on frames."""
    value = all_metrics()[name].compute(clip_of(frames, prompt).whole(), resources or Resources()).value
    assert value is not None
    return value


@pytest.fixture
def disc() -> np.ndarray:
    """Two seconds of the moving disc."""
    return moving_disc()
