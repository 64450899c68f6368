"""What the compiler makes of every kernel, for any architecture, without a GPU; and which backend would run here.

`static_report("sm_90")` builds the same launches as a real call, compiles them through Triton's own launch path for the
named target, and reads registers, spills, shared memory, occupancy and the inner loop from the machine code. The
figure to compare is `slots`: instructions that one warp scheduler issues per 64 x 64 block pair in the inner loop.
`recorded` figures live in compile_report.json next to this file.

The compiler works where `TRITON_INTERPRET` is not set; no driver is needed. Run this module as a program to print the
table for an architecture:

    python -m sparse_forcing.kernels.compile_report sm_90            # [tokens per block] [head dim]
    python -m sparse_forcing.kernels.compile_report --record         # after a change that is meant to move the figures
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_forcing.errors import ConfigError

RECORDED = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, kw_only=True)
class Target:
    """Limits of one multiprocessor, for occupancy."""

    backend: str
    arch: int | str
    warp: int
    registers: int
    smem: int  # bytes per multiprocessor
    smem_block: int  # bytes one program may use
    warps: int
    reserved: int = 1024  # bytes of shared memory the driver keeps per program


TARGETS = {
    "sm_80": Target(backend="cuda", arch=80, warp=32, registers=65536, smem=164 << 10, smem_block=163 << 10, warps=64),
    "sm_90": Target(backend="cuda", arch=90, warp=32, registers=65536, smem=228 << 10, smem_block=227 << 10, warps=64),
    "sm_100": Target(
        backend="cuda", arch=100, warp=32, registers=65536, smem=228 << 10, smem_block=227 << 10, warps=64
    ),
    "sm_120": Target(backend="cuda", arch=120, warp=32, registers=65536, smem=100 << 10, smem_block=99 << 10, warps=48),
    "gfx942": Target(
        backend="hip",
        arch="gfx942",
        warp=64,
        registers=131072,
        smem=64 << 10,
        smem_block=64 << 10,
        warps=32,
        reserved=0,
    ),
}
_TENSOR_OPS = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA")


@contextmanager
def compile_for(name: str) -> Iterator[None]:
    """Triton believes the active GPU is `name`; nothing can be launched, everything can be compiled."""
    import triton
    from triton.backends.compiler import GPUTarget

    if triton.knobs.runtime.interpret:
        raise ConfigError("compile report: TRITON_INTERPRET is set, so Triton cannot compile; unset it")
    if name not in TARGETS:
        raise ConfigError(f"compile report: unknown architecture {name!r}; choose one of {', '.join(TARGETS)}")
    target = TARGETS[name]

    class NoDevice:
        def get_current_target(self) -> Any:
            return GPUTarget(target.backend, target.arch, target.warp)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(NoDevice())
    _forget_compilations()
    try:
        yield
    finally:
        _forget_compilations()
        driver._active = before


def _forget_compilations() -> None:
    """A kernel caches per device number, not per target: drop what was made for another one."""
    for launch in _KERNELS:
        launch.device_caches.clear()


_KERNELS: set[Any] = set()


def examples(
    name: str, tokens: int = 64, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> list[tuple[str, Any]]:
    """(label, Launch) of every kernel the launch table of architecture `name` can pick, on typical tensors."""
    from sparse_forcing.kernels.block_sparse_attention.gpu.launch import plan_backward, plan_forward
    from sparse_forcing.kernels.block_sparse_attention.problem import Problem

    B, H, Nq, S, M = 1, 12, 4, 16, 8
    q, k, v = (torch.empty(B, H, n, tokens, head_dim, dtype=dtype) for n in (Nq, S, S))
    index = torch.arange(M, dtype=torch.int32).expand(B, H, Nq, M).contiguous()
    sizes = torch.full((B, H, S), tokens, dtype=torch.int32)
    rows = torch.full((Nq,), tokens, dtype=torch.int32)

    found: list[tuple[str, Any]] = []

    def add(label: str, launches: list[Any]) -> None:
        seen = {known for known, _ in found}
        for launch in launches:
            suffix = f" {label}" if label else ""
            if launch.name + suffix not in seen:
                found.append((launch.name + suffix, launch))

    even = Problem(q, k, v, index, None, None, head_dim**-0.5, 0)
    ragged = even._replace(query_sizes=rows, key_sizes=sizes)
    plain = plan_forward(even, name)
    add("", plain.launches)
    add("", plan_backward(even, name, q, plain.lse, plain.out, plain.out_rest, plain.lse).launches)
    add("mass", plan_forward(even, name, return_mass=True).launches)
    if dtype != torch.float32:
        add("rest", plan_forward(even, name, keep_rest=True).launches)
    add("", selection_examples(name, tokens, head_dim, dtype))
    add("", row_examples(head_dim, dtype))
    if plain.launches[0].name == "forward_tma":  # the pointer kernel spills so
        add("one stage", plan_forward(even, name, stages=1).launches)  # more programs at once; never timed, see README
    add("ragged", plan_forward(ragged, name).launches)
    add("ragged", plan_backward(ragged, name, q, None, plain.out, plain.out_rest, plain.lse).launches)
    return found


def selection_examples(name: str, tokens: int, head_dim: int, dtype: torch.dtype) -> list[Any]:
    """Launches of the selection kernels at the paper's size: 78 query blocks, 546 window blocks, 12 heads."""
    from sparse_forcing.kernels.block_selection.gpu import launch as plans
    from sparse_forcing.kernels.block_selection.reference import Pools

    x = torch.empty(1, 12, 78, tokens, head_dim, dtype=dtype)
    q, k = (torch.empty(1, 12, n, head_dim, dtype=dtype) for n in (78, 546))
    own = torch.zeros(78, dtype=torch.int32)
    slots, importance = torch.zeros(1, 12, 142, dtype=torch.int32), torch.zeros(1, 12, 142)
    return [
        plans.plan_pool(x, None, torch.ones(12, tokens))[0],
        plans.plan_choose(q, k, 137, own, 1.0, arch=name)[0],
        plans.plan_update(slots, importance, 64)[0],
        plans.plan_store(x, x, torch.zeros(1, 12, 78, dtype=torch.long), Pools(x, x, q, q), None, None),
    ]


