"""A run goes on with the settings it began with; from a checkpoint of another run only when told so."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_forcing.cli import main
from sparse_forcing.config import build_config, to_plain
from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.training.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from sparse_forcing.training.engine.resume import FREE, Resume, list_changed_settings
from sparse_forcing.training.engine.settings import LoopConfig
from sparse_forcing.training.recipes.distill import DistillConfig
from sparse_forcing.training.recipes.embedded.autoencoder import AutoencoderConfig, AutoencoderLoop
from sparse_forcing.training.recipes.embedded.curriculum import PretrainConfig, StageConfig
from sparse_forcing.training.recipes.forcing import ForcingConfig, train
from tests.training.helpers import differences, losses, newest, small_config, state

LOOP = LoopConfig(steps=4, trackers=())


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Settings of a run that trains one tensor."""

    seed: int = 0
    compile: bool = False
    rates: dict[str, float] = field(default_factory=lambda: {"head": 1.0})


class Part:
    def __init__(self) -> None:
        self.value = torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value.copy_(state["value"])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run of two steps."""
    part = Part()
    part.value += 3
    save_checkpoint(tmp_path / "run", 2, {"part": part}, to_plain(Plain()))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("config", "changes", "found"),
    [
        (ForcingConfig(loop=LOOP), {"mode": "diffusion"}, ["mode: teacher -> diffusion"]),
        (ForcingConfig(loop=LOOP), {"shift": 3.0}, ["shift: 5.0 -> 3.0"]),
        (ForcingConfig(loop=LOOP), {"loop": replace(LOOP, seed=1)}, ["loop.seed: 0 -> 1"]),
        (ForcingConfig(loop=LOOP), {"loop": replace(LOOP, global_batch=16)}, ["loop.global_batch: 8 -> 16"]),
        (ForcingConfig(loop=LOOP), {"loop": replace(LOOP, steps=9, micro_batch=2, processes=4, parallel="fsdp")}, []),
        (DistillConfig(loop=LOOP), {"critic_ratio": 3, "windows": 2}, ["critic_ratio: 5 -> 3", "windows: 1 -> 2"]),
        (AutoencoderConfig(), {"loop": AutoencoderLoop(steps=9000, checkpoint_every=1, device="cpu")}, []),
        (AutoencoderConfig(), {"loop": AutoencoderLoop(seed=1)}, ["loop.seed: 0 -> 1"]),
        (AutoencoderConfig(), {"noise": 0.1}, ["noise: 0.3 -> 0.1"]),
        (PretrainConfig(), {"caption_dropout": 0.2}, ["caption_dropout: 0.1 -> 0.2"]),
    ],
)
def test_what_is_learned_may_not_change_and_how_long_may(
    config: Any, changes: dict[str, Any], found: list[str]
) -> None:
    assert list(list_changed_settings(to_plain(config), config)) == []
    assert list(list_changed_settings(to_plain(config), replace(config, **changes))) == found


def test_a_curriculum_grows_at_its_end_alone() -> None:
    first, second = (StageConfig(latent_frames=n, batch_size=2, steps=3) for n in (1, 2))
    saved = to_plain(PretrainConfig(stages=(first, second)))
    longer = replace(second, steps=9)
    assert list(list_changed_settings(saved, PretrainConfig(stages=(first, longer, first)))) == []
    assert list(list_changed_settings(saved, PretrainConfig(stages=(longer, longer)))) == [
        "stages.0.latent_frames: 1 -> 2",
        "stages.0.steps: 3 -> 9",
    ]


def test_every_free_setting_is_one() -> None:
    configs = [to_plain(c) for c in (ForcingConfig(loop=LOOP), PretrainConfig(), AutoencoderConfig())]
    names = {name for config in configs for name in config} | {f"loop.{name}" for name in configs[0]["loop"]}
    assert names >= FREE


def test_settings_of_another_version_are_named_and_new_ones_count_as_their_defaults() -> None:
    assert list(list_changed_settings({"seed": 0}, Plain())) == []
    (change,) = list_changed_settings({"sed": 0}, Plain())
    assert "not settings of this version (settings: sed: unknown setting; did you mean seed?)" in change


def test_another_seed_is_refused_unless_allowed(saved: Path) -> None:
    part = Part()
    changed = Plain(seed=1, rates={"head": 2.0})
    with pytest.raises(
        ConfigError, match=r"seed: 0 -> 1, rates\.head: 1\.0 -> 2\.0; choose another --output .*--allow"
    ):
        Resume().load(saved, {"part": part}, changed)
    assert not part.value.any()
    with pytest.warns(UserWarning, match="changed settings: seed: 0 -> 1"):
        assert Resume(allow_changes=True).load(saved, {"part": part}, changed).step == 2
    assert part.value.tolist() == [3, 3]
    assert Resume().load(saved, {"part": Part()}, Plain(compile=True)).step == 2


def test_a_named_checkpoint_starts_a_new_folder_and_is_never_skipped(saved: Path, tmp_path: Path) -> None:
    named, part = Resume(checkpoint=saved / "step-00000002"), Part()
    assert named.load(tmp_path / "new", {"part": part}, Plain()).step == 2
    assert part.value.tolist() == [3, 3]
    with pytest.raises(ConfigError, match=r"--resume-from .*has checkpoints of its own; choose another --output"):
        named.load(saved, {"part": part}, Plain())
    (saved / "step-00000002" / "part.pt").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=r"part\.pt: SHA-256 differs"):
        named.load(tmp_path / "new", {"part": part}, Plain())
    with pytest.raises(WeightsError, match="incomplete checkpoint"):
        Resume(checkpoint=saved / "step-00000009").load(tmp_path / "new", {"part": part}, Plain())
    with pytest.warns(UserWarning, match="skipping"):
        assert newest_checkpoint(saved) is None


def test_a_run_from_a_named_checkpoint_is_resumed_by_the_same_command(saved: Path, tmp_path: Path) -> None:
    out, named = tmp_path / "new", Resume(checkpoint=saved / "step-00000002")
    assert named.load(out, {"part": Part()}, Plain()).step == 2
    save_checkpoint(out, 3, {"part": Part()}, to_plain(Plain()))
    assert named.load(out, {"part": Part()}, Plain()).step == 3
    (out / "step-00000003" / "part.pt").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="no complete checkpoint"), pytest.warns(UserWarning, match="skipping"):
        named.load(out, {"part": Part()}, Plain())
    with pytest.raises(ConfigError, match="has checkpoints of its own"):
        Resume(checkpoint=saved / "step-00000009").load(out, {"part": Part()}, Plain())


def test_an_optimizer_goes_on_with_settings_that_were_changed_on_purpose(tmp_path: Path) -> None:
    def optimizer(decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.5, weight_decay=decay)

    save_checkpoint(tmp_path, 1, {"optimizer": optimizer(0.1)}, {})
    other = optimizer(0.2)
    load_checkpoint(tmp_path / "step-00000001", {"optimizer": other})
    assert other.param_groups[0]["weight_decay"] == 0.2


def test_a_stage_goes_on_from_a_named_checkpoint_as_if_it_were_its_own(tmp_path: Path, model_folder: Path) -> None:
    config = build_config(ForcingConfig, small_config(model_folder))
    assert train(config, tmp_path / "whole") == 0
    half = tmp_path / "whole" / "step-00000002"
    assert train(config, tmp_path / "new", Resume(checkpoint=half)) == 0
    assert differences(state(newest(tmp_path / "new")), state(newest(tmp_path / "whole"))) == []
    assert losses(tmp_path / "new") == losses(tmp_path / "whole")[2:]
    changed = replace(config, loop=replace(config.loop, seed=1))
    with pytest.raises(ConfigError, match=r"loop\.seed: 0 -> 1"):
        train(changed, tmp_path / "whole")


def test_the_command_line_refuses_in_one_line_and_goes_on_when_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(
        "{sizes: [16], batch_size: 2, components: 8, latent_channels: 4, dim: 8, num_blocks: 1, fit_clips: 8, "
        "loop: {steps: 1}}"
    )
    command = ["train", "autoencoder", "--config", str(path), "--output", str(out)]
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--set", "noise=0.5", "--set", "loop.steps=2"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "noise: 0.3 -> 0.5" in line
    with pytest.warns(UserWarning, match="changed settings"):
        assert main([*command, "--set", "noise=0.5", "--set", "loop.steps=2", "--allow-changes"]) == 0
    assert newest(out).name == "step-00000002"
    first = shutil.move(newest(out), tmp_path / "step-00000002")
    new = [
        *command[:-1],
        str(tmp_path / "new"),
        "--set",
        "noise=0.5",
        "--set",
        "loop.steps=3",
        "--resume-from",
        str(first),
    ]
    assert main(new) == 0
    assert newest(tmp_path / "new").name == "step-00000003"
