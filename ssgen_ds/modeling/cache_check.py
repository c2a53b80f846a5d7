"""Whether a model computes from our cache what it computes from the whole text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ssgen_ds.distributed.device_errors import is_device_error
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.cached import CachedCausalLM
from ssgen_ds.modeling.pieces import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_EXACT = 1e-3  # in float32, of the norm of the logits
# In lower precision one rounding after each attention of 30 layers moves the logits by 1.3 to 2.6 % of their norm, so
# that a deep model comes near any limit that would find a mistake. Beyond the first limit the distributions decide.
_ROUNDED, _WRONG = 5e-2, 0.3
_SAME_NATS = 0.02  # mean Kullback-Leibler divergence; a wrong mask or position gives many times as much


@torch.no_grad()
def check_cache(model: PreTrainedModel, longest: int | None = None) -> None:
    """Refuse a model that does not give the same logits through the cache as in one plain forward.

    Some architectures build their own mask or positions and ignore ours; remote code may do anything. Two short ragged
    rows, fed in pieces of different lengths, show it; and one row beside a token at the last position that the run may
    use, where rotary factors that depend on the longest row would change it. Under ZeRO-3 every rank must call this.

    Args:
        longest: tokens of the longest sequence that the run may have; None where that is not known.

    Raises:
        UserError: naming the model type.
    """
    config = model.config.get_text_config()
    tokens_BL = (torch.arange(24, device=model.device).view(2, 12) * 7919 + 11) % config.vocab_size
    expected_BLV = torch.stack([model(input_ids=row[None], use_cache=False).logits[0] for row in tokens_BL])
    if longest is not None and longest > tokens_BL.shape[1]:
        _check_neighbour(model, tokens_BL[0], expected_BLV[0], longest)
    tokens = tokens_BL.tolist()
    cached = CachedCausalLM(model)
    cached.open(2, 12)
    found, wanted = [], []
    for begins, ends in (((0, 0), (4, 7)), ((4, 7), (12, 9)), ((9, 9), (12, 12))):  # row 0 goes back from 12 to 9
        spans = list(enumerate(zip(begins, ends, strict=True)))
        pieces = [Piece(row, begin, tokens[row][begin:end], range(end - begin)) for row, (begin, end) in spans]
        wanted.append(torch.cat([expected_BLV[row, begin:end] for row, (begin, end) in spans]))
        try:
            found.append(cached(pieces))
        except (RuntimeError, IndexError, TypeError, ValueError) as error:  # an attention that ours did not reach
            if is_device_error(error):
                raise
            found.append(torch.full_like(wanted[-1], torch.inf))
            break
    off = max(map(_off, found, wanted))
    if not all(map(_is_same, found, wanted)):
        raise UserError(
            f"model.path: models of type {config.model_type} compute something else from a cache than from the whole "
            f"text (off by {off:.1e}), so self-generation would be wrong; method.name=sft works with it"
        )


def _check_neighbour(model: PreTrainedModel, tokens_L: torch.Tensor, expected_LV: torch.Tensor, longest: int) -> None:
    """Refuse a model in which a row's logits depend on how long another row of the same call is."""
    positions_L = torch.arange(len(tokens_L) + 1, device=tokens_L.device)
    positions_L[-1] = longest - 1
    beside_L = torch.cat([tokens_L, tokens_L[:1]])
    found_LV = model(input_ids=beside_L[None], position_ids=positions_L[None], use_cache=False).logits[0, :-1]
    if not _is_same(found_LV, expected_LV):
        raise UserError(
            f"model.path: models of type {model.config.get_text_config().model_type} compute a short text otherwise "
            f"beside one of {longest} tokens (off by {_off(found_LV, expected_LV):.1e}), so self-generation would "
            "depend on the batch; lower data.max_prompt_tokens, data.max_response_tokens and "
            "method.rac.max_draft_tokens"
        )


def _off(found_LV: torch.Tensor, expected_LV: torch.Tensor) -> float:
    """The difference as a share of the norm."""
    return ((found_LV.float() - expected_LV.float()).norm() / expected_LV.float().norm()).item()


def _is_same(found_LV: torch.Tensor, expected_LV: torch.Tensor) -> bool:
    """Whether logits differ by rounding alone, as far as that can be told in their dtype."""
    off = _off(found_LV, expected_LV)
    if expected_LV.dtype == torch.float32:
        return off < _EXACT
    found, expected = found_LV.float().log_softmax(-1), expected_LV.float().log_softmax(-1)
    nats = (expected.exp() * (expected - found)).sum(-1).mean().item()
    return off < _ROUNDED or (off < _WRONG and nats < _SAME_NATS)
