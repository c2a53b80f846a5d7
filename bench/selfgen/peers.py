"""The peers of S5 as their packages ship them, on one plain (not hybrid) ZeRO-3 engine.

What they need to run at all, found by running them:
- TRL reads the ZeRO stage off accelerate's state. accelerate builds that state on a CPU only without `cpu=True`, and
  only when the launcher has set LOCAL_RANK.
- Hugging Face's `generate` keeps ranks in step only when told to (`synced_gpus`) unless an `HfDeepSpeedConfig` is
  alive; parameters that stay sharded need it, whole ones do not.
- `HybridEngineRollout` always decodes `max_new_tokens` and takes no stop ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ssgen_ds.errors import UserError


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts of one rank, [B, L], and how to sample after them."""

    ids_BL: torch.Tensor
    mask_BL: torch.Tensor
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int

    def count(self, output_BT: torch.Tensor) -> int:
        """Tokens up to and including the first stop id of each row."""
        total = 0
        for row in output_BT[:, self.ids_BL.shape[1] :].tolist():
            stop = next((t + 1 for t, token in enumerate(row) if token in self.stop_ids), len(row))
            total += stop
        return total


def left_padded(
    prompts: list[list[int]], max_new_tokens: int, stop_ids: tuple[int, ...], pad_id: int, device: torch.device
) -> Prompts:
    """Prompts as both peers want them."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return Prompts(
        torch.tensor(ids, device=device), torch.tensor(mask, device=device), max_new_tokens, stop_ids, pad_id
    )


class Trl:
    """TRL's `unwrap_model_for_generation` with Hugging Face's `generate` inside, as its GRPO trainer calls it."""

    def __init__(self, engine: Any, ds_config: dict[str, Any]):
        try:
            from trl.models import unwrap_model_for_generation
        except ImportError as error:
            raise UserError(f"the benchmark's peers are missing ({error}); run: pip install -e '.[bench]'") from None
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin

        self._unwrap = unwrap_model_for_generation
        self._engine = engine
        self._accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_config))
        assert self._accelerator.state.deepspeed_plugin.zero_stage == 3

    def generate(self, batches: list[Prompts], seed: int, gather: bool) -> int:
        """Useful tokens of this rank. `gather` is TRL's `ds3_gather_for_generation`: once for all batches."""
        torch.manual_seed(seed)
        self._engine.eval()
        with (
            self._unwrap(self._engine, self._accelerator, gather_deepspeed3_params=gather) as model,
            torch.no_grad(),
        ):
            return sum(
                prompts.count(
                    model.generate(
                        input_ids=prompts.ids_BL,
                        attention_mask=prompts.mask_BL,
                        max_new_tokens=prompts.max_new_tokens,
                        do_sample=True,
                        temperature=1.0,
                        top_k=0,
                        top_p=1.0,
                        eos_token_id=list(prompts.stop_ids),
                        pad_token_id=prompts.pad_id,
                        use_cache=True,
                        synced_gpus=not gather,
                    )
                )
                for prompts in batches
            )


class HybridRollout:
    """DeepSpeed's own rollout engine."""

    def __init__(self, engine: Any, tokenizer: Any):
        from deepspeed.runtime.rollout import HybridEngineRollout

        self._engine = engine
        self._rollout = HybridEngineRollout(engine, tokenizer)
        engine.module.generation_config.use_cache = True  # it passes no setting of its own

    def generate(self, batches: list[Prompts], seed: int) -> int:
        """Useful tokens of this rank, of the `max_new_tokens` that it always decodes."""
        from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig

        torch.manual_seed(seed)
        self._engine.eval()
        return sum(
            prompts.count(
                self._rollout.generate(
                    RolloutRequest(prompts.ids_BL, prompts.mask_BL),
                    SamplingConfig(max_new_tokens=prompts.max_new_tokens, temperature=1.0, top_p=1.0, top_k=0),
                ).input_ids
            )
            for prompts in batches
        )
