"""The one place that decides how the Triton kernels are launched: variant, tile sizes, warps and stages per
architecture.

`plan_forward` and `plan_backward` turn tensors into a list of `Launch`es and the tensors these will fill. The backend
runs them; the compile report compiles exactly the same list for a named architecture without a GPU. Nothing here is
tuned on the number of blocks or the length of a list, so a rollout compiles once.

Shape legend: B batch, H heads, Nq query blocks, Tq rows per query block, S slots, T tokens per slot, D head dim, M
entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparse_forcing.errors import SparseForcingError
from sparse_forcing.kernels.block_sparse_attention import triton_backward as bwd
from sparse_forcing.kernels.block_sparse_attention import triton_forward as fwd
from sparse_forcing.kernels.block_sparse_attention.ops import rest_shape
from sparse_forcing.kernels.block_sparse_attention.triton_lists import (
    block_mass,
    inverse_lists,
    list_counts,
    pair_lists,
)

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
UNIONS = TRITON >= (3, 9)  # older compilers cannot partition the three-slot kernel, see `forward_pair`
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
    pair: bool = False  # the warp-specialised kernel compiles to what was measured
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
        pair=True,
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
class Launch:
    """One kernel call, complete: `run()` launches it, `compile()` only compiles it (any tensors, no GPU needed)."""

    kernel: Any
    grid: tuple[int, int]
    args: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def run(self) -> None:
        self.kernel[self.grid](**self.args, **self.options)

    def compile(self) -> Any:
        return self.kernel.warmup(grid=self.grid, **self.args, **self.options)


def _launch(kernel: Any, grid: tuple[int, int], args: dict[str, Any], **options: Any) -> Launch:
    # Triton 3.10 turns the fusion of a multiply and an add off by default; it is 13 % of the loop here.
    return Launch(kernel=kernel, grid=grid, args=args, options={"enable_fp_fusion": True, **options})


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The inputs every attention kernel shares, with what the plans derive from their shapes."""

    query: Tensor
    key_pool: Tensor
    value_pool: Tensor
    block_index: Tensor
    query_sizes: Tensor | None
    key_sizes: Tensor | None
    scale: float
    arch: str

    def __post_init__(self) -> None:
        Tq, D = self.query.shape[-2:]
        T = self.key_pool.shape[3]
        if max(Tq, T) > MAX_BLOCK or D > MAX_HEAD_DIM:
            raise SparseForcingError(
                f"block_sparse_attention (triton): blocks of {max(Tq, T)} tokens and head dim {D}; "
                f"at most {MAX_BLOCK} and {MAX_HEAD_DIM}: use smaller tiles or backend='reference'"
            )
        if not self.scale > 0:
            raise SparseForcingError(f"block_sparse_attention (triton): scale is {self.scale}, need a positive number")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(query blocks, slots, padded rows, padded tokens)."""
        return (
            self.query.shape[2],
            self.key_pool.shape[2],
            _padded(self.query.shape[3]),
            _padded(self.key_pool.shape[3]),
        )

    def aligned(self) -> bool:
        """Whether TMA can read these tensors: 64-row boxes, unit inner stride, all else a multiple of 16 bytes."""
        _, _, rows, tokens = self.sizes
        return rows == tokens == 64 and all(map(_aligned, (self.query, self.key_pool, self.value_pool)))

    def common(self) -> dict[str, Any]:
        """Arguments with the same name in every attention kernel."""
        strides: dict[str, Any] = {}
        for letter, tensor in (("q", self.query), ("k", self.key_pool), ("v", self.value_pool)):
            axes = ("b", "h", "n" if letter == "q" else "s", "t", "d")
            strides |= {f"s{letter}{axis}": stride for axis, stride in zip(axes, tensor.stride())}
        Nq, S, rows, _ = self.sizes
        H, D = self.query.shape[1], self.query.shape[-1]
        precision = "ieee" if self.query.dtype == torch.float32 else "tf32"  # the latter means nothing for 16 bits
        return {
            "query": self.query, "key_pool": self.key_pool, "value_pool": self.value_pool,
            "query_sizes": self.query_sizes, "key_sizes": self.key_sizes, **strides,
            "scale_log2": self.scale * LOG2E, "heads": H, "query_blocks": Nq, "slots": S,
            "Tq": self.query.shape[3], "T": self.key_pool.shape[3], "D": D,
            "ROWS": rows, "BLOCK_D": _padded(D),
            "RAGGED_Q": self.query_sizes is not None, "RAGGED_K": self.key_sizes is not None, "PRECISION": precision,
        }  # fmt: skip

    def tiled(self, kernel: str) -> tuple[dict[str, int], dict[str, int], tuple[int, int]]:
        """(tile arguments, launch options, (parts of a query block, parts of a slot)) of an attention kernel."""
        arch, D = architecture(self.arch), _padded(self.query.shape[-1])
        queries, keys, warps, stages = arch.tile(kernel, D, self.query.element_size())
        _, _, rows, tokens = self.sizes
        tile = {"BLOCK_Q": min(queries, rows), "BLOCK_K": min(keys, tokens)}
        parts = (
            triton.cdiv(self.query.shape[3], tile["BLOCK_Q"]),
            triton.cdiv(self.key_pool.shape[3], tile["BLOCK_K"]),
        )
        return tile, {"num_warps": warps, "num_stages": stages}, parts


def _padded(n: int) -> int:
    return max(16, triton.next_power_of_2(n))  # 16 is the smallest edge of a tensor-core product


def _aligned(x: Tensor) -> bool:
    step = 16 // x.element_size()
    strides = [s for s, n in zip(x.stride()[:-1], x.shape[:-1]) if n > 1]
    return (
        x.element_size() == 2
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(s % step == 0 for s in strides)
        and all(s > 0 for s in x.stride()[2:-1])
        and (x.shape[3] < 64 or x.shape[2] == 1 or x.stride(2) == 64 * x.stride(3))  # read as one matrix
    )


@dataclass(frozen=True, kw_only=True)
class ForwardPlan:
    """launches fill out [B, H, Nq, Tq, D], lse [B, H, Nq, Tq] and mass [B, H, Nq, M or 0].

    out_rest, of out's shape and type, is what rounding took from out; empty unless it was asked for and there is any.
    """

    launches: list[Launch]
    out: Tensor
    out_rest: Tensor
    lse: Tensor
    mass: Tensor
    variant: str


def choose_forward(problem: Problem, num_persistent: int, return_mass: bool, specialise: bool) -> str:
    """ "pair", "tma" or "pointer".

    The pair kernel works on the union of two lists. Whatever they hold, the union is at most P + 2 K entries for lists
    of M = P + K, so it is taken when even that costs no more issue slots than two 64-row programs (248 against 357 per
    pair of blocks). Block mass needs the list's own order, hence 64 rows. Ragged keys may hold NaN in their padding,
    which only masked loads leave out.
    """
    arch = architecture(problem.arch)
    if not arch.tma or problem.key_sizes is not None or not problem.aligned():
        return "pointer"
    Nq, _, _, _ = problem.sizes
    M, D, Tq = problem.block_index.shape[-1], problem.query.shape[-1], problem.query.shape[3]
    flat = problem.query.stride(2) == Tq * problem.query.stride(3)
    worthwhile = 248 * (num_persistent + 2 * (M - num_persistent)) <= 357 * M if UNIONS else num_persistent == M
    if arch.pair and specialise and not return_mass and worthwhile and flat and D in (64, 128) and Nq > 1:
        return "pair"
    return "tma"


def plan_forward(
    problem: Problem,
    *,
    num_persistent: int = 0,
    return_mass: bool = False,
    keep_rest: bool = False,
    specialise: bool = False,
    variant: str | None = None,
) -> ForwardPlan:
    """Launches of one forward pass. variant overrides the choice (tests, self-check, report)."""
    query, index = problem.query, problem.block_index
    B, H, Nq, M = index.shape
    variant = variant or choose_forward(problem, num_persistent, return_mass, specialise)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    mass = torch.empty((B, H, Nq, M if return_mass else 0), dtype=torch.float32, device=query.device)
    rest = torch.empty(rest_shape(query, keep_rest), dtype=query.dtype, device=query.device)
    keep_rest = rest.numel() > 0
    if variant == "pair":
        launches = _plan_pair(problem, out, rest, lse, shared=num_persistent == M)
        return ForwardPlan(launches=launches, out=out, out_rest=rest, lse=lse, mass=mass, variant=variant)

    _, _, rows, _ = problem.sizes
    counts = list_counts(index)
    name = f"forward_{variant}"
    tile, options, (query_parts, key_parts) = problem.tiled(name)
    shape = (B, H, Nq, M * key_parts, 2, rows)
    row_mass = torch.empty(shape, dtype=torch.float32, device=query.device) if return_mass else None
    args = problem.common() | tile | {
        "out": out, "out_rest": rest if keep_rest else None, "lse": lse, "row_mass": row_mass, "block_index": index,
        "counts": counts, "list_length": M, "MASS": return_mass, "REST": keep_rest,
    }  # fmt: skip
    if variant == "pointer":
        args["HALVES"] = architecture(problem.arch).halves and args["BLOCK_D"] >= 128 and not return_mass
    launches = [_launch(getattr(fwd, name), (Nq * query_parts, B * H), args, **options)]
    if row_mass is not None:
        launches.append(_plan_mass(problem, row_mass, lse, counts, mass))
    return ForwardPlan(launches=launches, out=out, out_rest=rest, lse=lse, mass=mass, variant=variant)


def _plan_mass(problem: Problem, row_mass: Tensor, lse: Tensor, counts: Tensor, mass: Tensor) -> Launch:
    B, H, Nq, M = problem.block_index.shape
    args = {
        "row_mass": row_mass, "lse": lse, "counts": counts, "query_sizes": problem.query_sizes, "mass": mass,
        "query_blocks": Nq, "list_length": M, "Tq": problem.query.shape[3], "ROWS": problem.sizes[2], "BLOCK_M": 32,
        "PARTS": row_mass.shape[3] // M, "RAGGED_Q": problem.query_sizes is not None,
    }  # fmt: skip
    return _launch(block_mass, (Nq, B * H), args, num_warps=4)


def _plan_pair(problem: Problem, out: Tensor, rest: Tensor, lse: Tensor, *, shared: bool) -> list[Launch]:
    """The union lists, then the warp-specialised kernel over them."""
    B, H, Nq, M = problem.block_index.shape
    pairs, group = (Nq + 1) // 2, 3 if UNIONS else 2
    width = (M if shared else 2 * M) + group
    codes = torch.empty((B, H, pairs, width), dtype=torch.int32, device=out.device)
    counts = torch.empty((B, H, pairs), dtype=torch.int32, device=out.device)
    block_m = _padded(M)
    listing = {
        "block_index": problem.block_index, "codes": codes, "counts": counts, "query_blocks": Nq, "list_length": M,
        "width": width, "BLOCK_M": block_m, "CHUNK": max(1, min(32, 4096 // block_m)), "GROUP": group, "SHARED": shared,
    }  # fmt: skip
    common = problem.common()
    unused = {"key_sizes", "RAGGED_K", "PRECISION", "ROWS", "BLOCK_D", "sqd", "skd", "svd"}
    keep_rest = rest.numel() > 0
    args = {name: value for name, value in common.items() if name not in unused} | {
        "out": out, "out_rest": rest if keep_rest else None, "REST": keep_rest, "lse": lse, "codes": codes,
        "counts": counts, "list_length": width, "UNION": not shared, "BLOCK_K": problem.sizes[3],
        "GROUP": group, "PIECES": 16 if UNIONS and common["D"] == 128 else 1, "SPECIALISE": True, "STAGES": 2,
    }  # fmt: skip
    return [
        _launch(pair_lists, (pairs, B * H), listing, num_warps=4),
        _launch(fwd.forward_pair, (pairs, B * H), args, num_warps=4, num_stages=2),
    ]


@dataclass(frozen=True, kw_only=True)
class BackwardPlan:
    """launches fill the gradients of query, key_pool and value_pool, contiguous, in the inputs' shapes and type."""

    launches: list[Launch]
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor


