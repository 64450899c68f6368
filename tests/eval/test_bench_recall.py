"""`bench recall`: worlds have the gap that was asked for, memories are written in words, results say what was seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_forcing import SparseForcingPipeline
from sparse_forcing.cli import main
from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.bench import returns
from sparse_forcing.eval.bench.options import RecallBenchConfig
from sparse_forcing.eval.bench.recall import list_cells, plan_cell, summarize, table
from sparse_forcing.eval.bench.recall_figures import LEAST_SIDE, MARGIN
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.memory.config import parse_memory

DEFAULT = MemoryConfig(window_frames=4, tile=(2, 2, 4), persistent_blocks=4, density=0.5)


@pytest.fixture(scope="module")
def pipe() -> SparseForcingPipeline:
    return SparseForcingPipeline.from_pretrained("tiny-base")


def test_memories_in_words() -> None:
    assert parse_memory("full", DEFAULT) == replace(DEFAULT, kind="full")
    assert parse_memory("window:8", DEFAULT) == replace(DEFAULT, kind="window", window_frames=8)
    assert parse_memory("sink:6,2", DEFAULT) == replace(DEFAULT, kind="sink", window_frames=6, sink_frames=2)
    changed = replace(DEFAULT, window_frames=6, density=1.0, persistent_blocks=16, retention="mass")
    assert parse_memory("sparse:6,1,16,mass", DEFAULT) == changed
    assert parse_memory("sparse:,,16", DEFAULT) == replace(DEFAULT, persistent_blocks=16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("windw:8", "kind is one of"),
        ("window:8,2", "window takes window_frames"),
        ("full:3", "full takes nothing"),
        ("window:x", "window_frames is a number, got 'x'"),
        ("sparse:4,2", "density"),
        ("sparse:4,1,8,nothing", "retention"),
        ("window:0", "window_frames"),
    ],
)
def test_words_that_mean_no_memory(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_memory(text, DEFAULT)


@pytest.mark.parametrize("kind", ["revisit", "reappear"])
def test_what_is_given_ends_before_the_object_shows_again(pipe: SparseForcingPipeline, kind: str) -> None:
    config = RecallBenchConfig(model="tiny-base", worlds=(kind,), gaps=(1.0,), count=12)
    ((_, gap, grounds),) = [cell for cell in list_cells(config).values()]
    tasks = plan_cell(pipe, config, kind, gap, grounds)
    assert len(tasks) == 12
    for task in tasks:
        boxes = task.world.visible_boxes()
        item, entry = task.entry.item, task.entry
        assert 16 <= entry.gap <= 19
        assert all(item not in boxes[frame] for frame in range(entry.last_seen + 1, task.given))
        assert task.given % 8 == 0
        assert task.given + task.generated > entry.frames[0]


def test_the_truth_itself_is_all_right_and_a_blank_is_not(pipe: SparseForcingPipeline) -> None:
    config = RecallBenchConfig(model="tiny-base", worlds=("revisit",), gaps=(1.0,), count=10)
    tasks = plan_cell(pipe, config, "revisit", 1.0, ("smooth", "textured"))

    def frames(task: returns.Task) -> np.ndarray:
        return returns.world_frames(task.world, 64).numpy()[task.given : task.given + task.generated]

    right = summarize([returns._judge(task, frames(task), 1) for task in tasks])
    blank = summarize([returns._judge(task, np.full_like(frames(task), 0.5), 1) for task in tasks])
    assert right["all"]["mean"] >= 0.9
    assert right["rmse"] < 1
    assert blank["all"]["mean"] == 0.0
    assert right["chance"]["all"] < 0.3


def test_a_video_for_each_prompt_goes_on_as_it_would_alone(pipe: SparseForcingPipeline) -> None:
    worlds = [returns.draw_world("revisit", 0, number, returns.WorldConfig()) for number in range(2)]
    given = np.stack([returns.world_frames(world, 64).numpy()[:16] for world in worlds])
    settings = {"num_frames": 8, "num_inference_steps": 1, "guidance_scale": 1.0}

    def generate(prompts: list[str], video: np.ndarray, seeds: list[int]) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        chunks = pipe.stream(prompts, video=video, generator=generators, **settings)
        return np.concatenate([chunk.frames for chunk in chunks], 1)

    both = generate(["a red circle", "a blue star"], given, [1, 2])
    alone = generate(["a blue star"], given[1], [2])
    np.testing.assert_allclose(both[1], alone[0], atol=2e-5)
    with pytest.raises(ConfigError, match=r"2 videos for 3"):
        list(pipe.stream(["a", "b", "c"], video=given, **settings))


@pytest.mark.slow
def test_the_command_writes_table_pictures_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "tiny-base", "--worlds", "revisit", "--gaps", "0.5", "1", "--count", "3", "--seed", "1"]
    arguments += ["--memories", "full", "sparse:4,1,8,paper", "--num-inference-steps", "1", "--guidance-scale", "1"]
    assert main(["bench", "recall", *arguments, "--size", "32", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "recall.json").read_text())
    assert set(result["memories"]) == {"full", "sparse:4,1,8,paper"}
    assert set(result["memories"]["full"]["cells"]) == {"revisit, gap 0.5", "revisit, gap 1"}
    assert table(result) == (tmp_path / "recall.md").read_text()
    assert (tmp_path / "recall.png").stat().st_size > 1000
    with Image.open(tmp_path / "sheet.png") as sheet:  # first and last sight, gap, true return, and two memories
        assert sheet.size[0] == 6 * (4 * 32 + MARGIN) + MARGIN
        assert 4 * 32 >= LEAST_SIDE
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]["count"] == 3


def test_there_is_no_model_to_take_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "recall"]) == 2
    assert "--model: give a model that has learned worlds" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gaps", "0"],
        ["--worlds", "nowhere"],
        ["--grounds", "mud"],
        ["--count", "0"],
        ["--memories", "windw"],
        ["--positions", "up"],
        ["--prompts", "3"],
    ],
)
def test_bad_input_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "recall", "--model", "tiny-base", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
