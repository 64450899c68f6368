"""The guard: non-finite numbers, SIGTERM, out of memory."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from sparse_forcing.errors import ConfigError
from sparse_forcing.training.guard import StopRequest, check_finite, explained_out_of_memory


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_numbers_stop_the_step(bad: float) -> None:
    check_finite(3, {"loss": 1.0, "norm": 0.0})
    with pytest.raises(FloatingPointError, match=r"step 3: norm = .*weights left unchanged"):
        check_finite(3, {"loss": 1.0, "norm": bad})


def test_a_signal_is_remembered_and_the_handler_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
    assert signal.getsignal(signal.SIGTERM) is before


def test_out_of_memory_says_what_to_lower() -> None:
    with pytest.raises(ConfigError, match=r"step 7 \(micro_batch 4, 21 latent frames\); lower micro_batch"):
        with explained_out_of_memory(7, "micro_batch 4, 21 latent frames"):
            raise torch.OutOfMemoryError("CUDA out of memory")
