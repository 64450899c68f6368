"""Recipes: every memory, both losses, long rollouts; what gets gradients; shipped configs; shared work adds up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from sparse_forcing import devices
from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.attention import ParallelAttention
from sparse_forcing.model.flow import SamplerConfig, few_step_timesteps
from sparse_forcing.model_folder.folder import find_model, load_transformer, read_defaults
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.training.data.sources import DataConfig, StoredSource
from sparse_forcing.training.engine.optim import OptimizerConfig
from sparse_forcing.training.engine.settings import LoopConfig
from sparse_forcing.training.entry import STAGES, load_stage, train
from sparse_forcing.training.losses.distribution_matching import ScoreConfig
from sparse_forcing.training.recipes.distill import _CRITIC, _GENERATOR, DistillConfig, DistillRecipe
from sparse_forcing.training.recipes.forcing import ForcingConfig, ForcingRecipe
from sparse_forcing.training.recipes.shared import generators
from tests.training.conftest import CHANNELS, CHUNK, HORIZON, SPARSE
from tests.training.helpers import differences
from tests.training.live_bytes import LiveBytes

MEMORIES = {
    "full": MemoryConfig(kind="full"),
    "window": MemoryConfig(kind="window", window_frames=4),
    "sink": MemoryConfig(kind="sink", window_frames=4, sink_frames=1),
    "sparse": SPARSE,
}
LOOP = LoopConfig(steps=2, global_batch=2, micro_batch=2, trackers=())
DATA = DataConfig(size=32, latent_frames=HORIZON)


def distill(folder: Path, **changes: Any) -> DistillRecipe:
    defaults: dict[str, Any] = {
        "loop": LOOP,
        "model": str(folder),
        "teacher": str(folder),
        "data": DATA,
        "sampler": SamplerConfig(steps=2),
        "rollout_frames": HORIZON,
        "critic_ratio": 2,
        "memory": SPARSE,
    }
    return DistillRecipe(DistillConfig(**{**defaults, **changes}), Accelerator(cpu=True))


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("memory", MEMORIES)
def test_each_update_changes_its_own_network(model_folder: Path, memory: str) -> None:
    recipe = distill(model_folder, memory=MEMORIES[memory])
    before = [weights(net) for net in (recipe.model, recipe.fake, recipe.real)]
    assert {"generator_loss", "critic_loss"} <= recipe.update(0).keys()
    changed = [
        any(not torch.equal(a, b) for a, b in zip(old, net.parameters()))
        for old, net in zip(before, (recipe.model, recipe.fake, recipe.real))
    ]
    assert changed == [True, True, False]
    generator = weights(recipe.model)
    assert "generator_loss" not in recipe.update(1)
    assert all(torch.equal(a, b) for a, b in zip(generator, recipe.model.parameters()))


def test_gradients_of_a_generator_update_stay_in_the_generator(model_folder: Path) -> None:
    recipe = distill(model_folder)
    (loss,) = recipe.generator_losses(0, 0)
    loss.backward()
    assert all(p.grad is None for net in (recipe.fake, recipe.real) for p in net.parameters())
    silent = [name for name, p in recipe.model.named_parameters() if p.grad is None]
    assert silent == []


def test_sid_reaches_the_generator_alone(model_folder: Path) -> None:
    recipe = distill(model_folder, loss="sid")
    (loss,) = recipe.generator_losses(0, 0)
    loss.backward()
    assert all(p.grad is not None for p in recipe.model.parameters())
    assert all(p.grad is None for net in (recipe.fake, recipe.real) for p in net.parameters())


def test_selector_learns_during_distillation(selector_folder: Path) -> None:
    recipe = distill(selector_folder, selector_weight=0.1)
    before = {n: p.detach().clone() for n, p in recipe.model.named_parameters() if "selector" in n}
    recipe.update(0)
    after = dict(recipe.model.named_parameters())
    changed = {name.split(".")[-1] for name, old in before.items() if not torch.equal(old, after[name])}
    assert {"gate", "query_weights", "key_weights", "query_projection", "key_projection"} == changed


def test_selectors_can_learn_faster_than_the_rest(selector_folder: Path) -> None:
    rate = OptimizerConfig(learning_rate=1e-3, selector_factor=10.0, betas=(0.0, 0.99), weight_decay=0.0)
    recipe = distill(selector_folder, selector_weight=0.1, generator=rate)
    before = {n: p.detach().clone() for n, p in recipe.model.named_parameters()}
    recipe.update(0)
    moved = {n: (p - before[n]).abs().max().item() for n, p in recipe.model.named_parameters()}
    selectors = [change for name, change in moved.items() if ".selector." in name]
    others = [change for name, change in moved.items() if ".selector." not in name]
    # Adam's first step is the learning rate.
    assert max(selectors) == pytest.approx(1e-2, rel=0.01)
    assert max(others) == pytest.approx(1e-3, rel=0.01)


def test_selector_loss_needs_a_selector(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="learned selector"):
        distill(model_folder, selector_weight=0.1)


def test_long_tuning_scores_every_window_and_trains_its_new_frames(model_folder: Path) -> None:
    recipe = distill(model_folder, windows=3, window_frames=2)
    clips = list(recipe.clips(recipe.draw(0, 0, _GENERATOR)))
    assert [clip.shape[1] for clip, *_ in clips] == [HORIZON] * 3
    masks = [mask for _, mask, *_ in clips]
    assert masks[0] is None
    for (clip, mask, *_), (earlier, *_) in zip(clips[1:], clips):
        assert mask is not None
        assert mask[:, :2].sum() == 0
        assert mask[:, 2:].all()
        assert torch.equal(clip[:, :2], earlier[:, 2:])
        (gradient,) = torch.autograd.grad(clip[:, 2:].square().sum(), recipe.model.proj_out.weight)
        assert gradient.abs().max() > 0
        assert not clip[:, :2].requires_grad or not earlier[:, 2:].detach().requires_grad
    recipe.update(0)


def test_a_causal_teacher_scores_every_chunk_after_the_finished_ones(model_folder: Path) -> None:
    recipe = distill(model_folder, score=ScoreConfig(causal_window=4))
    clip, _, scores, *_ = next(recipe.clips(recipe.draw(0, 0, _CRITIC)))
    timestep = torch.tensor([300.0, 800.0])
    noisy = torch.randn(clip.shape, generator=torch.Generator().manual_seed(1))
    text = recipe.pipe.text.encode(recipe.source.prompts(0, 2))
    together = scores["real"](noisy, timestep, True)
    for start in (0, 2):
        part = slice(start, start + 2)
        inputs = {"clean_hidden_states": clip[:, :start].transpose(1, 2)} if start else {}
        # One chunk sees all of its sequence but for the context, which does not see the chunk.
        mask = torch.ones(start + 2, start + 2, dtype=torch.bool)
        mask[:start, start:] = False
        policy = ParallelAttention(start + 2, mask)
        alone = recipe.real(noisy[:, part].transpose(1, 2), timestep, text, policy=policy, **inputs).transpose(1, 2)
        torch.testing.assert_close(together[:, part], alone, rtol=1e-4, atol=1e-5)
    recipe.update(0)


def test_the_fake_score_starts_from_the_teacher_the_student_or_a_model_of_its_own(
    model_folder: Path, selector_folder: Path, tmp_path: Path
) -> None:
    student = distill(model_folder)
    student.update(0)
    student.export(tmp_path / "student")

    def fake(start: str) -> list[str]:
        recipe = distill(model_folder, model=str(tmp_path / "student"), critic_start=start)
        own = load_transformer(selector_folder).state_dict()
        known = {"teacher": recipe.real.state_dict(), "model": recipe.model.state_dict(), "own": own}
        return [name for name, state in known.items() if not differences(recipe.fake.state_dict(), state)]

    assert [fake(start) for start in ("teacher", "model", str(selector_folder))] == [["teacher"], ["model"], ["own"]]
    with pytest.raises(WeightsError, match="'student': not an embedded model"):
        distill(model_folder, critic_start="student")


def test_critic_rollouts_build_no_graph(model_folder: Path) -> None:
    recipe = distill(model_folder)
    for clip, *_ in recipe.clips(recipe.draw(0, 0, _CRITIC)):
        assert not clip.requires_grad


def test_updates_and_ranks_draw_apart_and_repeatably(model_folder: Path) -> None:
    recipe = distill(model_folder)

    def first(step: int, micro_batch: int, stream: int) -> torch.Tensor:
        with torch.no_grad():
            return next(recipe.clips(recipe.draw(step, micro_batch, stream))).clip

    clips = [first(0, 0, _GENERATOR), first(0, 0, _CRITIC), first(0, 1, _CRITIC), first(1, 0, _CRITIC)]
    assert all(not torch.equal(a, b) for i, a in enumerate(clips) for b in clips[i + 1 :])
    assert torch.equal(clips[0], first(0, 0, _GENERATOR))


@pytest.mark.parametrize("memory", MEMORIES)
def test_teacher_forcing_through_a_memory_equals_the_parallel_mask(model_folder: Path, memory: str) -> None:
    """A memory that keeps everything visible gives the masked form's loss; others give another one."""
    config = ForcingConfig(loop=LOOP, model=str(model_folder), data=DATA, memory=MEMORIES["full"])
    recipe = ForcingRecipe(config, Accelerator(cpu=True))
    (parallel,) = recipe.losses(0, 0)
    everything = {"window": 4, "sink": 4, "sparse": 4}.get(memory)
    if everything is not None:
        recipe.memory = replace(MEMORIES[memory], window_frames=everything, density=1.0)
    (cached,) = recipe.losses(0, 0)
    torch.testing.assert_close(cached, parallel)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("memory", ["window", "sink", "sparse"])