def plan_backward(
    problem: Problem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    out_rest: Tensor,
    lse: Tensor,
    *,
    variant: str | None = None,
) -> BackwardPlan:
    """Launches of one backward pass: row preparation, dq over the lists, dk and dv over their inverse."""
    index = problem.block_index
    B, H, Nq, M = index.shape
    _, S, rows, _ = problem.sizes
    grad_out = grad_out.contiguous()
    grads = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (problem.query, problem.key_pool, problem.key_pool)
    ]
    lse_rows, delta_rows = torch.empty((2, B, H, Nq, rows), dtype=torch.float32, device=out.device).unbind()
    start, visitors = inverse_lists(index, S)

    # Beyond 128 columns the two sums of dk and dv fill the register file: only smaller tiles do not spill.
    tma = architecture(problem.arch).tma and problem.query.shape[-1] <= 128
    tma = tma and problem.aligned() and all(map(_aligned, (grad_out, *grads)))
    dq_variant = variant or ("tma" if tma and problem.key_sizes is None else "pointer")
    dkdv_variant = variant or ("tma" if tma and problem.query_sizes is None else "pointer")

    exact, keep_rest = problem.query.dtype == torch.float32, out_rest.numel() > 0
    common = problem.common()
    rows_args = {
        name: common[name] for name in ("query_sizes", "query_blocks", "Tq", "D", "ROWS", "BLOCK_D", "RAGGED_Q")
    }
    row_tile = min(rows, 16)
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
    dq_name, dkdv_name = f"backward_dq_{dq_variant}", f"backward_dkdv_{dkdv_variant}"
    dq_tile, dq_options, (query_parts, _) = problem.tiled(dq_name)
    dkdv_tile, dkdv_options, (_, key_parts) = problem.tiled(dkdv_name)
    launches = [
        _launch(bwd.backward_rows, (Nq * rows // row_tile, B * H), rows_args, num_warps=4),
        _launch(getattr(bwd, dq_name), (Nq * query_parts, B * H), dq_args | dq_tile, **dq_options),
        _launch(getattr(bwd, dkdv_name), (S * key_parts, B * H), dkdv_args | dkdv_tile, **dkdv_options),
    ]
    return BackwardPlan(launches=launches, grad_query=grads[0], grad_key=grads[1], grad_value=grads[2])
