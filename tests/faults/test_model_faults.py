"""Model folders whose parts do not fit, weights that are not numbers, text that is cut, embeddings that are odd."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from sparse_forcing.cli import main
from sparse_forcing.errors import ConfigError, SparseForcingError, WeightsError
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import WanAutoencoder
from sparse_forcing.sampling.generation import settings as generation_settings
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.scenes.roles import role_remarks

WEIGHTS = "diffusion_pytorch_model.safetensors"
VIDEO: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 9, "num_inference_steps": 1}
WORDS = "a cat dog red ball rolls slowly".split()


def save_transformer(folder: Path, **changes: Any) -> None:
    torch.manual_seed(0)
    sizes = {"in_channels": 16, "out_channels": 16, "text_dim": 32, "ffn_dim": 32, "num_layers": 1, "freq_dim": 16}
    model = CausalWanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, **sizes | changes)
    model.save_pretrained(folder / "transformer")


def save_tokenizer(folder: Path, words: list[str]) -> None:
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: 3 + number for number, word in enumerate(words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Wan 2.1 folder in diffusers' layout."""
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    save_transformer(folder)
    AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, z_dim=16).save_pretrained(folder / "vae")
    config = UMT5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    save_tokenizer(folder, WORDS)
    return folder


@pytest.fixture(scope="module")
def pipe(wan: Path) -> SparseForcingPipeline:
    return SparseForcingPipeline.from_pretrained(str(wan))