def test_gradients_through_clean_chunks_equal_the_parallel_mask(
    model_folder: Path, memory: str, checkpointing: bool
) -> None:
    def gradients(memory: MemoryConfig, cache_gradient: str) -> dict[str, torch.Tensor]:
        loop = replace(LOOP, gradient_checkpointing=checkpointing)
        config = ForcingConfig(
            loop=loop, model=str(model_folder), data=DATA, memory=memory, cache_gradient=cache_gradient
        )
        recipe = ForcingRecipe(config, Accelerator(cpu=True))
        (loss,) = recipe.losses(0, 0)
        loss.backward()
        return {name: p.grad for name, p in recipe.model.named_parameters() if p.grad is not None}

    everything = replace(MEMORIES[memory], window_frames=HORIZON, density=1.0)
    parallel, clean = gradients(MEMORIES["full"], "detached"), gradients(everything, "clean")
    assert parallel.keys() == clean.keys()
    for name, gradient in parallel.items():
        torch.testing.assert_close(clean[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    detached = gradients(everything, "detached")
    assert any(not torch.allclose(detached[name], gradient, atol=1e-6) for name, gradient in parallel.items())


def test_levels_are_the_samplers_as_often_as_asked(model_folder: Path) -> None:
    sampler = SamplerConfig(kind="few_step", steps=4, shift=4.0)

    def drawn(share: float) -> torch.Tensor:
        config = ForcingConfig(
            loop=LOOP,
            model=str(model_folder),
            data=DATA,
            sampler=sampler,
            sampler_level_fraction=share,
            shift=4.0,
            weighting="unit_variance",
        )
        recipe, sources = ForcingRecipe(config, Accelerator(cpu=True)), generators(0, 0, 200, stream=2)
        levels = recipe.levels(sources, [CHUNK, CHUNK])
        assert torch.equal(levels[:, 0], levels[:, CHUNK - 1])
        return levels[:, ::CHUNK].flatten()

    listed = few_step_timesteps(sampler)
    levels, counts = drawn(1.0).unique(return_counts=True)
    assert torch.equal(levels.sort(descending=True).values, listed)
    assert counts.min() > 70  # of 400
    assert 0.4 < torch.isin(drawn(0.5), listed).float().mean() < 0.6
    right = {"sampler": sampler, "sampler_level_fraction": 0.5, "weighting": "unit_variance"}
    for wrong in ({"sampler_level_fraction": 1.5}, {"sampler": None}, {"weighting": "schedule"}):
        with pytest.raises(ConfigError, match="sampler_level_fraction"):
            ForcingConfig(loop=LOOP, **right | wrong)


@pytest.mark.parametrize("memory", ["full", "sparse"])
def test_guidance_distillation_learns_two_passes_in_one(model_folder: Path, tmp_path: Path, memory: str) -> None:
    def recipe(scale: float) -> ForcingRecipe:
        config = ForcingConfig(
            loop=LOOP,
            model=str(model_folder),
            data=DATA,
            memory=MEMORIES[memory],
            guidance_scale=scale,
            weighting="unit_variance",
            optimizer=OptimizerConfig(learning_rate=1e-4),
        )
        return ForcingRecipe(config, Accelerator(cpu=True))

    guided = recipe(30.0)
    clip, text = torch.randn(2, HORIZON, CHANNELS, 4, 4), guided.pipe.text.encode(["a red circle", ""])
    x, time, chunks = torch.randn_like(clip), torch.full((2, HORIZON), 500.0), guided.chunks(HORIZON)
    found = guided.predict_guided_flow(x, clip, time, text, chunks)
    assert not torch.allclose(found[0], found[1])
    # Without a caption there is nothing to be guided by, and at the start both networks have the same weights.
    if memory == "full":
        with torch.no_grad():
            plain, _ = guided.flow(x, clip, time, text, chunks, [torch.Generator(), torch.Generator()])
        torch.testing.assert_close(found[1], plain[1])
        assert not torch.allclose(found[0], plain[0])
    before = weights(guided.guide)
    losses = [guided.update(step)["flow_loss"] for step in [0] * 6]
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, guided.guide.parameters()))
    guided.export(tmp_path / "pipeline")
    assert SparseForcingPipeline.from_pretrained(str(tmp_path / "pipeline")).defaults.sampler.guidance_scale == 1
    assert recipe(1.0).guide is None


