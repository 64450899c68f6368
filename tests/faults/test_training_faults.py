"""Training: a config that cannot work ends the command at once, and a bad number never reaches a weight."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_forcing.cli import main
from sparse_forcing.errors import ConfigError, NotFiniteError
from sparse_forcing.eval import run
from sparse_forcing.eval.measuring.manifest import Entry
from sparse_forcing.eval.options import EvaluateConfig
from sparse_forcing.training.engine.optim import OptimizerConfig, make_optimizer
from sparse_forcing.training.engine.settings import LoopConfig
from sparse_forcing.training.recipes.shared import optimizer_step

STEPS = "loop: {steps: 1, trackers: []}\n"
TEACHER = STEPS + "teacher: tiny-base\n"


@pytest.mark.parametrize(
    ("stage", "text", "message"),
    [
        ("forcing", "loop: {stepz: 1}", "loop.stepz: unknown setting; did you mean loop.steps?"),
        ("forcing", STEPS + "optimizer: {learning_rate: fast}", "optimizer.learning_rate: expected a number"),
        ("forcing", STEPS + "optimizer: {learning_rate: '1e-4'}", "optimizer.learning_rate: expected a number"),
        ("forcing", STEPS + "optimizer: {learning_rate: .nan}", "optimizer.learning_rate: nan is not a finite number"),
        ("forcing", STEPS + "shift: 5\nshift: 6", "key 'shift' appears twice"),
        ("forcing", "loop: {steps: 1, trackers: [tensorbord]}", "trackers: 'tensorbord' is not one of aim, "),
        ("forcing", "loop: {steps: -3}", "steps: must be at least 1, got -3"),
        ("forcing", "loop: {steps: 1, global_batch: 3, micro_batch: 2}", "global_batch: 3 is not a multiple"),
        ("forcing", STEPS + "mode: diffusion\nmemory: {kind: sparse}", "memory.kind: sparse is trained chunk by chunk"),
        ("forcing", STEPS + "mode: diffusion\nmemory: {kind: heavy_hitter}", "heavy_hitter is trained chunk by chunk"),
        (
            "forcing",
            STEPS + "learned_selector: true\nmemory: {kind: full}",
            "learned_selector: needs memory.kind sparse",
        ),
        ("distill", STEPS + "rollout_frames: 5", "rollout_frames: 5 is not a multiple of the model's chunk"),
        (
            "distill",
            STEPS + "windows: 2\ncache_gradient: straight_through",
            "cache_gradient: detached or clean in long tuning",
        ),
        ("distill", STEPS + "memory: {window_frames: 0}", "window_frames: at least 1"),
        ("consistency", TEACHER + "sampler: {kind: euler}", "distilled with kind few_step and guidance_scale 1"),
        ("consistency", TEACHER + "teacher_window: 0", "teacher_window: must be at least 1 latent frame, got 0"),
        ("consistency", TEACHER + "teacher_steps: 3", "teacher_steps: expected 4 (the sampler's steps) to 1000, got 3"),
        ("consistency", TEACHER + "guidance_scale: -1", "guidance_scale must not be negative"),
        ("consistency", TEACHER + "cache_gradient: none", "cache_gradient: expected detached or clean"),
        ("consistency", STEPS + "teacher: nowhere", "nowhere"),
        ("ode", STEPS + "data: {kind: procedural}", "data.kind: ODE regression reads shards"),
    ],
)
def test_config_that_cannot_work_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, text: str, message: str
) -> None:
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(text)
    assert main(["train", stage, "--config", str(path), "--output", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(out.glob("step-*"))


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_number_stops_before_the_weights_change(where: str, bad: float) -> None:
    """A finite loss with a bad gradient counts, too."""
    torch.manual_seed(0)
    model, loop, config = nn.Linear(3, 1), LoopConfig(steps=3, global_batch=1, micro_batch=1), OptimizerConfig()
    optimizer = make_optimizer(model, config)
    before = [p.clone() for p in model.parameters()]

    def losses(_: int) -> Any:
        out = model(torch.ones(2, 3)).sum()
        if where == "loss":
            yield out * bad
            return
        out.register_hook(lambda gradient: gradient * bad)
        yield out

    with pytest.raises(NotFiniteError, match=r"step 1: .*update was not applied"):
        optimizer_step(model, optimizer, loop, config, 1, losses, name="model")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert not optimizer.state


def test_the_table_names_tests_that_exist() -> None:
    """README.md of this folder says which test answers for which fault."""
    root = Path(__file__).parents[2]
    table = (Path(__file__).parent / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) \|", table, re.MULTILINE)
    assert {*map(int, rows)} == {*range(1, 20), 21, 23, 24, 27}
    names = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", table)
    assert len(names) >= len(rows)
    for path, name in names:
        assert f"def {name}(" in (root / path).read_text(), f"{path}::{name}"


def wait_for_pipe(device: str) -> Any:
    """A plugin: an interpolator that reads from a pipe that stays empty."""
    return lambda *pair: Path(os.environ["EMPTY_PIPE"]).read_bytes()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dies", "a worker process died"),
        pytest.param("hangs", "no video was finished in 0.5 seconds", marks=pytest.mark.slow),
    ],
)
def test_worker_that_dies_or_hangs_is_named_and_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    """Evaluation measures in workers; a network of somebody's own may wait for ever in one of them."""
    pipe, clips, wait = tmp_path / "pipe", tmp_path / "clips", run.wait
    os.mkfifo(pipe)
    monkeypatch.setenv("EMPTY_PIPE", str(pipe))
    assert main(["data", "clips", str(clips), "--num-clips", "2", "--num-frames", "8", "--size", "32"]) == 0

    def once_begun(pending: Any, timeout: float, when: str) -> Any:
        deadline = time.monotonic() + 120
        while (end := writing_end(pipe)) is None:
            assert time.monotonic() < deadline, "no worker began"
            time.sleep(0.1)
        ends.append(end)
        if fault == "dies":
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
        return wait(pending, timeout, when)

    ends: list[int] = []
    monkeypatch.setattr(run, "wait", once_begun)
    config = EvaluateConfig(
        target=clips,
        output=tmp_path / "out",
        suite="vbench",
        metrics=("motion_smoothness",),
        plugins=(f"interpolator={__name__}:wait_for_pipe",),
        workers=2,
        worker_timeout=0.5,
    )
    with pytest.raises(ConfigError, match=rf"{message} .*process \d+ at {clips}"):
        run.measure_all(run.Runner(config), [Entry(video=path) for path in clips.glob("*.mp4")])
    assert not multiprocessing.active_children()
    for end in ends:
        os.close(end)


def writing_end(pipe: Path) -> int | None:
    """The writing end of a named pipe, None while nobody reads from it."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None
