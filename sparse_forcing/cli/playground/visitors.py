"""Who watches what: one video for each visitor of the page, and room for the caches of all of them together."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory.config import KINDS
from sparse_forcing.sampling.generation.jobs import MEMORY_KNOBS, GenerateConfig
from sparse_forcing.sampling.generation.prompts import check_prompt
from sparse_forcing.sampling.generation.settings import Settings, explain_out_of_memory, resolve_settings
from sparse_forcing.sampling.live import LivePicture, LiveVideo, cache_bound

if TYPE_CHECKING:
    from sparse_forcing.sampling.pipeline import SparseForcingPipeline

MAX_MINUTES = 10
MAX_LINE = 100  # visitors who wait
LOOK = 0.5  # seconds between looks at whether there is room
GONE = 150.0  # seconds without a sign of life of a page that gave some; browsers slow down pages that are not seen
ENDINGS = {
    "finished": "Finished",
    "stopped": "Stopped",
    "unread": "Stopped, because nobody was watching,",
}


class Room:
    """Bytes for the caches of all videos that run; who finds none waits in line. First come, first served."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._line: list[Place] = []
        self._lock = threading.Lock()

    def ask(self, size: int) -> Place:
        """A place for a video of `size` bytes, at the end of the line. Raises ConfigError for one that never fits."""
        if size > self.limit:
            raise ConfigError(
                f"this video may need {size / 1e9:.2f} GB of cache, of {self.limit / 1e9:.2f} GB for all visitors; "
                "make it shorter, or choose another memory than full"
            )
        place = Place(self, size)
        with self._lock:
            if len(self._line) >= MAX_LINE:
                raise ConfigError("too many visitors are waiting; try again later")
            self._line.append(place)
        return place

    def _number(self, place: Place) -> int:
        with self._lock:
            while self._line and self.used + self._line[0].size <= self.limit:
                first = self._line.pop(0)
                first.inside = True
                self.used += first.size
            return self._line.index(place) + 1 if place in self._line else 0

    def _leave(self, place: Place) -> None:
        with self._lock:
            if place.inside:
                self.used -= place.size
            elif place in self._line:
                self._line.remove(place)
            place.inside, place.size = False, 0


class Place:
    """A place in the line, later in the room. number: 0 in the room, 1 for the next to enter."""

    def __init__(self, room: Room, size: int) -> None:
        self.room, self.size, self.inside = room, size, False

    @property
    def number(self) -> int:
        return self.room._number(self)

    def wait(self) -> Iterator[int]:
        """Yield the number in line every now and then until it is in the room, or has left."""
        while self.size and (number := self.number):
            yield number
            time.sleep(LOOK)

    def leave(self) -> None:
        """Give the bytes back, or stop waiting; again does nothing."""
        self.room._leave(self)


@dataclass(frozen=True, kw_only=True)
class View:
    """What a visitor sees: a picture (None: the one before), a line about it, remarks on the prompt, the curve's points
    (seconds, bytes of cache, frames per second) and, at the end, the file of the video."""

    line: str
    picture: LivePicture | None = None
    remarks: tuple[str, ...] = ()
    points: tuple[tuple[float, int, float], ...] = ()
    file: Path | None = None


