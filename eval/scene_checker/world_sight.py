"""See what comes back in a clip of a world: colour, shape and size of what is there, and the error of the pixels.

The ground of a world is a function of its seed, so it is drawn without objects, and what differs from it is looked at:
on striped, textured and noisy grounds nothing else would tell an object from what lies behind it. Only the place where
the truth has the object is known, nothing of its looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log, log10

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sparse_forcing.errors import ConfigError, VideoError
from sparse_forcing.eval.scene_checker.scene_tracking import Background, Track, as_rgb, track_object
from sparse_forcing.scenes.vocabulary import COLOUR_RGB, SHAPES, SIZE_RADIUS
from sparse_forcing.scenes.worlds.draw import render_world
from sparse_forcing.scenes.worlds.truth import Return
from sparse_forcing.scenes.worlds.world import Box, World

MOST_FRAMES = 6  # of a return that are looked at
HALF_WINDOW = 0.36  # frame sides around the true centre in which to look: more than the largest object fills
LEAST_DISTANCE = 40.0  # from the ground, in 8-bit levels, of anything that counts
LARGEST_COLOUR_DISTANCE = 90.0  # from a colour of the palette
LEAST_OVERLAP = 0.55  # mean intersection over union with a shape
LARGEST_DRIFT = 40.0  # of the ground's colour that is forgiven


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """What was seen at a return: names (None: nothing that has one), and the error of the whole view against the truth.

    ``rmse`` is in 8-bit levels over all pixels of the frames looked at, ``psnr`` in decibels.
    """

    colour: str | None
    shape: str | None
    size: str | None
    rmse: float
    psnr: float


def see_return(clip: Tensor, world: World, entry: Return, *, start: int = 0) -> Sighting:
    """Look at a return in a clip [F, S, S, 3] (uint8, or floating point in [0, 1]) that begins at frame ``start``.

    Raises ConfigError when no frame of the return is in the clip, VideoError for a malformed clip.
    """
    frames = _frames(entry, start, len(clip))
    rgb = _pick(clip, [frame - start for frame in frames])
    side = rgb.shape[-1]
    truth, ground = (as_rgb(render_world(world, side, frames=frames, objects=objects)) for objects in (True, False))
    rmse = float((rgb - truth).square().mean().sqrt())
    track = _track(rgb, ground, _near(world, entry, frames, side))
    colour, shape, size = (None, None, None) if track is None else _names(track)
    return Sighting(colour=colour, shape=shape, size=size, rmse=rmse, psnr=20 * log10(255 / rmse) if rmse > 0 else inf)


def _frames(entry: Return, start: int, length: int) -> list[int]:
    """Frames of the return that the clip has, at most MOST_FRAMES of them, evenly spread."""
    first, last = max(entry.frames[0], start), min(entry.frames[1], start + length) - 1
    if last < first:
        raise ConfigError(
            f"return at frames {entry.frames}: outside the clip, which has frames {start} to {start + length - 1}"
        )
    count = min(MOST_FRAMES, last - first + 1)
    return [first + (last - first) * step // max(1, count - 1) for step in range(count)]


def _pick(clip: Tensor, frames: list[int]) -> Tensor:
    """Those frames as [F, 3, S, S] in 0..255."""
    clip = torch.as_tensor(clip)
    if clip.ndim != 4 or clip.shape[-1] != 3:
        raise VideoError(f"clip: expected [frames, side, side, 3], got {list(clip.shape)}")
    picked = rearrange(clip[frames], "f h w c -> f c h w")
    return as_rgb(picked * 2 - 1 if picked.is_floating_point() else picked)


def _near(world: World, entry: Return, frames: list[int], side: int) -> Tensor:
    """Where an object of any looks may be: around the true place, away from the other objects; bool [F, S, S]."""
    near = torch.stack([_inside(_window(entry.boxes[frame - entry.frames[0]]), 0.0, side) for frame in frames])
    for number, item in enumerate(world.items):
        for place, frame in enumerate(frames):
            box = item.box(frame)
            if number != entry.item and box is not None:
                near[place] &= ~_inside(box, 1 / side, side)
    return near


def _window(box: Box) -> Box:
    """The part of the picture to look at, as wide whatever the object is, so that it says nothing of its size."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return x - HALF_WINDOW, y - HALF_WINDOW, x + HALF_WINDOW, y + HALF_WINDOW


def _inside(box: Box, margin: float, side: int) -> Tensor:
    """Pixels [S, S] of a box and of a margin around it."""
    grid = (torch.arange(side) + 0.5) / side
    across = (grid > box[0] - margin) & (grid < box[2] + margin)
    down = (grid > box[1] - margin) & (grid < box[3] + margin)
    return down[:, None] & across


def _track(rgb: Tensor, ground: Tensor, near: Tensor) -> Track | None:
    """The object as on a plain ground: each pixel's share of the object's colour takes the place of its colour.

    None where nothing differs from the ground.
    """
    ground = ground + _drift(rgb - ground)
    distance = (rgb - ground).square().sum(1).sqrt() * near
    level = avg_pool2d(distance, 3, 1, 1).amax((1, 2), keepdim=True)
    core = (distance > LEAST_DISTANCE) & (distance > 0.6 * level)
    if not bool(core.any()):
        return None
    for _ in range(2):
        colour = _median(rgb, core)
        ray = colour[:, :, None, None] - ground
        share = ((rgb - ground) * ray).sum(1) / ray.square().sum(1).clamp(min=LEAST_DISTANCE**2)
        share = share.clamp(0, 1.1) * near
        core = (share > 0.8) if bool((share > 0.8).flatten(1).any(1).all()) else core
    plain = ground.mean((2, 3))
    contrast = (colour - plain).norm(dim=1)[:, None, None].clamp(min=LEAST_DISTANCE)
    flat = plain[:, :, None, None] + share[:, None] * (colour - plain)[:, :, None, None]
    background = Background(rgb=plain, plain=torch.ones(len(rgb)))
    return track_object(flat, background, share * contrast, share > 0.25)


def _drift(offset: Tensor) -> Tensor:
    """How far the ground's colour is off in most of each frame, [F, 3, 1, 1]."""
    return offset.flatten(2).median(-1).values[..., None, None].clamp(-LARGEST_DRIFT, LARGEST_DRIFT)


def _median(rgb: Tensor, mask: Tensor) -> Tensor:
    """Median colour of the marked pixels, frame by frame, [F, 3]; of all of them where a frame has none."""
    return torch.stack(
        [
            picture[:, own if bool(own.any()) else torch.ones_like(own)].median(1).values
            for picture, own in zip(rgb, mask, strict=True)
        ]
    )


def _names(track: Track) -> tuple[str | None, str | None, str | None]:
    """Colour, shape and size by what most frames show."""
    visible = track.visible
    if not bool(visible.any()):
        return None, None, None
    palette = torch.tensor(list(COLOUR_RGB.values())).float()
    distance = (track.rgb[visible].median(0).values - palette).norm(dim=1)
    nearest = int(distance.argmin())
    colour = list(COLOUR_RGB)[nearest] if float(distance[nearest]) < LARGEST_COLOUR_DISTANCE else None
    overlap = track.overlap[visible].mean(0)
    best = int(overlap.argmax())
    if float(overlap[best]) < LEAST_OVERLAP:
        return colour, None, None
    radius = float(track.size[visible, best].median())
    return colour, SHAPES[best], min(SIZE_RADIUS, key=lambda name: abs(log(SIZE_RADIUS[name] / radius)))
