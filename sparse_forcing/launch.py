"""One launch of several processes that share work (torchrun, accelerate launch): a lock for all, a device for each.

Importing this module does not import torch, nor does a process that is alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from sparse_forcing.errors import ConfigError

T = TypeVar("T")
MEETING = timedelta(minutes=10)
"""How long the processes of a launch wait for each other to start."""
PATIENCE = timedelta(days=30)
"""How long a process that is done waits for the slowest one; one that dies ends the waiting at once."""


class Launch:
    """The processes that share a command's work: here, one that does all of it.

    Attributes:
        number, count: which of them this is, and how many they are.
        together: whether all work at each item, and the first one alone writes, instead of each at items of its own.
    """

    number, count = 0, 1
    together = False

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of `items`, the same on all processes, that this one takes: every one belongs to exactly one, or, where
        they work together, to all."""
        return items if self.together else items[self.number :: self.count]

    @property
    def follows(self) -> bool:
        """Whether another process writes what this one helps to make."""
        return self.together and self.number > 0

    def device(self, wanted: str) -> str:
        """What `--device` means here. Raises ConfigError for a GPU that all processes would take."""
        return wanted

    @contextmanager
    def hold(self, lock: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Hold a lock for all processes: the first one takes it. What it raises is raised everywhere."""
        with lock():
            yield

    def from_first(self, read: Callable[[], T]) -> T:
        """What `read` gives on the first process; one of our errors is raised everywhere."""
        return read()

    def gather(self, value: T) -> list[T]:
        """The `value` of every process, in their order. Raises SparseForcingError when one of them is gone."""
        return [value]

    def wait(self) -> None:
        """Wait until all are here. Raises as `gather`."""
        self.gather(None)


ALONE = Launch()


class JoinedLaunch(Launch):
    """Several processes, of which this is one that has joined their group."""

    def __init__(self, *, together: bool = False) -> None:
        import torch.distributed as dist

        self.together = together
        self.number, self.count = dist.get_rank(), dist.get_world_size()

    def device(self, wanted: str) -> str:
        import torch

        if wanted.startswith("cuda:"):
            raise ConfigError(f"--device {wanted}: each of {self.count} processes takes its own GPU; leave it out")
        if not torch.cuda.is_available() or wanted not in ("auto", "cuda"):
            return wanted
        own, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= gpus:
            raise ConfigError(
                f"--device {wanted}: there is no GPU for process {own + 1} of this machine, it has {gpus}"
            )
        torch.cuda.set_device(own)
        return f"cuda:{own}"

    @contextmanager
    def hold(self, lock: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        with ExitStack() as stack:
            self.from_first(lambda: stack.enter_context(lock()))
            yield

    def from_first(self, read: Callable[[], T]) -> T:
        from sparse_forcing.processes import from_first

        return from_first(read)

    def gather(self, value: T) -> list[T]:
        import torch.distributed as dist

        from sparse_forcing.processes import explain_lost_peers

        found: list[Any] = [None] * self.count
        with explain_lost_peers(self.count):
            dist.all_gather_object(found, value)
        return found


@contextmanager
def join_launch(*, together: bool = False) -> Iterator[Launch]:
    """Join the other processes of torchrun or accelerate launch, if there are any; together: see `Launch`.

    Raises:
        ConfigError: the environment names several processes, but not how they find each other, or some do not come.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "0", "1"):
        yield Launch()
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from sparse_forcing.processes import leave_group

    with leave_group():
        try:
            store, rank, count = next(rendezvous("env://", timeout=MEETING))
            # Only a few numbers travel, so any device will do.
            dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but the processes of this launch do not find each other "
                f"({reason:.120}); start them with torchrun, or unset it"
            ) from error
        yield JoinedLaunch(together=together)
