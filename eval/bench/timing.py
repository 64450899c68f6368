"""Timings of functions that take turns in one process, by eager calls and, on a CUDA GPU, by replays of a graph."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch

CAPTURED_CALLS = 10  # in one graph, so that its own launch does not count


def measure_seconds(
    functions: dict[str, Callable[[], object]], device: torch.device, repeats: int, graphs: bool
) -> dict[str, dict[str, float]]:
    """Way of timing -> median seconds of each function. Always "eager"; before it "graph", if asked for and possible.

    One function that cannot be captured leaves all of them out: without the fastest rival the others say little.
    """
    eager = time_in_turns(functions, device, repeats)  # first: it compiles and tunes, which a capture forbids
    if not graphs or device.type == "cpu":
        return {"eager": eager}
    try:
        replays = {name: capture_graph(function, device) for name, function in functions.items()}
        unrolled = time_in_turns(replays, device, repeats)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        print(f"no CUDA graph on {device}, eager calls only: {reason}", flush=True)
        return {"eager": eager}
    return {"graph": {name: t / CAPTURED_CALLS for name, t in unrolled.items()}, "eager": eager}


def capture_graph(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Replay of a CUDA graph of CAPTURED_CALLS calls; the function was called before. RuntimeError if impossible."""
    if device.type != "cuda":
        raise RuntimeError(f"{device.type} has no CUDA graphs")
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CAPTURED_CALLS):
                function()
    return graph.replay


def time_in_turns(functions: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each function; all of them run once per round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            with time_block(device) as elapsed:
                function()
            seconds[name].append(elapsed())
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


@contextlib.contextmanager
def time_block(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yields a function that says, once the block has ended, how many seconds it took."""
    if device.type == "cpu":
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        marks = [clock()]
        yield lambda: marks[1] - marks[0]
        marks.append(clock())
    else:
        start, end = (torch.Event(device=device, enable_timing=True) for _ in range(2))
        torch.accelerator.synchronize()
        start.record()

        def seconds() -> float:
            torch.accelerator.synchronize()
            return start.elapsed_time(end) / 1e3

        yield seconds
        end.record()
