"""Frames in pieces are the frames of the whole video, decoded in order, whatever is kept in memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparse_forcing.errors import VideoError
from sparse_forcing.eval.measuring import frames as frames_module
from sparse_forcing.eval.measuring.frames import ArraySource, FileSource, FrameSource
from sparse_forcing.eval.measuring.manifest import Entry
from sparse_forcing.eval.measuring.registry import suite_metrics
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import Clip
from sparse_forcing.media.video import VideoWriter, read_video, write_video
from tests.eval.conftest import clip_of, moving_disc

LIMITS = {"max_frames": 1000, "max_pixels": 10**9}


@pytest.fixture
def video(tmp_path: Path) -> Path:
    write_video(tmp_path / "a.mp4", moving_disc(50), 16)
    return tmp_path / "a.mp4"


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of seven frames."""
    monkeypatch.setattr(frames_module, "PIECE_PIXELS", 7 * 64 * 64)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("kept_bytes", [0, 10**9], ids=["nothing kept", "all kept"])
def test_a_file_in_pieces_is_the_whole_file(video: Path, kept_bytes: int) -> None:
    whole, _ = read_video(video)
    source = FileSource(video, **LIMITS, kept_bytes=kept_bytes)
    assert (source.count, source.height, source.width, source.piece_length) == (50, 64, 64, 7)
    for bounds in ((0, 50), (0, 7), (6, 8), (20, 21), (3, 50), (45, 50)):
        pieces = list(source.pieces(*bounds))
        assert max(len(piece) for _, piece in pieces) <= 7
        assert np.array_equal(np.concatenate([piece for _, piece in pieces]), whole[slice(*bounds)])
        assert [first for first, _ in pieces] == [bounds[0], *range(bounds[0] // 7 * 7 + 7, bounds[1], 7)]
    for numbers in ([49, 0, 30, 30, 7], [5], []):
        assert np.array_equal(source.pick(numbers), whole[numbers] if numbers else whole[:0])


@pytest.mark.usefixtures("short_pieces")
def test_what_is_kept_is_not_decoded_again_and_is_bounded(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    original = frames_module.iterate_video
    monkeypatch.setattr(frames_module, "iterate_video", lambda *a, **k: passes.append(a) or original(*a, **k))
    for kept_bytes, expected in ((10**9, 1), (0, 4)):
        passes.clear()
        source = FileSource(video, **LIMITS, kept_bytes=kept_bytes)
        for _ in range(3):
            assert sum(len(piece) for _, piece in source.pieces()) == 50
        assert len(passes) == expected
        assert len(source._kept) == (8 if kept_bytes else 2)


def test_damage_and_bounds_are_found_before_anything_is_measured(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VideoError, match="exceed"):
        FileSource(video, max_frames=49, max_pixels=10**9)
    with pytest.raises(VideoError, match="exceed"):
        FileSource(video, max_frames=1000, max_pixels=50 * 64 * 64 - 1)
    monkeypatch.setattr(frames_module, "LARGEST_PICTURE", 64 * 64 - 1)
    with pytest.raises(VideoError, match="scale the video down"):
        FileSource(video, **LIMITS)
    monkeypatch.undo()
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 6 // 10])
    with pytest.raises(VideoError):
        FileSource(video, **LIMITS)


@pytest.mark.usefixtures("short_pieces")
def test_a_file_that_changes_meanwhile_is_an_error(video: Path) -> None:
    source = FileSource(video, **LIMITS, kept_bytes=0)
    write_video(video, moving_disc(20), 16)
    with pytest.raises(VideoError, match=r"a\.mp4"):
        list(source.pieces())


@pytest.mark.usefixtures("short_pieces")
def test_every_offline_metric_is_the_same_in_pieces(video: Path) -> None:
    whole = clip_of(read_video(video)[0], "a red circle").whole()
    pieces = Clip(
        source=FileSource(video, **LIMITS, kept_bytes=0), fps=16, entry=Entry(video=video, prompt="a red circle")
    ).whole()
    whole.clip.source.piece_length = 50
    resources, compared = Resources(), 0
    for metric in suite_metrics("offline"):
        if not any(resources.missing(name) for name in metric.needs):
            assert metric.compute(pieces, resources) == metric.compute(whole, resources), metric.name
            compared += 1
    assert compared > 10


class Counting(ArraySource):
    """Counts the pieces that were read."""

    reads = 0

    def read_piece(self, number: int) -> np.ndarray:
        self.reads += 1
        return super().read_piece(number)


@pytest.mark.usefixtures("short_pieces")
def test_groups_of_frames_pass_by_in_one_pass_and_are_computed_once() -> None:
    source: FrameSource = Counting(moving_disc(50))
    clip = Clip(source=source, fps=16, entry=Entry(video=Path("a.mp4")))
    calls = []

    def difference(*frames: np.ndarray) -> float:
        calls.append(len(frames))
        return float(frames[0].astype(int).sum() - frames[-1].astype(int).sum())

    groups = [(0, 49), (49, 0), *((at, at + 1, at + 5) for at in range(40))]
    given = clip.whole().per_group("sum", difference, groups)
    sums = moving_disc(50).astype(int).sum(axis=(1, 2, 3))
    assert given.tolist() == [sums[group[0]] - sums[group[-1]] for group in groups]
    assert source.reads == 8
    inner = clip.whole().part(3, 30).per_group("sum", difference, [(0, 1, 5), (4, 5, 9)])
    assert inner.tolist() == given[[5, 9]].tolist()
    assert len(calls) == len(groups)
    assert clip.whole().pairs("sum", difference, 60).tolist() == []


CHILD = """
import sys
from pathlib import Path
from sparse_forcing.eval.evaluate import EvaluateConfig, evaluate
names = ("brightness", "color_stability", "pixel_stability")
sys.exit(evaluate(EvaluateConfig(target=Path(sys.argv[1]), output=Path(sys.argv[2]), report=False, metrics=names)))
"""


@pytest.mark.slow
def test_a_long_video_is_never_held_in_memory(tmp_path: Path) -> None:
    """400 frames of 480x832 are 480 MB as bytes and 1.9 GB as floats."""
    peaks = []
    for number, count in enumerate((40, 400)):
        path = tmp_path / f"{count}.mp4"
        with VideoWriter(path, fps=16, height=480, width=832, crf=30) as writer:
            for at in range(count):
                writer.write(np.full((1, 480, 832, 3), (at * 3) % 200, np.uint8))
        subprocess.run([sys.executable, "-c", CHILD, str(path), str(tmp_path / str(number))], check=True)
        peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
    # Decoding again for every metric costs the allocator some 400 MB, once; floats of the whole video would be 1.9 GB.
    assert peaks[1] - peaks[0] < 800, peaks
