"""Weight files that are damaged, hostile, or of another model (faults 5 to 8)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sparse_forcing.errors import SparseForcingError, WeightsError
from sparse_forcing.model_folder.folder import (
    EMBEDDED_MODELS,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    read_defaults,
)
from sparse_forcing.weights.manifest import folder_hash, verify_manifest, write_manifest
from sparse_forcing.weights.parts import MAX_SIZE
from sparse_forcing.weights.safe_load import (
    MAX_CONFIG_BYTES,
    MAX_HEADER_BYTES,
    check_safetensors,
    check_state_dict,
    load_pt,
    load_safetensors,
    load_weights,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0, 5)}


def write_safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[Any], start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_sound_file_loads(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "w.safetensors", metadata={"format": "pt"})
    assert check_safetensors(tmp_path / "w.safetensors") == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
        "c": ("F32", (0, 5)),
    }
    loaded = load_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry([2], 0, 8)}, b"\0" * 7, "cut or damaged"),
        ({"a": entry([2], 0, 8)}, b"\0" * 9, "cut or damaged"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12, "overlaps"),
        ({"a": entry([2], 0, 8), "b": entry([1], 12, 16)}, b"\0" * 16, "leaves a gap"),
        ({"a": entry([3], 0, 8)}, b"\0" * 8, "does not fill"),
        ({"a": entry([2**40, 2**40], 0, 8)}, b"\0" * 8, "does not fill"),
        ({"a": entry([-1], 0, 8)}, b"\0" * 8, "impossible shape"),
        ({"a": entry([2.0], 0, 8)}, b"\0" * 8, "impossible shape"),
        ({"a": entry([1] * 100, 0, 4)}, b"\0" * 4, "impossible shape"),
        ({"a": entry([2], 8, 0)}, b"\0" * 8, "impossible shape"),
        ({"a": entry([2], 0, 10**30)}, b"\0" * 8, "impossible shape"),
        ({"a": entry([2], 0, 8, "F31")}, b"\0" * 8, "unknown dtype"),
        ({"a": entry([2], 0, 8, ["F32"])}, b"\0" * 8, "unknown dtype"),
        ({"a": {"dtype": "F32"}}, b"", "not described by"),
        ({"a": 3}, b"", "not described by"),
        ([], b"", "not a table"),
        (b"{", b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b"[" * 50_000, b"", "not valid JSON"),
        (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', b"\0" * 4, "NaN"),
        (b'{"a": {}, "a": {}}', b"", "twice"),
    ],
)
def test_bad_header_is_one_clean_error(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = write_safetensors(tmp_path / "w.safetensors", header, data)
    with pytest.raises(WeightsError, match=message) as error:
        load_safetensors(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 3])
def test_header_length_beyond_the_file_is_refused_without_allocating(tmp_path: Path, length: int) -> None:
    path = write_safetensors(tmp_path / "w.safetensors", b"{}", length=length)
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        check_safetensors(path)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    for size in range(len(data)):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        with pytest.raises(WeightsError):
            check_safetensors(tmp_path / "cut.safetensors")


@settings(derandomize=True, max_examples=200, deadline=None, database=None)
@given(st.data())
def test_damaged_headers_give_tensors_or_our_own_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        loaded = load_safetensors(path)
    except WeightsError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in loaded.values())


class Payload:
    """Creates a file when unpickled by an unsafe loader."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    torch.save(
        {"w": torch.ones(2), "x": Payload(tmp_path / "marker")},
        tmp_path / "w.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(WeightsError, match=r"w\.pt: refused.*never executed"):
        load_pt(tmp_path / "w.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    with pytest.raises(WeightsError):
        load_pt(tmp_path / "plain.pt")
    assert not (tmp_path / "marker").exists()


def test_plain_checkpoint_loads_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    torch.save({"generator": TENSORS, "step": 3}, tmp_path / "w.pt")
    assert torch.equal(load_weights(tmp_path / "w.pt")["generator"]["a"], TENSORS["a"])
    data = (tmp_path / "w.pt").read_bytes()
    for size in (0, 1, 10, len(data) // 2, len(data) - 10):
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(WeightsError, match=r"^[^\n]*cut\.pt[^\n]*$"):
            load_pt(tmp_path / "cut.pt")
    for name in ("none.pt", "none.safetensors", "w.onnx"):
        with pytest.raises(WeightsError, match=name):
            load_weights(tmp_path / name)


def test_one_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "w.safetensors")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("not part of the model")
    assert verify_manifest(tmp_path) is None
    hashes = write_manifest(tmp_path)
    assert sorted(hashes) == ["sub/config.json", "w.safetensors"]
    assert verify_manifest(tmp_path) == hashes
    before = folder_hash(tmp_path)
    data = bytearray((tmp_path / "w.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "w.safetensors").write_bytes(data)
    check_safetensors(tmp_path / "w.safetensors")  # the format itself does not notice
    with pytest.raises(WeightsError, match=r"w\.safetensors: SHA-256 differs"):
        verify_manifest(tmp_path)
    write_manifest(tmp_path)
    assert folder_hash(tmp_path) != before


def test_missing_added_and_damaged_manifest_entries_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    (tmp_path / "c").write_text("c")
    with pytest.raises(WeightsError, match="c: not listed"):
        verify_manifest(tmp_path)
    (tmp_path / "c").unlink()
    (tmp_path / "a").unlink()
    with pytest.raises(WeightsError, match="a: listed in"):
        verify_manifest(tmp_path)
    for text in ("[]", "{", '{"files": {"b": 3}}', '{"files": {"../a": "0"}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(WeightsError, match="manifest"):
            verify_manifest(tmp_path)
    with pytest.raises(WeightsError, match="no such model folder"):
        folder_hash(tmp_path / "none")


def test_keys_that_do_not_fit_are_listed_first_few_only() -> None:
    expected = {f"layer{i}": torch.zeros(2, 3) for i in range(9)} | {"same": torch.zeros(1)}
    found = {f"layer{i}": torch.zeros(3, 2) for i in range(7)} | {"other": torch.zeros(1), "same": torch.zeros(1).int()}
    with pytest.raises(WeightsError) as error:
        check_state_dict(expected, found, source="w.pt", show=2)
    text = str(error.value)
    assert "missing: layer7, layer8;" in text
    assert "unexpected: other;" in text
    assert "wrong shape: layer0 [3, 2] instead of [2, 3], layer1 [3, 2] instead of [2, 3] and 5 more" in text
    assert "not floating point: same" in text
    check_state_dict(expected, expected, source="w.pt")


def test_values_that_are_not_tensors_are_named() -> None:
    with pytest.raises(WeightsError, match="not a tensor: step"):
        check_state_dict({"w": torch.zeros(1)}, {"w": torch.zeros(1), "step": 3}, source="w.pt")
    with pytest.raises(WeightsError, match="wrong shape: w"):
        check_state_dict({"w": torch.zeros(1)}, {"w": torch.from_numpy(np.zeros(2))}, source="w.pt")


LOADERS = {"transformer": load_transformer, "text_encoder": load_text_encoder, "vae": load_autoencoder}


def copied(folder: Path, part: str, **changes: Any) -> Path:
    """The embedded model with another config of one part."""
    shutil.copytree(EMBEDDED_MODELS / "tiny", folder / "model")
    path = folder / "model" / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder / "model"


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("transformer", "num_layers", 10**6),
        ("transformer", "num_layers", 10**30),
        ("transformer", "ffn_dim", 10**12),
        ("transformer", "patch_size", [1, 10**9, 2]),
        ("text_encoder", "num_layers", 5000),
        ("text_encoder", "text_len", MAX_SIZE + 1),
        ("vae", "decoder_blocks", 10**5),
        ("vae", "num_blocks", 10**9),
    ],
)
def test_absurd_counts_are_refused_before_a_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, name: str, value: Any
) -> None:
    model = copied(tmp_path, part, **{name: value})
    monkeypatch.setattr(torch.nn.Linear, "__init__", lambda *_, **__: pytest.fail("a layer was built"))
    with pytest.raises(WeightsError, match=rf"config\.json: {name} is \d+, but"):
        LOADERS[part](model)


@pytest.mark.parametrize("part", LOADERS)
def test_a_config_that_is_too_large_is_not_parsed(tmp_path: Path, part: str) -> None:
    model = copied(tmp_path, part, note="x" * MAX_CONFIG_BYTES)
    with pytest.raises(WeightsError, match=r"config\.json: \d+ bytes"):
        LOADERS[part](model)


def test_defaults_manifests_and_headers_have_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copied(tmp_path, "vae")
    (model / "pipeline.json").write_text(json.dumps({"negative_prompt": "x" * MAX_CONFIG_BYTES}))
    (model / "manifest.json").write_text(json.dumps({"files": {"x" * (5 << 20): "y"}}))
    header = write_safetensors(tmp_path / "h.safetensors", b" " * (MAX_HEADER_BYTES + 1))
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(SparseForcingError, match=r"pipeline\.json: larger than"):
        read_defaults(model)
    with pytest.raises(WeightsError, match=r"manifest\.json: larger than"):
        verify_manifest(model)
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        check_safetensors(header)
