"""What a model folder says and nothing here uses: settings, parts and files, a line for each place that says it.

Whatever is passed over in silence may be what makes a video other than its makers meant it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparse_forcing.config import constructor_settings
from sparse_forcing.model.flow import NUM_TRAIN_TIMESTEPS, UNIPC
from sparse_forcing.model.text import WAN_TEXT_LEN, WordTextEncoder
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import PatchAutoencoder, TokenAutoencoder
from sparse_forcing.model_folder.recognise import (
    CAUSAL,
    CHUNK,
    INDEX,
    PIPELINE_FILE,
    PLAIN,
    SCHEDULER,
    SCHEDULERS,
    SELECTOR,
    SELF_FORCING_SCHEDULER,
    TRANSFORMER,
    WINDOW,
    is_part,
    read_table,
)
from sparse_forcing.weights.manifest import MANIFEST, unknown_entries

_PARTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler", "adapter")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
_SHOWN = 8  # settings in a line
_OURS = "SparseForcingPipeline"
_CLASSES = {
    "_class_name": ("WanPipeline", _OURS),
    "transformer": (PLAIN, CAUSAL),
    "text_encoder": ("UMT5EncoderModel", "WordTextEncoder"),
    "vae": ("AutoencoderKLWan", "PatchAutoencoder", "TokenAutoencoder"),
}
"""Of what is loaded, whatever `model_index.json` calls it; of the other parts the configs are looked at."""
_POSITIONS = "rope_max_seq_len"
_QUANTIZED = "quantization_config"  # diffusers and transformers act on it
_UMT5 = {"torch_dtype", "tokenizer_class", "output_past", "scalable_attention", "name_or_path", _QUANTIZED}
"""What configs of umT5 hold beside transformers' own settings: notes, and a property that every umT5 has."""
_TOKENIZER = {
    "added_tokens_decoder", "additional_special_tokens", "auto_map", "backend", "bos_token",
    "clean_up_tokenization_spaces", "cls_token", "eos_token", "extra_ids", "extra_special_tokens", "is_local",
    "legacy", "local_files_only", "mask_token", "max_length", "model_max_length", "model_specific_special_tokens",
    "name_or_path", "pad_token", "padding_side", "processor_class", "sep_token", "sp_model_kwargs",
    "spaces_between_special_tokens", "special_tokens_map_file", "split_special_tokens", "text_len", "tokenizer_class",
    "tokenizer_file", "truncation_side", "unk_token", "use_fast", "vocabulary",
}  # fmt: skip
"""What tokenizers are told; nothing of it is left out by transformers but what the checks below say."""
_SELF_FORCING = {
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS, "sigma_min": 0.0, "sigma_max": 1.0, "extra_one_step": True,
}  # fmt: skip
"""How Self-Forcing's table of noise levels is made here."""


def folder_remarks(folder: Path) -> list[str]:
    """What a folder says that nothing here uses, a line for each file or kind of part."""
    return [f"{folder / place}: {remark}" for place, remark in _remarks(folder)]


def _remarks(folder: Path) -> Iterator[tuple[str | Path, str]]:
    yield from _transformer(folder)
    if strange := unknown_entries(folder):
        yield MANIFEST, f"not used: {', '.join(strange[:_SHOWN])}"
    yield from _other_parts(folder)
    yield from _index(folder)
    yield from _scheduler(folder)
    yield from _autoencoder(folder)
    yield from _text(folder)


def _parameters(kind: Any) -> dict[str, Any]:
    """A class's settings and their defaults."""
    return {name: each.default for name, each in inspect.signature(kind.__init__).parameters.items() if name != "self"}


def _unknown(folder: Path, place: str | Path, known: set[str]) -> Iterator[tuple[str | Path, str]]:
    """The settings of a config that are not `known`."""
    if strange := sorted(constructor_settings(read_table(folder / place)).keys() - known):
        yield place, f"not used: {', '.join(strange)}"


def _transformer(folder: Path) -> Iterator[tuple[str | Path, str]]:
    """Window and chunk are read of causal weights that nothing else says how to sample, a sink beside a window; -1, 0
    mean none anyway."""
    config, ours = read_table(folder / TRANSFORMER), _parameters(CausalWanTransformer3DModel)
    said = {name for name in (*WINDOW, *CHUNK) if config.get(name) in (None, 0, -1)}
    if not (folder / PIPELINE_FILE).is_file() and config.get("_class_name") != PLAIN and not config.get(SELECTOR):
        said |= {*CHUNK, WINDOW[0]} | ({WINDOW[1]} if WINDOW[0] not in said else set())
    yield from _unknown(folder, TRANSFORMER, {*ours, *said, _QUANTIZED})
    if config.get(_POSITIONS, ours[_POSITIONS]) != ours[_POSITIONS]:
        yield TRANSFORMER, f"not used: {_POSITIONS}={config[_POSITIONS]!s:.40}, positions are computed for any length"