def row_examples(head_dim: int, dtype: torch.dtype) -> list[Any]:
    """Launches of the row operations at the sizes of a chunk of Wan 2.1 1.3B, 12 heads."""
    from sparse_forcing.kernels.token_rows.gpu import launch as plans

    x = torch.empty(1, 8, 12 * head_dim, dtype=dtype)
    angles = torch.empty(8, head_dim // 2)
    keys = torch.empty(1, 12, 8, head_dim, dtype=dtype)
    return [
        plans.plan_norm_rotate(x, x[0, 0], 1e-6, angles, angles)[0],
        plans.plan_add_norm(x, x, x[:, :1], x[:, :1], x[:, :1], 1e-6, modulates=True)[0],
        plans.plan_turn_time(keys, *(torch.empty(1, 12, 8, 22) for _ in range(2))),
    ]


def compile_launch(launch: Any) -> Any:
    """Compiled kernel of one launch, inside `compile_for`."""
    _KERNELS.add(launch.kernel)
    return launch.compile()


def static_report(
    name: str, tokens: int = 64, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, Any]]:
    """One dictionary per kernel: name, registers, spills (bytes), smem (bytes), programs per SM, tensor instructions,
    loop (instructions per iteration), slots (per 64 x 64 pair and scheduler; None where no pair is computed), recorded.
    """
    recorded = load_recorded().get(name, {}) if (tokens, head_dim, dtype) == (64, 128, torch.bfloat16) else {}
    rows = []
    with compile_for(name):
        for label, launch in examples(name, tokens, head_dim, dtype):
            row = {"kernel": label, "arch": name, **describe(compile_launch(launch), name, launch)}
            rows.append(row | {"recorded": recorded.get(label, {}).get("slots")})
    return rows


FIGURES = ("slots", "registers", "spills", "smem", "programs")


def load_recorded() -> dict[str, dict[str, dict[str, float | None]]]:
    """Recorded `FIGURES` per architecture and kernel (head dim 128, 64-token blocks, bfloat16)."""
    return json.loads(RECORDED.read_text())["kernels"] if RECORDED.exists() else {}


def record(names: list[str]) -> None:
    """Rewrite compile_report.json with what the installed compiler makes of the kernels."""
    import triton

    kernels = load_recorded()
    for name in names:
        kernels[name] = {row["kernel"]: {key: row[key] for key in FIGURES} for row in static_report(name)}
    units = {"slots": "issued per scheduler and 64x64 pair", "spills": "bytes", "smem": "bytes", "programs": "per SM"}
    RECORDED.write_text(json.dumps({"triton": triton.__version__, "units": units, "kernels": kernels}, indent=1) + "\n")


def describe(compiled: Any, name: str, launch: Any = None) -> dict[str, Any]:
    """Read one compiled kernel's figures from its machine code."""
    if TARGETS[name].backend == "hip":
        return _describe_amd(compiled, name)
    return _describe_nvidia(compiled, name, launch)


def _describe_nvidia(compiled: Any, name: str, launch: Any) -> dict[str, Any]:
    usage, listing = _cuobjdump(compiled.asm["cubin"])
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    registers, stack = int(match[1]), int(match[2])
    code = instructions(listing)
    counts = collections.Counter(op.split(".")[0] for _, op, _ in code)
    warps, smem = compiled.metadata.num_warps, compiled.metadata.shared
    loops = [last - first + 1 for first, last in inner_loops(code)]
    target = TARGETS[name]
    return {
        "registers": registers,
        "spills": stack,
        "local": counts["LDL"] + counts["STL"],
        "smem": smem,
        "warps": warps,
        "programs": occupancy(target, registers, warps, smem),
        "tensor": {op: counts[op] for op in _TENSOR_OPS if counts[op]},
        "copies": {op: counts[op] for op in ("UTMALDG", "UTMASTG", "LDGSTS") if counts[op]},
        "loop": max(loops, default=None),
        "slots": _slots(loops, warps, launch),
    }


