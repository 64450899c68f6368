"""The parts of a pipeline as diffusers keeps them, so that what diffusers does with parts works: offloading, device
maps, quantization, adapters, sharing. Loading verifies hashes and tensors first and runs no code of a model's folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.utils import logging
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from sparse_forcing.devices import explain_memory_shortage
from sparse_forcing.errors import ConfigError
from sparse_forcing.files import atomic_write_json, check_writable, explain_full_disk
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.geometry import VideoGeometry
from sparse_forcing.model.small.quantized import Storage, check_storage, is_quantized, quantize_
from sparse_forcing.model.small.tiny_decoder import DecodedByTiny, TinyDecoder
from sparse_forcing.model.text import WAN_TEXT_LEN, TextEncoder, UMT5TextEncoder, WordTextEncoder
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import VideoAutoencoder, WanAutoencoder
from sparse_forcing.model_folder.defaults import PipelineConfig
from sparse_forcing.model_folder.fit import check_fit
from sparse_forcing.model_folder.folder import (
    find_model,
    finish_transformer,
    forget_origin,
    identify_autoencoder,
    read_defaults,
)
from sparse_forcing.model_folder.recognise import PIPELINE_FILE
from sparse_forcing.sampling.arguments import check_type, prompt_list, resolve_dtypes
from sparse_forcing.sampling.loading import (
    check_components,
    component_dtypes,
    component_index,
    left_out,
    load_component_tokenizer,
)
from sparse_forcing.sampling.texts import KnownTexts, read_first, release_memory
from sparse_forcing.weights.manifest import model_hash, write_manifest
from sparse_forcing.weights.parts import explain_read_errors, unknown_settings_unsaid

MODELS = ("transformer", "text_encoder", "vae")
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
_CODE = ("trust_remote_code", "custom_pipeline", "custom_revision", "use_onnx", "use_flashpack")


class PipelineComponents(DiffusionPipeline, WanLoraLoaderMixin):
    """A transformer, its text encoder and its autoencoder, bound to a geometry and defaults.

    Args:
        text_encoder, tokenizer: umT5's of transformers, or an embedded model's encoder, which has its own tokenizer.
        vae: diffusers' AutoencoderKLWan, or an embedded model's.
        defaults: what a prompt alone means.
        weights_sha256: hash of the folder that the parts are from.
        scheduler: one of diffusers that predicts flows, to sample every chunk with; the defaults' sampler when None.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer", "scheduler"]

    def __init__(
        self,
        transformer: CausalWanTransformer3DModel,
        text_encoder: nn.Module | None,
        vae: nn.Module,
        defaults: PipelineConfig | None = None,
        weights_sha256: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        scheduler: SchedulerMixin | None = None,
    ) -> None:
        super().__init__()
        own = getattr(text_encoder, "tokenizer", None)
        self.register_modules(
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer or (own if isinstance(own, PreTrainedTokenizerBase) else None),
            vae=vae,
            scheduler=scheduler,
        )
        self._wan: WanAutoencoder | None = None
        self.known_texts = KnownTexts()
        self.tiny_decoder: TinyDecoder | None = None
        self.defaults = defaults or self._plain_defaults()
        self.weights_sha256 = weights_sha256
        self.geometry = self.defaults.fit_geometry(VideoGeometry.of(self.autoencoder, transformer.config))

    def with_defaults(self, defaults: PipelineConfig) -> Any:
        """The same parts with other defaults."""
        pipe = type(self)(**self.components, defaults=defaults, weights_sha256=self.weights_sha256)
        pipe.known_texts, pipe.tiny_decoder = self.known_texts, self.tiny_decoder
        return pipe

    def _plain_defaults(self) -> PipelineConfig:
        """Wan's defaults, for these kinds of parts."""
        words, wan = isinstance(self.text_encoder, WordTextEncoder), isinstance(self.autoencoder, WanAutoencoder)
        return PipelineConfig(
            text_encoder="words" if words else "umt5", vae="wan" if wan else identify_autoencoder(self.autoencoder)
        )

    @property
    def autoencoder(self) -> VideoAutoencoder:
        """The `vae` as this project uses it: latents normalised, decoded as they come."""
        if hasattr(self.vae, "decode_stream"):
            return cast("VideoAutoencoder", self.vae)
        if self._wan is None or self._wan.vae is not self.vae:
            self._wan = WanAutoencoder(self.vae)
        return self._wan if self.tiny_decoder is None else DecodedByTiny(self._wan, self.tiny_decoder)

    def use_tiny_decoder(self, file: str | Path | None) -> None:
        """Decode with a TAEHV file (`taew2_1`) from now on, or with the `vae` again. Raises WeightsError, and
        ConfigError for a model of other latents than Wan's."""
        if file is not None and not isinstance(self.autoencoder, WanAutoencoder | DecodedByTiny):
            raise ConfigError("use_tiny_decoder: decodes Wan's latents; this model has an autoencoder of its own")
        self.tiny_decoder = None if file is None else TinyDecoder.from_file(Path(file))

    @property
    def text(self) -> TextEncoder:
        """The `text_encoder` and `tokenizer` as this project uses them: from prompts to embeddings."""
        if hasattr(self.text_encoder, "encode"):
            return cast("TextEncoder", self.text_encoder)
        if self.text_encoder is None or self.tokenizer is None:
            raise ConfigError("prompt: this pipeline has no text_encoder and tokenizer; give prompt_embeds")
        return UMT5TextEncoder(self.text_encoder, self.tokenizer)

    @property
    def text_len(self) -> int | None:
        """Tokens of a prompt after padding; None for an embedded model without its text encoder, which alone knows."""
        unknown = self.text_encoder is None and self.defaults.text_encoder == "words"
        return None if unknown else getattr(self.text_encoder, "text_len", WAN_TEXT_LEN)

    @property
    def fps(self) -> float:
        """Frames per second of the model's videos."""
        return self.defaults.fps

    @property
    def default_memory(self) -> MemoryConfig:
        """The memory that a prompt alone means."""
        return self.defaults.memory

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return self.transformer.dtype

    @property
    def _small(self) -> list[str]:
        """Parts that are too small to be taken apart: they stay where the others compute."""
        return [name for name in MODELS if not getattr(getattr(self, name), "_supports_group_offloading", True)]

    def to(self, *args: Any, text_encoder_device: str | torch.device | None = None, **kwargs: Any) -> Any:
        """Move the model, change its type, or both, as in diffusers; the text encoder elsewhere if it would take too
        much memory there (umT5 is four times as large as Wan 2.1 1.3B)."""
        with explain_memory_shortage(f"the model was moved to {', '.join(map(str, (*args, *kwargs.values())))}"):
            if text_encoder_device is None:
                return super().to(*args, **kwargs)
            for name in MODELS:
                where = (text_encoder_device, *args[1:]) if name == "text_encoder" else args
                if (part := getattr(self, name)) is not None:
                    part.to(*where, **kwargs)
        return self

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Offload module by module, as in diffusers; small parts are moved as a whole, and stay."""
        self._exclude_from_cpu_offload = self._small
        with self._without_selectors() as selectors:
            super().enable_sequential_cpu_offload(*args, **kwargs)
        selectors.to(self._offload_device)

    def enable_group_offload(
        self, onload_device: torch.device, *args: Any, exclude_modules: str | list[str] | None = None, **kwargs: Any
    ) -> None:
        """Offload groups of layers, as in diffusers; small parts are moved as a whole, and stay."""
        given = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        with self._without_selectors() as selectors:
            super().enable_group_offload(onload_device, *args, exclude_modules=[*given, *self._small], **kwargs)
        selectors.to(onload_device)

    @contextmanager
    def _without_selectors(self) -> Iterator[nn.ModuleList]:
        """The transformer as far as its modules are called: memories read the weights of learned block selectors, which
        no hook would see."""
        blocks: list[Any] = [block for block in self.transformer.blocks if getattr(block, "selector", None)]
        selectors = nn.ModuleList(block.selector for block in blocks)
        for block in blocks:
            block.selector = None
        try:
            yield selectors
        finally:
            for block, selector in zip(blocks, selectors):
                block.selector = selector

    @classmethod
    def load_config(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:
        """What diffusers loads each part of a folder as; for the defaults' kinds, whatever `model_index.json` names."""
        return component_index(Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        torch_dtype: Any = None,
        text_encoder: nn.Module | None = None,
        prompts: str | Sequence[str] | None = None,
        prompt_cache: Path | None = None,
        text_encoder_device: str | torch.device = "cpu",
        weights: Storage | None = None,
        **options: Any,
    ) -> Any:
        """Load an embedded model by name, a folder that `save_pretrained` wrote, a diffusers Wan folder, or a model of
        the hub (or its local cache) by its id.

        Args:
            torch_dtype: type of the weights, also by name ("bfloat16") or by part ({"vae": ..., "default": ...}); as
                they are stored when None (an embedded model's: float32).
            text_encoder: takes the place of the folder's own, which is then not loaded.
            prompts: all that will be asked for. umT5 reads them, and the default negative prompt, on
                `text_encoder_device` and is gone before the other parts are loaded. None: it stays.
            prompt_cache: folder that keeps what they were read as; a prompt that is in it needs no umT5.
            weights: "int8" or "fp8": the linear layers of the folder's transformer and umT5 are stored in 8 bits, once
                they are loaded and before anything is moved.
            options: diffusers' own: other parts, `variant`, `device_map`, `quantization_config`, `revision`, ...

        Raises:
            WeightsError: unknown model, missing or damaged file, parts that do not fit together.
            ConfigError: an option that would run code of the model's folder or unpickle its weights, or has no effect.
            SparseForcingError: out of memory.
        """
        _refuse_code(options)
        storage = check_storage("weights", weights)
        _check_given(options, storage, text_encoder, prompts, prompt_cache)
        dtype = resolve_dtypes(options.pop("dtype", torch_dtype))
        folder = find_model(str(model), **{name: options.pop(name) for name in HUB_OPTIONS if name in options})
        given = {name for name in (*MODELS, "tokenizer") if options.get(name) is not None} | left_out(folder)
        given |= {"text_encoder", "tokenizer"} if text_encoder is not None else set()
        with explain_memory_shortage(f"model {model} was loaded"):
            with explain_read_errors(folder):
                digest = model_hash(folder)
            texts, types = None, component_dtypes(folder, dtype)
            if prompts is not None and text_encoder is None:
                how = types["text_encoder"], text_encoder_device, prompt_cache, storage
                with _quiet():
                    texts = read_first(folder, prompt_list(prompts, "prompts"), *how)
                given |= set() if texts is None else {"text_encoder"}
            with explain_read_errors(folder), _quiet():
                check_components(folder, given)
                pipe = super().from_pretrained(
                    str(folder),
                    dtype=types,
                    use_safetensors=True,
                    defaults=read_defaults(folder),
                    weights_sha256=digest,
                    **options | ({"text_encoder": None} if "text_encoder" in given else {}),
                )
            pipe._complete(folder, given, text_encoder, texts)
            pipe._quantize(storage, given)
        return pipe

    def _complete(
        self, folder: Path, given: Collection[str], text_encoder: nn.Module | None, texts: KnownTexts | None
    ) -> None:
        """What diffusers does not load: the rest of the transformer, tokenizers; then check that the parts fit."""
        if "transformer" not in given:
            finish_transformer(self.transformer, folder)
        if text_encoder is not None:  # of any kind
            self.register_modules(text_encoder=text_encoder)
        elif "tokenizer" not in given and (tokenizer := load_component_tokenizer(folder, self.text_encoder)):
            self.register_modules(tokenizer=tokenizer)
        text = texts or (None if "text_encoder" in given else self.text)
        check_fit(folder, self.transformer, None if text is None else text.dim, self.autoencoder)
        self.known_texts = texts or self.known_texts

    def _quantize(self, storage: Storage | None, given: Collection[str]) -> None:
        """Store the linear layers of what is not `given` in 8 bits, where that is asked for."""
        if storage is None:
            return
        if "transformer" not in given:
            quantize_(self.transformer, storage)
        if "text_encoder" not in given and isinstance(self.text, UMT5TextEncoder):
            quantize_(self.text_encoder, storage)

    def save_pretrained(self, folder: str | Path, safe_serialization: bool = True, **options: Any) -> None:
        """Write a folder that `from_pretrained` loads, hashes included.

        Args:
            options: those of diffusers' pipelines, `variant` and `max_shard_size` for example.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization: weights are written as safetensors only; pickles can hold code")
        if any(is_quantized(getattr(self, name)) for name in MODELS):
            raise ConfigError(
                "save_pretrained: weights in 8 bits are made when a model is loaded; save it without them"
            )
        if options.pop("push_to_hub", False):
            raise ConfigError("push_to_hub: call pipe.push_to_hub(name), which uploads the hashes, too")
        folder = check_writable(folder, folder=True)
        self.register_modules(**self.components)  # diffusers does not note the class of what was None before
        with explain_full_disk(folder):
            super().save_pretrained(folder, **options)
        for path in (folder / "model_index.json", *folder.glob("*/*config.json")):
            forget_origin(path)
        atomic_write_json(folder / PIPELINE_FILE, asdict(self.defaults))
        write_manifest(folder)

    @classmethod
    def lora_state_dict(cls, source: Any, **options: Any) -> Any:
        """As in diffusers, without unpickling: adapters are read from safetensors."""
        if not options.get("use_safetensors", True):
            raise ConfigError("use_safetensors: adapters are read from safetensors only; pickles can hold code")
        return super().lora_state_dict(source, **options | {"use_safetensors": True})

    def prompt_remarks(self, prompts: list[str]) -> list[str]:
        """What of the prompts has no effect, or not the one meant: unknown words, or more than the encoder reads."""
        return self.text.remarks(prompts)

    @torch.no_grad()
    def encode_prompt(self, prompts: str | list[str]) -> Tensor:
        """[B, text_len, dim]; warns with `prompt_remarks`. What umT5 read before is not read again."""
        prompts = prompt_list(prompts)
        with explain_memory_shortage("the text encoder read the prompt"):
            encoder = None if self.text_encoder is None and self.known_texts.dim else self.text
            if encoder is not None and not isinstance(encoder, UMT5TextEncoder):
                return encoder.encode(prompts)
            return self.known_texts.read(prompts, encoder).to(self._execution_device)

    def free_text_encoder(self, prompts: str | Sequence[str] = ()) -> None:
        """Read `prompts` and the default negative prompt, and let the text encoder go: from then on no others can be
        asked for. Raises ConfigError for an embedded model's, which is small."""
        if not isinstance(encoder := self.text, UMT5TextEncoder):
            raise ConfigError("free_text_encoder: an embedded model's text encoder is a few megabytes; it stays")
        given = [] if prompts in ((), []) else prompt_list(prompts, "prompts")
        prompts = [*given, self.defaults.negative_prompt]
        self.known_texts.limit = None
        with torch.no_grad(), explain_memory_shortage("the text encoder read the prompts"):
            self.known_texts.learn(prompts, encoder)
        del encoder
        self.register_modules(text_encoder=None)
        self.maybe_free_model_hooks()  # which hold the parts that they move
        release_memory()


