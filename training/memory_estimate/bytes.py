"""What the parts of a training hold: numbers of parameters, bytes of a pass's graph and of a rollout's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_forcing.memory import MemoryConfig, MemoryGeometry
from sparse_forcing.memory.sparse_pool import SlotPlan
from sparse_forcing.memory.sparse_training import HISTORY_POOLS
from sparse_forcing.model.attention import dense_attention
from sparse_forcing.model.rope import Rotary
from sparse_forcing.model.transformer import CausalWanBlock
from sparse_forcing.model_folder.sizes import on_meta
from sparse_forcing.training.engine.lora import LoraConfig


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one micro-batch computes.

    Args:
        frames: latent frames that carry gradients at the same time; rows, cols: tokens of each.
        context_frames: clean frames that carry gradients beside them (teacher forcing).
        memory: memory of a rollout, chunk by chunk; None when all frames are computed at once.
        cache_gradient: gradient of that memory, as in sparse_forcing.memory.
        windows: latent frames of each window of a rollout that goes on after a backward pass; one of `frames` if empty.
        text_len: tokens of a prompt.
        number_bytes: size of a number in computation.
    """

    frames: int
    rows: int
    cols: int
    context_frames: int = 0
    memory: MemoryConfig | None = None
    cache_gradient: str = "detached"
    windows: tuple[int, ...] = ()
    micro_batch: int = 1
    text_len: int = 512
    number_bytes: int = 2
    checkpointing: bool = True

    @property
    def tokens_per_frame(self) -> int:
        return self.rows * self.cols


def parameter_count(config: dict[str, Any]) -> int:
    """Parameters of a transformer config, counted on meta tensors."""
    return sum(p.numel() for p in on_meta(config).parameters())


def count_trained(config: dict[str, Any], lora: LoraConfig | None) -> int:
    """Parameters of a network that train: all, or those of its adapters and selectors."""
    if lora is None:
        return parameter_count(config)
    selectors = sum(p.numel() for name, p in on_meta(config).named_parameters() if ".selector." in name)
    return lora.parameter_count(on_meta(config)) + selectors


class _Dense:
    """Self-attention to all tokens of the pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dense_attention(query, key, value)


def saved_bytes(
    config: dict[str, Any], tokens: int, text_tokens: int, batch: int, number_bytes: int, *, frozen: bool = False
) -> int:
    """Bytes that autograd saves of one block's forward pass, inputs and parameters not counted.

    The block runs on fake tensors, in this machine's arithmetic for a CPU (where attention computes in float32). A
    frozen one passes gradients on to its tokens alone.
    """
    sizes = on_meta(config).config
    dim = sizes.num_attention_heads * sizes.attention_head_dim
    half = number_bytes == 2
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved.setdefault(x.untyped_storage()._cdata, x)
        return x

    with FakeTensorMode():
        block = CausalWanBlock(dim, sizes.ffn_dim, sizes.num_attention_heads, sizes.cross_attn_norm, sizes.eps, None)
        block.requires_grad_(not frozen)
        x = torch.zeros(batch, tokens, dim, dtype=torch.bfloat16 if half else torch.float32, requires_grad=True)
        modulation = torch.zeros(batch, 1, 6, dim, requires_grad=not frozen)
        text = torch.zeros(batch, text_tokens, dim, requires_grad=not frozen)
        rotary = Rotary(*(torch.zeros(tokens, sizes.attention_head_dim // 2) for _ in range(2)))
        given = {y.untyped_storage()._cdata for y in (x, modulation, text, *rotary, *block.parameters())}
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y),
            torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False),
        ):
            block(x, modulation, text, rotary, _Dense(), 0)
        return sum(y.untyped_storage().nbytes() for key, y in saved.items() if key not in given)


def graph_bytes(config: dict[str, Any], work: Work, *, frozen: bool = False) -> tuple[int, int]:
    """(bytes that a pass leaves for its backward pass, bytes that computing one of its blocks again then adds)."""
    sizes = on_meta(config).config
    dim = sizes.num_attention_heads * sizes.attention_head_dim
    tokens = (work.frames + work.context_frames) * work.tokens_per_frame
    block = saved_bytes(config, tokens, work.text_len, work.micro_batch, work.number_bytes, frozen=frozen)
    if not work.checkpointing:
        return sizes.num_layers * block, 0
    return sizes.num_layers * work.micro_batch * tokens * dim * work.number_bytes, block


def activation_bytes(config: dict[str, Any], work: Work) -> int:
    """Bytes of activations when a backward pass begins: all blocks', or (checkpointed) one's and every one's input."""
    return sum(graph_bytes(config, work))