def test_guide_sees_a_window_of_its_own(model_folder: Path) -> None:
    def predict_guided_flow(memory: str, window: int | None) -> torch.Tensor:
        config = ForcingConfig(
            loop=LOOP,
            model=str(model_folder),
            data=DATA,
            memory=MEMORIES[memory],
            guidance_scale=3.0,
            guidance_window=window,
        )
        recipe, generator = ForcingRecipe(config, Accelerator(cpu=True)), torch.Generator().manual_seed(0)
        clip, x = torch.randn(2, 2, HORIZON, CHANNELS, 4, 4, generator=generator)
        text = recipe.pipe.text.encode(["a red circle", "a blue ring"])
        return recipe.predict_guided_flow(x, clip, torch.full((2, HORIZON), 500.0), text, recipe.chunks(HORIZON))

    full, window = predict_guided_flow("full", None), predict_guided_flow("full", 2)
    torch.testing.assert_close(window[:, :2], full[:, :2])
    assert not torch.allclose(window[:, 2:], full[:, 2:])
    torch.testing.assert_close(predict_guided_flow("sparse", 2), window)
    with pytest.raises(ConfigError, match="guidance_window: 2 must be positive and needs a guidance_scale"):
        ForcingConfig(loop=LOOP, guidance_window=2)