def _slots(loops: list[int], warps: int, launch: Any) -> float | None:
    """Loop instructions, times warps per scheduler, over the 64 x 64 pairs one iteration covers."""
    if launch is None or not loops or "BLOCK_K" not in launch.args:
        return None
    pairs = launch.args["BLOCK_Q"] * launch.args["BLOCK_K"] / 64**2
    return max(loops) * (warps / 4) / pairs


def _describe_amd(compiled: Any, name: str) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.findall(rf"\.{key}:\s+(\d+)", text)
        return max(map(int, found), default=0)

    registers, warps, smem = number("vgpr_count"), compiled.metadata.num_warps, compiled.metadata.shared
    return {
        "registers": registers,
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "local": len(re.findall(r"\bscratch_(?:load|store)", text)),
        "smem": smem,
        "warps": warps,
        "programs": occupancy(TARGETS[name], registers, warps, smem),
        "tensor": {"MFMA": len(re.findall(r"\bv_mfma", text))},
        "copies": {},
        "loop": None,
        "slots": None,
    }


def occupancy(target: Target, registers: int, warps: int, smem: int) -> int:
    """Programs that fit on one multiprocessor at once; 0 if not even one does."""
    if smem > target.smem_block:
        return 0
    per_warp = -(-registers * target.warp // 256) * 256
    by_registers = target.registers // max(per_warp, 1) // warps
    return min(by_registers, target.smem // max(smem + target.reserved, 1), target.warps // warps)


def _cuobjdump(cubin: bytes) -> tuple[str, str]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [knobs.nvidia.cuobjdump.path]
        usage = subprocess.run([*tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        listing = subprocess.run([*tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return usage, listing


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")


def instructions(listing: str) -> list[tuple[int, str, str]]:
    """SASS text -> (address, operation, operands)."""
    found = map(_INSTRUCTION.search, listing.splitlines())
    return [(int(m[1], 16), m[2], m[3]) for m in found if m]


def inner_loops(code: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """Innermost backward branches around tensor-core instructions, as index ranges.

    A branch right after a barrier poll is that barrier's retry, which does not belong to the loop.
    """
    where = {address: i for i, (address, _, _) in enumerate(code)}
    tensor = [op.split(".")[0] in _TENSOR_OPS for _, op, _ in code]
    ranges = set()
    for i, (address, op, operands) in enumerate(code):
        jump = re.search(r"0x([0-9a-f]+)", operands) if op.split(".")[0] == "BRA" else None
        polled = any(code[j][1].startswith("SYNCS.PHASECHK") for j in range(max(0, i - 6), i))
        if jump is None or polled or int(jump[1], 16) >= address or int(jump[1], 16) not in where:
            continue
        first = where[int(jump[1], 16)]
        if any(tensor[first : i + 1]):
            ranges.add((first, i))
    return sorted(r for r in ranges if not any(o != r and o[0] >= r[0] and o[1] <= r[1] for o in ranges))


def backend_status() -> list[dict[str, str]]:
    """Per operation and backend: whether it would run here, and why not if it would not."""
    from sparse_forcing.kernels.block_selection import interface as selection
    from sparse_forcing.kernels.block_sparse_attention import interface as attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probe = torch.empty(1, 1, 1, 64, 128, device=device, dtype=torch.bfloat16)
    chosen = attention.resolve_backend("auto", probe)
    rows = []
    for operation, module in (("block_sparse_attention", attention), ("block_selection", selection)):
        for backend in module.BACKENDS[1:]:
            reason = module.why_unavailable(backend, probe)
            used = reason is None and backend == (
                chosen if module is attention else _choose_selection(device, module, probe)
            )
            status = "used" if used else "available" if reason is None else "unavailable"
            rows.append({"operation": operation, "backend": backend, "status": status, "reason": reason or ""})
    return rows


def _choose_selection(device: torch.device, selection: Any, probe: torch.Tensor) -> str:
    return "triton" if device.type != "cpu" and selection.why_unavailable("triton", probe) is None else "reference"


def as_table(rows: list[dict[str, Any]]) -> str:
    """Plain-text table of `static_report`."""
    columns = ("kernel", "registers", "spills", "smem", "programs", "loop", "slots", "recorded")
    lines = [[str(c) for c in columns]]
    for row in rows:
        cells = (row[c] for c in columns)
        lines.append([f"{c:.0f}" if isinstance(c, float) else "-" if c is None else str(c) for c in cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        record(sys.argv[2:] or list(TARGETS))
    else:
        name, tokens, head_dim = (sys.argv[1:] + ["sm_90", "64", "128"][len(sys.argv) - 1 :])[:3]
        print(as_table(static_report(name, int(tokens), int(head_dim))))