class Visitors:
    """The videos of all visitors, each known by the name of its session. A context manager: it ends them all.

    Args:
        size_of: bytes that a video may come to hold.
        patience: see LiveVideo.
    """

    def __init__(
        self,
        pipe: SparseForcingPipeline,
        room: Room,
        *,
        size_of: Callable[[Settings], int] | None = None,
        **options: Any,
    ) -> None:
        self.pipe, self.room, self.options = pipe, room, options
        self.videos: dict[str | None, tuple[LiveVideo, Place]] = {}
        self._size_of = size_of or (lambda settings: cache_bound(pipe, settings))
        self._seen: dict[str | None, float] = {}
        self._files: dict[str | None, Path] = {}
        self._count = 0
        self._starting = threading.Lock()  # of two starts of one visitor at once, the later one stops the other

    def __enter__(self) -> Visitors:
        self._folder = tempfile.TemporaryDirectory(prefix="sparse-forcing-", ignore_cleanup_errors=True)
        return self

    def __exit__(self, *_: Any) -> None:
        for session in list(self.videos):
            self.stop(session)
        self._folder.cleanup()

    def start(
        self, session: str | None, prompt: Any, minutes: Any, seed: Any, memory: Any, overlay: Any
    ) -> Iterator[View]:
        """Everything to show of a new video, which takes the place of the visitor's old one.

        Raises:
            SparseForcingError: something that was typed cannot be used, or memory did not suffice.
        """
        config = read_form(minutes, seed, memory, overlay)
        prompt = _text(prompt)
        settings = resolve_settings(config, self.pipe)
        size, began = self._size_of(settings), False
        with self._starting:
            self._leave(session)
            self._count += 1
            file = Path(self._folder.name) / f"video-{self._count}.mp4"
            place = self.room.ask(size)
            video = LiveVideo(
                self.pipe,
                prompt,
                settings,
                seed=config.seed,
                overlay=config.overlay,
                save_to=file,
                on_end=place.leave,
                **self.options,
            )
            self.videos[session], self._files[session] = (video, place), file
        try:
            for number in place.wait():
                yield View(line=f"Waiting for room: number {number} in line.")
            if self.videos.get(session) != (video, place):
                yield View(line="Stopped.")
                return
            began = True
            with explain_out_of_memory(settings):
                yield from self._show(session, video, file)
        finally:
            if not began:  # else the thread that makes the video leaves, once it has freed the cache
                place.leave()
            if self.videos.get(session) == (video, place):
                del self.videos[session]

    def _show(self, session: str | None, video: LiveVideo, file: Path) -> Iterator[View]:
        points: list[tuple[float, int, float]] = []
        view, prompt = View(line=""), None
        remarks: tuple[str, ...] = ()
        for event in video.watch():
            if time.monotonic() - self._seen.get(session, time.monotonic()) > GONE:
                video.stop()
            if not isinstance(event, LivePicture):
                yield replace(view, picture=None, line=f"Waiting for the next picture for {event.seconds:.0f} s ...")
                continue
            if not points or points[-1][1:] != (event.cache_bytes, event.frames_per_second):
                points.append((event.second, event.cache_bytes, event.frames_per_second))
            if event.prompt != prompt:
                prompt, remarks = event.prompt, tuple(self.pipe.prompt_remarks([event.prompt]))
            view = View(
                picture=event,
                points=tuple(points),
                remarks=remarks,
                line=f"{event.second:.1f} s of video at {self.pipe.fps:g} frames/s, made at "
                f"{event.frames_per_second:.1f} frames/s, cache {event.cache_bytes / 1e6:.1f} MB",
            )
            yield view
        if self._files.get(session) != file:
            return  # another video has taken the screen
        end = view.picture.second + 1 / self.pipe.fps if view.picture else 0.0
        until = time.monotonic() + 10
        while video.ended is None and time.monotonic() < until:  # it finishes the chunk and the file
            time.sleep(0.05)
        whole = round(end * self.pipe.fps) == video.settings.num_frames
        ending = ENDINGS["finished" if whole else "unread" if video.ended == "unread" else "stopped"]
        yield replace(view, picture=None, line=f"{ending} after {end:.1f} s.", file=file if file.exists() else None)

    def say(self, session: str | None, prompt: Any) -> None:
        """Change the prompt of the video that runs. Raises ConfigError."""
        if (found := self.videos.get(session)) is None:
            raise ConfigError("No video is running yet.")
        found[0].say(_text(prompt))

    def stop(self, session: str | None) -> None:
        """Stop the video that runs or waits, if one does."""
        if found := self.videos.pop(session, None):
            video, place = found
            video.stop()
            if not place.inside:
                place.leave()

    def seen(self, session: str | None) -> None:
        """Note that the visitor's page is open."""
        self._seen[session] = time.monotonic()

    def bye(self, session: str | None) -> None:
        """Forget a visitor whose page was closed."""
        self._leave(session)
        self._seen.pop(session, None)

    def _leave(self, session: str | None) -> None:
        self.stop(session)
        if (file := self._files.pop(session, None)) is not None:
            with suppress(OSError):
                file.unlink()


def _text(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise ConfigError(f"prompt: expected text, got {prompt!r:.60}")
    return check_prompt(prompt)


def read_form(minutes: Any, seed: Any, memory: Any, overlay: Any) -> GenerateConfig:
    """What was chosen on the page, as the command line would have it. Raises ConfigError."""
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes <= MAX_MINUTES:
        raise ConfigError(f"minutes: expected a number above 0, at most {MAX_MINUTES}, got {minutes!r:.60}")
    if memory not in KINDS:
        raise ConfigError(f"memory: expected one of {', '.join(KINDS)}, got {memory!r:.60}")
    lit = bool(overlay) and memory in MEMORY_KNOBS["persistent_blocks"]
    return GenerateConfig(seconds=minutes * 60, seed=read_seed(seed), memory=memory, overlay=lit)


def read_seed(seed: Any) -> int:
    """The whole number that was typed; nothing is 0. Raises ConfigError."""
    text = "0" if seed is None else str(seed).strip() or "0"
    if not (text.isascii() and text.isdigit() and len(text) < 40):
        raise ConfigError(f"seed: expected a whole number, got {text!r:.60}")
    return int(text)
