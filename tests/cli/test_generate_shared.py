"""`generate` whose videos several processes make: shards of a list, and the processes of one launch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from sparse_forcing import launch as launch_module
from sparse_forcing.cli import generate as command
from sparse_forcing.cli import main
from sparse_forcing.errors import ConfigError, OutputError
from sparse_forcing.files import output_lock, sweep_temporaries
from sparse_forcing.launch import JoinedLaunch, Launch, join_launch
from sparse_forcing.processes import leave_group
from tests.cli.test_generate_end_to_end import model  # noqa: F401
from tests.faults.conftest import never_loads, stub  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a red", "a ball", "red ball", "ball ball", "red red")


def run(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("0*.mp4")}


@pytest.mark.usefixtures("stub")
def test_shards_make_every_video_once_and_the_files_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = (*PROMPTS, "--num-samples", 2)
    assert run(*arguments, "--output", tmp_path / "one") == 0
    made = []
    for number in range(3):
        assert run(*arguments, "--output", tmp_path / "all", "--shard", f"{number}/3", "--json") == 0
        made.append({Path(record["path"]).name for record in json.loads(capsys.readouterr().out.splitlines()[-1])})
    assert digests(tmp_path / "all") == digests(tmp_path / "one")
    assert [len(names) for names in made] == [4, 3, 3]
    assert len(set().union(*made)) == 10
    assert run("a red", "--output", tmp_path / "none", "--shard", "2/3") == 0
    assert "none belongs to this shard" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("stub")
def test_shards_share_a_folder_with_each_other_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = (*PROMPTS, "--output", tmp_path)
    with output_lock(tmp_path, shared=True), output_lock(tmp_path / "shard-0-of-2"):
        assert run(*arguments, "--shard", "0/2") == 2
        assert run(*arguments) == 2
        assert capsys.readouterr().err.count("another run") == 2
        assert run(*arguments, "--shard", "1/2") == 0
    with output_lock(tmp_path):
        assert run(*arguments, "--shard", "1/2") == 2


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "2/2"], "--shard 2/2: expected I/N with I from 0"),
        (["--shard", "0/0"], "--shard 0/0: expected I/N"),
        (["--shard", "half"], "argument --shard: invalid I/N value: 'half'"),
        (["--shard", "0/2", "--output", "a.mp4"], "--output a.mp4 is one video"),
        (["--shard", "0/2", "--grid", "a.gif"], "--grid shows all videos of a list"),
    ],
)
def test_bad_shards_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert run("p", *arguments) == 2
    assert message in capsys.readouterr().err


def test_temporaries_of_another_machine_are_left_alone(tmp_path: Path) -> None:
    for name in (".sf-tmp-999999999-00000000-ab.mp4", ".sf-tmp-999999999-ab.mp4"):
        (tmp_path / name).touch()
    assert [path.name for path in sweep_temporaries(tmp_path)] == [".sf-tmp-999999999-ab.mp4"]


class OneOfTwo(Launch):
    """One of two processes, beside another of which `gathered` says what it hands over."""

    count = 2

    def __init__(self, number: int, gathered: list[Any]) -> None:
        self.number, self.gathered = number, gathered

    def gather(self, value: Any) -> list[Any]:
        pair = [value, self.gathered.pop(0)]
        return pair if self.number == 0 else pair[::-1]


def join(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    monkeypatch.setattr(command, "join_launch", lambda together: contextlib.nullcontext(launch))


@pytest.mark.usefixtures("stub")
def test_each_process_makes_its_share_and_the_first_answers_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = (*PROMPTS, "--output", tmp_path, "--json")
    join(monkeypatch, OneOfTwo(1, [None, [], False]))
    assert run(*arguments) == 0
    captured = capsys.readouterr()
    assert (captured.out, sorted(digests(tmp_path))) == (
        "",
        ["0001-a-ball-seed0.mp4", "0003-ball-ball-seed0.mp4"],
    )
    assert captured.err.startswith("[1] 1/2 a ball\n")

    others = [{"path": str(tmp_path / name)} for name in sorted(digests(tmp_path))]
    join(monkeypatch, OneOfTwo(0, [None, others, True]))
    assert run(*arguments) == 1  # the other one's code
    records = json.loads(capsys.readouterr().out)
    assert [Path(record["path"]).name for record in records] == sorted(digests(tmp_path))
    assert len(digests(tmp_path)) == 5


def test_devices_of_a_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with leave_group():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        launch = JoinedLaunch()
        assert launch.device("cpu") == "cpu"
        with pytest.raises(ConfigError, match="each of 1 processes takes its own GPU"):
            launch.device("cuda:1")
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        taken: list[int] = []
        monkeypatch.setattr("torch.cuda.set_device", taken.append)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert launch.device("auto") == launch.device("cuda") == "cuda:1"
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(ConfigError, match="no GPU for process 3 of this machine, it has 2"):
            launch.device("auto")
        assert taken == [1, 1]


def test_a_launch_that_is_half_described_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    alone = "WORLD_SIZE=2, but the processes of this launch do not find each other"
    with pytest.raises(ConfigError, match=alone), join_launch():
        pytest.fail("joined")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch_module, "MEETING", timedelta(seconds=1))
    with pytest.raises(ConfigError, match=alone), join_launch():
        pytest.fail("joined, although the other process never came")


@contextlib.contextmanager
def torchrun(processes: int, *arguments: object) -> Iterator[subprocess.Popen]:
    """`torchrun ... generate`, in a session of its own, none of whose processes outlives the block."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "-m", "sparse_forcing", "generate", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def workers_of(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers are found through /proc")
def test_two_processes_make_the_files_of_one_also_after_one_was_killed(model: Path, tmp_path: Path) -> None:  # noqa: F811
    arguments = (*PROMPTS, "--model", model, "--num-frames", 240, "--memory", "window")
    assert run(*arguments, "--output", tmp_path / "one") == 0
    shared = tmp_path / "shared"
    with torchrun(2, *arguments, "--output", shared) as process:
        end = time.monotonic() + 240
        while not list(shared.glob("0001*.json")):
            assert process.poll() is None, process.communicate()[1][-2000:]
            assert time.monotonic() < end
            time.sleep(0.05)
        with pytest.raises(OutputError, match="another run"), output_lock(shared):
            pass
        os.kill(workers_of(process)[0], signal.SIGKILL)
        assert process.wait(120) != 0
    finished = {path.stem for path in shared.glob("*.json")}
    assert 0 < len(finished) < len(PROMPTS)
    assert not [path for path in shared.glob("0*.mp4") if path.stem not in finished]

    with torchrun(2, *arguments, "--output", shared, "--skip-existing", "--json") as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-2000:]
    assert digests(shared) == digests(tmp_path / "one")
    made = [Path(record["path"]).stem for record in json.loads(out)]
    assert made == sorted({Path(name).stem for name in digests(shared)} - finished)
    assert f"[0] {len(finished)} of 5 videos exist already" in err
    assert {path.name for path in shared.iterdir()} == {
        f"{name}{end}" for name in (Path(name).stem for name in digests(shared)) for end in (".mp4", ".json")
    }
