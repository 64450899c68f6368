"""Turn a pretraining checkpoint into the model folder that the package ships and `from_pretrained` loads.

python -m sparse_forcing.training.export runs/tiny --config training/configs/tiny.yaml --out MODEL_FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sparse_forcing.config import load_config
from sparse_forcing.errors import WeightsError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.pipeline import PipelineConfig, SparseForcingPipeline
from sparse_forcing.sampling.schedules import SamplerConfig
from sparse_forcing.scenes.vocabulary import CLIP_FRAMES, FRAME_RATE
from sparse_forcing.training.checkpoint import latest_checkpoint
from sparse_forcing.training.curriculum import PretrainConfig
from sparse_forcing.training.ema import ParameterEma
from sparse_forcing.training.pretrain import start
from sparse_forcing.vae import TokenAutoencoder

TINY = PipelineConfig(
    fps=float(FRAME_RATE),
    height=64,
    width=64,
    num_frames=CLIP_FRAMES,
    text_encoder="words",
    vae="token",
    sampler=SamplerConfig(kind="euler", steps=4, shift=4.0, guidance_scale=3.0),
    memory=MemoryConfig(kind="sparse", window_frames=4, sink_frames=1, tile=(2, 2, 4), persistent_blocks=4, top_k=0.5),
)


def trained_pipeline(run: Path, config: PretrainConfig, *, averaged: bool) -> SparseForcingPipeline:
    """The pipeline of a run's newest complete checkpoint, with its averaged or its last weights."""
    vae, model = start(config)
    ema = ParameterEma(model, config.ema_decay)
    if not latest_checkpoint(run, {"ema": ema} if averaged else {"model": model}):
        raise WeightsError(f"{run}: no complete checkpoint")
    if averaged:
        ema.copy_to(model)
    model.eval()
    return SparseForcingPipeline(model.transformer, model.text_encoder, vae, TINY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--averaged", action="store_true", help="averaged weights instead of the last ones")
    args = parser.parse_args()
    pipe = trained_pipeline(args.run, load_config(PretrainConfig, args.config, []), averaged=args.averaged)
    # Half the bytes; the model was trained in bfloat16 arithmetic and loses nothing that can be seen.
    learned: list = [pipe.transformer, pipe.text_encoder]
    if isinstance(pipe.vae, TokenAutoencoder):
        learned += [pipe.vae.encoder, pipe.vae.decoder]
    for part in learned:
        assert isinstance(part, torch.nn.Module)
        part.to(torch.bfloat16)
    pipe.save_pretrained(args.out)


if __name__ == "__main__":
    main()
