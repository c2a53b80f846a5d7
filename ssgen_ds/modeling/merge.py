"""An adapter folded into its base: a plain model, published only when it computes what base and adapter compute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.distributed.device_errors import is_device_error
from ssgen_ds.errors import NotPublished, UserError
from ssgen_ds.modeling.export import settings_for_saving
from ssgen_ds.modeling.model_folder import TrainedAs, complete_folder
from ssgen_ds.run.files import whole_folder

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ssgen_ds.recipe.schema import ModelConfig, QuantizationConfig

# The largest difference of a logit that rounding the merged weights can explain, as a share of the largest logit.
ROUNDING = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def merge_adapter(
    base: ModelConfig,
    adapter_dir: str,
    out_dir: str | Path,
    dtype: torch.dtype,
    quantization: QuantizationConfig | None = None,
    trained: TrainedAs | None = None,
) -> float:
    """Fold the adapter into its base and write a plain model. One process, on the CPU.

    An adapter that was trained on a quantised base is folded into that base dequantised, not into the original: it has
    learnt to make up for the quantisation, and merged elsewhere its answers get worse. Where the adapter changes the
    embeddings or the output head and the base ties the two, the merged model has both: one matrix cannot be two.

    Returns:
        The largest absolute difference between the logits of base + adapter and of the model read back from what was
        written, on a short input; about 1e-5 in float32, more in bfloat16, where the sum itself is rounded.

    Raises:
        UserError: no such base or adapter, or the two do not fit.
        NotPublished: the logits differ by more than rounding; out_dir is as it was.
        OSError: out_dir cannot be written.
    """
    import torch

    from ssgen_ds.modeling.adapters import read_adapter_config
    from ssgen_ds.modeling.load import load_model, load_tokenizer
    from ssgen_ds.modeling.model_path import resolve_model_path
    from ssgen_ds.recipe.schema import AdapterConfig

    read_adapter_config(adapter_dir)
    base = base.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    model = load_model(base, AdapterConfig(), {}, device="cpu", quantization=quantization)
    tokenizer = load_tokenizer(base)
    ids_BT = (torch.arange(16) * 7919 % model.get_input_embeddings().weight.shape[0])[None]
    adapted = _with_adapter(model, adapter_dir, base.path)
    before = _logits(adapted, ids_BT)
    if quantization is not None and quantization.kind != "none":
        from ssgen_ds.modeling.nf4 import dequantize_model

        # The same adapter on the same base, whose weights are then what the quantised layers multiplied with.
        adapted = _with_adapter(dequantize_model(adapted.unload()), adapter_dir, base.path)
    _untie(adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    _say_whether_tied(merged)
    del model, adapted
    source = resolve_model_path(base.path, base.revision).path
    with settings_for_saving(merged), whole_folder(Path(out_dir)) as folder:
        merged.save_pretrained(folder)
        complete_folder(folder, tokenizer, source, trained)
        del merged
        return _check(folder, before, ids_BT, base)


def _with_adapter(model: torch.nn.Module, adapter_dir: str, base_path: str) -> PeftModel:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter_dir, autocast_adapter_dtype=False).eval()
    except (RuntimeError, ValueError) as error:
        if is_device_error(error):
            raise
        raise UserError(f"{adapter_dir} does not fit {base_path}: {error}") from error


def _logits(model: torch.nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return model(ids_BT).logits.float()


def _check(folder: Path, before: torch.Tensor, ids_BT: torch.Tensor, base: ModelConfig) -> float:
    """The largest difference of a logit to that of the model in `folder`. Raises NotPublished for one too large."""
    from ssgen_ds.modeling.load import load_model
    from ssgen_ds.recipe.schema import AdapterConfig

    written = base.model_copy(update={"path": str(folder), "revision": None})
    after = _logits(load_model(written, AdapterConfig(), {}, device="cpu").eval(), ids_BT)
    difference = (before - after).abs().max().item()
    allowed = ROUNDING[base.dtype] * max(1.0, before.abs().max().item())
    if not difference <= allowed:
        raise NotPublished(
            f"--merge: nothing was written: the merged model's logits differ from those of base and adapter by up to "
            f"{difference:.1e}, where rounding explains {allowed:.1e}. Use the adapter as it is (ssgen export without "
            "--merge), with its base"
        )
    return difference


def _untie(adapted: PeftModel) -> None:
    """Give the output head a matrix of its own where it shares the embeddings' and the adapter changes one of them."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    ends = adapted.get_input_embeddings(), adapted.get_output_embeddings()
    if None in ends or not any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends):
        return
    embeddings, head = map(_innermost, ends)
    if embeddings.weight is head.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _innermost(module: Any) -> Any:
    while hasattr(module, "base_layer") or hasattr(module, "original_module"):
        module = module.base_layer if hasattr(module, "base_layer") else module.original_module
    return module


def _say_whether_tied(merged: PreTrainedModel) -> None:
    """Whether head and embeddings are one matrix is read from the model, and not from what its base was."""
    head = merged.get_output_embeddings()
    if head is None or merged.get_input_embeddings().weight is head.weight:
        return
    for config in (merged.config, merged.config.get_text_config()):
        config.tie_word_embeddings = False
