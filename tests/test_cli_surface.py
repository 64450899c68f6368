"""The command line's surface, frozen: a change here is a change for users and belongs into CHANGELOG.md."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_forcing.cli import COMMANDS, main
from sparse_forcing.cli import evaluate as evaluate_command
from sparse_forcing.cli import generate as generate_command
from sparse_forcing.cli.flags import Parser
from sparse_forcing.eval.options import EvaluateConfig
from sparse_forcing.sampling.generation.jobs import GenerateConfig

ROOT = Path(__file__).resolve().parents[1]
SURFACE = {
    "generate": "PROMPT --then --prompt-file --model --output --seed --num-samples --recache --image --video "
    "--num-frames --seconds --height --width --num-inference-steps --guidance-scale --negative-prompt --preset "
    "--sampler --shift --chunk-frames --fps --memory --window-frames "
    "--sink-frames --persistent-blocks --density --retention --cache-dtype --tile --positions --device "
    "--text-encoder-device --prompt-cache --dtype --weights --offload --tiny-vae --tiled-decoding --scale --overlay "
    "--live --grid --skip-existing --resume --checkpoint-every --sequence-parallel "
    "--cuda-graphs --no-cuda-graphs --compile "
    "--suite --shard --check --json",
    "train": "STAGE --config --set --output --resume-from --allow-changes",
    "evaluate": "TARGET --suite --metrics --output --compare --merge --aggregate --json --weights --mode "
    "--official-results "
    "--plugins --stand-ins --static-filter --cache --workers --worker-timeout --device --max-frames --max-pixels "
    "--strict-exit --report --no-report --embed-videos --no-embed-videos --resamples "
    "--shard",
    "bench": "WHAT --quick --repeats --device --model --prompts --size --objects --horizons --memories --batch-size "
    "--seed --num-inference-steps --guidance-scale --recache --worlds --gaps --grounds --by-ground --count "
    "--num-frames --split --positions --model-size --height --width --chunks --dtype --decode "
    "--cuda-graphs --no-cuda-graphs --output",
    "convert": "SOURCE TARGET --base --preset --config --lora --keep-lora --lora-scale --part --head-dim --to --json",
    "data": "WHAT OUTPUT --config --set --num-clips --num-frames --fps --size --scale --split --two-objects --world "
    "--gap --ground --frame-noise --seed --json",
    "playground": "--model --device --text-encoder-device --dtype --weights --offload --tiny-vae "
    "--tiled-decoding --host --port --cache-gigabytes",
    "doctor": "--kernels --config --stage --processes --vram --model --device --preset --num-frames --seconds --height "
    "--width --guidance-scale --chunk-frames --memory --window-frames --sink-frames --persistent-blocks --cache-dtype "
    "--tile --text-encoder-device --dtype --weights --offload --tiny-vae --tiled-decoding --json",
}
WITHOUT_TORCH = """
import sys
from sparse_forcing.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code or 0
heavy = {"torch", "diffusers", "transformers", "av"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""


def flags(command: str) -> list[str]:
    import importlib

    parser = Parser(prog=command)
    importlib.import_module(f"sparse_forcing.cli.{command}").add_arguments(parser)
    actions = [action for action in parser._actions if "--help" not in action.option_strings]
    return [name for action in actions for name in (action.option_strings or [str(action.metavar)])]


def test_commands_are_frozen() -> None:
    assert list(COMMANDS) == ["generate", "train", "evaluate", "bench", "convert", "data", "playground", "doctor"]


@pytest.mark.parametrize("command", SURFACE)
def test_flags_are_frozen(command: str) -> None:
    assert flags(command) == SURFACE[command].split()


@pytest.mark.parametrize(
    ("config", "texts", "arguments"),
    [
        (GenerateConfig, generate_command.FLAGS, {"prompts", "then", "shard"}),
        (EvaluateConfig, evaluate_command.FLAGS, {"target", "shard"}),
    ],
)
def test_every_setting_has_a_flag(config: type, texts: dict[str, str], arguments: set[str]) -> None:
    assert {field.name for field in dataclasses.fields(config)} == set(texts) | arguments


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_flag_and_prints_to_stdout(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in SURFACE.get(command, "").split())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        ([], 2),
        (["unknown"], 2),
        *(([command, "--help"], 0) for command in COMMANDS),
        (["generate"], 2),
        (["generate", "p", "--num-frames", "x"], 2),
        (["generate", "p", "--memory", "full", "--density", "0.2"], 2),
        (["train", "nothing", "--output", "x"], 2),
        (["train", "pretrain", "--output", "x", "--config", "/none.yaml"], 2),
        (["evaluate"], 2),
        (["convert", "/none", "x"], 2),
        (["data", "clips", "x", "--num-clips", "0"], 2),
    ],
)
def test_help_and_bad_arguments_never_import_torch(arguments: list[str], code: int, tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert child.returncode == code, child.stderr
    assert "Traceback" not in child.stderr


def test_module_and_version() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "sparse_forcing", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert child.stdout.startswith("sparse-forcing ")
