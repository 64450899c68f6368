"""Constants kept for later passes serve training, and never mix with tensors that have no storage."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sparse_forcing.model.layers import constant_tensor

CPU = torch.device("cpu")


def test_what_is_made_without_storage_is_not_kept_for_those_who_compute() -> None:
    with FakeTensorMode():
        assert isinstance(constant_tensor((1.25, 2.5), torch.float32, CPU), FakeTensor)
    kept = constant_tensor((1.25, 2.5), torch.float32, CPU)
    assert kept.tolist() == [1.25, 2.5]
    assert constant_tensor((1.25, 2.5), torch.float32, CPU) is kept
    with FakeTensorMode():
        assert isinstance(constant_tensor((1.25, 2.5), torch.float32, CPU), FakeTensor)


def test_what_a_rollout_makes_first_can_be_trained_with() -> None:
    with torch.inference_mode():
        assert not constant_tensor((3.0,), torch.float32, CPU).is_inference()
