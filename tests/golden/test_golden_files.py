"""No file of the folder goes unread: a kind that no test knows is a failure, not a silence."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from tests.golden.golden_cases import KINDS


def test_is_of_a_known_kind(golden_file: Path) -> None:
    name = golden_file.name
    if name in ("README.md", "configs.json"):
        return
    assert name.startswith(("weights_", *KINDS)), f"{name}: no test reads this kind of file"
    assert golden_file.suffix in (".json", ".safetensors")
    if not name.startswith("weights_"):
        assert golden_file.with_suffix(".json").exists()
        assert golden_file.with_suffix(".safetensors").exists()


def test_description_lists_the_tensors(golden_file: Path) -> None:
    if golden_file.suffix != ".json" or golden_file.name == "configs.json":
        return
    listed = json.loads(golden_file.read_text())["tensors"]
    with safe_open(golden_file.with_suffix(".safetensors"), "pt") as file:
        assert set(listed) == set(file.keys())
        assert all(list(file.get_slice(name).get_shape()) == shape for name, (_, shape) in listed.items())
