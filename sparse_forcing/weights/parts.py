"""One part of a model folder, loaded only if its tensors are exactly those of the model that its config describes.

diffusers fills what a file lacks with nothing at all and ignores what it has beside; here both are errors.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_forcing.devices import is_out_of_memory
from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import PathLike, read_json
from sparse_forcing.weights.safe_load import MAX_CONFIG_BYTES, check_safetensors, check_state_dict

CONFIG = "config.json"
_COUNTED, _FEW = ("layers", "blocks", "depth"), 64

_INTEGERS = ("I", "U", "BOOL")  # how the safetensors names of types without fractions begin
MAX_SIZE = 1 << 20
"""Of any number in a config: vocabularies have 2^18 words."""


@contextmanager
def explain_read_errors(source: PathLike, what: str = "cannot be loaded") -> Iterator[None]:
    """What reading a model and its config may raise becomes a WeightsError of one line that names `source`. Running out
    of memory is no fault of theirs and passes through."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # libraries have errors of their own for configs, beside the usual ones
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"{source}: {what} ({reason:.300})") from error


def require_part(folder: Path) -> None:
    """Raise WeightsError when a model folder lacks this part of it, or the part's config."""
    if not folder.is_dir():
        raise WeightsError(
            f"{folder.parent}: the model has no folder {folder.name}; copy or link it from a complete model"
        )
    if not any(folder.glob("*.json")):
        raise WeightsError(f"{folder}: holds no config; copy or link this part from a complete model")


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


def warn_of_unused_tensors(folder: Path, names: Collection[str], show: int = 5) -> None:
    """Say in a line which tensors of a part are left out: those of a decoder that was saved with an encoder."""
    if names:
        more = f" and {len(names) - show} more" if len(names) > show else ""
        warnings.warn(f"{folder}: tensors that are not used: {', '.join(sorted(names)[:show])}{more}", stacklevel=3)


@contextmanager
def unknown_settings_unsaid() -> Iterator[None]:
    """Keeps diffusers from saying, each time it reads a config, which of its settings it does not know: a model
    folder's remarks say it once."""
    logger = logging.getLogger("diffusers.configuration_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "are not expected and will be ignored" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def load_part(cls: Any, folder: Path, dtype: torch.dtype | None) -> Any:
    """A diffusers model from its folder, in evaluation mode; its weights as `dtype`, or as they are stored. Raises
    WeightsError as `check_model` does."""
    check_model(cls, folder)
    with explain_read_errors(folder), unknown_settings_unsaid():
        return cls.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True).eval()


def check_model(cls: Any, folder: Path) -> None:
    """Check a diffusers model's folder before it is loaded. Tensors of a quantized model are left to its quantizer.

    Raises:
        WeightsError: there is no such folder, the config or a file cannot be read, or tensors are missing, surplus or
            of another shape or kind.
    """
    require_part(folder)
    found = check_part(folder)
    with explain_read_errors(folder), unknown_settings_unsaid():
        config = cls.load_config(folder, local_files_only=True)
        _check_sizes(cls, config, folder)
        with torch.device("meta"):
            expected = cls.from_config(config).state_dict()
        if found and "quantization_config" not in config:  # without any file the loader says which one it looked for
            check_state_dict(expected, found, source=str(folder))


def _check_sizes(cls: Any, config: dict[str, Any], folder: Path) -> None:
    """Raise WeightsError for a count or width that no model has, before it meets any arithmetic."""
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        value = config.get(name, parameter.default)
        least = 0 if parameter.default == 0 else 1
        if parameter.annotation in (int, "int") and not (type(value) is int and least <= value <= MAX_SIZE):
            raise WeightsError(
                f"{folder / 'config.json'}: {name} must be a whole number from {least} to {MAX_SIZE}, got {value!r:.60}"
            )
