"""A training rollout of Wan 2.1 1.3B through the sparse memory, as a GPU would see it: calls beside a window's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sparse_forcing.memory import MemoryConfig, MemoryGeometry, make_memory
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.sampling.rollout import TrainingRollout, rollout
from tests.core.launches import LaunchCounter, meta_gpu

ROWS, COLS, CHUNK = 30, 52, 3
STEPS, EXIT, CHUNKS = 4, 1, 6  # in the middle: as many passes without gradients as training has


class FakeNoise:
    def chunk(self, frames: int) -> Tensor:
        return torch.empty(1, frames, 16, 2 * ROWS, 2 * COLS, dtype=torch.bfloat16, device="meta")

    fresh = chunk


def count_calls(kind: str, *, checkpointing: bool, selector: bool) -> tuple[float, str]:
    """GPU kernels of one layer in a rollout with gradients and its backward pass, and where they are from."""
    with torch.device("meta"):
        model = CausalWanTransformer3DModel(num_layers=1, selector_tokens=60 if selector else None)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            weight = torch.empty(weight.shape, dtype=torch.bfloat16, device="meta")
            setattr(module, name, torch.nn.Parameter(weight))
    if checkpointing:
        model.enable_gradient_checkpointing()
    geometry = MemoryGeometry(rows=ROWS, cols=COLS, num_layers=1, chunk_frames=CHUNK, horizon_frames=21)
    selectors = model.selectors if kind == "sparse" else None
    memory = make_memory(MemoryConfig(kind=kind), geometry, cache_gradient="detached", selectors=selectors)
    text = torch.empty(1, 512, 4096, dtype=torch.bfloat16, device="meta")
    training = TrainingRollout(exit_steps=[EXIT] * CHUNKS)
    with LaunchCounter(backward=True) as counter:
        parts = rollout(
            model, text, [CHUNK] * CHUNKS, memory, FakeNoise(), SamplerConfig(steps=STEPS), training=training
        )
        torch.cat([part.latents for part in parts], 1).sum().backward()
    return sum(counter.total(part) for part in ("layers", "between", "backward")), counter.table()


@pytest.mark.parametrize(
    ("checkpointing", "selector", "bar"), [(False, False, 1.2), (True, False, 1.2), (False, True, 1.4)]
)
def test_training_through_the_sparse_memory_makes_few_more_calls_than_through_a_window(
    checkpointing: bool, selector: bool, bar: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learned selector has a branch and gradients of its own, which a window lacks."""
    with meta_gpu(monkeypatch):
        window, _ = count_calls("window", checkpointing=checkpointing, selector=selector)
        sparse, table = count_calls("sparse", checkpointing=checkpointing, selector=selector)
    assert window > 300, "the backward pass counts"
    assert sparse <= bar * window, f"{sparse / window:.3f} times {window:.0f}\n{table}"
