"""What comes back, to look at: a world to pan on the way out, and what two memories draw on the way back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparse_forcing.cli.playground.visitors import Room, read_seed
from sparse_forcing.sampling.generation.jobs import GenerateConfig
from sparse_forcing.sampling.generation.settings import Settings, explain_out_of_memory, resolve_settings
from sparse_forcing.sampling.live import cache_bound
from sparse_forcing.scenes.worlds.config import WorldConfig

if TYPE_CHECKING:
    import numpy as np

    from sparse_forcing.eval.bench.returns import Task
    from sparse_forcing.sampling.decoding import VideoChunk
    from sparse_forcing.sampling.pipeline import SparseForcingPipeline

KIND = "revisit"
WORLD = WorldConfig(frames=80, gap=(24, 27), grounds=("smooth",))  # what `tiny-base` has learned
MEMORIES = ("window", "sparse")


@dataclass(frozen=True, kw_only=True)
class Look:
    """A line, the way out (a picture a chunk, lit where blocks of it are kept; None: as before), and the frames of the
    way back side by side: the truth and each memory's."""

    line: str
    way_out: np.ndarray | None = None
    way_back: np.ndarray | None = None


class Worlds:
    """Worlds by number, the truth of their way out, and the way back by two memories of the pipeline."""

    def __init__(self, pipe: SparseForcingPipeline, room: Room) -> None:
        self.pipe, self.room = pipe, room

    def pan(self, number: Any, place: int, step: int) -> tuple[int, str, np.ndarray]:
        """The place after `step` chunks of the way out, a line about it, and the picture there."""
        task = self._find(number)
        frames = self._frames(task)[: task.given]
        chunks = self._chunk_ends(task)
        place = min(max(place + step, 0), len(chunks) - 1)
        line = f"Way out: picture {place + 1} of {len(chunks)}. On the way back an object returns."
        return place, line, frames[chunks[place]]

    def go_on(self, number: Any) -> Iterator[Look]:
        """The way back, as it is drawn. Raises SparseForcingError: a number that is none, or no room."""
        task = self._find(number)
        both = [self._settings(task, kind) for kind in MEMORIES]
        place = self.room.ask(sum(cache_bound(self.pipe, settings) for settings in both))
        try:
            for waiting in place.wait():
                yield Look(line=f"Waiting for room: number {waiting} in line.")
            yield Look(line="Reading the way out ...")
            with explain_out_of_memory(both[-1]):
                yield from self._draw(task, both)
        finally:
            place.leave()

    def _draw(self, task: Task, both: list[Settings]) -> Iterator[Look]:
        import numpy as np

        truth, ends = self._frames(task), self._chunk_ends(task)
        streams = [self._stream(task, truth, settings) for settings in both]
        shown = task.given
        for chunks in zip(*streams):
            way_out = self._light_up(truth, ends, chunks[-1])
            for number in range(min(len(chunks[0].frames), task.given + task.generated - shown)):
                drawn = [(chunk.frames[number] * 255).round().astype(np.uint8) for chunk in chunks]
                held = ", ".join(f"{name} {c.cache_bytes / 1e6:.1f} MB" for name, c in zip(MEMORIES, chunks))
                yield Look(
                    line=f"Way back: the truth, then {' and '.join(MEMORIES)}. Caches: {held}.",
                    way_out=way_out if number == 0 else None,
                    way_back=_side_by_side([truth[shown + number], *drawn]),
                )
            shown += len(chunks[0].frames)

    def _stream(self, task: Task, truth: np.ndarray, settings: Settings) -> Iterator[VideoChunk]:
        import torch

        return self.pipe.stream(
            task.world.story,
            video=truth[: task.given],
            num_frames=task.generated,
            memory=settings.memory,
            generator=torch.Generator().manual_seed(task.number),
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        )

    def _light_up(self, truth: np.ndarray, ends: list[int], chunk: VideoChunk) -> np.ndarray:
        """The last frame of every chunk of the way out, dark but where the memory keeps something of it."""
        import numpy as np

        from sparse_forcing.sampling.generation.clip import light_up

        kept = [chunk.persistent_of(number) for number in range(len(ends))]
        pictures = [
            light_up(truth[end : end + 1] / np.float32(255), None if lit is None else lit[-1:])[0]
            for end, lit in zip(ends, kept)
        ]
        return _side_by_side([(picture * 255).round().astype(np.uint8) for picture in pictures])

    def _find(self, number: Any) -> Task:
        from sparse_forcing.eval.bench.returns import plan_tasks

        return plan_tasks(self.pipe, KIND, WORLD, 1, read_seed(number))[0]

    def _frames(self, task: Task) -> np.ndarray:
        """[F, H, W, 3] uint8, the truth."""
        from sparse_forcing.eval.bench.returns import world_frames

        return (world_frames(task.world, self.pipe.defaults.height) * 255).round().byte().numpy()

    def _chunk_ends(self, task: Task) -> list[int]:
        """The last frame of every chunk of the way out."""
        geometry = self.pipe.geometry
        sizes = geometry.chunks(geometry.latent_frames(task.given))
        ends = [geometry.pixel_frames(sum(sizes[: number + 1])) - 1 for number in range(len(sizes))]
        return [min(end, task.given - 1) for end in ends]

    def _settings(self, task: Task, kind: str) -> Settings:
        seconds = (task.given + task.generated) / self.pipe.fps
        settings = resolve_settings(GenerateConfig(seconds=seconds), self.pipe)
        return replace(settings, memory=replace(self.pipe.default_memory, kind=kind))


def _side_by_side(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures [H, W, 3] in a row, with a gap."""
    import numpy as np

    gap = np.full((pictures[0].shape[0], 4, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], 1)
