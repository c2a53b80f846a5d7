"""Whether a checkpoint's tensors are the model's: what is missing, left over or of another shape is refused by name.

transformers fills what is missing with random numbers and says so in a warning, under ZeRO-3 not even that.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ssgen_ds.distributed.device_errors import is_device_error
from ssgen_ds.errors import UserError
from ssgen_ds.run.index_file import refuse_foreign_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_NAMED = 5  # tensors of a kind that a message names
# Buffers that older programs saved and models now compute; transformers knows most, but not for every family.
_COMPUTED = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(^|\.)position_ids|\.(attn|attention)\.(masked_)?bias)$"
)


def load_fitting(path: str, shown: str, **kwargs: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` of a checkpoint that has each of the model's tensors and no others.

    Its configuration then says truly whether the output head is tied to the embedding.

    Args:
        path: what transformers loads; `shown` is what messages call it.

    Raises:
        UserError: naming the tensors that do not fit, or a file that is not the model's.
        OSError, ValueError, ImportError: from transformers, also for files that are damaged.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    refuse_foreign_files(path, kwargs.get("revision"))
    try:
        # Other shapes are reported by name below.
        model, info = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except (SafetensorError, RuntimeError, EOFError) as error:
        if is_device_error(error) or isinstance(error, torch.distributed.DistError):
            raise
        raise OSError(f"{error}") from error
    refuse_misfits(shown, info)
    _tell_tie(model, shown)
    return model


def refuse_misfits(shown: str, info: dict[str, Any]) -> None:
    """Raise UserError unless transformers' loading info is empty."""
    missing = sorted(info["missing_keys"])
    unexpected = sorted(name for name in info["unexpected_keys"] if not _COMPUTED.search(name))
    reasons = []
    if missing:
        reasons.append(f"missing, and would be random: {_some(missing)}{_head_advice(missing)}")
    if unexpected:
        reasons.append(f"the model has no place for: {_some(unexpected)}")
    reasons += [
        f"{name} has shape {list(stored)} in the checkpoint and {list(wanted)} in the model"
        for name, stored, wanted in sorted(info["mismatched_keys"])[:_NAMED]
    ]
    if reasons:
        what = f"model.path: the tensors of {shown} are not those of the model that its config.json describes"
        raise UserError.from_list(what, reasons)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _head_advice(missing: Collection[str]) -> str:
    if len(missing) > 1 or not any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in missing):
        return ""
    return " (if the model's head is its embedding, set tie_word_embeddings to true in config.json)"


def _tell_tie(model: PreTrainedModel, shown: str) -> None:
    """transformers unties a head that was saved with other values than the embedding; the configuration must say so."""
    embedding, head = _weight(model.get_input_embeddings()), _weight(model.get_output_embeddings())
    if embedding is None or head is None or head is embedding or not model.config.tie_word_embeddings:
        return
    logger.warning("%s: its output head differs from its embedding: not tied, whatever its config.json says", shown)
    model.config.tie_word_embeddings = False


def _weight(module: torch.nn.Module | None) -> torch.Tensor | None:
    return None if module is None else dict(module.named_parameters(recurse=False)).get("weight")
