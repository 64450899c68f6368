"""Prompts that change while the video goes on: when, for whom, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.geometry import VideoGeometry
from sparse_forcing.model.text import WordTextEncoder
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import PatchAutoencoder
from sparse_forcing.model_folder.folder import PipelineConfig
from sparse_forcing.sampling.generation.jobs import GenerateConfig
from sparse_forcing.sampling.generation.settings import _prompt_changes
from sparse_forcing.sampling.pipeline import SparseForcingPipeline

RED, BLUE = "a red ball", "a blue ball"
CHUNK = 8  # pixel frames


@pytest.fixture(scope="module", params=[1.0, 2.0], ids=["plain", "guided"])
def pipe(request: pytest.FixtureRequest) -> SparseForcingPipeline:
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=12,
        out_channels=12,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        chunk_frames=2,
        horizon_frames=6,
    )
    for parameter in transformer.parameters():  # as initialised, its output is zero whatever it sees
        torch.nn.init.normal_(parameter, std=0.3)
    vae = PatchAutoencoder(latent_channels=12)
    vae.fit(torch.rand(4, 3, 8, 16, 16) * 2 - 1)
    config = PipelineConfig(
        fps=8.0,
        height=16,
        width=16,
        num_frames=32,
        text_encoder="words",
        vae="patch",
        sampler=SamplerConfig(kind="euler", steps=2, guidance_scale=request.param),
    )
    text = WordTextEncoder(["a", "ball", "blue", "red"], dim=16, num_layers=1, text_len=6)
    return SparseForcingPipeline(transformer.eval(), text.eval(), vae, config)


def frames(pipe: SparseForcingPipeline, prompt: str | list[str] = RED, **arguments: object) -> np.ndarray:
    count = len(prompt) if isinstance(prompt, list) else 1
    generator = [
        torch.Generator().manual_seed(seed) for seed in range(count * arguments.get("num_videos_per_prompt", 1))
    ]
    memory = MemoryConfig(kind="window", window_frames=4)
    return pipe(prompt, generator=generator, memory=memory, **arguments).frames


def same_chunks(a: np.ndarray, b: np.ndarray) -> list[bool]:
    """Of one video each, chunk by chunk."""
    return [np.array_equal(a[i : i + CHUNK], b[i : i + CHUNK]) for i in range(0, len(a), CHUNK)]


@pytest.mark.parametrize("frame", [9, 16])
def test_a_prompt_holds_from_the_next_chunk_that_begins(pipe, frame):
    plain, changed = frames(pipe)[0], frames(pipe, prompt_changes={frame: BLUE})[0]
    assert same_chunks(plain, changed) == [True, True, False, False]


def test_a_change_to_the_same_prompt_changes_nothing(pipe):
    np.testing.assert_array_equal(frames(pipe, prompt_changes={8: RED, 24: RED}), frames(pipe))


def test_what_follows_depends_on_the_new_prompt_and_on_the_past(pipe):
    blue, changed = frames(pipe, BLUE)[0], frames(pipe, prompt_changes={8: BLUE})[0]
    assert same_chunks(blue, changed) == [False] * 4
    back = frames(pipe, prompt_changes={8: BLUE, 16: RED})[0]
    assert same_chunks(changed, back) == [True, True, False, False]


def test_a_function_is_asked_when_a_chunk_is_wanted(pipe):
    asked, wanted = [], {16: BLUE}

    def ask(frame: int) -> str | None:
        asked.append(frame)
        return wanted.get(frame)

    np.testing.assert_array_equal(frames(pipe, prompt_changes=ask), frames(pipe, prompt_changes=wanted))
    assert asked == [8, 16, 24]
    asked.clear()
    stream = pipe.stream(RED, prompt_changes=ask)
    next(stream)
    assert asked == []
    next(stream)
    assert asked == [8]


def test_every_video_of_a_batch_can_have_a_prompt_of_its_own(pipe):
    both = frames(pipe, [RED, BLUE], prompt_changes={16: [BLUE, RED]}, num_videos_per_prompt=2)
    one_for_all = frames(pipe, [RED, BLUE], prompt_changes={16: BLUE}, num_videos_per_prompt=2)
    plain = frames(pipe, [RED, BLUE], num_videos_per_prompt=2)
    changes = [[same_chunks(a, b)[2] for a, b in zip(plain, other)] for other in (both, one_for_all)]
    assert changes == [[False] * 4, [False, False, True, True]]


def test_frames_of_a_continued_video_are_those_that_are_generated(pipe):
    start = np.full((16, 16, 16, 3), 0.9, np.float32)
    plain, changed = frames(pipe, video=start)[0], frames(pipe, video=start, prompt_changes={8: BLUE})[0]
    assert same_chunks(plain, changed) == [True, False, False, False]


def test_a_lone_first_frame_counts_only_where_the_video_begins(pipe, monkeypatch):
    """As in Wan's autoencoder: the first chunk has fewer pixel frames, but not that of a video that goes on."""
    asked: list[int] = []
    monkeypatch.setattr(pipe, "geometry", replace(pipe.geometry, first_frame_alone=True))
    monkeypatch.setattr(pipe, "_encode_start", lambda given, batch: None)
    picture, video = np.zeros((16, 16, 3), np.float32), np.zeros((5, 16, 16, 3), np.float32)
    for start, expected in ({}, [5, 13, 21]), ({"image": picture}, [9, 17]), ({"video": video}, [8, 16]):
        asked.clear()
        list(pipe.stream(RED, num_frames=24, prompt_changes=asked.append, **start))
        assert asked == expected


