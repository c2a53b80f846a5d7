"""From the recipe's `model:` section to a tokenizer, a configuration and a model ready for DeepSpeed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.distributed.device_errors import is_device_error
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.damaged_files import damaged_json, damaged_weights
from ssgen_ds.modeling.families import refuse_quantized
from ssgen_ds.modeling.fit import load_fitting
from ssgen_ds.modeling.model_path import ModelPath, resolve_model_path
from ssgen_ds.recipe.schema import DataConfig

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ssgen_ds.recipe.schema import AdapterConfig, ModelConfig, QuantizationConfig

logger = logging.getLogger(__name__)


@contextmanager
def _loading_errors(shown: str, folder: str, files: str = "") -> Iterator[None]:
    """What the libraries say about a wrong path, revision, setting or file, as one message naming the field.

    Args:
        shown: the model as the user calls it.
        folder: where it is; a damaged file in it is named.
        files: all that is read; then any error comes from what is in them.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_device_error(error):
            raise
        if problems := damaged_json(Path(folder)):
            raise UserError.from_list(f"model.path: cannot load {shown}", problems) from error
        if not isinstance(error, OSError | ValueError | ImportError):
            if not files:
                raise
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"model.path: cannot load {files} of {shown}, is it damaged? {what}") from error
        hint = ""
        if "trust_remote_code" in str(error):
            hint = (
                "\nThe model brings code of its own. Read it; if you trust it, set model.trust_remote_code=true to "
                "train, and give --trust-remote-code to the other commands"
            )
        raise UserError(f"model.path: cannot load {shown}: {error}{hint}") from error


def load_tokenizer(model_config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Where it has no pad token it pads with EOS: padding is masked, and EOS labels are kept.

    Raises:
        UserError: it cannot be loaded, or has no EOS, without which no answer could ever end.
    """
    from transformers import AutoTokenizer

    source = resolve_model_path(model_config.path, model_config.revision)
    with _loading_errors(model_config.path, source.path, "tokenizer.json or tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=model_config.trust_remote_code
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer of {model_config.path} has no EOS token, so answers could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(model_config: ModelConfig) -> PreTrainedConfig:
    """The model's configuration, without its weights.

    Raises:
        UserError: there is none, or the weights are already quantised.
    """
    from transformers import AutoConfig

    source = resolve_model_path(model_config.path, model_config.revision)
    with _loading_errors(model_config.path, source.path, "config.json"):
        config = AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=model_config.trust_remote_code
        )
    refuse_quantized(config, model_config.path)
    return config


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
    control: dist.ProcessGroup | None = None,
) -> PreTrainedModel:
    """The base model (`apply_adapter` adds the adapter), in eval mode, ready for `deepspeed.initialize`.

    Args:
        ds_config: the DeepSpeed configuration; at ZeRO stage 3 parameters are partitioned as they are read, and every
            rank must call this. An empty one loads a plain model.
        device: where it goes; of a model that is partitioned, its partitions and buffers.
        control: the group on which ranks wait for rank 0 (`World.control`), needed at ZeRO stage 3.
        quantization: of the Linear layers but the output head; None for none.

    Attention `auto` leaves the choice to transformers: SDPA where the model allows it, eager where not (Gemma 2).
    `use_cache` is off in the model's configuration; generation passes its own cache.

    Raises:
        UserError: no such model, its tensors are not the model's, or it does not support the attention asked for.
    """
    load_config(model_config)  # refuses before weights are read
    source = resolve_model_path(model_config.path, model_config.revision)
    if Path(source.path).is_dir() and (problems := damaged_weights(Path(source.path))):
        raise UserError.from_list(f"model.path: cannot load {model_config.path}", problems)
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
    with _loading_errors(model_config.path, source.path):
        if zero3:
            model = _load_zero3(model_config, source, ds_config, kwargs, settings, device, control)
        else:
            model = _load_whole(source, model_config.path, kwargs, settings, device).to(device)
    model.config.use_cache = False
    if model_config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if adapter_config.kind == "lora":
            model.enable_input_require_grads()  # a frozen embedding would otherwise give checkpoints nothing to follow
    set_leaf_modules(model)
    return model


def _load_whole(
    source: ModelPath,
    shown: str,
    kwargs: dict[str, Any],
    settings: BitsAndBytesConfig | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    import torch

    if settings is not None:
        kwargs = {**kwargs, "quantization_config": settings}
    if settings is not None or torch.device(device).type != "cpu":
        # Tensor by tensor to the device: the host would hold the whole model once for each rank.
        kwargs = {**kwargs, "device_map": {"": device}}
    model = load_fitting(source.path, shown, revision=source.revision, **kwargs)
    if settings is not None:
        from ssgen_ds.modeling.nf4 import adopt

        adopt(model)
    return model


def _load_zero3(
    model_config: ModelConfig,
    source: ModelPath,
    ds_config: dict[str, Any],
    kwargs: dict[str, Any],
    settings: BitsAndBytesConfig | None,
    device: torch.device | str,
    control: dist.ProcessGroup | None,
) -> PreTrainedModel:
    from transformers import GenerationConfig

    from ssgen_ds.modeling.zero3 import load_partitioned, move_buffers, transformers_partitions

    model = load_partitioned(
        load_config(model_config), source.path, source.revision, ds_config,
        device=device, control=control, settings=settings, **kwargs,
    )  # fmt: skip
    if model is None:
        if settings is not None:
            raise UserError(
                f"quantization.kind: {model_config.path} cannot be quantised shard by shard (its tensors do not match "
                "the model's); use ZeRO stage 2, where every rank holds the quantised base"
            )
        logger.info("%s: its tensors do not match the model's; loading through transformers", model_config.path)
        with transformers_partitions(ds_config):
            model = _load_whole(source, model_config.path, kwargs)
        move_buffers(model, device)
        return model
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


def generation_stops(config: Any) -> list[int]:
    """End-of-sequence ids that the model's configuration names; one, several or none."""
    stops = config.get_text_config().eos_token_id
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)


@dataclass(frozen=True)
class OpenedModel:
    """What is known of a model before its weights: how it reads and writes, and its configuration."""

    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    chat: ChatFormat

    @property
    def text_config(self) -> Any:
        """The configuration of the part that reads text; of most models it is the whole."""
        return self.config.get_text_config()

    @property
    def vocab_size(self) -> int:
        """Width of the logits; the tokenizer may know fewer tokens."""
        return self.text_config.vocab_size


def open_model(model: ModelConfig, data: DataConfig) -> OpenedModel:
    """Open a model as far as that needs no weights. Raises UserError for the first thing that is wrong."""
    config = load_config(model)
    tokenizer = load_tokenizer(model)
    chat = ChatFormat(tokenizer, data, generation_stops(config), config.get_text_config().vocab_size)
    return OpenedModel(tokenizer, config, chat)
