"""Data are known by content: files replaced under their names are noticed by `data encode` and by runs that resume."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from sparse_forcing.cli import main
from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.media.video import VideoWriter, write_video
from sparse_forcing.training.data.identity import DataIdentity
from sparse_forcing.training.data.pairs import make_generator
from sparse_forcing.training.data.shards import Shards
from sparse_forcing.training.data.sources import DataConfig, StoredSource
from sparse_forcing.training.data.videos import CaptionedVideo, content_digests, list_videos, videos_digest
from sparse_forcing.training.engine.checkpoint import save_checkpoint
from sparse_forcing.training.engine.resume import Resume
from sparse_forcing.training.engine.settings import LARGEST_SEED
from sparse_forcing.training.recipes.shared import generators
from sparse_forcing.weights.safe_load import check_safetensors


def add_clip(folder: Path, number: int, value: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:03d}.mp4"
    write_video(path, np.full((13, 64, 64, 3), value, np.uint8), 8)
    path.with_suffix(".txt").write_text(f"clip number {number}\n")
    return path


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for number in range(4):
        add_clip(tmp_path / "clips", number, 20 + 10 * number)
    return tmp_path / "clips"


def encode(out: Path, path: Path, **changes: Any) -> int:
    settings = {"data.kind": "videos", "data.path": path, "data.latent_frames": 1, "per_shard": 2, **changes}
    return main(
        ["data", "encode", str(out), *(x for pair in settings.items() for x in ("--set", "{}={}".format(*pair)))]
    )


def hashes(out: Path) -> list[str]:
    return [json.loads(path.read_text())["sha256"] for path in sorted(out.glob("shard-*.json"))]


def test_videos_replaced_while_a_set_is_half_made(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "encoded"
    assert encode(out, clips) == 0
    old = hashes(out)
    for path in out.glob("shard-00001.*"):
        path.unlink()
    for number in range(4):
        add_clip(clips, number, 200 - 10 * number)
    assert encode(out, clips) == 0
    assert "shard 1 of 2: its files have changed since it was made; it is made again" in capsys.readouterr().err
    assert encode(tmp_path / "fresh", clips) == 0
    assert hashes(out) == hashes(tmp_path / "fresh")
    assert not set(old) & set(hashes(out))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert encode(out, clips) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_one_replaced_video_costs_its_shard_alone(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "encoded"
    assert encode(out, clips) == 0
    first, second = hashes(out)
    add_clip(clips, 3, 222)
    assert encode(out, clips) == 0
    assert hashes(out)[0] == first
    assert hashes(out)[1] != second


def test_a_manifest_that_maps_to_other_files_of_the_same_names(clips: Path, tmp_path: Path) -> None:
    for number in range(4):
        add_clip(tmp_path / "other", number, 150 + number)

    def manifest(folder: str) -> Path:
        rows = [{"video": f"{folder}/{number:03d}.mp4", "prompt": f"clip number {number}"} for number in range(4)]
        (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / "list.jsonl"

    assert encode(tmp_path / "encoded", manifest("clips")) == 0
    assert encode(tmp_path / "encoded", manifest("other")) == 0
    assert encode(tmp_path / "fresh", manifest("other")) == 0
    assert hashes(tmp_path / "encoded") == hashes(tmp_path / "fresh")


def test_videos_that_are_gone_leave_their_shard(clips: Path, tmp_path: Path) -> None:
    rows = [{"video": f"clips/{number:03d}.mp4", "prompt": "a"} for number in range(4)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert encode(tmp_path / "encoded", tmp_path / "list.jsonl") == 0
    made = hashes(tmp_path / "encoded")
    shutil.rmtree(clips)
    assert encode(tmp_path / "encoded", tmp_path / "list.jsonl") == 0
    assert hashes(tmp_path / "encoded") == made


def test_a_video_with_a_flipped_bit_is_a_bad_sample(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its codec is then unknown to PyAV, whose stream has no decoder: that used to end the run with a traceback."""
    path = clips / "002.mp4"
    data = bytearray(path.read_bytes())
    data[data.index(b"stsd")] ^= 1
    path.write_bytes(data)
    assert encode(tmp_path / "encoded", clips) == 0
    assert len(Shards(tmp_path / "encoded")) == 3
    assert "skipped bad sample 1 of at most 10" in capsys.readouterr().err


