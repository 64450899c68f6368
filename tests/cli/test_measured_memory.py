"""What a video takes of this machine's memory, measured, against what `doctor` says of it.

On demand, for the true size takes an hour of one core: MEMORY_TESTS=1 pytest tests/cli/test_measured_memory.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.true_size import write_true_size

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("MEMORY_TESTS" not in os.environ, reason="an hour of one core; set MEMORY_TESTS"),
]
GIB = 2**30
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(code, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
ONE_CHUNK = ["--preset", "self-forcing", "--num-frames", "9", "--height"]
MOST = {  # sizes of a model, its video, and what takes most of its memory
    "decoding": ({"num_layers": 2, "base_dim": 16}, [*ONE_CHUNK, "480", "--width", "832"]),
    "loading": ({"num_layers": 8, "base_dim": 4}, [*ONE_CHUNK, "64", "--width", "64"]),
    "cache": (
        {"num_layers": 12, "ffn_dim": 64, "base_dim": 4},
        ["--preset", "self-forcing", "--num-frames", "45", "--height", "256", "--width", "448"],
    ),
}


def measure(folder: Path, video: list[str]) -> tuple[int, dict[str, Any]]:
    """Bytes that `generate` comes to hold for one denoising step of each chunk, and what `doctor` says of it."""
    words = ["--model", str(folder), "--device", "cpu", *video]
    done = subprocess.run([sys.executable, "-m", "sparse_forcing", "doctor", "--json", *words], capture_output=True)
    said = json.loads(done.stdout)
    target = ["--num-inference-steps", "1", "--output", str(folder.parent / "video.mp4")]
    command = [sys.executable, "-m", "sparse_forcing", "generate", "a cat", *words, *target]
    done = subprocess.run([sys.executable, "-c", MEASURED, *command], capture_output=True)
    code, peak = map(int, done.stdout.split())
    assert code == 0, done.stderr.decode()
    print(f"{folder.name}: {peak / GIB:.2f} GiB measured, {said['total'] / GIB:.2f} said; {said['bytes']}")
    return peak, said


@pytest.mark.parametrize("what", MOST)
def test_doctor_says_what_a_video_takes(what: str, tmp_path: Path) -> None:
    sizes, video = MOST[what]
    peak, said = measure(write_true_size(tmp_path / what, **sizes), video)
    assert said["total"] == pytest.approx(peak, rel=0.1)
    assert max(said["bytes"], key=said["bytes"].get) in (what, "transformer")
    assert said["bytes"][what] > 0.25 * peak


def test_a_chunk_of_the_true_size_fits_into_24_gib(tmp_path: Path) -> None:
    peak, said = measure(write_true_size(tmp_path / "wan"), [*ONE_CHUNK, "480", "--width", "832"])
    assert peak < 24 * GIB
    assert said["total"] == pytest.approx(peak, rel=0.1)
