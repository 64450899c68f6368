"""How many threads a command computes with, and that threads without work sleep instead of spinning.

torch computes with OpenMP, whose idle threads wait for their next piece of work in a loop. On an idle machine that is
fast; on a crowded one a thread that waits holds the core which the thread with the work needs. Only a command changes
this, before it imports torch: then the process is its own. A program that imports the package keeps its threads as they
are, and what the user says with the variables of OpenMP always stands.

Importing this module does not import torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # GNU's OpenMP, which torch brings; LLVM's and Intel's
WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WORK_OF_A_THREAD = 4e9  # operations of one pass; `tiny` at 64 x 64 pixels has 1.3e9, and another thread gains it little

_process_is_ours = False


def own_process(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Say that this process is a command's own: its idle threads sleep, and `limit_threads` chooses their number.

    Nothing happens where torch is there already, for then somebody else imported it. Unless the user chose otherwise.

    Returns:
        Whether the process is the command's own.
    """
    global _process_is_ours
    if "torch" in sys.modules:
        return False
    _process_is_ours = not any(environment.get(name) for name in COUNTS)
    if WAITING.isdisjoint(environment):
        environment.update(PASSIVE)
    return True


@contextmanager
def limit_threads(operations: Callable[[], float]) -> Iterator[None]:
    """Compute with no more threads than passes of so many operations are worth, in a process that is a command's own.

    Args:
        operations: asked for those of one pass through a model, a multiplication and an addition counted as two.
    """
    if not _process_is_ours:
        yield
        return
    import torch

    available = torch.get_num_threads()
    torch.set_num_threads(worthwhile_threads(operations(), available))
    try:
        yield
    finally:
        torch.set_num_threads(available)


def worthwhile_threads(operations: float, available: int) -> int:
    """Threads for passes of so many operations: in small ones, threads wait for each other more than they gain."""
    return max(1, min(available, int(operations // WORK_OF_A_THREAD)))
