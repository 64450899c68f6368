"""Several processes as one: which of them this is, what the first one found out, and a clean way out of their group.

Without a process group every function here does nothing, so one process needs no launcher.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sparse_forcing.devices import is_out_of_memory
from sparse_forcing.errors import SparseForcingError

T = TypeVar("T")


@contextmanager
def leave_group() -> Iterator[None]:
    """Leave the process group that the block joined, however it ends; afterwards no thread of the group is alive.

    A gloo worker thread drops the tensors of a collective a moment after whoever waited for it goes on. If the
    interpreter ends in that moment, the thread cannot take its lock any more and takes the process down with SIGABRT
    or SIGSEGV. Destroying the group joins its threads, but only with the last reference to it: sharded parameters hold
    it, frames of a traceback, and device meshes, which DTensor's caches keep for good.
    """
    try:
        yield
    except BaseException as error:
        cause = error if dist.is_initialized() else None
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__context__
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            for mesh in [x for x in gc.get_objects() if type(x) is DeviceMesh]:
                getattr(mesh, "_pg_registry", {}).clear()  # older torch has names there instead of groups: no reference
            gc.collect()


@contextmanager
def explain_lost_peers(count: int) -> Iterator[None]:
    """What a collective raises when one of the `count` processes has gone becomes a SparseForcingError of one line."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise SparseForcingError(
            f"another of the {count} processes has ended before its work was done; run again"
        ) from error


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def group_device() -> torch.device:
    """Where the group's collectives take their tensors."""
    cuda = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def any_rank(flag: bool) -> bool:
    """True on every process when it is true on one."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=group_device())
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def from_first(read: Callable[[], T]) -> T:
    """What `read` gives on the first process, on every process; one of our errors is raised on every process, too."""
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = read()
        except SparseForcingError as error:
            box[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(box, device=group_device())
    result, failure = box
    if failure is not None:
        raise failure
    return result
