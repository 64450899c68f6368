"""Shared work: every task once, whoever does it; a stop ends the caller, not the others."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from sparse_forcing.files import output_lock
from sparse_forcing.reproduction.tasks import Task, run_tasks


class Work:
    """Ten tasks, each ready when the one two before it is done; every run takes a moment."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, int]] = []
        self.finished: set[int] = set()

    def tasks(self, who: str) -> list[Task]:
        return [
            Task(
                name=f"task-{number}",
                done=lambda number=number: number in self.finished,
                ready=lambda number=number: number < 2 or number - 2 in self.finished,
                run=lambda number=number: self.run(who, number),
            )
            for number in range(10)
        ]

    def run(self, who: str, number: int) -> int:
        assert number < 2 or number - 2 in self.finished
        self.runs.append((who, number))
        time.sleep(0.02)
        self.finished.add(number)
        return 0


def test_two_runs_share_the_tasks_and_do_none_twice(tmp_path: Path) -> None:
    work, codes = Work(), []

    def go(who: str) -> None:
        codes.append(run_tasks(work.tasks(who), tmp_path / "locks", wait_seconds=0.005))

    threads = [threading.Thread(target=go, args=(who,)) for who in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert codes == [0, 0]
    assert sorted(number for _, number in work.runs) == list(range(10))
    assert {who for who, _ in work.runs} == {"a", "b"}


def test_a_task_that_another_run_is_at_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = Work()
    locks = tmp_path / "locks"
    locks.mkdir()
    work.finished = set(range(9))
    with output_lock(locks / "task-9"):
        thread = threading.Thread(target=run_tasks, args=(work.tasks("a"), locks), kwargs={"wait_seconds": 0.005})
        thread.start()
        time.sleep(0.1)
        assert work.runs == []
        work.finished.add(9)
    thread.join(20)
    assert not thread.is_alive()
    assert work.runs == []
    assert capsys.readouterr().err.count("waiting for another process") == 1


def test_a_stop_ends_the_run_with_its_code(tmp_path: Path) -> None:
    work = Work()
    tasks = work.tasks("a")
    stopped = Task(name="stopped", done=lambda: False, run=lambda: 143)
    assert run_tasks([*tasks[:2], stopped, *tasks[2:]], tmp_path / "locks") == 143
    assert [number for _, number in work.runs] == [0, 1]


def test_a_task_without_its_result_is_not_success(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ended without its result"):
        run_tasks([Task(name="empty", done=lambda: False, run=lambda: 0)], tmp_path / "locks")
