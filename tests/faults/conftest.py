"""A pipeline without a model: frames that depend on prompt and seed alone, in chunks, with faults to order."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.geometry import VideoGeometry
from sparse_forcing.model_folder.defaults import PipelineConfig
from sparse_forcing.sampling.generation import generate


@dataclass
class Chunk:
    frames: np.ndarray
    index: int
    seconds: float = 0.5
    decode_seconds: float = 0.125
    cache_bytes: int = 0
    persistent: np.ndarray | None = None

    def state(self) -> dict[str, Any]:
        return {"chunk": torch.tensor(self.index + 1)}


class StubPipeline:
    """The attributes and the `stream` that the generation driver relies on; `on_chunk(index)` may raise."""

    fps = 16.0
    chunk_frames = 8
    device, dtype = torch.device("cpu"), torch.float32
    defaults = PipelineConfig(num_frames=16, height=32, width=32, sampler=SamplerConfig(guidance_scale=2.0))
    geometry = VideoGeometry(temporal_stride=1, spatial_stride=1, first_frame_alone=False, chunk_frames=chunk_frames)
    weights_sha256 = "0" * 64
    default_memory = MemoryConfig(kind="sparse", window_frames=6, tile=(1, 4, 4))

    def __init__(self, on_chunk: Callable[[int], None] = lambda index: None) -> None:
        self.on_chunk = on_chunk
        self.calls: list[dict[str, Any]] = []
        self.embeddings = torch.zeros(4)

    def encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        return self.embeddings.expand(len(prompts), -1)

    def stream(self, prompt: str, *, num_frames: int, generator: torch.Generator, **settings: Any) -> Iterator[Chunk]:
        self.calls.append({"prompt": prompt, "num_frames": num_frames, **settings})
        height, width = settings["height"] or 32, settings["width"] or 32
        tint = torch.rand(3, generator=generator).numpy() * 0.5 + (zlib.crc32(prompt.encode()) % 100) / 250
        resumed = settings.get("resumed")
        for index in range(0 if resumed is None else int(resumed["chunk"]), -(-num_frames // self.chunk_frames)):
            self.on_chunk(index)
            frames = np.broadcast_to(tint, (self.chunk_frames, height, width, 3)).astype(np.float32).copy()
            frames[:, :8, :8] = index / 20
            mask = np.zeros(frames.shape[:3], np.float32)
            mask[:, :8, :8] = 1
            yield Chunk(frames=frames, index=index, cache_bytes=1000 * (index + 1), persistent=mask)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> StubPipeline:
    """Replaces the model; `stub.on_chunk` can be set."""
    pipe = StubPipeline()
    monkeypatch.setattr(generate, "load_pipeline", lambda config, prompts: pipe)
    return pipe


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a model is loaded: what it checks must be refused before."""

    def load(config: object, prompts: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(generate, "load_pipeline", load)
