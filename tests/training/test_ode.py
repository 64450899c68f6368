"""ODE pairs lie on the student's grid or are refused; making them is resumable; the stage trains on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.model.flow import SamplerConfig, few_step_timesteps
from sparse_forcing.training.data.pairs import PairsConfig, choose_kept_steps, make_pairs
from sparse_forcing.training.data.shards import Shards
from sparse_forcing.training.data.sources import DataConfig
from sparse_forcing.training.engine.settings import LoopConfig
from sparse_forcing.training.recipes.ode import OdeConfig, train
from tests.training.conftest import CHANNELS, HORIZON

STUDENT = SamplerConfig(steps=2)


def pairs(model: Path, **changes) -> PairsConfig:
    data = DataConfig(size=32, latent_frames=HORIZON)
    return PairsConfig(
        teacher=str(model), data=data, sampler=STUDENT, steps=4, count=5, per_shard=2, batch_size=2, **changes
    )


@pytest.mark.parametrize(("shift", "steps"), [(5.0, 48), (8.0, 48), (5.0, 4), (3.0, 100)])
def test_kept_states_are_the_students_timesteps(shift: float, steps: int) -> None:
    sampler = SamplerConfig(shift=shift)
    sigmas, kept = choose_kept_steps(PairsConfig(sampler=sampler, steps=steps))
    torch.testing.assert_close(1000 * sigmas[kept[:-1]], few_step_timesteps(sampler), atol=1e-2, rtol=0)
    assert kept == [0, steps // 4, steps // 2, 3 * steps // 4, steps]


def test_a_grid_that_misses_the_student_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"50 teacher steps .* use a multiple of 4"):
        choose_kept_steps(PairsConfig(steps=50))


def test_pairs_start_as_noise_and_end_clean(tmp_path: Path, model_folder: Path) -> None:
    assert make_pairs(pairs(model_folder), tmp_path / "pairs") == 3
    data, prompts = Shards(tmp_path / "pairs")[[0, 4]]
    assert data.shape == (2, 3, HORIZON, CHANNELS, 4, 4)
    assert len(prompts) == 2
    assert 0.8 < data[:, 0].std() < 1.2
    assert not torch.equal(data[0, 0], data[1, 0])


def test_making_pairs_again_makes_only_what_is_missing(tmp_path: Path, model_folder: Path) -> None:
    config, folder = pairs(model_folder), tmp_path / "pairs"
    make_pairs(config, folder)
    before = (folder / "shard-00001.safetensors").read_bytes()
    (folder / "shard-00001.json").unlink()
    with pytest.raises(WeightsError, match="3 of 5 items"):
        Shards(folder)
    assert make_pairs(config, folder) == 1
    assert (folder / "shard-00001.safetensors").read_bytes() == before
    with pytest.raises(ConfigError, match="other settings"):
        make_pairs(replace(config, seed=1), folder)


def test_pairs_of_other_prompts_are_not_mixed_in(tmp_path: Path, model_folder: Path) -> None:
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "pairs"
    prompts.write_text("a red circle\na blue star\n")
    data = DataConfig(kind="prompts", path=prompts, latent_frames=HORIZON)
    config = replace(pairs(model_folder), data=data)
    make_pairs(config, folder)
    (folder / "shard-00001.json").unlink()
    assert make_pairs(replace(config, batch_size=1), folder) == 1
    with pytest.raises(ConfigError, match="other settings"):
        make_pairs(replace(config, negative_prompt="blurry"), folder)
    prompts.write_text("a red circle\na green star\n")
    (folder / "shard-00001.json").unlink()
    with pytest.raises(ConfigError, match="other settings"):
        make_pairs(config, folder)


def test_pairs_in_half_precision_are_near_the_others(tmp_path: Path, model_folder: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        make_pairs(pairs(model_folder, dtype=dtype), tmp_path / dtype)
    whole, half = (Shards(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    assert half.tensor("data", [3]).dtype == half.tensor("text", [3]).dtype == torch.bfloat16
    assert whole.tensor("data", [3]).dtype == torch.float32
    torch.testing.assert_close(half.tensor("data", [3]).float(), whole.tensor("data", [3]), atol=0.1, rtol=0.05)
    with pytest.raises(ConfigError, match="other settings"):
        make_pairs(pairs(model_folder), tmp_path / "bfloat16")
    with pytest.raises(ConfigError, match="dtype: expected float32 or bfloat16"):
        pairs(model_folder, dtype="float16")


def test_a_damaged_shard_is_named(tmp_path: Path, model_folder: Path) -> None:
    make_pairs(pairs(model_folder), tmp_path / "pairs")
    path = tmp_path / "pairs" / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"shard-00002\.safetensors: SHA-256"):
        Shards(tmp_path / "pairs")[[4]]


def test_the_stage_trains_on_matching_pairs_only(tmp_path: Path, model_folder: Path) -> None:
    make_pairs(pairs(model_folder), tmp_path / "pairs")
    loop = LoopConfig(steps=2, global_batch=2, micro_batch=2, trackers=())
    config = OdeConfig(
        loop=loop,
        model=str(model_folder),
        sampler=STUDENT,
        data=DataConfig(kind="shards", path=tmp_path / "pairs", size=32, latent_frames=HORIZON),
    )
    assert train(config, tmp_path / "out") == 0
    assert (tmp_path / "out" / "pipeline" / "transformer").is_dir()
    other = replace(config, sampler=SamplerConfig(steps=2, shift=8.0))
    with pytest.raises(ConfigError, match="make the pairs with the same sampler"):
        train(other, tmp_path / "other")
