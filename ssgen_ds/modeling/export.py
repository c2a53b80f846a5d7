"""Hugging Face folders that load with transformers and peft as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.modeling.gather import full_state_dict
from ssgen_ds.modeling.model_folder import TrainedAs, absolute_source, complete_folder
from ssgen_ds.run.files import whole_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_model(
    module: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    base_path: str,
    *,
    is_main: bool,
    trained: TrainedAs | None = None,
) -> None:
    """`state_to_save` and `write_model` in one. All ranks call it; the main one writes."""
    state = state_to_save(module)
    if is_main:
        assert state is not None, "the main process is global rank 0"
        write_model(module, state, tokenizer, out_dir, base_path, trained)


def state_to_save(module: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """The model's state, or its adapter's, whole and in host memory, on rank 0; None elsewhere. All ranks call it.

    Args:
        module: the model inside the DeepSpeed engine, a PreTrainedModel or PeftModel; partitioned or not.
    """
    from peft import PeftModel

    return full_state_dict(module, trainable_only=isinstance(module, PeftModel))


def write_model(
    module: Any,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    base_path: str,
    trained: TrainedAs | None = None,
) -> None:
    """Write the model (or, of a LoRA model, the adapter) and what goes with it. One process; the folder appears whole.

    Args:
        state: `state_to_save` of the module.
        base_path: the model that was trained, a hub id or folder: an adapter's configuration names it as its base.
        trained: how it was trained; None where that is not known.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    from peft import PeftModel

    with whole_folder(Path(out_dir)) as folder:
        if isinstance(module, PeftModel):
            module.peft_config[module.active_adapter].base_model_name_or_path = absolute_source(base_path)
            # The embeddings are not trained; peft would otherwise ask the hub whether they were resized.
            module.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        else:
            with settings_for_saving(module):
                module.save_pretrained(folder, state_dict=state)
        complete_folder(folder, tokenizer, base_path, trained)


@contextmanager
def settings_for_saving(model: PreTrainedModel) -> Iterator[None]:
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
