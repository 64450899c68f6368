"""Frame sampling, resizing and cropping against slow definitions."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_forcing.eval.vbench import transforms as T


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.75."""
    x = np.abs(x)
    near = 1.25 * x**3 - 2.25 * x**2 + 1
    far = -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resample(row: np.ndarray, size: int, kernel, reach: int) -> np.ndarray:
    """Interpolate the first axis to `size` samples at half-pixel centres, borders repeated."""
    at = (np.arange(size) + 0.5) * len(row) / size - 0.5
    base = np.floor(at).astype(int)
    total = np.zeros((size, *row.shape[1:]))
    for offset in range(1 - reach, reach + 1):
        weight = kernel(at - (base + offset)).reshape(-1, *[1] * (row.ndim - 1))
        total += weight * row[np.clip(base + offset, 0, len(row) - 1)]
    return total


def plain_resize(frame: np.ndarray, height: int, width: int, kernel, reach: int) -> np.ndarray:
    tall = resample(frame.astype(np.float64), height, kernel, reach)
    return resample(tall.transpose(1, 0, 2), width, kernel, reach).transpose(1, 0, 2)


def linear(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1 - np.abs(x))


def pictures(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (2, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(48, 83), (83, 48), (64, 64), (20, 31), (300, 260)])
def test_clip_input_is_bicubic_center_crop_normalised(height: int, width: int) -> None:
    frames = pictures(height, width)
    size = 32
    tall, wide = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    resized = plain_resize(frames[1], tall, wide, cubic, 2)
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    cropped = resized[top : top + size, left : left + size] / 255
    expected = (cropped - np.array(T.CLIP_MEAN)) / np.array(T.CLIP_STD)
    assert T.clip_input(frames, size)[1].permute(1, 2, 0).numpy() == pytest.approx(expected, abs=1e-4)


def test_clip_input_keeps_overshoot_and_uint8_input_does_not() -> None:
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    frames[:, :, 8:] = 255
    mean, std = T.CLIP_MEAN[0], T.CLIP_STD[0]
    assert (
        T.clip_input(frames, 40).max() * std + mean > 1.02 or T.clip_input(frames, 40)[:, 0].max() * std + mean > 1.02
    )
    clamped = T.clip_input_uint8(frames, 40)[:, 0] * std + mean
    assert float(clamped.max()) == pytest.approx(1.0, abs=1e-5)
    assert np.allclose(np.rint(clamped.numpy() * 255), clamped.numpy() * 255, atol=1e-3)


def test_dino_input_is_bilinear_without_a_crop() -> None:
    frames = pictures(30, 52)
    expected = plain_resize(frames[0], 24, int(24 * 52 / 30), linear, 1) / 255
    expected = (expected - np.array(T.IMAGENET_MEAN)) / np.array(T.IMAGENET_STD)
    given = T.dino_input(frames, 24)
    assert given.shape == (2, 3, 24, 41)
    assert given[0].permute(1, 2, 0).numpy() == pytest.approx(expected, abs=1e-4)


def test_pil_input_is_antialiased() -> None:
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    # Averaging one-pixel stripes gives grey; sampling without antialiasing does not.
    assert float(T.clip_input_pil(stripes, 16).std(dim=(2, 3)).max()) < 0.2
    assert float(T.clip_input(stripes[:, :, :63], 16).std(dim=(2, 3)).max()) > 0.5


def test_musiq_input_only_shrinks() -> None:
    assert T.musiq_input(pictures(40, 50)).shape == (2, 3, 40, 50)
    assert T.musiq_input(pictures(40, 50), longest=25).shape == (2, 3, 20, 25)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (16, 8, [0, 2, 4, 6, 8, 10, 12, 14]),
        (81, 8, [4, 14, 24, 34, 44, 54, 64, 75]),
        (3, 5, [0, 1, 2, 2, 2]),
        (1, 4, [0, 0, 0, 0]),
    ],
)
def test_middle_frames(total: int, count: int, expected: list[int]) -> None:
    assert T.middle_frames(total, count) == expected


def catmull_rom(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5, as antialiasing resizers use it."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def test_clip_to_clip_inputs_are_not_rounded_to_bytes() -> None:
    frames = pictures(40, 60)
    inner = slice(8, -8)  # at the border weights are renormalised instead of pixels repeated
    expected = plain_resize(frames[0], 80, 120, catmull_rom, 2)[inner, 28:-28] / 255
    expected = (expected - np.array(T.IMAGENET_MEAN)) / np.array(T.IMAGENET_STD)
    given = T.dinov2_input(frames, resize_to=80, size=80)[0].permute(1, 2, 0).numpy()
    assert given[inner, inner] == pytest.approx(expected, abs=1e-4)
    expected = plain_resize(frames[0], 80, 80, catmull_rom, 2)[inner, inner] / 255
    given = T.dreamsim_input(frames, 80)[0].permute(1, 2, 0).numpy()
    assert given[inner, inner] == pytest.approx(expected, abs=1e-5)
    assert given.max() > 1.01  # overshoot is kept as well
