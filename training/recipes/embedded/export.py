"""Turn the model folder that a stage left into the bfloat16 one that the package ships.

python -m sparse_forcing.training.recipes.embedded.export runs/tiny-distill/pipeline --out MODEL_FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from sparse_forcing.config import build_config, to_plain
from sparse_forcing.errors import ConfigError, SparseForcingError
from sparse_forcing.inputs import check_targets, model_folders
from sparse_forcing.model.vae import TokenAutoencoder
from sparse_forcing.model_folder.folder import PipelineConfig
from sparse_forcing.sampling.pipeline import SparseForcingPipeline


@torch.no_grad()
def take_mean(pipe: SparseForcingPipeline, folder: str) -> None:
    """Move the transformer half way back to the model it was fine-tuned from, which can be better than both (WiSE-FT,
    arXiv 2109.01903). Raises ConfigError where they are no such pair, WeightsError."""
    other = SparseForcingPipeline.from_pretrained(folder)
    mine, its = pipe.transformer.state_dict(), other.transformer.state_dict()
    text, its_text = _round(pipe.text_encoder), _round(other.text_encoder)
    if {name: x.shape for name, x in mine.items()} != {name: x.shape for name, x in its.items()}:
        raise ConfigError(f"--mean-with: {folder} has a transformer of other sizes; only equal models have a mean")
    if text.keys() != its_text.keys() or any(not torch.equal(x, its_text[name]) for name, x in text.items()):
        raise ConfigError(f"--mean-with: {folder} has another text encoder; only equal models have a mean")
    for name, weight in mine.items():
        weight.lerp_(its[name].to(weight.dtype), 0.5)


def _round(part: object) -> dict[str, torch.Tensor]:
    """A module's weights as an export rounds them: one of two models that belong together may be an export."""
    assert isinstance(part, torch.nn.Module)
    return {name: x.bfloat16() for name, x in part.state_dict().items()}


def export(model: str, mean_with: str | None, changes: list[str], out: Path) -> None:
    """Write the folder `out`; changes: `a.b=c` of the model's defaults. Raises ConfigError, WeightsError,
    OutputError."""
    check_targets([], [], sealed=model_folders([model, mean_with or model]), added_to=[out])
    pipe = SparseForcingPipeline.from_pretrained(model)
    if mean_with is not None:
        take_mean(pipe, mean_with)
    config = build_config(PipelineConfig, to_plain(pipe.defaults), changes, source="--set")
    for name in ("vae", "text_encoder"):
        if getattr(config, name) != getattr(pipe.defaults, name):
            raise ConfigError(f"--set: {name} says what the folder holds and cannot be changed")
    pipe.defaults = config
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
    parser.add_argument("model", help="folder `pipeline` of a finished run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mean-with", metavar="MODEL", help="the model it was fine-tuned from: take the mean of both")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change a default: sampler.steps=6")
    args = parser.parse_args(arguments)
    try:
        export(args.model, args.mean_with, args.set, args.out)
    except SparseForcingError as error:
        print(f"training.export: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
