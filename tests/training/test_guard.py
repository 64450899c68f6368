"""The guard: non-finite numbers, SIGTERM, out of memory."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from sparse_forcing.errors import ConfigError
from sparse_forcing.training.engine.guard import StopRequest, check_finite, explained_failures


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_numbers_stop_the_step(bad: float) -> None:
    check_finite(3, {"loss": 1.0, "norm": 0.0})
    with pytest.raises(FloatingPointError, match=r"step 3: norm = .*this network's update was not applied$"):
        check_finite(3, {"loss": 1.0, "norm": bad})


@pytest.mark.parametrize(("saved", "where"), [(2, "resuming goes on from step 2"), (0, "there is no checkpoint yet")])
def test_a_bad_number_says_where_the_run_can_go_on(saved: int, where: str) -> None:
    with pytest.raises(FloatingPointError, match=rf"critic loss = nan; .*nothing of this step is saved; {where}"):
        with explained_failures(3, "", saved):
            check_finite(3, {"critic loss": float("nan")})


def test_a_signal_is_remembered_and_the_handler_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
    assert signal.getsignal(signal.SIGTERM) is before


def test_out_of_memory_says_what_to_lower() -> None:
    with pytest.raises(ConfigError, match=r"step 7 \(micro_batch 4, 21 latent frames\); lower micro_batch"):
        with explained_failures(7, "micro_batch 4, 21 latent frames", 0):
            raise torch.OutOfMemoryError("CUDA out of memory")