def test_forcing_has_two_kinds_of_cache_gradients() -> None:
    with pytest.raises(ConfigError, match="cache_gradient: expected detached or clean"):
        ForcingConfig(loop=LOOP, cache_gradient="straight_through")


def test_guidance_is_learned_by_teacher_forcing_only() -> None:
    with pytest.raises(ConfigError, match="guidance_scale: 3 needs mode: teacher"):
        ForcingConfig(loop=LOOP, mode="bidirectional", guidance_scale=3.0)


@pytest.mark.parametrize("mode", ["bidirectional", "diffusion", "teacher"])
def test_bfloat16_computation_reaches_every_weight(model_folder: Path, mode: str) -> None:
    loop = replace(LOOP, dtype="bfloat16")
    memory = SPARSE if mode == "teacher" else None
    config = ForcingConfig(loop=loop, model=str(model_folder), data=DATA, mode=mode, memory=memory)
    recipe = ForcingRecipe(config, Accelerator(cpu=True))
    (loss,) = recipe.losses(0, 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in recipe.model.parameters())


@pytest.mark.parametrize("fast", [True, False])
def test_automatic_arithmetic_is_bfloat16_where_that_saves_time(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda device: fast)
    config = ForcingConfig(loop=replace(LOOP, dtype="auto"), model=str(model_folder), data=DATA, mode="bidirectional")
    recipe = ForcingRecipe(config, Accelerator(cpu=True))
    used: list[torch.dtype] = []
    recipe.model.blocks[0].attn1.to_q.register_forward_hook(lambda layer, given, out: used.append(out.dtype))
    next(recipe.losses(0, 0))
    assert used == [torch.bfloat16 if fast else torch.float32]


def test_exported_student_generates(tmp_path: Path, model_folder: Path) -> None:
    recipe = distill(model_folder)
    recipe.update(0)
    recipe.export(tmp_path / "pipeline")
    pipe = SparseForcingPipeline.from_pretrained(str(tmp_path / "pipeline"))
    assert pipe.defaults.sampler == recipe.config.sampler
    for name, shadow in recipe.ema.shadow.items():
        assert torch.equal(shadow, pipe.transformer.state_dict()[name])
    frames = pipe("a red circle", num_frames=8, generator=torch.Generator().manual_seed(0)).frames[0]
    assert frames.shape == (8, 32, 32, 3)
    recipe.validate(1, tmp_path / "samples")
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 2


