"""Evaluations over several machines: shard files that merge into one run's results, or are refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_forcing.cli import main
from sparse_forcing.eval.evaluate import EvaluateConfig, evaluate
from sparse_forcing.files import output_lock
from sparse_forcing.media.video import write_video
from tests.eval.conftest import moving_disc

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of two prompts, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("videos")
    for prompt in ("a disc", "another disc"):
        for index in range(2):
            write_video(folder / f"{prompt}-{index}.mp4", moving_disc(12, seed=index, speed=1 + index), 16)
    (folder / "broken-0.mp4").write_bytes(b"no video")
    return folder


def run(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def contents(folder: Path) -> list[str]:
    return [(folder / name).read_text("utf-8") for name in ("results.json", "videos.csv", "report.html")]


@pytest.mark.parametrize(
    ("suite", "flags"), [("offline", ["--metrics", "brightness", "pixel_stability"]), ("drift", [])]
)
def test_merged_shards_are_the_files_of_one_run(
    videos: Path, tmp_path: Path, suite: str, flags: list[str], capsys: pytest.CaptureFixture
) -> None:
    flags = ["--suite", suite, *flags]
    assert run(videos, *flags, "--resamples", 50, "--output", tmp_path / "one") == 0
    said = capsys.readouterr().out.replace("/one", "/all")
    for number in range(3):
        assert run(videos, *flags, "--output", tmp_path / "all", "--shard", f"{number}/3") == 0
    assert "1 of 5 videos, 0 failed" in capsys.readouterr().out
    files = sorted((tmp_path / "all").glob("shard-*.json"), reverse=True)
    assert run("--merge", *files, "--resamples", 50, "--output", tmp_path / "all") == 0
    assert capsys.readouterr().out == said
    assert contents(tmp_path / "all") == contents(tmp_path / "one")
    assert len(json.loads(contents(tmp_path / "all")[0])["failures"]) == 1


def shard(videos: Path, folder: Path, number: int, count: int, **options: object) -> Path:
    given = {"target": videos, "metrics": ("brightness",), "cache": folder / "cache", **options}
    evaluate(EvaluateConfig(output=folder, shard=(number, count), **given))  # type: ignore[arg-type]
    return folder / f"shard-{number}-of-{count}.json"


def test_shards_that_are_not_one_run_are_one_line(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second = (shard(videos, tmp_path / "a", number, 2) for number in range(2))
    less = tmp_path / "less.jsonl"
    less.write_text(json.dumps({"video": str(videos / "a disc-0.mp4")}) + "\n")
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps(json.loads(first.read_text()) | {"videos": []}))
    (tmp_path / "other.json").write_text("{}")
    cases = [
        ([first], "1 of 2 shards are missing: 1/2"),
        ([first, second, first], "are both shard 0/2"),
        ([first, shard(videos, tmp_path / "b", 1, 3)], "they overlap"),
        ([first, shard(videos, tmp_path / "c", 1, 2, metrics=("pixel_stability",))], "metrics differ in brightness"),
        ([first, shard(videos, tmp_path / "d", 1, 2, suite="drift")], "suite is 'offline' and 'drift'"),
        ([first, shard(less, tmp_path / "e", 1, 2)], "target is"),
        ([cut, second], "holds 0 videos, other than a shard 0/2"),
        ([tmp_path / "other.json"], "not a shard of an evaluation"),
        ([tmp_path / "gone.json"], "cannot read"),
        ([first, second, "--suite", "drift"], "--merge measures nothing; --suite has no effect with it"),
        ([videos, "--merge", first], "give either a folder or manifest"),
        ([videos, "--shard", "0/2", "--compare", videos], "--compare has no effect with it"),
        ([videos, "--shard", "2/2"], "--shard 2/2: expected I/N"),
    ]
    capsys.readouterr()
    for arguments, message in cases:
        given = arguments if arguments[0] == videos else ["--merge", *arguments]
        assert run(*given, "--output", tmp_path / "new") == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (tmp_path / "new").exists()


def test_an_empty_shard_and_shards_beside_each_other(videos: Path, tmp_path: Path) -> None:
    assert run(videos, "--metrics", "brightness", "--output", tmp_path, "--shard", "7/8") == 0
    assert json.loads((tmp_path / "shard-7-of-8.json").read_text())["videos"] == []
    with output_lock(tmp_path, shared=True), output_lock(tmp_path / "shard-0-of-8"):
        assert run(videos, "--metrics", "brightness", "--output", tmp_path, "--shard", "0/8") == 2
        assert run(videos, "--metrics", "brightness", "--output", tmp_path, "--shard", "6/8") == 0


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(videos: Path, tmp_path: Path) -> None:
    flags = ["--metrics", "brightness", "--resamples", "50", "--compare", str(videos)]
    assert run(videos, *flags, "--output", tmp_path / "one") == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        [*launcher, "-m", "sparse_forcing", "evaluate", str(videos), *flags, "--output", str(tmp_path / "two")],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert child.stdout.count("videos measured") == 1
