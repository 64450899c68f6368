"""What data a run began with, by content: names alone do not tell when videos, prompts or shards are replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparse_forcing.errors import ConfigError
from sparse_forcing.processes import from_first
from sparse_forcing.training.data.sources import Source


class DataIdentity:
    """The part of a checkpoint that holds the hash of the data. Every process must make one; the first one reads.

    Raises:
        ConfigError: from `load_state_dict`, when the run began with other data.
    """

    waivable = True

    def __init__(self, source: Source, path: Path | None) -> None:
        self.digest, self.path = from_first(source.digest), path

    def state_dict(self) -> dict[str, Any]:
        return {"sha256": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["sha256"] != self.digest:
            raise ConfigError(
                f"{self.path} holds other data than this run began with; choose another --output for a new run, or go "
                "on with --allow-changes"
            )
