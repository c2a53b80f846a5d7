"""From the recipe's `model:` section to a tokenizer, a configuration and a model ready for DeepSpeed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.errors import UserError
from ssgen_ds.modeling.gguf import convert_gguf

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ssgen_ds.config import AdapterConfig, ModelConfig, QuantizationConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Where transformers finds the model: `path` is a folder or a hub id."""

    path: str
    revision: str | None = None


def resolve_model_path(path: str, revision: str | None = None) -> ModelSource:
    """Hub id, folder, `*.gguf` file or `package:MODULE/file` -> what transformers loads. GGUF files are converted once.

    Raises:
        UserError: no such file or folder, or a folder that is no model (the message says what it is).
    """
    original = path
    if path.startswith("package:"):
        from ssgen_ds.data.paths import resolve_package_path

        path = resolve_package_path(path)
    if path.endswith(".gguf"):
        return ModelSource(str(convert_gguf(Path(path).expanduser())))
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return ModelSource(str(folder))
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"model.path: {original} is an adapter: name its base here, and it in model.adapter_path")
        raise UserError(f"model.path: {original} is no model folder: it has no config.json")
    if folder.is_absolute() or path.startswith(("./", "../", "~")) or path.count("/") > 1:
        raise UserError(f"model.path: {original}: no such file or folder")
    return ModelSource(path, revision)


def split_adapter(path: str) -> tuple[str, str | None]:
    """(base model, adapter folder) of an adapter folder; (path, None) of anything else.

    Raises:
        UserError: an adapter that does not name its base.
    """
    from ssgen_ds.modeling.adapters import read_adapter_config

    if not (Path(path) / "adapter_config.json").is_file() or (Path(path) / "config.json").is_file():
        return path, None
    base = read_adapter_config(path)["base_model_name_or_path"]
    if not base:
        raise UserError(f"{path}: adapter_config.json names no base_model_name_or_path")
    return base, path


@contextmanager
def _loading_errors(path: str) -> Iterator[None]:
    """What transformers says about a wrong path, revision or setting, as one message naming the field."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model.path: cannot load {path}: {error}") from error


def load_tokenizer(model_config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Where it has no pad token it pads with EOS: padding is masked, and EOS labels are kept.

    Raises:
        UserError: it cannot be loaded, or has no EOS, without which no answer could ever end.
    """
    from transformers import AutoTokenizer

    source = resolve_model_path(model_config.path, model_config.revision)
    with _loading_errors(model_config.path):
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=model_config.trust_remote_code
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer of {model_config.path} has no EOS token, so answers could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(model_config: ModelConfig) -> PreTrainedConfig:
    """The model's configuration, without its weights. Raises UserError when there is none."""
    from transformers import AutoConfig

    source = resolve_model_path(model_config.path, model_config.revision)
    with _loading_errors(model_config.path):
        return AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=model_config.trust_remote_code
        )


def resolve_dtype(model_config: ModelConfig, device: torch.device | str) -> torch.dtype:
    """The dtype to train in; `auto` is bfloat16 on an accelerator and float32 on a CPU."""
    import torch

    if model_config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[model_config.dtype]
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_model(
    model_config: ModelConfig,
    adapter_config: AdapterConfig,
    ds_config: dict[str, Any],
    *,
    device: torch.device | str,
    quantization: QuantizationConfig | None = None,
) -> PreTrainedModel:
    """The base model (`apply_adapter` adds the adapter), in eval mode, ready for `deepspeed.initialize`.

    Args:
        ds_config: the DeepSpeed configuration; at ZeRO stage 3 parameters are partitioned as they are read, and every
            rank must call this. An empty one loads a plain model.
        device: where a model that is not partitioned goes.
        quantization: of the Linear layers but the output head; None for none.

    Attention `auto` leaves the choice to transformers: SDPA where the model allows it, eager where not (Gemma 2).
    `use_cache` is off in the model's configuration; generation passes its own cache.

    Raises:
        UserError: no such model, or it does not support the attention asked for.
    """
    source = resolve_model_path(model_config.path, model_config.revision)
    kwargs: dict[str, Any] = {
        "dtype": resolve_dtype(model_config, device),
        "trust_remote_code": model_config.trust_remote_code,
        "attn_implementation": None if model_config.attention == "auto" else model_config.attention,
    }
    settings = None
    if quantization is not None and quantization.kind == "nf4":
        from ssgen_ds.modeling.nf4 import nf4_settings

        settings = nf4_settings(quantization.double, kwargs["dtype"])
    zero3 = bool(ds_config) and ds_config["zero_optimization"]["stage"] == 3
    with _loading_errors(model_config.path):
        if zero3:
            model = _load_zero3(model_config, source, ds_config, kwargs, settings)
        else:
            model = _load_whole(source, kwargs, settings, device).to(device)
    model.config.use_cache = False
    if model_config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if adapter_config.kind == "lora":
            model.enable_input_require_grads()  # a frozen embedding would otherwise give checkpoints nothing to follow
    set_leaf_modules(model)
    return model


def _load_whole(
    source: ModelSource,
    kwargs: dict[str, Any],
    settings: BitsAndBytesConfig | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    if settings is None:
        return AutoModelForCausalLM.from_pretrained(source.path, revision=source.revision, **kwargs)
    from ssgen_ds.modeling.nf4 import adopt

    model = AutoModelForCausalLM.from_pretrained(
        source.path, revision=source.revision, quantization_config=settings, device_map={"": device}, **kwargs
    )
    adopt(model)
    return model


def _load_zero3(
    model_config: ModelConfig,
    source: ModelSource,
    ds_config: dict[str, Any],
    kwargs: dict[str, Any],
    settings: BitsAndBytesConfig | None,
) -> PreTrainedModel:
    from transformers import GenerationConfig

    from ssgen_ds.modeling.zero3 import load_partitioned, transformers_partitions

    model = load_partitioned(load_config(model_config), source.path, source.revision, ds_config, settings, **kwargs)
    if model is None:
        if settings is not None:
            raise UserError(
                f"quantization.kind: {model_config.path} cannot be quantised shard by shard (its tensors do not match "
                "the model's); use ZeRO stage 2, where every rank holds the quantised base"
            )
        logger.info("%s: its tensors do not match the model's; loading through transformers", model_config.path)
        with transformers_partitions(ds_config):
            return _load_whole(source, kwargs)
    with suppress(OSError):  # a checkpoint need not have one; the model's configuration has given it its own
        model.generation_config = GenerationConfig.from_pretrained(source.path, revision=source.revision)
    return model


def set_leaf_modules(model: torch.nn.Module) -> list[str]:
    """Have ZeRO-3 fetch each mixture-of-experts block whole, and return the names of these blocks' classes.

    Which experts run differs between ranks; fetching them one by one would make the ranks' collectives differ, too.
    """
    blocks = {type(module) for module in model.modules() if "experts" in dict(module.named_children())}
    if blocks:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, list(blocks))
    return sorted(block.__name__ for block in blocks)
