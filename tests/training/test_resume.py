"""Exact resume: killed or terminated at any point, a run ends with the bits of one that was never disturbed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.training.helpers import differences, is_complete, losses, newest, run, small_config, start, state

pytestmark = pytest.mark.xdist_group("resume")  # one process: `undisturbed` takes six seconds


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Six steps in one go, checkpoint every two."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, output = run(folder, small_config(model_folder, steps=6), folder / "out")
    assert code == 0, output
    return folder / "out"


def assert_same_run(out: Path, expected: Path) -> None:
    assert newest(out).name == newest(expected).name
    assert differences(state(newest(out)), state(newest(expected))) == []
    assert losses(out) == losses(expected)


@pytest.mark.parametrize("write", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 5, 10)), 6])
def test_killed_while_saving(tmp_path: Path, model_folder: Path, undisturbed: Path, write: int) -> None:
    """SIGKILL at the n-th file written (5 files per checkpoint, so the 6th falls into the second one)."""
    config, out = small_config(model_folder, steps=6), tmp_path / "out"
    code, _ = run(tmp_path, config, out, kill_at_write=write)
    assert code == -signal.SIGKILL
    assert len(list(out.glob("step-*"))) == (write - 1) // 5
    assert list(out.glob(".tmp-step-*"))
    code, output = run(tmp_path, config, out)
    assert code == 0, output
    assert_same_run(out, undisturbed)
    assert not list(out.glob(".tmp-step-*"))


# Six steps save three times; the third save removes the first checkpoint.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "number", "left"),
    [
        ("manifest", 2, [2]),
        ("rename", 2, [2]),
        ("renamed", 2, [2, 4]),
        ("removal", 1, [4, 6]),
    ],
)
def test_killed_while_committing_or_removing(
    tmp_path: Path, model_folder: Path, undisturbed: Path, place: str, number: int, left: list[int]
) -> None:
    config, out = small_config(model_folder, steps=6), tmp_path / "out"
    code, _ = run(tmp_path, config, out, kill_at=[place, number])
    assert code == -signal.SIGKILL
    complete = [folder for folder in sorted(out.glob("step-*")) if is_complete(folder)]
    assert [folder.name for folder in complete] == [f"step-{step:08d}" for step in left]
    code, output = run(tmp_path, config, out)
    assert code == 0, output
    assert_same_run(out, undisturbed)
    longer = small_config(model_folder, steps=7)
    assert run(tmp_path, longer, out)[0] == 0
    assert [folder.name for folder in sorted(out.glob("*step-*"))] == ["step-00000006", "step-00000007"]


@pytest.mark.slow
def test_terminated_between_checkpoints(tmp_path: Path, model_folder: Path, undisturbed: Path) -> None:
    config, out = small_config(model_folder, steps=6), tmp_path / "out"
    code, output = run(tmp_path, config, out, term_at_step=2)
    assert code == 143, output
    assert newest(out).name == "step-00000003"  # the step is finished, then saved
    code, output = run(tmp_path, config, out)
    assert code == 0, output
    assert_same_run(out, undisturbed)


@pytest.mark.slow
def test_terminated_while_saving(tmp_path: Path, model_folder: Path, undisturbed: Path) -> None:
    config, out = small_config(model_folder, steps=6), tmp_path / "out"
    code, output = run(tmp_path, config, out, term_at_write=2)
    assert code == 143, output
    code, output = run(tmp_path, config, out)
    assert code == 0, output
    assert_same_run(out, undisturbed)


@pytest.mark.slow
def test_second_signal_ends_at_once(tmp_path: Path, model_folder: Path) -> None:
    out = tmp_path / "out"
    process = start(tmp_path, small_config(model_folder, steps=100), out, step_seconds=30)
    deadline = time.monotonic() + 120
    while not (out / ".sparse-forcing.lock").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)  # into the first slow step
    process.terminate()
    time.sleep(1)
    assert process.running
    process.terminate()
    began = time.monotonic()
    assert process.finish()[0] == 143
    assert time.monotonic() - began < 15
    assert not list(out.glob("step-*"))


@pytest.mark.slow
def test_distillation_killed_while_saving(tmp_path: Path, model_folder: Path) -> None:
    config = small_config(model_folder, "distill", steps=6)
    assert run(tmp_path, config, tmp_path / "whole", stage="distill")[0] == 0
    out = tmp_path / "out"
    assert run(tmp_path, config, out, stage="distill", kill_at_write=9)[0] == -signal.SIGKILL
    code, output = run(tmp_path, config, out, stage="distill")
    assert code == 0, output
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.slow
def test_terminated_through_the_launcher(tmp_path: Path, model_folder: Path) -> None:
    """torchrun forwards SIGTERM; both processes finish the step, and what they save is what two others resume from."""
    config, out = small_config(model_folder, steps=50, checkpoint_every=100), tmp_path / "out"
    process = start(tmp_path, config, out, processes=2, torchrun=True, step_seconds=0.5)
    deadline = time.monotonic() + 200
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    code, output = process.finish()
    assert code == 1  # torchrun's own, whatever its workers say
    assert output.count("worker ends with 143") == 2
    assert "stopped at step" in output
    assert is_complete(newest(out))
    stopped = int(newest(out).name.removeprefix("step-"))
    assert 1 <= stopped < 50
    code, output = run(tmp_path, small_config(model_folder, steps=stopped + 1), out, processes=2)
    assert code == 0, output
