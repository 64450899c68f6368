"""The one place that decides how the Triton kernels are launched: variant, tile sizes, warps and stages per
architecture.

`plan_forward` and `plan_backward` turn tensors into a list of `Launch`es and the tensors these will fill. The backend
runs them; the compile report compiles exactly the same list for a named architecture without a GPU. Nothing here is
tuned on the number of blocks or the length of a list, so a rollout compiles once.

Shape legend: ../problem.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_forcing.errors import SparseForcingError
from sparse_forcing.kernels.block_sparse_attention.gpu import backward as bwd
from sparse_forcing.kernels.block_sparse_attention.gpu import forward as fwd
from sparse_forcing.kernels.block_sparse_attention.gpu.lists import block_mass, inverse_lists, list_counts
from sparse_forcing.kernels.block_sparse_attention.ops import rest_shape
from sparse_forcing.kernels.block_sparse_attention.problem import Problem
from sparse_forcing.kernels.triton_runtime import Launch, power_of_two, prepare

MAX_BLOCK = 128  # rows or tokens per block; 64 is what the kernels are tuned for
MAX_HEAD_DIM = 256
LOG2E = 1.4426950408889634


class Tile(NamedTuple):
    """A program of one kernel: query rows and key tokens of its tile at most, warps, pipeline stages.

    A block larger than its tile is visited in parts (pointer kernels). Tensor-core products of Hopper and later need 64
    rows of the side a program keeps; the other side may be cut without losing them.
    """

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2


Tiles = dict[str, tuple[Tile, Tile, Tile]]  # per kernel, for a padded head dim up to 64, 128, 256


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What one GPU family runs. Every tile below compiles without spills, see compile_report.py."""

    tma: bool = False  # has the bulk copy engine and the 64-row tensor instruction that make the TMA kernels pay
    halves: bool = False  # the pointer kernel adds up two halves of a head dim from 128 (see `forward_pointer`)
    tiles: Tiles = field(default_factory=dict)  # 16-bit types
    tiles_float32: Tiles = field(default_factory=dict)

    def tile(self, kernel: str, block_d: int, itemsize: int) -> Tile:
        """Tile of `kernel` for a padded head dim and an element of so many bytes."""
        width = 0 if block_d <= 64 else 1 if block_d <= 128 else 2
        known = (self.tiles_float32 or _FLOAT32) if itemsize == 4 else self.tiles
        return known.get(kernel, _USUAL)[width]


_USUAL = (Tile(), Tile(), Tile(warps=8, stages=1))
_SHORT = Tile(stages=1)  # a second buffer costs the registers that sums of 64 x 128 need
# Float32 is for checks, not for speed: multiply-add code, exact as in the interpreter. Three TF32 passes on tensor
# cores would keep 22 bits, need twice the registers and spill at head dim 256.
_ROWS, _KEYS, _SMALL, _FLAT = Tile(32, 16, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)
_FLOAT32: Tiles = {
    "forward_pointer": (_SMALL, _ROWS, _FLAT),
    "backward_dq_pointer": (_SMALL, _ROWS, _FLAT),
    "backward_dkdv_pointer": (_SMALL, _KEYS, _FLAT),
}
_AMPERE = Architecture(
    halves=True,  # dk and dv spill with 4 warps; forward and dq lose by 8, see README
    tiles={"backward_dkdv_pointer": (Tile(), Tile(warps=8), Tile(keys=32, warps=8, stages=1))},
    tiles_float32=_FLOAT32 | {"backward_dq_pointer": (_SMALL, _ROWS, _SMALL)},
)
ARCHITECTURES: dict[str, Architecture] = {
    "sm_80": _AMPERE,
    "sm_90": Architecture(
        tma=True,
        tiles={
            "forward_pointer": (Tile(), Tile(), Tile(keys=32, warps=8, stages=1)),
            "backward_dq_pointer": (Tile(), Tile(), Tile(keys=16, stages=1)),
            "backward_dkdv_pointer": (Tile(), _SHORT, Tile(keys=32, warps=8, stages=1)),
        },
    ),
    "sm_100": Architecture(tma=True, tiles={"backward_dkdv_pointer": (Tile(), _SHORT, Tile(queries=16, stages=1))}),
    "sm_120": Architecture(
        halves=True,
        tiles={
            "backward_dq_pointer": (Tile(), Tile(), Tile(keys=32, warps=8, stages=1)),
            "backward_dkdv_pointer": (Tile(), Tile(warps=8), Tile(queries=32, keys=32, warps=8, stages=1)),
        },
    ),
    "gfx942": Architecture(
        tiles={
            "forward_pointer": (_SHORT, _SHORT, Tile(keys=32, stages=1)),
            "backward_dq_pointer": (_SHORT, _SHORT, Tile(keys=16, stages=1)),
            "backward_dkdv_pointer": (_SHORT, _SHORT, Tile(queries=16, stages=1)),
        },
        tiles_float32=dict.fromkeys(_FLOAT32, (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1))),
    ),
}
RELATIVES = {
    "sm_86": "sm_80",
    "sm_87": "sm_80",
    "sm_89": "sm_80",
    "sm_103": "sm_100",
    "sm_121": "sm_120",
    "gfx950": "gfx942",
}


