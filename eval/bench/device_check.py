"""What a GPU has to be asked once after a change of the fast paths, in one go; without one a dry run of the same steps.

    python -m sparse_forcing.eval.bench.device_check OUTPUT              (minutes on one GPU)
    python -m sparse_forcing.eval.bench.device_check OUTPUT --dry        (any machine: the embedded model's size)

In this order, and not beyond the first failure: kernels against their reference and their speed (`bench attention
--quick`), the forward with one pipeline stage and with two, passes replayed as CUDA graphs against the same passes
launched one by one, and `bench stream` of several memories with and without graphs. Each step leaves a file or a folder
in OUTPUT.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from sparse_forcing.errors import SparseForcingError
from sparse_forcing.eval.bench import attention, stream
from sparse_forcing.eval.bench.options import StreamBenchConfig
from sparse_forcing.eval.bench.timing import measure_seconds
from sparse_forcing.files import atomic_write_json
from sparse_forcing.model_folder.sizes import WAN


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run: memories in words, `chunks` of each; config of the rollouts."""

    config: StreamBenchConfig
    graphed_memories: tuple[str, ...]

    @classmethod
    def of(cls, dry: bool) -> Plan:
        """The published model on a GPU; the embedded one on a CPU."""
        if dry:
            small = StreamBenchConfig(model_size="tiny", device="cpu", chunks=3, memories=("window:2", "sparse"))
            return cls(config=replace(small, height=64, width=64), graphed_memories=("window", "sparse"))
        memories = ("full", "window", "window:21", "sparse", "sparse:6,0.125", "sparse:6,0.125,32", "sparse:21,0.125")
        return cls(config=StreamBenchConfig(memories=memories, decode=True), graphed_memories=("window", "sparse"))


def run(output: Path, *, dry: bool) -> int:
    """Every step; returns the exit code of the first that fails, else 0."""
    if not dry and not torch.cuda.is_available():
        raise SparseForcingError("device check: there is no CUDA device here; --dry runs its steps on the CPU")
    plan = Plan.of(dry)
    if code := attention.run(quick=True, repeats=1 if dry else 7, device="cpu" if dry else None, output=None):
        return code
    stages = compare_stages(torch.device("cpu" if dry else "cuda"))
    atomic_write_json(output / "stages.json", stages)
    print(f"forward by pipeline stages, seconds: {stages}")
    published = {f"wan-{size}": changes for size, changes in WAN.items()}
    differences = compare_graphs(plan, published)
    atomic_write_json(output / "graphs.json", differences)
    print(f"graphs against single launches, largest difference: {differences}")
    for graphs in (False,) if dry else (False, True):
        config = replace(plan.config, cuda_graphs=graphs, output=output / ("graphs" if graphs else "launches"))
        if code := stream.run(config, published):
            return code
    return 0


@torch.no_grad()
def compare_stages(device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of the Triton forward by how it is timed and by pipeline stages, over lists of 64 shared and 64 random
    slots of 576 (the launch table's problem, see the kernel's README). Without a GPU its launches are made and not run.

    Raises:
        SparseForcingError: outputs differ: the stages only change when a block is fetched.
    """
    if importlib.util.find_spec("triton") is None:
        return {}
    from sparse_forcing.kernels.block_sparse_attention.gpu import backend, launch
    from sparse_forcing.kernels.block_sparse_attention.problem import Problem
    from sparse_forcing.kernels.triton_runtime import target

    on_gpu = device.type == "cuda"
    heads, blocks, slots = (12, 74, 576) if on_gpu else (1, 2, 192)
    query, keys, values = (
        torch.randn(1, heads, n, 64, 128, device=device, dtype=torch.bfloat16) for n in (blocks, slots, slots)
    )
    chosen = torch.rand(1, heads, blocks, slots - 64, device=device).argsort(-1)[..., :64] + 64
    shared = torch.arange(64, device=device).expand(1, heads, blocks, -1)
    problem = Problem(query, keys, values, torch.cat([shared, chosen], -1).int(), None, None, 128**-0.5, 64)
    plans = {
        stages: launch.plan_forward(problem, target(device) if on_gpu else "sm_90", stages=stages) for stages in (2, 1)
    }
    if not on_gpu:
        return {}
    runs: dict[str, Callable[[], object]] = {
        f"{stages} stages": partial(backend.run, plan.launches, device) for stages, plan in plans.items()
    }
    seconds = measure_seconds(runs, device, repeats=7, graphs=True)
    if not torch.equal(plans[1].out, plans[2].out):
        raise SparseForcingError("device check: the forward with one pipeline stage differs from the one with two")
    return seconds


@torch.no_grad()
def compare_graphs(plan: Plan, published: dict) -> dict[str, float]:
    """By memory, the largest difference between latents of a rollout with and without CUDA graphs (a dry run compares
    two without). Raises SparseForcingError where one is not 0: a replay makes the same calls."""
    config = plan.config
    architecture = stream.find_architecture(config.model_size, published)
    size = config.height or architecture.defaults.height, config.width or architecture.defaults.width
    device = torch.device("cpu" if config.device == "cpu" else "cuda")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    built = stream.build(
        architecture, architecture.geometry.latent_size(*size), replace(config, decode=False), device, dtype
    )
    found = {}
    for words in plan.graphed_memories:
        videos = []
        for graphs in (False, device.type == "cuda"):
            parts = replace(built, graphs=graphs).rollout(built.memory(words), config.chunks)
            videos.append(torch.cat([part.latents for part in parts], 1))
        found[words] = float((videos[0] - videos[1]).abs().max())
        if found[words]:
            raise SparseForcingError(f"device check: replayed passes of {words} differ by {found[words]:.3g}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of what is measured")
    parser.add_argument("--dry", action="store_true", help="the same steps on the CPU, at the embedded model's size")
    options = parser.parse_args(arguments)
    return run(options.output, dry=options.dry)


if __name__ == "__main__":
    raise SystemExit(main())
