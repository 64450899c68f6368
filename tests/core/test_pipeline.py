"""The pipeline on a small random model: shapes, streaming, seeds, continuation, saved folders."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.media.video import to_uint8
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.geometry import VideoGeometry
from sparse_forcing.model.text import WordTextEncoder
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import PatchAutoencoder
from sparse_forcing.model_folder.folder import PipelineConfig
from sparse_forcing.model_folder.remarks import folder_remarks
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.weights.manifest import MANIFEST

PROMPT = "a red ball"


@pytest.fixture(scope="module")
def pipe() -> SparseForcingPipeline:
    torch.manual_seed(0)
    vae = PatchAutoencoder(latent_channels=12)
    std = vae.fit(torch.rand(4, 3, 8, 32, 32) * 2 - 1)
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
        pooled_text=True,
        latent_std=std,
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    config = PipelineConfig(
        fps=8.0,
        height=32,
        width=32,
        num_frames=20,
        text_encoder="words",
        vae="patch",
        sampler=SamplerConfig(kind="euler", steps=2, shift=6.0, guidance_scale=2.0),
        memory=MemoryConfig(kind="sparse", window_frames=4, tile=(2, 2, 2), persistent_blocks=2, density=0.5),
    )
    text = WordTextEncoder(["a", "ball", "blue", "red"], dim=16, num_layers=1, text_len=6)
    return SparseForcingPipeline(transformer.eval(), text.eval(), vae, config)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_call_returns_the_requested_frames(pipe):
    out = pipe(PROMPT, num_frames=13, height=24, width=40, generator=seeded())
    assert out.frames.shape == (1, 13, 24, 40, 3)
    assert out.frames.dtype == np.float32
    assert 0 <= out.frames.min() <= out.frames.max() <= 1


def test_defaults_come_from_the_model(pipe):
    assert pipe(PROMPT, generator=seeded()).frames.shape == (1, 20, 32, 32, 3)


def test_streamed_chunks_join_to_the_call(pipe):
    whole = pipe(PROMPT, num_frames=24, generator=seeded()).frames[0]
    chunks = list(pipe.stream(PROMPT, num_frames=24, generator=seeded()))
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    np.testing.assert_array_equal(np.concatenate([chunk.frames for chunk in chunks]), whole)
    assert all(chunk.seconds > 0 and chunk.cache_bytes > 0 for chunk in chunks)


def test_the_beginning_does_not_depend_on_the_length(pipe):
    short = pipe(PROMPT, num_frames=16, generator=seeded()).frames[0]
    long = pipe(PROMPT, num_frames=48, generator=seeded()).frames[0]
    np.testing.assert_array_equal(short, long[:16])


def test_a_sample_does_not_depend_on_its_batch(pipe):
    alone = pipe("a blue ball", num_frames=16, generator=[seeded(7)]).frames[0]
    batch = pipe([PROMPT, "a blue ball"], num_frames=16, generator=[seeded(3), seeded(7)]).frames[1]
    np.testing.assert_allclose(alone, batch, atol=2e-5)


def test_equal_seeds_give_equal_bytes_and_others_do_not(pipe):
    first, again, other = (pipe(PROMPT, num_frames=8, generator=seeded(s)).frames for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_prompts_and_guidance_matter(pipe):
    base = pipe(PROMPT, num_frames=8, generator=seeded()).frames
    assert np.abs(base - pipe("a blue ball", num_frames=8, generator=seeded()).frames).max() > 1e-4
    assert np.abs(base - pipe(PROMPT, num_frames=8, generator=seeded(), guidance_scale=1.0).frames).max() > 1e-4


def test_given_noise_replaces_random_noise(pipe):
    noise = torch.randn(1, 4, 12, 4, 4)
    one, two = (pipe(PROMPT, num_frames=16, latents=noise, generator=seeded(s)).frames for s in (0, 1))
    np.testing.assert_array_equal(one, two)
    with pytest.raises(ConfigError, match="latents"):
        pipe(PROMPT, num_frames=24, latents=noise)


def test_prompt_embeds_equal_their_prompt(pipe):
    embeds = pipe.encode_prompt([PROMPT])
    expected = pipe(PROMPT, num_frames=8, generator=seeded()).frames
    np.testing.assert_array_equal(pipe(prompt_embeds=embeds, num_frames=8, generator=seeded()).frames, expected)


def test_a_video_or_an_image_is_continued(pipe):
    plain = pipe(PROMPT, num_frames=8, generator=seeded()).frames
    video = np.full((16, 32, 32, 3), 0.9, np.float32)
    assert np.abs(pipe(PROMPT, num_frames=8, generator=seeded(), video=video).frames - plain).max() > 1e-4
    assert np.abs(pipe(PROMPT, num_frames=8, generator=seeded(), image=video[0]).frames - plain).max() > 1e-4
    with pytest.raises(ConfigError, match="whole chunks"):
        pipe(PROMPT, num_frames=8, video=video[:7])


def test_a_picture_is_the_first_frame_and_the_chunks_follow_it(pipe):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    chunks = list(pipe.stream(PROMPT, num_frames=17, generator=seeded(), image=picture))
    assert [len(chunk.frames) for chunk in chunks] == [9, 8]
    np.testing.assert_array_equal(to_uint8(chunks[0].frames[0]), picture)
    frames = pipe([PROMPT] * 2, num_frames=12, generator=seeded(), image=picture).frames
    assert frames.shape == (2, 12, 32, 32, 3)
    np.testing.assert_array_equal(to_uint8(frames[:, 0]), [picture] * 2)


def test_a_video_in_pieces_of_any_length_is_the_same_video(pipe):
    video = np.random.default_rng(0).random((24, 32, 32, 3), np.float32)
    expected = pipe(PROMPT, num_frames=8, generator=seeded(), video=video).frames
    for cuts in ([5, 6, 20], [8, 16], []):
        pieces = iter(np.split(video, cuts))
        np.testing.assert_array_equal(pipe(PROMPT, num_frames=8, generator=seeded(), video=pieces).frames, expected)
    for count in (0, 23):
        with pytest.raises(ConfigError, match=f"{count} frames are not whole chunks"):
            pipe(PROMPT, num_frames=8, video=iter(np.split(video[:count], [10])))


def test_bytes_and_pictures_are_scaled_to_the_range_of_floats(pipe):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    expected = pipe(PROMPT, num_frames=8, generator=seeded(), image=pixels.astype(np.float32) / 255).frames
    for image in (pixels, Image.fromarray(pixels)):
        frames = pipe(PROMPT, num_frames=8, generator=seeded(), image=image).frames
        np.testing.assert_array_equal(frames, expected)


def test_a_million_frames_are_cut_into_chunks_at_once():
    geometry = VideoGeometry(
        temporal_stride=4, spatial_stride=8, first_frame_alone=False, chunk_frames=3, first_chunk_frames=1
    )
    assert geometry.chunks(1_000_000) == [1] + [3] * 333_333
    assert geometry.chunks(5) == [1, 3, 3]
    assert geometry.timeline(20, "video")[0] == [3, 3]
    assert geometry.chunks(0) == []


def test_tile_must_fit_a_learned_selector(pipe, monkeypatch):
    monkeypatch.setattr(
        pipe.transformer, "_internal_dict", FrozenDict({**pipe.transformer.config, "selector_tokens": 8})
    )
    memory = replace(pipe.default_memory, tile=(2, 2, 4))
    with pytest.raises(ConfigError, match=r"--tile.*2 x 2 x 4 is not a block of 8 tokens"):
        pipe.stream(PROMPT, memory=memory)


def test_overlay_map_appears_with_the_first_persistent_block(pipe):
    maps = [chunk.persistent for chunk in pipe.stream(PROMPT, num_frames=40, generator=seeded())]
    assert maps[0] is None
    assert maps[-1].shape == (8, 32, 32)
    assert maps[-1].max() > 0


def test_sparse_cache_stays_flat_while_full_grows(pipe):
    def bytes_of(kind):
        memory = MemoryConfig(**{**pipe.default_memory.__dict__, "kind": kind})
        return [c.cache_bytes for c in pipe.stream(PROMPT, num_frames=96, generator=seeded(), memory=memory)]

    sparse, full = bytes_of("sparse"), bytes_of("full")
    assert sparse[4] == sparse[-1]
    assert full[-1] > 1.5 * sparse[-1]


def test_latents_and_tensors_on_request(pipe):
    assert pipe(PROMPT, num_frames=16, output_type="latent", generator=seeded()).frames.shape == (1, 4, 12, 4, 4)
    assert pipe(PROMPT, num_frames=16, output_type="pt", generator=seeded()).frames.shape == (1, 16, 3, 32, 32)


def test_the_text_encoder_can_stay_on_another_device(pipe):
    def devices(moved: SparseForcingPipeline) -> list[str]:
        parts = (moved.transformer, moved.text_encoder, moved.vae)
        return [next(iter(part.state_dict().values())).device.type for part in parts]

    assert devices(copy.deepcopy(pipe).to("meta")) == ["meta"] * 3
    assert devices(copy.deepcopy(pipe).to("meta", text_encoder_device="cpu")) == ["meta", "cpu", "meta"]


def test_unknown_words_and_long_prompts_are_said(pipe):
    with pytest.warns(UserWarning, match="does not know: dragon"):
        pipe("a red dragon", num_frames=8)
    for prompt, unknown in (
        ("café red", "café"),
        ("大きな ball 3", "3, 大きな"),
        ("a RED_ball", None),
        ("a 2d ball", "2d"),
    ):
        tokenizer = pipe.text_encoder.tokenizer
        assert ", ".join(sorted(tokenizer.unknown_words(prompt))) == (unknown or "")
    for prompt in ("大きな赤い円が右に動く", "🎈🎈 !!!"):
        with pytest.warns(UserWarning, match=f"no word of '{prompt}' is known"):
            pipe(prompt, num_frames=8)
    with pytest.warns(UserWarning, match="first 6 words"):
        pipe("a red ball a red ball a red ball", num_frames=8)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": PROMPT, "height": 30}, "height"),
        ({"prompt": PROMPT, "num_frames": -1}, "num_frames"),
        ({"prompt": PROMPT, "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": PROMPT, "guidance_scale": float("nan")}, "guidance_scale"),
        ({"prompt": PROMPT, "output_type": "gif"}, "output_type"),
        ({"prompt": PROMPT, "generator": [seeded(), seeded()]}, "generator"),
        ({"prompt": [None]}, "prompt: expected str"),
        ({"prompt": 5}, "prompt: expected text"),
        ({"prompt": PROMPT, "negative_prompt": ["a"]}, "negative_prompt: expected str"),
        ({"prompt": PROMPT, "memory": "window"}, "memory: expected MemoryConfig, got 'window'"),
        ({"prompt": PROMPT, "generator": 5}, "generator: expected Generator, got 5"),
        ({"prompt": PROMPT, "num_frames": 2.5}, "num_frames: expected a whole number, got 2.5"),
        ({"prompt": PROMPT, "guidance_scale": "2"}, "guidance_scale: expected Real"),
        ({"prompt": PROMPT, "guidance_scale": float("inf")}, "guidance_scale: a finite number"),
        ({"prompt_embeds": torch.zeros(1, 6, 15)}, "prompt_embeds: expected floats of shape .B, T, 16."),
        ({"prompt": PROMPT, "num_frames": 8, "latents": torch.zeros(1, 2, 11, 4, 4)}, r"latents: .*\[1, 2, 12, 4, 4\]"),
        (
            {"prompt": PROMPT, "num_frames": 16, "latents": torch.zeros(1, 3, 12, 4, 4)},
            r"latents: .*\[1, 4, 12, 4, 4\]",
        ),
        ({"prompt": PROMPT, "image": np.zeros((24, 32, 3))}, "image: 32x24 pixels for a video of 32x32"),
        ({"prompt": PROMPT, "image": np.full((32, 32, 3), np.nan)}, "image: values must lie in .0, 1., got nan"),
        ({"prompt": PROMPT, "image": np.full((32, 32, 3), 255.0)}, "image: values must lie in .0, 1., got 255"),
        ({"prompt": PROMPT, "video": np.zeros((8, 32, 32, 3), np.int64)}, "video: expected uint8 or floats"),
        ({"prompt": PROMPT, "video": [[1], [1, 2]]}, "video: not an array"),
        ({"prompt": PROMPT, "image": np.zeros((32, 32))}, "image: expected .H, W, 3., got .32, 32."),
    ],
)
def test_bad_arguments_are_one_clear_error_at_once(pipe, arguments, word):
    with pytest.raises(ConfigError, match=word):
        pipe(**arguments)
    if "output_type" not in arguments:
        with pytest.raises(ConfigError, match=word):
            pipe.stream(**{"prompt": None, **arguments})  # before the first chunk is asked for


@pytest.mark.parametrize(
    "changes", [{"fps": 0.0}, {"fps": -8.0}, {"fps": float("nan")}, {"height": 0}, {"num_frames": -1}]
)
def test_impossible_defaults_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        PipelineConfig(**changes)


def test_saved_folder_loads_and_generates_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    loaded = SparseForcingPipeline.from_pretrained(str(tmp_path / "model"))
    assert folder_remarks(tmp_path / "model") == []
    assert loaded.defaults == pipe.defaults
    assert len(loaded.weights_sha256) == 64
    expected = pipe(PROMPT, num_frames=8, generator=seeded()).frames
    np.testing.assert_array_equal(loaded(PROMPT, num_frames=8, generator=seeded()).frames, expected)
    loaded.save_pretrained(tmp_path / "again")  # where it was loaded from leaves no trace
    manifests = [(tmp_path / name / MANIFEST).read_text() for name in ("model", "again")]
    assert manifests[0] == manifests[1]


def test_a_flipped_bit_or_a_missing_file_is_named(pipe, tmp_path):
    folder = tmp_path / "model"
    pipe.save_pretrained(folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model.safetensors: SHA-256 differs"):
        SparseForcingPipeline.from_pretrained(str(folder))
    weights.unlink()
    with pytest.raises(WeightsError, match="missing"):
        SparseForcingPipeline.from_pretrained(str(folder))
    (folder / MANIFEST).unlink()
    with pytest.raises(WeightsError, match=r"transformer: cannot be loaded \(no .safetensors file"):
        SparseForcingPipeline.from_pretrained(str(folder))


def test_unknown_model_lists_the_known_ones():
    with pytest.raises(WeightsError, match="not an embedded model"):
        SparseForcingPipeline.from_pretrained("wan-2000")
    with pytest.raises(WeightsError, match="File name too long"):
        SparseForcingPipeline.from_pretrained("n" * 300)
