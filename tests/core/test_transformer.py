"""The transformer: diffusers' keys, shapes of every size, checkpointing, preconditioning, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.model.attention import ParallelAttention, block_causal_mask
from sparse_forcing.model.layers import frame_position_waves
from sparse_forcing.model.transformer import CausalWanTransformer3DModel

SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
}  # fmt: skip


def small(**changes) -> CausalWanTransformer3DModel:
    torch.manual_seed(0)
    model = CausalWanTransformer3DModel(**{**SMALL, **changes}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(frames: int = 3, height: int = 4, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 4, frames, height, width, dtype=torch.float64)
    return x, torch.tensor([900.0, 20.0]), torch.randn(2, 5, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("sizes", "tensors", "parameters"),
    [
        ({}, 825, 1_418_996_800),
        ({"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}, 1095, 14_288_491_584),
        ({"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}, 825, 4_999_787_712),
    ],
    ids=["1.3B", "14B", "5B"],
)
def test_released_sizes(sizes: dict, tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        ours = CausalWanTransformer3DModel(**sizes).state_dict()
        theirs = WanTransformer3DModel(**{"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, **sizes})
    assert len(ours) == tensors
    assert sum(x.numel() for x in ours.values()) == parameters
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.state_dict().items()}


def test_equals_diffusers() -> None:
    model = small()
    theirs = WanTransformer3DModel(**SMALL).double()
    theirs.load_state_dict(model.state_dict())
    x, t, text = inputs()
    # diffusers computes the timestep's sinusoid in float32.
    torch.testing.assert_close(model(x, t, text), theirs(x, t, text, return_dict=False)[0], atol=1e-4, rtol=0)


def test_checkpointing_changes_nothing() -> None:
    x, t, text = inputs()
    gradients = []
    for checkpointing in (False, True):
        model = small()
        model.gradient_checkpointing = checkpointing
        model(x, t, text, policy=ParallelAttention(3, block_causal_mask([1, 2]))).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_one_timestep_for_all_frames_equals_one_per_frame() -> None:
    model, (x, t, text) = small(), inputs()
    torch.testing.assert_close(model(x, t, text), model(x, t[:, None].expand(-1, 3), text))


def test_cached_text_equals_fresh_text() -> None:
    model, (x, t, text) = small(), inputs()
    torch.testing.assert_close(model(x, t, text), model(x, t, text, text_keys_values=model.encode_text(text)))


def test_a_later_chunk_does_not_change_an_earlier_one() -> None:
    model, (x, t, text) = small(), inputs(frames=4)
    policy = ParallelAttention(4, block_causal_mask([2, 2]))
    before = model(x, t, text, policy=policy)
    x[:, :, 2:] += 1
    after = model(x, t, text, policy=policy)
    torch.testing.assert_close(after[:, :, :2], before[:, :, :2])
    assert (after[:, :, 2:] - before[:, :, 2:]).abs().max() > 1e-3


def test_a_fresh_model_predicts_silence() -> None:
    model = CausalWanTransformer3DModel(**SMALL)
    x, t, text = inputs()
    assert model(x.float(), t, text.float()).abs().max() == 0


def test_preconditioned_silence_is_the_best_linear_guess() -> None:
    """With a silent network, x0 = E[x0 | x_t] of independent Gaussian latents with the given deviations."""
    std = [0.5, 1.0, 2.0, 3.0]
    model = CausalWanTransformer3DModel(**SMALL, latent_std=std).double()
    x, t, text = inputs()
    sigma = (t / 1000)[:, None, None, None, None]
    s = torch.tensor(std, dtype=torch.float64)[:, None, None, None]
    x0 = x - sigma * model(x, t, text)
    torch.testing.assert_close(x0, (1 - sigma) * s**2 / (((1 - sigma) * s) ** 2 + sigma**2) * x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_head_dim": 7}, "attention_head_dim"),
        ({"patch_size": (2, 2, 2)}, "patch_size"),
        ({"image_dim": 1280}, "text-to-video"),
        ({"latent_std": [1.0]}, "latent_std"),
    ],
)
def test_unsupported_models_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CausalWanTransformer3DModel(**{**SMALL, **changes})


def test_timesteps_of_the_wrong_shape_are_refused() -> None:
    model, (x, _, text) = small(), inputs()
    with pytest.raises(ConfigError, match="timestep"):
        model(x, torch.zeros(2, 2), text)


@pytest.mark.parametrize("rows", [2, 5])
def test_position_waves_name_the_place_of_a_token_whatever_the_grid(rows: int) -> None:
    cols, harmonics = 4, 3
    waves = frame_position_waves(rows, cols, harmonics, torch.device("cpu")).unflatten(0, (rows, cols))
    for row in range(rows):
        for col in range(cols):
            for axis, share in enumerate(((col + 0.5) / cols, (row + 0.5) / rows)):
                sines, cosines = waves[row, col].unflatten(0, (2, 2, harmonics))[axis]
                turns = torch.tensor([2 * math.pi * share * k for k in (1, 2, 3)])
                torch.testing.assert_close(sines, turns.sin())
                torch.testing.assert_close(cosines, turns.cos())


def test_position_embedding_breaks_the_symmetry_that_relative_positions_leave() -> None:
    """On a constant picture every place of a frame would otherwise look the same but for the edges of attention."""
    x, t, text = inputs()
    x = torch.ones_like(x)
    plain, placed = small(num_layers=0)(x, t, text), small(num_layers=0, position_harmonics=2)(x, t, text)
    patches = plain.unfold(3, 2, 2).unfold(4, 2, 2)
    assert torch.equal(patches, patches[:, :, :1, :1, :1].expand_as(patches))
    patches = placed.unfold(3, 2, 2).unfold(4, 2, 2)
    assert not torch.allclose(patches[:, :, 0, 0, 0], patches[:, :, 0, 1, 2])
    torch.testing.assert_close(patches[:, :, 0], patches[:, :, 2])  # the same in every frame


def test_position_embedding_comes_only_when_asked_for() -> None:
    assert not [name for name in small().state_dict() if name.startswith("position_embedder")]
    assert "position_embedder.weight" in small(position_harmonics=1).state_dict()
