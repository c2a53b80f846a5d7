"""How much of a rank's free memory generation may take, and for what; `plan` counts by the same rules.

A batch holds keys and values of all its rows; a call also holds the activations of the tokens that it feeds, and the
logits that it was asked for. All three are bounded: a first call reads whole prompts, whose activations are several
times their keys and values, and is cut into calls that fit. Cutting changes what calls cost, never a token.
"""

from __future__ import annotations

from ssgen_ds.sampler.requests import CallLimit

USABLE = 0.8  # share of the free memory that gathered parameters may take: the rest is for what follows
# Shares of what is then still free; what remains is for scores, for weights that are dequantised at a call, and for
# what the allocator cannot use.
CACHE_SHARE = 0.4  # keys and values
CALL_SHARE = 0.2  # activations of a call
LOGIT_SHARE = 0.1  # logits of a call
RECORDED_SHARE = 0.15  # of the free memory: what one forward may record of a step, beside the three above
MOST_ROWS = 64
MOST_ROWS_CPU = 16  # a CPU gains nothing from more where calls are cheap
MOST_TOKENS, MOST_LOGITS = 8192, 2048  # of a call: beyond, more of them make nothing faster
FEWEST_TOKENS = 64  # of a call, however little memory there is


def call_bytes_per_token(hidden: int, widest: int, adapter_element: int, element: int) -> int:
    """Bytes of activations of one token in a call without gradients, at its peak in one layer.

    Gate, up and their product in the feed-forward part, besides four tensors as wide as the hidden state; LoRA holds
    its own output and that scaled beside them. Counted on meta tensors for Llama 3.1 8B, Qwen2.5 7B and Gemma 3 4B.

    Args:
        widest: elements of the widest output of a layer.
        adapter_element: bytes of the adapter's dtype; 0 without one.
        element: bytes of the model's dtype.
    """
    outputs = 3.0 if not adapter_element else 4.25 if adapter_element <= element else 6.75
    return int((outputs * widest + 4 * hidden) * element)


def call_limit(free: float, token_bytes: int, logit_bytes: int, rows: int) -> CallLimit:
    """What one call may take of the free bytes.

    Args:
        token_bytes: activations of a token.
        logit_bytes: logits of a token.
        rows: of the batch, each of which may want a logit.
    """
    tokens = int(min(MOST_TOKENS, max(FEWEST_TOKENS, CALL_SHARE * free // max(1, token_bytes))))
    logits = int(min(MOST_LOGITS, max(rows, LOGIT_SHARE * free // max(1, logit_bytes))))
    return CallLimit(tokens, logits)


def rows_that_fit(cache_bytes: float, row_bytes: float, most: int) -> int:
    """Rows whose keys and values fit; at least one."""
    return int(max(1, min(most, cache_bytes // max(1, row_bytes))))