def cache_bytes(config: dict[str, Any], work: Work) -> int:
    """Bytes of keys and values that a training rollout holds, those that only its graphs still need included."""
    if work.memory is None:
        return 0
    sizes = on_meta(config).config
    if work.memory.kind == "sparse":
        tokens = _sparse_tokens(work.memory, work, sizes.chunk_frames, sizes.num_layers)
    else:
        tokens = sizes.num_layers * _dense_tokens(work.memory, work, sizes.chunk_frames)
    per_token = 2 * sizes.num_attention_heads * sizes.attention_head_dim * work.number_bytes
    return work.micro_batch * per_token * tokens


def _dense_tokens(memory: MemoryConfig, work: Work, chunk_frames: int) -> int:
    """Dense memories are written out of place: each chunk's pass with gradients holds the cache it read."""
    begin = most = 0
    for frames in work.windows or (work.frames,):
        ends = range(begin + chunk_frames, begin + frames + 1, chunk_frames)
        extra = memory.persistent_tokens if memory.kind == "heavy_hitter" else 0
        kept = [min(end, memory.window or end) * work.tokens_per_frame for end in ends]
        most = max(most, sum(min(tokens + extra, end * work.tokens_per_frame) for tokens, end in zip(kept, ends)))
        begin += frames
    return most


def _sparse_tokens(memory: MemoryConfig, work: Work, chunk_frames: int, layers: int) -> int:
    """Finished chunks are kept once; every pass makes a pool of blocks of them, for one layer at a time, its backward
    pass one more (after the pass itself, with checkpointing) and its gradients. Where gradients go through the cache,
    each pass keeps a pool of its own instead, and with checkpointing there is that of the pass computed again."""
    geometry = MemoryGeometry(
        rows=work.rows, cols=work.cols, num_layers=0, chunk_frames=chunk_frames, horizon_frames=work.frames
    )
    sizes = SlotPlan(memory, geometry)
    at_once = (2 + work.checkpointing) * sizes.num_slots
    if work.cache_gradient == "detached":
        windows = [frames // chunk_frames for frames in work.windows or (work.frames,)]
        blocks = history_blocks(windows, sizes.layout.num_blocks, sizes.num_slots)
    else:
        passes = (work.frames + work.context_frames) // chunk_frames
        if work.cache_gradient == "clean":
            passes -= 1  # fits what was measured: one pass's pool fewer than there are passes
        merged = 2 if work.cache_gradient == "straight_through" else 0  # what clean passes leave, and its gradients
        pools = passes + merged + work.checkpointing
        blocks, at_once = pools * sizes.num_slots, 3 * sizes.num_slots
    return (layers * blocks + at_once) * sizes.layout.block_tokens


def history_blocks(windows: Sequence[int], chunk_blocks: int, slots: int) -> int:
    """Most blocks of finished chunks that live at once: those of the history, and those it has replaced by a copy of
    the pool but that passes of the same window still need.

    Args:
        windows: chunks of each window; chunk_blocks: blocks of a chunk; slots: blocks of the pool.
    """
    history = most = 0
    for chunks in windows:
        replaced = 0
        for _ in range(chunks):
            if history + chunk_blocks > HISTORY_POOLS * slots:
                history, replaced = slots, replaced + history
            else:
                history += chunk_blocks
            most = max(most, history + replaced)
    return most
