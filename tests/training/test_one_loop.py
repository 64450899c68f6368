"""What every stage owes to the one loop: lock, guard, resume, rows, samples, a model at the end; what a stage adds."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_forcing.cli import main
from sparse_forcing.config import build_config
from sparse_forcing.errors import InUseError
from sparse_forcing.files import output_lock
from sparse_forcing.model_folder.folder import load_autoencoder
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.training.data.pairs import make_pairs
from sparse_forcing.training.engine import settings
from sparse_forcing.training.engine.loop import Recipe, run
from sparse_forcing.training.engine.optim import apply_gradients
from sparse_forcing.training.engine.settings import RunConfig
from sparse_forcing.training.entry import STAGES
from sparse_forcing.weights.manifest import verify_manifest
from tests.training.helpers import differences, losses, newest, small_config, state
from tests.training.helpers import run as run_process
from tests.training.test_ode import pairs

pytestmark = pytest.mark.xdist_group("one_loop")  # one process makes the pairs for all

RECIPES = {
    "autoencoder": "AutoencoderRecipe", "pretrain": "PretrainRecipe", "forcing": "ForcingRecipe", "ode": "OdeRecipe",
    "consistency": "ConsistencyRecipe", "retention": "RetentionRecipe", "distill": "DistillRecipe",
}  # fmt: skip
ALONE = ("autoencoder", "pretrain")
"""Stages that train in one process."""


def embedded(stage: str, *, steps: int, **loop: Any) -> dict[str, Any]:
    """Settings of a small autoencoder or pretraining run."""
    if stage == "autoencoder":
        return {
            "loop": {"steps": steps, **loop},
            "sizes": [16, 32],
            "batch_size": 2,
            "components": 8,
            "latent_channels": 4,
            "dim": 8,
            "num_blocks": 1,
            "fit_clips": 8,
        }
    stages = [{"latent_frames": 4, "batch_size": 2, "steps": steps, "sizes": [16], "continuation": 0.5}]
    return {
        "loop": loop,
        "stages": stages,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "ffn_dim": 16,
        "text_dim": 8,
        "latent_channels": 4,
        "pose_layer": 1,
        "course_layer": 0,
        "text_steps": 1,
        "fit_clips": 16,
    }


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    make_pairs(pairs(model_folder), folder)
    return folder


@pytest.fixture(params=RECIPES)
def stage(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def settings_of(model_folder: Path, trajectories: Path) -> Callable[..., dict[str, Any]]:
    """Nested settings of a stage: (stage, steps, loop settings)."""

    def settings(stage: str, *, steps: int, **loop: Any) -> dict[str, Any]:
        if stage in ALONE:
            return embedded(stage, steps=steps, **loop)
        config = small_config(model_folder, "distill" if stage == "distill" else "forcing", steps=steps, **loop)
        if stage == "retention":
            config["memory"] = {"kind": "sparse", "window_frames": 4, "tile": [2, 2, 2], "persistent_blocks": 2}
            config["data"] = {"kind": "procedural", "size": 32, "latent_frames": 10}
            config["query_noise"] = 0.9
        if stage == "consistency":
            config |= {"teacher": str(model_folder), "teacher_window": 4, "guidance_scale": 2.0}
            config["sampler"] = {"steps": 2}
        if stage == "ode":
            config["sampler"] = {"steps": 2}
            config["data"] = {"kind": "shards", "path": str(trajectories), "size": 32, "latent_frames": 4}
        return config

    return settings


def train(stage: str, config: dict[str, Any], out: Path) -> int:
    module_name, config_class = STAGES[stage]
    module = importlib.import_module(module_name)
    return module.train(build_config(getattr(module, config_class), config), out)


def recipe_class(stage: str) -> Any:
    return getattr(importlib.import_module(STAGES[stage][0]), RECIPES[stage])


def command(stage: str, config: dict[str, Any], out: Path) -> int:
    """The same through the command line (YAML takes JSON)."""
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(config))
    return main(["train", stage, "--config", str(path), "--output", str(out)])


def test_every_stage_is_tested_here() -> None:
    assert RECIPES.keys() == STAGES.keys()


def test_a_second_run_on_the_same_folder_is_refused(tmp_path: Path, stage: str, settings_of) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with output_lock(out), pytest.raises(InUseError, match=r"another run .* is writing to"):
        train(stage, settings_of(stage, steps=1), out)
    assert [path for path in out.iterdir() if not path.name.startswith(".")] == []


def test_a_resumed_run_has_the_bits_and_the_rows_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, settings_of
) -> None:
    """Cut off in the middle of a row: of steps 4 and 5, which the last row is the mean of, one is before the cut."""
    config = settings_of(stage, steps=5, checkpoint_every=2, log_every=3)
    assert train(stage, config, tmp_path / "whole") == 0
    kind = recipe_class(stage)
    update = kind.update

    def cut(self: Any, step: int) -> dict[str, float]:
        if step == 4:
            raise KeyboardInterrupt
        return update(self, step)

    monkeypatch.setattr(kind, "update", cut)
    with pytest.raises(KeyboardInterrupt):
        train(stage, config, tmp_path / "out")
    monkeypatch.undo()
    assert newest(tmp_path / "out").name == "step-00000004"
    assert train(stage, config, tmp_path / "out") == 0
    assert differences(state(newest(tmp_path / "out")), state(newest(tmp_path / "whole"))) == []
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert [row["step"] for row in losses(tmp_path / "out")] == [3, 5]


def test_a_finished_stage_leaves_samples_and_a_folder_that_loads(tmp_path: Path, stage: str, settings_of) -> None:
    assert train(stage, settings_of(stage, steps=2, validate_every=2), tmp_path) == 0
    assert len(list((tmp_path / "samples").glob("step-0000002-*.mp4"))) == 2
    assert verify_manifest(tmp_path / "pipeline") is not None
    if stage == "autoencoder":
        vae = load_autoencoder(tmp_path / "pipeline")
        assert vae.latent_channels == 4
        return
    pipe = SparseForcingPipeline.from_pretrained(str(tmp_path / "pipeline"))
    frames = pipe("a red circle", num_frames=8, height=32, width=32).frames[0]
    assert frames.shape == (8, 32, 32, 3)


def test_sampling_on_the_way_changes_nothing(tmp_path: Path, stage: str, settings_of) -> None:
    for every in (0, 1):
        assert train(stage, settings_of(stage, steps=3, validate_every=every), tmp_path / str(every)) == 0
    assert differences(state(newest(tmp_path / "1")), state(newest(tmp_path / "0"))) == []


@pytest.mark.parametrize("stage", ALONE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_loss_stops_an_embedded_stage_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str, bad: float
) -> None:
    module = importlib.import_module(STAGES[stage][0])
    name, field_name = ("step_losses", "total") if stage == "autoencoder" else ("training_loss", "balanced")
    made, calls = getattr(module, name), []

    def poisoned(*arguments: Any) -> Any:
        result = made(*arguments)
        calls.append(1)
        if len(calls) == 2:
            object.__setattr__(result, field_name, getattr(result, field_name) * bad)
        return result

    monkeypatch.setattr(module, name, poisoned)
    out = tmp_path / "out"
    assert command(stage, embedded(stage, steps=4, log_every=1), out) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("sparse-forcing train: error: step 1: ")
    assert f"loss = {bad}" in message
    assert "nothing of this step is saved; there is no checkpoint yet" in message
    assert [row["step"] for row in losses(out)] == [1]  # what was sound before
    assert not list(out.glob("step-*"))
    assert not (out / "pipeline").exists()


@pytest.mark.parametrize("stage", ALONE)
def test_a_stage_of_one_process_refuses_several_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    monkeypatch.setattr(settings, "world_size", lambda: 2)
    assert command(stage, embedded(stage, steps=1), tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "this stage trains in one process, this launch has 2; start it without torchrun" in line
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ALONE)
def test_under_torchrun_both_processes_say_so_and_neither_trains(tmp_path: Path, stage: str) -> None:
    code, output = run_process(tmp_path, embedded(stage, steps=1), tmp_path / "out", stage=stage, processes=2)
    assert code != 0
    assert "this stage trains in one process, this launch has 2" in output, output
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("when", ["before the first step", "in step 0 (batch_size 2, 32 pixels)"])
def test_too_little_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    module = importlib.import_module(STAGES["autoencoder"][0])

    def refuse(*_: Any) -> None:
        torch.empty(1 << 50)

    monkeypatch.setattr(module, "start" if when.startswith("before") else "step_losses", refuse)
    assert command("autoencoder", embedded("autoencoder", steps=1), tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"out of memory {when}; lower batch_size or the size of the model" in line


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("pretrain", "seed=1", "seed: this setting is called loop.seed now"),
        ("pretrain", "checkpoint_minutes=1", "is called loop.checkpoint_every (in steps) now"),
        ("autoencoder", "steps=1", "steps: this setting is called loop.steps now"),
        ("forcing", "loop.seed=-1", "loop: seed: must lie from 0 to 2147483647, got -1"),
        ("pretrain", f"loop.seed={2**64}", "loop: seed: must lie from 0 to 2147483647, got 18446744073709551616"),
        ("pretrain", "attention_head_dim=1e9", "attention_head_dim: must lie from 6 to 1024, got 1000000000"),
        ("pretrain", "attention_head_dim=7", "attention_head_dim: must be even"),
        ("pretrain", "num_attention_heads=256", "attention_head_dim 32 x num_attention_heads 256: at most 4096"),
        ("pretrain", "num_layers=1e9", "num_layers: must lie from 1 to 256, got 1000000000"),
        ("pretrain", "text_dim=30", "dim must be a multiple of num_heads, got 30 and 4"),
        ("pretrain", "loop.device=tpu", "loop.device: tpu: not usable with torch"),
        ("autoencoder", "num_blocks=1e9", "num_blocks: must lie from 1 to 64, got 1000000000"),
    ],
)
def test_settings_that_cannot_be_meant_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, change: str, message: str
) -> None:
    needed = ["--set", "loop.steps=1"] if stage == "forcing" else []
    assert main(["train", stage, "--output", str(tmp_path / "out"), "--set", change, *needed]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@dataclass(frozen=True, kw_only=True)
class CountingConfig:
    """A stage of its own module and one line of the table of stages."""

    loop: RunConfig = field(default_factory=RunConfig)
    rate: float = 0.5


class CountingRecipe(Recipe):
    steps, geometry = 3, "one number"

    def __init__(self, config: CountingConfig) -> None:
        self.config, self.model = config, nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters())
        self.parts = {"model": self.model, "optimizer": self.optimizer}

    def update(self, step: int) -> dict[str, float]:
        loss = -self.model.weight.sum()
        loss.backward()
        return apply_gradients(
            self.model, [self.optimizer], step, name="own", loss=loss.item(), rate=self.config.rate, max_grad_norm=None
        )

    def export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "count.txt").write_text(str(self.model.weight.item()))


def test_a_new_stage_is_a_module_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("a_new_stage")
    module.CountingConfig = CountingConfig  # type: ignore[attr-defined]
    module.train = lambda config, out, resume: run(  # type: ignore[attr-defined]
        lambda accelerator: CountingRecipe(config), config.loop, config, out, resume
    )
    monkeypatch.setitem(sys.modules, "a_new_stage", module)
    monkeypatch.setitem(STAGES, "counting", ("a_new_stage", "CountingConfig"))
    flags = ["--set", "rate=2", "--set", "loop.trackers=[]", "--set", "loop.log_every=2"]
    assert main(["train", "counting", "--output", str(tmp_path), *flags]) == 0
    assert (tmp_path / "pipeline" / "count.txt").read_text() == "6.0"
    assert newest(tmp_path).name == "step-00000003"
    assert [(row["step"], row["own_loss"]) for row in losses(tmp_path)] == [(2, -1.0), (3, -4.0)]