def architecture(name: str) -> Architecture:
    """Table entry of an architecture: itself, its closest relative, or the plainest one."""
    return ARCHITECTURES.get(RELATIVES.get(name, name), _AMPERE)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a problem lies before the kernels of one architecture: padded sizes, alignment, arguments and tiles."""

    problem: Problem
    arch: str

    def __post_init__(self) -> None:
        Tq, D = self.problem.query.shape[-2:]
        T = self.problem.key_pool.shape[3]
        if max(Tq, T) > MAX_BLOCK or D > MAX_HEAD_DIM:
            raise SparseForcingError(
                f"block_sparse_attention (triton): blocks of {max(Tq, T)} tokens and head dim {D} are "
                f"too large, the limits are {MAX_BLOCK} and {MAX_HEAD_DIM}; use smaller tiles or backend='reference'"
            )

    @property
    def heads(self) -> int:
        """Over all samples."""
        return self.problem.query.shape[0] * self.problem.query.shape[1]

    @property
    def rows(self) -> int:
        """Of a query block, padded."""
        return _pad(self.problem.query.shape[3])

    def is_aligned(self) -> bool:
        """Whether TMA can read these tensors: 64-row boxes, unit inner stride, all else a multiple of 16 bytes."""
        return self.rows == _pad(self.problem.key_pool.shape[3]) == 64 and all(map(_is_aligned, self.problem.inputs))

    def common(self) -> dict[str, Any]:
        """Arguments with the same name in every attention kernel."""
        query, key_pool, value_pool, _, query_sizes, key_sizes, scale, _ = self.problem
        sqb, sqh, sqn, sqt, sqd = query.stride()
        skb, skh, sks, skt, skd = key_pool.stride()
        svb, svh, svs, svt, svd = value_pool.stride()
        _, H, Nq, Tq, D = query.shape
        precision = "ieee" if query.dtype == torch.float32 else "tf32"  # the latter means nothing for 16 bits
        return {
            "query": query, "key_pool": key_pool, "value_pool": value_pool,
            "query_sizes": query_sizes, "key_sizes": key_sizes,
            "sqb": sqb, "sqh": sqh, "sqn": sqn, "sqt": sqt, "sqd": sqd,
            "skb": skb, "skh": skh, "sks": sks, "skt": skt, "skd": skd,
            "svb": svb, "svh": svh, "svs": svs, "svt": svt, "svd": svd,
            "scale_log2": scale * LOG2E, "heads": H, "query_blocks": Nq, "slots": key_pool.shape[2],
            "Tq": Tq, "T": key_pool.shape[3], "D": D, "ROWS": self.rows, "BLOCK_D": _pad(D),
            "RAGGED_Q": query_sizes is not None, "RAGGED_K": key_sizes is not None, "PRECISION": precision,
        }  # fmt: skip

    def choose_tile(self, kernel: str) -> tuple[dict[str, int], dict[str, int], tuple[int, int]]:
        """(tile arguments, launch options, (parts of a query block, parts of a slot)) of an attention kernel."""
        query, tokens = self.problem.query, self.problem.key_pool.shape[3]
        queries, keys, warps, stages = architecture(self.arch).tile(kernel, _pad(query.shape[-1]), query.element_size())
        tile = {"BLOCK_Q": min(queries, self.rows), "BLOCK_K": min(keys, _pad(tokens))}
        parts = -(-query.shape[3] // tile["BLOCK_Q"]), -(-tokens // tile["BLOCK_K"])
        return tile, {"num_warps": warps, "num_stages": stages}, parts


def _pad(n: int) -> int:
    return max(16, power_of_two(n))  # 16 is the smallest edge of a tensor-core product


def _is_aligned(x: Tensor) -> bool:
    (B, H, N, T, _), (sb, sh, sn, st, sd) = x.shape, x.stride()
    return (
        x.element_size() == 2
        and sd == 1
        and x.data_ptr() % 16 == 0
        and not any(n > 1 and stride % 8 for n, stride in ((B, sb), (H, sh), (N, sn), (T, st)))
        and sn > 0
        and st > 0
        and (T < 64 or N == 1 or sn == 64 * st)  # full blocks are read as one matrix
    )


@dataclass(frozen=True, kw_only=True)
class ForwardPlan:
    """Launches of the forward pass, which fill out [B, H, Nq, Tq, D], lse [B, H, Nq, Tq] and mass [B, H, Nq, M or 0].

    out_rest, of out's shape and type, is what rounding took from out; empty unless it was asked for and there is any.
    """

    launches: list[Launch]
    out: Tensor
    out_rest: Tensor
    lse: Tensor
    mass: Tensor


def choose_forward(layout: Layout) -> str:
    """ "tma", or "pointer" where TMA cannot read the tensors or must not: ragged keys may hold NaN in their padding,
    which only masked loads leave out.
    """
    usable = architecture(layout.arch).tma and layout.problem.key_sizes is None and layout.is_aligned()
    return "tma" if usable else "pointer"


def plan_forward(
    problem: Problem,
    arch: str,
    *,
    return_mass: bool = False,
    keep_rest: bool = False,
    variant: str | None = None,
    stages: int | None = None,
) -> ForwardPlan:
    """Launches of one forward pass on architecture `arch`. variant and stages override the table (tests, report, device
    check)."""
    layout = Layout(problem=problem, arch=arch)
    query, index = problem.query, problem.block_index
    B, H, Nq, M = index.shape
    variant = variant or choose_forward(layout)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    mass = torch.empty((B, H, Nq, M if return_mass else 0), dtype=torch.float32, device=query.device)
    rest = torch.empty(rest_shape(query, keep_rest), dtype=query.dtype, device=query.device)
    keep_rest = rest.numel() > 0
    counts = list_counts(index)
    name = f"forward_{variant}"
    tile, options, (query_parts, key_parts) = layout.choose_tile(name)
    options |= {} if stages is None else {"num_stages": stages}
    shape = (B, H, Nq, M * key_parts, 2, layout.rows)
    row_mass = torch.empty(shape, dtype=torch.float32, device=query.device) if return_mass else None
    args = layout.common() | tile | {
        "out": out, "out_rest": rest if keep_rest else None, "lse": lse, "row_mass": row_mass, "block_index": index,
        "counts": counts, "list_length": M, "MASS": return_mass, "REST": keep_rest,
    }  # fmt: skip
    if variant == "pointer":
        args["HALVES"] = architecture(arch).halves and args["BLOCK_D"] >= 128 and not return_mass
    launches = [prepare(getattr(fwd, name), Nq * query_parts, B * H, args, **options)]
    if row_mass is not None:
        launches.append(_plan_mass(layout, row_mass, lse, counts, mass))
    return ForwardPlan(launches=launches, out=out, out_rest=rest, lse=lse, mass=mass)


def _plan_mass(layout: Layout, row_mass: Tensor, lse: Tensor, counts: Tensor, mass: Tensor) -> Launch:
    query, (_, _, Nq, M) = layout.problem.query, layout.problem.block_index.shape
    query_sizes = layout.problem.query_sizes
    args = {
        "row_mass": row_mass, "lse": lse, "counts": counts, "query_sizes": query_sizes, "mass": mass,
        "query_blocks": Nq, "list_length": M, "Tq": query.shape[3], "ROWS": layout.rows, "BLOCK_M": 32,
        "PARTS": row_mass.shape[3] // M, "RAGGED_Q": query_sizes is not None,
    }  # fmt: skip
    return prepare(block_mass, Nq, layout.heads, args, num_warps=4)


@dataclass(frozen=True, kw_only=True)
class BackwardPlan:
    """Launches of the backward pass, which fill the gradients of query, key_pool and value_pool, contiguous, in
    the inputs' shapes and type."""

    launches: list[Launch]
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor


def plan_backward(
    problem: Problem,
    arch: str,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    out_rest: Tensor,
    lse: Tensor,
    *,
    variant: str | None = None,
) -> BackwardPlan:
    """Launches of one backward pass: row preparation, dq over the lists, dk and dv over their inverse."""
    layout = Layout(problem=problem, arch=arch)
    index, slots = problem.block_index, problem.key_pool.shape[2]
    B, H, Nq, M = index.shape
    grad_out = grad_out.contiguous()
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in problem.inputs]
    lse_rows, delta_rows = torch.empty((2, B, H, Nq, layout.rows), dtype=torch.float32, device=out.device).unbind()
    start, visitors = inverse_lists(index, slots)

    # Beyond 128 columns the two sums of dk and dv fill the register file: only smaller tiles do not spill.
    tma = architecture(arch).tma and problem.query.shape[-1] <= 128
    tma = tma and layout.is_aligned() and all(map(_is_aligned, (grad_out, *grads)))
    dq_name = f"backward_dq_{variant or ('tma' if tma and problem.key_sizes is None else 'pointer')}"
    dkdv_name = f"backward_dkdv_{variant or ('tma' if tma and problem.query_sizes is None else 'pointer')}"

    exact, keep_rest = problem.query.dtype == torch.float32, out_rest.numel() > 0
    common = layout.common()
    rows_args = {
        name: common[name] for name in ("query_sizes", "query_blocks", "Tq", "D", "ROWS", "BLOCK_D", "RAGGED_Q")
    }
    row_tile = min(layout.rows, 16)
    rows_args |= {
        "grad_out": grad_out, "out": out, "out_rest": out_rest if keep_rest else None, "REST": keep_rest, "lse": lse,
        "lse_rows": lse_rows, "delta_rows": delta_rows, "scale": problem.scale, "BLOCK_Q": row_tile, "EXACT": exact,
        "grad_lse": None if grad_lse is None else grad_lse.contiguous(), "LSE_GRADIENT": grad_lse is not None,
    }  # fmt: skip
    shared = common | {
        "grad_out": grad_out, "lse_rows": lse_rows, "delta_rows": delta_rows, "scale": problem.scale, "EXACT": exact,
        "share_rows": torch.empty_like(lse_rows) if exact else None,
    }  # fmt: skip
    dq_args = shared | {"grad_query": grads[0], "block_index": index, "counts": list_counts(index), "list_length": M}
    dkdv_args = shared | {
        "grad_key": grads[1], "grad_value": grads[2], "start": start, "visitors": visitors, "visits": Nq * M
    }  # fmt: skip
    dq_tile, dq_options, (query_parts, _) = layout.choose_tile(dq_name)
    dkdv_tile, dkdv_options, (_, key_parts) = layout.choose_tile(dkdv_name)
    launches = [
        prepare(bwd.backward_rows, Nq * layout.rows // row_tile, B * H, rows_args, num_warps=4),
        prepare(getattr(bwd, dq_name), Nq * query_parts, B * H, dq_args | dq_tile, **dq_options),
        prepare(getattr(bwd, dkdv_name), slots * key_parts, B * H, dkdv_args | dkdv_tile, **dkdv_options),
    ]
    return BackwardPlan(launches=launches, grad_query=grads[0], grad_key=grads[1], grad_value=grads[2])
