"""Teacher forcing: noisy chunks that see the finished ones before them, all at once or chunk by chunk through a memory.

Legend: B batch, F latent frames, C channels; latents [B, F, C, H, W], timesteps [B, F] and constant inside a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.memory import MemoryConfig, make_model_memory
from sparse_forcing.model.attention import ParallelAttention
from sparse_forcing.model.transformer import CausalWanTransformer3DModel


def flow_beside(
    model: CausalWanTransformer3DModel,
    noisy: Tensor,
    clean: Tensor,
    timestep: Tensor,
    text: Tensor,
    chunks: list[int],
    *,
    level: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Flow of the noisy chunks, in one pass over clean and noisy ones side by side.

    Args:
        level: timesteps of the clean chunks, which may carry some noise; 0 when None.
        window: latent frames that a chunk sees, its own included; all when None.
    """
    policy = ParallelAttention.teacher_forcing(chunks, window=window)
    inputs = {"clean_hidden_states": clean.transpose(1, 2), "clean_timestep": level}
    return model(noisy.transpose(1, 2), timestep, text, policy=policy, **inputs).transpose(1, 2)


def flow_through_memory(
    model: CausalWanTransformer3DModel,
    settings: MemoryConfig,
    noisy: Tensor,
    clean: Tensor,
    timestep: Tensor,
    text: Tensor,
    chunks: list[int],
    *,
    level: Tensor | None = None,
    cache_gradient: str = "detached",
    distilled: frozenset[int] = frozenset(),
) -> tuple[Tensor, list[Tensor]]:
    """Flow of the noisy chunks, each predicted before its clean one is left in a memory of `settings`.

    Args:
        cache_gradient: "detached", or "clean" for keys and values of the clean chunks that learn too.
        distilled: layers whose block selector's loss is returned beside the flow.
    """
    memory = make_model_memory(model, settings, noisy, cache_gradient=cache_gradient)
    if distilled:
        memory.distil_selectors(distilled)
    level = torch.zeros_like(timestep) if level is None else level
    learns = cache_gradient == "clean" and torch.is_grad_enabled()
    parts, start = [], 0
    for frames in chunks:
        part = slice(start, start + frames)
        memory.begin_chunk(frames)
        policy = memory.denoising_pass()
        parts.append(model(noisy[:, part].transpose(1, 2), timestep[:, start], text, policy=policy).transpose(1, 2))
        start += frames
        if start < noisy.shape[1]:  # nothing comes after the last chunk
            with torch.set_grad_enabled(learns):
                model(clean[:, part].transpose(1, 2), level[:, part.start], text, policy=memory.clean_pass())
    return torch.cat(parts, 1), memory.selector_losses