def as_flags(**settings: Any) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / part)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("vae"), "the model has no folder vae"),
        (without("text_encoder"), "the model has no folder text_encoder"),
        (without("tokenizer"), "the model has no folder tokenizer"),
        (lambda folder: save_transformer(folder, in_channels=8), "in_channels 8, the latents of vae have 16"),
        (lambda folder: save_transformer(folder, out_channels=8), "transformer has out_channels 8"),
        (lambda folder: save_transformer(folder, text_dim=24), "text_dim 24, text_encoder makes embeddings of 32"),
        (lambda folder: save_tokenizer(folder, [f"w{n}" for n in range(60)]), "63 tokens, text_encoder only 40"),
    ],
)
def test_parts_that_do_not_fit_are_named(wan: Path, tmp_path: Path, damage: Any, message: str) -> None:
    shutil.copytree(wan, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(WeightsError, match=message) as error:
        SparseForcingPipeline.from_pretrained(str(tmp_path / "model"))
    assert str(tmp_path / "model") in str(error.value)
    assert "http" not in str(error.value)


def test_a_converted_transformer_runs_with_parts_copied_beside_it(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    assert main(["convert", str(wan / "transformer" / WEIGHTS), str(model), "--head-dim", "12"]) == 0
    with pytest.raises(WeightsError, match="the model has no folder text_encoder"):
        SparseForcingPipeline.from_pretrained(str(model))
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(wan / part, model / part)
    flags = as_flags(**VIDEO)
    assert main(["generate", "a cat", "--model", str(model), "--output", str(tmp_path / "c.mp4"), *flags]) == 0
    (model / "transformer" / "extra.txt").write_text("x")
    with pytest.raises(WeightsError, match=r"extra.txt: not listed"):
        SparseForcingPipeline.from_pretrained(str(model))


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_weights_that_are_no_numbers_are_named(
    wan: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(wan, model)
    tensors = load_file(model / part / WEIGHTS)
    name = {"transformer": "blocks.0.attn1.to_q.weight", "vae": "post_quant_conv.weight"}[part]
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, model / part / WEIGHTS, metadata={"format": "pt"})
    # A NaN query comes out of a CPU's attention as zero, so the transformer's weights are looked at when it is loaded.
    message = {
        "transformer": f"transformer: tensor {name} holds NaN",
        "vae": f"chunk 1 of the video came out as NaN: {part} tensor .*{name}",
    }[part]
    with pytest.raises(WeightsError, match=message):
        SparseForcingPipeline.from_pretrained(str(model))("a cat", **VIDEO)
    if part == "transformer":
        assert main(["convert", str(model / part / WEIGHTS), str(tmp_path / "new"), "--head-dim", "12"]) == 2
        assert f"tensor {name} holds NaN" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def test_a_nan_that_no_weight_explains_is_said_too(pipe: SparseForcingPipeline) -> None:
    shape = (1, 3, 16, 2, 2)
    with pytest.raises(SparseForcingError, match=r"though all weights are finite.*--dtype"):
        pipe("a cat", latents=torch.full(shape, float("inf")), **VIDEO)


def test_text_beyond_the_limit_is_said_wherever_it_comes_from(pipe: SparseForcingPipeline) -> None:
    long = "a cat " * 300
    expected = r"prompt cut to its first 512 tokens, which is what the text encoder reads: 'a cat a cat"
    for arguments in (
        {"prompt": long},
        {"prompt": "a cat", "negative_prompt": long, "guidance_scale": 2.0},
        {"prompt": "a cat", "prompt_changes": {9: long}, "num_frames": 21},
    ):
        with pytest.warns(UserWarning, match=expected):
            pipe.stream(**VIDEO | arguments)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.stream("a cat " * 255, **VIDEO)  # 510 words and the end
    assert len(pipe.prompt_remarks([long, long, "a cat"])) == 1


def test_what_was_cut_is_kept_beside_the_video(wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = as_flags(**VIDEO | {"num_frames": 21})
    then = ["--then", "0.5", "a dog " * 300]
    assert main(["generate", "a cat", "--model", str(wan), "--output", str(tmp_path / "c.mp4"), *flags, *then]) == 0
    (kept,) = json.loads((tmp_path / "c.json").read_text())["warnings"]
    assert kept.startswith("prompt cut to its first 512 tokens")
    assert kept in capsys.readouterr().err


def test_short_embeddings_are_padded_with_zeros_and_odd_ones_refused(pipe: SparseForcingPipeline) -> None:
    whole = pipe.encode_prompt(["a red ball"])
    seeded = {**VIDEO, "guidance_scale": 2.0}
    frames = [
        pipe(prompt_embeds=embeds, generator=torch.Generator().manual_seed(0), **seeded).frames
        for embeds in (whole, whole[:, :4], whole[:, :100])
    ]
    for other in frames[1:]:
        np.testing.assert_array_equal(other, frames[0])
    for embeds, message in (
        (torch.cat([whole, whole[:, :1]], 1), "1 to 512 tokens"),
        (whole[:, :0], "1 to 512 tokens"),
        (whole[:0], "at least one prompt"),
        (whole * float("nan"), "holds NaN"),
        (whole[..., :5], "expected floats of shape"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipe(prompt_embeds=embeds, **VIDEO)


def test_guidance_of_one_or_less_is_none_as_in_diffusers(pipe: SparseForcingPipeline) -> None:
    def frames(scale: float) -> np.ndarray:
        return pipe("a cat", guidance_scale=scale, generator=torch.Generator().manual_seed(0), **VIDEO).frames

    plain = frames(1.0)
    for scale in (0, 0.5):
        np.testing.assert_array_equal(frames(scale), plain)
    with pytest.warns(UserWarning, match="negative_prompt has no effect without guidance"):
        pipe.stream("a cat", negative_prompt="a dog", guidance_scale=0.0, **VIDEO)


def test_types_of_weights_are_taken_by_name_or_refused(wan: Path) -> None:
    assert SparseForcingPipeline.from_pretrained(str(wan), torch_dtype="bfloat16").dtype == torch.bfloat16
    for odd in ("bfloat", "float64", torch.int8, 16):
        with pytest.raises(ConfigError, match="torch_dtype: expected one of float32, bfloat16, float16"):
            SparseForcingPipeline.from_pretrained(str(wan), torch_dtype=odd)  # type: ignore[arg-type]


def test_loading_a_folder_warns_of_nothing_that_its_user_could_change(wan: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        SparseForcingPipeline.from_pretrained(str(wan))
        WanAutoencoder.from_pretrained(wan / "vae")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize("where", [UMT5EncoderModel, CausalWanTransformer3DModel])
def test_out_of_memory_while_loading_names_what_helps(
    wan: Path, error: Exception, where: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(where, "from_pretrained", fail)
    with pytest.raises(SparseForcingError, match=r"out of memory while model .* --dtype .* --text-encoder-device"):
        SparseForcingPipeline.from_pretrained(str(wan))


def test_out_of_memory_while_reading_text_names_what_helps(
    pipe: SparseForcingPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(pipe.text_encoder, "forward", fail)
    with pytest.raises(SparseForcingError, match=r"while the text encoder read the prompt.*--text-encoder-device"):
        pipe.stream("what was not read before", **VIDEO)


@pytest.mark.parametrize("value", [0, -24, 2.5, 10**12, 1e30, "x", None, True])
def test_absurd_sizes_are_named(wan: Path, tmp_path: Path, value: Any) -> None:
    shutil.copytree(wan, tmp_path / "model")
    path = tmp_path / "model" / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_head_dim": value}))
    with pytest.raises(
        WeightsError, match=r"config.json: attention_head_dim (must be a whole number from 1|is 10{12}, but sizes)"
    ):
        SparseForcingPipeline.from_pretrained(str(tmp_path / "model"))


@pytest.mark.parametrize("value", [1, 2, 7, 10**9])
def test_absurd_head_dimensions_are_refused_by_convert(
    wan: Path, tmp_path: Path, value: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(wan / "transformer" / WEIGHTS), str(tmp_path / "new"), "--head-dim", str(value)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "head dimension" in error


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a white triangle on a green background", ["'white' as a background only", "'green' as the colour"]),
        ("a dark green star stays still over white", ["'dark green' as a background only"]),
        ("a red ring moves up on pink", ["'pink' as the colour"]),
        ("over orange, a Grey disc drifts left", ["'orange' as the colour", "'gray' as a background"]),
        ("a small blue ring grows on navy blue and a violet square spins clockwise on a dark green backdrop", []),
        ("a red circle moves right on a plain black background", []),
        ("a circle", []),
        ("", []),
    ],
)
def test_words_in_roles_that_were_never_learned_are_said(prompt: str, said: list[str]) -> None:
    remarks = role_remarks(prompt)
    assert len(remarks) == len(said)
    assert all(part in remark for part, remark in zip(said, remarks))


def test_captions_that_were_learned_from_need_no_remark() -> None:
    import random

    from sparse_forcing.scenes.captions import caption
    from sparse_forcing.scenes.sample import sample_scenes

    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    scenes = sample_scenes(2000, generator, two_object_fraction=0.5, split="all").scenes()
    assert [text for text in (caption(scene, rng) for scene in scenes) if role_remarks(text)] == []


def test_the_embedded_model_remarks_on_roles() -> None:
    pipe = SparseForcingPipeline.from_pretrained("tiny")
    (white, green) = pipe.prompt_remarks(["a white triangle stays still on a green background"])
    assert "'white'" in white
    assert "'green'" in green


@pytest.mark.parametrize("memory", ["full", "window", "sink", "sparse", "heavy_hitter"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_cache_of_a_live_video_stays_within_its_bound(
    pipe: SparseForcingPipeline, memory: str, guidance: float
) -> None:
    from sparse_forcing.sampling.generation.jobs import GenerateConfig
    from sparse_forcing.sampling.live import cache_bound

    knobs = {"tile": (3, 2, 1), "persistent_blocks": 2} if memory in ("sparse", "heavy_hitter") else {}
    config = GenerateConfig(
        num_frames=69, height=32, width=32, num_inference_steps=1, guidance_scale=guidance, memory=memory, **knobs
    )  # type: ignore[arg-type]
    settings = generation_settings.resolve_settings(config, pipe)
    chunks = pipe.stream(
        "a cat",
        height=32,
        width=32,
        num_frames=69,
        num_inference_steps=1,
        guidance_scale=guidance,
        memory=settings.memory,
        reserve_cache=False,
    )
    most = max(chunk.cache_bytes for chunk in chunks)
    assert most <= cache_bound(pipe, settings) <= 4 * most
