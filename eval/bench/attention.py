"""Block-sparse attention against dense attention on this machine: correctness first, then interleaved timings.

What to expect. Dense attention costs 4 N (P + W) d FLOPs per head for N queries, P persistent and W window tokens; at
density f the sparse form costs 4 N (P + f W) d. The ideal speed-up is therefore (P + W) / (P + f W): 1 / f without a
persistent set, and never more than 1 + W / P with one. Each row says what share of the ideal was reached, against the
fastest dense rival. Rivals and the sparse path alternate inside one process, and medians are compared.

On the CPU the lists are uniformly random, the worst case for caches. With one thread the clock counts CPU seconds of
this thread, so that other processes cost both sides the same; with more it is the wall clock.

On a CUDA or ROCm GPU a forward is timed twice. The main figure, marked "graph", is the replay of a CUDA graph: the
GPU's work alone, as a captured model or one that keeps the GPU's queue full sees it. The other is an eager call on an
idle GPU, which at these sizes waits for the host. Forward and backward together are timed eagerly only: a captured
autograd would measure how well it was captured.

    OMP_NUM_THREADS=1 taskset -c 0 python -m sparse_forcing.eval.bench.attention --output outputs/bench

The last line of the output is JSON. A red correctness gate ends the run with exit code 1 before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_forcing.devices import resolve_device
from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.bench.attention_inputs import Attend, Inputs, Shape
from sparse_forcing.eval.bench.timing import measure_seconds
from sparse_forcing.files import atomic_path, check_writable
from sparse_forcing.kernels.block_selection import build_block_index, choose_blocks, pool_blocks
from sparse_forcing.kernels.block_sparse_attention import block_sparse_attention, checked_values
from sparse_forcing.kernels.block_sparse_attention.interface import resolve_backend

DENSITIES = (0.0625, 0.125, 0.25)  # the paper's top-K fractions
GATE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}  # relative error of output, lse and gradients against float64


CPU_SHAPES = tuple(
    Shape(heads=heads, head_dim=dim, queries=queries, keys=keys, persistent=keys // 8 if kept else 0)
    for heads, dim, queries, keys in ((12, 64, 768, 4096), (1, 128, 1536, 9216), (1, 128, 4672, 32768))
    for kept in (False, True)
)
ACCELERATOR_SHAPES = (  # the paper's: 65K keys, 4096 persistent tokens; queries of one chunk at 480 x 832
    Shape(heads=12, head_dim=128, queries=4736, keys=65536, persistent=4096),
    Shape(heads=12, head_dim=128, queries=4736, keys=32768, persistent=4096),
    Shape(heads=12, head_dim=128, queries=4736, keys=32768),
)


def run(*, quick: bool = False, device: str | None = None, output: str | Path | None = None, repeats: int = 5) -> int:
    """Check, then time; prints a table and, as its last line, JSON. Returns the exit code: 1 when the check fails.

    Args:
        quick: the first shape and its forward only.
        device: a torch device; None takes the accelerator when there is one.
        output: folder for a plot; None draws none.
        repeats: timed runs of everything, of which the median counts.
    """
    where = torch.device(resolve_device(device)) if device else _best_device()
    dtypes = (torch.float32, torch.bfloat16) if where.type == "cpu" else (torch.bfloat16,)
    folder = check_writable(output, folder=True) if output else None
    if folder and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "bench attention: --output draws a plot and needs matplotlib: pip install 'sparse-forcing[eval]'"
        )
    torch.manual_seed(0)
    backend = resolve_backend("auto", torch.empty(0, 0, device=where))
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {where}, backend {backend}, "
        f"{torch.get_num_threads()} thread(s)"
    )
    with checked_values():
        errors = check_correctness(where, backend, dtypes)
    for line, worst, allowed in errors:
        print(f"  {line}: relative error {worst:.1e}, allowed {allowed:.0e}")
    report: dict = {
        "device": str(where),
        "backend": backend,
        "torch": torch.__version__,
        "ok": True,
        "threads": torch.get_num_threads(),
        "attention": [],
        "breakdown": [],
    }
    if any(not worst <= allowed for _, worst, allowed in errors):
        print("bench attention: the result is wrong; nothing was timed", file=sys.stderr)
        print(json.dumps(report | {"ok": False}))
        return 1
    shapes = CPU_SHAPES if where.type == "cpu" else ACCELERATOR_SHAPES
    for shape in shapes[:1] if quick else shapes:
        for dtype in dtypes:
            for backward in (False,) if quick else (False, True):
                report["attention"] += compare(shape, dtype, where, backend, backward, repeats)
        report["breakdown"].append(break_down(shape, dtypes[0], where, backend, repeats))
    if folder:
        report["plot"] = plot(report["attention"], folder).name
    print(json.dumps(report))
    return 0


def _best_device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def check_correctness(
    device: torch.device, backend: str, dtypes: tuple[torch.dtype, ...]
) -> list[tuple[str, float, float]]:
    """(case, worst relative error of output, lse and gradients against float64, allowed error) per type and shape."""
    found = []
    for dtype in dtypes:
        for dim, persistent in ((64, 0), (128, 0), (128, 256)):
            shape = Shape(heads=2, head_dim=dim, queries=256, keys=1024, persistent=persistent)
            inputs = Inputs.random(shape, dtype, device)
            index = inputs.lists(0.25)
            results = []
            for name, kind in (("reference", torch.float64), (backend, dtype)):
                q, k, v = (x.to(kind).requires_grad_() for x in (inputs.query, inputs.key_pool, inputs.value_pool))
                got = block_sparse_attention(q, k, v, index, num_persistent=inputs.num_persistent, backend=name)
                loss = (got.out * inputs.grad.to(kind)).sum() + got.lse.sum()
                results.append([got.out.detach(), got.lse.detach(), *torch.autograd.grad(loss, (q, k, v))])
            worst = max(float((a.double() - b).norm() / b.norm()) for b, a in zip(*results))
            found.append((f"{str(dtype).removeprefix('torch.')}, {shape.name}", worst, GATE[dtype]))
    return found


def find_rivals(inputs: Inputs, index: Tensor) -> dict[str, Attend]:
    """Dense attention in every form that runs here."""
    if inputs.query.device.type == "cpu":
        return {"dense": inputs.dense(), "masked": inputs.dense(inputs.mask(index))}
    found: dict[str, Attend] = {}
    for name, kind in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        attend = functools.partial(_attend_with, kind, inputs.dense())
        with contextlib.suppress(RuntimeError):  # this build or this GPU does not have it
            attend(inputs.query, inputs.key_pool, inputs.value_pool)
            found[name] = attend
    if importlib.util.find_spec("flash_attn"):
        found["flash-attn"] = _flash_attn
    return found or {"dense": inputs.dense()}


def _attend_with(kind: SDPBackend, dense: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kind):
        return dense(q, k, v)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    q_BNHD, k_BNHD, v_BNHD = (x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))
    return flash_attn_func(q_BNHD, k_BNHD, v_BNHD).transpose(1, 2).reshape(q.shape)


def compare(
    shape: Shape, dtype: torch.dtype, device: torch.device, backend: str, backward: bool, repeats: int
) -> list[dict]:
    """One row per way of timing and density: milliseconds, speed-up over the fastest rival, share of the ideal."""
    inputs = Inputs.random(shape, dtype, device)
    index = {density: inputs.lists(density) for density in DENSITIES}
    functions = dict(find_rivals(inputs, index[DENSITIES[1]]))
    functions |= {f"{density}": inputs.sparse(index[density], backend) for density in DENSITIES}
    tensors = [x.requires_grad_(backward) for x in (inputs.query, inputs.key_pool, inputs.value_pool)]

    def call(function: Callable[..., Tensor]) -> Callable[[], object]:
        if backward:
            return lambda: torch.autograd.grad(function(*tensors), tensors, inputs.grad)
        return lambda: function(*tensors)

    calls = {name: call(function) for name, function in functions.items()}
    rows = []
    for timing, seconds in measure_seconds(calls, device, repeats, graphs=not backward).items():
        rows += _rows(shape, dtype, backward, timing, seconds)
    return rows


def _rows(shape: Shape, dtype: torch.dtype, backward: bool, timing: str, seconds: dict[str, float]) -> list[dict]:
    dense = {name: seconds[name] for name in seconds if name not in map(str, DENSITIES)}
    best = min(dense, key=dense.__getitem__)
    rows = []
    for density in DENSITIES:
        mine = seconds[f"{density}"]
        rows.append(
            {
                "shape": shape.name,
                "dtype": str(dtype).removeprefix("torch."),
                "backward": backward,
                "timing": timing,
                "density": density,
                "milliseconds": 1e3 * mine,
                "rivals_milliseconds": {name: 1e3 * t for name, t in dense.items()},
                "speedup": dense[best] / mine,
                "share_of_ideal": dense[best] / mine / shape.ideal(density),
                "dense_tflops": shape.flops(backward) / dense[best] / 1e12,
            }
        )
    line = "  ".join(f"{row['density']:.2%} {row['speedup']:5.2f}x ({row['share_of_ideal']:.0%})" for row in rows)
    what = ("fwd+bwd" if backward else "fwd") + (" graph" if timing == "graph" else "")
    print(f"{shape.name:32} {rows[0]['dtype']:8} {what:9} {best} {1e3 * dense[best]:.1f} ms   {line}", flush=True)
    return rows


def break_down(shape: Shape, dtype: torch.dtype, device: torch.device, backend: str, repeats: int) -> dict:
    """Milliseconds of compression (pooling queries and keys), selection (scores, top-K, lists) and attention; by graph
    where there are graphs."""
    inputs = Inputs.random(shape, dtype, device)
    window = inputs.key_pool[:, :, inputs.num_persistent :]
    slots = torch.arange(inputs.key_pool.shape[2], device=device, dtype=torch.int32).expand(1, shape.heads, -1)
    persistent, others = slots[..., : inputs.num_persistent], slots[..., inputs.num_persistent :]
    top_k = max(1, round(DENSITIES[1] * window.shape[2]))
    query_blocks, key_blocks = pool_blocks(inputs.query), pool_blocks(window)
    index = inputs.lists(DENSITIES[1])

    def select() -> Tensor:
        return build_block_index(persistent, others, choose_blocks(query_blocks, key_blocks, top_k=top_k))

    tensors = inputs.query, inputs.key_pool, inputs.value_pool
    steps: dict[str, Callable[[], object]] = {
        "compression": lambda: (pool_blocks(inputs.query), pool_blocks(window)),
        "selection": select,
        "attention": lambda: inputs.sparse(index, backend)(*tensors),
        "dense": lambda: inputs.dense()(*tensors),
    }
    timing, seconds = next(iter(measure_seconds(steps, device, repeats, graphs=True).items()))
    share = (seconds["compression"] + seconds["selection"]) / seconds["dense"]
    listed = "  ".join(f"{name} {1e3 * t:.2f} ms" for name, t in seconds.items())
    print(f"{shape.name:32} {listed}   selection with compression: {share:.2%} of dense", flush=True)
    return {
        "shape": shape.name,
        "timing": timing,
        "milliseconds": {name: 1e3 * t for name, t in seconds.items()},
        "share_of_dense": share,
    }


def plot(rows: list[dict], folder: Path) -> Path:
    """Speed-up over density, one panel per shape, with the ideal dashed; returns the PNG's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["shape"] for row in rows))
    columns = min(3, len(names))
    size = (4 * columns, 3.4 * -(-len(names) // columns))
    figure, axes = plt.subplots(-(-len(names) // columns), columns, figsize=size, squeeze=False, layout="constrained")
    places = range(len(DENSITIES))
    for axis, name in zip(axes.flat, names):
        mine = [row for row in rows if row["shape"] == name]
        ideal = [row["speedup"] / row["share_of_ideal"] for row in mine[: len(DENSITIES)]]
        axis.plot(places, ideal, "k--", label="ideal")
        for kind in dict.fromkeys((row["dtype"], row["backward"], row["timing"]) for row in mine):
            line = [row["speedup"] for row in mine if (row["dtype"], row["backward"], row["timing"]) == kind]
            dtype, backward, timing = kind
            label = f"{dtype}, {'forward + backward' if backward else 'forward'}"
            axis.plot(places, line, "o-", label=label + ", CUDA graph" * (timing == "graph"))
        axis.set(title=name, xlabel="density", ylabel="times as fast as dense", ylim=(0, None))
        axis.set_xticks(places, [f"{density:.4g}" for density in DENSITIES])
    axes.flat[0].legend(fontsize=8)
    path = folder / "bench_attention.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Block-sparse attention against dense attention on this machine.")
    parser.add_argument("--quick", action="store_true", help="the first shape and its forward only")
    parser.add_argument("--device", help="torch device (default: the accelerator when there is one)")
    parser.add_argument("--output", type=Path, help="folder for a plot")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of everything (default: 5)")
    return run(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
