"""What a run tells: metrics.jsonl, a line of JSON for every few steps, accelerate's trackers, and the terminal."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sparse_forcing.files import atomic_write_text, explain_full_disk
from sparse_forcing.processes import barrier, rank
from sparse_forcing.training.engine.parallel import mean_over_ranks

METRICS_FILE = "metrics.jsonl"


def forget_beyond(path: Path, step: int) -> None:
    """Drop the rows of steps after `step`, which a resumed run repeats, and lines that a crash cut short.

    Raises:
        OutputError: the file cannot be written; it stays as it was.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [(line, _step(line)) for line in lines]
    if torn := sum(found is None for _, found in rows):
        warnings.warn(f"{path}: dropped {torn} of {len(rows)} lines that a crash cut short", stacklevel=2)
    atomic_write_text(path, "".join(f"{line}\n" for line, found in rows if found is not None and found <= step))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row; a run that is killed meanwhile leaves a line that `forget_beyond` drops. Raises OutputError."""
    with explain_full_disk(path), path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _step(line: str) -> int | None:
    """Step of a row, None for what is not one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class RunLog:
    """Rows of means over the steps since the last row, in metrics.jsonl, the trackers, and on the terminal with the
    time left.

    `window` holds the numbers of those steps, averaged over processes. A checkpoint keeps it, so that the first row
    after a resume is the one that an uninterrupted run writes.
    """

    def __init__(self, accelerator: Accelerator, out: Path, *, steps: int, every: int, config: dict[str, Any]) -> None:
        self.accelerator, self.path, self.steps, self.every = accelerator, out / METRICS_FILE, steps, every
        self.window: list[dict[str, float]] = []
        self._restart_clock()
        if accelerator.log_with:
            accelerator.init_trackers("training", config={"config": json.dumps(config)})

    def _restart_clock(self) -> None:
        self.timed, self.began = 0, time.monotonic()

    def begin(self, step: int, window: Sequence[dict[str, float]]) -> None:
        """Go on from a step with what was logged since the last row; rows beyond the step are forgotten."""
        self.window = list(window)
        self._restart_clock()
        if rank() == 0:
            forget_beyond(self.path, step)

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Take in the numbers of a step that is done, `step` in all; every process must call it."""
        self.window.append(mean_over_ranks(metrics))
        self.timed += 1
        if step % self.every and step != self.steps:
            return
        names = dict.fromkeys(name for row in self.window for name in row)
        means = {n: sum(r[n] for r in self.window if n in r) / sum(n in r for r in self.window) for n in names}
        seconds = (time.monotonic() - self.began) / self.timed
        row = {"step": step, **means, "seconds_per_step": seconds}
        self.window = []
        self._restart_clock()
        if rank() == 0:
            append_row(self.path, row)
            shown = " ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
            self.note(f"step {step}/{self.steps} {shown}, {(self.steps - step) * seconds / 60:.0f} min left")
        self.accelerator.log(row, step=step)

    def note(self, message: str) -> None:
        """Say something on the terminal, once for all processes."""
        if rank() == 0:
            print(message, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Close the trackers. Processes end together: one that leaves early may look like a failure to the launcher."""
        barrier()
        for tracker in self.accelerator.trackers:
            tracker.finish()
