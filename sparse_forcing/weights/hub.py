"""Model folders of the Hugging Face hub: found in its local cache, or fetched into it, as diffusers' are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sparse_forcing.weights.parts import explain_read_errors

_FILES = ("*.json", "*/*.json", "*/*.safetensors", "tokenizer/*.model", "tokenizer/*.txt")
"""What a model consists of: no code, and no weights that would have to be unpickled."""


def is_hub_id(model: str) -> bool:
    """Whether this could be `owner/name`."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) is not None


def fetch_model(model: str, **options: Any) -> Path:
    """Folder of the files of a hub model, downloaded if the local cache lacks them.

    Args:
        options: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download` and `proxies`, as in diffusers.

    Raises:
        WeightsError: there is no such model, or no way to it.
    """
    from huggingface_hub import snapshot_download

    options.pop("proxies", None)  # the library takes them from the environment now
    with explain_read_errors(model, "neither a folder, nor an embedded model, nor found on the hub"):
        return Path(snapshot_download(model, allow_patterns=list(_FILES), **options))
