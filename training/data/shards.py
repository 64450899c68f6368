"""Prepared training data: tensors and prompts in safetensors shards with a manifest, written resumably.

    folder/shard-00000.safetensors   "data" [n, ...] and "text" [n, text_len, dim] of n items
    folder/shard-00000.json          {"prompts": [...], "sha256": ..., "covers": ..., "refused": [...], "sources": ...},
                                     written last
    folder/prompts.safetensors       "text" of prompts that belong to no item: the empty one, the negative one
    folder/dataset.json              what the data is and how it was made

A shard without its JSON does not exist; making the data again skips the shards that do and whose samples still are what
they were made of (`sources` are hashes of files). Both kinds of JSON hold a hash of themselves: a changed prompt is
noticed as a changed tensor is. Of several processes of one launch each makes its own shards; the same bytes come out,
however many there are.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import atomic_path, atomic_write_json, read_json, remove_file, sha256_file
from sparse_forcing.processes import from_first, rank, world_size
from sparse_forcing.training.engine.parallel import mean_over_ranks
from sparse_forcing.weights.safe_load import check_safetensors

_DATASET, _LOOSE = "dataset.json", "prompts.safetensors"
_OWN_DIGEST = "record_sha256"


@dataclass(frozen=True)
class ShardContent:
    """Items of one shard.

    tensors: name -> [n, ...]; prompts: one per item; refused: names of samples that could not be used.
    """

    tensors: dict[str, Tensor]
    prompts: list[str]
    refused: tuple[str, ...] = ()


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def shard_files(folder: Path) -> list[Path]:
    """The files of a set that are there, whoever wrote them."""
    return [*folder.glob("shard-*.safetensors"), *folder.glob("shard-*.json"), folder / _DATASET, folder / _LOOSE]


def write_shards(
    folder: Path,
    count: int,
    make: Callable[[range], ShardContent],
    *,
    per_shard: int,
    about: dict[str, Any],
    loose_text: tuple[list[str], Callable[[list[str]], Tensor]] | None = None,
    sources: Callable[[range], list[str | None]] = lambda samples: [],
    progress: Callable[[str], None] = lambda line: None,
) -> int:
    """Make and write what is missing; returns the number of shards written now, by all processes of the launch.

    Args:
        count: samples in all; make: numbers of a shard's samples -> what to store of them.
        about: settings the data depends on; a folder made with others is refused.
        loose_text: prompts of no item whose embeddings training needs too, and what embeds them.
        sources: numbers of a shard's samples -> hash of each one's file, None where it cannot be read. A shard that was
            made of other files is made again.
        progress: is told one line per shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {**about, "items": count, "per_shard": per_shard, "loose_prompts": loose_text[0] if loose_text else []}
    from_first(lambda: _commit(folder, about, loose_text))
    starts = range(0, count, per_shard)
    written = 0
    for number in range(rank(), len(starts), world_size()):
        first, path = starts[number], _shard(folder, number)
        samples = range(first, min(first + per_shard, count))
        present = sources(samples)  # before the samples are read: what replaces them later is then noticed
        if path.with_suffix(".json").exists():
            if not (reason := _why_again(path.with_suffix(".json"), present)):
                continue
            progress(f"shard {number + 1} of {len(starts)}: {reason}; it is made again")
            remove_file(path.with_suffix(".json"))
        content = make(samples)
        digest = _write(path, content.tensors) if content.prompts else None
        record = {
            "prompts": content.prompts,
            "sha256": digest,
            "covers": len(samples),
            "refused": list(content.refused),
            "sources": present,
            "shapes": {name: list(x.shape) for name, x in content.tensors.items()},
        }
        _write_record(path.with_suffix(".json"), record)
        written += 1
        progress(f"shard {number + 1} of {len(starts)}")
    # Here all wait for each other, so that whoever goes on finds the data complete.
    return round(mean_over_ranks({"written": float(written)})["written"] * world_size())


def _why_again(record: Path, present: list[str | None]) -> str:
    """Why a shard that exists is made again; nothing where it is not."""
    try:
        same = _same_sources(_read_record(record)["sources"], present)
    except WeightsError:
        return "its record is damaged"
    return "" if same else "its files have changed since it was made"


def _same_sources(then: list[str | None], now: list[str | None]) -> bool:
    """Whether files are what they were; those that cannot be read any more are not what a shard is made of anew."""
    return len(then) == len(now) and all(new in (old, None) for old, new in zip(then, now))


def _commit(
    folder: Path, about: dict[str, Any], loose_text: tuple[list[str], Callable[[list[str]], Tensor]] | None
) -> None:
    """Write what the data is, or check that the folder holds nothing else."""
    known = folder / _DATASET
    if known.exists():
        made = _read_record(known)
        if made != {**about, "loose_sha256": made.get("loose_sha256")}:
            raise ConfigError(f"{folder}: holds data made with other settings; use a new folder")
        return
    digest = _write(folder / _LOOSE, {"text": loose_text[1](loose_text[0])}) if loose_text else None
    _write_record(known, {**about, "loose_sha256": digest})


def read_refused_samples(folder: Path) -> list[str]:
    """Samples that earlier runs into `folder` could not use; a shard whose record is damaged is made again."""
    names: list[str] = []
    for path in sorted(folder.glob("shard-*.json")):
        with suppress(WeightsError):
            names += _read_record(path)["refused"]
    return names


