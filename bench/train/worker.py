"""One side of one row, in a process of its own: `python -m bench.train.worker SIDE SIZES FOLDER OUT`."""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import time
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from bench.selfgen.measure import peak_memory
from bench.train import gpu
from bench.train.peak import on_gpu, peak_bytes
from bench.train.sizes import Sizes
from bench.train.tasks import TASKS, XSUM, recipe_of
from ssgen_ds.run.logbook import read_rows


@contextmanager
def _trained(recipe: Any) -> Any:
    """The trainer of a recipe; after the block it has been trained and its rows read."""
    from ssgen_ds.distributed.process_group import process_group
    from ssgen_ds.training.build import build_trainer
    from ssgen_ds.training.foundations import lay_foundations

    with process_group(recipe.recovery) as world:
        trainer = build_trainer(lay_foundations(recipe, world), world)
        with trainer.progress:
            trainer.fit()
        yield trainer


def _rows(recipe: Any) -> list[dict[str, Any]]:
    return read_rows(Path(recipe.output_dir, "metrics.jsonl"))


def ours(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """SFT steps on XSum: real tokens a second, peak bytes; and the tokens for the peer."""
    recipe = recipe_of(XSUM, sizes, folder / "ours")
    # The phases' own peaks start the count again; here the whole process counts, as it does for the peer.
    with mock.patch("ssgen_ds.distributed.peak_memory._reset"), _trained(recipe) as trainer:
        batches = [trainer.plan.batch(step) for step in range(1, sizes.steps + 1)]
        examples = [[[item.example.prompt_ids, item.example.response_ids] for item in batch] for batch in batches]
    (folder / "examples.json").write_text(json.dumps(examples), encoding="utf-8")
    rows = _rows(recipe)[sizes.warm_up :]
    rate = statistics.median(row["num_tokens"] / row["step_seconds"] for row in rows)
    return {"tokens_per_second": rate, "peak_bytes": peak_bytes(), "losses": [row["loss"] for row in rows]}


def trl(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """The same tokens through TRL's SFTTrainer with the same DeepSpeed file, no checkpointing, no evaluation."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from ssgen_ds.modeling.load import resolve_dtype
    from ssgen_ds.modeling.model_path import resolve_model_path
    from ssgen_ds.recipe.deepspeed import build_ds_config

    with socket.socket() as probe:  # one rank; DeepSpeed would look for MPI
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    path = resolve_model_path(sizes.model).path
    batches = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    rows = [
        {"input_ids": prompt + response, "completion_mask": [0] * len(prompt) + [1] * len(response)}
        for batch in batches
        for prompt, response in batch
    ]
    tokens = [sum(len(p) + len(r) for p, r in batch) for batch in batches]
    recipe = recipe_of(XSUM, sizes, folder / "trl")
    dtype = resolve_dtype(recipe.model, "cuda" if on_gpu() else "cpu")
    deepspeed = build_ds_config(recipe, 1, str(dtype).removeprefix("torch."))
    deepspeed["zero_force_ds_cpu_optimizer"] = False
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    settings = SFTConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=sizes.batch, max_steps=sizes.steps,
        learning_rate=1e-5, lr_scheduler_type="constant", max_length=None, completion_only_loss=True, packing=False,
        gradient_checkpointing=False, bf16=dtype == torch.bfloat16, use_cpu=not on_gpu(), deepspeed=deepspeed,
        save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True, shuffle_dataset=False,
        dataloader_num_workers=0, max_grad_norm=1.0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # the same batches as the other side

    trainer = InOrder(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(path),
        callbacks=[Clock()],
    )
    trainer.train()
    rates = [count / second for count, second in zip(tokens, seconds, strict=True)][sizes.warm_up :]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][sizes.warm_up :]
    return {"tokens_per_second": statistics.median(rates), "peak_bytes": peak_bytes(), "losses": losses}


def step(sizes: Sizes, folder: Path, task: str, method: str) -> dict[str, Any]:
    """Seconds of a step, generation included, of one method on one task."""
    recipe = recipe_of(
        TASKS[task],
        sizes,
        folder / f"{task}-{method}",
        method={"name": method, "bss": {"mix_rate": 0.25, "schedule": "constant"}},
        train={"max_steps": sizes.bss_steps, "global_batch": sizes.bss_batch, "micro_batch": sizes.batch},
        selfgen={"refresh_every": max(1, sizes.bss_steps // 2)},
    )
    with _trained(recipe):
        pass
    rows = _rows(recipe)[sizes.bss_steps // 2 :]  # the second round: the first one measures calls
    seconds = sum(row["step_seconds"] + row["selfgen_seconds"] for row in rows) / len(rows)
    return {"seconds": seconds, "tokens": sum(row["num_tokens"] for row in rows) / len(rows) / sizes.bss_batch}


def one_gpu(sizes: Sizes, folder: Path, kind: str) -> dict[str, Any]:
    """A side of T3: ours on a plain or a quantised base, or TRL's."""
    return gpu.trl(sizes, folder) if kind == "trl" else gpu.ours(sizes, folder, "nf4" if kind == "qlora" else "plain")


def growth(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Calls for mixed contexts of T tokens, and memory to prepare and read N examples and ten times as many."""
    import torch

    from ssgen_ds.data.datasets import build_store
    from ssgen_ds.data.plan import StepPlan
    from ssgen_ds.data.tokenize import ChatFormat
    from ssgen_ds.modeling.cached import CachedCausalLM
    from ssgen_ds.modeling.load import load_model, load_tokenizer
    from ssgen_ds.recipe.schema import AdapterConfig, DataConfig, ModelConfig
    from ssgen_ds.sampler.filters import Sampling
    from ssgen_ds.sampler.fixed_point import sample_fixed_point
    from ssgen_ds.sampler.requests import Request

    config = ModelConfig(path=sizes.model)
    tokenizer = load_tokenizer(config)
    chat = ChatFormat(tokenizer, DataConfig(train=[]))
    memory: dict[str, float | None] = {}
    for number in sizes.examples:
        file = folder / f"{number}.jsonl"
        file.write_text(
            "".join(json.dumps({"prompt": f"Count {i} " * 20, "completion": f"done {i}"}) + "\n" for i in range(number))
        )
        data = DataConfig(train=[str(file)])
        with peak_memory() as peak:
            plan = StepPlan(build_store(data.train, data, chat, folder / "cache"), 0, 8)
            for step in range(1, 101):
                plan.batch(step)
        memory[str(number)] = peak["mib"]
    model = load_model(config, AdapterConfig(), {}, device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    calls = {}
    xsum = recipe_of(XSUM, sizes, folder / "x").data
    store = build_store(xsum.train, xsum, chat, folder / "cache")
    article = [token for number in range(12) for token in store[number].prompt_ids]
    for length in sizes.lengths:
        gold = article[8 : 8 + length]
        coins = (torch.rand(length, generator=generator) < 0.1).tolist()
        request = Request(article[:8], gold, coins, key=7)
        with torch.no_grad():
            _, stats = sample_fixed_point(CachedCausalLM(model), [request], Sampling(), None, 1)
        calls[str(length)] = stats.calls
    return {"calls": calls, "memory_mib": memory}


SIDES = {"ours": ours, "trl": trl, "step": step, "growth": growth, "gpu": one_gpu}


def main(side: str, sizes: str, folder: str, out: str) -> None:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(sizes).items()}
    with redirect_stdout(sys.stderr):
        name, *arguments = side.split("-")
        found = SIDES[name](replace(Sizes(), **values), Path(folder), *arguments)
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
