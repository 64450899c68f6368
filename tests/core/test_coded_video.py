"""Videos coded in segments: gone on from anywhere, playable while they grow, in bounded memory."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest

from sparse_forcing.errors import OutputError
from sparse_forcing.media.coded import SEGMENT_FRAMES, KeptSegments
from sparse_forcing.media.video import VideoWriter, iter_frames

SIZE, FPS = 32, 16


def pictures(count: int, first: int = 0) -> np.ndarray:
    """uint8 [count, 32, 32, 3] of a gradient that moves."""
    y, x, time = np.ogrid[:SIZE, :SIZE, first : first + count]
    y, x, time = y[..., 0][None], x[..., 0][None], time[0, 0][:, None, None]
    parts = np.broadcast_arrays(8 * y + 3 * time, 8 * x + 5 * time, y * 0 + x * 0 + 7 * time)
    return np.stack([part % 256 for part in parts], -1).astype(np.uint8)


def writer(path: Path, kept: KeptSegments | None = None, live: Path | None = None) -> VideoWriter:
    return VideoWriter(path, fps=FPS, height=SIZE, width=SIZE, scale=2, kept=kept, live=live)


@pytest.mark.parametrize("cut", [1, SEGMENT_FRAMES - 1, SEGMENT_FRAMES, 2 * SEGMENT_FRAMES + 2])
def test_a_coding_that_goes_on_has_the_bytes_of_one_that_never_stopped(tmp_path: Path, cut: int) -> None:
    frames = pictures(2 * SEGMENT_FRAMES + 5)
    with writer(tmp_path / "plain.mp4") as whole:
        whole.write(frames)
    kept = KeptSegments(tmp_path / "kept", "video")
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "a.mp4", kept) as stopped:
        stopped.write(frames[:cut])
        raise KeyboardInterrupt
    with writer(tmp_path / "a.mp4", KeptSegments(tmp_path / "kept", "video", cut, kept.tail())) as going:
        assert going.frames_written == cut
        going.write(frames[cut:])
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "plain.mp4").read_bytes()
    assert len(kept.tail()) == cut % SEGMENT_FRAMES


def test_a_segment_with_a_flipped_bit_is_one_line(tmp_path: Path) -> None:
    kept = KeptSegments(tmp_path, "video")
    with writer(tmp_path / "a.mp4", kept) as whole:
        whole.write(pictures(SEGMENT_FRAMES))
    segment = tmp_path / "video-000000.npz"
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with pytest.raises(OutputError, match=r"video-000000\.npz: not a readable segment"):
        writer(tmp_path / "b.mp4", KeptSegments(tmp_path, "video", SEGMENT_FRAMES)).__enter__()
    assert not (tmp_path / "b.mp4").exists()


def test_a_file_that_grows_decodes_to_the_frames_so_far(tmp_path: Path) -> None:
    live, copy, parts = tmp_path / "live" / "a.mp4", tmp_path / "copy.mp4", []
    frames = pictures(SEGMENT_FRAMES + 60)
    with writer(tmp_path / "a.mp4", live=live) as growing:
        for first in range(0, len(frames), 12):
            growing.write(frames[first : first + 12])
            if first + 12 in (48, SEGMENT_FRAMES, SEGMENT_FRAMES + 36):
                copy.write_bytes(live.read_bytes())
                parts.append(stored(copy))
                assert first + 12 - FPS < len(parts[-1]) <= first + 12  # less than a second behind
        assert not (tmp_path / "a.mp4").exists()
    whole, shown = stored(tmp_path / "a.mp4"), stored(live)
    assert len(whole) == len(frames)
    np.testing.assert_array_equal(whole, shown)
    for part in parts:
        np.testing.assert_array_equal(part, whole[: len(part)])


def stored(path: Path) -> list[np.ndarray]:
    """All frames up to the first that is not there yet: coders store some before those that are shown earlier."""
    with av.open(str(path)) as container:
        timed = [(frame.time * FPS, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [frame for number, (time, frame) in enumerate(timed) if round(time - timed[0][0]) == number]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_length(tmp_path: Path) -> None:
    """Five minutes: what is kept for each frame is an entry of the file's index."""
    count, seen = 4800, []
    with writer(tmp_path / "a.mp4", KeptSegments(tmp_path / "kept", "video"), tmp_path / "live.mp4") as growing:
        for first in range(0, count, 30):
            growing.write(pictures(30, first))
            seen.append(resident())
    third = len(seen) // 3
    assert max(seen[-third:]) - max(seen[:third]) < 8e6
    assert sum(1 for _ in iter_frames(tmp_path / "a.mp4")) == count
