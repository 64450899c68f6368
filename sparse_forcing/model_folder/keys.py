"""Names of the same tensors in Wan's checkpoints and in diffusers, translated exactly and strictly.

The two vocabularies differ in more than spelling: the norm before cross-attention is `norm3` in Wan and `norm2` in
diffusers. Self-Forcing wraps a state dict in others (`generator_ema`, `generator`, `critic`); training wrappers, DDP
and ComfyUI leave prefixes on every key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparse_forcing.errors import WeightsError

TOP_LEVEL = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
"""Outside the blocks: modules, whose `.weight` and `.bias` follow, and the head's modulation table."""

BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{wan}.{old}": f"{diffusers}.{new}"
        for wan, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for old, new in (
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"),
        )
    },
}  # fmt: skip
"""The same inside `blocks.N.`."""

_TABLES = ("modulation", "scale_shift_table")

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_PREFIXES = ("module.", "model.", "diffusion_model.")
SELF_FORCING_PARTS = ("generator_ema", "generator", "critic")
PREFERRED = ("generator_ema", "generator", "generator_lora", "model", "module", "state_dict")
HEAD_DIM = 128
_OTHER_MODELS = {
    "an image-to-video Wan": re.compile(r"img_emb\.|.*\.(k_img|v_img|norm_k_img|add_k_proj)\b|.*image_embedder"),
    "Wan VACE": re.compile(r"vace_"),
    "a scaled 8-bit file (take the 16-bit one)": re.compile(r"(.*\.scale_(weight|input)|scaled_fp8)$"),
}
"""Models that share most of Wan's names, by those that only they have."""


def strip_wrappers(key: str) -> str:
    """The key without what FSDP, DDP, checkpointing, compilation, Self-Forcing's wrapper and ComfyUI put before it."""
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    while prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None):
        key = key.removeprefix(prefix)
    return key


def _rename(key: str, top: Mapping[str, str], block: Mapping[str, str]) -> str | None:
    """Modules are renamed by table; a modulation table is a parameter of its own, listed like a module."""
    in_block = re.fullmatch(r"(blocks\.\d+\.)(.+)", key)
    prefix, rest = in_block.groups() if in_block else ("", key)
    table = block if in_block else top
    if rest in table:
        return prefix + table[rest] if rest.rpartition(".")[2] in _TABLES else None
    module, _, parameter = rest.rpartition(".")
    if module.rpartition(".")[2] in _TABLES or module not in table or parameter not in ("weight", "bias"):
        return None
    return f"{prefix}{table[module]}.{parameter}"


def wan_to_diffusers_key(key: str) -> str | None:
    """diffusers' name of a Wan parameter (wrappers stripped), None for a name that Wan does not have."""
    return _rename(key, TOP_LEVEL, BLOCK)


def diffusers_to_wan_key(key: str) -> str | None:
    """Wan's name of a diffusers parameter, None for a name that Wan does not have."""
    top, block = ({new: old for old, new in table.items()} for table in (TOP_LEVEL, BLOCK))
    return _rename(key, top, block)


def to_diffusers(state: Mapping[str, Tensor], *, source: str = "weights") -> dict[str, Tensor]:
    """Rename a whole Wan or Self-Forcing state dict; one that has diffusers keys already only loses its wrappers.

    Raises:
        WeightsError: names of neither vocabulary, or two names that become one.
    """
    stripped = [(strip_wrappers(key), tensor) for key, tensor in state.items()]
    for other, names in _OTHER_MODELS.items():
        if found := next((key for key, _ in stripped if names.match(key)), None):
            raise WeightsError(f"{source}: this is {other}, by {found}; only text-to-video Wan 2.1 runs here")
    if any(key.startswith(("condition_embedder.", "blocks.0.attn1.")) for key, _ in stripped):
        renamed: list[tuple[str, str | None, Tensor]] = [(key, key, tensor) for key, tensor in stripped]
    else:
        renamed = [(key, wan_to_diffusers_key(key), tensor) for key, tensor in stripped]
    unknown = [key for key, new, _ in renamed if new is None]
    if unknown:
        raise WeightsError(f"{source}: not Wan 2.1 text-to-video weights; {abbreviate('unknown', unknown)}")
    out = {new: tensor for _, new, tensor in renamed if new is not None}
    if len(out) != len(renamed):
        raise WeightsError(f"{source}: several tensors have the same name once prefixes are removed")
    return out


