"""Checkpoints survive full disks, damage, hostility and mistakes."""

from __future__ import annotations

import json
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_forcing.errors import OutputError, WeightsError
from sparse_forcing.training.engine import checkpoint, parallel
from sparse_forcing.training.engine.checkpoint import (
    RandomState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from sparse_forcing.training.engine.ema import ParameterEma
from tests.training.helpers import is_complete


def parts(seed: int = 0, width: int = 4) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(width, width)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(width)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "ema": ParameterEma(model, 0.9)}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a["model"].parameters(), b["model"].parameters()))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Two checkpoints, steps 1 and 2; the parts are those of step 2."""
    for step in (1, 2):
        made = parts(step)
        save_checkpoint(tmp_path, step, made, {"a": 1}, random_state=True)
    return tmp_path, made


def test_everything_comes_back(saved: tuple[Path, dict[str, Any]]) -> None:
    out, made = saved
    fresh = parts(7)
    assert latest_checkpoint(out, fresh) == 2
    assert same(made, fresh)
    assert (
        fresh["optimizer"]
        .state_dict()["state"][0]["exp_avg"]
        .equal(made["optimizer"].state_dict()["state"][0]["exp_avg"])
    )
    assert all(torch.equal(made["ema"].shadow[k], v) for k, v in fresh["ema"].shadow.items())


def test_random_state_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(3)
    random.seed(4)
    save_checkpoint(tmp_path, 1, parts(3), {}, random_state=True)
    expected = torch.rand(3), random.random()
    torch.rand(100)
    load_checkpoint(tmp_path / "step-00000001", {}, random_state=True)
    found = torch.rand(3), random.random()
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


@pytest.mark.parametrize("room", [100, 20_000])
def test_full_disk_leaves_the_old_checkpoint(saved: tuple[Path, dict[str, Any]], room: int) -> None:
    out, made = saved
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*model\.pt \(\d{6,} bytes\): File too large"):
            save_checkpoint(out, 3, parts(5, width=400), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)
    assert not list(out.glob(".tmp-*"))  # the disk needs the room
    fresh = parts(7)
    assert latest_checkpoint(out, fresh) == 2
    assert same(made, fresh)


def test_retention_only_after_the_commit(saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    out, made = saved

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_commit", broken)
    with pytest.raises(OutputError, match="No space left"):
        save_checkpoint(out, 3, made, {}, keep=1)
    assert sorted(folder.name for folder in out.glob("step-*")) == ["step-00000001", "step-00000002"]
    monkeypatch.undo()
    for step in (3, 4):
        save_checkpoint(out, step, made, {}, keep=1)
    assert sorted(folder.name for folder in out.glob("step-*")) == ["step-00000003", "step-00000004"]
    assert not list(out.glob(".tmp*"))


def test_failing_to_remove_an_old_one_is_a_warning(
    saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, made = saved
    remove = shutil.rmtree

    def stubborn(path: Path, **options: Any) -> None:
        if Path(path).name == "step-00000001":
            raise OSError(16, "busy")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    with pytest.warns(UserWarning, match="cannot remove the old checkpoint"):
        save_checkpoint(out, 3, made, {})
    assert is_complete(out / "step-00000003")


@pytest.mark.parametrize("damage", ["bit", "cut", "missing file", "no manifest", "garbage manifest"])
def test_damage_is_found_and_named(saved: tuple[Path, dict[str, Any]], damage: str) -> None:
    out, _ = saved
    newest = out / "step-00000002"
    file = newest / "model.pt"
    if damage == "bit":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing file":
        file.unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("{")
    with pytest.raises(WeightsError, match="manifest" if "manifest" in damage else r"model\.pt"):
        load_checkpoint(newest, parts())
    with pytest.warns(UserWarning, match="skipping"):
        assert latest_checkpoint(out, parts(9)) == 1


def test_a_removal_that_was_interrupted_is_finished_by_the_next_save(saved: tuple[Path, dict[str, Any]]) -> None:
    out, made = saved
    (out / "step-00000001" / "manifest.json").unlink()
    (out / "step-00000001" / "model.pt").unlink()
    save_checkpoint(out, 3, made, {})
    assert sorted(folder.name for folder in out.glob("step-*")) == ["step-00000002", "step-00000003"]


def test_a_file_is_hashed_once_when_it_is_loaded(
    saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    digest = checkpoint.sha256_file
    monkeypatch.setattr(checkpoint, "sha256_file", lambda path: hashed.append(path.name) or digest(path))
    assert latest_checkpoint(saved[0], parts()) == 2
    assert sorted(hashed) == ["ema.pt", "model.pt", "optimizer.pt", "random-0.pt"]


def test_the_first_process_alone_keeps_tensors_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"state": {0: {"step": torch.ones(1)}}, "groups": [{"lr": 0.1}], "updates": 3}
    assert parallel.full_state(state) == state
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    assert parallel.full_state(state) == {"state": {0: {"step": None}}, "groups": [{"lr": 0.1}], "updates": 3}


def test_what_is_loaded_does_not_hang_on_the_file(saved: tuple[Path, dict[str, Any]]) -> None:
    """A file is mapped while it is loaded; afterwards a run owns what it has: the file may be overwritten or go."""
    out, made = saved
    fresh = parts(7)
    assert latest_checkpoint(out, fresh) == 2
    for path in (out / "step-00000002").glob("*.pt"):
        path.write_bytes(bytes(path.stat().st_size))
    before, after = (p["optimizer"].state_dict()["state"] for p in (made, fresh))
    assert all(torch.equal(value, after[i][name]) for i, state in before.items() for name, value in state.items())
    assert same(made, fresh)


def test_code_is_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (marker,)

    folder = save_checkpoint(tmp_path, 1, parts(), {})
    torch.save(Payload(), folder / "model.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.pt"] = checkpoint.sha256_file(folder / "model.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WeightsError, match=r"model\.pt"):
        load_checkpoint(folder, parts())
    assert not marker.exists()


def test_state_of_another_model_is_named(saved: tuple[Path, dict[str, Any]]) -> None:
    out, _ = saved
    with pytest.raises(WeightsError, match=r"model\.pt: does not fit .*size mismatch"):
        latest_checkpoint(out, parts(width=5))
    with pytest.raises(WeightsError, match="has no 'critic'; it holds ema"):
        latest_checkpoint(out, {**parts(), "critic": nn.Linear(2, 2)})


@pytest.mark.parametrize("kind", ["missing", "garbage"])
def test_random_state_is_required_unless_waived(saved: tuple[Path, dict[str, Any]], kind: str) -> None:
    out, _ = saved
    folder = out / "step-00000002"
    manifest = json.loads((folder / "manifest.json").read_text())
    if kind == "missing":
        del manifest["files"]["random-0.pt"]
    else:
        torch.save({"torch": "nonsense"}, folder / "random-0.pt")
        manifest["files"]["random-0.pt"] = checkpoint.sha256_file(folder / "random-0.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WeightsError, match=r"random" if kind == "missing" else r"random-0\.pt: does not fit"):
        latest_checkpoint(out, parts(), random_state=True)
    if kind == "missing":
        assert latest_checkpoint(out, parts(), random_state=True, allow_missing_random=True) == 2


def test_random_state_of_python_and_torch_round_trips() -> None:
    state = RandomState().state_dict()
    RandomState().load_state_dict(state)
    assert torch.equal(RandomState().state_dict()["torch"], state["torch"])


def test_no_checkpoint_means_step_zero(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path, parts()) == 0
