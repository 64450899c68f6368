"""Turn a pretraining checkpoint, or a student's pipeline folder, into the bfloat16 folder that the package ships.

python -m sparse_forcing.training.recipes.embedded.export runs/tiny --config training/configs/tiny.yaml \
    --out MODEL_FOLDER
python -m sparse_forcing.training.recipes.embedded.export runs/tiny-distill/pipeline --out MODEL_FOLDER
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from sparse_forcing.config import build_config, load_config, to_plain
from sparse_forcing.errors import ConfigError, SparseForcingError, WeightsError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.vae import TokenAutoencoder
from sparse_forcing.model_folder.folder import EMBEDDED_AUTOENCODERS, PIPELINE_FILE, PipelineConfig
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.scenes.vocabulary import CLIP_FRAMES, FRAME_RATE
from sparse_forcing.training.engine.checkpoint import latest_checkpoint
from sparse_forcing.training.engine.ema import ParameterEma
from sparse_forcing.training.recipes.embedded.curriculum import PretrainConfig
from sparse_forcing.training.recipes.embedded.pretrain_model import make_autoencoder, make_models

TINY = PipelineConfig(
    fps=float(FRAME_RATE),
    height=64,
    width=64,
    num_frames=CLIP_FRAMES,
    text_encoder="words",
    vae="token",
    sampler=SamplerConfig(kind="euler", steps=4, shift=4.0, guidance_scale=3.0),
    memory=MemoryConfig(
        kind="sparse", window_frames=4, sink_frames=1, tile=(2, 2, 4), persistent_blocks=4, density=0.5
    ),
)


def trained_pipeline(run: Path, config: PretrainConfig) -> SparseForcingPipeline:
    """The pipeline of a run's newest complete checkpoint, with its averaged weights."""
    vae, model = make_models(config)
    ema = ParameterEma(model, config.ema_decay)
    if not latest_checkpoint(run, {"ema": ema}):
        raise WeightsError(f"{run}: no complete checkpoint")
    ema.copy_to(model)
    model.eval()
    kind = next(name for name, autoencoder in EMBEDDED_AUTOENCODERS.items() if isinstance(vae, autoencoder))
    return SparseForcingPipeline(model.transformer, model.text_encoder, vae, replace(TINY, vae=kind))


def with_autoencoder(config: PretrainConfig, folder: str) -> PretrainConfig:
    """The config with another autoencoder. Raises ConfigError when its latents are others than those trained on."""
    changed = replace(config, autoencoder=folder)
    new, old = (make_autoencoder(c)[0] for c in (changed, config))
    for part in ("patches", "encoder", "normalize"):
        first, second = (getattr(vae, part, torch.nn.Identity()).state_dict() for vae in (new, old))
        if first.keys() != second.keys() or any(not torch.equal(first[name], second[name]) for name in first):
            raise ConfigError(f"--autoencoder: {folder} has other latents than {config.autoencoder} ({part} differs)")
    return changed


def trained(run: Path, config_path: str | None, autoencoder: str | None) -> SparseForcingPipeline:
    """The pipeline of a pretraining run, or of a folder that a later stage wrote."""
    if (run / PIPELINE_FILE).is_file():
        if config_path is not None or autoencoder is not None:
            raise ConfigError(f"{run} is a finished model; --config and --autoencoder are for pretraining runs")
        return SparseForcingPipeline.from_pretrained(str(run))
    if config_path is None:
        raise ConfigError(f"{run}: no {PIPELINE_FILE}; a pretraining run needs --config")
    config = load_config(PretrainConfig, config_path, [])
    return trained_pipeline(run, config if autoencoder is None else with_autoencoder(config, autoencoder))


@torch.no_grad()
def take_mean(pipe: SparseForcingPipeline, folder: str) -> None:
    """Move the transformer half way back to the model it was fine-tuned from, which can be better than both (WiSE-FT,
    arXiv 2109.01903). Raises ConfigError where they are no such pair, WeightsError."""
    other = SparseForcingPipeline.from_pretrained(folder)
    mine, its = pipe.transformer.state_dict(), other.transformer.state_dict()
    text, its_text = _rounded(pipe.text_encoder), _rounded(other.text_encoder)
    if {name: x.shape for name, x in mine.items()} != {name: x.shape for name, x in its.items()}:
        raise ConfigError(f"--mean-with: {folder} has another transformer")
    if text.keys() != its_text.keys() or any(not torch.equal(x, its_text[name]) for name, x in text.items()):
        raise ConfigError(f"--mean-with: {folder} has another text encoder")
    for name, weight in mine.items():
        weight.lerp_(its[name].to(weight.dtype), 0.5)


def _rounded(part: object) -> dict[str, torch.Tensor]:
    """A module's weights as an export rounds them: one of two models that belong together may be an export."""
    assert isinstance(part, torch.nn.Module)
    return {name: x.bfloat16() for name, x in part.state_dict().items()}


def export(
    run: Path, config_path: str | None, autoencoder: str | None, mean_with: str | None, changes: list[str], out: Path
) -> None:
    """Write the folder `out`; changes: `a.b=c` of the model's defaults. Raises ConfigError, WeightsError."""
    pipe = trained(run, config_path, autoencoder)
    if mean_with is not None:
        take_mean(pipe, mean_with)
    config = build_config(PipelineConfig, to_plain(pipe.config), changes, source="--set")
    for name in ("vae", "text_encoder"):
        if getattr(config, name) != getattr(pipe.config, name):
            raise ConfigError(f"--set: {name} says what the folder holds and cannot be changed")
    pipe.config = config
    # Half the bytes; the model was trained in bfloat16 arithmetic and loses nothing that can be seen.
    learned: list = [pipe.transformer, pipe.text_encoder]
    if isinstance(pipe.vae, TokenAutoencoder):
        learned += [pipe.vae.encoder, pipe.vae.decoder]
    for part in learned:
        assert isinstance(part, torch.nn.Module)
        torch.nn.Module.to(part, torch.bfloat16)  # diffusers' own warns that it casts an empty list of modules
    pipe.save_pretrained(out)


def main(arguments: list[str]) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--config", help="of a pretraining run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--autoencoder", help="one with the same latents as the config's and a better decoder")
    parser.add_argument("--mean-with", metavar="MODEL", help="the model it was fine-tuned from: take the mean of both")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change a default: sampler.steps=6")
    args = parser.parse_args(arguments)
    try:
        export(args.run, args.config, args.autoencoder, args.mean_with, args.set, args.out)
    except SparseForcingError as error:
        print(f"training.export: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
