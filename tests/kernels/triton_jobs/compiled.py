"""Triton kernels through the compiler, no GPU: run by test_triton_compile.py in a process of its own.

Every launch comes from the launch table and is compiled by Triton's own launch path under a stand-in driver.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection

import pytest
import torch
import triton

from sparse_forcing.errors import ConfigError, SparseForcingError
from sparse_forcing.kernels import compile_report as report
from sparse_forcing.kernels.block_selection.gpu import launch as plans
from sparse_forcing.kernels.block_sparse_attention.gpu.launch import (
    Layout,
    choose_forward,
    plan_backward,
    plan_forward,
)
from sparse_forcing.kernels.block_sparse_attention.problem import Problem
from sparse_forcing.kernels.triton_runtime import active, power_of_two, prepare

RECORDED = json.loads(report.RECORDED.read_text())
SAME_COMPILER = triton.__version__ == RECORDED["triton"]
TENSOR_OPS = {"sm_80": {"HMMA"}, "sm_90": {"HGMMA"}, "sm_100": {"UTCHMMA"}, "sm_120": {"HMMA"}, "gfx942": {"MFMA"}}
# Bars of the specification on Hopper (head dim 128, full 64-token blocks): slots at most, programs per multiprocessor.
BARS = {
    "forward_tma": (357, 2),
    "backward_dq_tma": (305, 2),
    "backward_dkdv_tma": (382, 2),
    "forward_tma one stage": (360, 4),
}
ATTENTION = ("forward", "backward_d")


def compiled(name: str, chosen: Callable[[list[str]], Collection[str]] = list, **shape: object) -> dict[str, dict]:
    """label -> figures of the launches whose labels are chosen (all, unless told)."""
    with report.compile_for(name):
        launches = dict(report.examples(name, **shape))
        found = {label: launches[label] for label in chosen(list(launches))}
        return {label: report.describe(report.compile_launch(x), name, x) for label, x in found.items()}


def attention(labels: list[str]) -> list[str]:
    return [label for label in labels if label.startswith(ATTENTION)]


def hardest(labels: list[str]) -> list[str]:
    """Attention where NVIDIA's compiler needs most: registers for ragged blocks, shared memory for mass."""
    hard = [label for label in attention(labels) if label.endswith((" ragged", " mass"))]
    kernels = {label.split()[0] for label in hard}
    return hard + [label for label in attention(labels) if label.split()[0] not in kernels]


def check_kernel(name: str, label: str, row: dict) -> None:
    """Nothing spills, everything fits, and attention uses this architecture's tensor instructions and no other."""
    assert row["spills"] == 0, (name, label, row)
    assert row["local"] == 0, (name, label, row)
    assert row["programs"] >= 1, (name, label, row)
    if label.startswith(ATTENTION):
        assert set(row["tensor"]) == TENSOR_OPS[name], (name, label, row)
    if "_tma" in label:
        assert row["copies"].get("UTMALDG", 0) > 0, (name, label, row)


def check_figures(name: str, rows: dict[str, dict]) -> None:
    """Within 3 % of the recorded figures and as many programs at once, where the compiler is the recorded one."""
    if not SAME_COMPILER:
        return
    for label, row in rows.items():
        wanted = RECORDED["kernels"][name][label]
        assert (wanted["slots"] is None) == (row["slots"] is None), label
        assert row["spills"] <= wanted["spills"], (name, label, row, wanted)
        for figure in ("slots", "registers", "smem"):
            assert wanted[figure] is None or row[figure] <= 1.03 * wanted[figure], (name, label, row, wanted)
        assert row["programs"] >= wanted["programs"], (name, label, row, wanted)


def test_plain_hopper_forward_meets_its_bar():
    rows = compiled("sm_90", lambda _: ["forward_tma"])
    check_figures("sm_90", rows)
    check_kernel("sm_90", "forward_tma", rows["forward_tma"])
    assert rows["forward_tma"]["slots"] <= 357


@pytest.mark.slow
def test_hopper_kernels_meet_their_bars():
    rows = compiled("sm_90")
    assert not SAME_COMPILER or set(rows) == set(RECORDED["kernels"]["sm_90"])
    check_figures("sm_90", rows)
    for label, row in rows.items():
        if SAME_COMPILER or (label.startswith(ATTENTION) and "ragged" not in label):
            check_kernel("sm_90", label, row)
    for label, (slots, programs) in BARS.items():
        assert rows[label]["slots"] <= slots, label
        assert rows[label]["programs"] >= programs, label
    assert rows["forward_tma mass"]["slots"] <= 1.1 * rows["forward_tma"]["slots"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sm_80", "sm_100", "sm_120", "gfx942"])
def test_other_architectures_compile_clean(name):
    rows = compiled(name)
    if SAME_COMPILER:
        assert set(rows) == set(RECORDED["kernels"][name])
    check_figures(name, rows)
    for label, row in rows.items():
        if SAME_COMPILER and "ragged" not in label:
            check_kernel(name, label, row)
        else:
            assert row["programs"] >= 1, (name, label)


@pytest.mark.slow
@pytest.mark.skipif(not SAME_COMPILER, reason="tiles were chosen for the recorded compiler")
@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        *((name, 256, dtype) for name in TENSOR_OPS for dtype in (torch.bfloat16, torch.float32)),
        *(("sm_90", head_dim, torch.float32) for head_dim in (64, 128)),
    ],
)
def test_wide_heads_and_float32_do_not_spill(name, head_dim, dtype):
    """The largest head dim, whose dk and dv need 32-token tiles and so leave Hopper's 64-row instruction; float32."""
    chosen = hardest if report.TARGETS[name].backend == "cuda" else attention
    for label, row in compiled(name, chosen, head_dim=head_dim, dtype=dtype).items():
        assert (row["spills"], row["local"]) == (0, 0), (name, label, row)
        assert row["programs"] >= 1, (name, label, row)
        if dtype != torch.float32:
            assert row["tensor"], (name, label, row)


