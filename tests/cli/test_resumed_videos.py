"""`generate --resume`: killed anywhere, a video goes on and has the bytes of one that was never killed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sparse_forcing.cli import main
from sparse_forcing.media import coded, encode
from sparse_forcing.media.video import read_video
from sparse_forcing.sampling.generation import generate
from sparse_forcing.sampling.generation.clip import Clip
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from tests.forked import Forked
from tests.training.conftest import make_pipeline

SEGMENT, CHUNKS, FRAMES = 20, 6, 46  # chunks of eight frames; segments and chunks end at different frames
MEASURED = ("time_to_first_frame", "wall_seconds", "model_load_seconds", "seconds_per_chunk")
MEASURED += ("decode_seconds_per_chunk", "generated_fps_without_decoding", "generated_fps_with_decoding")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed") / "model"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (coded, encode):
        monkeypatch.setattr(module, "SEGMENT_FRAMES", SEGMENT)


@pytest.fixture
def loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is loaded once a test."""
    pipe = SparseForcingPipeline.from_pretrained(model)
    monkeypatch.setattr(generate, "load_pipeline", lambda config, prompts=None: pipe)


def command(model: Path, video: Path, *flags: str) -> list[str]:
    arguments = ["generate", "a red circle", "--then", "2", "a blue star", "--model", str(model), "--device", "cpu"]
    return [*arguments, "--num-frames", str(FRAMES), "--scale", "1", "--output", str(video), *flags]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """Ctrl-C once so many chunks have been written, before their checkpoint."""
    add, written = Clip.add, []

    def fail(clip: Clip, chunk: Any) -> None:
        add(clip, chunk)
        written.append(chunk)
        if len(written) == chunks:
            raise KeyboardInterrupt

    monkeypatch.setattr(Clip, "add", fail)


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def assert_same(video: Path, expected: Path) -> None:
    assert video.read_bytes() == expected.read_bytes()
    records = [json.loads(path.with_suffix(".json").read_text()) for path in (video, expected)]
    assert [len(record["seconds_per_chunk"]) for record in records] == [CHUNKS] * 2
    for record in records:
        for name in ("video", *MEASURED):
            del record[name]
    assert records[0] == records[1]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("memory", ["sparse", "window", "full"])
def test_interrupted_after_any_chunk(
    model: Path, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--memory", memory, *(["--overlay"] if memory == "sparse" else [])]
    plain, video = tmp_path / "plain.mp4", tmp_path / "c.mp4"
    assert main(command(model, plain, *flags)) == 0
    for chunks in range(1, CHUNKS + 1):
        with monkeypatch.context() as patched:
            interrupt_after(patched, chunks)
            assert main(command(model, video, *flags, "--resume", "--checkpoint-every", "1")) == 130
        left = files_below(tmp_path / "resume") if chunks > 1 else []
        assert [name for name in left if "state" in name] == ([f"c/state-{chunks - 1:08d}.pt"] if left else [])
        capsys.readouterr()
        assert main(command(model, video, *flags, "--resume", "--checkpoint-every", "4")) == 0
        assert (f"goes on from frame {8 * (chunks - 1)} of {FRAMES}" in capsys.readouterr().err) == (chunks > 1)
        assert_same(video, plain)
        overlay = [tmp_path / "overlay" / path.name for path in (video, plain)]
        assert memory != "sparse" or overlay[0].read_bytes() == overlay[1].read_bytes()
        assert not (tmp_path / "resume").exists()
        for path in (video, video.with_suffix(".json")):
            path.unlink()


@pytest.mark.usefixtures("loaded")
def test_interrupted_again_and_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, video = tmp_path / "plain.mp4", tmp_path / "c.mp4"
    assert main(command(model, plain)) == 0
    for _ in range(CHUNKS - 2):
        with monkeypatch.context() as patched:
            interrupt_after(patched, 2)
            assert main(command(model, video, "--resume", "--checkpoint-every", "1")) == 130
    assert main(command(model, video, "--resume")) == 0
    assert_same(video, plain)
    before = video.stat()
    assert main(command(model, video, "--resume")) == 0  # complete: left alone
    assert video.stat() == before


@pytest.mark.usefixtures("loaded")
def test_a_checkpoint_of_another_run_is_refused_in_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    video = tmp_path / "c.mp4"

    def interrupted(*flags: str) -> None:
        with monkeypatch.context() as patched:
            interrupt_after(patched, 3)
            assert main(command(model, video, *flags)) == 130
        capsys.readouterr()

    def refused(words: list[str], message: str) -> None:
        assert main(words) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
        assert not video.exists()

    interrupted("--checkpoint-every", "1")
    for flags, message in (
        (["--seed", "3"], "seed: 0 -> 3"),
        (["--num-inference-steps", "1"], "num_inference_steps: 2 -> 1"),
        (["--memory", "window"], "memory.kind: 'sparse' -> 'window'"),
        (["--num-frames", "40"], "num_frames: 46 -> 40"),
        (["--then", "4", "a ball"], "prompt_changes"),
    ):
        refused(command(model, video, "--resume", *flags), message)
    words = command(model, video, "--resume")
    refused(["a green ring" if word == "a red circle" else word for word in words], "prompt: 'a red circle' ->")
    pipe = generate.load_pipeline(None)
    own, pipe.weights_sha256 = pipe.weights_sha256, "0" * 64
    refused(words, "weights_sha256")
    pipe.weights_sha256 = own
    state = tmp_path / "resume" / "c" / "state-00000002.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    refused(words, "SHA-256 differs")
    interrupted()  # neither flag: what is there stays
    assert state.exists()
    interrupted("--checkpoint-every", "2")  # without --resume the video begins anew
    assert main(words) == 0


@pytest.mark.slow
def test_killed(model: Path, tmp_path: Path) -> None:
    """SIGKILL once three chunks are committed, at whatever the process is doing then."""
    folder = tmp_path / "videos"
    plain, video = folder / "plain.mp4", folder / "c.mp4"

    def start(path: Path, *flags: str) -> Forked:
        return Forked(tmp_path / f"{path.stem}.log", main, command(model, path, *flags))

    code, said = start(plain).finish()
    assert code == 0, said
    process = start(video, "--resume", "--checkpoint-every", "1")
    manifest, deadline = folder / "resume" / "c" / "manifest.json", time.monotonic() + 120
    while "state-00000003" not in (manifest.read_text() if manifest.exists() else ""):
        assert process.running
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.finish()[0] == -signal.SIGKILL
    assert not video.exists()
    code, said = start(video, "--resume").finish()
    assert code == 0, said
    assert "goes on from frame" in said
    assert_same(video, plain)
    assert files_below(folder) == ["c.json", "c.mp4", "plain.json", "plain.mp4"]


@pytest.mark.usefixtures("loaded")
def test_a_live_file_is_there_while_the_video_is_made_and_when_it_was_stopped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video, live = tmp_path / "c.mp4", tmp_path / "live" / "c.mp4"
    with monkeypatch.context() as patched:
        interrupt_after(patched, 4)
        assert main(command(model, video, "--live", "--checkpoint-every", "1")) == 130
    assert len(read_video(live)[0]) == 32
    assert not video.exists()
    assert main(command(model, video, "--live", "--resume")) == 0
    assert files_below(tmp_path) == ["c.json", "c.mp4"]
    assert main(command(model, tmp_path / "plain.mp4")) == 0
    assert_same(video, tmp_path / "plain.mp4")
