"""`generate` with a real pipeline: random weights in a folder, every memory, and equal bytes from any process."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sparse_forcing.cli import main
from sparse_forcing.eval.measuring.manifest import load_entries
from sparse_forcing.media.images import fit as fit_frames
from sparse_forcing.media.video import iter_frames, read_video, write_video
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.text import WordTextEncoder
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import PatchAutoencoder
from sparse_forcing.model_folder.folder import PipelineConfig
from sparse_forcing.sampling.generation import conditioning, generate
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from tests.forked import Forked


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: two layers of random weights, 32x32 pixels, chunks of two latent frames."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    transformer = CausalWanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=8,
        text_dim=16,
        ffn_dim=32,
        num_layers=2,
        chunk_frames=2,
        horizon_frames=8,
    )
    for parameter in transformer.parameters():  # as initialised, its output is zero whatever it sees
        torch.nn.init.normal_(parameter, std=0.3)
    config = PipelineConfig(
        fps=16.0,
        height=32,
        width=32,
        num_frames=24,
        text_encoder="words",
        vae="patch",
        sampler=SamplerConfig(kind="euler", steps=2, shift=6.0, guidance_scale=2.0),
        memory=MemoryConfig(kind="sparse", window_frames=4, tile=(2, 2, 2), persistent_blocks=2, density=0.5),
    )
    text = WordTextEncoder(["a", "red", "ball"], dim=16, num_heads=2, text_len=4)
    SparseForcingPipeline(transformer, text, PatchAutoencoder(8), config).save_pretrained(folder)
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("memory", ["full", "window", "sink", "sparse", "heavy_hitter"])
def test_every_memory_generates_and_reports_its_cache(model: Path, tmp_path: Path, memory: str) -> None:
    flags = {
        "sink": ["--sink-frames", "1"],
        "sparse": ["--overlay", "--density", "0.25"],
        "heavy_hitter": ["--overlay", "--persistent-blocks", "3", "--tile", "1", "1", "5"],
    }.get(memory, [])
    target = tmp_path / "c.mp4"
    arguments = ["generate", "a red ball", "--model", str(model), "--output", str(target), "--num-frames", "30"]
    assert main([*arguments, "--memory", memory, *flags]) == 0
    record = json.loads((tmp_path / "c.json").read_text())
    assert read_video(target)[0].shape == (30, 256, 256, 3)
    assert record["num_frames"] == 30
    assert record["trimmed_frames"] == 2
    assert record["settings"]["memory"]["kind"] == memory
    assert record["cache_bytes_peak"] > 0
    assert len(record["seconds_per_chunk"]) == 4
    assert (tmp_path / "overlay" / "c.mp4").exists() == ("--overlay" in flags)


@pytest.mark.slow
def test_same_seed_same_bytes_in_another_process_and_company(model: Path, tmp_path: Path) -> None:
    arguments = ["generate", "a red ball", "--model", str(model), "--seed", "3"]
    assert main([*arguments, "--output", str(tmp_path / "one.mp4")]) == 0
    folder = tmp_path / "many"
    several = ["generate", "a ball", "a red ball", "--model", str(model), "--num-samples", "2", "--seed", "2"]
    code, output = Forked(tmp_path / "log", main, [*several, "--output", str(folder)]).finish()
    assert code == 0, output
    assert digest(folder / "0001-a-red-ball-seed3.mp4") == digest(tmp_path / "one.mp4")
    assert digest(folder / "0001-a-red-ball-seed2.mp4") != digest(tmp_path / "one.mp4")


def test_the_text_encoder_goes_where_it_is_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple] = []
    monkeypatch.setattr(generate, "resolve_device", lambda name, setting="--device": name)
    monkeypatch.setattr(
        SparseForcingPipeline, "to", lambda pipe, *where, **others: moved.append((where, others)) or pipe
    )
    arguments = ["generate", "a ball", "--model", str(model), "--num-frames", "8", "--output", str(tmp_path / "a.mp4")]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert main([*arguments, "--device", "cpu", "--text-encoder-device", "meta"]) == 0
    assert moved == [(("cpu",), {"text_encoder_device": "cpu"}), (("cpu",), {"text_encoder_device": "meta"})]
    assert json.loads((tmp_path / "a.json").read_text())["settings"]["text_encoder_device"] == "meta"


def test_prompts_follow_each_other(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each from the chunk that begins at its time or after it; the JSON file says when that was."""

    def video(name: str, *flags: str) -> np.ndarray:
        arguments = ["generate", "a ball", "--model", str(model), "--output", str(tmp_path / f"{name}.mp4")]
        assert main([*arguments, "--num-frames", "24", *flags]) == 0
        return read_video(tmp_path / f"{name}.mp4")[0].astype(int)

    plain, changed = video("plain"), video("changed", "--then", "0.3", " a red ball ", "--then", "1", "a ball")
    assert abs(plain[:8] - changed[:8]).max() < 60 < abs(plain[8:] - changed[8:]).max()  # encoded, not equal
    assert json.loads((tmp_path / "plain.json").read_text())["prompt_changes"] == []
    assert json.loads((tmp_path / "changed.json").read_text())["prompt_changes"] == [
        {"frame": 8, "seconds": 0.5, "prompt": "a red ball"},
        {"frame": 16, "seconds": 1.0, "prompt": "a ball"},
    ]
    assert [entry.text for entry in load_entries(tmp_path)] == [None, "a ball"]
    capsys.readouterr()
    for times, message in (
        (["1.1"], "the last one begins at 1 s"),
        (["0.1", "0.2"], "begins at 0.5 s has two prompts"),
    ):
        late = [word for time in times for word in ("--then", time, "a red ball")]
        arguments = ["generate", "a ball", "--model", str(model), "--output", str(tmp_path / "none" / "late.mp4")]
        assert main([*arguments, "--num-frames", "24", *late]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_a_grid_shows_all_videos_at_their_times(model: Path, tmp_path: Path, suffix: str) -> None:
    """Also those that were there before, and their last picture where they end; a hole stays white."""
    grid = tmp_path / "pages" / f"grid{suffix}"
    arguments = ["generate", "a red ball", "--model", str(model), "--scale", "1", "--output", str(tmp_path / "videos")]
    assert main([*arguments, "--num-frames", "9", "--num-samples", "2"]) == 0
    more = ["--num-frames", "24", "--num-samples", "3", "--skip-existing", "--grid", str(grid)]
    assert main([*arguments, *more]) == 0
    videos = [read_video(path)[0].astype(int) for path in sorted((tmp_path / "videos").glob("*.mp4"))]
    assert [len(video) for video in videos] == [9, 9, 24]
    with Image.open(grid) as picture:
        shown, seconds = [], 0.0
        for number in range(picture.n_frames):
            picture.seek(number)
            shown.append(np.asarray(picture.convert("RGB")).astype(int))
            seconds += picture.info["duration"] / 1000
    assert seconds == pytest.approx(24 / 16, abs=0.006)  # equal frames become one
    for time, frame in ((0, shown[0]), (-1, shown[-1])):
        assert frame.shape == (2 * 32 + 4, 2 * 32 + 4, 3)
        for place, part in enumerate((frame[:32, :32], frame[:32, 36:], frame[36:, :32])):
            far = {(n, t): abs(part - video[t]).mean() for n, video in enumerate(videos) for t in (0, -1)}
            assert min(far, key=far.__getitem__) == (place, time)
        assert frame[36:, 36:].min() > 240


def test_a_grid_that_cannot_be_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "a ball", "--model", str(model), "--output", str(tmp_path / "videos"), "--grid"]
    start = tmp_path / "start.webp"
    Image.new("RGB", (32, 32)).save(start)
    refused = {
        "lower --scale": [str(tmp_path / "large.webp"), "--num-samples", "9", "--scale", "64"],
        "which this run reads": [str(start), "--image", str(start)],
    }
    for message, flags in refused.items():
        assert main([*arguments, *flags]) == 2
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == [start]  # before anything was made
    assert main([*arguments[:-1], "--scale", "1", "--num-frames", "8"]) == 0
    unlike = ["--scale", "2", "--num-frames", "8", "--num-samples", "2", "--skip-existing"]
    assert main([*arguments, str(tmp_path / "g.gif"), *unlike]) == 2
    assert "is unlike" in capsys.readouterr().err
    assert not (tmp_path / "g.gif").exists()


