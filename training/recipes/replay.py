"""Gradients into written memory: a rollout is made without gradients, then its exit steps are taken again with them.

What a rollout computes of its own, the latents that each exit step begins from and those that each clean pass reads, is
known by then, and so is the derivative of the loss in each chunk. The second time is teacher forcing on the rollout's
own chunks: a later chunk's loss reaches the weights through the keys and values that earlier chunks wrote, over as many
windows as the rollout has (Self Gradient Forcing, arXiv 2607.20368). Latents are constants to one another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import flow_to_x0
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.sampling.rollout import RolloutTrace
from sparse_forcing.training.recipes.teacher_forcing import flow_through_memory


def replay(
    model: CausalWanTransformer3DModel,
    memory: MemoryConfig,
    trace: RolloutTrace,
    text: Tensor,
    gradient: Tensor,
    timestep: Tensor,
    sigma: Tensor,
    distilled: frozenset[int] = frozenset(),
) -> tuple[Tensor, Tensor]:
    """Take the exit steps of a rollout again.

    Args:
        trace: of the rollout; text: [B, T, text_dim] that it followed.
        gradient: [B, F, C, H, W] derivative of a loss in the rollout's chunks.
        timestep, sigma: scalars, of the exit step.
        distilled: layers whose block selector's loss is taken.

    Returns:
        a zero whose derivative in the weights is that of the loss, and the mean of the selectors' losses.
    """
    noisy, clean = torch.cat(trace.exits, 1), torch.cat(trace.contexts, 1)
    chunks = [part.shape[1] for part in trace.exits]
    batch, frames = noisy.shape[:2]
    flow, losses = flow_through_memory(
        model,
        memory,
        noisy,
        clean,
        timestep.expand(batch, frames),
        text,
        chunks,
        cache_gradient="clean",
        distilled=distilled,
    )
    passed_on = (flow_to_x0(flow, noisy, sigma.expand(batch)) * gradient).sum()
    return passed_on - passed_on.detach(), torch.stack(losses).mean() if losses else noisy.new_zeros(())