def test_times_become_the_frames_that_chunks_begin_with():
    wan = VideoGeometry(temporal_stride=4, spatial_stride=8, first_frame_alone=True)

    def changes(then: list[tuple[float, str]], num_frames: int, fps: float, **start: object) -> dict[int, str]:
        config = GenerateConfig(then=tuple(then), **start)
        return _prompt_changes(config, SimpleNamespace(geometry=wan, fps=fps), num_frames)

    assert changes([(0.5, BLUE), (1.0, RED)], 81, 16) == {9: BLUE, 21: RED}
    assert changes([(0.5, BLUE), (1.0, RED)], 81, 16, image=Path("a.png")) == {13: BLUE, 25: RED}
    starts = {9 + 12 * n: f"number {n}" for n in range(40)}
    assert any(start / 25 * 25 > start for start in starts)
    assert changes([(start / 25, prompt) for start, prompt in starts.items()], 480, 25) == starts
    assert changes([(0.5, BLUE), (1.0, RED)], 81, 16, video=Path("a.mp4")) == {12: BLUE, 24: RED}
    with pytest.raises(ConfigError, match=r"the last one begins at 0\.0625 s"):
        changes([(0.75, BLUE)], 13, 16, image=Path("a.png"))


def test_chunks_begin_where_the_pixels_of_the_one_before_end():
    wan = VideoGeometry(temporal_stride=4, spatial_stride=8, first_frame_alone=True)
    assert wan.timeline(33) == ([3, 3, 3], [0, 9, 21])
    assert replace(wan, first_chunk_frames=1).timeline(25) == ([1, 3, 3], [0, 1, 13])
    assert wan.timeline(36, "video") == ([3, 3, 3], [0, 12, 24])
    assert wan.timeline(37, "picture") == ([3, 3, 3], [1, 13, 25])
    assert wan.timeline(1, "picture") == ([3], [1])
    embedded = VideoGeometry(temporal_stride=4, spatial_stride=8, first_frame_alone=False, chunk_frames=2)
    assert embedded.timeline(17) == ([2, 2, 2], [0, 8, 16])
    assert replace(embedded, first_chunk_frames=1).timeline(17, "picture") == ([2, 2], [1, 9])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: BLUE}, "no chunk begins at frame 0"),
        ({-8: BLUE}, "no chunk begins at frame -8"),
        ({25: BLUE}, "the last one begins at frame 24"),
        ({9: BLUE, 16: RED}, "frame 16 has two prompts"),
        ({"8": BLUE}, "expected a whole number"),
        ({8: 5}, "expected text"),
        ({8: []}, "not empty"),
        ({8: [RED, BLUE]}, "2 prompts for 1"),
        ([(8, BLUE)], "expected Mapping"),
    ],
)
def test_changes_that_cannot_be_made_are_refused_at_once(pipe, changes, message):
    with pytest.raises(ConfigError, match=message):
        pipe.stream(RED, prompt_changes=changes)


def test_what_a_function_returns_is_checked(pipe):
    stream = pipe.stream(RED, prompt_changes=lambda frame: [RED, BLUE])
    next(stream)
    with pytest.raises(ConfigError, match="2 prompts for 1"):
        next(stream)
