"""Worlds to pixels: ground, objects, panels, noise. What looks the same in several frames is drawn once.

Shapes: F frames, U different frames among them, S pixels to the side.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.scenes.render import cover_shape
from sparse_forcing.scenes.vocabulary import COLOUR_RGB
from sparse_forcing.scenes.worlds.ground import look
from sparse_forcing.scenes.worlds.world import Box, Item, Panel, World


def render_world(
    world: World,
    side: int,
    *,
    frames: Sequence[int] | None = None,
    objects: bool = True,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw ``frames`` (all of them when None) of a world: float32 [F, 3, S, S] in [-1, 1].

    ``objects`` False leaves out the objects and the noise drawn anew for every frame: what a judge needs to know.
    """
    frames = range(world.frames) if frames is None else frames
    if side < 1 or not frames or min(frames) < 0 or max(frames) >= world.frames:
        raise ConfigError(f"worlds: cannot draw {frames} at {side} pixels of a clip of {world.frames} frames")
    items = range(len(world.items)) if objects else range(0)
    seen = {frame: [world.seen(item, frame) for item in items] for frame in set(frames)}
    number: dict[object, int] = {}
    places = [number.setdefault(_state(world, seen[frame], frame), len(number)) for frame in frames]
    once = [frames[places.index(place)] for place in range(len(number))]
    picture = look(world.ground, [world.camera[frame] for frame in once], side, device)
    for item in items:
        boxes = {place: box for place, frame in enumerate(once) if (box := seen[frame][item]) is not None}
        _paint_item(picture, world.items[item], once, boxes)
    for panel in world.panels:
        _paint_panel(picture, panel, once)
    video = picture[torch.tensor(places, device=picture.device)]
    if world.frame_noise and objects:
        _add_noise(video, world, frames)
    return video


def _state(world: World, seen: list[Box | None], frame: int) -> object:
    """Everything that decides what a frame looks like, but for its noise."""
    return world.camera[frame], *seen, *(panel.boxes[frame] for panel in world.panels)


def _paint_item(picture: Tensor, item: Item, frames: list[int], boxes: dict[int, Box]) -> None:
    """Draw an object into those of the frames [U, 3, S, S] that have a box, each rectangle of pixels no larger than
    needed."""
    side, device = picture.shape[-1], picture.device
    for group in _neighbours(boxes):
        rows, columns = (
            slice(
                max(0, floor(min(boxes[place][axis] for place in group) * side - 1)),
                min(side, ceil(max(boxes[place][axis + 2] for place in group) * side + 1)),
            )
            for axis in (1, 0)
        )
        grid = (torch.arange(side, device=device) + 0.5) / side
        x, y = (torch.tensor([line[frames[place]] for place in group], device=device) for line in (item.x, item.y))
        radius = torch.full_like(x, item.identity.radius)
        cover = cover_shape(
            item.identity.shape, grid[columns] - x[:, None], grid[rows] - y[:, None], radius, torch.zeros_like(x), side
        )
        colour = _level(COLOUR_RGB[item.identity.colour], device)
        part = picture[group[0] : group[-1] + 1, :, rows, columns]
        part.add_((colour - part).mul_(cover[:, None]))


def _neighbours(boxes: dict[int, Box]) -> list[list[int]]:
    """Runs of frames that follow one another in which the object moves by less than an eighth of the screen."""
    groups: list[list[int]] = []
    for place, box in boxes.items():
        first = boxes[groups[-1][0]] if groups else box
        near = max(abs(box[0] - first[0]), abs(box[1] - first[1])) < 1 / 8
        if groups and groups[-1][-1] == place - 1 and near:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _paint_panel(picture: Tensor, panel: Panel, frames: list[int]) -> None:
    """Draw a rectangle with smooth edges over the frames [U, 3, S, S]."""
    side, device = picture.shape[-1], picture.device
    left, top, right, bottom = torch.tensor([panel.boxes[frame] for frame in frames], device=device).T[..., None]
    edges = torch.arange(side + 1, device=device) / side

    def share(low: Tensor, high: Tensor) -> Tensor:
        return (torch.minimum(edges[1:], high) - torch.maximum(edges[:-1], low)).mul_(side).clamp_(0, 1)

    cover = share(top, bottom)[:, None, :, None] * share(left, right)[:, None, None]
    picture.add_((_level(panel.rgb, device) - picture).mul_(cover))


def _level(rgb: tuple[int, int, int], device: torch.device) -> Tensor:
    """A colour as [3, 1, 1] in [-1, 1]."""
    return (torch.tensor(rgb, dtype=torch.float32, device=device) / 127.5 - 1)[:, None, None]


def _add_noise(video: Tensor, world: World, frames: Sequence[int]) -> None:
    """Noise of every frame's own, the same whichever frames are drawn with it."""
    for picture, frame in zip(video, frames, strict=True):
        generator = torch.Generator().manual_seed(world.ground.seed % 2**40 * 4096 + frame)
        noise = torch.randn(picture.shape[1:], generator=generator)
        picture.add_(noise.to(video.device) * (world.frame_noise / 127.5)).clamp_(-1, 1)
