"""What is measured, the most telling first. Each item returns what JSON can hold."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.gpu.rig import Rig
from ssgen_ds.data.window import Packing, Sequence, build_window
from ssgen_ds.modeling.cached import CachedCausalLM, inference_mode
from ssgen_ds.modeling.decode_step import record_cuda
from ssgen_ds.modeling.pieces import Piece
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.fixed_point import sample_fixed_point

Found = dict[str, Any]


def checks(rig: Rig) -> Found:
    """What training asks of a model before it begins, and tokens of bfloat16 calls of other widths."""
    from ssgen_ds.modeling.cache_check import check_cache
    from ssgen_ds.modeling.loss import check_loss

    module = rig.engine.module
    with inference_mode(module):
        check_loss(module, is_packed=True)
        check_cache(module, rig.sizes.prompt + rig.sizes.response)
        some = rig.requests(min(8, rig.sizes.requests), 0.1)
        texts = {}
        for name, block in (("1", 1), ("all", None)):
            model = CachedCausalLM(module, device=rig.world.device)
            results, _ = sample_fixed_point(model, some, Sampling(), block)
            texts[name] = [token for result in results for token in result.tokens]
    same = sum(a == b for a, b in zip(texts["1"], texts["all"], strict=True))
    return {"packed loss": "as padded", "cache": "as plain", "tokens": len(texts["1"]), "same at W=1 and W=all": same}


def partitioned(rig: Rig) -> Found:
    """ZeRO-3 on this one GPU: tokens of a small model, gathered and sharded, against whole parameters."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    from ssgen_ds.modeling.shards import Shards
    from ssgen_ds.sampler.engine import BatchLimit, EngineSampler
    from ssgen_ds.sampler.strategy import Gathered, Local, Sharded

    shape = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", **shape, num_key_value_heads=2, vocab_size=rig.sizes.vocabulary)
    torch.manual_seed(0)
    with torch.device(rig.world.device):
        whole = AutoModelForCausalLM.from_config(config, dtype=rig.dtype).eval()
    some, limit = rig.requests(4, 0.2), BatchLimit(4)
    expected, _, _ = EngineSampler(whole, rig.world, limit, Local()).sample(some, Sampling(), 4)
    settings = {"train_batch_size": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    settings["bf16"] = {"enabled": rig.dtype == torch.bfloat16}
    engine, *_ = deepspeed.initialize(
        model=whole,
        optimizer=torch.optim.AdamW(whole.parameters()),
        config={**settings, "zero_allow_untested_optimizer": True},
    )
    shards = Shards(engine.module, engine.optimizer.parameter_offload)
    found: Found = {"tokens": sum(len(one.tokens) for one in expected)}
    for strategy in (Gathered(shards), Sharded(shards, rig.world)):
        results, _, _ = EngineSampler(engine.module, rig.world, limit, strategy).sample(some, Sampling(), 4)
        pairs = [
            (a, b)
            for one, two in zip(results, expected, strict=True)
            for a, b in zip(one.tokens, two.tokens, strict=False)
        ]
        found[f"same when {strategy.name}"] = sum(a == b for a, b in pairs)
    engine.destroy()
    return found


def micro_batch(rig: Rig) -> Found:
    """What `auto` takes, a step of it, and its peaks beside the plan's."""
    from ssgen_ds.distributed.host_memory import free_bytes
    from ssgen_ds.training.micro_batch import choose_packing
    from ssgen_ds.training.step import train_step

    said: list[str] = []
    longest = rig.sizes.prompt + rig.sizes.response
    free = free_bytes(rig.world)
    packing, _ = choose_packing(rig.engine, rig.recipe, longest, rig.world, said.append)
    window = build_window([_sequence(rig)] * rig.sizes.batch, packing, 0, 1, rig.world.device)
    rig.world.memory.take()
    stats = train_step(rig.engine, window, 1e-4, rig.world)
    peaks = rig.world.memory.take()
    return {
        "free bytes before": free,
        "sequences": packing.sequences,
        "of": rig.sizes.batch,
        "said": said,
        "loss is finite": math.isfinite(stats.loss),
        "peak bytes": peaks,
        "planned bytes": _planned(rig, packing.sequences),
    }


def _planned(rig: Rig, sequences: int) -> dict[str, float]:
    from ssgen_ds.plan.memory import plan_memory
    from ssgen_ds.plan.run import Hardware, setting_of
    from ssgen_ds.plan.sizes import measure

    total = torch.cuda.get_device_properties(0).total_memory if rig.world.device.type == "cuda" else 8e9
    hardware = Hardware(int(rig.world.device.type == "cuda"), 1, total, "", True)
    setting, _ = setting_of(rig.recipe, hardware, str(rig.dtype).removeprefix("torch."))
    tokens = sequences * (rig.sizes.prompt + rig.sizes.response)
    setting = replace(setting, micro_tokens=tokens, labels=sequences * rig.sizes.response)
    plan = plan_memory(measure(rig.config, rig.recipe.adapter, rig.dtype, 0, is_packed=True), setting)
    return {phase: plan.peak(phase) for phase in plan.phases}


def _sequence(rig: Rig) -> Sequence:
    prompt, response = [5] * rig.sizes.prompt, [7] * rig.sizes.response
    return Sequence(prompt + response, [-100] * len(prompt) + response)


def lora_step(rig: Rig) -> Found:
    """Tokens a second, model FLOP utilisation and peak of a LoRA step, with and without gradient checkpointing."""
    from bench.train.gpu import utilisation
    from ssgen_ds.plan.sizes import measure
    from ssgen_ds.plan.timing import operations_per_token
    from ssgen_ds.training.step import train_step

    counts = measure(rig.config, rig.recipe.adapter, rig.dtype, 0, is_packed=True)
    length = rig.sizes.prompt + rig.sizes.response
    operations = operations_per_token(counts, length, checkpointing=False)
    card = torch.cuda.get_device_name() if rig.world.device.type == "cuda" else "cpu"
    base, found = rig.engine.module.get_base_model(), {"card": card, "operations a token": operations}
    window = build_window(
        [_sequence(rig)] * rig.sizes.rows, Packing(rig.sizes.rows, None, True), 0, 1, rig.world.device
    )
    for name in ("with checkpointing", "without checkpointing"):
        if name == "without checkpointing":
            base.gradient_checkpointing_disable()
        rig.world.memory.take()
        seconds = rig.seconds(lambda: train_step(rig.engine, window, 1e-4, rig.world), rig.sizes.steps)
        rate = rig.sizes.rows * length / seconds
        peak = max(rig.world.memory.take().values())
        found[name] = {"tokens/s": rate, "peak bytes": peak, "MFU": utilisation(operations, rate, card)}
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return found


def calls(rig: Rig) -> Found:
    """Seconds of calls by tokens fed, by rows, of one token a row, and of a row that comes in among others."""
    module, sizes, found = rig.engine.module, rig.sizes, {}
    with torch.no_grad(), inference_mode(module):
        for rows in sizes.call_rows:
            decoding = [Piece(row, sizes.prompt, [5], [0]) for row in range(rows)]
            found[f"{rows} rows, one token each"] = _timed(rig, rows, decoding)
            with module.disable_adapter():
                found[f"{rows} rows, one token each, no adapter"] = _timed(rig, rows, decoding)
            for fed in sizes.fed:
                if fed >= 2 * rows:
                    width = fed // rows
                    pieces = [Piece(row, sizes.prompt, [5] * width, [width - 1]) for row in range(rows)]
                    found[f"{rows} rows, {width} tokens each"] = _timed(rig, rows, pieces)
            coming = [*decoding[:-1], Piece(rows - 1, 0, [5] * sizes.prompt, [sizes.prompt - 1])]
            found[f"{rows} rows, one of them a prompt of {sizes.prompt}"] = _timed(rig, rows, coming)
    return found


def _timed(rig: Rig, rows: int, pieces: list[Piece]) -> float:
    model = CachedCausalLM(rig.engine.module, device=rig.world.device)
    model.open(rows, max(piece.end for piece in pieces))
    return rig.seconds(lambda: model(pieces))


def contexts(rig: Rig) -> Found:
    """A BSS round at several W, and at what `block: auto` chooses."""
    from ssgen_ds.sampler.block import BlockChooser, block_name

    said: list[str] = []
    chooser = BlockChooser("auto", rig.sampler, rig.sizes.vocabulary, said.append)
    some, found = rig.requests(rig.sizes.requests, 0.1), {}
    with rig.sampler.ready():
        chosen = chooser.mixing(some)
        texts = None
        for block in dict.fromkeys((chosen, 1, 4, 8, 16, None)):
            results, stats, seconds = rig.sampler.sample(some, Sampling(), block)
            tokens = [token for result in results for token in result.tokens]
            texts = tokens if texts is None else texts
            same = sum(a == b for a, b in zip(texts, tokens, strict=True))
            found[block_name(block)] = {
                "seconds": seconds,
                "calls": stats.calls,
                "same tokens": same,
                "of": len(tokens),
            }
    return {"auto": block_name(chosen), "said": said, "limit": asdict(rig.sampler.limit), "by W": found}


def drafts(rig: Rig) -> Found:
    """Free decoding of as many rows as fit, by plain calls and by CUDA graphs of them."""
    from ssgen_ds.sampler.free import free_request

    some = [
        free_request(one.prompt_ids, rig.sizes.draft, one.key, frozenset())
        for one in rig.requests(rig.sizes.requests, 0.1)
    ]
    found: Found = {}
    texts = []
    for name, record in (("plain", None), ("graphs", record_cuda)):
        if record is not None and rig.world.device.type != "cuda":
            continue
        results, stats, seconds = replace(rig.sampler, record=record).sample(some, Sampling(), 1)
        texts.append([token for result in results for token in result.tokens])
        same = sum(a == b for a, b in zip(texts[0], texts[-1], strict=True))
        rate = len(some) * rig.sizes.draft / seconds
        found[name] = {"seconds": seconds, "calls": stats.calls, "tokens/s": rate, "same tokens": same}
    return found


def profile(rig: Rig) -> Found:
    """Kernels of a call of each kind, how long the device was busy in it, and what took longest."""
    on_gpu = rig.world.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    module, sizes, rows = rig.engine.module, rig.sizes, rig.sizes.call_rows[-1]
    kinds = {
        "one token a row": [Piece(row, sizes.prompt, [5], [0]) for row in range(rows)],
        "eight tokens a row": [Piece(row, sizes.prompt, [5] * 8, [7]) for row in range(rows)],
        "a prompt": [Piece(0, 0, [5] * sizes.prompt, [sizes.prompt - 1])],
    }
    found = {}
    with torch.no_grad(), inference_mode(module):
        for name, pieces in kinds.items():
            model = CachedCausalLM(module, device=rig.world.device)
            model.open(rows, sizes.prompt + 8)
            model(pieces)
            rig.wait()
            with torch.profiler.profile(activities=activities) as seen:
                begin = time.perf_counter()
                model(pieces)
                rig.wait()
                seconds = time.perf_counter() - begin
            events = [event for event in seen.events() if not on_gpu or event.device_type.name == "CUDA"]
            busy: dict[str, float] = {}
            for event in events:
                busy[event.name] = busy.get(event.name, 0.0) + (event.device_time if on_gpu else event.cpu_time) / 1e6
            top = sorted(busy.items(), key=lambda item: -item[1])[:10]
            share = sum(busy.values()) / seconds if on_gpu else None
            found[name] = {"seconds": seconds, "kernels": len(events), "busy share": share, "top": dict(top)}
    return found


ITEMS: dict[str, Callable[[Rig], Found]] = {
    "checks": checks,
    "micro_batch": micro_batch,
    "lora_step": lora_step,
    "calls": calls,
    "contexts": contexts,
    "drafts": drafts,
    "profile": profile,
    "partitioned": partitioned,  # last: DeepSpeed leaves its own linear function behind
}
