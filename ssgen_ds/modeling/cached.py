"""A Hugging Face causal LM as the sampler's `CachedModel`: a KV cache whose slot is the token's absolute position.

Rows of a batch differ in length and advance by different amounts. Writing every key at the slot of its position keeps
all rows free of holes: a row's numbers do not depend on its neighbours, sliding windows count real tokens, and
forgetting the tail of a row is a matter of the mask alone.

Nothing is padded but the queries of the attention itself: the model sees the batch's N fed tokens as one row, and only
around its attention function are they laid out as [B, Q]. Rows settle at different passes, so that a padded batch
would be twice to three times as many tokens (measured on SmolLM2, 8 rows, mix rates of .1 and .25).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ssgen_ds.distributed.device_errors import is_device_error
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.packed import attention_function, attention_replaced, layer_kinds
from ssgen_ds.modeling.project import project_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_PACKED = "ssgen_packed"  # name of the attention function while a call runs


class _Slots:
    """Where the N tokens of the current call lie and how far it reads; shared by all layers."""

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity = rows, capacity
        self.width = 0  # width of the padded queries
        self.kv_length = 0
        self.rows_N = self.columns_N = self.slots_N = torch.empty(0, dtype=torch.long)

    def place(self, positions_BQ: torch.Tensor) -> None:
        """Positions of a call; -1 is padding."""
        self.width, self.kv_length = positions_BQ.shape[1], int(positions_BQ.max()) + 1
        self.rows_N, self.columns_N = (positions_BQ >= 0).nonzero(as_tuple=True)
        self.slots_N = positions_BQ[self.rows_N, self.columns_N]


class _PositionLayer(CacheLayerMixin):
    """Keys and values [B, heads, capacity, head_dim] in the model's dtype."""

    def __init__(self, slots: _Slots):
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def buffer(like: torch.Tensor) -> torch.Tensor:
            return like.new_zeros(self.slots.rows, like.shape[1], self.slots.capacity, like.shape[3])

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows_N, slots_N = self.slots.rows_N, self.slots.slots_N
        self.keys[rows_N, :, slots_N] = key_states[0].transpose(0, 1)
        self.values[rows_N, :, slots_N] = value_states[0].transpose(0, 1)
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
    """Implements `sampler.fixed_point.CachedModel` over a causal LM in eval mode.

    Args:
        model: the (possibly PEFT-wrapped, possibly ZeRO-3 partitioned) module; called as it is.
        before_call: runs before every forward; ranks use it to agree that one more call follows.
    """

    def __init__(self, model: PreTrainedModel, before_call: Callable[[], object] = lambda: None):
        self.model = model
        self.config = model.config.get_text_config()
        self.before_call = before_call

    def open(self, capacities: list[int]) -> None:
        self._slots = _Slots(len(capacities), max(capacities))
        self._layers = [_PositionLayer(self._slots) for _ in range(self.config.num_hidden_layers)]
        self._cache = Cache(layers=self._layers)

    def keep(self, rows: list[int]) -> None:
        self._slots.rows = len(rows)
        for layer in self._layers:
            layer.keep(torch.tensor(rows, device=self.model.device))

    def __call__(self, tokens_BQ: torch.Tensor, positions_BQ: torch.Tensor, wanted_BQ: torch.Tensor) -> torch.Tensor:
        self.before_call()
        self._slots.place(positions_BQ)
        fed_BQ = positions_BQ >= 0
        mask = self._mask(positions_BQ)
        with self._packed_attention(), project_only(self.model, wanted_BQ[fed_BQ][None]):
            output = self.model(
                input_ids=tokens_BQ[fed_BQ][None],
                attention_mask=mask,
                position_ids=positions_BQ[fed_BQ][None],
                past_key_values=self._cache,
                use_cache=True,
            )
        return output.logits[0]

    @contextmanager
    def _packed_attention(self) -> Iterator[None]:
        """Inside, the model's attention function gets its queries as [B, Q] rows, and gives back N of them."""
        implementation, slots = self.config._attn_implementation, self._slots

        def attend(
            module: torch.nn.Module,
            query_1HND: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, None]:
            function = attention_function(implementation, module)
            _, heads, _, size = query_1HND.shape
            query_BHQD = query_1HND.new_zeros(slots.rows, heads, slots.width, size)
            query_BHQD[slots.rows_N, :, slots.columns_N] = query_1HND[0].transpose(0, 1)
            output_BQHD, _ = function(module, query_BHQD, key, value, attention_mask, **kwargs)
            return output_BQHD[slots.rows_N, slots.columns_N][None], None

        with attention_replaced(self.config, _PACKED, attend):
            yield

    def _mask(self, positions_BQ: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Causal by absolute position; one mask for each kind of layer where the model mixes them."""
        kinds, window = layer_kinds(self.config)
        masks = {kind: self._causal(positions_BQ, window if kind == "sliding_attention" else None) for kind in kinds}
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
    positions_BL = torch.arange(12, device=model.device).expand(2, 12).clone()
    expected = torch.stack([model(input_ids=row[None], use_cache=False).logits[0] for row in tokens_BL])
    cached = CachedCausalLM(model)
    cached.open([12, 12])
    pieces: list[float] = []
    for begins, ends in (((0, 0), (4, 7)), ((4, 7), (12, 9)), ((9, 9), (12, 12))):  # row 0 goes back from 12 to 9
        width = max(end - begin for begin, end in zip(begins, ends, strict=True))
        tokens, positions = tokens_BL.new_zeros(2, width), positions_BL.new_full((2, width), -1)
        for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            tokens[row, : end - begin] = tokens_BL[row, begin:end]
            positions[row, : end - begin] = positions_BL[row, begin:end]
        try:
            logits = cached(tokens, positions, positions >= 0).float()
        except (RuntimeError, IndexError, TypeError, ValueError) as error:  # an attention that ours did not reach
            if is_device_error(error):
                raise
            pieces.append(float("inf"))
            break
        wanted = torch.cat([expected[row, begins[row] : ends[row]] for row in range(2)]).float()
        pieces.append(((logits - wanted).norm() / wanted.norm()).item())
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    if longest is not None and longest > tokens_BL.shape[1]:
        _check_neighbour(model, tokens_BL[0], expected[0], longest, tolerance)
    if not max(pieces) < tolerance:
        raise UserError(
            f"model.path: models of type {config.model_type} compute something else from a cache than from the whole "
            f"text (off by {max(pieces):.1e}), so self-generation would be wrong; method.name=sft works with it"
        )


def _check_neighbour(
    model: PreTrainedModel, tokens_L: torch.Tensor, expected_LV: torch.Tensor, longest: int, tolerance: float
) -> None:
    """Refuse a model in which a row's logits depend on how long another row of the same call is."""
    positions_L = torch.arange(len(tokens_L) + 1, device=tokens_L.device)
    positions_L[-1] = longest - 1
    beside_L = torch.cat([tokens_L, tokens_L[:1]])
    found_LV = model(input_ids=beside_L[None], position_ids=positions_L[None], use_cache=False).logits[0, :-1]
    difference = ((found_LV.float() - expected_LV.float()).norm() / expected_LV.float().norm()).item()
    if not difference < tolerance:
        raise UserError(
            f"model.path: models of type {model.config.get_text_config().model_type} compute a short text otherwise "
            f"beside one of {longest} tokens (off by {difference:.1e}), so self-generation would depend on the batch; "
            "lower data.max_prompt_tokens, data.max_response_tokens and method.rac.max_draft_tokens"
        )


@contextmanager
def inference_mode(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, no gradient checkpointing) inside, what it was before outside."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
