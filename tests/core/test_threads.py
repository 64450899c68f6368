"""Threads: passive in a command's own process, as many as the work is worth, and untouched in anybody else's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sparse_forcing.threads import PASSIVE, WORK_OF_A_THREAD, limit_threads, own_process, worthwhile_threads


@pytest.mark.parametrize(
    ("work", "available", "wanted"), [(0.3, 8, 1), (1, 8, 1), (3.9, 8, 3), (100, 8, 8), (100, 1, 1)]
)
def test_threads_by_the_size_of_the_work(work, available, wanted):
    assert worthwhile_threads(work * WORK_OF_A_THREAD, available) == wanted


def child(code: str, **variables: str) -> str:
    """What a fresh process without variables of OpenMP prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path)} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


OWN = "import os; from sparse_forcing.threads import limit_threads, own_process; own_process(); "
COUNT = """
import torch
torch.set_num_threads(3)
with limit_threads(lambda: 1.0):
    print(torch.get_num_threads(), end=" ")
print(torch.get_num_threads())
"""


def test_a_process_of_its_own_waits_passively_and_uses_what_the_work_is_worth():
    assert child(OWN + "print(os.environ['OMP_WAIT_POLICY'], os.environ['KMP_BLOCKTIME'])") == "PASSIVE 0"
    assert child(OWN + COUNT) == "1 3"


def test_what_the_user_says_stands():
    assert child(OWN + COUNT, OMP_NUM_THREADS="2") == "3 3"
    assert child(OWN + "print(os.environ.get('OMP_WAIT_POLICY'))", GOMP_SPINCOUNT="100") == "None"
    assert child(OWN + "print(os.environ['OMP_WAIT_POLICY'])", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"


def test_a_process_of_somebody_else_keeps_its_threads():
    assert child("import torch\n" + OWN + COUNT) == "3 3"
    assert child("import os, sparse_forcing, torch; print(os.environ.get('OMP_WAIT_POLICY'))") == "None"
    import torch  # as in every test process

    environment: dict[str, str] = {}
    own_process(environment)
    assert environment.keys().isdisjoint(PASSIVE)
    with limit_threads(lambda: pytest.fail("asked")):
        assert torch.get_num_threads() >= 1
