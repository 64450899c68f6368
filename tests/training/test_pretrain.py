"""Pretraining: what each stage sees and learns from, the auxiliary targets, and resuming."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from math import pi
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_forcing.errors import ConfigError
from sparse_forcing.model.attention import ParallelAttention
from sparse_forcing.model.vae import TokenAutoencoder
from sparse_forcing.model_folder.folder import read_defaults
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.scenes.render import trajectories
from sparse_forcing.scenes.sample import sample_scenes
from sparse_forcing.scenes.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES
from sparse_forcing.training.data.procedural import ClipBatch, procedural_batch
from sparse_forcing.training.engine.ema import ParameterEma
from sparse_forcing.training.losses.flow_matching import sample_sigma, sigma_quantile, unit_variance_weight
from sparse_forcing.training.recipes.embedded import export
from sparse_forcing.training.recipes.embedded import pretrain as recipe
from sparse_forcing.training.recipes.embedded.autoencoder import with_channels
from sparse_forcing.training.recipes.embedded.curriculum import PretrainConfig, PretrainLoop, StageConfig
from sparse_forcing.training.recipes.embedded.level_balance import LevelBalance
from sparse_forcing.training.recipes.embedded.muon import BatchedMuon
from sparse_forcing.training.recipes.embedded.pretrain_model import TextToVideo, make_autoencoder, make_models
from sparse_forcing.training.recipes.embedded.scene_targets import (
    ATTRIBUTES,
    HARMONICS,
    POSE_NUMBERS,
    attribute_targets,
    course_targets,
    pose_targets,
)
from sparse_forcing.training.recipes.embedded.tiny import TINY
from tests.training.helpers import differences, newest, state

STD = [2.0, 1.0, 0.5, 0.5]


def config(*stages: StageConfig, **changes: Any) -> PretrainConfig:
    """A model whose step takes milliseconds."""
    small: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "ffn_dim": 16,
        "text_dim": 8,
        "latent_channels": 4,
        "pose_layer": 1,
        "course_layer": 0,
        "text_steps": 2,
        "fit_clips": 16,
    }
    return PretrainConfig(
        stages=stages or (StageConfig(latent_frames=1, batch_size=2, steps=2, sizes=(32,)),), **small | changes
    )


def test_muon_is_for_matrices_of_the_blocks() -> None:
    model = TextToVideo(config(), STD)
    rest, blocks = recipe.make_optimizers(model, config())
    assert type(blocks) is BatchedMuon
    inside = {id(p) for p in blocks.param_groups[0]["params"]}
    assert {id(p) for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2} == inside
    assert len(inside) + len(rest.param_groups[0]["params"]) == len(list(model.parameters()))


def test_patches_are_fitted_on_as_many_clips_as_asked() -> None:
    fitted = [make_autoencoder(config(fit_clips=count))[0] for count in (8, 8, 9)]
    assert torch.equal(fitted[0].mean, fitted[1].mean)
    assert not torch.equal(fitted[0].mean, fitted[2].mean)


def batch(frames: int, count: int = 3, **options: Any):
    defaults: dict[str, Any] = {"size": 32, "two_object_fraction": 0.0, "caption_dropout": 0.0}
    return procedural_batch(0, 0, batch_size=count, num_frames=frames, **defaults | options)


def test_pose_targets_say_where_the_object_is_from_every_token() -> None:
    scenes = sample_scenes(4, torch.Generator().manual_seed(0))
    start = torch.tensor([0, 3, 8, 20])
    targets = pose_targets(scenes, start, latent_frames=2, stride=4, rows=8).unflatten(1, (2, 8, 8))
    assert targets.shape[-1] == POSE_NUMBERS
    x, y, radius, _ = (value[:, 0] for value in trajectories(scenes, 8, start=start))
    for clip in range(4):
        for frame in range(2):
            for last in range(2):
                # across: sine, cosine of both ends come first; the token's centre minus the phase is the object
                sine, cosine = targets[clip, frame, 2, 5, last], targets[clip, frame, 2, 5, 2 + last]
                found = ((5 + 0.5) / 8 - torch.atan2(sine, cosine) / (2 * pi)) % 1
                assert found.item() == pytest.approx(x[clip, 4 * frame + 3 * last].item() % 1, abs=1e-4)
                sine, cosine = targets[clip, frame, 2, 5, 4 + last], targets[clip, frame, 2, 5, 6 + last]
                found = ((2 + 0.5) / 8 - torch.atan2(sine, cosine) / (2 * pi)) % 1
                assert found.item() == pytest.approx(y[clip, 4 * frame + 3 * last].item() % 1, abs=1e-4)
            size = targets[clip, frame, 0, 0, 8 * len(HARMONICS)]
            assert torch.equal(size, targets[clip, frame, 7, 3, 8 * len(HARMONICS)])
            assert size.item() == pytest.approx(2 * (radius[clip, 4 * frame] / 0.172).log().item(), abs=1e-4)


def test_rates_of_motion_have_the_direction_of_the_caption() -> None:
    scenes = sample_scenes(200, torch.Generator().manual_seed(0))
    targets = pose_targets(scenes, torch.zeros(200, dtype=torch.long), latent_frames=2, stride=4, rows=2)
    across, down, growth, spin, orbit = targets[:, 0, -5:].unbind(-1)
    expected = {
        "moves right": across,
        "moves left": -across,
        "moves up": -down,
        "moves down": down,
        "grows": growth,
        "shrinks": -growth,
        "spins clockwise": spin,
        "spins counterclockwise": -spin,
        "orbits clockwise": orbit,
        "orbits counterclockwise": -orbit,
    }
    for name, rate in expected.items():
        chosen = scenes.motion[:, 0] == MOTIONS.index(name)
        assert (rate[chosen] > 0.5).all()
        assert (rate[chosen] < 2).all()
        others = [
            other[chosen].abs().max() for other in (growth, spin, orbit) if not torch.equal(other.abs(), rate.abs())
        ]
        assert max(others) == 0
    still = scenes.motion[:, 0] == MOTIONS.index("stays still")
    assert targets[still][..., -5:].abs().max() == 0


def test_every_token_sees_the_pose_of_the_object_nearest_to_it() -> None:
    scenes = sample_scenes(60, torch.Generator().manual_seed(0), two_object_fraction=0.5)
    start, rows = torch.arange(60) % 30, 6
    targets = pose_targets(scenes, start, latent_frames=2, stride=4, rows=rows).unflatten(1, (2, rows, rows))
    x, y, radius, _ = trajectories(scenes, 8, start=start)
    chosen = set()
    for clip in range(60):
        for frame, row, col in ((0, 1, 4), (0, 5, 0), (1, 2, 2), (1, 4, 5)):
            distances = []
            for place in range(1 + int(scenes.present[clip, 1])):
                gaps = [((c + 0.5) / rows - p[clip, place, 4 * frame]) % 1 for c, p in ((col, x), (row, y))]
                distances.append(sum(1 - torch.cos(2 * pi * gap) for gap in gaps))
            nearest = int(torch.stack(distances).argmin())
            size = targets[clip, frame, row, col, 8 * len(HARMONICS)]
            assert size.item() == pytest.approx(2 * (radius[clip, nearest, 4 * frame] / 0.172).log().item(), abs=1e-4)
            chosen.add(nearest)
    assert chosen == {0, 1}


def test_attribute_targets_are_what_captions_say_of_the_object_of_each_colour() -> None:
    scenes = sample_scenes(40, torch.Generator().manual_seed(1), two_object_fraction=0.5)
    traits = [*SHAPES, *SIZES, *MOTIONS]
    names = [*BACKGROUNDS, *COLOURS, *(f"{colour} {trait}" for colour in COLOURS for trait in traits)]
    targets, counted = attribute_targets(scenes)
    assert targets.shape == counted.shape == (40, ATTRIBUTES)
    for scene, row, counts in zip(scenes.scenes(), targets, counted):
        said = {scene.background, *(item.colour for item in scene.objects)}
        for item in scene.objects:
            said |= {f"{item.colour} {trait}" for trait in (item.shape, item.size, item.motion) if trait}
        assert {name for name, value in zip(names, row.tolist()) if value} == said
        asked = {f"{item.colour} {trait}" for item in scene.objects for trait in traits}
        assert {name for name, value in zip(names, counts.tolist()) if value} == asked | {*BACKGROUNDS, *COLOURS}


def test_late_starts_show_later_frames_of_the_same_scenes() -> None:
    clips = batch(8, count=16, late_start_fraction=0.5)
    assert (clips.start == 0).any()
    assert (clips.start > 0).any()
    whole = batch(40, count=16)
    for clip, start in enumerate(clips.start.tolist()):
        torch.testing.assert_close(clips.pixels[clip], whole.pixels[clip, :, start : start + 8])


def test_sigma_draws_of_a_batch_fill_the_quantiles_of_their_distribution() -> None:
    sigma = sample_sigma(64, 2, shift=6.0, spread=1.4, generator=torch.Generator().manual_seed(0))
    assert sigma.shape == (64, 2)
    u = sigma / (6 - 5 * sigma)
    quantiles = torch.special.ndtr(torch.logit(u) / 1.4).flatten().sort().values
    assert ((quantiles * 128).floor() == torch.arange(128)).float().mean() > 0.97


def test_the_quantile_of_a_level_inverts_its_draw() -> None:
    generator = torch.Generator().manual_seed(0)
    sigma = sample_sigma(4000, 1, shift=4.0, spread=1.3, generator=generator)
    quantile = sigma_quantile(sigma, shift=4.0, spread=1.3).flatten().sort().values
    torch.testing.assert_close(quantile, (torch.arange(4000) + 0.5) / 4000, atol=3e-4, rtol=0)


def test_balanced_errors_count_equally_at_every_level_and_for_every_kind() -> None:
    balance = LevelBalance(2, shift=4.0, spread=1.3)
    generator = torch.Generator().manual_seed(0)
    for kind, scale in ((0, 1.0), (1, 0.1)) * 60:
        sigma = sample_sigma(64, 2, shift=4.0, spread=1.3, generator=generator)
        error = (scale * sigma**4).requires_grad_()
        loss = balance(error, sigma, kind)
    assert loss.item() == pytest.approx(1, abs=0.05)
    loss.backward()
    assert error.grad is not None
    share = error.grad * error.detach() * error.numel()  # every element's part of the loss, 1 on average
    high, low = share[sigma > 0.9].mean(), share[sigma < 0.6].mean()
    assert high.item() == pytest.approx(1, abs=0.1)
    assert low.item() == pytest.approx(1, abs=0.25)


def test_a_stage_has_its_own_motions_shapes_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    only = dict.fromkeys(MOTIONS, 0.0) | {"orbits clockwise": 1.0}
    stars = dict.fromkeys(SHAPES, 0.0) | {"star": 1.0}
    medians = []
    for shift in (None, 40.0):
        stage = StageConfig(
            latent_frames=1, batch_size=64, steps=1, sizes=(32,), shift=shift, motion_weights=only, shape_weights=stars
        )
        settings = config(stage, two_object_fraction=0.0)
        vae, model = make_models(settings)
        levels, clips = [], []

        def made(*args: Any, clips: list = clips, **options: Any) -> ClipBatch:
            clips.append(procedural_batch(*args, **options))
            return clips[0]

        def weight(sigma: torch.Tensor, std: list[float], levels: list = levels) -> torch.Tensor | float:
            levels.append(sigma)
            return unit_variance_weight(sigma, std)

        monkeypatch.setattr(recipe, "procedural_batch", made)
        monkeypatch.setattr(recipe, "unit_variance_weight", weight)
        ema = ParameterEma(model, 0.9)
        recipe.train_step(model, recipe.make_optimizers(model, settings), ema, vae, settings, 0)
        drawn = [scene.objects[0] for scene in clips[0].scenes.scenes()]
        assert {(item.shape, item.motion) for item in drawn} == {("star", "orbits clockwise")}
        medians.append(levels[0].median().item())
    assert medians[0] < 0.85 < 0.95 < medians[1]
    for wrong in ({"shift": 0.0}, {"motion_weights": {"hops": 1.0}}, {"shape_weights": {"heart": 1.0}}):
        with pytest.raises(ConfigError, match=r"shift must be positive|'hops'|'heart'"):
            StageConfig(latent_frames=1, batch_size=1, steps=1, **wrong)


def test_a_model_goes_on_with_more_channels_where_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small, other = (TokenAutoencoder(channels, components=12, dim=8, num_blocks=1) for channels in (4, 6))
    for name, vae in (("small", small), ("large", with_channels(small, 2)), ("other", other)):
        vae.save_pretrained(tmp_path / name)
    _, model = make_models(config(autoencoder=str(tmp_path / "small")))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    about = replace(TINY, height=32, width=32)
    SparseForcingPipeline(model.transformer, model.text_encoder, small, about).save_pretrained(tmp_path / "model")
    settings = config(init_from=str(tmp_path / "model"), autoencoder=str(tmp_path / "large"))
    vae, grown = make_models(settings)
    assert vae.latent_channels == 6
    x, t, text = torch.randn(2, 6, 2, 4, 4), torch.full((2, 2), 700.0), model.text_encoder.encode(["a red star"] * 2)
    with torch.no_grad():
        old = model.transformer(x[:, :4], t, text, policy=ParallelAttention(2))
        new = grown.transformer(x, t, text, policy=ParallelAttention(2))
    torch.testing.assert_close(new[:, :4], old)
    ema = ParameterEma(grown, 0.9)
    recipe.train_step(grown, recipe.make_optimizers(grown, settings), ema, vae, settings, 0)
    with pytest.raises(ConfigError, match="do not begin like those"):
        make_models(replace(settings, autoencoder=str(tmp_path / "other")))
    for wrong in ({"ffn_dim": 32}, {"text_dim": 16}, {"num_layers": 3}):
        with pytest.raises(ConfigError, match="another shape than this config"):
            make_models(replace(settings, **wrong))


def test_a_text_encoder_that_gets_neighbours_begins_where_it_was_and_is_taught_them(tmp_path: Path) -> None:
    vae, model = make_models(config())
    about = replace(TINY, height=32, width=32, vae="patch")
    SparseForcingPipeline(model.transformer, model.text_encoder, vae, about).save_pretrained(tmp_path / "model")
    captions = ["a red star spins clockwise while a small blue ring rests on white", ""]
    learned = {}
    for neighbours in (0, 3):
        settings = config(init_from=str(tmp_path / "model"), text_neighbours=neighbours)
        _, grown = make_models(settings)
        before = grown.text_encoder.encode(captions)
        torch.testing.assert_close(before, model.text_encoder.encode(captions))
        recipe.pretrain_text(grown, settings)
        learned[neighbours] = not torch.equal(grown.text_encoder.encode(captions), before)
    assert learned == {0: False, 3: True}
    SparseForcingPipeline(grown.transformer, grown.text_encoder, vae, about).save_pretrained(tmp_path / "grown")
    _, again = make_models(replace(settings, init_from=str(tmp_path / "grown")))
    learnt = again.text_encoder.encode(captions)
    torch.testing.assert_close(learnt, grown.text_encoder.encode(captions))
    recipe.pretrain_text(again, settings)
    assert torch.equal(again.text_encoder.encode(captions), learnt)  # only its new head learns
    for other in (0, 5):
        with pytest.raises(ConfigError, match=f"text_neighbours: .*grown has 3, got {other}"):
            make_models(replace(settings, init_from=str(tmp_path / "grown"), text_neighbours=other))


def test_a_mixed_stage_learns_continuations_and_first_chunks_of_as_many_frames() -> None:
    mixed = StageConfig(latent_frames=6, batch_size=4, steps=400, continuation=0.25)
    settings = config(StageConfig(latent_frames=1, batch_size=2, steps=3), mixed)
    assert recipe.part_at(settings, 2) == settings.stages[0]
    parts = [recipe.part_at(settings, 3 + step) for step in range(400)]
    going_on = [part for part in parts if part.continuation]
    assert 60 < len(going_on) < 140
    assert set(going_on) == {replace(mixed, continuation=1.0)}
    assert set(parts) - set(going_on) == {replace(mixed, latent_frames=2, batch_size=12, continuation=0.0)}


def test_steps_draw_a_size_and_keep_the_number_of_pixels() -> None:
    settings = config(StageConfig(latent_frames=1, batch_size=8, steps=400, sizes=(32, 32, 32, 64)))
    parts = [recipe.part_at(settings, step) for step in range(400)]
    assert {(part.sizes, part.batch_size) for part in parts} == {((32,), 8), ((64,), 2)}
    assert 60 < sum(part.sizes == (64,) for part in parts) < 140
    model = TextToVideo(settings, STD)
    assert [model.task(replace(parts[0], sizes=(size,))) for size in (32, 64)] == [0, 2]


@pytest.mark.parametrize("continuation", [0.0, 1.0])
def test_a_chunk_sees_itself_and_the_clean_chunks_before_it(continuation: float) -> None:
    torch.manual_seed(0)
    settings = config(StageConfig(latent_frames=6, batch_size=1, steps=1, continuation=continuation))
    model = TextToVideo(settings, STD).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    latents = torch.randn(1, 4, 6, 2, 2)
    noisy = latents[:, :, 2:] if continuation else latents
    inputs = recipe.forcing_inputs(
        latents, replace(settings, context_noise=0.0), settings.stages[0], torch.Generator().manual_seed(0)
    )
    text = model.text_encoder.encode(["a red circle"])
    noisy = torch.randn_like(noisy)
    context = inputs["clean_hidden_states"].requires_grad_()
    noisy.requires_grad_()
    flow = model.transformer(noisy, torch.full((1, noisy.shape[2]), 500.0), text, **inputs)
    first = 1 if continuation else 0
    for number in range(noisy.shape[2] // 2):
        seen_context, seen_noisy = torch.autograd.grad(
            flow[:, :, 2 * number : 2 * number + 2].square().sum(),
            (context, noisy),
            retain_graph=True,
            allow_unused=True,
        )
        of_context = [bool(seen_context[:, :, 2 * i : 2 * i + 2].any()) for i in range(2)]
        of_noisy = [bool(seen_noisy[:, :, 2 * i : 2 * i + 2].any()) for i in range(noisy.shape[2] // 2)]
        assert of_context == [i < number + first for i in range(2)]
        assert of_noisy == [i == number for i in range(len(of_noisy))]


@pytest.mark.parametrize("name", ["pose", "course"])
def test_losses_of_tokens_reach_their_inner_layer(name: str) -> None:
    settings = config()
    model = TextToVideo(settings, STD)
    vae, _ = make_autoencoder(settings)

    def loss(clips: ClipBatch) -> torch.Tensor:
        return getattr(recipe.training_loss(model, vae, clips, settings, settings.stages[0], 0), name)

    loss(batch(4)).backward()
    assert getattr(model, f"{name}_head").weight.grad is not None
    assert model.transformer.patch_embedding.weight.grad.any()
    blocks = [any(p.grad is not None for p in block.parameters()) for block in model.transformer.blocks]
    assert blocks == ([True, True] if name == "pose" else [True, False])
    # a course is that of one object, and told by captions only
    assert (loss(batch(4, two_object_fraction=1.0)) == 0) == (name == "course")
    dropped = batch(4)
    dropped.captions[:] = [""] * len(dropped.captions)
    assert (loss(dropped) == 0) == (name == "course")


def test_courses_are_where_scenes_take_their_objects() -> None:
    scenes, rows = sample_scenes(400, torch.Generator().manual_seed(0)), 16
    courses = course_targets(scenes, rows).unflatten(1, (rows, rows))
    x, y, _, _ = (value[:, 0] for value in trajectories(scenes, 2))
    moved = torch.stack([x, y], -1).diff(dim=1)[:, 0]
    told = torch.tensor([MOTIONS[m].startswith(("moves", "orbits")) for m in scenes.motion[:, 0]])
    assert torch.equal(told, courses.flatten(1).any(1))
    assert sum(MOTIONS[m].startswith("orbits") for m in scenes.motion[:, 0]) > 20
    row, col = ((value[:, 0] * rows).long().clamp(0, rows - 1) for value in (y, x))
    course = courses[torch.arange(len(scenes)), row, col]
    cosine = torch.nn.functional.cosine_similarity(course, moved, dim=1)
    assert cosine[told].min() > 0.9
    torch.testing.assert_close(course[told].norm(dim=1), torch.ones(int(told.sum())))


@pytest.mark.slow
def test_the_text_encoder_learns_what_captions_name() -> None:
    settings = config(text_dim=32, text_steps=1)
    model = TextToVideo(settings, STD)
    early = recipe.pretrain_text(model, settings)
    assert recipe.pretrain_text(model, replace(settings, text_steps=60)) < 0.6 * early


def test_the_attribute_loss_reaches_the_text_encoder_and_leaves_dropped_captions_out() -> None:
    settings = config()
    model = TextToVideo(settings, STD)
    vae, _ = make_autoencoder(settings)
    clips = batch(4)
    clips.captions[1] = ""

    def loss() -> torch.Tensor:
        return recipe.training_loss(model, vae, clips, settings, settings.stages[0], 0).attribute

    told = loss()
    told.backward()
    assert model.text_encoder.token_embedding.weight.grad is not None
    assert model.text_encoder.token_embedding.weight.grad.any()
    assert model.transformer.patch_embedding.weight.grad is None
    clips.scenes.motion[1] = (clips.scenes.motion[1] + 1) % 13
    assert loss() == told
    present = {int(colour) for colour in clips.scenes.colour[clips.scenes.present]}
    traits = model.attribute_head.bias.data[len(BACKGROUNDS) + len(COLOURS) :].view(len(COLOURS), -1)
    traits[min({*range(len(COLOURS))} - present)] += 1
    assert loss() == told
    traits[min(present)] += 1
    assert loss() != told
    clips.scenes.motion[0] = (clips.scenes.motion[0] + 1) % 13
    assert loss() != told
    clips.captions[:] = [""] * len(clips.captions)
    assert loss() == 0


def test_a_request_to_stop_saves_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, train_step = config(), recipe.train_step

    def asked(*arguments: Any):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments)

    monkeypatch.setattr(recipe, "train_step", asked)
    assert recipe.train(settings, tmp_path) == 143
    assert newest(tmp_path).name == "step-00000001"


def test_killed_between_checkpoints_and_resumed_is_bitwise_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (
        StageConfig(latent_frames=1, batch_size=2, steps=3, sizes=(32,)),
        StageConfig(latent_frames=4, batch_size=2, steps=4, sizes=(32,), continuation=0.5),
    )
    settings = config(*stages, loop=PretrainLoop(checkpoint_every=1))
    recipe.train(settings, tmp_path / "whole")
    train_step = recipe.train_step

    def killed(*arguments: Any):
        if arguments[-1] == 2:
            raise KeyboardInterrupt
        return train_step(*arguments)

    monkeypatch.setattr(recipe, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        recipe.train(settings, tmp_path / "out")
    monkeypatch.undo()
    recipe.train(settings, tmp_path / "out")
    assert differences(state(newest(tmp_path / "out")), state(newest(tmp_path / "whole"))) == []
    rows = [json.loads(row) for row in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 7
    losses = {"loss", "continuation_loss", "pose_loss", "course_loss", "attribute_loss"}
    assert rows[-1].keys() == {"step", *losses, "seconds_per_step"}


def test_a_finished_run_leaves_a_model_of_averaged_weights_without_auxiliary_heads(tmp_path: Path) -> None:
    settings = config(loop=PretrainLoop(validate_every=2))
    assert recipe.train(settings, tmp_path) == 0
    pipe = SparseForcingPipeline.from_pretrained(str(tmp_path / "pipeline"))
    assert not [name for name in pipe.transformer.state_dict() if "_head" in name]
    averages = state(newest(tmp_path))["ema.pt"]
    for part in ("transformer", "text_encoder"):
        for name, parameter in getattr(pipe, part).named_parameters():
            assert torch.equal(parameter, averages[f"{part}.{name}"])
    assert len(list((tmp_path / "samples").glob("step-0000002-*.mp4"))) == 2
    further = config(init_from=str(tmp_path / "pipeline"))
    begun = make_models(further)[1]
    assert differences(begun.transformer.state_dict(), pipe.transformer.state_dict()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pose_layer": 2}, "pose_layer: must be a layer from 0 to 1"),
        ({"course_layer": -1}, "course_layer: must be a layer from 0 to 1"),
        ({"stages": (StageConfig(latent_frames=2, batch_size=1, steps=1, continuation=1.0),)}, "more than one chunk"),
        ({"stages": (StageConfig(latent_frames=3, batch_size=1, steps=1),)}, "not a multiple of chunk_frames"),
        ({"optimizer": "sgd"}, "expected muon or adamw"),
        ({"text_neighbours": -1}, "0 or an odd number from 3 on, got -1"),
        ({"text_neighbours": 4}, "0 or an odd number from 3 on, got 4"),
        ({"fit_clips": 0}, "fit_clips: must be positive"),
        ({"stages": ()}, "at least one stage"),
        ({"attention_head_dim": 10**9}, "attention_head_dim: must lie from 6 to 1024"),
        ({"num_layers": 10**6}, "num_layers: must lie from 1 to 256"),
        ({"num_attention_heads": 0}, "num_attention_heads: must lie from 1"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config(), **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sampler.stepz=7", "did you mean sampler.steps?"),
        ("vae=wan", "vae says what the folder holds"),
        ("fps=0", "fps:"),
    ],
)
def test_the_export_refuses_what_does_not_fit(tmp_path: Path, model_folder: Path, capsys, change, message) -> None:
    assert export.main([str(model_folder), "--out", str(tmp_path), "--set", change]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_export_changes_defaults(tmp_path: Path, model_folder: Path) -> None:
    assert export.main([str(model_folder), "--out", str(tmp_path), "--set", "sampler.steps=7"]) == 0
    before, after = read_defaults(model_folder), read_defaults(tmp_path)
    assert after == replace(before, sampler=replace(before.sampler, steps=7))
    assert SparseForcingPipeline.from_pretrained(str(tmp_path)).defaults == after


def test_the_export_takes_the_mean_with_the_model_it_was_tuned_from(tmp_path: Path, model_folder: Path, capsys) -> None:
    start = SparseForcingPipeline.from_pretrained(str(model_folder))
    tuned = SparseForcingPipeline.from_pretrained(str(model_folder))
    for weight in tuned.transformer.parameters():
        weight.data += 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    mean = ["--out", str(tmp_path / "mean"), "--mean-with"]
    assert export.main([str(tmp_path / "tuned"), *mean, str(model_folder)]) == 0
    got = SparseForcingPipeline.from_pretrained(str(tmp_path / "mean"))
    for weight, began in zip(got.transformer.parameters(), start.transformer.parameters(), strict=True):
        torch.testing.assert_close(weight, began + 0.25, atol=0.02, rtol=0.01)
    assert export.main([str(tmp_path / "tuned"), *mean, "tiny"]) == 2
    assert "--mean-with: tiny has a transformer of other sizes" in capsys.readouterr().err
    tuned.text_encoder.norm.bias.data += 0.5
    tuned.save_pretrained(tmp_path / "other")
    assert export.main([str(tmp_path / "other"), *mean, str(model_folder)]) == 2
    assert "has another text encoder" in capsys.readouterr().err