def _differing(settings: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The settings that are not as this project has them, in words: the first few."""
    other = [
        f"{name}={value!s:.40}"
        for name, value in constructor_settings(settings).items()
        if name not in ours or ours[name] != value
    ]
    return ", ".join(other[:_SHOWN]) + (f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else "")


def _other_parts(folder: Path) -> Iterator[tuple[str | Path, str]]:
    content = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    if others := [path.name for path in content if path.is_dir() and path.name not in _PARTS]:
        yield "", f"parts that are not used: {', '.join(others)}"
    if files := [path.name for path in content if path.is_file() and path.suffix in _WEIGHTS]:
        yield "", f"weights that are not used: {', '.join(files)}"


def _index(folder: Path) -> Iterator[tuple[str | Path, str]]:
    """Parts and settings of `model_index.json` that no pipeline here has, and classes that are not those loaded."""
    strange = []
    for name, entry in read_table(folder / INDEX).items():
        says = is_part(entry) if isinstance(entry, list) else bool(entry)
        kind = entry[-1] if says and isinstance(entry, list) else entry
        known = kind in _CLASSES[name] if name in _CLASSES else name in _PARTS or name.startswith("_")
        if says and not known:
            strange.append(f"{name}={kind!s:.40}")
    if strange:
        yield INDEX, f"not used: {', '.join(strange)}"


def _scheduler(folder: Path) -> Iterator[tuple[str | Path, str]]:
    """What of the scheduler's config is not how videos are sampled."""
    scheduler, kind = read_table(folder / SCHEDULER), read_table(folder / SCHEDULER).get("_class_name")
    plain = read_table(folder / TRANSFORMER).get("_class_name") == PLAIN
    if kind is None or read_table(folder / INDEX).get("_class_name") == _OURS:
        return
    if (folder / PIPELINE_FILE).is_file():
        yield SCHEDULER, f"not used, {PIPELINE_FILE} says how videos are sampled"
    elif not plain and kind == SELF_FORCING_SCHEDULER:
        if other := _differing(scheduler, {**_SELF_FORCING, "shift": scheduler.get("shift")}):
            yield SCHEDULER, f"not used: {other}"
    elif not plain:
        yield SCHEDULER, "not used, causal weights are sampled in a few steps (see --sampler)"
    elif kind not in SCHEDULERS:
        yield SCHEDULER, f"{kind!s:.60} is not known; UniPC is used in its place (see --sampler, --shift)"
    else:
        import diffusers

        unipc = kind == "UniPCMultistepScheduler"
        ours = _parameters(getattr(diffusers, kind)) | (UNIPC if unipc else {})
        shift = SCHEDULERS[kind]
        if other := _differing(scheduler, {**ours, shift: scheduler.get(shift)}):
            yield SCHEDULER, f"not used: {other}"


def _autoencoder(folder: Path) -> Iterator[tuple[str | Path, str]]:
    from diffusers import AutoencoderKLWan

    place = Path("vae/config.json")
    kinds: dict[str, Any] = {each.__name__: each for each in (AutoencoderKLWan, PatchAutoencoder, TokenAutoencoder)}
    name = read_table(folder / place).get("_class_name", AutoencoderKLWan.__name__)
    if name not in kinds:
        yield place, f"not used: _class_name={name!s:.40}, it is read as {AutoencoderKLWan.__name__}"
    yield from _unknown(folder, place, {*_parameters(kinds.get(name, AutoencoderKLWan)), _QUANTIZED})


def _text(folder: Path) -> Iterator[tuple[str | Path, str]]:
    """Of the text encoder and the tokenizer."""
    place, tokenizer = Path("text_encoder/config.json"), Path("tokenizer/tokenizer_config.json")
    config = read_table(folder / place)
    if config.get("_class_name") == WordTextEncoder.__name__:
        yield from _unknown(folder, place, {*_parameters(WordTextEncoder)})
    elif config:
        from transformers import UMT5Config

        yield from _unknown(folder, place, {*UMT5Config().to_dict(), *_UMT5})
        if (kind := config.get("model_type", UMT5Config.model_type)) != UMT5Config.model_type:
            yield place, f"not used: model_type={kind!s:.40}, it is read as {UMT5Config.model_type}"
    yield from _unknown(folder, tokenizer, _TOKENIZER)
    settings = read_table(folder / tokenizer)
    longest = settings.get("model_max_length")
    if type(longest) is int and longest < WAN_TEXT_LEN and config.get("_class_name") != WordTextEncoder.__name__:
        yield tokenizer, f"not used: model_max_length={longest}, prompts have up to {WAN_TEXT_LEN} tokens"
    if (kind := settings.get("tokenizer_class")) is not None and not _is_tokenizer(str(kind)):
        yield tokenizer, f"not used: tokenizer_class={kind!s:.40}, which transformers does not have"


def _is_tokenizer(name: str) -> bool:
    import transformers

    return name == "WordTokenizer" or any(hasattr(transformers, each) for each in (name, name.removesuffix("Fast")))
