"""Triton kernels on the CPU interpreter. Triton chooses between interpreting and compiling when it is imported, so each
job is a process of its own; the tests themselves are in triton_jobs/.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
JOBS = Path(__file__).with_name("triton_jobs")
OLDEST = "SPARSE_FORCING_OLDEST_TRITON"  # a folder made by: pip install --target FOLDER --no-deps triton==3.6.0


def run_job(name: str, marks: str, *, interpret: bool, extra_path: str = "", only: str = "") -> None:
    """Run one file of triton_jobs under pytest in a fresh process; its output becomes the failure message."""
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1" if interpret else "0"}
    paths = [extra_path, str(ROOT), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(JOBS / f"{name}.py"),
        "-m",
        marks,
        "-p",
        "no:cacheprovider",
        "--durations=3",
    ]
    command += ["-k", only] if only else []
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name} ({marks}) failed:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


def oldest_triton() -> str:
    folder = os.environ.get(OLDEST, "")
    if not (Path(folder) / "triton").is_dir():
        pytest.skip(f"the oldest supported Triton is not at hand: set {OLDEST} to a folder with triton 3.6.0")
    return folder


def test_kernels_match_float64():
    run_job("interpreted", "not slow", interpret=True)


def test_kernels_take_and_refuse_what_the_reference_does():
    run_job("../test_faulty_problems", "not slow", interpret=True)


@pytest.mark.slow
def test_kernels_match_float64_at_length():
    run_job("interpreted", "slow", interpret=True)


@pytest.mark.slow
def test_kernels_match_float64_on_the_oldest_triton():
    run_job("interpreted", "not slow", interpret=True, extra_path=oldest_triton())
    run_job(
        "interpreted",
        "slow",
        interpret=True,
        extra_path=oldest_triton(),
        only="large_logits or know_their_shapes or lists_written",
    )
