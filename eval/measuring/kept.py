"""What is kept of a measured video for the next run: its record and features, or nothing where a file is damaged.

Each file holds a hash of its own content, so that one flipped digit is found, too: what is damaged is measured again.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from sparse_forcing.errors import ConfigError
from sparse_forcing.files import atomic_write_bytes, atomic_write_json, read_json

_CHECKSUM = "checksum"
_MAX_RECORD_BYTES = 64 << 20
_DIGEST_BYTES = hashlib.sha256().digest_size


def save_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record with its checksum, whole or not at all. Raises OutputError."""
    atomic_write_json(path, {**record, _CHECKSUM: _sum_record(record)})


def load_record(path: Path) -> dict[str, Any] | None:
    """The record in a file, None where there is none or it is not as it was written."""
    if not path.is_file():
        return None
    try:
        content = read_json(path, max_bytes=_MAX_RECORD_BYTES)
    except ConfigError:
        return None
    if not isinstance(content, dict) or _CHECKSUM not in content:
        return None
    checksum = content.pop(_CHECKSUM)
    return content if checksum == _sum_record(content) else None


def _sum_record(record: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(record))  # as it is read: names are text, tuples are lists
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


class FeatureStore:
    """Feature arrays on disk, one file for each video (by content) and extractor (by weights and settings)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, content: str, key: str) -> Path:
        """Where the array of a video (sha256 of its bytes) and an extractor key lies."""
        name = hashlib.sha256(key.encode()).hexdigest()[:24]
        return self.folder / "features" / content[:2] / f"{content[:32]}-{name}.npy"

    def load(self, content: str, key: str) -> np.ndarray | None:
        """The stored array, or None when it is absent or damaged (it is then computed again)."""
        path = self.path(content, key)
        try:
            data = path.read_bytes() if path.is_file() else b""
        except OSError:
            return None
        array, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if hashlib.sha256(array).digest() != digest:
            return None
        return np.load(io.BytesIO(array), allow_pickle=False)

    def save(self, content: str, key: str, value: np.ndarray) -> None:
        """Write an array and its hash, whole or not at all. Raises OutputError."""
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        atomic_write_bytes(self.path(content, key), buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
