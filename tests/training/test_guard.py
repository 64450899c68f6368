"""The guard: non-finite numbers, SIGTERM, out of memory."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from sparse_forcing.errors import ConfigError, NotFiniteError
from sparse_forcing.training.engine.guard import StopRequest, check_finite, explain_failures, out_of_memory


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_numbers_stop_the_step(bad: float) -> None:
    check_finite(3, {"loss": 1.0, "norm": 0.0})
    with pytest.raises(NotFiniteError, match=r"step 3: norm = .*this network's update was not applied$"):
        check_finite(3, {"loss": 1.0, "norm": bad})


@pytest.mark.parametrize(("saved", "where"), [(2, "resuming goes on from step 2"), (0, "there is no checkpoint yet")])
def test_a_bad_number_says_where_the_run_can_go_on(saved: int, where: str) -> None:
    with pytest.raises(NotFiniteError, match=rf"critic loss = nan; .*nothing of this step is saved; {where}"):
        with explain_failures("in step 3", "", saved):
            check_finite(3, {"critic loss": float("nan")})


def test_a_signal_is_remembered_and_the_handler_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.is_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_requested()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
)
def test_out_of_memory_says_when_and_what_to_lower(error: Exception) -> None:
    with pytest.raises(ConfigError, match=r"^out of memory in step 7 \(21 latent frames\); lower micro_batch$"):
        with explain_failures("in step 7 (21 latent frames)", "lower micro_batch"):
            raise error


def test_memory_that_this_machine_has_not_is_recognised_and_other_failures_pass() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 50)
    assert out_of_memory(refused.value)
    with pytest.raises(RuntimeError, match="sizes differ"), explain_failures("in step 1", ""):
        raise RuntimeError("sizes differ")
