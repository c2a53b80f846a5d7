"""Summed token loss. Tokens are the unit: sum here, divide once by the global weight in `step.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ssgen_ds.modeling.project import project_only


def token_nll(
    model: torch.nn.Module, input_ids_BL: torch.Tensor, labels_BL: torch.Tensor, lengths_B: torch.Tensor
) -> torch.Tensor:
    """Negative log-likelihood [N] in float32 of the N labelled tokens, row by row, left to right.

    Args:
        model: a causal LM (or the DeepSpeed engine around it).
        input_ids_BL: what the model reads, right-padded.
        labels_BL: what position t must be predicted to be (not shifted yet), -100 where there is no label. Labels may
            differ from the inputs: BSS reads mixed tokens and predicts gold ones. Column 0 never has a label.
        lengths_B: real tokens of each row.
    """
    columns_L = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)
    attention_BL = columns_L < lengths_B[:, None]
    labelled_BL = labels_BL != -100
    predicting_BL = F.pad(labelled_BL[:, 1:], (0, 1))  # token t is predicted at position t - 1
    with project_only(getattr(model, "module", model), predicting_BL):
        output = model(
            input_ids=input_ids_BL,
            attention_mask=attention_BL.long(),
            position_ids=columns_L.expand_as(input_ids_BL).masked_fill(~attention_BL, 0),
            use_cache=False,
        )
    return F.cross_entropy(output.logits[0].float(), labels_BL[labelled_BL], reduction="none")
