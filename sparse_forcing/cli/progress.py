"""Progress on stderr: a bar per video on a terminal, elsewhere a line per video and per chunk that takes long. Each of
several processes writes lines that begin with its number: their bars would write over each other."""

from __future__ import annotations

import sys
import time
from typing import Any

from sparse_forcing.cli import note
from sparse_forcing.launch import ALONE, Launch
from sparse_forcing.sampling.generation.generate import Progress
from sparse_forcing.sampling.generation.jobs import Job

SECONDS_BETWEEN_LINES = 2.0  # a log is read later: chunks that follow each other faster are not worth a line each


class TerminalProgress(Progress):
    """Frames of the current video as they are made. Use as a context manager: it takes the bar away on the way out."""

    def __init__(self, launch: Launch = ALONE) -> None:
        self._who = f"[{launch.number}] " if launch.count > 1 and not launch.together else ""
        self._bar: Any = None
        self._task: Any = None
        self._text, self._noted = "", 0.0

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()

    def note(self, message: str) -> None:
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            note(f"{self._who}{message}")

    def begin(self, job: Job, number: int, total: int) -> None:
        self._text = text = f"{number}/{total} {' '.join(job.prompt.split())[:50]}"
        self._noted = time.monotonic()
        if sys.stderr.isatty() and not self._who:
            self._bar = _bar()
            self._task = self._bar.add_task(text, total=None)
            self._bar.start()
        elif total > 1:
            self.note(text)

    def frames(self, done: int, target: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=target)
        elif time.monotonic() - self._noted >= SECONDS_BETWEEN_LINES:
            self.note(f"{self._text}: {done} of {target} frames")
            self._noted = time.monotonic()

    def end(self) -> None:
        # Stopped between videos, so that what is printed on stdout does not run into it.
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