class Holder:
    def state_dict(self) -> dict[str, Any]:
        return {"x": torch.zeros(1)}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def stored(path: Path) -> DataIdentity:
    return DataIdentity(StoredSource(DataConfig(kind="shards", path=path, latent_frames=1), 0), path)


def test_shards_replaced_under_a_run_that_resumes(clips: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "encoded", tmp_path / "run"
    assert encode(out, clips) == 0
    save_checkpoint(run, 3, {"model": Holder(), "data": stored(out)}, {})
    config = DataConfig()
    assert Resume().load(run, {"model": Holder(), "data": stored(out)}, config).step == 3
    shutil.rmtree(out)
    add_clip(clips, 0, 211)
    assert encode(out, clips) == 0
    with pytest.raises(WeightsError, match="holds other data than this run began with"):
        Resume().load(run, {"model": Holder(), "data": stored(out)}, config)
    assert Resume(allow_changes=True).load(run, {"model": Holder(), "data": stored(out)}, config).step == 3


def test_a_checkpoint_of_before_goes_on_with_a_warning(clips: Path, tmp_path: Path) -> None:
    assert encode(tmp_path / "encoded", clips) == 0
    save_checkpoint(tmp_path / "run", 3, {"model": Holder()}, {})
    parts = {"model": Holder(), "data": stored(tmp_path / "encoded")}
    with pytest.warns(UserWarning, match="kept no 'data'"):
        assert Resume().load(tmp_path / "run", parts, DataConfig()).step == 3


def test_digests_tell_content_and_prompts_apart(clips: Path, tmp_path: Path) -> None:
    first = videos_digest(list_videos(clips))
    shutil.copytree(clips, tmp_path / "copy")
    assert videos_digest(list_videos(tmp_path / "copy")) == first
    (clips / "001.txt").write_text("another prompt")
    second = videos_digest(list_videos(clips))
    add_clip(tmp_path / "copy", 1, 99)
    assert len({first, second, videos_digest(list_videos(tmp_path / "copy"))}) == 3
    (tmp_path / "a.txt").write_text("a\nb\n")
    (tmp_path / "b.txt").write_text("a\nc\n")
    a, b = (StoredSource(DataConfig(kind="prompts", path=tmp_path / f"{x}.txt"), 0).digest() for x in "ab")
    assert a != b
    with pytest.raises(ConfigError):
        DataIdentity(StoredSource(DataConfig(kind="prompts", path=tmp_path / "a.txt"), 0), None).load_state_dict(
            {"sha256": b}
        )


def test_pipes_are_bad_samples_and_no_manifest(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(clips / "pipe.mp4")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(f'{{"video": "clips/{name}.mp4", "prompt": "a"}}\n' for name in ("000", "pipe")))
    assert encode(tmp_path / "encoded", manifest, **{"data.max_bad_samples": 1}) == 0
    assert "pipe.mp4: no such video file" in capsys.readouterr().err
    assert content_digests([CaptionedVideo(clips / "pipe.mp4", "")]) == [None]
    os.mkfifo(clips / "000.json")
    (clips / "001.txt").unlink()
    os.mkfifo(clips / "001.txt")
    for path, message in ((clips / "pipe.mp4", "pipe.mp4: not a regular file"), (clips, "001.txt: not a regular file")):
        with pytest.raises(ConfigError, match=message):
            list_videos(path)
    os.mkfifo(tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match="not a regular file"):
        check_safetensors(tmp_path / "weights.safetensors")


def test_damaged_records_of_shards_are_made_again_or_named(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "encoded"
    assert encode(out, clips) == 0
    record, right = out / "shard-00001.json", (out / "shard-00001.json").read_bytes()
    for text in ("{}", "null", "5", '{"prompts": 5}', right.decode()[:-9], right.decode().replace("prompts", "p")):
        record.write_text(text)
        with pytest.raises(WeightsError, match=r"shard-00001\.json.*make the data again"):
            Shards(out)
    assert encode(out, clips) == 0
    assert "shard 2 of 2: its record is damaged; it is made again" in capsys.readouterr().err
    assert record.read_bytes() == right
    (out / "dataset.json").write_text("[]")
    assert encode(out, clips) == 2
    assert "dataset.json: is not what was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.height=1000000", "data: height must be above 0 and at most 16384"),
        ("data.fps=1e300", "data: fps must be above 0 and at most 1000"),
        ("data.latent_frames=1000000000000", "data: latent_frames must be 1 to 20000"),
    ],
)
def test_absurd_sizes_of_clips_are_refused_before_anything_is_loaded(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = setting.split("=")
    assert encode(tmp_path / "out", tmp_path, **{name: value}) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_any_seed_draws_noise_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = (0, 20_261_201, LARGEST_SEED)
    noise = [generators(seed, 10**6, 1, stream=1)[0].initial_seed() for seed in seeds]
    pairs = [make_generator(seed, 10**6).initial_seed() for seed in seeds]
    assert len(set(noise)) == len(set(pairs)) == 3
    assert noise[0] == 10**6 * 65_536 * 16 + 1  # what small seeds have always drawn
    assert encode(tmp_path / "out", tmp_path, seed=2**70) == 2
    assert "seed: must lie from 0 to 2147483647" in capsys.readouterr().err


def test_a_full_disk_under_safetensors_is_one_line_and_leaves_nothing(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(tensors: Any, path: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sparse_forcing.training.data.shards.save_file", save)
    assert encode(tmp_path / "out", clips) == 2
    assert "prompts.safetensors (16384 bytes): No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert list((tmp_path / "out").glob("*")) == []


def test_out_of_memory_anywhere_is_one_line(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def grow(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("sparse_forcing.training.data.encode.read_clip", grow)
    assert encode(tmp_path / "out", clips) == 2
    assert "error: out of memory; choose smaller pictures" in capsys.readouterr().err.splitlines()[-1]


CLIPS = ("data", "clips", "--num-frames", "9", "--size", "32", "--num-clips", "2")
WORLDS = ("--world", "reappear", "--num-frames", "64", "--size", "64")


@pytest.mark.parametrize("world", [False, True])
def test_clips_made_again_never_stand_beside_the_manifest_of_the_old_ones(
    tmp_path: Path, world: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first of two: what is there is described by nothing, not by what was there before."""
    more = WORLDS if world else ()
    assert main([*CLIPS, *more, str(tmp_path)]) == 0
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"manifest.jsonl", "000000.mp4"} <= old.keys()
    assert ("worlds.jsonl" in old) == world
    leave = VideoWriter.__exit__

    def stop(writer: VideoWriter, *raised: Any) -> None:
        leave(writer, *raised)
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoWriter, "__exit__", stop)
    assert main([*CLIPS, "--seed", "1", str(tmp_path)]) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"000000.mp4", "000001.mp4"}
    assert (tmp_path / "000000.mp4").read_bytes() != old["000000.mp4"]


def test_clips_that_cannot_be_made_leave_those_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*CLIPS, str(tmp_path)]) == 0
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for wrong in (("--scale", "5000"), ("--world", "reappear", "--gap", "5-9"), ("--fps", "2000")):
        assert main([*CLIPS, *wrong, str(tmp_path)]) == 2
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


CHANGES = [(b"record_sha", b"recorD_sha"), (b"{", b"["), (b"2", b"6")]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shard-00001.json", (b"clip", b"clap")),  # a caption
        *(("shard-00001.json", change) for change in CHANGES),
        *(("dataset.json", change) for change in CHANGES),
    ],
)
def test_a_changed_record_is_refused_and_that_of_a_shard_made_again(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, change: tuple[bytes, bytes]
) -> None:
    out = tmp_path / "out"
    assert encode(out, clips) == 0
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / name).write_bytes(written[name].replace(*change, 1))
    assert (out / name).read_bytes() != written[name]
    with pytest.raises(WeightsError, match=f"{name}.*make the data again"):
        Shards(out)
    capsys.readouterr()
    assert encode(out, clips) == (2 if name == "dataset.json" else 0)
    said = capsys.readouterr().err
    if name == "dataset.json":
        assert said.count("\n") == 1
        assert "make the data again" in said
    else:
        assert "shard 2 of 2: its record is damaged; it is made again" in said
        assert {path.name: path.read_bytes() for path in out.iterdir()} == written
