"""A steady chunk of Wan 2.1 1.3B as a GPU would see it: launches, bytes, and nothing that waits. Counted, not timed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sparse_forcing.memory import MemoryConfig, MemoryGeometry, make_memory
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.sampling.rollout import rollout
from tests.core.launches import LaunchCounter, meta_gpu

ROWS, COLS, CHUNK, LAYERS = 30, 52, 3, 30
COUNTED = 2  # layers that are counted: all are alike
STEPS, CHUNKS = 4, 5
PASSES = STEPS + 1
# Launches of a layer and pass, launches between two chunks, gigabytes of elementwise work in a chunk.
BARS = {"sparse": (40, 120, 90), "window": (32, 120, 90)}


class FakeNoise:
    def chunk(self, frames: int) -> Tensor:
        return torch.empty(1, frames, 16, 2 * ROWS, 2 * COLS, dtype=torch.bfloat16, device="meta")

    fresh = chunk


def count_chunk(kind: str, monkeypatch: pytest.MonkeyPatch) -> LaunchCounter:
    """A steady chunk: its denoising, the clean pass of the chunk before it, and what lies between them."""
    with torch.device("meta"):
        model = CausalWanTransformer3DModel(num_layers=COUNTED).eval()
    with meta_gpu(monkeypatch), torch.no_grad():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                weight = torch.empty(weight.shape, dtype=torch.bfloat16, device="meta")
                setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
        text = torch.empty(1, 512, 4096, dtype=torch.bfloat16, device="meta")
        geometry = MemoryGeometry(
            rows=ROWS,
            cols=COLS,
            num_layers=COUNTED,
            chunk_frames=CHUNK,
            horizon_frames=2 * CHUNK,
            capacity_frames=CHUNKS * CHUNK,
        )
        memory = make_memory(MemoryConfig(kind=kind), geometry)
        parts = rollout(model, text, [CHUNK] * CHUNKS, memory, FakeNoise(), SamplerConfig(steps=STEPS))
        for _ in range(CHUNKS - 1):
            next(parts)
        with LaunchCounter() as counter:
            next(parts)
    return counter


@pytest.mark.parametrize("kind", BARS)
def test_a_steady_chunk_of_the_published_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = count_chunk(kind, monkeypatch)
    whole = COUNTED * PASSES - 1  # the last layer of a clean pass ends with its keys and values
    in_layers = counter.total("layers") / whole
    in_passes = counter.total("pass") / (LAYERS * PASSES)
    elsewhere = counter.total("pass", "gigabytes") + counter.total("chunk", "gigabytes")
    elsewhere += counter.total("between", "gigabytes") * LAYERS / COUNTED
    gigabytes = counter.total("layers", "gigabytes") * (LAYERS * PASSES - 1) / whole + elsewhere
    found = in_layers + in_passes, counter.total("between"), gigabytes
    print(kind, [round(number, 2) for number in found])
    assert not counter.waits, "\n".join(counter.waits)
    assert all(number <= bar for number, bar in zip(found, BARS[kind])), f"{found}\n{counter.table()}"
