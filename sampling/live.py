"""A video that is watched while it is made: pictures at their pace, and a prompt that may change on the way."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_forcing.sampling.generation.generate import light_up
from sparse_forcing.sampling.generation.prompts import check_prompt

if TYPE_CHECKING:
    import numpy as np

    from sparse_forcing.sampling.generation.settings import Settings

WAIT = 0.1  # seconds between looks at whether somebody stopped the video


@dataclass(frozen=True, kw_only=True)
class LivePicture:
    """One frame when its time has come.

    pixels: uint8 [H, W, 3]; second: its place in the video; prompt: what its chunk follows; frames_per_second: speed at
    which that chunk was made, decoding included; cache_bytes: what the memory held after it.
    """

    pixels: np.ndarray
    second: float
    prompt: str
    frames_per_second: float
    cache_bytes: int


class LiveVideo:
    """One video, made by a thread of its own that is at most two chunks ahead of what is shown.

    Args:
        pipe: SparseForcingPipeline; several videos may share it.
        overlay: light up the persistent blocks.
        clock, sleep: of `time`, for tests.

    Raises:
        ConfigError: a prompt that cannot be used.
    """

    def __init__(
        self,
        pipe: Any,
        prompt: str,
        settings: Settings,
        *,
        seed: int = 0,
        overlay: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.prompt = self._followed = check_prompt(prompt)
        self.pipe, self.settings, self.seed, self.overlay = pipe, settings, seed, overlay
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
        # Never a daemon, even of one: the interpreter must not end while torch computes in a thread.
        threading.Thread(target=self._make, name="live video", daemon=False).start()
        due, shown = self._clock(), 0
        try:
            while (made := self._take()) is not None:
                if isinstance(made, Exception):
                    raise made
                for picture in self._pictures_of(*made, first=shown):
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
        try:
            # Closed, not left to the garbage collector: the pipeline refers to this video, and it holds a cache.
            with closing(self._stream(self.prompt)) as chunks:
                for chunk in chunks:
                    if not self._offer((chunk, self._followed)):
                        return
            self._offer(None)
        except Exception as error:  # it belongs to whoever watches
            self._offer(error)

    def _stream(self, prompt: str) -> Generator[Any, None, None]:
        import torch

        self._followed = prompt
        settings = self.settings
        yield from self.pipe.stream(
            prompt, height=settings.height, width=settings.width, num_frames=settings.num_frames,
            num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale,
            memory=settings.memory, generator=torch.Generator("cpu").manual_seed(self.seed),
            prompt_changes=self._next_prompt,
        )  # fmt: skip

    def _next_prompt(self, frame: int) -> str | None:
        """What the pipeline asks before every chunk but the first."""
        wanted = self.prompt
        if wanted == self._followed:
            return None
        self._followed = wanted
        return wanted

    def _offer(self, made: Any) -> bool:
        """Whether it was taken before the video was stopped, or the program ended."""
        while not self._stopped.is_set() and threading.main_thread().is_alive():
            try:
                self._made.put(made, timeout=WAIT)
                return True
            except queue.Full:
                continue
        return False

    def _take(self) -> Any:
        """The next chunk and its prompt, an error, or None at the end and once the video was stopped."""
        while not self._stopped.is_set():
            try:
                return self._made.get(timeout=WAIT)
            except queue.Empty:
                continue
        return None

    def _pictures_of(self, chunk: Any, prompt: str, *, first: int) -> Iterator[LivePicture]:
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
