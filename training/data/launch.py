"""One launch of several processes that make data together: one lock for all, a device for each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sparse_forcing.files import output_lock
from sparse_forcing.training.engine.parallel import from_first, leave_group

PATIENCE = timedelta(days=30)
"""How long a process that is done waits for the slowest one; one that dies ends the waiting at once."""


@contextmanager
def data_launch(folder: Path) -> Iterator[torch.device]:
    """Join the other processes of torchrun or accelerate launch, if there are any, and hold `folder` for all of them.

    Yields the device this process computes on. Raises InUseError, on every process, when another launch writes there.
    """
    with leave_group(), ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("gloo", timeout=PATIENCE)  # only a few numbers travel, so any device will do
        from_first(lambda: stack.enter_context(output_lock(folder)))
        yield _own_device()


def _own_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
