"""A machine that others keep busy: a video costs about as many CPU seconds there as alone, because no thread spins."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BUSY = 4  # processes for each core
ALLOWED = 1.5  # times the CPU seconds of a single thread, which nobody can make wait for another one
WORK = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with the test, however that ends
# In a process of its own, because a process knows the CPU time of its children only as one sum.
MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)
"""


@contextmanager
def busy_machine() -> Iterator[None]:
    cores = len(os.sched_getaffinity(0))
    workers = [subprocess.Popen([sys.executable, "-c", WORK]) for _ in range(BUSY * cores)]
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()


def cpu_seconds(folder: object, **variables: str) -> float:
    """Of `generate` with the embedded model, in a process that nothing told about threads but `variables`."""
    command = [sys.executable, "-m", "sparse_forcing", "generate", "a large red star moves right on a black background"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command, "--seconds", "5", "--output", f"{folder}/video.mp4"],
        env=kept | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(
    "CROWD_TESTS" not in os.environ, reason="eight busy processes slow every other test; set CROWD_TESTS"
)
def test_a_crowd_does_not_multiply_the_cpu_seconds_of_a_video(tmp_path):
    """The measure is one thread in the same crowd, because what a core does in a second depends on the crowd, too."""
    with busy_machine():
        alone = cpu_seconds(tmp_path, OMP_NUM_THREADS="1")
        crowded = cpu_seconds(tmp_path)
    assert crowded <= ALLOWED * alone, f"{crowded:.1f} CPU seconds; one thread takes {alone:.1f}"
