"""Every stage after the other on the shipped configs, through the command line, to a student that generates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparse_forcing.cli import main
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from tests.training.helpers import losses

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
SHORT = {
    "loop.global_batch": 2, "loop.micro_batch": 1, "loop.checkpoint_every": 1, "loop.log_every": 1, "data.size": 32,
    "data.latent_frames": 4,
}  # fmt: skip
TILES = {"memory.tile": "[2, 2, 2]", "memory.persistent_blocks": 1}
SELECTOR = {"learned_selector": "true", "selector_weight": 0.1}


def command(*arguments: object, **settings: object) -> None:
    """Run one command with settings a__b=c as --set a.b=c."""
    flags = [flag for name, value in settings.items() for flag in ("--set", f"{name.replace('__', '.')}={value}")]
    assert main([*map(str, arguments), *flags]) == 0


def train(stage: str, config: str, output: Path, steps: int, **settings: object) -> None:
    command(
        "train", stage, "--config", CONFIGS / config, "--output", output, **SHORT, **settings, loop__steps=steps
    )  # fmt: skip
    assert [row["step"] for row in losses(output)] == list(range(1, steps + 1))


@pytest.mark.parametrize("kind", ["sparse", pytest.param("full", marks=pytest.mark.slow)])
def test_teacher_to_long_tuned_student(tmp_path: Path, model_folder: Path, kind: str) -> None:
    teacher, start, pairs, ode, dmd, sid, long = (
        tmp_path / name for name in "teacher start pairs ode dmd sid long".split()
    )
    memory = {"memory__kind": kind, **(TILES if kind == "sparse" else {})}
    selector = SELECTOR if kind == "sparse" else {"learned_selector": False, "selector_weight": 0}
    rollout = {"sampler__steps": 2, "rollout_frames": 4}
    scores = {"teacher": teacher / "pipeline"}

    train("forcing", "tiny-teacher.yaml", teacher, 2, model=model_folder, weighting="schedule")
    forced = {"model": model_folder, "weighting": "schedule"}
    if kind == "full":
        train(
            "forcing",
            "tiny-sparse-start.yaml",
            tmp_path / "diffusion",
            1,
            **forced,
            **memory,
            **selector,
            mode="diffusion",
        )
    train("forcing", "tiny-sparse-start.yaml", start, 1, **forced, **memory, **selector)
    train("forcing", "tiny-sparse-start.yaml", start, 2, **forced, **memory, **selector)  # resumed

    command(
        "data", "ode-pairs", pairs, teacher=teacher / "pipeline", count=4, per_shard=2, steps=4, guidance_scale=2,
        sampler__shift=6, sampler__steps=2, data__latent_frames=4, data__size=32,
    )  # fmt: skip
    command(
        "train", "ode", "--output", ode, model=start / "pipeline", data__kind="shards", data__path=pairs,
        data__latent_frames=4, memory__kind="full", sampler__shift=6, sampler__steps=2, loop__steps=2,
        loop__global_batch=2, loop__micro_batch=1, loop__trackers="[]",
    )  # fmt: skip
    train("distill", "tiny-distill.yaml", dmd, 2, model=ode / "pipeline", **scores, **memory, **selector, **rollout)
    train(
        "distill",
        "tiny-distill.yaml",
        sid,
        1,
        model=ode / "pipeline",
        **scores,
        **memory,
        **selector,
        **rollout,
        loss="sid",
    )
    train(
        "distill", "tiny-long.yaml", long, 1, model=dmd / "pipeline", **scores, **memory, **selector, **rollout,
        windows=3, window_frames=2,
    )  # fmt: skip

    pipe = SparseForcingPipeline.from_pretrained(str(long / "pipeline"))
    assert pipe.default_memory.kind == kind
    assert bool(pipe.transformer.selectors) == (kind == "sparse")
    frames = pipe("a red square", num_frames=16, generator=torch.Generator().manual_seed(0)).frames[0]
    assert frames.shape == (16, 32, 32, 3)