def test_unknown_stage_and_setting() -> None:
    with pytest.raises(ConfigError, match=r"expected one of .*pretrain"):
        train("destil", None, [], "out")
    with pytest.raises(ConfigError, match=r"loop\.stepz"):
        load_stage("forcing", None, ["loop.stepz=1", "loop.steps=1"])
    assert set(STAGES) >= {"pretrain", "forcing", "ode", "distill"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "gan"}, "loss"),
        ({"sampler": SamplerConfig(kind="euler")}, "few_step"),
        ({"critic_ratio": 0}, "critic_ratio"),
        ({"cache_gradient": "none"}, "cache_gradient"),
        ({"windows": 2, "cache_gradient": "straight_through"}, "long tuning"),
        ({"loss": "sid", "windows": 2}, "sid"),
        ({"rollout_frames": 5}, "rollout_frames: 5 is not a multiple"),
    ],
)
def test_impossible_distillations_are_refused(model_folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distill(model_folder, **changes)


def test_stored_prompts_come_once_per_epoch_in_a_new_order(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(7)))
    source = StoredSource(DataConfig(kind="prompts", path=path), seed=3)
    seen = [prompt for draw in range(7) for prompt in source.prompts(draw, 2)]
    assert sorted(seen[:7]) == sorted(seen[7:]) == sorted(source.all_prompts)
    assert seen[:7] != seen[7:]
    assert source.prompts(4, 2) == seen[8:10]


def test_learning_rate_is_a_function_of_the_step() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine", final_fraction=0.1)
    rates = [config.rate(step, 100) for step in (0, 3, 4, 50, 100)]
    assert rates[:2] == pytest.approx([0.2, 0.8], rel=0.01)
    assert rates[3] == pytest.approx(0.55, rel=0.01)
    assert rates[4] == pytest.approx(0.1)


def held_bytes(recipe: DistillRecipe) -> int:
    """Bytes alive between the forward and the backward pass of a generator loss."""
    with LiveBytes() as live:
        before = live.now
        losses = list(recipe.generator_losses(0, 0))
    assert losses
    return live.now - before


def test_sparse_training_needs_no_more_memory_than_dense(model_folder: Path) -> None:
    """The same long rollout; the dense student keeps everything, as Self-Forcing does."""
    options: dict[str, Any] = {"rollout_frames": 6 * HORIZON, "sampler": SamplerConfig(steps=1)}
    dense = held_bytes(distill(model_folder, memory=MEMORIES["full"], **options))
    sparse = held_bytes(distill(model_folder, memory=SPARSE, **options))
    assert sparse < dense, (sparse, dense)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_selector_that_learns_in_both_ways_adds_little_memory(checkpointing: bool) -> None:
    """Pooled vectors of blocks, on `tiny-base`, against a dense window; pooling: memory/test_training_memory."""
    sparse = read_defaults(find_model("tiny-base")).memory
    options: dict[str, Any] = {
        "loop": replace(LOOP, global_batch=1, micro_batch=1, gradient_checkpointing=checkpointing),
        "data": DataConfig(size=64, latent_frames=10),
        "rollout_frames": 10,
        "sampler": SamplerConfig(steps=1),
    }
    learning: dict[str, Any] = {"learned_selector": True, "selector_weight": 0.1, "selector_layers": 8}
    window = held_bytes(distill(Path("tiny-base"), memory=replace(sparse, kind="window"), **options))
    assert held_bytes(distill(Path("tiny-base"), memory=sparse, **options, **learning)) < 1.06 * window


class PicturesFirst:
    """An autoencoder whose clips start with a picture, in numbers that show what happened to them."""

    first_frame_alone = True

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.repeat_interleave(2, 2)[:, :, 1:] + 1

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.shape[2] == 1
        return pixels + 1


def test_a_kept_frame_becomes_a_picture_where_clips_start_with_one(model_folder: Path) -> None:
    recipe = distill(model_folder, windows=2, window_frames=2)
    plain = [clip for clip, *_ in recipe.clips(recipe.draw(0, 0, _GENERATOR))]
    for name in ("decode", "encode", "first_frame_alone"):
        setattr(recipe.pipe.vae, name, getattr(PicturesFirst(), name))
    first, second = (clip for clip, *_ in recipe.clips(recipe.draw(0, 0, _GENERATOR)))
    torch.testing.assert_close(first, plain[0])
    torch.testing.assert_close(second[:, :1], plain[1][:, :1] + 2)
    torch.testing.assert_close(second[:, 1:], plain[1][:, 1:])
    recipe.config = replace(recipe.config, window_frames=None)
    with pytest.raises(ConfigError, match="window_frames: must be below rollout_frames"):
        recipe._windows()
