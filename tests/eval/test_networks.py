"""Networks against plain implementations with random weights, loaded from files under the official names."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import pytest
import torch
from ftfy import fix_text

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.vbench.networks import clip, dino, raft, viclip
from sparse_forcing.eval.vbench.networks.loading import read_state_dict
from sparse_forcing.eval.vbench.networks.tokenizer import ClipTokenizer, byte_alphabet
from sparse_forcing.eval.vbench.suites import vbench_prompts
from tests.eval import plain_networks as plain


def saved(folder: Path, module: torch.nn.Module, seed: int = 0, wrap=lambda state: state) -> tuple[Path, plain.State]:
    # Through the module: parameters with two names get one value.
    module.load_state_dict(plain.randomize(module.state_dict(), seed))
    state = module.state_dict()
    torch.save(wrap(state), folder / "weights.pth")
    return folder / "weights.pth", state


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (32, 112)])
def test_dino_equals_the_plain_one(tmp_path: Path, scaled: bool, height: int, width: int) -> None:
    path, state = saved(tmp_path, dino.DinoTransformer(width=128, depth=2, patch=16, positions=17, scaled=scaled))
    image = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    given = dino.load_dino(path)(image)
    for number in range(2):
        torch.testing.assert_close(given[number], plain.plain_dino(image[number], state, 2), atol=1e-4, rtol=0)


def small_clip() -> clip.Clip:
    visual = clip.ImageEncoder(width=128, layers=2, patch=8, positions=17, embedding=24)
    return clip.Clip(visual=visual, width=64, layers=2, context=12, vocabulary=50, embedding=24)


def test_clip_equals_the_plain_one_and_half_precision_files_load(tmp_path: Path) -> None:
    path, state = saved(tmp_path, small_clip(), wrap=lambda s: {name: value.half() for name, value in s.items()})
    state = {name: value.half().float() for name, value in state.items()}
    network = clip.load_clip(path)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[48, 3, 7, 49, 0, 0], [48, 9, 49, 0, 0, 0]])
    for number in range(2):
        expected = plain.plain_clip_image(image[number], state, 2)
        torch.testing.assert_close(network.encode_image(image)[number], expected, atol=1e-4, rtol=0)
        expected = plain.plain_text(tokens[number], state, 1)
        torch.testing.assert_close(network.encode_text(tokens)[number], expected, atol=1e-4, rtol=0)
    cosines = network(image, tokens)
    one = torch.cosine_similarity(network.encode_image(image)[0], network.encode_text(tokens)[1], dim=0)
    torch.testing.assert_close(cosines[0, 1], one)


def test_clip_equals_transformers(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    path, state = saved(tmp_path, small_clip(), seed=3)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, projection_dim=24, image_size=32, patch_size=8, hidden_act="quick_gelu")
    other = CLIPVisionModelWithProjection(config).eval()
    renamed = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
        "ln_post.weight": "post_layernorm.weight",
        "ln_post.bias": "post_layernorm.bias",
    }
    theirs = {"visual_projection.weight": state["visual.proj"].T}
    theirs |= {f"vision_model.{new}": state[f"visual.{old}"] for old, new in renamed.items()}
    for layer in range(2):
        old, new = f"visual.transformer.resblocks.{layer}", f"vision_model.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            parts = state[f"{old}.attn.in_proj_{kind}"].chunk(3)
            theirs |= {f"{new}.self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts)}
            for ours, name in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                theirs[f"{new}.{name}.{kind}"] = state[f"{old}.{ours}.{kind}"]
    report = other.load_state_dict(theirs, strict=False)
    assert not report.unexpected_keys
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    given = clip.load_clip(path).encode_image(image)
    with torch.no_grad():
        torch.testing.assert_close(given, other(image).image_embeds, atol=1e-4, rtol=0)


def test_viclip_equals_the_plain_one(tmp_path: Path) -> None:
    vision = viclip.VideoEncoder(width=128, layers=2, patch=8, positions=10, embedding=16, frames=4)
    text = clip.TextEncoder(width=64, layers=2, context=8, vocabulary=50, embedding=16)
    module = viclip.ViClip(vision_encoder=vision, text_encoder=text)
    path, state = saved(tmp_path, module, wrap=lambda s: {"model": s})
    network = viclip.load_viclip(path)
    frames = torch.randn(1, 4, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[48, 3, 7, 49, 0, 0, 0, 0]])
    expected = plain.plain_viclip_video(frames[0], state, 2)
    torch.testing.assert_close(network.encode_video(frames)[0], expected, atol=1e-4, rtol=0)
    expected = plain.plain_text(tokens[0], state, 1, "text_encoder.")
    torch.testing.assert_close(network.encode_text(tokens)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_raft_equals_the_plain_one(tmp_path: Path) -> None:
    wrap = lambda s: {f"module.{name}": value for name, value in s.items()}  # noqa: E731
    path, state = saved(tmp_path, raft.Raft(), wrap=wrap)
    generator = torch.Generator().manual_seed(1)
    # 128 pixels: the coarsest correlation level has two cells, as in any real video.
    pair = torch.rand(2, 3, 128, 144, generator=generator) * 255
    expected = plain.plain_raft(pair[0], pair[1], state, 3)
    assert float(expected.abs().max()) > 10
    network = raft.load_raft(path)
    torch.testing.assert_close(network(pair[:1], pair[1:], 3)[0], expected, atol=1e-4, rtol=0)
    # The same formula and not only nearly: six refinements in double precision.
    exact = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
    expected = plain.plain_raft(pair[0].double(), pair[1].double(), exact, 6)
    given = network.double()(pair[:1].double(), pair[1:].double(), 6)[0]
    torch.testing.assert_close(given, expected, atol=1e-9, rtol=0)


def test_raft_has_the_parameters_of_the_official_file() -> None:
    state = raft.Raft().state_dict()
    assert sum(value.numel() for name, value in state.items() if "downsample.1" not in name) > 5_000_000
    assert state["update_block.gru.convq2.weight"].shape == (128, 384, 5, 1)
    assert state["cnet.layer2.0.downsample.1.running_var"].shape == (96,)
    assert "fnet.norm1.weight" not in state


def test_padding_is_split_and_replicated() -> None:
    image = torch.arange(10 * 13, dtype=torch.float32).view(1, 1, 10, 13)
    padded = raft.pad_to_stride(image)
    assert padded.shape == (1, 1, 16, 16)
    assert torch.equal(padded[..., 3:13, 1:14], image)
    assert padded[0, 0, 0, 0] == image[0, 0, 0, 0]


def vocabulary(folder: Path) -> Path:
    letters = [a + b for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcde"]
    merges = [
        "#version",
        *(" ".join(pair) for pair in letters),
        "c a",
        "ca t</w>",
        "d o",
        "do g</w>",
        "t h",
        "th e</w>",
    ]
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress("\n".join(merges).encode()))
    return path


def test_tokenizer_equals_the_tokenizers_library(tmp_path: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    ours = ClipTokenizer(vocabulary(tmp_path))
    bpe = models.BPE(vocab=ours.ids, merges=list(ours.rank), end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    theirs = Tokenizer(bpe)
    lower, spaces = normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")
    theirs.normalizer = normalizers.Sequence([spaces, lower])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    for text in ("The cat's DOG, 42!", "a façade in Ukiyo-e", "cacacat babab", "日本 🙂", "  spaces\n and\ttabs "):
        assert ours.encode(text) == theirs.encode(text).ids, text


def test_a_damaged_or_absurd_vocabulary_is_one_line(tmp_path: Path) -> None:
    """A flipped bit, wherever it is, and a small file that unpacks to more than memory should hold."""
    path = vocabulary(tmp_path)
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        try:
            ClipTokenizer(path)
        except WeightsError as error:
            assert "vocabulary" in str(error) or "pair of symbols" in str(error)
    path.write_bytes(gzip.compress(bytes(1 << 25)))
    with pytest.raises(WeightsError, match="not CLIP's vocabulary, which is smaller"):
        ClipTokenizer(path)


def test_tokenizer_repairs_text_before_it_is_lower_cased(tmp_path: Path) -> None:
    tokenizer = ClipTokenizer(vocabulary(tmp_path))
    for broken, repaired in (
        ("the cat’s “dog”", 'the cat\'s "dog"'),
        ("faÃ§ade", "façade"),
        ("ﬁre", "fire"),
        ("DoÃ‘a", "doña"),  # lower-cased first, the damage could not be recognised any more
        ("&lt;cat&gt;", "<cat>"),
    ):
        assert tokenizer.encode(broken) == tokenizer.encode(repaired), broken
    changed = [row.extended for row in vbench_prompts() if fix_text(row.extended) != row.extended]
    assert len(changed) == 45


def test_without_ftfy_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = vocabulary(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "sparse-forcing[eval]" in (Resources(weights=tmp_path).missing("tokenizer") or "")
    with pytest.raises(ConfigError, match=r"ftfy.*sparse-forcing\[eval\]") as caught:
        ClipTokenizer(path)
    assert "\n" not in str(caught.value)


def test_tokenizer_pads_cuts_and_refuses(tmp_path: Path) -> None:
    tokenizer = ClipTokenizer(vocabulary(tmp_path))
    start, end = tokenizer.ids["<|startoftext|>"], tokenizer.ids["<|endoftext|>"]
    cat, dog = tokenizer.ids["cat</w>"], tokenizer.ids["dog</w>"]
    assert tokenizer("cat dog", 6, truncate=False).tolist() == [[start, cat, dog, end, 0, 0]]
    assert tokenizer("cat dog cat", 4, truncate=True).tolist() == [[start, cat, dog, end]]
    with pytest.raises(ConfigError, match="5 tokens"):
        tokenizer("cat dog cat", 4, truncate=False)
    assert len(set(byte_alphabet().values())) == 256


class Payload:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_hostile_and_wrong_files_are_one_line(tmp_path: Path) -> None:
    evil, marker = tmp_path / "evil.pth", tmp_path / "marker"
    torch.save({"weight": Payload(marker)}, evil)
    for content in (None, b"", b"<html>", b"PK\x03\x04broken"):
        if content is not None:
            evil.write_bytes(content)
        with pytest.raises(WeightsError, match=r"evil\.pth") as caught:
            read_state_dict(evil)
        assert "\n" not in str(caught.value)
    assert not marker.exists()
    path, _ = saved(tmp_path, small_clip())
    with pytest.raises(WeightsError, match="is it the right file"):
        dino.load_dino(path)
    state = torch.load(path)
    torch.save({name: value for name, value in state.items() if name != "visual.ln_post.bias"}, path)
    with pytest.raises(WeightsError, match=r"missing: visual\.ln_post\.bias"):
        clip.load_clip(path)
    with pytest.raises(WeightsError, match="vocabulary"):
        ClipTokenizer(path)


def test_openai_style_torchscript_archives_load(tmp_path: Path) -> None:
    module = small_clip()
    module.load_state_dict(plain.randomize(module.state_dict()))

    class Archive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = module.visual.conv1

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.visual(image)

    path = tmp_path / "ViT-B-32.pt"
    torch.jit.trace(Archive(), torch.zeros(1, 3, 32, 32)).save(str(path))
    assert torch.equal(read_state_dict(path)["visual.weight"], module.visual.conv1.weight)
