"""A video that is watched while it is made: pictures at their pace, and a prompt that may change on the way."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparse_forcing.sampling.generation.clip import light_up
from sparse_forcing.sampling.generation.prompts import check_prompt

if TYPE_CHECKING:
    import numpy as np

    from sparse_forcing.media.video import VideoWriter
    from sparse_forcing.sampling.generation.settings import Settings
    from sparse_forcing.sampling.pipeline import SparseForcingPipeline

WAIT = 0.1  # seconds between looks at whether somebody stopped the video
STALL = 2.0  # seconds without a picture after which a watcher is told
PATIENCE = 60.0  # seconds that a finished chunk waits for somebody to look at it; it lasts a second or so on the screen
GROWTH = 1.5  # a full memory that grows takes half as much again as it needs
Ending = Literal["finished", "stopped", "unread", "failed"]


@dataclass(frozen=True, kw_only=True)
class LivePicture:
    """One frame when its time has come.

    Args:
        pixels: uint8 [H, W, 3].
        second: place in the video.
        prompt: words that its chunk follows.
        frames_per_second: speed at which that chunk was made, decoding included.
        cache_bytes: bytes that the memory held after it.
    """

    pixels: np.ndarray
    second: float
    prompt: str
    frames_per_second: float
    cache_bytes: int


@dataclass(frozen=True, kw_only=True)
class Stall:
    """No picture is ready. seconds: how long the watcher has been waiting for it."""

    seconds: float


class LiveVideo:
    """One video, made by a thread of its own that is at most two chunks ahead of what is shown. The thread ends, and
    frees the cache, when the video is finished, stopped, or nobody has looked at it for `patience` seconds.

    Args:
        pipe: the pipeline; several videos may share it.
        overlay: light up the persistent blocks.
        save_to: an .mp4 file to write while the video is made; what was made of a stopped one is kept.
        on_end: called by the thread when it holds nothing any more.
        clock, sleep: functions to use instead of those of `time`, for tests.

    Attributes:
        ended: end of the making, in words, None while it goes on.

    Raises:
        ConfigError: a prompt that cannot be used.
    """

    def __init__(
        self,
        pipe: SparseForcingPipeline,
        prompt: str,
        settings: Settings,
        *,
        seed: int = 0,
        overlay: bool = False,
        save_to: Path | None = None,
        on_end: Callable[[], None] = lambda: None,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.prompt = self._followed = check_prompt(prompt)
        self.pipe, self.settings, self.seed, self.overlay = pipe, settings, seed, overlay
        self.ended: Ending | None = None
        self._save_to, self._on_end, self._patience = save_to, on_end, patience
        self._clock, self._sleep = clock, sleep
        self._made: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._stopped = threading.Event()

    def say(self, prompt: str) -> None:
        """Follow another prompt with the next chunk that is begun. Raises ConfigError when it cannot be used."""
        self.prompt = check_prompt(prompt)

    def stop(self) -> None:
        """End the video at once; what is being made of it is not shown."""
        self._stopped.set()

    def pictures(self) -> Iterator[LivePicture]:
        """Every frame, not before its time; late ones delay those after them. Raises what the pipeline raises."""
        with closing(self.watch()) as events:
            yield from (event for event in events if isinstance(event, LivePicture))

    def watch(self) -> Generator[LivePicture | Stall, None, None]:
        """Pictures as `pictures` gives them, with a `Stall` every now and then while a picture does not come."""
        # Never a daemon, even of one: the interpreter must not end while torch computes in a thread.
        threading.Thread(target=self._make, name="live video", daemon=False).start()
        due, shown = self._clock(), 0
        try:
            while True:
                made = None
                for made in self._take():
                    if isinstance(made, Stall):
                        yield made
                if made is None or isinstance(made, Stall):
                    return
                if isinstance(made, Exception):
                    raise made
                for picture in self._make_pictures(*made, first=shown):
                    now = self._clock()
                    due = max(due, now)
                    self._sleep(due - now)
                    if self._stopped.is_set():
                        return
                    due += 1 / self.pipe.fps
                    shown += 1
                    yield picture
        finally:
            self.stop()

    def _make(self) -> None:
        last: Exception | None = None
        try:
            self.ended = self._make_all()
        except Exception as error:  # it belongs to whoever watches
            self.ended, last = "failed", error
        finally:
            self._on_end()
        self._offer(last)

    def _make_all(self) -> Ending:
        # Closed, not left to the garbage collector: the pipeline refers to this video, and it holds a cache.
        with closing(self._stream(self.prompt)) as chunks, ExitStack() as files:
            writer, written = None, 0
            for chunk in chunks:
                if self._save_to is not None:
                    frames = chunk.frames[: self.settings.num_frames - written]
                    writer = writer or files.enter_context(self._writer(*frames.shape[1:3]))
                    writer.write(frames)
                    written += len(frames)
                if not self._offer((chunk, self._followed)):
                    return "stopped" if self._stopped.is_set() else "unread"
        return "finished"

    def _writer(self, height: int, width: int) -> VideoWriter:
        from sparse_forcing.media.video import VideoWriter

        assert self._save_to is not None
        return VideoWriter(self._save_to, fps=self.pipe.fps, height=height, width=width, scale=self.settings.scale)

    def _stream(self, prompt: str) -> Generator[Any, None, None]:
        import torch

        self._followed = prompt
        settings = self.settings
        yield from self.pipe.stream(
            prompt,
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            memory=settings.memory,
            generator=torch.Generator("cpu").manual_seed(self.seed),
            prompt_changes=self._next_prompt,
            reserve_cache=False,
        )

    def _next_prompt(self, frame: int) -> str | None:
        """The prompt of the next chunk, for which the pipeline asks before every chunk but the first."""
        wanted = self.prompt
        if wanted == self._followed:
            return None
        self._followed = wanted
        return wanted

    def _offer(self, made: Any) -> bool:
        """Whether it was taken before the video was stopped, the watcher lost patience, or the program ended."""
        began = time.monotonic()
        while not self._stopped.is_set() and threading.main_thread().is_alive():
            try:
                self._made.put(made, timeout=WAIT)
                return True
            except queue.Full:
                if time.monotonic() - began > self._patience:
                    return False
        return False

    def _take(self) -> Iterator[Any]:
        """Stalls, then the next chunk and its prompt, an error, or None at the end; nothing once it was stopped."""
        began = told = time.monotonic()
        while not self._stopped.is_set():
            try:
                yield self._made.get(timeout=WAIT)
                return
            except queue.Empty:
                if self.ended == "unread":
                    return
                if time.monotonic() - told >= STALL:
                    told = time.monotonic()
                    yield Stall(seconds=told - began)

    def _make_pictures(self, chunk: Any, prompt: str, *, first: int) -> Iterator[LivePicture]:
        frames = light_up(chunk.frames, chunk.persistent) if self.overlay else chunk.frames
        speed = len(frames) / (chunk.seconds + chunk.decode_seconds)
        for number, frame in enumerate(frames[: self.settings.num_frames - first], first):
            yield LivePicture(
                pixels=(frame * 255).round().astype("uint8"),
                second=number / self.pipe.fps,
                prompt=prompt,
                frames_per_second=speed,
                cache_bytes=chunk.cache_bytes,
            )


def cache_bound(pipe: SparseForcingPipeline, settings: Settings) -> int:
    """Bytes that the memory of a video may come to hold, room that it grew in vain included."""
    sizes, geometry, memory = pipe.transformer.config, pipe.geometry, settings.memory
    rows, cols = geometry.token_size(*geometry.latent_size(settings.height, settings.width))
    frames = sum(geometry.chunks(geometry.latent_frames(settings.num_frames)))
    kept = 0
    if memory.window is not None:
        frames = min(frames, memory.window + geometry.chunk_frames)
    if memory.kind in ("sparse", "heavy_hitter"):  # whole blocks, and the tables that say where they are
        depth, height, width = memory.tile
        rows, cols = -(-rows // height) * height, -(-cols // width) * width
        frames, kept = -(-frames // depth) * depth, memory.persistent_tokens
    tokens = frames * rows * cols + kept
    numbers = 2 * tokens * sizes.num_layers * sizes.num_attention_heads * sizes.attention_head_dim
    videos = 2 if settings.guidance_scale > 1 else 1
    return math.ceil(GROWTH * videos * numbers * pipe.dtype.itemsize)
