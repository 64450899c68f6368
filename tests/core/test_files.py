"""Files appear whole or not at all, with names that stay where they belong (faults 1, 2, 21, 27)."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_forcing import files
from sparse_forcing.errors import ConfigError, InUseError, OutputError
from sparse_forcing.sampling.generation.paths import safe_name

REPOSITORY = Path(__file__).resolve().parents[2]


def run_child(code: str, *arguments: object, preexec=None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=preexec,
    )


def test_write_replaces_whole_file_and_creates_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.json"
    files.atomic_write_text(target, "old")
    files.atomic_write_json(target, {"x": [1, "é"]})
    assert json.loads(target.read_text("utf-8")) == {"x": [1, "é"]}
    assert os.listdir(target.parent) == ["b.json"]


def test_mode_follows_umask_even_if_writer_replaces_the_temporary(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with files.atomic_path(tmp_path / "w") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "w").stat().st_mode & 0o777 == 0o640


def test_failure_inside_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(KeyError), files.atomic_path(target) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("half")
        raise KeyError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_full_disk_names_path_and_bytes_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    target.write_bytes(b"old")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    code = "import sys; from sparse_forcing.files import *; atomic_write_bytes(sys.argv[1], b'x' * 50000)"
    child = run_child(code, target, preexec=limit)
    assert f"OutputError: cannot write {target} (50000 bytes): File too large" in child.stderr
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_kill_during_write_leaves_the_old_file_and_a_temporary_that_is_swept(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")
    child = run_child(
        """
        import os, signal, sys
        from sparse_forcing.files import atomic_path
        with atomic_path(sys.argv[1]) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        target,
    )
    assert child.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    with files.atomic_path(tmp_path / "mine"):
        assert len(files.sweep_temporaries(tmp_path)) == 1  # the dead child's, not our own
    assert sorted(os.listdir(tmp_path)) == ["mine", "x.txt"]


def test_link_is_followed_and_device_folder_and_nul_refused(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.atomic_write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path, tmp_path / "pipe", f"{tmp_path}/a\0b", tmp_path / "real" / "x"):
        with pytest.raises(OutputError, match="cannot write"):
            files.atomic_write_text(bad, "x")


def test_json_is_strict_both_ways(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="JSON"):
        files.atomic_write_json(tmp_path / "x", {"a": float("nan")})
    for text, message in [('{"a": 1, "a": 2}', "twice"), ("[NaN]", "NaN"), ("[" * 100_000, "JSON"), ("", "JSON")]:
        (tmp_path / "j").write_text(text)
        with pytest.raises(ConfigError, match=message):
            files.read_json(tmp_path / "j")
    with pytest.raises(ConfigError, match="larger than 3 bytes"):
        files.atomic_write_json(tmp_path / "j", [1, 2])
        files.read_json(tmp_path / "j", max_bytes=3)


def test_sha256_of_known_content(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")


HOSTILE = [
    "../x",
    "/abs",
    "a\0b",
    "a\nb",
    "CON",
    "字" * 100,
    "🎈",
    ".",
    "..",
    "",
    " ",
    "-rf",
    "x" * 1000,
    "a\udc80b",
    "~",
    "$HOME",
]


@settings(derandomize=True, max_examples=200, deadline=None, database=None)
@given(st.text(max_size=400), st.integers(0, 10**6), st.text(max_size=60))
@example("../x", 0, "../y")
def test_safe_name_is_one_ordinary_component(prompt: str, index: int, extra: str) -> None:
    name = safe_name(prompt, index, extra=extra)
    assert os.path.basename(name) == name
    assert len(name.encode("utf-8")) <= 255
    assert name[0].isdigit()
    assert name.isprintable()
    assert name.endswith(".mp4")
    assert not set(name) & set('/\\:*?"<>|\0\n')


def test_hostile_prompts_make_distinct_files_inside_the_folder(tmp_path: Path) -> None:
    prompts = HOSTILE + ["same"] * 2
    for index, prompt in enumerate(prompts):
        files.atomic_write_text(tmp_path / safe_name(prompt, index), "x")
    assert len(os.listdir(tmp_path)) == len(prompts)
    assert safe_name("A red Ball,  bouncing!", 3, extra="seed 7") == "0003-a-red-ball-bouncing-seed-7.mp4"


def test_check_writable_accepts_new_folders_and_leaves_no_trace(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "new" / "clip.mp4")
    assert os.listdir(tmp_path / "new") == []


def test_check_writable_refuses_what_cannot_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, folder in [
        (tmp_path, False),
        (tmp_path / "file", True),
        (tmp_path / "file" / "x.mp4", False),
        (tmp_path / ("n" * 300), False),
        (Path("/proc/x.mp4"), False),
        ("a\0b", True),
    ]:
        with pytest.raises(OutputError, match="cannot write"):
            files.check_writable(path, folder=folder)


def test_names_that_cannot_be_are_refused_and_removed_files_are_gone(tmp_path: Path) -> None:
    for look in (files.is_file, files.is_folder):
        assert not look(tmp_path / "none" / "x", OutputError)
        for name in ("n" * 300, "a\0b", "\ud800"):
            with pytest.raises(OutputError, match="cannot look at"):
                look(tmp_path / name, OutputError)
    for name, message in (("\udcff.mp4", "not valid UTF-8"), ("new/" + "s" * 252 + ".mp4", "longer than 255 bytes")):
        with pytest.raises(OutputError, match=message):
            files.check_target(tmp_path / name)
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        files.remove_file(tmp_path / "link")
        assert os.listdir(tmp_path) == ["link"]


def test_new_folders_that_stay_empty_are_removed(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with files.without_empty_folders([tmp_path / "old", tmp_path / "a" / "b", tmp_path / "a" / "c"]):
        (tmp_path / "a" / "b").mkdir(parents=True)
        files.atomic_write_text(tmp_path / "a" / "c" / "x", "x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "c", "old", "x"]


def test_file_is_held_under_all_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "sub" / "x.mp4")
    with files.output_lock(tmp_path / "sub" / "x.mp4"):
        with pytest.raises(InUseError, match="another run"):
            with files.output_lock(tmp_path / "link.mp4"):
                pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_writable_refuses_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="Permission denied"):
        files.check_writable(tmp_path / "x.mp4")


@pytest.mark.parametrize("name", ["", "clip.mp4"])
def test_second_run_on_one_output_is_refused_until_the_first_ends(tmp_path: Path, name: str) -> None:
    code = """
    import sys
    from sparse_forcing.files import output_lock
    with output_lock(sys.argv[1]):
        print("held")
    """
    with files.output_lock(tmp_path / name):
        child = run_child(code, tmp_path / name)
        assert f"another run (process {os.getpid()})" in child.stderr
    assert run_child(code, tmp_path / name).stdout == "held\n"
    assert os.listdir(tmp_path) == []


def test_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    code = """
    import os, signal, sys
    from sparse_forcing.files import output_lock
    with output_lock(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_child(code, tmp_path).returncode == -signal.SIGKILL
    with files.output_lock(tmp_path):
        pass
