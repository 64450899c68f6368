"""One part of a model folder, loaded only if its tensors are exactly those of the model that its config describes.

diffusers fills what a file lacks with nothing at all and ignores what it has beside; here both are errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import PathLike, read_json
from sparse_forcing.weights.safe_load import MAX_CONFIG_BYTES, check_safetensors, check_state_dict

CONFIG = "config.json"
MAX_SIZE = 1 << 20  # of any number in a config: vocabularies have 2^18 words
_COUNTED, _FEW = ("layers", "blocks", "depth"), 64

_INTEGERS = ("I", "U", "BOOL")  # how the safetensors names of types without fractions begin


@contextmanager
def explained(source: PathLike, what: str = "cannot be loaded") -> Iterator[None]:
    """What reading a model and its config may raise becomes a WeightsError of one line that names `source`."""
    try:
        yield
    except WeightsError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{source}: {what} ({reason:.300})") from error


def check_part(folder: Path) -> dict[str, Tensor]:
    """Tensors of all safetensors files of a folder without their data (device meta), from headers that are sound.

    Raises:
        WeightsError: a file is cut or damaged, or the folder's config is not one or too large.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.is_file() and path.stat().st_size > MAX_CONFIG_BYTES:
            raise WeightsError(
                f"{path}: {path.stat().st_size} bytes; a model's JSON files have up to {MAX_CONFIG_BYTES}"
            )
    for path in sorted(folder.glob("*.safetensors")):
        for name, (dtype, shape) in check_safetensors(path).items():
            kind = torch.int32 if dtype.startswith(_INTEGERS) else torch.float32
            found[name] = torch.empty(shape, dtype=kind, device="meta")
    check_counts(folder, len(found))
    return found


def check_counts(folder: Path, tensors: int) -> None:
    """Refuse a config.json whose numbers cannot belong to a model of so many tensors, before one is built of it.

    Raises:
        WeightsError: more layers than tensors, or a size that no tensor has.
    """
    path = folder / CONFIG
    if not path.is_file():
        return
    try:
        config = read_json(path, max_bytes=MAX_CONFIG_BYTES)
    except ConfigError as error:
        raise WeightsError(f"{error}; the config is damaged") from error
    for name, value in config.items() if isinstance(config, dict) else ():
        counts = any(word in name for word in _COUNTED)
        limit = max(tensors, _FEW) if counts else MAX_SIZE
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > limit:
                what = f"the files hold {tensors} tensors" if counts else f"sizes of a model are at most {MAX_SIZE}"
                raise WeightsError(f"{path}: {name} is {number}, but {what}")


def load_part(cls: Any, folder: Path, dtype: torch.dtype | None) -> Any:
    """A diffusers model from its folder, in evaluation mode; its weights as `dtype`, or as they are stored.

    Raises:
        WeightsError: the config or a file cannot be read, or tensors are missing, surplus or of another shape or kind.
    """
    found = check_part(folder)
    with explained(folder):
        config = cls.load_config(folder, local_files_only=True)
        with torch.device("meta"):
            expected = cls.from_config(config).state_dict()
        if found:  # without any file the loader says which one it looked for
            check_state_dict(expected, found, source=str(folder))
        return cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True).eval()
