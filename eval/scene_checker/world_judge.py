"""Does what comes back in a world look as it did? Verdicts on colour, shape and size, and what luck alone would get.

``python -m sparse_forcing.eval.scene_checker.world_judge`` judges the truth itself and prints, for every
world and ground, the share of right verdicts and what shuffled pairs get.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from sparse_forcing.eval.scene_checker.world_sight import Sighting, see_return
from sparse_forcing.scenes.worlds.batch import sample_worlds
from sparse_forcing.scenes.worlds.config import GROUNDS, KINDS, WorldConfig
from sparse_forcing.scenes.worlds.draw import render_world
from sparse_forcing.scenes.worlds.truth import Return, find_returns
from sparse_forcing.scenes.worlds.world import World

ASPECTS = ("colour", "shape", "size")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a sighting has the colour, shape and size that came back."""

    colour: bool
    shape: bool
    size: bool

    @property
    def all(self) -> bool:
        return self.colour and self.shape and self.size


def compare(sighting: Sighting, entry: Return) -> Verdict:
    """Judge what was seen against what should have come back."""
    right = {name: getattr(sighting, name) == getattr(entry, name) for name in ASPECTS}
    return Verdict(**right)


def judge_clip(clip: Tensor, world: World, *, start: int = 0) -> list[tuple[Return, Sighting, Verdict]]:
    """Every return of a world of which the clip has a frame; ``clip`` and ``start`` as in `world_sight.see_return`."""
    found = []
    for entry in find_returns(world):
        if entry.frames[0] < start + len(clip) and start < entry.frames[1]:
            sighting = see_return(clip, world, entry, start=start)
            found.append((entry, sighting, compare(sighting, entry)))
    return found


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of right verdicts, aspect by aspect and with all right."""
    return {name: sum(getattr(each, name) for each in verdicts) / max(1, len(verdicts)) for name in (*ASPECTS, "all")}


def chance_level(sightings: Sequence[Sighting], entries: Sequence[Return]) -> dict[str, float]:
    """What is right by luck: every sighting judged against the return of every other clip, one of each clip."""
    pairs = [(seen, entry) for i, seen in enumerate(sightings) for j, entry in enumerate(entries) if i != j]
    return shares([compare(seen, entry) for seen, entry in pairs])


def ground_truth_accuracy(
    kind: str, ground: str, clips: int, *, side: int, seed: int = 0, frames: int = 80, frame_noise: float = 0.0
) -> dict[str, float]:
    """Share of right verdicts on drawn worlds, on the last return of each, and what shuffled pairs get."""
    config = WorldConfig(frames=frames, grounds=(ground,), split="all", frame_noise=frame_noise)
    batch = sample_worlds(kind, clips, seed, config)
    sightings, entries, begun = [], [], time.perf_counter()
    for world, returns in zip(batch.worlds, batch.returns, strict=True):
        entry = returns[-1]
        clip = rearrange(render_world(world, side, frames=range(*entry.frames)), "f c h w -> f h w c") * 0.5 + 0.5
        sightings.append(see_return(clip, world, entry, start=entry.frames[0]))
        entries.append(entry)
    found = shares([compare(seen, entry) for seen, entry in zip(sightings, entries, strict=True)])
    chance = {f"chance_{name}": value for name, value in chance_level(sightings, entries).items()}
    return found | chance | {"clips_per_second": clips / (time.perf_counter() - begun)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the judge's accuracy on the truth, and the chance level, as JSON."""
    parser = argparse.ArgumentParser(description="Judge rendered worlds with the judge of what comes back.")
    parser.add_argument("--clips", type=int, default=200, help="clips for each world and ground")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, default=64, help="pixels to the side")
    parser.add_argument("--frame-noise", type=float, default=0.0, help="noise of every frame, in 8-bit levels")
    options = parser.parse_args(arguments)
    report = {
        f"{kind}, {ground}": {
            name: round(value, 4)
            for name, value in ground_truth_accuracy(
                kind, ground, options.clips, side=options.side, seed=options.seed, frame_noise=options.frame_noise
            ).items()
        }
        for kind in KINDS
        for ground in GROUNDS
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
