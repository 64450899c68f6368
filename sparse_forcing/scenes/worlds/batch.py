"""Worlds by number: world i of a seed is the same whatever it is drawn with. The front door of this package."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.scenes.worlds.captions import write_parade, write_story
from sparse_forcing.scenes.worlds.config import KINDS, WorldConfig
from sparse_forcing.scenes.worlds.draw import render_world
from sparse_forcing.scenes.worlds.parade import plan_parade
from sparse_forcing.scenes.worlds.reappear import plan_reappear
from sparse_forcing.scenes.worlds.revisit import plan_revisit
from sparse_forcing.scenes.worlds.swaps import plan_swaps
from sparse_forcing.scenes.worlds.truth import Return, find_returns
from sparse_forcing.scenes.worlds.world import Ground, Plan, World

SIGNS = ("brightness", "ruler")
_PLANNERS: dict[str, Callable[[random.Random, WorldConfig], Plan]] = {
    "revisit": plan_revisit,
    "reappear": plan_reappear,
    "parade": plan_parade,
    "swaps": plan_swaps,
}


@dataclass(frozen=True, kw_only=True)
class WorldBatch:
    """Worlds of one length, in order."""

    worlds: tuple[World, ...]

    def __len__(self) -> int:
        return len(self.worlds)

    def render(
        self,
        side: int,
        *,
        frames: Sequence[int] | None = None,
        objects: bool = True,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Float32 [B, F, 3, S, S] in [-1, 1]; arguments as in `draw.render_world`."""
        drawn = [render_world(world, side, frames=frames, objects=objects, device=device) for world in self.worlds]
        return torch.stack(drawn)

    def captions(self) -> list[str]:
        """One caption for the whole of each clip."""
        return [world.story for world in self.worlds]

    def schedules(self) -> list[dict[int, str]]:
        """For each clip the prompts by the frame from which they hold."""
        return [world.prompts for world in self.worlds]

    @cached_property
    def returns(self) -> list[tuple[Return, ...]]:
        """What comes back in each clip."""
        return [find_returns(world) for world in self.worlds]


def sample_worlds(kind: str, count: int, seed: int, config: WorldConfig | None = None, *, start: int = 0) -> WorldBatch:
    """Worlds ``start`` to ``start + count - 1`` of a seed; raises ConfigError for a clip too short for the kind."""
    if count < 1 or start < 0:
        raise ConfigError(f"sample_worlds: count must be at least 1 and start not negative, got {count} and {start}")
    numbers = range(start, start + count)
    return WorldBatch(worlds=tuple(draw_world(kind, seed, number, config) for number in numbers))


def sample_mixture(
    weights: Mapping[str, float], numbers: Sequence[int], seed: int, config: WorldConfig | None = None
) -> WorldBatch:
    """The worlds of those numbers, of kinds drawn by weight; a number alone decides its kind and all the rest."""
    check_weights(weights)
    kinds = sorted(weights)
    drawn = []
    for number in numbers:
        choice = random.Random(f"kind of world {number} of {seed}").choices(kinds, [weights[kind] for kind in kinds])
        drawn.append(draw_world(choice[0], seed, number, config))
    return WorldBatch(worlds=tuple(drawn))


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ConfigError for an unknown kind, a negative weight, or nothing to draw."""
    unknown = [kind for kind in weights if kind not in KINDS]
    if unknown:
        raise ConfigError(f"worlds: unknown kind {unknown[0]!r}; choose {', '.join(KINDS)}")
    if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
        raise ConfigError(f"worlds: weights must not be negative and one must be above 0, got {dict(weights)}")


def draw_world(kind: str, seed: int, index: int, config: WorldConfig | None = None) -> World:
    """World ``index`` of a seed; raises ConfigError for an unknown kind or a clip too short for it."""
    check_weights({kind: 1.0})
    config = config or WorldConfig()
    rng = random.Random(f"{kind} {index} of {seed}")
    ground_kind, ground_seed = rng.choice(config.grounds), rng.getrandbits(48)
    sign = rng.choice(SIGNS) if kind == "revisit" else SIGNS[0]
    plan = _PLANNERS[kind](rng, config)
    camera = plan.camera or (0.0,) * config.frames
    story = write_story(rng, kind, ground_kind, ordinal=plan.asked or 0)
    prompts = {0: story}
    if plan.asked is not None:
        before, again = write_parade(rng, ground_kind, plan.asked)
        prompts = {0: before, plan.question: again}
    ground = Ground(kind=ground_kind, seed=ground_seed, sign=sign, span=(min(camera), max(camera)))
    return World(
        kind=kind,
        frames=config.frames,
        seed=seed,
        index=index,
        ground=ground,
        camera=camera,
        items=tuple(plan.items),
        panels=tuple(plan.panels),
        story=story,
        prompts=prompts,
        frame_noise=config.frame_noise,
    )
