"""Every stage after the other on the shipped configs, through the command line, to a student that generates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparse_forcing.cli import main
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.training.recipes.embedded import export
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
    command("train", stage, "--config", CONFIGS / config, "--output", output, **SHORT, **settings, loop__steps=steps)
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
        "data",
        "ode-pairs",
        pairs,
        teacher=teacher / "pipeline",
        count=4,
        per_shard=2,
        steps=4,
        guidance_scale=2,
        sampler__shift=6,
        sampler__steps=2,
        data__latent_frames=4,
        data__size=32,
    )
    command(
        "train",
        "ode",
        "--output",
        ode,
        model=start / "pipeline",
        data__kind="shards",
        data__path=pairs,
        data__latent_frames=4,
        memory__kind="full",
        sampler__shift=6,
        sampler__steps=2,
        loop__steps=2,
        loop__global_batch=2,
        loop__micro_batch=1,
        loop__trackers="[]",
    )
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
        "distill",
        "tiny-long.yaml",
        long,
        1,
        model=dmd / "pipeline",
        **scores,
        **memory,
        **selector,
        **rollout,
        windows=3,
        window_frames=2,
    )

    pipe = SparseForcingPipeline.from_pretrained(str(long / "pipeline"))
    assert pipe.default_memory.kind == kind
    assert bool(pipe.transformer.selectors) == (kind == "sparse")
    frames = pipe("a red square", num_frames=16, generator=torch.Generator().manual_seed(0)).frames[0]
    assert frames.shape == (16, 32, 32, 3)


def test_from_nothing_to_a_shipped_student(tmp_path: Path) -> None:
    """The commands of the README: each stage starts from the folders that the ones before it left."""

    def embedded(stage: str, name: str, **settings: object) -> Path:
        out = tmp_path / name
        command(
            "train", stage, "--config", CONFIGS / f"{name}.yaml", "--output", out, loop__checkpoint_every=1, **settings
        )
        return out / "pipeline"

    def stages(frames: int) -> str:
        return f"[{{latent_frames: {frames}, batch_size: 2, steps: 1, sizes: [32]}}]"

    clips = {"sizes": "[32]", "batch_size": 2, "loop__steps": 1}
    small = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "ffn_dim": 16,
        "text_dim": 8,
        "pose_layer": 1,
        "course_layer": 0,
        "text_steps": 1,
    }
    sizes = {"latent_channels": 8, "components": 24, "dim": 16, "num_blocks": 1, "fit_clips": 32}
    first = embedded("autoencoder", "tiny-autoencoder", **clips, **sizes)
    decoder = embedded("autoencoder", "tiny-decoder", **clips, init_from=first)
    details = embedded("autoencoder", "tiny-details", **clips, init_from=decoder, extra_channels=4)
    coarse = embedded("pretrain", "tiny", autoencoder=first, stages=stages(2), **small)
    base = embedded("pretrain", "tiny-fine", autoencoder=details, init_from=coarse, stages=stages(4), **small)
    bound = embedded("pretrain", "tiny-bound", init_from=base, stages=stages(4), **small)
    guided = {**SHORT, "loop.steps": 1, "memory.tile": "[2, 2, 2]", "memory.persistent_blocks": 1}
    forcing = ("train", "forcing", "--config", CONFIGS / "tiny-guided.yaml", "--output", tmp_path / "guided")
    command(*forcing, **guided, model=bound)
    distill = ("train", "distill", "--config", CONFIGS / "tiny-distill.yaml", "--output", tmp_path / "student")
    start, student = tmp_path / "guided" / "pipeline", tmp_path / "student" / "pipeline"
    command(*distill, **guided, teacher=bound, model=start, critic_start="model", rollout_frames=4)
    shipped = tmp_path / "shipped"
    assert (
        export.main([str(student), "--mean-with", str(start), "--out", str(shipped), "--set", "sampler.steps=3"]) == 0
    )
    pipe = SparseForcingPipeline.from_pretrained(str(shipped))
    assert pipe.defaults.sampler.steps == 3
    assert pipe.vae.latent_channels == 12
    assert pipe("a red square", num_frames=16, height=32, width=32).frames[0].shape == (16, 32, 32, 3)
