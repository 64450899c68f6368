"""The embedded models' tokenizer: one token a word of a fixed vocabulary, in the form of transformers' tokenizers."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizer

PAD, UNKNOWN, EMPTY = 0, 1, 2
SPECIAL = ("<pad>", "<unknown>", "<empty>")


class WordTokenizer(PreTrainedTokenizer):
    """Lower-cased words over a fixed vocabulary; the empty prompt is a token of its own (unconditional).

    Args:
        vocabulary: the words, in order.
        text_len: tokens of a prompt after padding.
        settings: those of transformers' tokenizers, which a saved one comes back with.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {}  # the vocabulary is part of the settings
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(self, vocabulary: list[str], text_len: int, **settings: Any) -> None:
        self.ids = {word: i for i, word in enumerate((*SPECIAL, *vocabulary))}
        self.text_len = text_len
        own = {"pad_token": SPECIAL[PAD], "unk_token": SPECIAL[UNKNOWN], "model_max_length": text_len}
        # A prompt with "<pad>" in it says the word "pad".
        super().__init__(
            vocabulary=list(vocabulary), text_len=text_len, **settings | own | {"split_special_tokens": True}
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def vocab_size(self) -> int:
        return len(self.ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return self.words(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, UNKNOWN)

    def _convert_id_to_token(self, index: int) -> str:
        return (*self.ids,)[index]

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> Any:
        return token_ids_0 or [EMPTY]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """None beside a prompt's words: it is the empty prompt that has one."""
        return 0

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Nothing to write: the vocabulary is part of the settings."""
        return ()

    def words(self, prompt: str) -> list[str]:
        return re.findall(r"[a-z]+", prompt.lower())

    def unknown_words(self, prompt: str) -> list[str]:
        """Words and numbers of any script, as they are written, that the vocabulary lacks."""
        return [word for word in re.findall(r"[^\W_]+", prompt.lower()) if word not in self.ids]

    def knows(self, prompt: str) -> bool:
        """Whether a single word of the prompt is in the vocabulary."""
        return any(word in self.ids for word in self.words(prompt))

    def token_ids(self, prompts: list[str]) -> Tensor:
        """[B, text_len] ids, as calling the tokenizer with padding and truncation gives them; longer prompts are
        cut."""
        rows = []
        for prompt in prompts:
            ids = [self.ids.get(word, UNKNOWN) for word in self.words(prompt)][: self.text_len] or [EMPTY]
            rows.append(ids + [PAD] * (self.text_len - len(ids)))
        return torch.tensor(rows, dtype=torch.long)
