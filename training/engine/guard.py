"""What keeps a run from ruining itself: stop on numbers that are not finite, stop cleanly when asked to."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import torch

from sparse_forcing.errors import ConfigError, NotFiniteError
from sparse_forcing.processes import any_rank

STOPPED = 143
"""Exit code after SIGTERM: 128 + 15, as a shell reports it."""


class StopRequest:
    """Turns SIGTERM into a question that the loop asks between steps; a second one ends the process at once.

    with StopRequest() as stop: ... if stop.is_requested(): save and leave
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: signal.Handlers | None = None

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self._asked:
            os._exit(STOPPED)
        self._asked = True

    def __enter__(self) -> StopRequest:
        self._previous = signal.signal(signal.SIGTERM, self._handle)  # type: ignore[assignment]
        return self

    def __exit__(self, _type: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def is_requested(self) -> bool:
        """True on every process as soon as one of them was asked to stop."""
        return any_rank(self._asked)


def stop_with_launcher() -> None:
    """Receive SIGTERM when the launcher dies, where it would not forward the one it got.

    `accelerate launch` with one process waits for it without passing signals on; a cluster that stops the launcher
    would leave the training running. torchrun forwards signals and needs nothing. Linux only (prctl); elsewhere start
    `python -m sparse_forcing train` directly.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ
    if launched and sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def check_finite(step: int, values: dict[str, float]) -> None:
    """Refuse losses and gradient norms of a network that are NaN or infinite, on every process if it happens on one.

    Call it before the network's optimizer step. Raises NotFiniteError.
    """
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if any_rank(bool(bad)):
        what = ", ".join(f"{name} = {value}" for name, value in bad.items()) or "another process has a non-finite value"
        raise NotFiniteError(f"step {step}: {what}; this network's update was not applied")


@contextmanager
def explain_failures(when: str, relief: str, saved: int = 0) -> Iterator[None]:
    """Say what to do about a step that failed; nothing is retried with other settings behind the user's back.

    Args:
        when: words for what was being computed, after "out of memory".
        relief: advice on what takes less memory.
        saved: step of the newest checkpoint, 0 without one.

    Raises:
        ConfigError: out of memory, and what to lower.
        NotFiniteError: a number that is not finite, and where the run can go on.
    """
    try:
        yield
    except NotFiniteError as error:
        # Another network may have been updated in the same step (distillation): that is lost with the process.
        where = f"resuming goes on from step {saved}" if saved else "there is no checkpoint yet"
        raise NotFiniteError(f"{error}, and nothing of this step is saved; {where}") from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ConfigError(f"out of memory {when}; {relief}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is not enough: a GPU's, or this machine's, which torch reports by its words."""
    words = str(error)
    of_host = "DefaultCPUAllocator" in words or "can't allocate memory" in words
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and of_host)
