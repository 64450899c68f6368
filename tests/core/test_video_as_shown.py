"""Videos come out as players show them: cut, turned, stretched, transparent, with a cover, at a rate that varies."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from sparse_forcing.errors import ConfigError, VideoError
from sparse_forcing.media import container
from sparse_forcing.media.video import count_frames, iter_frames, iterate_video, probe, read_video, write_video
from sparse_forcing.model_folder.folder import find_model, read_defaults
from sparse_forcing.sampling.generation.conditioning import VideoFrames, read_start
from sparse_forcing.sampling.generation.jobs import GenerateConfig

RED = (220, 30, 20)


def bar(seconds: float, speed: float = 12) -> np.ndarray:
    """A white bar that has grown `speed` pixels a second, [64, 64, 3]."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, : round(seconds * speed)] = 255
    return picture


def width(picture: np.ndarray) -> int:
    return int((picture[32, :, 0] > 127).sum())


def corner(count: int = 10, height: int = 64, width: int = 96) -> np.ndarray:
    """Black, with its top left quarter red."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:, : height // 2, : width // 2] = RED
    return frames


def encode(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    rate: int = 16,
    form: str = "yuv420p",
    stamps: list[int] | None = None,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
) -> Path:
    """Write RGB or RGBA frames; `stamps` count 1 / rate seconds."""
    with av.open(str(path), "w") as target:
        stream = target.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], form
        stream.metadata.update(tags or {})
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[-1] == 4 else "rgb24")
            frame.pts, frame.time_base = (stamps or range(len(frames)))[number], Fraction(1, rate)
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return path


def cut_losslessly(source: Path, target: Path, start: float) -> Path:
    """What `ffmpeg -ss START -c copy` does: packets before the start stay, an edit list hides them."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy, shift = new.add_stream_from_template(stream), int(start / stream.time_base)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.pts -= shift
                packet.dts -= shift
                packet.stream = copy
                new.mux(packet)
    return target


@pytest.mark.parametrize("start", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", ["cut.mp4", "cut.mov"])
@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "3", "g": "20"}])
def test_a_cut_without_encoding_shows_what_its_edit_list_says(
    tmp_path: Path, start: float, name: str, options: dict[str, str]
) -> None:
    frames = np.stack([bar(number / 16) for number in range(60)])
    whole = encode(tmp_path / "whole.mp4", frames, options=options)
    cut = cut_losslessly(whole, tmp_path / name, start)
    found, info = read_video(cut)
    assert len(found) == info.frames == probe(cut).frames == 60 - round(16 * start)
    assert abs(width(found[0]) - width(bar(start))) <= 1
    data = cut.read_bytes()
    media = data.index(b"mdat")
    (size,) = struct.unpack(">I", data[media - 4 : media])
    end = media - 4 + size
    (tmp_path / "damaged.mp4").write_bytes(data[: end - 300] + bytes(300) + data[end:])  # the last pictures
    with pytest.raises(VideoError, match=r"damaged\.mp4"):
        read_video(tmp_path / "damaged.mp4")


TURNS = {  # the matrix's a, b, c, d -> what a player makes of the stored picture
    (0, 1, -1, 0): lambda x: np.rot90(x, -1), (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, -1, 1, 0): lambda x: np.rot90(x, 1), (-1, 0, 0, 1): lambda x: x[:, ::-1], (1, 0, 0, -1): lambda x: x[::-1],
    (0, 1, 1, 0): lambda x: x.transpose(1, 0, 2), (0, -1, -1, 0): lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    (0, 0, 0, 0): lambda x: x,
}  # fmt: skip


