"""CLIP's byte-pair tokenizer, read from the user's `bpe_simple_vocab_16e6.txt.gz`.

Text is repaired as CLIP does it (ftfy: broken encodings, curly quotes, ligatures), lower-cased, split into words,
digits and punctuation, written in a printable alphabet of bytes, and merged pair by pair in the order of the file
(Sennrich et al., arXiv 1508.07909).
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import itertools
import zlib
from functools import lru_cache
from pathlib import Path

import regex
import torch

from sparse_forcing.errors import ConfigError, WeightsError

MERGES = 49_152 - 256 - 2  # of the file's lines, those CLIP was trained with
MAX_BYTES = 1 << 24  # of the file unpacked, several times what CLIP's has
START, END = "<|startoftext|>", "<|endoftext|>"
_WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def missing() -> str | None:
    """Why text cannot be read as CLIP reads it, or None."""
    return (
        None if importlib.util.find_spec("ftfy") else "needs ftfy; install it with: pip install 'sparse-forcing[eval]'"
    )


def byte_alphabet() -> dict[int, str]:
    """A printable character for each byte: itself where it is visible, otherwise one from 256 up."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + rank) for rank, byte in enumerate(hidden)}


class ClipTokenizer:
    """Text -> token ids.

    Raises WeightsError for a file that is not CLIP's vocabulary, ConfigError without the package ftfy.
    """

    def __init__(self, path: Path) -> None:
        if reason := missing():
            raise ConfigError(f"CLIP's tokenizer {reason}")
        from ftfy import fix_text  # an optional package

        self._repair = fix_text
        try:
            with gzip.open(path) as file:
                content = file.read(MAX_BYTES + 1)
            lines = content.decode("utf-8").split("\n")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise WeightsError(f"{path}: not a gzipped CLIP vocabulary ({error})") from error
        if len(content) > MAX_BYTES:
            raise WeightsError(f"{path}: not CLIP's vocabulary, which is smaller than {MAX_BYTES} bytes")
        merges = [tuple(line.split()) for line in lines[1 : MERGES + 1] if line]
        if not merges or any(len(pair) != 2 for pair in merges):
            raise WeightsError(f"{path}: expected one pair of symbols a line")
        self.bytes = byte_alphabet()
        symbols = list(self.bytes.values())
        tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), START, END]
        self.ids = {token: number for number, token in enumerate(tokens)}
        self.rank = {pair: number for number, pair in enumerate(merges)}
        self._merge_word = lru_cache(maxsize=10_000)(self._merge)

    def _merge(self, word: str) -> tuple[str, ...]:
        parts = (*word[:-1], word[-1] + "</w>")
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if best not in self.rank:
                break
            merged: list[str] = []
            for part in parts:
                # Left to right: a part that was just merged cannot be merged again in the same pass.
                if merged and (merged[-1], part) == best and not self._is_joined(merged):
                    merged[-1] = _Joined(merged[-1] + part)
                else:
                    merged.append(part)
            parts = tuple(str(part) for part in merged)
        return parts

    @staticmethod
    def _is_joined(merged: list[str]) -> bool:
        return isinstance(merged[-1], _Joined)

    def encode(self, text: str) -> list[int]:
        """Ids without start and end."""
        cleaned = " ".join(html.unescape(html.unescape(self._repair(text))).split()).lower()
        ids: list[int] = []
        for word in _WORDS.findall(cleaned):
            if word in (START, END):
                ids.append(self.ids[word])
                continue
            written = "".join(self.bytes[byte] for byte in word.encode("utf-8"))
            ids.extend(self.ids[part] for part in self._merge_word(written))
        return ids

    def __call__(self, text: str, context: int, *, truncate: bool) -> torch.Tensor:
        """[1, context] ids with start, end and zero padding; a longer text is cut (keeping the end) or refused."""
        ids = [self.ids[START], *self.encode(text), self.ids[END]]
        if len(ids) > context:
            if not truncate:
                raise ConfigError(f"prompt {text[:40]!r} has {len(ids)} tokens; this metric takes {context}")
            ids = [*ids[: context - 1], self.ids[END]]
        return torch.tensor([ids + [0] * (context - len(ids))])


class _Joined(str):
    """A symbol made in the current merging pass."""
