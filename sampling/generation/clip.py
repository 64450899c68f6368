"""The files of one video while its chunks arrive, and what is measured on the way."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_forcing.errors import OutputError
from sparse_forcing.sampling.generation.jobs import GenerateConfig, Job
from sparse_forcing.sampling.generation.outputs import remove_live, remove_old
from sparse_forcing.sampling.generation.paths import live_path, overlay_path

if TYPE_CHECKING:
    import numpy as np

    from sparse_forcing.media.coded import KeptSegments
    from sparse_forcing.media.video import VideoWriter
    from sparse_forcing.sampling.generation.checkpoints import Checkpoint
    from sparse_forcing.sampling.generation.settings import Settings

_COUNTED = ("written", "trimmed", "cache_bytes", "seconds", "decode_seconds", "first_frame", "size")


class Clip:
    """The files of one job.

    Args:
        keep_in: folder of the video's checkpoints, None where none are made.
        begun: checkpoint to go on from.
    """

    def __init__(
        self,
        config: GenerateConfig,
        settings: Settings,
        job: Job,
        fps: float,
        *,
        keep_in: Path | None = None,
        begun: Checkpoint | None = None,
    ) -> None:
        self.config, self.settings, self.job, self.fps = config, settings, job, fps
        self._keep_in, self._begun = keep_in, begun
        self._kept: dict[str, KeptSegments] = {}
        self._writers: dict[str, VideoWriter] = {}
        self.written = self.trimmed = self.cache_bytes = 0
        self.seconds: list[float] = []
        self.decode_seconds: list[float] = []
        self.first_frame: float | None = None
        self.size: list[int] | None = None
        self._before = 0.0
        if begun is not None:
            self._before = begun.clip["wall"]
            for name in _COUNTED:
                setattr(self, name, begun.clip[name])

    def __enter__(self) -> Clip:
        self._stack = ExitStack().__enter__()
        self._start = time.perf_counter()
        return self

    @property
    def wall(self) -> float:
        """Seconds since the video was begun, those of killed runs up to their last checkpoint included."""
        return self._before + time.perf_counter() - self._start

    def add(self, chunk: Any) -> None:
        """Write one chunk's frames, up to the wanted length."""
        import numpy as np

        if self.first_frame is None:
            self.first_frame = self.wall
        frames = np.asarray(chunk.frames, dtype=np.float32)
        room = min(len(frames), self.settings.num_frames - self.written)
        self.trimmed += len(frames) - room
        self.seconds.append(float(chunk.seconds))
        self.decode_seconds.append(float(chunk.decode_seconds))
        self.cache_bytes = max(self.cache_bytes, int(chunk.cache_bytes))
        if not self._writers:
            self._open(*frames.shape[1:3])
        self._writers["video"].write(frames[:room])
        if self.config.overlay:
            self._writers["overlay"].write(light_up(frames[:room], chunk.persistent))
        self.written += room

    def _open(self, height: int, width: int) -> None:
        self.size = [height, width, self.settings.scale]
        # Left in reverse: what is old goes before the video is committed, the overlay never stands without its video.
        if self.config.overlay:
            self._writers["overlay"] = self._stack.enter_context(self._writer("overlay", overlay_path(self.job)))
        self._writers["video"] = self._stack.enter_context(self._writer("video", self.job.video))
        self._stack.push(self._remove_old)

    def _writer(self, name: str, path: Path) -> VideoWriter:
        from sparse_forcing.media.coded import KeptSegments
        from sparse_forcing.media.video import VideoWriter

        assert self.size is not None
        height, width, scale = self.size
        kept = None
        if self._keep_in is not None:
            tail = None if self._begun is None else self._begun.tails[name]
            self._kept[name] = kept = KeptSegments(self._keep_in, name, self.written, tail)
        live = live_path(self.job) if self.config.live and name == "video" else None
        return VideoWriter(path, fps=self.fps, height=height, width=width, scale=scale, kept=kept, live=live)

    def _remove_old(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            remove_old(self.job)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and not self._writers:
            raise OutputError(f"cannot write {self.job.video}: the model produced no frames")
        self._stack.__exit__(kind, error, trace)
        if kind is None and self.config.live:
            remove_live(self.job)
        self._wall = self.wall

    def state(self) -> dict[str, Any]:
        """Numbers that another clip of the same job goes on from."""
        return {name: getattr(self, name) for name in _COUNTED} | {"wall": self.wall}

    def tails(self) -> dict[str, np.ndarray]:
        """uint8 [f, H, W, 3] frames after the last finished segment of each file, by its name."""
        return {name: kept.tail() for name, kept in self._kept.items()}

    def summary(self) -> dict[str, Any]:
        """Sizes and timings for the sidecar; seconds unless the name says otherwise."""
        height, width, scale = self.size or (0, 0, 1)
        made, model, decode = self.written + self.trimmed, sum(self.seconds), sum(self.decode_seconds)
        return {
            "num_frames": self.written,
            "trimmed_frames": self.trimmed,
            "fps": self.fps,
            "height": height,
            "width": width,
            "scale": scale,
            "time_to_first_frame": self.first_frame,
            "seconds_per_chunk": self.seconds,
            "decode_seconds_per_chunk": self.decode_seconds,
            "wall_seconds": self._wall,
            "generated_fps_without_decoding": made / model if model else None,
            "generated_fps_with_decoding": made / (model + decode) if model + decode else None,
            "cache_bytes_peak": self.cache_bytes,
        }


def light_up(frames: np.ndarray, persistent: Any) -> np.ndarray:
    """Frames [F, H, W, 3] in [0, 1], dimmed except where `persistent` [F, H, W] in [0, 1] says (None: nowhere)."""
    import numpy as np

    if persistent is None:
        return frames * np.float32(0.4)
    weight = np.asarray(persistent, dtype=np.float32)[: len(frames), ..., None]
    amber = np.array([1.0, 0.75, 0.2], np.float32)
    return np.clip(frames * (0.4 + 0.6 * weight) + 0.25 * weight * amber, 0, 1)