def test_a_longer_video_begins_with_the_shorter_one(model: Path, tmp_path: Path) -> None:
    for frames in (16, 32):
        target = tmp_path / f"{frames}.mp4"
        arguments = ["generate", "a ball", "--model", str(model), "--num-frames", str(frames), "--output", str(target)]
        assert main(arguments) == 0
    short, long = (read_video(tmp_path / f"{frames}.mp4")[0].astype(int) for frames in (16, 32))
    assert abs(short - long[:16]).mean() < 2  # the encoder looks ahead; the pictures are the same


def test_start_from_a_picture_or_go_on_from_a_video(model: Path, tmp_path: Path) -> None:
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, 20:] = (250, 120, 20)
    Image.fromarray(picture).save(tmp_path / "p.png")
    write_video(tmp_path / "v.mp4", np.stack([picture] * 19), 16)
    arguments = ["generate", "a ball", "--model", str(model), "--num-frames", "8", "--seed", "1", "--output"]
    for name, flags in {"none": [], "image": ["--image", "p.png"], "video": ["--video", "v.mp4"]}.items():
        flags = [str(tmp_path / flag) if "." in flag else flag for flag in flags]
        assert main([*arguments, str(tmp_path / f"{name}.mp4"), *flags]) == 0
        assert read_video(tmp_path / f"{name}.mp4")[1].frames == 8
    assert len({digest(tmp_path / f"{name}.mp4") for name in ("none", "image", "video")}) == 3
    first, second = read_video(tmp_path / "image.mp4")[0][:2].astype(int)
    shown = np.asarray(ImageOps.fit(Image.fromarray(picture), (32, 32))).repeat(8, 0).repeat(8, 1)
    assert abs(first - shown).mean() < 2 < abs(second - shown).mean()  # coded, not equal


