"""T3: model FLOP utilisation of a LoRA step on one GPU, with a model of 7 to 8 billion random weights.

MFU = operations a token * tokens a second / the card's published dense bfloat16 operations a second
operations a token: `ssgen_ds.plan.timing.operations_per_token` (LoRA: 4 N + 6 N_lora + attention; N without the
embedding), without the second forward of gradient checkpointing, and with the output head for labelled tokens only
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.train.peak import peak_bytes
from bench.train.sizes import Sizes
from bench.train.tasks import recipe_of
from ssgen_ds.plan.sizes import measure as measure_sizes
from ssgen_ds.plan.timing import CARDS, operations_per_token
from ssgen_ds.recipe.schema import AdapterConfig

ADAPTER = {"kind": "lora", "rank": 16, "alpha": 32}


def utilisation(operations: float, tokens_per_second: float, card: str) -> float | None:
    """Share of the card's published operations a second; None for a card that is not in the table."""
    known = [flops for name, (flops, _) in CARDS.items() if name.lower() in card.lower()]
    return operations * tokens_per_second / known[0] if known else None


def config_of(sizes: Sizes) -> Any:
    """A Llama of the sizes' shape."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "llama",
        num_hidden_layers=sizes.gpu_layers,
        hidden_size=sizes.gpu_hidden,
        intermediate_size=sizes.gpu_hidden * 7 // 2,
        num_attention_heads=sizes.gpu_heads,
        num_key_value_heads=sizes.gpu_heads // 4,
        vocab_size=sizes.gpu_vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def operations(sizes: Sizes) -> float:
    """Of a token, forward and backward of a LoRA step, whose labels are a quarter of the tokens."""
    config = config_of(sizes)
    counts = measure_sizes(config, AdapterConfig(**ADAPTER), torch.bfloat16, 0, is_packed=True)
    head = 4.0 * config.vocab_size * config.hidden_size
    return operations_per_token(counts, sizes.gpu_length, checkpointing=False) - 0.75 * head


def tokens_of(sizes: Sizes) -> tuple[list[int], list[int]]:
    """(prompt, response) of every sequence: three quarters and a quarter of it."""
    return [5] * (sizes.gpu_length * 3 // 4), [7] * (sizes.gpu_length - sizes.gpu_length * 3 // 4)


def _model(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_of(sizes), dtype=dtype)


def _found(sizes: Sizes, seconds: list[float], peak: int) -> dict[str, float]:
    rate = sizes.gpu_rows * sizes.gpu_length / statistics.median(seconds[1:])
    return {"tokens_per_second": rate, "peak_bytes": float(peak)}


def ours(sizes: Sizes, folder: Path, base: str) -> dict[str, Any]:
    """The product's own step on its own engine: packed rows; `base` is plain or nf4.

    Without gradient checkpointing, whose second forward counts for nothing in model FLOP utilisation: it takes away a
    quarter of what could be reached.
    """
    import deepspeed

    from ssgen_ds.data.window import Packing, Sequence, build_window
    from ssgen_ds.distributed.process_group import process_group
    from ssgen_ds.modeling.adapters import apply_adapter
    from ssgen_ds.modeling.optimizer import build_optimizer
    from ssgen_ds.recipe.deepspeed import build_ds_config
    from ssgen_ds.training.step import train_step

    recipe = recipe_of({"train": "-"}, sizes, folder, adapter=ADAPTER, deepspeed="ds_configs/zero0.json")
    with process_group(recipe.recovery) as world:
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        model = _model(sizes, world.device, dtype)
        if base == "nf4":
            quantize(model, dtype)
        model = apply_adapter(model, recipe.adapter, None, 0)
        settings = build_ds_config(recipe, 1, str(dtype).removeprefix("torch."))
        optimizer = build_optimizer(model, recipe.train, settings)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        engine.train()
        prompt, response = tokens_of(sizes)
        sequence = Sequence(prompt + response, [-100] * len(prompt) + response)
        window = build_window([sequence] * sizes.gpu_rows, Packing(sizes.gpu_rows, None, True), 0, 1, world.device)
        seconds = []
        world.memory.take()
        for _ in range(sizes.gpu_steps):
            begin = time.perf_counter()
            train_step(engine, window, 1e-4, world)
            _wait()
            seconds.append(time.perf_counter() - begin)
        # The step notes its peak by phase, and resets torch's at each.
        return _found(sizes, seconds, max(world.memory.take().values()))


def quantize(model: Any, dtype: torch.dtype) -> None:
    """Put nf4 layers in the place of all Linear layers but the output head."""
    import bitsandbytes as bnb

    from ssgen_ds.modeling.nf4 import nf4_layers, nf4_settings, replace_linears

    weights = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    replace_linears(model, nf4_settings(True, dtype))
    names = {layer: name for name, layer in model.named_modules()}
    for layer in nf4_layers(model):
        weight, like = weights.pop(names[layer]), layer.weight
        layer.weight = bnb.nn.Params4bit(
            weight.detach(),
            requires_grad=False,
            compress_statistics=like.compress_statistics,
            quant_type=like.quant_type,
            quant_storage=like.quant_storage,
        ).to(weight.device)


def trl(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """The same rows, adapter and dtype through TRL's SFTTrainer."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    on_gpu = torch.cuda.is_available()
    model = _model(sizes, torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32)
    prompt, response = tokens_of(sizes)
    row = {"input_ids": prompt + response, "completion_mask": [0] * len(prompt) + [1] * len(response)}
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            _begin()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            _wait()
            seconds.append(time.perf_counter() - self.begin)

    settings = SFTConfig(
        output_dir=str(folder / "trl-gpu"), per_device_train_batch_size=sizes.gpu_rows, max_steps=sizes.gpu_steps,
        learning_rate=1e-4, lr_scheduler_type="constant", max_length=None, completion_only_loss=True, packing=False,
        gradient_checkpointing=False, bf16=on_gpu, use_cpu=not on_gpu, save_strategy="no", report_to="none",
        disable_tqdm=True, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list([row] * (sizes.gpu_rows * sizes.gpu_steps)),
        # It asks for one, and has nothing to do for it.
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")),
            unk_token="<unk>",
            eos_token="</s>",
            pad_token="</s>",
        ),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=ADAPTER["rank"], lora_alpha=ADAPTER["alpha"], target_modules="all-linear"
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    return _found(sizes, seconds, peak_bytes())


