"""Work in resumable pieces that several processes share: each takes the next that is ready and not taken."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_forcing.errors import InUseError
from sparse_forcing.files import output_lock


@dataclass(frozen=True, kw_only=True)
class Task:
    """A piece of work.

    Args:
        name: unique among the tasks, usable as a file name.
        done: whether its result is there, complete.
        ready: whether what it starts from is.
        run: does it, or goes on with it; returns 0, or the exit code of a stop that saved.
    """

    name: str
    done: Callable[[], bool]
    run: Callable[[], int]
    ready: Callable[[], bool] = lambda: True


def run_tasks(tasks: Sequence[Task], locks: Path, *, wait_seconds: float = 5.0) -> int:
    """Run tasks in their order until all are done, by this process or by others under the same `locks` folder; returns
    0, or the exit code of a task that was stopped. A killed process leaves its task to the next one."""
    locks.mkdir(parents=True, exist_ok=True)
    told = False
    while waiting := [task for task in tasks if not task.done()]:
        code = _run_first(waiting, locks)
        if code:
            return code
        if code is None:
            if not told:
                print(
                    f"waiting for another process, which is at one of {len(waiting)} tasks", file=sys.stderr, flush=True
                )
            told = True
            time.sleep(wait_seconds)
    return 0


def _run_first(tasks: Sequence[Task], locks: Path) -> int | None:
    """Run the first task that is ready and free; None when there is none."""
    for task in tasks:
        if not task.ready():
            continue
        try:
            with output_lock(locks / task.name):
                code = 0 if task.done() else task.run()
                assert code or task.done(), f"{task.name} ended without its result"
                return code
        except InUseError:
            continue
    return None
