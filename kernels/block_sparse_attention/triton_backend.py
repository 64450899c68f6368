"""The Triton backend of block-sparse attention: what `interface` calls, and where the launch plans are run.

Environment: SPARSE_FORCING_WARP_SPECIALISE = auto (default) | 1 | 0 decides about the warp-specialised Hopper kernel.
auto compares it once per process and device with the plain kernel on a small problem and keeps it only if they agree;
1 uses it unchecked; 0 never uses it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings

import torch
import triton
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.kernels.block_sparse_attention.ops import rest_shape
from sparse_forcing.kernels.block_sparse_attention.triton_launch import (
    MAX_BLOCK,
    MAX_HEAD_DIM,
    UNIONS,
    Launch,
    Problem,
    plan_backward,
    plan_forward,
)

WARP_SPECIALISE = "SPARSE_FORCING_WARP_SPECIALISE"
INTERPRETED = triton.knobs.runtime.interpret  # read once: Triton itself decides at import
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CHECKED: set[torch.device] = set()  # devices on which the specialised kernel was compared with the plain one


def why_unavailable(query: Tensor) -> str | None:
    """Reason why the kernels cannot run on this tensor, or None."""
    if query.dtype not in _DTYPES:
        return f"no kernel for {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM or query.shape[-2] > MAX_BLOCK:
        return f"blocks of {query.shape[-2]} rows x {query.shape[-1]} are larger than {MAX_BLOCK} x {MAX_HEAD_DIM}"
    if INTERPRETED:
        return None if query.device.type == "cpu" else "Triton interprets (TRITON_INTERPRET is set): use CPU tensors"
    if query.device.type != "cuda":
        return f"the tensor is on {query.device}; Triton needs a CUDA or ROCm GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def target(device: torch.device) -> str:
    """Architecture name in the launch table: "sm_90", "gfx942", ...; the interpreter plays the plainest one."""
    if INTERPRETED or device.type != "cuda":
        return "interpreter"
    return _target_of(device.index if device.index is not None else torch.cuda.current_device())


@functools.lru_cache
def _target_of(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def forward(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_index: Tensor,
    query_sizes: Tensor | None,
    key_sizes: Tensor | None,
    scale: float,
    num_persistent: int,
    return_mass: bool,
    keep_rest: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ops.py; lse and mass are float32."""
    M = block_index.shape[-1]
    if query.numel() == 0 or M == 0 or key_pool.shape[2] == 0:
        empty = query.new_zeros((*block_index.shape[:-1], M if return_mass else 0), dtype=torch.float32)
        nothing = query.new_zeros(rest_shape(query, keep_rest))
        return torch.zeros_like(query).contiguous(), _no_keys(query), empty, nothing
    problem = _problem(query, key_pool, value_pool, block_index, query_sizes, key_sizes, scale)
    plan = plan_forward(
        problem,
        num_persistent=num_persistent,
        return_mass=return_mass,
        keep_rest=keep_rest,
        specialise=problem.arch == "sm_90" and specialised(query.device),
    )
    run(plan.launches, query.device)
    return plan.out, plan.lse, plan.mass, plan.out_rest


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_index: Tensor,
    query_sizes: Tensor | None,
    key_sizes: Tensor | None,
    out: Tensor,
    lse: Tensor,
    out_rest: Tensor,
    scale: float,
    num_persistent: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key_pool and value_pool, contiguous, in their type; bitwise the same on every run."""
    if query.numel() == 0 or block_index.shape[-1] == 0 or key_pool.shape[2] == 0:
        zeros = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key_pool, value_pool)]
        return zeros[0], zeros[1], zeros[2]
    problem = _problem(query, key_pool, value_pool, block_index, query_sizes, key_sizes, scale)
    plan = plan_backward(problem, grad_out, grad_lse, out, out_rest, lse)
    run(plan.launches, query.device)
    return plan.grad_query, plan.grad_key, plan.grad_value


def run(launches: list[Launch], device: torch.device) -> None:
    """Launch in order on the current stream of `device`; descriptors made in a kernel need scratch memory."""
    triton.set_allocator(functools.partial(_scratch, device))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()


def _scratch(device: torch.device, size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device=device)


def _problem(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_index: Tensor,
    query_sizes: Tensor | None,
    key_sizes: Tensor | None,
    scale: float,
) -> Problem:
    return Problem(
        query=query,
        key_pool=key_pool,
        value_pool=value_pool,
        block_index=block_index.contiguous(),
        query_sizes=None if query_sizes is None else query_sizes.contiguous(),
        key_sizes=None if key_sizes is None else key_sizes.contiguous(),
        scale=scale,
        arch=target(query.device),
    )


def _no_keys(query: Tensor) -> Tensor:
    return torch.full(query.shape[:-1], float("-inf"), dtype=torch.float32, device=query.device)


def specialised(device: torch.device) -> bool:
    """Whether the warp-specialised kernel is used on this device (see the module docstring)."""
    wish = os.environ.get(WARP_SPECIALISE, "auto")
    if wish not in ("auto", "0", "1"):
        raise ConfigError(f"{WARP_SPECIALISE} is {wish!r}; set auto, 0 or 1")
    if wish != "auto":
        return wish == "1"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing() and device not in _CHECKED:
        return False  # the check reads a result, which a graph capture forbids; warm up once before capturing
    _CHECKED.add(device)
    return _agreement(device)


@functools.lru_cache
def _agreement(device: torch.device) -> bool:
    """Run the warp-specialised and the plain kernel on one small problem with uneven lists; True if they agree."""
    try:
        difference = specialised_difference(device)
    except Exception as error:  # whatever the compiler or driver raises: the plain kernel is always there
        warnings.warn(f"warp-specialised attention does not run here ({error}); using the plain kernel", stacklevel=2)
        return False
    if not difference < 2e-2:
        warnings.warn(f"warp-specialised attention is off by {difference:.3g}; using the plain kernel", stacklevel=2)
        return False
    return True


def specialised_difference(device: torch.device, tokens: int = 64, head_dim: int = 128) -> float:
    """Largest difference in out and lse between the pair and the 64-row kernel (rounding to bfloat16: about 4e-3)."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    B, H, Nq, S, M = 1, 2, 5, 9, 7

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    order = torch.rand(B, H, Nq if UNIONS else 1, S, generator=generator).argsort(-1)[..., :M].to(torch.int32)
    lengths = torch.tensor([M, 0, 4, 5, 1] if UNIONS else [4])
    index = order.masked_fill(torch.arange(M) >= lengths[:, None], -1).expand(B, H, Nq, M).to(device)
    problem = _problem(
        random(B, H, Nq, tokens, head_dim),
        random(B, H, S, tokens, head_dim),
        random(B, H, S, tokens, head_dim),
        index,
        None,
        None,
        head_dim**-0.5,
    )
    worst = 0.0
    plain = plan_forward(problem, variant="tma")
    pair = plan_forward(problem, variant="pair", num_persistent=0 if UNIONS else M)
    run([*plain.launches, *pair.launches], device)
    for a, b in ((plain.out, pair.out), (plain.lse.exp(), pair.lse.exp())):
        worst = max(worst, (a.float() - b.float()).abs().div(1 + a.float().abs()).max().item())
    return worst
