"""Wan 2.1 1.3B as it is published, in all but its numbers, which are random, and its text encoder, which is small.

python -m tests.true_size FOLDER: 3.1 GB in bfloat16.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tests.wan_folder import write_beside


def write_true_size(folder: Path, *, num_layers: int = 30, ffn_dim: int = 8960, base_dim: int = 96) -> Path:
    """The diffusers folder of plain Wan 2.1 1.3B, or of less of it, every part in bfloat16."""
    torch.manual_seed(0)
    wide = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        WanTransformer3DModel(
            num_attention_heads=12, ffn_dim=ffn_dim, num_layers=num_layers, text_dim=4096, cross_attn_norm=True
        ).save_pretrained(folder / "transformer")
        AutoencoderKLWan(base_dim=base_dim).save_pretrained(folder / "vae")
        text = UMT5Config(vocab_size=60, d_model=4096, d_kv=8, d_ff=16, num_layers=1, num_heads=4)
        UMT5EncoderModel(text).eval().save_pretrained(folder / "text_encoder")
    finally:
        torch.set_default_dtype(wide)
    write_beside(folder, shift=8.0)
    return folder


if __name__ == "__main__":
    print(write_true_size(Path(sys.argv[1])))