def to_wan(state: Mapping[str, Tensor], *, source: str = "weights") -> dict[str, Tensor]:
    """Rename a diffusers state dict to Wan's keys. Raises WeightsError on names Wan does not have."""
    renamed = {key: diffusers_to_wan_key(key) for key in state}
    unknown = [key for key, new in renamed.items() if new is None]
    if unknown:
        raise WeightsError(f"{source}: cannot be written as Wan weights; {abbreviate('unknown', unknown)}")
    return {str(renamed[key]): tensor for key, tensor in state.items()}


def abbreviate(label: str, names: list[str], show: int = 5) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - show} more" if len(names) > show else ""
    return f"{label}: {', '.join(names[:show])}{more}"


def list_parts(content: Any) -> list[str]:
    """Names of the state dicts in a checkpoint; none for one that is a single state dict itself."""
    return [str(name) for name, value in content.items() if isinstance(value, Mapping)]


def choose_part(content: Any, which: str | None = None) -> str | None:
    """Which state dict of a checkpoint `select_state` takes; None for one that is a single state dict itself."""
    parts = list_parts(content)
    return which or next((name for name in PREFERRED if name in parts), parts[0]) if parts else None


def select_state(content: Any, which: str | None = None, *, source: str = "weights") -> dict[str, Tensor]:
    """The state dict inside a checkpoint: `which` of its dicts, by default the averaged generator, then the generator.

    Raises:
        WeightsError: nothing of that name, or no tensors.
    """
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{source}: holds no table of tensors")
    parts = list_parts(content)
    if parts:
        if (chosen := choose_part(content, which)) not in parts:
            raise WeightsError(f"{source}: has no part {chosen!r}; it has {', '.join(parts)}")
        content = content[chosen]
    elif which is not None:
        raise WeightsError(f"{source}: is a single state dict, it has no part {which!r}")
    strange = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(f"{source}: {abbreviate('not tensors', strange)}")
    if unnamed := [repr(name) for name in content if not isinstance(name, str)]:
        raise WeightsError(f"{source}: {abbreviate('names of tensors that are no text', unnamed)}")
    return dict(content)


def infer_config(state: Mapping[str, Tensor], *, head_dim: int = HEAD_DIM, source: str = "weights") -> dict[str, Any]:
    """Transformer config from the shapes of a diffusers state dict. Raises WeightsError when they make no model."""
    try:
        dim, channels, *patch = state["patch_embedding.weight"].shape
        layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        config = {
            "patch_size": tuple(patch),
            "num_attention_heads": dim // head_dim,
            "attention_head_dim": head_dim,
            "in_channels": channels,
            "out_channels": state["proj_out.weight"].shape[0] // (patch[0] * patch[1] * patch[2]),
            "text_dim": state["condition_embedder.text_embedder.linear_1.weight"].shape[1],
            "freq_dim": state["condition_embedder.time_embedder.linear_1.weight"].shape[1],
            "ffn_dim": state["blocks.0.ffn.net.0.proj.weight"].shape[0],
            "num_layers": layers,
            "cross_attn_norm": "blocks.0.norm2.weight" in state,
        }
    except (KeyError, ValueError, IndexError, ArithmeticError) as error:
        raise WeightsError(f"{source}: does not fit the model; missing or misshapen: {error}") from error
    if layers > len(state):
        raise WeightsError(f"{source}: names block {layers - 1}, but holds {len(state)} tensors")
    if dim % head_dim:
        raise WeightsError(f"{source}: width {dim} is not a multiple of the head dimension {head_dim}; give --head-dim")
    return config
