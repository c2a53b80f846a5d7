"""What all items measure on: an 8B Llama of random weights with LoRA, built on the device, on the product's engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ssgen_ds.distributed.world import World
from ssgen_ds.recipe.schema import Recipe


@dataclass(frozen=True)
class Sizes:
    """The defaults are a GPU's; `TINY` is for a test on a CPU."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    prompt: int = 512
    response: int = 512
    requests: int = 64
    draft: int = 128
    batch: int = 64  # sequences of a step, from which `micro_batch: auto` takes what fits
    rows: int = 4  # of the timed LoRA step
    steps: int = 6
    fed: tuple[int, ...] = (8, 64, 512, 2048, 8192)
    call_rows: tuple[int, ...] = (8, 64)


TINY = Sizes(
    layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocabulary=120, prompt=24, response=20, requests=6,
    draft=8, batch=4, rows=2, steps=2, fed=(4, 16), call_rows=(2, 4),
)  # fmt: skip


@dataclass
class Rig:
    """The model and its engine are made when an item first asks for them."""

    world: World
    sizes: Sizes
    folder: Path

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.world.device.type == "cuda" else torch.float32

    @property
    def config(self) -> Any:
        from transformers import AutoConfig

        sizes = self.sizes
        return AutoConfig.for_model(
            "llama",
            num_hidden_layers=sizes.layers,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            vocab_size=sizes.vocabulary,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
        )

    @cached_property
    def recipe(self) -> Recipe:
        from ssgen_ds.recipe.load import parse_recipe

        sizes = self.sizes
        return parse_recipe(
            {
                "model": {"path": "random", "gradient_checkpointing": True},
                "method": {"name": "bss+rac", "rac": {"max_draft_tokens": sizes.draft}},
                "adapter": {"kind": "lora", "rank": 16, "alpha": 32},
                "data": {
                    "train": "-",
                    "packing": True,
                    "max_prompt_tokens": sizes.prompt,
                    "max_response_tokens": sizes.response,
                },
                "train": {"max_steps": 1, "global_batch": sizes.batch, "micro_batch": "auto", "warmup": 0},
                "deepspeed": "ds_configs/zero0.json",
                "output_dir": str(self.folder / "run"),
            }
        )

    @cached_property
    def engine(self) -> Any:
        import deepspeed
        from transformers import AutoModelForCausalLM

        from ssgen_ds.modeling.adapters import apply_adapter
        from ssgen_ds.modeling.optimizer import build_optimizer
        from ssgen_ds.recipe.deepspeed import build_ds_config

        torch.manual_seed(0)
        with torch.device(self.world.device):
            model: Any = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model = apply_adapter(model, self.recipe.adapter, None, 0)
        settings = build_ds_config(self.recipe, 1, str(self.dtype).removeprefix("torch."))
        optimizer = build_optimizer(model, self.recipe.train, settings)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        engine.train()
        return engine

    @cached_property
    def sampler(self) -> Any:
        from ssgen_ds.sampler.build import build_sampler

        return build_sampler(self.engine, self.recipe, self.world, lambda line: None)

    def requests(self, count: int, mix_rate: float) -> list[Any]:
        """Prompts and gold responses of random tokens, between half and all of the sizes."""
        from ssgen_ds.sampler.requests import Request
        from ssgen_ds.selfgen.bss import draw_coins

        generator = torch.Generator().manual_seed(1)

        def ids(most: int) -> list[int]:
            length = int(torch.randint(most // 2, most + 1, (), generator=generator))
            return torch.randint(5, self.sizes.vocabulary, (length,), generator=generator).tolist()

        found = []
        for i in range(count):
            prompt, gold = ids(self.sizes.prompt), ids(self.sizes.response)
            found.append(Request(prompt, gold, draw_coins(len(gold), mix_rate, i), key=i))
        return found

    def wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int = 3) -> float:
        """The best of some repeats, after one that is not counted."""
        found = []
        for _ in range(repeats + 1):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - begin)
        return min(found[1:])
