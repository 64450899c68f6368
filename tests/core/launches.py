"""What a GPU would be asked to do, counted without one: every call on empty tensors, by the place that made it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_forcing
from sparse_forcing.kernels.block_selection.gpu import backend as selection_backend
from sparse_forcing.kernels.block_sparse_attention.gpu import backend as attention_backend
from sparse_forcing.kernels.token_rows.gpu import backend as rows_backend
from sparse_forcing.model import layers, transformer
from sparse_forcing.sampling import samplers

ROOT = str(Path(sparse_forcing.__file__).resolve().parents[1])
VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "unbind",
    ),
    *("split", "split_with_sizes", "as_strided", "alias", "detach", "reshape", "_reshape_alias", "unflatten", "chunk"),
    *("empty", "empty_like", "new_empty", "empty_strided", "unsafe_split", "lift_fresh", "device"),
}
PRODUCTS = {"addmm", "mm", "bmm", "baddbmm", "_addmm_activation", "attention", "block_sparse_attention"}
KERNELS = {"block_sparse_attention": 2}  # GPU kernels of a call of ours: lists and forward
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}


@dataclass
class Row:
    """Calls, GPU kernels and bytes that they read and write, of one place."""

    calls: int = 0
    launches: int = 0
    gigabytes: float = 0.0
    names: Counter = field(default_factory=Counter)


def nbytes(x: Tensor) -> int:
    """Bytes that are in memory: of an expanded dimension one."""
    count = 1
    for size, step in zip(x.shape, x.stride()):
        count *= size if step else 1
    return count * x.element_size()


def package_frames() -> list[FrameType]:
    """Frames of this project on the stack, innermost first."""
    frame, found = sys._getframe(2), []
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and "/tests/" not in path and "/.venv/" not in path:
            found.append(frame)
        frame = frame.f_back
    return found


class LaunchCounter(TorchDispatchMode):
    """Rows by (part, place): part is "layers" inside a block, "pass" elsewhere in a pass, "between" two chunks, "chunk"
    in the sampler, and with `backward` what autograd itself calls. `waits` lists what would
    make the host wait for the GPU inside a pass."""

    def __init__(self, *, backward: bool = False) -> None:
        super().__init__()
        self.backward = backward
        self.rows: dict[tuple[str, str], Row] = {}
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        inputs, outputs = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), out))
        devices = {x.device.type for x in inputs + outputs}
        frames = package_frames()
        if name in VIEWS or "meta" not in devices or not (frames or self.backward):
            return out
        part, place = "backward", "autograd"
        if frames:
            part, place = self._part(frames), f"{Path(frames[0].f_code.co_filename).name}:{frames[0].f_code.co_name}"
        row = self.rows.setdefault((part, place), Row())
        row.calls += 1
        row.launches += KERNELS.get(name, 1)
        row.names[name] += 1
        if name not in PRODUCTS:
            row.gigabytes += self._moved(name, inputs, outputs) / 1e9
        if part in ("layers", "pass") and (name in WAITS or devices == {"meta", "cpu"}):
            self.waits.append(f"{place}: {name} {[(list(x.shape), str(x.device)) for x in inputs + outputs]}")
        return out

    @staticmethod
    def _part(frames: list[FrameType]) -> str:
        names = {frame.f_code.co_name for frame in frames}
        if transformer.CausalWanBlock.forward.__code__ in {frame.f_code for frame in frames}:
            return "layers"
        if any(frame.f_code.co_name == "forward" and "transformer" in frame.f_code.co_filename for frame in frames):
            return "pass"
        return "between" if "begin_chunk" in names else "chunk"

    @staticmethod
    def _moved(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        if name in ("index_copy_", "scatter_", "copy_", "index_put_"):  # what is written over is not read
            return 2 * sum(nbytes(x) for x in inputs[1:])
        if name in ("gather", "index", "index_select"):
            return 2 * sum(nbytes(x) for x in outputs)
        if name == "store_blocks":
            return 2 * sum(nbytes(x) for x in inputs[:2])
        return sum(nbytes(x) for x in inputs + outputs)

    def total(self, part: str, what: str = "launches") -> float:
        return sum(getattr(row, what) for (where, _), row in self.rows.items() if where == part)

    def table(self) -> str:
        lines = [f"{'part':8} {'place':44} {'calls':>7} {'launches':>8} {'GB':>9}  what"]
        for (part, place), row in sorted(self.rows.items(), key=lambda item: (item[0][0], -item[1].launches)):
            names = ", ".join(f"{name} {count}" for name, count in row.names.most_common(6))
            lines.append(f"{part:8} {place:44} {row.calls:7} {row.launches:8} {row.gigabytes:9.3f}  {names}")
        return "\n".join(lines)


_LIBRARY = torch.library.Library("launch_test", "DEF")
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v) -> Tensor")
_LIBRARY.impl("attention", lambda q, k, v: torch.empty_like(q), "Meta")
_LIBRARY.define("attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)")
_LIBRARY.impl("attention_backward", lambda grad, *inputs: tuple(map(torch.empty_like, inputs)), "Meta")
_LIBRARY.define("rms_norm(Tensor x, Tensor weight) -> Tensor")
_LIBRARY.impl("rms_norm", lambda x, weight: torch.empty_like(x), "Meta")
_LIBRARY.define("rms_norm_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)")
_LIBRARY.impl("rms_norm_backward", lambda grad, *inputs: tuple(map(torch.empty_like, inputs)), "Meta")
for _name in ("attention", "rms_norm"):
    torch.library.register_autograd(
        f"launch_test::{_name}",
        lambda ctx, grad, name=_name: getattr(torch.ops.launch_test, f"{name}_backward")(grad, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )


def forget_constants() -> None:
    """Drop what the package remembers by device: numbers without data are of no use to anybody else."""
    for remembered in (samplers.few_step_levels, samplers.euler_levels):
        remembered.cache_clear()


@contextmanager
def meta_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The meta device passes for a GPU: our kernels are chosen, and fused calls of torch count as the one kernel they
    are there (meta tensors would take them apart)."""
    for backend in (attention_backend, selection_backend, rows_backend):
        monkeypatch.setattr(backend, "why_unavailable", lambda tensor: None)
    monkeypatch.setattr(layers, "ends_products", lambda device: device.type == "meta")
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # knows no meta device
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: None)
    attention, rms_norm = torch.ops.launch_test.attention, torch.ops.launch_test.rms_norm
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: attention(q, k, v))
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: rms_norm(x, weight))
    forget_constants()
    try:
        yield
    finally:
        forget_constants()
