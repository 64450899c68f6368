"""One video by several processes is the video of one: tokens split, heads split, memories of own heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sparse_forcing.cli import main
from sparse_forcing.errors import ConfigError
from sparse_forcing.media.video import read_video
from sparse_forcing.memory import MemoryConfig, MemoryGeometry, make_memory
from sparse_forcing.model.attention import ParallelAttention
from sparse_forcing.model.selector import BlockSelector
from sparse_forcing.model.sequence_parallel import SequenceParallel, check_processes, even_parts
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.processes import leave_group
from sparse_forcing.sampling.graphs import why_not_recorded
from tests.core import sequence_worker
from tests.core.sequence_worker import ARGUMENTS, CASES
from tests.forked import Forked, json_of


def test_parts_differ_by_one_and_every_process_has_a_head() -> None:
    assert even_parts(12, 8) == [2, 2, 2, 2, 1, 1, 1, 1]
    check_processes(12, 12)
    with pytest.raises(ConfigError, match="13 processes cannot share 12 attention heads"):
        check_processes(12, 13)


def test_selectors_of_some_heads_hold_their_weights() -> None:
    whole = BlockSelector(5, 16, 8, learned_retention=True).to(torch.float64)
    for weights in whole.parameters():
        torch.nn.init.normal_(weights)
    part = whole.of_heads(slice(1, 3))
    assert all(torch.equal(weights[1:3], part.state_dict()[name]) for name, weights in whole.state_dict().items())
    pooled = torch.randn(1, 5, 7, 8, dtype=torch.float64)
    found = part.retention(pooled[:, 1:3], pooled[:, 1:3], pooled[:, 1:3, :, 0].abs())  # type: ignore[misc]
    expected = whole.retention(pooled, pooled, pooled[..., 0].abs())  # type: ignore[misc]
    torch.testing.assert_close(found, expected[:, 1:3])


def test_a_group_of_one_computes_the_same_bits_and_refuses_what_it_cannot_share() -> None:
    torch.manual_seed(0)
    model = CausalWanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        ffn_dim=16,
        num_layers=2,
    )
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.2)
    inputs = torch.randn(2, 4, 3, 2, 3), torch.tensor([500.0, 300.0]), torch.randn(2, 5, 8)
    per_frame = torch.tensor([[1.0, 2.0, 3.0]] * 2)
    with torch.no_grad():
        alone = model(*inputs)
    with leave_group():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        model.sequence_parallel = SequenceParallel(3)
        with torch.no_grad():
            assert torch.equal(model(*inputs), alone)
            with pytest.raises(ConfigError, match="sequence parallelism needs one timestep per sample"):
                model(inputs[0], per_frame, inputs[2], policy=ParallelAttention(3))
        with pytest.raises(ConfigError, match="has no gradients"):
            model(*inputs)
        memory = make_memory(MemoryConfig(kind="window", window_frames=3), MemoryGeometry.of(model.config, 2, 3))
        assert "other processes" in str(why_not_recorded(model, memory, training=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--sequence-parallel needs several processes; start them as in: torchrun"),
        (["--overlay"], "--overlay needs the whole model in one process"),
        (["--cuda-graphs"], "--cuda-graphs needs the whole model in one process"),
        (["--resume"], "--resume needs the whole model in one process"),
        (["--compile"], "--compile needs the whole model in one process"),
        (["--retention", "random"], "--retention random counts all heads"),
    ],
)
def test_what_cannot_be_combined_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["generate", "p", "--sequence-parallel", *arguments, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_several_processes_make_the_video_of_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*ARGUMENTS, "--output", str(tmp_path / "alone")]) == 0
    (alone,) = json.loads(capsys.readouterr().out)
    code, output = Forked(tmp_path / "launch.log", sequence_worker.run, tmp_path, processes=4).finish()
    assert code == 0, output[-3000:]
    result = json.loads((tmp_path / "differences.json").read_text())
    assert len(result["found"]) == len(CASES) + 1
    for *_, size, share, difference in result["found"]:
        assert difference < 1e-5, result  # not 0: with fewer heads a problem may be small enough for one call
        assert share == pytest.approx(even_parts(6, size)[0] / 6, abs=0.02)  # of the cache: the first one's heads
    assert result["refused"] == 2

    (record,) = json_of(output)
    assert record["settings"]["sequence_parallel"]
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == sorted(
        path.name for path in (tmp_path / "alone").iterdir()
    )
    assert record["cache_bytes_peak"] < alone["cache_bytes_peak"] / 2  # that of two heads of six
    frames = [read_video(each["path"])[0].astype(int) for each in (alone, record)]
    assert abs(frames[0] - frames[1]).max() <= 1
