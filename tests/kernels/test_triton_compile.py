"""What the compiler makes of the Triton kernels, for every architecture, in a process of its own (see triton_jobs/)."""

from __future__ import annotations

import pytest

from tests.kernels.test_triton_interpreter import oldest_triton, run_job

pytest.importorskip("triton")


def test_launch_table_and_plain_kernel():
    run_job("compiled", "not slow", interpret=False)


@pytest.mark.slow
def test_every_architecture():
    run_job("compiled", "slow", interpret=False)


@pytest.mark.slow
def test_the_oldest_triton_compiles_the_hopper_kernels():
    run_job("compiled", "slow", interpret=False, extra_path=oldest_triton(), only="hopper")