def set_matrix(path: Path, a: float, b: float, c: float, d: float) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    fixed = [int(value * 65536) for value in (a, b, 0, c, d, 0, 0, 0)]
    data[at : at + 36] = struct.pack(">9i", *fixed, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("matrix", TURNS)
def test_turned_and_mirrored_files_come_upright(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    write_video(tmp_path / "t.mp4", corner(), 16)
    plain = read_video(tmp_path / "t.mp4")[0]
    set_matrix(tmp_path / "t.mp4", *matrix)
    found, info = read_video(tmp_path / "t.mp4")
    np.testing.assert_array_equal(found[3], TURNS[matrix](plain[3]))
    assert probe(tmp_path / "t.mp4") == info
    assert found.shape[1:3] == (info.height, info.width)


def test_a_turn_that_no_rectangle_shows_is_one_line(tmp_path: Path) -> None:
    write_video(tmp_path / "t.mp4", corner(), 16)
    set_matrix(tmp_path / "t.mp4", 0.866, 0.5, -0.5, 0.866)
    with pytest.raises(VideoError, match=r"t\.mp4: is shown turned by 30 degrees"):
        probe(tmp_path / "t.mp4")


@pytest.mark.parametrize(("aspect", "size"), [("2/1", (64, 192)), ("1/2", (128, 96)), ("4/3", (64, 128))])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_pixels_come_out_square(tmp_path: Path, aspect: str, size: tuple[int, int], suffix: str) -> None:
    path = encode(tmp_path / f"a.{suffix}", corner(), aspect=Fraction(aspect))
    found, info = read_video(path)
    assert found.shape[1:3] == (info.height, info.width) == size
    assert found[0, size[0] // 4, size[1] // 4, 0] > 200
    assert found[0, size[0] // 4, 3 * size[1] // 4, 0] < 20


def test_a_turned_file_of_wide_pixels_is_stretched_first(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", corner(), aspect=Fraction(2))
    set_matrix(path, 0, 1, -1, 0)
    assert read_video(path)[0].shape == (10, 192, 64, 3)


@pytest.mark.parametrize(
    ("name", "codec", "form"),
    [
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "png", "rgba"),
        ("a.mkv", "ffv1", "yuva420p"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("b.webm", "libvpx", "yuva420p"),
    ],
)
def test_transparency_lies_over_white(tmp_path: Path, name: str, codec: str, form: str) -> None:
    frames = np.zeros((6, 64, 64, 4), np.uint8)
    frames[:, :, :32] = (*RED, 255)
    webm = {"tags": {"alpha_mode": "1"}, "options": {"auto-alt-ref": "0"}} if name.endswith("webm") else {}
    found = read_video(encode(tmp_path / name, frames, codec=codec, form=form, **webm))[0]  # type: ignore[arg-type]
    np.testing.assert_allclose(found[2, 30, 10], RED, atol=12)
    assert (found[2, 30, 54] >= 250).all()


def with_cover(video: Path, target: Path) -> Path:
    """The mp4 with a picture among its tags, as music shops and cameras put one there."""

    def box(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body) + 8) + name + body

    png = io.BytesIO()
    Image.new("RGB", (48, 48)).save(png, "PNG")
    tags = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tags += box(b"ilst", box(b"covr", box(b"data", struct.pack(">II", 14, 0) + png.getvalue())))
    cover, data = box(b"udta", box(b"meta", bytes(4) + tags)), video.read_bytes()
    start = data.find(b"moov") - 4
    size, head = (struct.unpack(">I", data[start + at : start + at + 4])[0] for at in (0, 8))
    inner, end = start + 8, start + 8 + head
    new = data[:start] + struct.pack(">I", size + len(cover)) + b"moov" + data[inner:end] + cover + data[end:]
    if data.find(b"mdat") > start:  # chunks lie further back now
        at = new.find(b"stco")
        (count,) = struct.unpack(">I", new[at + 8 : at + 12])
        table = [offset + len(cover) for offset in struct.unpack(f">{count}I", new[at + 12 : at + 12 + 4 * count])]
        new = new[: at + 12] + struct.pack(f">{count}I", *table) + new[at + 12 + 4 * count :]
    target.write_bytes(new)
    return target


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", corner(20), 16)
    path = with_cover(tmp_path / "v.mp4", tmp_path / "cover.mp4")
    with av.open(str(path)) as file:
        assert len(file.streams.video) == 2
    np.testing.assert_array_equal(read_video(path)[0], read_video(tmp_path / "v.mp4")[0])


VARYING = [*range(32), *range(32, 160, 4)]  # of 1 / 32 s: a second of 32 frames, four of 8


@pytest.mark.parametrize("name", ["v.mp4", "v.mov", "v.mkv", "v.webm", "v.ts"])
def test_frames_of_a_varying_rate_come_by_their_time(tmp_path: Path, name: str) -> None:
    frames = np.stack([bar(stamp / 32) for stamp in VARYING])
    codec, options = ("libvpx-vp9", None) if name == "v.webm" else ("libx264", {"bf": "0"})
    path = encode(tmp_path / name, frames, codec=codec, rate=32, stamps=VARYING, options=options)
    widths = [width(frame) for frame in iter_frames(path, fps=8)]
    assert len(widths) == 40
    np.testing.assert_allclose(widths, [12 * number / 8 for number in range(40)], atol=1)
    own, info = read_video(path)  # at its mean rate, so that frame / fps is still the time
    np.testing.assert_allclose([width(frame) for frame in own], 12 / info.fps * np.arange(len(own)), atol=12 / 8 + 1)
    assert len(own) / info.fps == pytest.approx(5, abs=0.15)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_avi_shows_frames_in_order_and_those_that_stay_for_as_long(tmp_path: Path, codec: str) -> None:
    """AVI stores neither times nor frames that stay on show."""
    grown = np.stack([bar(seconds) for seconds in np.arange(24) / 4])
    ordered = encode(tmp_path / "ordered.avi", grown, codec=codec, rate=4, options={"bf": "2"})
    shown = [width(picture) for picture in read_video(ordered)[0]]
    assert shown == pytest.approx([min(3 * number, 64) for number in range(24)], abs=1)
    stays, at = tmp_path / "stays.avi", [0, 1, 5, 6, 7, 8]
    encode(stays, grown[:6], codec=codec, rate=4, stamps=at, options={"bf": "0"})
    assert [width(picture) for picture in read_video(stays, fps=4)[0]] == pytest.approx(
        [0, 3, 3, 3, 3, 6, 9, 12, 15], abs=1
    )
    stays.write_bytes(stays.read_bytes()[: stays.stat().st_size * 9 // 10])
    with pytest.raises(VideoError, match="damaged"):
        read_video(stays)


def test_a_frame_that_stays_is_shown_for_as_long(tmp_path: Path) -> None:
    pictures = [Image.fromarray(np.full((32, 32, 3), 20 * number, np.uint8)) for number in range(6)]
    pictures[0].save(
        tmp_path / "g.gif", save_all=True, append_images=pictures[1:], duration=[100, 100, 500, 100, 100, 100]
    )
    values = [int(frame[0, 0, 0]) // 20 for frame in iter_frames(tmp_path / "g.gif", fps=10)]
    assert values == [0, 1, 2, 2, 2, 2, 2, 3, 4, 5]


@pytest.mark.parametrize(("own", "wanted", "count"), [(30, 8, 15), (24, 16, 37), (8, 16, 112), (16, 16, 56)])
def test_another_rate_keeps_the_speed(tmp_path: Path, own: int, wanted: int, count: int) -> None:
    speed = 8
    write_video(tmp_path / "v.mp4", np.stack([bar(number / own, speed) for number in range(56)]), own)
    found, info = read_video(tmp_path / "v.mp4", fps=wanted)
    assert (len(found), info.fps) == (count, wanted)
    seconds = np.arange(count) / wanted
    np.testing.assert_allclose([width(frame) for frame in found], speed * seconds, atol=speed / own + 1)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e9, "8"])
def test_a_rate_that_is_none_is_refused_and_loses_no_frames(tmp_path: Path, fps: Any) -> None:
    path = encode(tmp_path / "v.mp4", corner(4))
    for read in (read_video, count_frames, lambda path, fps: list(iter_frames(path, fps=fps))):
        with pytest.raises(ConfigError, match="fps must be a number above 0"):
            read(path, fps=fps)


def test_pieces_are_bounded_and_hold_every_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "v.mp4", corner(20), 16)
    whole = read_video(tmp_path / "v.mp4")[0]
    pieces = list(iterate_video(tmp_path / "v.mp4", 8))
    assert [len(piece) for piece in pieces] == [8, 8, 4]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    monkeypatch.setattr("sparse_forcing.media.video.PIECE_PIXELS", 3 * 64 * 96)
    assert [len(piece) for piece in iterate_video(tmp_path / "v.mp4", 8)] == [3] * 6 + [2]


def test_pictures_beyond_the_bound_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "v.mp4", corner(4), 16)
    monkeypatch.setattr(container, "MAX_PIXELS", 64 * 96 - 1)
    with pytest.raises(VideoError, match="exceed the bound"):
        probe(tmp_path / "v.mp4")
    monkeypatch.setattr(container, "MAX_PIXELS", 2 * 64 * 96)
    path = encode(tmp_path / "wide.mp4", corner(4), aspect=Fraction(3))
    with pytest.raises(VideoError, match=r"wide\.mp4: pictures of 288x64"):
        probe(path)


def test_any_flipped_bit_gives_frames_or_our_own_error(tmp_path: Path) -> None:
    """In the header above all: a codec that is not known left PyAV's stream without a decoder."""
    write_video(tmp_path / "v.mp4", corner(6, 32, 48), 16)
    data = (tmp_path / "v.mp4").read_bytes()
    generator, refused = np.random.default_rng(1), 0
    head = data.index(b"mdat")
    places = [data.rindex(b"avc1"), data.index(b"stsd"), data.index(b"stbl"), *generator.integers(head, size=150)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << generator.integers(8)
        (tmp_path / "flip.mp4").write_bytes(damaged)
        try:
            read_video(tmp_path / "flip.mp4")
        except VideoError as error:
            assert "flip.mp4" in str(error)
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_going_on_from_a_video_keeps_its_speed(tmp_path: Path) -> None:
    """12 pixels a second at 30 frames/s became 4.1 with a model of 8; a slower video would have been hurried."""
    own = read_defaults(find_model("tiny")).fps
    for fps, said in ((30, "left out"), (4, "shown several times"), (own, None)):
        path = tmp_path / f"{fps:g}.mp4"
        write_video(path, np.stack([bar(number / fps, 8) for number in range(24)]), fps)
        notes: list[str] = []
        start = read_start(GenerateConfig(prompts=("x",), video=path), notes.append)
        assert isinstance(start, VideoFrames)
        frames = np.concatenate(list(start))
        assert len(frames) == start.count
        assert len(frames) == pytest.approx(24 * own / fps, abs=1)
        seconds = np.arange(len(frames)) / own
        np.testing.assert_allclose([width(frame) for frame in frames], 8 * seconds, atol=8 / fps + 1)
        assert [said in note for note in notes] == [True] * (said is not None)  # type: ignore[operator]


@pytest.mark.parametrize("suffix", [".mpeg", ".MPEG", ".ts", ".flv", ".wmv", ".m2ts", ".ogv"])
def test_no_other_kind_of_video_makes_a_folder(suffix: str) -> None:
    with pytest.raises(ConfigError, match=r"only \.mp4 files are written"):
        GenerateConfig(prompts=("x",), output=Path(f"clip{suffix}"))
