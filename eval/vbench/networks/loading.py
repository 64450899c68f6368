"""Weight files of the user, read without executing what is in them, and fitted to the networks here."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sparse_forcing.errors import WeightsError
from sparse_forcing.weights.safe_load import check_state_dict, load_weights

StateDict = dict[str, torch.Tensor]


def read_state_dict(path: Path) -> StateDict:
    """Tensors of a weight file: .safetensors, a plain .pth, or OpenAI's TorchScript .pt.

    Pickled objects other than tensors are refused. A nested `model` or `state_dict` is unwrapped, a `module.` prefix
    removed. Raises WeightsError.
    """
    content = _read_torchscript(path) if _is_torchscript(path) else load_weights(path)
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise WeightsError(f"{path}: expected a dictionary of tensors")
    return {name.removeprefix("module."): value for name, value in content.items()}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _read_torchscript(path: Path) -> StateDict:
    # TorchScript's own restricted interpreter, not Python's: the archive can compute tensors but not reach the machine.
    try:
        return torch.jit.load(path, map_location="cpu").state_dict()
    except (RuntimeError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: not a readable TorchScript archive ({first_line:.200})") from error


def load_into(module: nn.Module, state: Mapping[str, torch.Tensor], path: Path, ignore: tuple[str, ...] = ()) -> None:
    """Load every parameter as float32, in evaluation mode; names and shapes must fit exactly, `ignore` aside."""
    wanted = module.state_dict()
    given = {name: value for name, value in state.items() if name not in ignore}
    check_state_dict(wanted, given, source=str(path))
    module.load_state_dict({name: value.to(wanted[name].dtype) for name, value in given.items()})
    module.requires_grad_(False).eval()


def need(state: Mapping[str, torch.Tensor], name: str, path: Path) -> torch.Tensor:
    """A tensor that decides the architecture; WeightsError where the file lacks it."""
    if name not in state:
        raise WeightsError(f"{path}: has no {name}; is it the right file?")
    return state[name]


def count_blocks(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many numbered blocks follow a prefix: `blocks.0.`, `blocks.1.`, ... -> 2."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
