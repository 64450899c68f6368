"""metrics.jsonl: a line of JSON for every few steps of a run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from sparse_forcing.files import atomic_write_text


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
    """Add a row; a run that is killed meanwhile leaves a line that `forget_beyond` drops."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _step(line: str) -> int | None:
    """Step of a row, None for what is not one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
