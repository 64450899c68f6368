"""Prepared training data: tensors and prompts in safetensors shards with a manifest, written resumably.

    folder/shard-00000.safetensors   "data" [n, ...], the tensors of n items
    folder/shard-00000.json          {"prompts": [...], "sha256": ..., "shape": [...], "dtype": ...}, written last
    folder/dataset.json              what the data is and how it was made

A shard without its JSON does not exist; making the data again skips the shards that do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import atomic_path, atomic_write_json, read_json, sha256_file
from sparse_forcing.weights.safe_load import check_safetensors

_DATASET = "dataset.json"


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def write_shards(
    folder: Path, prompts: list[str], make: Callable[[int, list[str]], Tensor], *, per_shard: int, about: dict[str, Any]
) -> int:
    """Make and write what is missing; returns the number of shards written now.

    Args:
        prompts: one per item.
        make: (number of the first item, prompts) -> data [n, ...].
        about: settings the data depends on; a folder made with others is refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {**about, "items": len(prompts), "per_shard": per_shard}
    known = folder / _DATASET
    if known.exists() and read_json(known) != about:
        raise ConfigError(f"{folder}: holds data made with other settings; use a new folder")
    atomic_write_json(known, about)
    written = 0
    for number, first in enumerate(range(0, len(prompts), per_shard)):
        path, part = _shard(folder, number), prompts[first : first + per_shard]
        if path.with_suffix(".json").exists():
            continue
        data = make(first, part).contiguous()
        with atomic_path(path, size=data.nbytes) as temporary:
            save_file({"data": data}, temporary)
        record = {"prompts": part, "sha256": sha256_file(path), "shape": list(data.shape), "dtype": str(data.dtype)}
        atomic_write_json(path.with_suffix(".json"), record)
        written += 1
    return written


class Shards:
    """Reads items of a folder that `write_shards` made; every shard is checked against its hash when first used."""

    def __init__(self, folder: Path) -> None:
        self.about = read_json(folder / _DATASET)
        self.folder, self.per_shard = folder, int(self.about["per_shard"])
        self.records = [read_json(path) for path in sorted(folder.glob("shard-*.json"))]
        self.prompts = [prompt for record in self.records for prompt in record["prompts"]]
        if len(self.prompts) != self.about["items"]:
            raise WeightsError(
                f"{folder}: holds {len(self.prompts)} of {self.about['items']} items; finish making the data first"
            )
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, items: list[int]) -> tuple[Tensor, list[str]]:
        """data [n, ...] and prompts of n items."""
        parts = []
        for item in items:
            number, place = divmod(item, self.per_shard)
            path = _shard(self.folder, number)
            self._check(number, path)
            with safe_open(path, "pt") as file:
                parts.append(file.get_slice("data")[place : place + 1])
        return torch.cat(parts), [self.prompts[item] for item in items]

    def _check(self, number: int, path: Path) -> None:
        if number in self._checked:
            return
        check_safetensors(path)
        if sha256_file(path) != self.records[number]["sha256"]:
            raise WeightsError(f"{path}: SHA-256 differs from its record; the shard is damaged, make it again")
        self._checked.add(number)
