"""Two gloo processes train as one does; sharded, too; and what goes wrong on one of them stops both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sparse_forcing.model_folder.folder import load_transformer
from sparse_forcing.processes import leave_group
from sparse_forcing.training.engine.parallel import shard
from tests.training.conftest import CHANNELS
from tests.training.helpers import (
    differences,
    is_complete,
    largest_difference,
    losses,
    newest,
    run,
    small_config,
    state,
)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["forcing", "distill"])
def test_two_processes_equal_one(tmp_path: Path, model_folder: Path, stage: str) -> None:
    config = small_config(model_folder, stage, steps=20, checkpoint_every=20)
    for processes in (1, 2):
        code, output = run(tmp_path, config, tmp_path / str(processes), stage=stage, processes=processes)
        assert code == 0, output
    one, two = (state(newest(tmp_path / str(n))) for n in (1, 2))
    for name in ("model.pt", "ema.pt") if stage == "forcing" else ("generator.pt", "critic.pt", "generator_ema.pt"):
        assert largest_difference(one[name], two[name]) < 1e-5
    for a, b in zip(losses(tmp_path / "1"), losses(tmp_path / "2")):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_killed_and_resumed_with_two_processes(tmp_path: Path, model_folder: Path) -> None:
    config = small_config(model_folder, steps=6)
    assert run(tmp_path, config, tmp_path / "whole", processes=2)[0] == 0
    code, _ = run(tmp_path, config, tmp_path / "out", processes=2, kill_at_write=5)
    assert code != 0
    code, output = run(tmp_path, config, tmp_path / "out", processes=2)
    assert code == 0, output
    assert differences(state(newest(tmp_path / "out")), state(newest(tmp_path / "whole"))) == []
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_sharded_equals_replicated_and_resumes_elsewhere(tmp_path: Path, model_folder: Path) -> None:
    config = small_config(model_folder, steps=4)
    sharded = small_config(model_folder, steps=4, parallel="fsdp")
    assert run(tmp_path, config, tmp_path / "one")[0] == 0
    code, output = run(tmp_path, sharded, tmp_path / "fsdp", processes=2)
    assert code == 0, output
    one, two = (state(newest(tmp_path / name)) for name in ("one", "fsdp"))
    assert one["model.pt"].keys() == two["model.pt"].keys()
    assert largest_difference(one["model.pt"], two["model.pt"]) < 1e-5

    longer = small_config(model_folder, steps=6)
    code, output = run(tmp_path, longer, tmp_path / "one")
    assert code == 0, output
    code, output = run(tmp_path, small_config(model_folder, steps=6), tmp_path / "fsdp")
    assert code == 0, output  # one process has the random state of the first of two
    code, output = run(tmp_path, small_config(model_folder, steps=8, parallel="fsdp"), tmp_path / "one", processes=2)
    assert code != 0
    assert "allow_missing_random" in output
    more = small_config(model_folder, steps=8, parallel="fsdp", allow_missing_random=True)
    code, output = run(tmp_path, more, tmp_path / "one", processes=2)
    assert code == 0, output
    assert newest(tmp_path / "one").name == "step-00000008"


@pytest.mark.slow
def test_sharded_bfloat16_learns_and_samples_as_replicated(tmp_path: Path, model_folder: Path) -> None:
    """Weights are gathered in bfloat16, where replicated ones are rounded as they are used: nearly the same."""
    for processes, name in ((1, "replicate"), (2, "fsdp")):
        config = small_config(
            model_folder,
            "distill",
            steps=2,
            parallel=name,
            dtype="bfloat16",
            validate_every=2,
            gradient_checkpointing=True,
        )
        code, output = run(tmp_path, config, tmp_path / name, stage="distill", processes=processes)
        assert code == 0, output
        assert len(list((tmp_path / name / "samples").glob("*.mp4"))) == 2
    for a, b in zip(losses(tmp_path / "replicate"), losses(tmp_path / "fsdp"), strict=True):
        assert a["critic_loss"] == pytest.approx(b["critic_loss"], rel=0.01)
        norms = [{name: x for name, x in row.items() if name.endswith("gradient_norm")} for row in (a, b)]
        assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_sharding_in_bfloat16_leaves_timesteps_and_positions_in_float32(tmp_path: Path, model_folder: Path) -> None:
    """In bfloat16 a timestep of 937.5 is 936."""
    seen = {}
    with leave_group():
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
        model = shard(load_transformer(model_folder), param_dtype=torch.bfloat16)
        model.condition_embedder.register_forward_pre_hook(lambda _, inputs: seen.update(timestep=inputs[0]))
        model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.update(cosine=inputs[3].cos))
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            model(torch.randn(1, CHANNELS, 2, 4, 4), torch.tensor([937.5]), torch.randn(1, 16, 8))
    assert (seen["timestep"].item(), seen["cosine"].dtype) == (937.5, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("nan_rank", "log_every"), [(0, 1), (1, 100)])
def test_non_finite_loss_on_one_process_stops_both(
    tmp_path: Path, model_folder: Path, nan_rank: int, log_every: int
) -> None:
    out = tmp_path / "out"
    config = small_config(model_folder, steps=6, log_every=log_every)
    code, output = run(tmp_path, config, out, processes=2, nan_at_step=3, nan_rank=nan_rank)
    assert code != 0
    assert "step 3" in output
    assert "flow loss = nan" in output
    assert all(f"[rank{rank}]: sparse_forcing.errors.NotFiniteError" in output for rank in range(2))
    assert "resuming goes on from step 2" in output
    assert newest(out).name == "step-00000002"
    assert is_complete(newest(out))


@pytest.mark.slow
def test_failed_write_on_one_process_raises_on_both(tmp_path: Path, model_folder: Path) -> None:
    out = tmp_path / "out"
    code, output = run(tmp_path, small_config(model_folder, steps=6), out, processes=2, fail_write=6)
    assert code != 0
    assert "another process failed" in output
    assert [folder.name for folder in out.glob("step-*")] == ["step-00000002"]
    assert is_complete(newest(out))


@pytest.mark.slow
def test_batches_that_cannot_be_shared_are_refused(tmp_path: Path, model_folder: Path) -> None:
    config = small_config(model_folder, micro_batch=4)
    code, output = run(tmp_path, config, tmp_path / "out", processes=2)
    assert code != 0
    assert "cannot be shared by 2 processes" in output
