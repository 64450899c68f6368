"""Weight files are checked before a byte of them is used.

safetensors: the header is validated here (size, JSON, dtypes, shapes, offsets without gaps or overlaps, file length),
so that a damaged or hostile file is one clear error instead of a crash or an absurd allocation. `.pt`: only
`torch.load(weights_only=True)`, which refuses pickled code. Neither format notices a flipped bit: weights/manifest.py.

safetensors layout: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import PathLike
from sparse_forcing.strict_json import parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

MAX_HEADER_BYTES = 4 << 20  # of tens of thousands of tensors; parsing takes thirty times as much memory
MAX_CONFIG_BYTES = 1 << 20  # of a JSON file that describes a model
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


def check_safetensors(path: PathLike) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Validate the header of a safetensors file against its length; return {name: (dtype, shape)}.

    Raises:
        WeightsError: the file is missing, cut, or its header is absurd.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
            raise WeightsError(f"cannot read weights {path}: not a regular file")
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise WeightsError(f"{path}: not a complete safetensors file ({size} bytes, header of {length})")
            header = parse_json(file.read(length), source=f"{path} header")
    except OSError as error:
        raise WeightsError(f"cannot read weights {path}: {error.strerror or error}") from error
    except ConfigError as error:
        raise WeightsError(f"{error}; the file is damaged") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: the safetensors header is not a table of tensors")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    _check_offsets(path, entries, size - 8 - length)
    return {name: (dtype, shape) for name, (dtype, shape, _, _) in entries.items()}


def _entry(path: PathLike, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{path}: tensor {name!r:.100} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise WeightsError(f"{path}: tensor {name!r:.100} has the unknown dtype {dtype!r:.40}")
    if not (_is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise WeightsError(f"{path}: tensor {name!r:.100} has an impossible shape or offsets")
    if math.prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise WeightsError(
            f"{path}: tensor {name!r:.100} of shape {shape} does not fill its {offsets[1] - offsets[0]} bytes"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _is_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )


def _check_offsets(
    path: PathLike, entries: Mapping[str, tuple[str, tuple[int, ...], int, int]], data_bytes: int
) -> None:
    end = 0
    for name, (_, _, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise WeightsError(f"{path}: tensor {name!r:.100} overlaps another or leaves a gap before it")
        end = stop
    if end != data_bytes:
        raise WeightsError(
            f"{path}: holds {data_bytes} bytes of data, its header describes {end}; the file is cut or damaged"
        )


def load_safetensors(path: PathLike, *, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file whose header is sound. Raises WeightsError."""
    check_safetensors(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=device)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: {error}") from error


def load_pt(path: PathLike, *, mmap: bool = False) -> Any:
    """The content of a `.pt` checkpoint made of tensors and plain containers, on the CPU; code in it is refused.

    Args:
        mmap: map the file instead of reading it (copy on write); tensors are then good for as long as the file is.

    Raises:
        WeightsError: missing, damaged, or holding anything that unpickling would have to execute.
    """
    import pickle

    import torch

    if not Path(path).is_file():
        raise WeightsError(f"cannot read weights {path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = "it is damaged or contains code, which is never executed"
        raise WeightsError(f"{path}: refused, {reason}; convert it to safetensors where it comes from") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: not a readable checkpoint ({first_line:.200})") from error


def load_weights(path: PathLike) -> Any:
    """Load one weight file by its suffix: `.safetensors`, or `.pt` / `.pth` / `.bin` / `.ckpt`. Raises WeightsError."""
    suffix = Path(path).suffix.lower()
    if suffix == ".safetensors":
        return load_safetensors(path)
    if suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return load_pt(path)
    raise WeightsError(f"{path}: unknown kind of weight file; expected .safetensors or .pt")


def check_state_dict(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, source: str, show: int = 5
) -> None:
    """Compare names and shapes with what a model expects; both are mappings name -> tensor.

    Raises:
        WeightsError: one line listing the first `show` missing, unexpected and wrongly shaped tensors.
    """
    problems = []
    for label, names in (
        ("missing", [name for name in expected if name not in found]),
        ("unexpected", [name for name in found if name not in expected]),
        ("not a tensor", [name for name, value in found.items() if not hasattr(value, "shape")]),
        (
            "wrong shape",
            [
                f"{name} {list(found[name].shape)} instead of {list(value.shape)}"
                for name, value in expected.items()
                if hasattr(found.get(name), "shape") and found[name].shape != value.shape
            ],
        ),
        (
            "not floating point",
            [
                name
                for name, value in expected.items()
                if hasattr(found.get(name), "dtype")
                and value.is_floating_point()
                and not found[name].is_floating_point()
            ],
        ),
    ):
        if names:
            more = f" and {len(names) - show} more" if len(names) > show else ""
            problems.append(f"{label}: {', '.join(names[:show])}{more}")
    if problems:
        raise WeightsError(f"{source}: does not fit the model; {'; '.join(problems)}")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first floating-point tensor that holds NaN or infinite numbers, None when there is none."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor):
            tensor = tensor.dequantize()  # a quantization library's own, which knows little else
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return None