@pytest.mark.slow
def test_sixty_token_blocks_cost_little_more():
    rows = compiled("sm_90", lambda _: ["forward_tma"], tokens=60)
    check_kernel("sm_90", "forward_tma", rows["forward_tma"])
    assert rows["forward_tma"]["slots"] <= 357 + 10


def _layout(
    *, key_sizes: bool = False, dtype: torch.dtype = torch.bfloat16, D: int = 128, shift: int = 0, arch: str = "sm_90"
) -> Layout:
    q = torch.empty(4 * 64 * D + 8, dtype=dtype)[shift : shift + 4 * 64 * D].view(1, 1, 4, 64, D)
    pool = torch.empty(1, 1, 9, 64, D, dtype=dtype)
    index, sizes = torch.zeros(1, 1, 4, 8, dtype=torch.int32), torch.ones(1, 1, 9, dtype=torch.int32)
    return Layout(problem=Problem(q, pool, pool, index, None, sizes if key_sizes else None, 1.0, 0), arch=arch)


def test_launch_table_chooses_tma_where_it_is_correct():
    assert choose_forward(_layout()) == "tma"
    assert choose_forward(_layout(arch="sm_80")) == "pointer"
    assert choose_forward(_layout(key_sizes=True)) == "pointer"
    assert choose_forward(_layout(dtype=torch.float32)) == "pointer"
    assert choose_forward(_layout(shift=1)) == "pointer"  # not 16-byte aligned
    assert choose_forward(_layout(D=72)) == "tma"
    assert choose_forward(_layout(D=68)) == "pointer"


def test_more_samples_and_heads_than_an_axis_of_the_grid_holds():
    B, H = 2, 40000
    q, pool = torch.empty(1, 1, 1, 1, 16).expand(B, H, 1, 1, 16), torch.empty(1, 1, 2, 1, 16).expand(B, H, 2, 1, 16)
    p = Problem(q, pool, pool, torch.zeros(1, 1, 1, 1, dtype=torch.int32).expand(B, H, 1, 1), None, None, 1.0, 0)
    forward = plan_forward(p, "sm_80", return_mass=True)
    backward = plan_backward(p, "sm_80", q, None, forward.out, forward.out_rest, forward.lse)
    assert [launch.grid for launch in forward.launches] == [(1, 40000, 2)] * 2
    assert [launch.grid for launch in backward.launches] == [(1, 40000, 2), (1, 40000, 2), (2, 40000, 2)]
    assert prepare(forward.launches[0].kernel, 7, 24, {}).grid == (7, 24, 1)
    with pytest.raises(SparseForcingError, match="batch x heads is 65537, which is no product of two numbers"):
        prepare(forward.launches[0].kernel, 1, 65537, {})  # a prime


def test_padding_is_to_the_power_of_two_that_triton_takes():
    assert all(power_of_two(n) == triton.next_power_of_2(n) for n in range(1, 300))


def test_the_current_device_is_set_only_where_it_changes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    kinds = [type(active(torch.device(name))) for name in ("cpu", "cuda:1", "cuda:0")]
    assert kinds == [contextlib.nullcontext, contextlib.nullcontext, torch.cuda.device]


def test_report_names_unknown_architectures():
    with pytest.raises(ConfigError, match="sm_70"), report.compile_for("sm_70"):
        pass


def test_a_changing_problem_size_does_not_recompile():
    with report.compile_for("sm_90"):
        launch = next(launch for label, launch in report.examples("sm_90") if label == "forward_tma")
        first = report.compile_launch(launch)
        for changes in ({"query_blocks": 1, "slots": 17}, {"query_blocks": 79, "slots": 4096, "list_length": 1}):
            launch.args.update(changes)
            assert report.compile_launch(launch) is first


def test_selection_moves_little_more_than_one_reading_of_queries_and_keys():
    """4680 queries, 32760 keys, 12 heads, 60-token blocks, learned weights and projection, 25 % kept, 64 persistent."""

    def size(x: torch.Tensor) -> int:
        return x.numel() * x.element_size()

    q = torch.empty(1, 12, 78, 60, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 12, 546, 60, 128, dtype=torch.bfloat16, device="meta")
    moved = 0
    for x in (q, k):
        launch, pooled = plans.plan_pool(x, None, torch.ones(12, 60, device="meta"))
        moved += size(launch.args["x"]) + size(pooled)  # one program per block: nothing is read twice
        moved += 3 * size(pooled) + size(torch.empty(12, 128, 128)) + size(pooled) // 2  # projection, cast to bfloat16
    launch, selected = plans.plan_choose(
        torch.empty(1, 12, 78, 128, dtype=torch.bfloat16),
        torch.empty(1, 12, 546, 128, dtype=torch.bfloat16),
        137,
        None,
        1.0,
    )
    again = launch.grid[0]  # every program of 16 query blocks reads the head's key vectors
    moved += size(launch.args["query_blocks_ptr"]) + again * size(launch.args["key_blocks_ptr"]) + size(selected)
    lists = 12 * 78 * (64 + 137) * 4
    moved += 6 * lists  # int64 positions, gathered slots, concatenation
    importance = 12 * 78 * 142 * 4
    moved += 4 * importance  # scores, softmax, sum over query blocks; the Top-C itself is 12 x 142 numbers
    assert moved <= 1.5 * (size(q) + size(k)), moved / (size(q) + size(k))
