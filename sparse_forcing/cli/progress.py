"""Progress on stderr: a bar per video on a terminal, one line per video elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from sparse_forcing.sampling.generate import Progress
from sparse_forcing.sampling.jobs import Job


class TerminalProgress(Progress):
    """Frames of the current video as they are made; use as a context manager."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> TerminalProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, message: str) -> None:
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, file=sys.stderr, flush=True)

    def begin(self, job: Job, number: int, total: int) -> None:
        text = f"{number}/{total} {' '.join(job.prompt.split())[:50]}"
        if self._bar is not None:
            self._task = self._bar.add_task(text, total=None)
        elif total > 1:
            self.note(text)

    def frames(self, done: int, target: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=target)

    def end(self, record: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.remove_task(self._task)
