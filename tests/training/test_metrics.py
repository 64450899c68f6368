"""metrics.jsonl after a crash, and when steps are repeated."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from sparse_forcing.errors import OutputError
from sparse_forcing.training.engine.metrics import append_row, forget_beyond


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        append_row(tmp_path / "metrics.jsonl", {"step": step, "loss": 0.5})
    return tmp_path / "metrics.jsonl"


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_full_disk_is_named(path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limits[1]))
    try:
        with pytest.raises(OutputError, match=rf"cannot write {path}: File too large"):
            append_row(path, {"step": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps(path) == [1, 2, 3]


def test_rows_beyond_the_step_go(path: Path) -> None:
    forget_beyond(path, 2)
    assert steps(path) == [1, 2]
    forget_beyond(path.with_name("none.jsonl"), 2)
    assert not path.with_name("none.jsonl").exists()


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', "{", "\x00\x00\x00", "4", '{"loss": 1}'])
def test_a_torn_line_goes_with_a_warning_and_the_next_row_is_whole(path: Path, torn: str) -> None:
    with path.open("a") as file:
        file.write(torn)
    with pytest.warns(UserWarning, match="dropped 1 of 4 lines"):
        forget_beyond(path, 9)
    append_row(path, {"step": 4})
    assert steps(path) == [1, 2, 3, 4]


def test_a_rewrite_that_fails_leaves_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        forget_beyond(path, 1)
    assert steps(path) == [1, 2, 3]
