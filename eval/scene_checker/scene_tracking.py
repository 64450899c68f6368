"""Find the background and the objects of a plain synthetic clip from its pixels alone.

Shapes: F frames, S pixels to the side, K template cells to the side.  Colours are 0..255, lengths are in frame sides,
x points right and y down, and the picture wraps around its edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import pi

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, pad

from sparse_forcing.errors import VideoError
from sparse_forcing.scenes.render import coverage
from sparse_forcing.scenes.vocabulary import COLOUR_RGB, SHAPES

PLAIN_DISTANCE = 60.0  # a pixel this close to the frame's median belongs to the background
LEAST_CONTRAST = 60.0  # half the smallest distance between an object colour and a background
LEAST_AREA = 0.008  # a third of the smallest object
FOLDS = {"triangle": 3, "square": 4, "star": 5}
_TURNS = {"circle": 1, "ring": 1, "square": 18, "triangle": 24, "star": 15}  # template angles, about 5 degrees apart
_SCALES = (0.86, 0.93, 1.0, 1.08, 1.16)
_CELLS = 40
_REACH = 2.0  # half the template window, in radii of the circle of equal area


@dataclass(frozen=True, kw_only=True)
class Background:
    """``rgb`` [F, 3]: each frame's median; ``plain`` [F]: the share of its pixels near that colour."""

    rgb: Tensor
    plain: Tensor


@dataclass(frozen=True, kw_only=True)
class Track:
    """One object in F frames.

    ``rgb`` [F, 3]; ``visible`` [F] bool; ``x``, ``y`` [F] in [0, 1); ``radius`` [F] of the circle of equal area;
    ``stray`` [F] the area, in frames, of whatever else is there;
    ``overlap`` [F, shapes] the best intersection over union with each shape, and ``size`` [F, shapes] the radius of
    the size that this fit stands for; ``moments`` fold -> complex [F], whose argument is fold times the angle.
    """

    rgb: Tensor
    visible: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    stray: Tensor
    overlap: Tensor
    size: Tensor
    moments: dict[int, Tensor]


def as_rgb(video: Tensor) -> Tensor:
    """[F, 3, S, S], uint8 or floating point in [-1, 1], as float32 in 0..255 on the CPU.

    Raises VideoError for another shape, type, or values that are not finite.
    """
    if video.ndim != 4 or video.shape[1] != 3 or video.shape[2] != video.shape[3] or 0 in video.shape:
        raise VideoError(f"clip: expected [frames, 3, side, side], got {list(video.shape)}")
    if video.dtype == torch.uint8:
        return video.cpu().float()
    if not video.is_floating_point():
        raise VideoError(f"clip: expected uint8 or floating point values, got {video.dtype}")
    video = video.detach().cpu().float()
    if not bool(video.isfinite().all()):
        raise VideoError("clip: some pixels are NaN or infinite")
    return (video.clamp(-1, 1) + 1) * 127.5


def measure_background(rgb: Tensor) -> Background:
    """The colour that fills most of every frame of ``rgb`` [F, 3, S, S]."""
    median = rgb.flatten(2).median(-1).values
    distance = _length(rgb - median[:, :, None, None])
    return Background(rgb=median, plain=(distance < PLAIN_DISTANCE).float().mean((1, 2)))


def track_objects(rgb: Tensor, background: Background, colours: Sequence[str]) -> list[Track]:
    """Follow one object, or two told apart by ``colours``: each pixel joins the colour it is mixed from.

    A single object is whatever differs from the measured background, whatever its colour.
    """
    offset = rgb - background.rgb[:, :, None, None]
    distance = _length(offset)
    strong = float(distance.flatten()[::7].quantile(0.995))
    seen = distance > max(40.0, 0.3 * strong)
    parts = _split(offset, distance * seen, background, colours) if len(colours) > 1 else [torch.ones_like(seen)]
    return [track_object(rgb, background, distance * part, seen & part) for part in parts]


def _length(offset: Tensor) -> Tensor:
    """Euclidean length over the channels of [F, 3, S, S]."""
    return offset.square().sum(1).sqrt_()


def _split(offset: Tensor, distance: Tensor, background: Background, colours: Sequence[str]) -> list[Tensor]:
    """One mask [F, S, S] for each of two colours; every pixel is in exactly one.

    A pixel belongs to the colour whose mixture with the background comes nearest.  The colours start at the
    caption's and move to what is really there; at last neighbours decide together.
    """
    rays = torch.tensor([COLOUR_RGB[name] for name in colours]).float() - background.rgb[:, None]  # [F, 2, 3]
    pixels = offset.flatten(2)
    for step in range(3):
        along, length = (rays @ pixels).unflatten(-1, offset.shape[-2:]), rays.square().sum(-1)[..., None, None]
        share = (along / length).clamp(0, 1.2)
        excess = share * (share * length - 2 * along)  # |offset - share ray|^2 - |offset|^2
        first = excess[:, 0] < excess[:, 1]
        if step < 2:
            masks = (first, ~first)
            rays = torch.stack(
                [_mean_offset(offset, distance * mask, ray) for mask, ray in zip(masks, rays.unbind(1))], 1
            )
    first = avg_pool2d(torch.where(first, distance, -distance), 5, 1, 2) > 0
    return [first, ~first]


def _mean_offset(offset: Tensor, distance: Tensor, otherwise: Tensor) -> Tensor:
    """Mean over the clip of the pixels farthest from the background, one ray a frame; ``otherwise`` if none."""
    core = (distance > 0.7 * distance.amax((1, 2), keepdim=True))[:, None]
    return (offset * core).sum((0, 2, 3)).div(core.sum()).expand_as(otherwise) if bool(core.any()) else otherwise


