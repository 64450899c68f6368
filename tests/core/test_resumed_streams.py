"""Streams that go on from the state of a chunk: the same bits as if they had never stopped, with every memory."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

from sparse_forcing.memory import MemoryConfig
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from tests.training.conftest import make_pipeline

TILED: dict[str, Any] = {"kind": "sparse", "window_frames": 4, "density": 0.5, "persistent_blocks": 1}
MEMORIES = {
    "full": MemoryConfig(kind="full"),
    "full-absolute": MemoryConfig(kind="full", positions="absolute"),
    "window": MemoryConfig(kind="window", window_frames=4),
    "sink": MemoryConfig(kind="sink", window_frames=4, sink_frames=1),
    "heavy_hitter": MemoryConfig(kind="heavy_hitter", window_frames=4, tile=(1, 2, 2), persistent_blocks=2),
    "sparse": MemoryConfig(**TILED, tile=(2, 2, 2)),
    "short blocks": MemoryConfig(**TILED, tile=(2, 3, 3), retention="mass"),
    "8 bits": MemoryConfig(**TILED, tile=(2, 2, 2), cache_dtype="int8"),
    "accumulated": MemoryConfig(**TILED, tile=(2, 2, 2), retention="accumulated"),
}


@pytest.fixture(scope="module", params=[{}, {"selector_tokens": 8}], ids=["plain", "selector"])
def pipe(request: pytest.FixtureRequest) -> SparseForcingPipeline:
    return make_pipeline(**request.param)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """A state that went through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("memory", MEMORIES)
def test_what_follows_a_saved_state_is_what_followed_it(pipe: SparseForcingPipeline, memory: str) -> None:
    if memory == "short blocks" and pipe.transformer.config.selector_tokens:
        pytest.skip("its selector was trained for blocks of eight")
    guidance = 2.0 if memory in ("window", "sparse") else 1.0

    def stream(resumed: Any = None) -> Any:
        return pipe.stream(
            "a red circle",
            num_frames=40,
            memory=MEMORIES[memory],
            guidance_scale=guidance,
            resumed=resumed,
            reserve_cache=memory != "full",
            generator=torch.Generator().manual_seed(3),
            prompt_changes={20: "a blue star"},
            recache=memory in ("window", "accumulated"),
        )

    plain = list(stream())
    states = [saved(chunk.state()) for chunk in stream()]
    for number, state in enumerate(states[:-1], 1):
        rest = list(stream(state))
        assert [chunk.index for chunk in rest] == list(range(number, len(plain)))
        for now, then in zip(rest, plain[number:]):
            np.testing.assert_array_equal(now.frames, then.frames)
            assert now.cache_bytes == then.cache_bytes


def test_given_noise_and_a_video_to_go_on_from(pipe: SparseForcingPipeline) -> None:
    start = np.random.default_rng(0).random((16, 32, 32, 3), np.float32)
    noise = torch.randn(2, 6, 6, 4, 4, generator=torch.Generator().manual_seed(0))

    def stream(resumed: Any = None) -> Any:
        return pipe.stream(
            ["a red circle", "a blue star"],
            num_frames=24,
            latents=noise,
            video=start,
            resumed=resumed,
            memory=MEMORIES["sparse"],
            generator=torch.Generator().manual_seed(0),
        )

    first, *plain = stream()
    state = saved(next(iter(stream())).state())
    for now, then in zip(stream(state), plain, strict=True):
        np.testing.assert_array_equal(now.frames, then.frames)
    assert first.frames.shape == (2, 8, 32, 32, 3)