def _write_record(path: Path, record: dict[str, Any]) -> None:
    atomic_write_json(path, {**record, _OWN_DIGEST: _digest(record)})


def _read_record(path: Path) -> dict[str, Any]:
    """What `_write_record` wrote. Raises WeightsError for anything else."""
    try:
        record = read_json(path)
    except ConfigError as error:
        raise WeightsError(f"{error}; make the data again") from error
    if not isinstance(record, dict) or record.pop(_OWN_DIGEST, None) != _digest(record):
        raise WeightsError(
            f"{path}: is not what was written, as its own hash says; it is damaged or was edited, make the data again"
        )
    return record


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors atomically; returns the file's SHA-256."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with atomic_path(path, size=sum(x.nbytes for x in tensors.values())) as temporary:
        save_file(tensors, temporary)
        return sha256_file(temporary)


class Shards:
    """Reads items of a folder that `write_shards` made; every shard is checked against its hash when first used.

    Raises:
        WeightsError: not complete, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.about = _read_record(folder / _DATASET)
        self.folder = folder
        self.records = [_read_record(path) for path in sorted(folder.glob("shard-*.json"))]
        covered = sum(record["covers"] for record in self.records)
        if covered != self.about["items"]:
            raise WeightsError(
                f"{folder}: holds {covered} of {self.about['items']} items; finish making the data first"
            )
        self.prompts = [prompt for record in self.records for prompt in record["prompts"]]
        if not self.prompts:
            raise WeightsError(
                f"{folder}: every sample was refused when the data was made; nothing is left to train on"
            )
        self._ends = list(accumulate(len(record["prompts"]) for record in self.records))
        self._checked: set[Path] = set()

    def __len__(self) -> int:
        return len(self.prompts)

    def digest(self) -> str:
        """One SHA-256 of all that is in the folder, by the hashes in its records."""
        records = [[record["sha256"], record["prompts"]] for record in self.records]
        return _digest([self.about, records])

    def __getitem__(self, items: list[int]) -> tuple[Tensor, list[str]]:
        """data [n, ...] and prompts of n items."""
        return self.tensor("data", items), [self.prompts[item] for item in items]

    def shape(self, name: str) -> list[int] | None:
        """Shape of one item's tensor; None when the data has no such tensor."""
        shapes = next(record["shapes"] for record in self.records if record["prompts"])
        return shapes[name][1:] if name in shapes else None

    def tensor(self, name: str, items: list[int]) -> Tensor:
        """[n, ...] of n items."""
        parts = []
        for item in items:
            number = bisect_right(self._ends, item)
            place = item - (self._ends[number - 1] if number else 0)
            path = _shard(self.folder, number)
            self._check(path, self.records[number]["sha256"])
            with safe_open(path, "pt") as file:
                parts.append(file.get_slice(name)[place : place + 1])
        return torch.cat(parts)

    def loose_text(self) -> dict[str, Tensor]:
        """Embeddings [text_len, dim] of the prompts that belong to no item."""
        if not self.about["loose_prompts"]:
            return {}
        path = self.folder / _LOOSE
        self._check(path, self.about["loose_sha256"])
        return dict(zip(self.about["loose_prompts"], load_file(path)["text"]))

    def _check(self, path: Path, digest: str) -> None:
        if path in self._checked:
            return
        try:
            check_safetensors(path)
            same = sha256_file(path) == digest
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read ({error.strerror}); make the data again") from error
        if not same:
            raise WeightsError(f"{path}: SHA-256 differs from its record; the shard is damaged, make it again")
        self._checked.add(path)


class StoredText(nn.Module):
    """A text encoder that only looks up: embeddings of the prompts of some shards, so that training loads no encoder.

    Raises:
        ConfigError: from `encode`, for a prompt that was not encoded when the data was made.
    """

    def __init__(self, shards: Shards) -> None:
        super().__init__()
        shape = shards.shape("text")
        if shape is None:
            raise ConfigError(f"{shards.folder}: holds no text embeddings; make the data with text: true")
        self.shards, self.text_len, self.dim = shards, shape[0], shape[1]
        self.places = {prompt: item for item, prompt in enumerate(shards.prompts)}
        self.loose = shards.loose_text()
        self.register_buffer("where", torch.empty(0), persistent=False)  # follows `.to(device)`

    def encode(self, prompts: list[str]) -> Tensor:
        """[B, text_len, dim] in float32."""
        device = self.get_buffer("where").device
        return torch.stack([self._one(prompt) for prompt in prompts]).to(device, torch.float32)

    def remarks(self, prompts: list[str]) -> list[str]:
        """Nothing: whoever encoded the prompts was told."""
        return []

    def _one(self, prompt: str) -> Tensor:
        if prompt in self.places:
            return self.shards.tensor("text", [self.places[prompt]])[0]
        if prompt in self.loose:
            return self.loose[prompt]
        raise ConfigError(
            f"{self.shards.folder}: holds no embedding of the prompt {prompt[:80]!r}; make the data with it as "
            "negative_prompt, or train with the text encoder (data.stored_text: false)"
        )
