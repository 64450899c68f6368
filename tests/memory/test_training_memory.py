"""What autograd keeps of a rollout in training: sparse needs no more than dense of the same window.

At a window of two chunks both keep every chunk's own keys and values, and its finished ones for the next: all that
sparse adds are its tables of slots, which may cost a thousandth. Larger windows cost dense a copy per chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_forcing.memory import MemoryConfig, MemoryGeometry, make_memory
from sparse_forcing.model.transformer import CausalWanTransformer3DModel

TABLES = 1.001

TINY: dict[str, Any] = {
    "patch_size": (1, 1, 1), "num_attention_heads": 6, "attention_head_dim": 32, "in_channels": 96, "out_channels": 96,
    "text_dim": 128, "ffn_dim": 768, "chunk_frames": 2, "horizon_frames": 10, "pooled_text": True,
}  # fmt: skip
"""The embedded model, but for its number of layers."""

WAN: dict[str, Any] = {}
"""The transformer's defaults are Wan 2.1 1.3B."""


def saved_bytes(
    sizes: dict[str, Any], memory: MemoryConfig, *, latent: int, width: int, chunks: int, layers: int
) -> int:
    """Bytes of distinct tensors, weights apart, that autograd keeps of one pass with gradients per chunk."""
    torch.manual_seed(0)
    model = CausalWanTransformer3DModel(**sizes, num_layers=layers)
    config = model.config
    _, ph, pw = config.patch_size
    geometry = MemoryGeometry(
        rows=latent // ph,
        cols=width // pw,
        num_layers=layers,
        chunk_frames=config.chunk_frames,
        horizon_frames=config.horizon_frames,
    )
    state = make_memory(memory, geometry, cache_gradient="detached")
    text = torch.randn(1, 16, config.text_dim)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (x, storage.nbytes())  # the tensor too: its storage's address must stay taken
        return x

    outputs = []
    for _ in range(chunks):
        x, time = torch.randn(1, config.in_channels, config.chunk_frames, latent, width), torch.full((1,), 500.0)
        state.begin_chunk(config.chunk_frames)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            outputs.append(model(x, time, text, policy=state.denoising_pass()))
        with torch.no_grad():
            model(x, 0 * time, text, policy=state.clean_pass())
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize(("window_frames", "allowed"), [(4, TABLES), (6, 1.0), (8, 1.0)])
def test_embedded_model(window_frames: int, allowed: float) -> None:
    def measure(kind: str) -> int:
        memory = MemoryConfig(kind=kind, window_frames=window_frames, tile=(2, 2, 4), persistent_blocks=4, density=0.5)
        return saved_bytes(TINY, memory, latent=8, width=8, chunks=5, layers=2)

    assert measure("sparse") <= allowed * measure("window")
    assert measure("sparse") < measure("full")


@pytest.fixture
def fake() -> Iterator[None]:
    """Tensors without memory."""
    with FakeTensorMode():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("window_frames", "allowed"), [(6, TABLES), (9, 1.0)])
def test_wan_on_tensors_without_memory(window_frames: int, allowed: float) -> None:
    """480 x 832, seven chunks. Layers are alike, so what 30 keep follows from one and two."""

    def measure(kind: str) -> int:
        memory = MemoryConfig(kind=kind, window_frames=window_frames)
        one, two = (saved_bytes(WAN, memory, latent=60, width=104, chunks=7, layers=n) for n in (1, 2))
        return one + 29 * (two - one)

    assert measure("sparse") <= allowed * measure("window")
