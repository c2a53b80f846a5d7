"""A Hugging Face causal LM as the sampler's `CachedModel`: a KV cache whose slot is the token's absolute position.

Rows of a batch differ in length and advance by different amounts. Writing every key at the slot of its position keeps
all rows free of holes: a row's numbers do not depend on its neighbours, sliding windows count real tokens, and
forgetting the tail of a row is a matter of the mask alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ssgen_ds.errors import UserError
from ssgen_ds.modeling.project import project_only


class _Slots:
    """Where the current call writes and how far it reads; shared by all layers."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.slots_BQ = torch.empty(0, 0, dtype=torch.long)
        self.kv_length = 0


class _PositionLayer(CacheLayerMixin):
    """Keys and values [B, heads, capacity + 1, head_dim]; the last slot swallows what padding writes."""

    def __init__(self, slots: _Slots):
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def buffer(like: torch.Tensor) -> torch.Tensor:
            return like.new_zeros(like.shape[0], like.shape[1], self.slots.capacity + 1, like.shape[3])

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows_B1 = torch.arange(key_states.shape[0], device=key_states.device)[:, None]
        self.keys[rows_B1, :, self.slots.slots_BQ] = key_states.transpose(1, 2)
        self.values[rows_B1, :, self.slots.slots_BQ] = value_states.transpose(1, 2)
        return self.keys[:, :, : self.slots.kv_length], self.values[:, :, : self.slots.kv_length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.kv_length, 0

    def get_seq_length(self) -> int:
        return self.slots.kv_length

    def get_max_length(self) -> int:
        return self.slots.capacity

    def keep(self, rows: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]


class CachedCausalLM:
    """Implements `selfgen.fixed_point.CachedModel` over a causal LM in eval mode.

    Args:
        model: the (possibly PEFT-wrapped, possibly ZeRO-3 partitioned) module; called as it is.
        before_call: runs before every forward; ranks use it to agree that one more call follows.
    """

    def __init__(self, model: torch.nn.Module, before_call: Callable[[], object] = lambda: None):
        self.model = model
        self.config = model.config.get_text_config()
        self.before_call = before_call

    def open(self, capacities: list[int]) -> None:
        self._slots = _Slots(max(capacities))
        self._layers = [_PositionLayer(self._slots) for _ in range(self.config.num_hidden_layers)]
        self._cache = Cache(layers=self._layers)

    def keep(self, rows: list[int]) -> None:
        for layer in self._layers:
            layer.keep(torch.tensor(rows, device=self.model.device))

    def __call__(self, tokens_BQ: torch.Tensor, positions_BQ: torch.Tensor, wanted_BQ: torch.Tensor) -> torch.Tensor:
        self.before_call()
        self._slots.slots_BQ = torch.where(positions_BQ >= 0, positions_BQ, self._slots.capacity)
        self._slots.kv_length = int(positions_BQ.max()) + 1
        with project_only(self.model, wanted_BQ):
            output = self.model(
                input_ids=tokens_BQ,
                attention_mask=self._mask(positions_BQ),
                position_ids=positions_BQ.clamp(min=0),
                past_key_values=self._cache,
                use_cache=True,
            )
        return output.logits[0]

    def _mask(self, positions_BQ: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Causal by absolute position; one mask for each kind of layer where the model mixes them."""
        window = getattr(self.config, "sliding_window", None)  # a family trait: most configs lack it
        kinds = set(getattr(self.config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
        masks = {
            kind: self._causal(positions_BQ, window if kind == "sliding_attention" else None) for kind in sorted(kinds)
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _causal(self, positions_BQ: torch.Tensor, window: int | None) -> torch.Tensor:
        """[B, 1, Q, K]: boolean for sdpa, additive for eager. Padding sees slot 0, so that no row is empty."""
        keys_K = torch.arange(self._slots.kv_length, device=positions_BQ.device)
        query_BQ1 = positions_BQ.clamp(min=0)[:, :, None]
        seen_BQK = keys_K <= query_BQ1
        if window is not None:
            seen_BQK &= keys_K > query_BQ1 - window
        seen_B1QK = seen_BQK[:, None]
        if self.config._attn_implementation == "eager":
            dtype = self.model.dtype
            return torch.zeros_like(seen_B1QK, dtype=dtype).masked_fill(~seen_B1QK, torch.finfo(dtype).min)
        return seen_B1QK


@torch.no_grad()
def check_cache(model: torch.nn.Module) -> None:
    """Refuse a model that does not give the same logits through the cache as in one plain forward.

    Some architectures build their own mask or positions and ignore ours; remote code may do anything. Two short ragged
    rows, fed in pieces of different lengths, show it. Under ZeRO-3 every rank must call this.

    Raises:
        UserError: naming the model type.
    """
    config = model.config.get_text_config()
    tokens_BL = (torch.arange(24, device=model.device).view(2, 12) * 7919 + 11) % config.vocab_size
    positions_BL = torch.arange(12, device=model.device).expand(2, 12).clone()
    expected = torch.stack([model(input_ids=row[None], use_cache=False).logits[0] for row in tokens_BL])
    cached = CachedCausalLM(model)
    cached.open([12, 12])
    pieces = []
    for begins, ends in (((0, 0), (4, 7)), ((4, 7), (12, 9)), ((9, 9), (12, 12))):  # row 0 goes back from 12 to 9
        width = max(end - begin for begin, end in zip(begins, ends, strict=True))
        tokens, positions = tokens_BL.new_zeros(2, width), positions_BL.new_full((2, width), -1)
        for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            tokens[row, : end - begin] = tokens_BL[row, begin:end]
            positions[row, : end - begin] = positions_BL[row, begin:end]
        logits = cached(tokens, positions, positions >= 0).float()
        wanted = torch.cat([expected[row, begins[row] : ends[row]] for row in range(2)]).float()
        pieces.append(((logits - wanted).norm() / wanted.norm()).item())
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    if not max(pieces) < tolerance:
        raise UserError(
            f"model.path: models of type {config.model_type} compute something else from a cache than from the whole "
            f"text (off by {max(pieces):.1e}), so self-generation would be wrong; method.name=sft works with it"
        )
