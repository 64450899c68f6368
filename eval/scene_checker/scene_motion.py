"""Name the motion of a tracked object from its path, its size over time and its rotation.

The thresholds are half of what the slowest motion of ``sparse_forcing.scenes`` does in the frames at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, log, pi

import torch
from torch import Tensor

from sparse_forcing.eval.scene_checker.scene_tracking import Track
from sparse_forcing.scenes.sample import MOVE_SPEED, ORBIT_FRAMES, RESIZE_FRAMES, RESIZE_LOG, SPIN_SPEED

LEAST_VISIBLE = 0.8  # of the frames; a motion that cannot be followed is not named
STEADY_TREND = 0.1  # log-radius over a clip that still counts as one size


@dataclass(frozen=True, kw_only=True)
class Motion:
    """What was seen: ``name`` (None: nothing that the vocabulary names) and the measures behind it."""

    name: str | None
    in_place: bool
    trend: float  # log of the last over the first radius
    measures: dict[str, float]


def classify_motion(track: Track, fold: int | None) -> Motion:
    """Classify the motion; ``fold`` is the rotational symmetry of the shape, None where rotation cannot show."""
    visible = track.visible
    frames = int(visible.sum())
    if frames < 3 or visible.float().mean() < LEAST_VISIBLE:
        return Motion(name=None, in_place=False, trend=0.0, measures={"visible": float(visible.float().mean())})
    x, y = (_unwrap(values[visible]) for values in (track.x, track.y))
    across, down = float(x.max() - x.min()), float(y.max() - y.min())
    in_place = hypot(across, down) < min(0.12, MOVE_SPEED[0] / 2 * (frames - 1))
    ends = max(1, min(3, frames // 4))
    radius = track.radius[visible]
    trend = log(float(radius[-ends:].median() / radius[:ends].median()))
    measures = {"across": across, "down": down, "trend": trend}
    if in_place:
        name = _resize(trend, frames)
        if name is None:
            speed, coherence = _spin(track, fold)
            measures |= {"spin": speed, "coherence": coherence}
            sense = "clockwise" if speed > 0 else "counterclockwise"
            turning = abs(speed) > SPIN_SPEED[0] / 2 and coherence > 0.5
            name = f"spins {sense}" if turning else "stays still"
    else:
        orbit, found = _orbit(x, y)
        measures |= found
        name = orbit or _straight(x, y, frames, measures)
    return Motion(name=name, in_place=in_place, trend=trend, measures=measures)


def resize_left(start: int, frames: int) -> float:
    """The least log-radius that a growing or shrinking object changes by from frame ``start`` on."""
    last = start + frames - 1
    return min(RESIZE_LOG * (min(last / length, 1.0) - min(start / length, 1.0)) for length in RESIZE_FRAMES)


def _unwrap(position: Tensor) -> Tensor:
    """A path on the torus as a continuous one."""
    steps = (position.diff() + 0.5) % 1 - 0.5
    return torch.cat([position[:1], position[:1] + steps.cumsum(0)])


def _resize(trend: float, frames: int) -> str | None:
    if abs(trend) < min(0.2, RESIZE_LOG * (frames - 1) / RESIZE_FRAMES[1] / 2):
        return None
    return "grows" if trend > 0 else "shrinks"


def _spin(track: Track, fold: int | None) -> tuple[float, float]:
    """Clockwise radians per frame, and how steady they are in [0, 1]."""
    if fold is None:
        return 0.0, 0.0
    moment = track.moments[fold]
    turn = moment[1:] * moment[:-1].conj()
    turn = (turn / turn.abs().clamp(min=1e-12))[track.visible[1:] & track.visible[:-1]]
    mean = turn.mean()
    return float(mean.angle()) / fold, float(mean.abs())


def _orbit(x: Tensor, y: Tensor) -> tuple[str | None, dict[str, float]]:
    """Fit a circle (least squares of x^2 + y^2 = a x + b y + c) and follow the bearing from its centre."""
    table = torch.stack([x, y, torch.ones_like(x)], 1).double()
    a, b, c = torch.linalg.lstsq(table, (x * x + y * y).double()[:, None], driver="gelsd").solution[:, 0].tolist()
    radius = max(c + (a * a + b * b) / 4, 0.0) ** 0.5
    across, down = x - a / 2, y - b / 2
    error = float((across.square() + down.square()).sqrt().sub(radius).square().mean().sqrt())
    bearing = torch.atan2(down, across)
    turn = float(((bearing.diff() + pi) % (2 * pi) - pi).sum())
    measures = {"orbit_radius": radius, "orbit_error": error, "turn": turn}
    width, height = float(x.max() - x.min()), float(y.max() - y.min())
    round_path = 0.1 < radius < 0.45 and error < 0.25 * radius and min(width, height) > 0.4 * max(width, height)
    if not round_path or abs(turn) < pi / ORBIT_FRAMES[1] * (len(x) - 1):
        return None, measures
    return "orbits clockwise" if turn > 0 else "orbits counterclockwise", measures


def _straight(x: Tensor, y: Tensor, frames: int, measures: dict[str, float]) -> str | None:
    """A direction or a bounce along the axis of the longer way; back and forth must not be in doubt."""
    ways = {name: path.diff() for name, path in (("x", x), ("y", y))}
    length = {name: float(steps.abs().sum()) for name, steps in ways.items()}
    main, other = sorted(ways, key=lambda name: length[name], reverse=True)
    spread = {"x": measures["across"], "y": measures["down"]}
    forth = float(ways[main].clamp(min=0).sum())
    back = length[main] - forth
    minor = min(forth, back) / length[main]
    measures["backward_share"] = minor
    if spread[other] > 0.35 * spread[main]:
        return None
    if minor > 0.25:
        return "bounces left and right" if main == "x" else "bounces up and down"
    if minor > 0.2 or abs(forth - back) < MOVE_SPEED[0] / 2 * (frames - 1):
        return None
    plus, minus = ("right", "left") if main == "x" else ("down", "up")
    return f"moves {plus if forth > back else minus}"
