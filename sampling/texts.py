"""What prompts were read as: kept without padding, in this process and in a folder, so that a text encoder reads every
prompt once, and may leave before the video is made.

Only frozen encoders are remembered (umT5); an embedded model's is a few megabytes, and may be in training.
"""

from __future__ import annotations

import gc
import hashlib
import json
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import atomic_path, check_writable
from sparse_forcing.model.small.quantized import Storage, quantize_
from sparse_forcing.model.text import WAN_TEXT_LEN, UMT5TextEncoder
from sparse_forcing.model_folder.folder import load_text_encoder, read_defaults
from sparse_forcing.weights.parts import check_part, require_part
from sparse_forcing.weights.safe_load import load_safetensors

KEPT = 64
"""Prompts that a pipeline remembers; a thousand tokens of Wan's are 8 MiB."""
_SAMPLE, _SAMPLES = 1 << 16, 32


@dataclass(frozen=True)
class ReadText:
    """A prompt as an encoder read it: rows [T, dim] of its T tokens on the CPU, and what was said of it."""

    rows: Tensor
    remarks: tuple[str, ...] = ()


class KnownTexts:
    """Prompts that were read.

    Args:
        folder: where they are kept beyond this process, a file each; None for nowhere.
        origin: what names the encoder in that folder.
        limit: prompts in memory, the latest ones; None for all.
    """

    def __init__(self, folder: Path | None = None, origin: str = "", limit: int | None = KEPT) -> None:
        self.folder, self.origin, self.limit = folder, origin, limit
        self._known: dict[str, ReadText] = {}
        self._reader: tuple[weakref.ref[Any], torch.dtype] | None = None

    @property
    def dim(self) -> int | None:
        """Width of the embeddings; None while there are none."""
        return next((text.rows.shape[1] for text in self._known.values()), None)

    def find(self, prompt: str) -> ReadText | None:
        """What a prompt was read as, now or in an earlier run. Raises WeightsError for a damaged file."""
        if prompt not in self._known and self.folder is not None and self._path(prompt).is_file():
            self._known[prompt] = _load(self._path(prompt))
        return self._known.get(prompt)

    def read(self, prompts: list[str], encoder: UMT5TextEncoder | None) -> Tensor:
        """[B, text_len, dim] on the CPU, of what is known or else read now; warns with the remarks.

        Raises:
            ConfigError: an unknown prompt, and no encoder.
        """
        texts = [self._one(prompt, encoder) for prompt in prompts]
        for remark in dict.fromkeys(remark for text in texts for remark in text.remarks):
            warnings.warn(remark, stacklevel=3)
        length = WAN_TEXT_LEN if encoder is None else encoder.text_len
        return torch.stack([pad(text.rows, (0, 0, 0, length - len(text.rows))) for text in texts])

    def learn(self, prompts: Iterable[str], encoder: UMT5TextEncoder) -> None:
        """Read prompts for later; their remarks are said then."""
        for prompt in dict.fromkeys(prompts):
            self._one(prompt, encoder)

    def _one(self, prompt: str, encoder: UMT5TextEncoder | None) -> ReadText:
        if encoder is not None:
            self._forget_others(encoder)
        if (known := self.find(prompt)) is not None:
            return known
        if encoder is None:
            raise ConfigError(
                f"prompt: {prompt[:50]!r} was not read before the text encoder left this pipeline; name it in "
                "`prompts`, or give prompt_embeds"
            )
        with warnings.catch_warnings():  # said by `read`, now and whenever the prompt is used again
            warnings.simplefilter("ignore", UserWarning)
            # One by one: what a prompt is read as must not depend on what else is asked for.
            rows = encoder.encode([prompt])[0]
        used = rows.ne(0).any(1).nonzero()
        text = ReadText(rows[: int(used.max()) + 1 if len(used) else 0].cpu().clone(), tuple(encoder.remarks([prompt])))
        while self.limit is not None and len(self._known) >= self.limit:
            del self._known[next(iter(self._known))]
        self._known[prompt] = text
        if self.folder is not None:
            _save(self._path(prompt), prompt, text)
        return text

    def _forget_others(self, encoder: UMT5TextEncoder) -> None:
        """What another encoder read, or this one in another type, is not what this one reads."""
        model: Any = encoder.encoder
        reader = weakref.ref(model), model.dtype
        if self._reader != reader:
            self._known.clear()
            self._reader = reader

    def _path(self, prompt: str) -> Path:
        assert self.folder is not None
        name = hashlib.sha256(json.dumps([self.origin, prompt]).encode()).hexdigest()
        return self.folder / f"{name}.safetensors"


def read_first(
    folder: Path,
    prompts: list[str],
    dtype: torch.dtype | None,
    device: Any,
    cache: Path | None = None,
    storage: Storage | None = None,
) -> KnownTexts | None:
    """The `prompts` and the default negative prompt of a model folder, read by a text encoder that is loaded for them
    alone and gone afterwards, or not loaded at all where `cache` knows them; None for an embedded model.

    Raises:
        WeightsError, OutputError: the text encoder or the cache cannot be read or written.
        ConfigError: a cache for an embedded model.
    """
    defaults = read_defaults(folder)
    if defaults.text_encoder == "words":
        if cache is not None:
            raise ConfigError(f"--prompt-cache (prompt_cache) is for umT5; {folder.name} reads words without any delay")
        return None
    prompts = [*prompts, defaults.negative_prompt]
    origin = "" if cache is None else f"{fingerprint(folder)} {dtype} {storage}"
    texts = KnownTexts(None if cache is None else check_writable(cache, folder=True), origin, limit=None)
    if unread := [prompt for prompt in prompts if texts.find(prompt) is None]:
        encoder = load_text_encoder(folder, dtype)
        assert isinstance(encoder, UMT5TextEncoder)
        if storage is not None:
            quantize_(encoder.encoder, storage)
        texts.learn(unread, encoder.to(device))
        for prompt in prompts:  # those of earlier runs, which this encoder made, too
            texts.find(prompt)
        del encoder
        release_memory()
    texts.folder = None  # another encoder may come later
    return texts


def release_memory() -> None:
    """Give back what a model that is gone took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fingerprint(folder: Path) -> str:
    """What names the text encoder of a model folder: its headers, and samples of its numbers, which are ten gigabytes.
    Raises WeightsError."""
    digest = hashlib.sha256()
    for part in ("text_encoder", "tokenizer"):
        require_part(folder / part)
        check_part(folder / part)
        for path in sorted(x for x in (folder / part).iterdir() if x.is_file()):
            size = path.stat().st_size
            digest.update(f"{part}/{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for start in sorted({max(0, size - _SAMPLE) * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _save(path: Path, prompt: str, text: ReadText) -> None:
    with atomic_path(path) as temporary:
        facts = {"prompt": prompt, "remarks": json.dumps(text.remarks)}
        save_file({"rows": text.rows.contiguous()}, temporary, metadata=facts)


def _load(path: Path) -> ReadText:
    from safetensors import safe_open

    rows = load_safetensors(path).get("rows")
    if rows is None or rows.ndim != 2 or len(rows) > WAN_TEXT_LEN or not rows.isfinite().all():
        raise WeightsError(f"{path}: not the embedding of a prompt; remove the file")
    with safe_open(path, "pt") as file:
        remarks = (file.metadata() or {}).get("remarks", "[]")
    return ReadText(rows, tuple(json.loads(remarks)))
