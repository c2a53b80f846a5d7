"""Hugging Face folders that load with transformers and peft as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ssgen_ds.errors import UserError
from ssgen_ds.files import whole_folder
from ssgen_ds.modeling.gather import full_state_dict

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssgen_ds.config import ModelConfig, QuantizationConfig


def save_model(
    module: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    base_path: str,
    *,
    is_main: bool,
) -> None:
    """`state_to_save` and `write_model` in one. All ranks call it; the main one writes."""
    state = state_to_save(module)
    if is_main:
        assert state is not None, "the main process is global rank 0"
        write_model(module, state, tokenizer, out_dir, base_path)


def state_to_save(module: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """The model's state, or its adapter's, whole and in host memory, on rank 0; None elsewhere. All ranks call it.

    Args:
        module: the model inside the DeepSpeed engine, a PreTrainedModel or PeftModel; partitioned or not.
    """
    from peft import PeftModel

    return full_state_dict(module, trainable_only=isinstance(module, PeftModel))


def write_model(
    module: torch.nn.Module,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    base_path: str,
) -> None:
    """Write the model (or, of a LoRA model, the adapter) and its tokenizer. One process; the folder appears whole.

    Args:
        state: `state_to_save` of the module.
        base_path: what the adapter's configuration names as its base: a hub id or folder that peft can load.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    from peft import PeftModel

    with whole_folder(Path(out_dir)) as folder:
        if isinstance(module, PeftModel):
            module.peft_config[module.active_adapter].base_model_name_or_path = base_path
            # The embeddings are not trained; peft would otherwise ask the hub whether they were resized.
            module.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        else:
            with _settings_for_saving(module):
                module.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)


@contextmanager
def _settings_for_saving(model: PreTrainedModel) -> Iterator[None]:
    """Training settings out, and a generation configuration that transformers accepts; both back afterwards."""
    use_cache, generation = model.config.use_cache, model.generation_config
    model.config.use_cache = True
    if generation is not None:
        model.generation_config = copy.deepcopy(generation)
        try:
            model.generation_config.validate(strict=True)
        except ValueError:
            # Published models carry a temperature or top_p with do_sample off, which cannot be saved.
            model.generation_config.do_sample = True
    try:
        yield
    finally:
        model.config.use_cache, model.generation_config = use_cache, generation


def merge_adapter(
    base: ModelConfig,
    adapter_dir: str,
    out_dir: str | Path,
    dtype: torch.dtype,
    quantization: QuantizationConfig | None = None,
) -> float:
    """Fold the adapter into its base and write a plain model. One process, on the CPU.

    An adapter that was trained on a quantised base is folded into that base dequantised, not into the original: it has
    learnt to make up for the quantisation, and merged elsewhere its answers get worse.

    Returns:
        The largest absolute difference between the logits of the merged model and of base + adapter on a short input;
        about 1e-5 in float32, more in bfloat16, where the sum itself is rounded.

    Raises:
        UserError: no such base or adapter, or the two do not fit.
        OSError: out_dir cannot be written.
    """
    import torch
    from peft import PeftModel

    from ssgen_ds.config import AdapterConfig
    from ssgen_ds.modeling.adapters import read_adapter_config
    from ssgen_ds.modeling.load import load_model, load_tokenizer

    read_adapter_config(adapter_dir)
    base = base.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    model = load_model(base, AdapterConfig(), {}, device="cpu", quantization=quantization)
    tokenizer = load_tokenizer(base)
    try:
        adapted = PeftModel.from_pretrained(model, adapter_dir, autocast_adapter_dtype=False).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{adapter_dir} does not fit {base.path}: {error}") from error
    size = model.get_input_embeddings().num_embeddings
    ids_BT = (torch.arange(16) * 7919 % size)[None]
    with torch.no_grad():
        before = adapted(ids_BT).logits
        if quantization is not None and quantization.kind != "none":
            adapted = _on_dequantized(adapted, adapter_dir)
        merged = adapted.merge_and_unload(safe_merge=True)
        after = merged(ids_BT).logits
    with _settings_for_saving(merged), whole_folder(Path(out_dir)) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return (before.float() - after.float()).abs().max().item()


def _on_dequantized(adapted: PeftModel, adapter_dir: str) -> PeftModel:
    """The same adapter on the same base, whose weights are then what the quantised layers multiplied with."""
    from peft import PeftModel

    from ssgen_ds.modeling.nf4 import dequantize_model

    base = dequantize_model(adapted.unload())
    return PeftModel.from_pretrained(base, adapter_dir, autocast_adapter_dtype=False).eval()
