"""Disks that are full, folders that vanish, and what killed runs leave behind (issue 19: nothing lost, one line)."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparse_forcing.cli import main
from sparse_forcing.errors import OutputError, WeightsError
from sparse_forcing.files import LOCK_NAME, check_writable, explain_full_disk, output_lock, sweep_temporaries
from sparse_forcing.model_folder.folder import link_part
from tests.wan_folder import write_wan

GONE = 999_999_999  # no process has this number


@contextmanager
def full_disk(room: int = 0) -> Iterator[None]:
    """Files cannot grow beyond `room` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"x")
    (tmp_path / "c.yaml").write_text("model: tiny\ncount: 4\n")
    (tmp_path / "w.pt").write_bytes(b"x")
    return tmp_path


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.mark.parametrize(
    "command",
    [
        "generate a_red_circle --output NEW/deep",
        "generate a_red_circle --output NEW/a.mp4",
        "train pretrain --output NEW/deep",
        "evaluate HERE/videos --output NEW",
        "data encode NEW --config HERE/c.yaml",
        "data clips NEW",
        "convert HERE/w.pt NEW",
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    inputs: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command.replace("NEW", str(inputs / "new")).replace("HERE", str(inputs)).split()
    before = sorted(inputs.rglob("*"))
    with full_disk():
        assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot write into" in error
    assert "File too large" in error
    assert sorted(inputs.rglob("*")) == before


@pytest.mark.parametrize("name", [f".sf-tmp-{GONE}-ab", f"{LOCK_NAME}-x/new"])
@pytest.mark.parametrize(
    "command",
    [
        "train pretrain --output NEW",
        "evaluate HERE/videos --output NEW",
        "data encode NEW --config HERE/c.yaml",
        "data clips NEW",
        "convert HERE/w.pt NEW",
    ],
)
def test_an_output_that_the_next_run_would_sweep_away_is_refused(
    inputs: Path, command: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)
    before = sorted(inputs.rglob("*"))
    assert main(command.replace("NEW", name).replace("HERE", ".").split()) == 2
    assert "is a name of temporary files; choose another\n" in capsys.readouterr().err
    assert sorted(inputs.rglob("*")) == before


def test_a_lock_that_cannot_be_written_is_not_left_behind(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OutputError, match=f"cannot write .*{LOCK_NAME}"), output_lock(tmp_path):
        pytest.fail("held a lock that nobody can read")
    assert list(tmp_path.iterdir()) == []
    with output_lock(tmp_path):
        pass


@pytest.mark.parametrize("flags", [[], ["--resume", "--checkpoint-every", "1"]])
def test_a_disk_that_fills_up_while_a_video_is_made_is_one_line(
    stub, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(600):
        assert main(["generate", "a ball", "--output", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert "File too large" in error
    assert error.strip().splitlines()[-1].startswith("sparse-forcing generate: error: ")
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out", "out/a.mp4"])
def test_an_output_folder_that_vanishes_is_one_line(
    stub, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.on_chunk = lambda index: shutil.rmtree(tmp_path / "out") if index == 1 else None
    assert main(["generate", "a ball", "--output", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1].startswith("sparse-forcing generate: error: cannot write")
    assert "Traceback" not in error


def test_whoever_holds_a_folder_sweeps_what_killed_runs_left(tmp_path: Path) -> None:
    (tmp_path / f".sf-tmp-{GONE}-ab.safetensors").write_bytes(b"x" * 100)
    (tmp_path / f".sf-tmp-{GONE}-transformer").mkdir()
    (tmp_path / f".sf-tmp-{GONE}-transformer" / "part").write_bytes(b"x")
    (tmp_path / ".sf-tmp-1-ab").write_bytes(b"of a process that runs")
    (tmp_path / "mine").write_bytes(b"x")
    with output_lock(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".sf-tmp-1-ab", LOCK_NAME, "mine"]
    (tmp_path / f".sf-tmp-{GONE}-cd.mp4").write_bytes(b"x")
    with output_lock(tmp_path / "one.mp4"):
        assert not list(tmp_path.glob(f".sf-tmp-{GONE}*"))
    assert sweep_temporaries(tmp_path) == []


def test_what_a_run_leaves_that_is_still_dying_is_swept(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has waited for it
    try:
        (tmp_path / f".sf-tmp-{child}-ab").touch()
        assert [path.name for path in sweep_temporaries(tmp_path)] == [f".sf-tmp-{child}-ab"]
    finally:
        os.waitpid(child, 0)
    with output_lock(tmp_path):
        (tmp_path / f".sf-tmp-{GONE}-ab").touch()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_never_makes_convert_refuse(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = types.ModuleType("sparse_forcing.model_folder.convert")

    def convert(source: Path, target: Path, options: dict) -> types.SimpleNamespace:
        (target / "config.json").write_text("{}")
        return types.SimpleNamespace(tensors=1, preset=None, remarks=[])

    fake.convert, fake.ConvertOptions = convert, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sparse_forcing.model_folder.convert", fake)
    target = inputs / "out"
    (target / f".sf-tmp-{GONE}-transformer").mkdir(parents=True)
    (target / LOCK_NAME).write_text(str(GONE))
    assert main(["convert", str(inputs / "w.pt"), str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "manifest.json"]


def test_a_conversion_that_fails_leaves_no_folder(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(inputs / "w.pt"), str(inputs / "new" / "deep")]) == 2
    assert "w.pt: refused, it is damaged" in capsys.readouterr().err
    assert not (inputs / "new").exists()


@pytest.mark.parametrize("room", [10, 3000])
@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("{model}/transformer/diffusion_pytorch_model.safetensors {new} --head-dim 24 --base {model}", "transformer"),
        ("{model} {new} --to wan", "diffusion_pytorch_model.safetensors"),
        ("{model} {new} --to self-forcing", "model.pt"),
    ],
)
def test_a_disk_that_fills_up_while_weights_are_written_is_named(
    wan: Path, tmp_path: Path, command: str, named: str, room: int, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    with full_disk(room):
        assert main(["convert", *command.format(model=wan, new=new).split()]) == 2
    assert capsys.readouterr().err == f"sparse-forcing convert: error: cannot write {new / named}: File too large\n"
    assert not new.exists()


@pytest.mark.parametrize("refusal", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_parts_that_cannot_be_copied_are_named(
    wan: Path, tmp_path: Path, refusal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copy2", refuse)
    with pytest.raises(OutputError, match=rf"cannot write .*new/.*: {os.strerror(refusal)}"):
        link_part(wan / "vae", tmp_path / "new")


def test_a_part_that_cannot_be_read_is_named(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), source)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copy2", refuse)
    with pytest.raises(WeightsError, match=rf"cannot read {wan / 'vae'}/.*: Permission denied"):
        link_part(wan / "vae", tmp_path / "new")


@pytest.mark.parametrize("bug", [KeyError("scale"), ValueError("unknown setting")])
def test_a_mistake_beside_a_refused_file_is_not_blamed_on_the_disk(tmp_path: Path, bug: Exception) -> None:
    with pytest.raises(type(bug)), explain_full_disk(tmp_path / "out"):
        try:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except PermissionError:
            raise bug  # noqa: B904 it has nothing to do with what was refused


def test_a_folder_that_cannot_be_written_is_not_created(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OutputError, match="File too large"):
        check_writable(tmp_path / "a" / "b", folder=True)
    assert list(tmp_path.iterdir()) == []
