"""Memory of this machine: how much a process may take, how much it holds, and that what it frees goes back at once.

Importing this module does not import torch.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Mapping
from pathlib import Path

MAPPED_FROM = 4 << 20
"""Bytes of a tensor from which it gets pages of its own."""
KEPT = 64 << 20
"""Bytes at the heap's end that stay there for what comes next."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_CHOSEN_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
_LIMIT = Path("/sys/fs/cgroup/memory.max")


def return_what_is_freed(environment: Mapping[str, str] = os.environ) -> None:
    """Let glibc give large tensors pages of their own, always.

    By itself it does so only until one of them is freed: then others of its size (up to 32 MiB) come from the heap,
    which stays as large as it ever was and full of holes. Decoding 480x832 took a fifth more for it. For a process that
    is a command's own; elsewhere, and where the user chose, nothing happens.
    """
    if any(environment.get(name) for name in _CHOSEN_BY_USER):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, MAPPED_FROM)
        set_option(_M_TRIM_THRESHOLD, KEPT)


def held_bytes() -> int:
    """Bytes of memory that this process has now; where only their peak is told, that."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def obtainable_bytes() -> int | None:
    """Bytes of memory that this process can have, those it has among them: what is free here and in its container.
    None where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    free = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    here = 1024 * int(free.split()[1]) + held_bytes()
    limit = _LIMIT.read_text().strip() if _LIMIT.is_file() else ""
    return min(here, int(limit)) if limit.isdigit() else here