def track_object(rgb: Tensor, background: Background, distance: Tensor, seen: Tensor) -> Track:
    """Follow what ``seen`` [F, S, S] marks in ``rgb`` [F, 3, S, S], ``distance`` [F, S, S] from the background."""
    side = rgb.shape[-1]
    # The purest pixels give the colour: smoothing keeps single noisy ones from setting the level.
    level = avg_pool2d(distance, 3, 1, 1).amax((1, 2), keepdim=True)
    core = (seen & (distance >= 0.8 * level))[:, None]
    colour = (rgb * core).sum((2, 3)) / core.sum((2, 3)).clamp(min=1)
    contrast = (colour - background.rgb).norm(dim=1).clamp(min=LEAST_CONTRAST)[:, None, None]
    weight = ((distance / contrast - 0.25) * 2).clamp(0, 1)
    weight = weight * (avg_pool2d(pad(weight[:, None], (1, 1, 1, 1), mode="circular"), 3, 1)[:, 0] > 0.3)  # no specks

    grid = (torch.arange(side) + 0.5) / side
    total = weight.sum((1, 2)) / side**2
    x, y = (_circular_mean(weight.sum(axis), grid) for axis in (1, 2))
    area = total
    for _ in range(3):  # far-away remains must not pull the centre
        across, down = (_wrap(grid - centre[:, None]) for centre in (x, y))
        far = across.square()[:, None] + down.square()[:, :, None]
        near = weight * (far < (2.2**2 / pi) * area[:, None, None].clamp(min=LEAST_AREA))
        area = near.sum((1, 2)) / side**2
        mass = near.sum((1, 2)).clamp(min=1e-6)
        x = (x + (near.sum(1) * across).sum(1) / mass) % 1
        y = (y + (near.sum(2) * down).sum(1) / mass) % 1
    radius = (area.clamp(min=1e-6) / pi).sqrt()
    patch = _patch(weight, x, y, radius)
    overlap, size = _match(patch, radius)
    return Track(
        rgb=colour,
        visible=area > LEAST_AREA,
        x=x,
        y=y,
        radius=radius,
        stray=total - area,
        overlap=overlap,
        size=size,
        moments=_moments(patch),
    )


def _circular_mean(mass: Tensor, grid: Tensor) -> Tensor:
    """Mean position [F] on the circle of length 1 of mass [F, S]."""
    angle = 2 * pi * grid
    return torch.atan2((mass * angle.sin()).sum(1), (mass * angle.cos()).sum(1)) / (2 * pi) % 1


def _wrap(offset: Tensor) -> Tensor:
    return (offset + 0.5) % 1 - 0.5


def _patch(weight: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """The object on a grid of its own, [F, K*K], centred and scaled by its radius."""
    side = weight.shape[-1]
    reach = _REACH * radius[:, None] * _cells()
    # On a canvas twice the frame's side, normalised coordinates are frame sides from the frame's centre.
    columns, rows = (x[:, None] - 0.5 + reach)[:, None], (y[:, None] - 0.5 + reach)[:, :, None]
    where = torch.stack(torch.broadcast_tensors(columns, rows), -1)
    before, after = side // 2, side - side // 2
    canvas = pad(weight[:, None], (before, after, before, after), mode="circular")
    return grid_sample(canvas, where, align_corners=False).flatten(1)


def _cells() -> Tensor:
    """Cell centres of the patch in [-1, 1]."""
    return (torch.arange(_CELLS) + 0.5) / _CELLS * 2 - 1


def _moments(patch: Tensor) -> dict[int, Tensor]:
    """Angular Fourier moments of the folds that a rotation of each shape leaves unchanged."""
    place = torch.complex(*torch.broadcast_tensors(_cells(), _cells()[:, None])).flatten()
    inside = place.abs().square() * (place.abs() < 1)
    return {
        fold: patch.to(torch.complex64) @ (inside * torch.polar(torch.ones_like(inside), fold * place.angle()))
        for fold in FOLDS.values()
    }


@lru_cache(maxsize=1)
def _templates() -> tuple[Tensor, Tensor, Tensor]:
    """Shape masks of unit-area-circle size times every scale: [N, K*K], shape numbers [N], size per radius [N]."""
    masks, numbers, sizes = [], [], []
    for number, shape in enumerate(SHAPES):
        turn = 2 * pi / FOLDS.get(shape, 1) / _TURNS[shape]
        angle = torch.arange(_TURNS[shape]) * turn
        middle = torch.full_like(angle, 0.5)
        unit = coverage(shape, middle[:1], middle[:1], torch.tensor([0.2]), angle[:1], 512).mean()
        per_radius = 0.2 / (unit / pi).sqrt()  # of the size, by radius of the circle of equal area
        for scale in _SCALES:
            size = scale * per_radius
            masks.append(coverage(shape, middle, middle, (size / (2 * _REACH)).expand_as(angle), angle, _CELLS))
            numbers += [number] * len(angle)
            sizes += [float(size)] * len(angle)
    return torch.cat(masks).flatten(1), torch.tensor(numbers), torch.tensor(sizes)


def _match(patch: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Overlap with the best template of each shape [F, shapes], and the size radius of that template."""
    masks, numbers, sizes = _templates()
    both = patch @ masks.T
    union = patch.square().sum(1, keepdim=True) + masks.square().sum(1) - both
    overlap = both / union.clamp(min=1e-6)
    best = [overlap[:, numbers == number].max(1) for number in range(len(SHAPES))]
    chosen = [sizes[numbers == number][found.indices] for number, found in enumerate(best)]
    return torch.stack([found.values for found in best], 1), torch.stack(chosen, 1) * radius[:, None]