def _refuse_code(options: dict[str, Any]) -> None:
    """Raise ConfigError for options that would run a model's code or unpickle its weights."""
    if found := [name for name in _CODE if options.get(name)]:
        raise ConfigError(f"{found[0]}: code that comes with a model is never run")
    if not options.pop("use_safetensors", True):
        raise ConfigError("use_safetensors: weights are read from safetensors only; pickles can hold code")


def _check_given(options: Mapping[str, Any], storage: Any, text_encoder: Any, prompts: Any, cache: Any) -> None:
    """Raise ConfigError for what is of another type, or would have no effect."""
    if text_encoder is not None:
        check_type("text_encoder", text_encoder, nn.Module)
    if prompts is not None:
        prompt_list(prompts, "prompts")
    if storage and options.get("quantization_config") is not None:
        raise ConfigError("weights: quantization_config says how weights are stored; give one of the two")
    if cache is not None and (prompts is None or text_encoder is not None):
        raise ConfigError("prompt_cache keeps what a folder's own text encoder reads `prompts` as; give `prompts`")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of parts that are loaded, which are short, and no reports of what they do not use, which a
    folder's remarks say in a line."""
    shown: list[Any] = [each for each in (logging, transformers_logging) if each.is_progress_bar_enabled()]
    level = transformers_logging.get_verbosity()
    for each in shown:
        each.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with unknown_settings_unsaid():
            yield
    finally:
        transformers_logging.set_verbosity(level)
        for each in shown:
            each.enable_progress_bar()
