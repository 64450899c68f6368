"""Shards of a list: which part of it one of several machines takes that know nothing of each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from sparse_forcing.errors import ConfigError
from sparse_forcing.files import output_lock

T = TypeVar("T")
MAX_SHARDS = 1_000_000


def check_shard(shard: tuple[int, int]) -> tuple[int, int]:
    """The shard itself. Raises ConfigError unless it is one of n, counted from 0."""
    number, count = shard
    if not 0 <= number < count <= MAX_SHARDS:
        raise ConfigError(f"--shard {number}/{count}: expected I/N with I from 0 to N - 1, and N up to {MAX_SHARDS}")
    return shard


def take_shard(items: Sequence[T], shard: tuple[int, int] | None) -> list[T]:
    """Every n-th item from the i-th on; all of them when there are no shards."""
    number, count = shard or (0, 1)
    return list(items[number::count])


@contextmanager
def hold_shard(output: Path, shard: tuple[int, int] | None) -> Iterator[None]:
    """Hold an output for this run alone; a shard holds its folder beside the other shards.

    Raises:
        InUseError: another run writes there.
    """
    if shard is None:
        with output_lock(output):
            yield
        return
    number, count = shard
    with output_lock(output, shared=True), output_lock(output / f"shard-{number}-of-{count}"):
        yield
