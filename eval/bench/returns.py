"""What comes back in a world, generated: given everything up to shortly before a return, is what returns what left?

The model is given the true frames of a world until just before the object shows again, as whole chunks, and generates
on. What the window shows says where and when something is to appear; only the memory knows what. Worlds are drawn so
that the gap is the same in all of them, and all memories get the same worlds and the same noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import torch
from einops import rearrange

from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.scene_checker.world_judge import Verdict, compare
from sparse_forcing.eval.scene_checker.world_sight import Sighting, see_return
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.scenes.worlds.batch import draw_world
from sparse_forcing.scenes.worlds.config import WorldConfig
from sparse_forcing.scenes.worlds.truth import Return, find_returns
from sparse_forcing.scenes.worlds.world import World

TRIES = 50  # worlds drawn for each that is wanted
LOOKED_AT = 6  # frames of a return that the judge wants to see
ON_ITS_WAY = 3  # last given frames that must show the camera coming back, or the wall at which it turns


@dataclass(frozen=True, kw_only=True)
class Task:
    """A world, the return that is asked for, and how many of its frames are given and then generated."""

    number: int
    world: World
    entry: Return
    given: int
    generated: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was seen at the return of a task, the verdict, the bytes of the cache (one video's), and the frames
    [F, H, W, 3] uint8 that were generated."""

    task: Task
    sighting: Sighting
    verdict: Verdict
    cache_bytes: int
    frames: np.ndarray


def plan_tasks(pipe: SparseForcingPipeline, kind: str, worlds: WorldConfig, count: int, seed: int) -> list[Task]:
    """The first `count` worlds of a seed with a return after the gap that `worlds` asks for, each as a task.

    Raises:
        ConfigError: hardly any world has such a return.
    """
    assert worlds.gap is not None
    tasks: list[Task] = []
    reason = ""
    for number in range(TRIES * count):
        try:
            world = draw_world(kind, seed, number, worlds)
        except ConfigError as error:  # the gap does not fit the object that was drawn
            reason = f"; {error}"
            continue
        asked = [entry for entry in find_returns(world) if worlds.gap[0] <= entry.gap <= worlds.gap[1]]
        task = _task(pipe, number, world, asked[0]) if asked else None
        if task is not None:
            tasks.append(task)
        if len(tasks) == count:
            return tasks
    raise ConfigError(
        f"worlds: of {TRIES * count} worlds of {kind} only {len(tasks)} have a return after {worlds.gap}{reason}"
    )


def _task(pipe: SparseForcingPipeline, number: int, world: World, entry: Return) -> Task | None:
    """Given are the whole chunks before anything of the object shows again; None where there are none, or where what is
    given does not say when the camera comes back."""
    given = pipe.geometry.whole_chunk_frames(entry.last_seen + entry.gap + 1)
    until = min(entry.frames[1], entry.frames[0] + LOOKED_AT)
    if given < ON_ITS_WAY or not _says_when(world, entry, given):
        return None
    return Task(number=number, world=world, entry=entry, given=given, generated=until - given)


def _says_when(world: World, entry: Return, given: int) -> bool:
    """Whether a camera that moves at all comes nearer in the last given frames, or the wall at which it turns shows."""
    if max(world.camera) == min(world.camera):
        return True
    last = range(given - ON_ITS_WAY, given)
    away = [abs(world.camera[frame] - world.camera[entry.frames[0]]) for frame in last]
    walls = [panel.boxes[frame] for panel in world.panels for frame in last]
    return all(later < earlier for earlier, later in pairwise(away)) or (
        bool(walls) and all(left < 1 and right > 0 for left, _, right, _ in walls)
    )


def answer_tasks(
    pipe: SparseForcingPipeline,
    memory: MemoryConfig,
    tasks: Sequence[Task],
    *,
    seed: int,
    batch_size: int,
    size: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> Iterator[list[Answer]]:
    """Answers, batch by batch; tasks that are given equally much go together. size: pixels to the side; the model's
    where None."""
    side = size or pipe.defaults.height
    ordered = sorted(tasks, key=lambda task: task.given)
    for _, group in groupby(ordered, key=lambda task: task.given):
        members = list(group)
        for first in range(0, len(members), batch_size):
            batch = members[first : first + batch_size]
            truth = np.stack([world_frames(task.world, side).numpy() for task in batch])
            chunks = pipe.stream(
                [task.world.story for task in batch],
                height=side,
                width=side,
                video=truth[:, : batch[0].given],
                num_frames=max(task.generated for task in batch),
                memory=memory,
                generator=[torch.Generator().manual_seed(seed * 100_003 + task.number) for task in batch],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            )
            pieces, held = [], 0
            for chunk in chunks:
                pieces.append(chunk.frames)
                held = max(held, chunk.cache_bytes)
            frames = np.concatenate(pieces, 1)
            yield [_judge(task, video, held // len(batch)) for task, video in zip(batch, frames)]


def world_frames(world: World, side: int) -> torch.Tensor:
    """The true frames of a world, [F, S, S, 3] in [0, 1]."""
    from sparse_forcing.scenes.worlds.draw import render_world

    return (rearrange(render_world(world, side), "f c h w -> f h w c") * 0.5 + 0.5).clamp(0, 1)


def _judge(task: Task, frames: np.ndarray, cache_bytes: int) -> Answer:
    frames = frames[: task.generated]
    sighting = see_return(torch.from_numpy(frames), task.world, task.entry, start=task.given)
    pixels = (frames * 255).round().astype(np.uint8)
    return Answer(
        task=task, sighting=sighting, verdict=compare(sighting, task.entry), cache_bytes=cache_bytes, frames=pixels
    )