def _begin() -> None:
    """From here on the peak counts: building a model of random weights is no part of it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table_row(sides: dict[str, dict[str, float]], per_token: float, card: str) -> dict[str, Any]:
    """The row from what ours, qlora and trl found on this card."""
    mfu = {name: utilisation(per_token, side["tokens_per_second"], card) for name, side in sides.items()}
    gib = {name: side["peak_bytes"] / 2**30 for name, side in sides.items()}
    checks = {
        "MFU >= 45 %": mfu["ours"] is not None and mfu["ours"] >= 0.45,
        "peak memory below TRL's": gib["ours"] < gib["trl"],
    }

    def figures(name: str, label: str) -> dict[str, float]:
        known = {} if mfu[name] is None else {f"{label}MFU": mfu[name]}
        return known | {f"{label}tokens/s": sides[name]["tokens_per_second"], f"{label}peak GiB": gib[name]}

    return {
        "ours": figures("ours", "") | figures("qlora", "QLoRA "),
        "peer": figures("trl", "TRL "),
        "ratio": {
            "tokens/s": sides["ours"]["tokens_per_second"] / sides["trl"]["tokens_per_second"],
            "peak memory": gib["ours"] / gib["trl"],
        },
        "checks": checks,
        "holds": all(checks.values()),
        "details": {"card": card, "operations": per_token, **sides},
    }
