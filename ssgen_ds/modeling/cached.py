"""A Hugging Face causal LM as the sampler's `CachedModel`: a KV cache whose slot is the token's absolute position.

Rows of a batch differ in length and advance by different amounts. Writing every key at the slot of its position keeps
all rows free of holes: a row's numbers do not depend on its neighbours, sliding windows count real tokens, and
forgetting the tail of a row is a matter of the mask alone.

The model sees the N tokens that a batch feeds as one row: rows settle at different passes, so that a padded batch would
be twice to three times as many tokens (measured on SmolLM2, 8 rows, mix rates of .1 and .25). Only around its attention
function are they laid out as rows again, in groups of their own kernel calls: see `pieces.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ssgen_ds.modeling.call_layout import CallLayout, Masks, aligned, masked_attention, on_device
from ssgen_ds.modeling.decode_step import DecodeStep, Record
from ssgen_ds.modeling.packed import attention_function, attention_replaced, layer_kinds
from ssgen_ds.modeling.pieces import Piece
from ssgen_ds.modeling.project import project_only
from ssgen_ds.modeling.recorded import Recording

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SDPA = ("sdpa", "flash_attention_2")
_PACKED = "ssgen_packed"  # name of the attention function while a call runs


class CachedCausalLM:
    """Implements `sampler.fixed_point.CachedModel` over a causal LM in eval mode.

    Args:
        model: the (possibly PEFT-wrapped, possibly ZeRO-3 partitioned) module; called as it is.
        before_call: runs before every forward; ranks use it to agree that one more call follows.
        device: where the model computes; by default where its parameters are.
        record: records calls of one token a row, to replay them; None makes every call anew.
        recording: takes what the layers give; it is open around the calls.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        before_call: Callable[[], object] = lambda: None,
        device: torch.device | str | None = None,
        record: Record | None = None,
        recording: Recording | None = None,
    ):
        self.model = model
        self.config = model.config.get_text_config()
        self.before_call = before_call
        self.device = torch.device(device or model.device)
        self.recording = recording
        self._decode: DecodeStep | None = None
        if record is not None and recording is None:  # a replay would not tell a recording of its layers
            self._decode = DecodeStep(self._run, self._masks, self.device, record)

    @property
    def _attention(self) -> str:
        return self.config._attn_implementation

    def open(self, rows: int, capacity: int) -> None:
        """Start a batch whose rows hold at most `capacity` tokens each."""
        spare = 0 if self._decode is None else 1  # a slot for rows that feed nothing
        self._memory = _Memory(rows, aligned(capacity + spare))
        self._layers = [_PositionLayer(self._memory) for _ in range(self.config.num_hidden_layers)]
        self._cache = Cache(layers=self._layers)
        if self._decode is not None:
            self._decode.open(rows, self._memory.capacity)

    def keep(self, rows: list[int]) -> None:
        """Forget all rows of the batch but these, in this order."""
        self._memory.rows = len(rows)
        (rows_B,) = on_device([rows], self.device)
        for layer in self._layers:
            layer.keep(rows_B)
        if self._decode is not None:
            self._decode.open(len(rows), self._memory.capacity)

    @property
    def _masks(self) -> Masks:
        _, window = layer_kinds(self.config)
        return Masks(window, self._attention in _SDPA, self.model.dtype)

    def __call__(self, pieces: list[Piece]) -> torch.Tensor:
        """Feed pieces of different rows; logits [W, V] where they are wanted, piece by piece."""
        self.before_call()
        logits_WV = None if self._decode is None else self._decode(pieces)
        if logits_WV is None:
            logits_WV = self._run(CallLayout.of(pieces, self._memory.rows, self._masks, self.device))
        return logits_WV

    def _run(self, layout: CallLayout) -> torch.Tensor:
        self._memory.layout = layout
        if self.recording is not None:
            self.recording.expect(layout.pieces)
        kinds, _ = layer_kinds(self.config)
        # Layers tell their kind by the size of what they are given as a mask.
        tags = {kind: torch.empty(1, 1, 1, i + 1, device=self.device) for i, kind in enumerate(kinds)}
        with self._grouped_attention(layout, kinds), project_only(self.model, layout.wanted_W):
            output = self.model(
                input_ids=layout.tokens_N[None],
                attention_mask=tags if len(kinds) > 1 else tags[kinds[0]],
                position_ids=layout.slots_N[None],
                past_key_values=self._cache,
                use_cache=True,
            )
        return output.logits[0]

    @contextmanager
    def _grouped_attention(self, layout: CallLayout, kinds: list[str]) -> Iterator[None]:
        """Inside, the model's attention function works on each group's rows."""
        # Prompts take torch's own kernels where flash-attn is asked for, too: among them are the same ones.
        implementation = "sdpa" if self._attention in _SDPA else self._attention

        def attend(
            module: torch.nn.Module,
            query_1HND: torch.Tensor,
            key_BHKD: torch.Tensor,
            value_BHKD: torch.Tensor,
            attention_mask: torch.Tensor | None,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, None]:
            kind = kinds[0 if attention_mask is None else attention_mask.shape[-1] - 1]
            function = attention_function(implementation, module)
            outputs = []
            for group in layout.groups:
                query_BHQD = group.queries(query_1HND)
                key, value = group.memory(key_BHKD), group.memory(value_BHKD)
                repeats = query_BHQD.shape[1] // key.shape[1]
                mask = group.mask(kind, repeats)
                if implementation == "sdpa" and mask is not None and "position_bias" not in kwargs:
                    output_BQHD = masked_attention(query_BHQD, key, value, mask, kwargs.get("scaling"))
                else:
                    output_BQHD, _ = function(module, query_BHQD, key, value, mask, **kwargs)
                outputs.append(group.packed(output_BQHD))
            return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None

        with attention_replaced(self.config, _PACKED, attend):
            yield


@dataclass
class _Memory:
    """What the layers share: the size of the batch, and the call that is being made."""

    rows: int
    capacity: int
    layout: CallLayout | None = None

    @property
    def keys(self) -> int:
        """Slots that the call reads."""
        return 0 if self.layout is None else self.layout.keys


class _PositionLayer(CacheLayerMixin):
    """Keys and values [B, heads, capacity, head_dim] in the model's dtype."""

    def __init__(self, memory: _Memory):
        super().__init__()
        self.memory = memory

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def buffer(like: torch.Tensor) -> torch.Tensor:
            return like.new_zeros(self.memory.rows, like.shape[1], self.memory.capacity, like.shape[3])

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        layout = self.memory.layout
        assert layout is not None, "a call of the model is being made"
        self.keys[layout.rows_N, :, layout.slots_N] = key_states[0].transpose(0, 1)
        self.values[layout.rows_N, :, layout.slots_N] = value_states[0].transpose(0, 1)
        return self.keys[:, :, : layout.keys], self.values[:, :, : layout.keys]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.memory.keys, 0

    def get_seq_length(self) -> int:
        return self.memory.keys

    def get_max_length(self) -> int:
        return self.memory.capacity

    def keep(self, rows_B: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[rows_B], self.values[rows_B]


@contextmanager
def inference_mode(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, no gradient checkpointing) inside, what it was before outside."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