def test_a_long_video_to_go_on_from_is_read_in_pieces(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last whole chunks count, at the model's rate; never are all its frames held."""
    pictures = np.random.default_rng(0).integers(0, 256, (203, 32, 32, 3), np.uint8)
    write_video(tmp_path / "long.mp4", pictures, 24)
    longest = 0

    def fit(frames: np.ndarray, height: int, width: int) -> np.ndarray:
        nonlocal longest
        longest = max(longest, len(frames))
        return fit_frames(frames, height, width)

    monkeypatch.setattr(conditioning, "fit", fit)
    arguments = ["generate", "a ball", "--model", str(model), "--num-frames", "8", "--memory", "sparse", "--output"]
    assert main([*arguments, str(tmp_path / "a.mp4"), "--video", str(tmp_path / "long.mp4")]) == 0
    assert "24 frames/s, the model makes 16: frames in between are left out" in capsys.readouterr().err
    assert 0 < longest <= conditioning.PIECE_FRAMES
    whole = np.stack(list(iter_frames(tmp_path / "long.mp4", fps=16)))
    assert len(whole) == 135
    write_lossless(tmp_path / "end.avi", whole[-128:], 16)
    assert main([*arguments, str(tmp_path / "b.mp4"), "--video", str(tmp_path / "end.avi")]) == 0
    assert digest(tmp_path / "a.mp4") == digest(tmp_path / "b.mp4")


def write_lossless(path: Path, frames: np.ndarray, fps: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def test_damaged_start_is_one_line_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").write_bytes(b"<html>")
    for flag, message in (("--image", "not a readable image"), ("--video", "not a readable video")):
        arguments = [
            "generate",
            "p",
            "--model",
            "none",
            flag,
            str(tmp_path / "bad"),
            "--output",
            str(tmp_path / "c.mp4"),
        ]
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert message in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_unknown_and_surplus_words_are_mentioned(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "a red ball and a mauve zebra", "--model", str(model), "--num-frames", "8"]
    assert main([*arguments, "--output", str(tmp_path / "c.mp4")]) == 0
    error = capsys.readouterr().err
    assert "does not know: and, mauve, zebra" in error
    assert "cut to its first 4 words" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--height", "33"], "33"),
        (["--memory", "window", "--window-frames", "1"], "window"),
        (["--memory", "sink", "--window-frames", "4", "--sink-frames", "4"], "sink"),
        (["--density", "0"], "density"),
        (["--video", "SHORT"], "5 frames are less than one chunk of 8"),
    ],
)
def test_settings_the_model_cannot_take_are_one_line(
    model: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "short.mp4", np.zeros((5, 32, 32, 3), np.uint8), 16)
    flags = [str(tmp_path / "short.mp4") if flag == "SHORT" else flag for flag in flags]
    assert main(["generate", "a ball", "--model", str(model), "--output", str(tmp_path / "c.mp4"), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["short.mp4"]


def test_a_flipped_bit_in_the_model_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    weights = next((damaged / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["generate", "a ball", "--model", str(damaged), "--output", str(tmp_path / "out" / "c.mp4")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert weights.name in captured.err
