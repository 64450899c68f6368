"""Golden weights: original Wan keys become diffusers keys, tensor for tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from sparse_forcing.model_folder.keys import to_diffusers, to_wan
from tests.golden.golden_cases import wan_key_table


def test_wan_keys_become_diffusers_keys(wan_weights: Path) -> None:
    wan = load_file(wan_weights)
    expected = load_file(wan_weights.with_name(wan_weights.name.replace("_wan", "_diffusers")))
    found = to_diffusers(wan)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert set(to_wan(found)) == set(wan)


def test_key_table() -> None:
    for wan, diffusers in wan_key_table().items():
        (key,) = to_diffusers({wan: torch.zeros(1)})
        (back,) = to_wan({diffusers: torch.zeros(1)})
        assert (key, back) == (diffusers, wan)
