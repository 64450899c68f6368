"""Text encoders: a small word-level one for `tiny`, umT5 through transformers for Wan.

Every encoder returns embeddings [B, text_len, dim] whose padded rows are exactly zero: Wan attends to all of them.
"""

from __future__ import annotations

import html
import warnings
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.model.word_tokenizer import PAD, WordTokenizer
from sparse_forcing.scenes.captions import vocabulary_words
from sparse_forcing.scenes.roles import role_remarks
from sparse_forcing.weights.parts import explain_read_errors, require_part, warn_of_unused_tensors

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

WAN_TEXT_LEN = 512
"""Tokens of a prompt after padding, in Wan 2.1."""


class TextEncoder(Protocol):
    """What the pipeline and the recipes need of a text encoder; `text_len` is the length of what it gives."""

    text_len: int

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        ...

    def encode(self, prompts: list[str]) -> Tensor:
        """[B, text_len, dim], zero beyond each prompt's tokens. Warns with `remarks`."""
        ...

    def remarks(self, prompts: list[str]) -> list[str]:
        """What to tell whoever wrote the prompts: what of them has no effect, or not the one that is meant."""
        ...


class WordTextEncoder(ModelMixin, ConfigMixin):
    """Word embeddings and a few transformer layers, trained together with the video model.

    Args:
        words: the vocabulary, in order (part of the config, so the tokenizer ships with the weights).
        dim: embedding width (the transformer's text_dim).
        text_len: tokens of a prompt after padding.
        neighbours: words that a convolution before every layer spans, 0 for none. Attention alone did not learn which
            of two objects a shape or a motion belongs to.
    """

    _supports_group_offloading = False  # a few megabytes

    @register_to_config
    def __init__(
        self,
        words: list[str],
        dim: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        text_len: int = 32,
        neighbours: int = 0,
    ) -> None:
        super().__init__()
        if not words or len(set(words)) != len(words):
            raise ConfigError("text encoder: the vocabulary must be a non-empty list of distinct words")
        if dim % num_heads:
            raise ConfigError(f"text encoder: dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.tokenizer = WordTokenizer(list(words), text_len)
        self.text_len = text_len
        self.token_embedding = nn.Embedding(len(self.tokenizer), dim)
        self.position_embedding = nn.Parameter(torch.randn(text_len, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            dim, num_heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        convolutions = (nn.Conv1d(dim, dim, neighbours, padding="same") for _ in range(num_layers if neighbours else 0))
        self.convolutions = nn.ModuleList(convolutions)
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[B, text_len] ids -> [B, text_len, dim]."""
        used = token_ids != PAD
        x = self.token_embedding(token_ids) + self.position_embedding
        if not self.convolutions:
            return self.norm(self.layers(x, src_key_padding_mask=~used)) * used[..., None]
        for convolution, layer in zip(self.convolutions, self.layers.layers, strict=True):
            x = x + F.gelu(convolution((x * used[..., None]).mT).mT)
            x = layer(x, src_key_padding_mask=~used)
        return self.norm(x) * used[..., None]

    @property
    def dim(self) -> int:
        return self.token_embedding.embedding_dim

    def encode(self, prompts: list[str]) -> Tensor:
        _warn(self.remarks(prompts))
        return self(self.tokenizer.token_ids(prompts).to(self.token_embedding.weight.device))

    def remarks(self, prompts: list[str]) -> list[str]:
        """Words the model never learned, words in roles it never learned, and prompts longer than it reads."""
        tokenizer = self.tokenizer
        unknown = sorted({word for prompt in prompts for word in tokenizer.unknown_words(prompt)})
        remarks = [f"this model does not know: {', '.join(unknown[:8])}"] if unknown else []
        for prompt in prompts:
            if prompt.strip() and not tokenizer.knows(prompt):
                remarks.append(f"no word of {prompt[:50]!r} is known: the video will show anything")
        if self._knows_scenes:
            remarks += dict.fromkeys(remark for prompt in prompts for remark in role_remarks(prompt))
        if any(len(tokenizer.words(prompt)) > tokenizer.text_len for prompt in prompts):
            remarks.append(f"prompt cut to its first {tokenizer.text_len} words")
        return remarks

    @cached_property
    def _knows_scenes(self) -> bool:
        """Whether the words are those of the procedural scenes, and so learned in the roles that they have there."""
        return self.tokenizer.ids.keys() >= set(vocabulary_words())


def _warn(remarks: list[str]) -> None:
    for remark in remarks:
        warnings.warn(remark, stacklevel=3)


def clean_prompt(prompt: str) -> str:
    """Wan's cleaning: mojibake repaired (where ftfy is installed), HTML entities decoded twice, spaces collapsed."""
    if find_spec("ftfy") is not None:
        import ftfy

        prompt = ftfy.fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())


def load_tokenizer(folder: Path, vocab_size: int) -> Any:
    """The tokenizer of a model folder with an encoder of so many tokens. Raises WeightsError."""
    from transformers import AutoTokenizer

    require_part(folder / "tokenizer")
    with explain_read_errors(folder / "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, trust_remote_code=False)
    if len(tokenizer) > vocab_size:
        raise WeightsError(
            f"{folder}: tokenizer has {len(tokenizer)} tokens, text_encoder only {vocab_size}; they are of different "
            "models"
        )
    for name in ("padding_side", "truncation_side"):
        if (side := getattr(tokenizer, name)) != "right":
            raise WeightsError(
                f"{folder / 'tokenizer'}: {name} is {side!r:.20}; Wan's prompts are padded and cut right"
            )
    return tokenizer


class UMT5TextEncoder(nn.Module):
    """Wan's text encoder: umT5 through transformers, embeddings zeroed beyond the prompt's tokens.

    Args:
        encoder: transformers' UMT5EncoderModel.
        tokenizer: its tokenizer (anything called like one).
        text_len: tokens of a prompt after padding.
    """

    def __init__(self, encoder: UMT5EncoderModel, tokenizer: Any, text_len: int = WAN_TEXT_LEN) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.text_len = text_len

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, text_len: int = WAN_TEXT_LEN, torch_dtype: torch.dtype | None = None
    ) -> UMT5TextEncoder:
        """Load `text_encoder` and `tokenizer` of a local diffusers Wan folder. Raises WeightsError."""
        from transformers import UMT5EncoderModel

        folder = Path(folder)
        require_part(folder / "text_encoder")
        with explain_read_errors(folder, "no readable umT5 encoder"):
            encoder, info = UMT5EncoderModel.from_pretrained(
                folder / "text_encoder",
                dtype=torch_dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            if missing := sorted(info["missing_keys"]):  # transformers would make them up
                raise WeightsError(
                    f"{folder / 'text_encoder'}: does not fit the model; missing: {', '.join(missing[:5])}"
                )
            warn_of_unused_tensors(folder / "text_encoder", info["unexpected_keys"])
        return cls(encoder, load_tokenizer(folder, encoder.config.vocab_size), text_len)

    @property
    def dim(self) -> int:
        return self.encoder.config.d_model

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """[B, text_len, dim]; longer prompts are cut, with a warning."""
        batch = self._tokens(prompts, self.text_len)
        device = get_module_execution_device(self.encoder)
        ids, used = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
        _warn(self._cut([prompt for prompt, full in zip(prompts, used[:, -1].tolist(), strict=True) if full]))
        return self.encoder(ids, used).last_hidden_state * used[..., None]

    def remarks(self, prompts: list[str]) -> list[str]:
        """Prompts of more tokens than the encoder reads."""
        return self._cut(prompts)

    def _cut(self, prompts: list[str]) -> list[str]:
        if not prompts:
            return []
        beyond = self._tokens(prompts, self.text_len + 1)["attention_mask"][:, -1].tolist()
        return [
            f"prompt cut to its first {self.text_len} tokens, which is what the text encoder reads: {prompt[:50]!r}..."
            for prompt, more in dict(zip(prompts, beyond, strict=True)).items()
            if more
        ]

    def _tokens(self, prompts: list[str], length: int) -> Any:
        return self.tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            max_length=length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
