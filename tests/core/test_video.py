"""Videos: what is written comes back; what is damaged is refused (faults 17, 18, 20, 26)."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from sparse_forcing.errors import OutputError, VideoError
from sparse_forcing.media.video import MAX_SIDE, VideoWriter, iter_frames, probe, read_video, to_uint8, write_video
from sparse_forcing.sampling.generation import jobs
from sparse_forcing.scenes.render import render
from sparse_forcing.scenes.sample import sample_scenes


def moving_square(frames: int = 24, height: int = 48, width: int = 64) -> np.ndarray:
    video = np.full((frames, height, width, 3), (200, 40, 30), np.uint8)
    for index in range(frames):
        video[index, 10:26, index : index + 16] = (20, 60, 220)
    return video


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("height", "width", "scale"), [(48, 64, 1), (48, 64, 4), (47, 63, 1), (47, 64, 2)])
def test_round_trip_keeps_size_count_rate_and_colour(tmp_path: Path, height: int, width: int, scale: int) -> None:
    video = moving_square(height=height, width=width)
    write_video(tmp_path / "v.mp4", video, 16, scale=scale)
    decoded, info = read_video(tmp_path / "v.mp4")
    assert (info.frames, info.fps, info.height, info.width) == (24, 16.0, height * scale, width * scale)
    assert decoded.dtype == np.uint8
    assert decoded.shape == (24, height * scale, width * scale, 3)
    assert info == probe(tmp_path / "v.mp4")
    expected = video.repeat(scale, 1).repeat(scale, 2)
    # Away from the square's edges, where 4:2:0 blurs, colours survive within a few levels.
    np.testing.assert_allclose(decoded[:, -16:], expected[:, -16:], atol=6)
    assert np.abs(decoded.astype(int) - expected).mean() < 3


def test_float_and_uint8_frames_write_the_same_bytes_however_grouped(tmp_path: Path) -> None:
    video = moving_square()
    write_video(tmp_path / "a.mp4", video, 16)
    with VideoWriter(tmp_path / "b.mp4", fps=16, height=48, width=64) as writer:
        for start in range(0, 24, 7):
            writer.write(video[start : start + 7].astype(np.float32) / 255)
    assert digest(tmp_path / "a.mp4") == digest(tmp_path / "b.mp4")


def test_to_uint8_rounds_clips_and_refuses_nan() -> None:
    assert to_uint8(np.array([-1.0, 0.0, 0.5, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(OutputError, match="NaN"):
        to_uint8(np.array([np.nan]))
    with pytest.raises(OutputError, match="uint8 or float"):
        to_uint8(np.array([1, 2]))


def test_failure_midway_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"old")
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "v.mp4", fps=16, height=48, width=64) as writer:
        writer.write(moving_square())
        raise RuntimeError
    assert os.listdir(tmp_path) == ["v.mp4"]
    assert (tmp_path / "v.mp4").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 0}, "frame rate"),
        ({"fps": float("nan")}, "frame rate"),
        ({"scale": 0}, "picture size"),
        ({"scale": 10_000}, "picture size"),
        ({"width": 60}, "frames have shape"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path: Path, arguments: dict, message: str) -> None:
    settings = {"fps": 16, "height": 48, "width": 64} | arguments
    with pytest.raises(OutputError, match=message), VideoWriter(tmp_path / "v.mp4", **settings) as writer:
        writer.write(moving_square())
    assert os.listdir(tmp_path) == []


def test_no_frames_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no frames"), VideoWriter(tmp_path / "v.mp4", fps=16, height=8, width=8):
        pass
    assert os.listdir(tmp_path) == []


def test_bounds_are_checked_before_decoding(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", moving_square(), 16)
    for bounds in ({"max_frames": 23}, {"max_pixels": 24 * 48 * 64 - 1}):
        with pytest.raises(VideoError, match="exceed"):
            read_video(tmp_path / "v.mp4", **bounds)
    with pytest.raises(VideoError, match="more than 5 frames"):
        list(iter_frames(tmp_path / "v.mp4", max_frames=5))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95, 0.999])
def test_cut_faststart_file_is_refused(tmp_path: Path, share: float) -> None:
    write_video(tmp_path / "v.mp4", moving_square(), 16, scale=4)
    data = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        read_video(tmp_path / "cut.mp4")


def encode(path: Path, codec: str, sizes: list[tuple[int, int]]) -> None:
    """A clip of 30 frames for each size, all in one stream or file."""
    with av.open(str(path), "w") as container:
        for height, width in sizes:
            stream = container.add_stream(codec, rate=25)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for picture in moving_square(30, height, width):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


def test_cut_file_without_declared_count_is_refused(tmp_path: Path) -> None:
    encode(tmp_path / "v.webm", "libvpx", [(48, 64)])
    assert read_video(tmp_path / "v.webm")[1].frames == 30
    data = (tmp_path / "v.webm").read_bytes()
    (tmp_path / "cut.webm").write_bytes(data[: len(data) // 3])
    with pytest.raises(VideoError, match="cut or damaged"):
        read_video(tmp_path / "cut.webm")


def test_flipped_bits_are_refused_or_decode_whole(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", moving_square(), 16, scale=4)
    data = (tmp_path / "v.mp4").read_bytes()
    generator, refused = np.random.default_rng(0), 0
    for _ in range(40):
        damaged = bytearray(data)
        damaged[generator.integers(len(data))] ^= 1 << generator.integers(8)
        (tmp_path / "flip.mp4").write_bytes(damaged)
        try:
            assert read_video(tmp_path / "flip.mp4")[0].shape[0] == 24
        except VideoError as error:
            assert "flip.mp4" in str(error)
            refused += 1
    assert refused > 10  # most of a file this small is coded picture data


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.mp4", b""),
        ("empty.h264", b""),
        ("page.mp4", b"<html><body>404 not found</body></html>"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nv.mp4\n#EXT-X-ENDLIST\n"),
        ("list.mp4", b"ffconcat version 1.0\nfile v.mp4\n"),
    ],
)
def test_not_a_video_is_one_line_with_the_path(tmp_path: Path, name: str, content: bytes) -> None:
    write_video(tmp_path / "v.mp4", moving_square(), 16)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=f"^[^\n]*{name}[^\n]*$"):
        read_video(tmp_path / name)


def test_missing_file_folder_and_address_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.mp4", tmp_path, "http://127.0.0.1:9/v.mp4", "concat:a|b"):
        with pytest.raises(VideoError, match="no such video file"):
            probe(path)


def test_sound_only_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="no video stream"):
        probe(tmp_path / "a.mp4")


def test_size_change_midway_is_refused(tmp_path: Path) -> None:
    for index, size in enumerate([(48, 64), (64, 48)]):
        encode(tmp_path / f"{index}.h264", "libx264", [size])
    (tmp_path / "both.h264").write_bytes((tmp_path / "0.h264").read_bytes() + (tmp_path / "1.h264").read_bytes())
    with pytest.raises(VideoError, match="picture size changes from 64x48 to 48x64"):
        read_video(tmp_path / "both.h264")


def test_no_frame_rate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "v.mp4", moving_square(), 16)
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    at = data.index(b"stts")  # version, entries, then (frame count, ticks for each frame)
    data[at + 8 : at + 16] = (0).to_bytes(4, "big") * 2
    (tmp_path / "zero.mp4").write_bytes(data)
    with pytest.raises(VideoError, match=r"zero\.mp4"):
        read_video(tmp_path / "zero.mp4")


SCENE = random.Random("5/0").getrandbits(62)  # a scene whose files did differ


@pytest.mark.parametrize(("height", "width"), [(192, 336), (256, 144), (200, 200)])
def test_equal_frames_make_equal_files_at_larger_sizes(tmp_path: Path, height: int, width: int) -> None:
    """With x264's macroblock tree there were 2 to 8 different files."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 255, (8, height // 8, width // 8, 3), dtype=np.uint8)
    frames = np.kron(blocks, np.ones((1, 8, 8, 1), np.uint8))
    written = set()
    for number in range(16):
        write_video(tmp_path / f"{number}.mp4", frames, 8)
        written.add(digest(tmp_path / f"{number}.mp4"))
    assert len(written) == 1


@pytest.mark.parametrize("size", [32, 64])
def test_equal_frames_make_equal_files(tmp_path: Path, size: int) -> None:
    """x264's macroblock tree is random on small pictures: about one in four of these files would differ."""
    scenes = sample_scenes(1, torch.Generator().manual_seed(SCENE))
    frames = to_uint8(render(scenes, 8, size)[0].permute(0, 2, 3, 1) / 2 + 0.5)
    written = set()
    for number in range(40):
        write_video(tmp_path / f"{number}.mp4", frames, 8)
        written.add(digest(tmp_path / f"{number}.mp4"))
    assert len(written) == 1


def test_the_command_line_knows_the_largest_picture() -> None:
    """It has a constant of its own, because this module is too heavy to import before arguments are checked."""
    assert jobs.MAX_SIDE == MAX_SIDE
