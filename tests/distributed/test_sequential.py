"""Finished runs against the method written once more, token by token in plain transformers: `support/sequential.py`.

The product's round files (coins, contexts, drafts, cuts, rewrites, targets), its metrics and its weights after every
step, over methods and settings. It has batches, a cache, parallel passes, DeepSpeed; the reference has nothing.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ssgen_ds.distributed.world import World
from tests.support.rank_runs import trained, zero
from tests.support.ranks import ranks
from tests.support.sequential import Record, Sequential
from tests.support.tiny_models import tiny_model
from tests.support.tiny_runs import WORDS, tiny_recipe

STEPS = 5  # of 3 + 3: the third holds two examples, the last two visit examples again
REWRITE = {"target": "rewrite", "metric": "f1", "rewrite_cue": "use {reference}", "correction_cue": "fix"}
_CUT = {"cut": "uniform", "max_draft_tokens": 6, "correction_cue": "fix"}
_PLAIN = {"train__clip": 0.0, "train__weight_decay": 0.0}

SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {
        "method__name": "sft",
        **{"train__schedule": "cosine", "train__warmup": 2, "train__betas": [0.8, 0.95], "deepspeed": 0},
    },
    "bss": {
        "method": {"name": "bss", "bss": {"mix_rate": 0.6, "schedule": "linear", "temperature": 0.7, "top_k": 5}},
        **{"selfgen__batch": 3, "train__micro_batch": 3, "deepspeed": 2},
    },
    "bss-common": {
        "method": {"name": "bss", "bss": {"mix_rate": 0.5, "schedule": "cosine", "top_p": 0.7}},
        **{"selfgen__noise": "common", "selfgen__refresh_every": 1, "selfgen__block": 1, "deepspeed": 3},
        **{"train__schedule": "linear"},
    },
    "bss-greedy": {
        "method": {"name": "bss", "bss": {"mix_rate": 0.8, "temperature": 0.0}},
        **{"selfgen__refresh_every": 3, "data__packing": True, "deepspeed": 1, **_PLAIN},
    },
    "rac": {
        "method": {"name": "rac", "rac": {**_CUT, "correction_weight": 0.5, "temperature": 1.3, "top_k": 9}},
        **{"selfgen__block": 3, "deepspeed": 3},
    },
    "bss+rac": {
        "method": {
            "name": "bss+rac",
            "bss": {"mix_rate": 0.4, "schedule": "inverse_sigmoid"},
            "rac": {**REWRITE, **_CUT, "top_p": 0.9},
        },
        **{"selfgen__refresh_every": 3, "train__micro_batch": 1, "deepspeed": 0},
    },
    "bss+rac-lora": {
        "method": {"name": "bss+rac", "bss": {"mix_rate": 0.3}, "rac": {**REWRITE, "correction_weight": 2.0}},
        **{"selfgen__noise": "common", "adapter": {"kind": "lora", "rank": 4}, "deepspeed": 2},
    },
}


def inputs_of(folder: Path) -> None:
    """`folder/words`: a model that speaks in whole words, so that its answers can be scored, and 8 rows for it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    there = folder / "words"
    if (there / "train.jsonl").is_file():
        return
    tokens = [*("<unk>", "<s>", "</s>", "\n\n", "fix", "use"), *WORDS, *(f" {word}" for word in WORDS)]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("\n\n| ?[a-z]+|[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(there / "llama")
    tiny_model("llama", vocab_size=len(tokens) + 6).save_pretrained(there / "llama")  # 6 ids that no text has
    rng = random.Random(3)
    with (there / "train.jsonl").open("w", encoding="utf-8") as file:
        for i, length in enumerate((1, 2, 3, 4, 5, 6, 8, 14)):  # the last is cut: it has no end
            words = rng.choices(WORDS, k=length)
            row = {"id": f"row-{i}", "prompt": " ".join(reversed(words[:5])), "completion": " ".join(words)}
            file.write(json.dumps(row) + "\n")


def train(world: World, folder: Path, name: str) -> Path:
    """A short run with a checkpoint after every step."""
    settings = dict(SETTINGS[name])
    stage = settings.pop("deepspeed")
    overrides = {
        **{"train__max_steps": STEPS, "train__global_batch": 3, "train__seed": 7, "train__lr": 3e-3},
        **{"train__clip": 0.5, "train__weight_decay": 0.1, "data__max_response_tokens": 12},
        **{"checkpoint__every": 1, "checkpoint__keep": STEPS, "deepspeed": zero(stage)},
        **settings,
    }
    torch.manual_seed(1)  # nothing may depend on the global generator
    return trained(tiny_recipe(folder / "words", folder / "sequential" / name, **overrides), world)


@dataclass
class Run:
    """What a run has left on disk, and the reference at its beginning."""

    folder: Path
    rounds: list[list[Record]]
    metrics: list[dict[str, Any]]
    sequential: Sequential

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        """After `step` steps, as the checkpoint's one shard has them."""
        (shard,) = (self.folder / "checkpoints" / f"step-{step:08d}").glob("shard-*.safetensors")
        with safe_open(shard, framework="pt") as file:
            shapes = {name: shape for name, (_, shape, *_) in json.loads(file.metadata()["fragments"]).items()}
            return {name: file.get_tensor(f"weight:{name}").view(shape) for name, shape in shapes.items()}


def open_run(folder: Path) -> Run:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    files = sorted((folder / "selfgen").glob("round-*.parquet"))
    rounds = [pq.read_table(file).to_pylist() for file in files]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"], dtype=torch.float32).eval()
    if recipe["adapter"]["kind"] == "lora":
        model = with_adapter(model, recipe)
    data = Path(recipe["data"]["train"][0]["path"])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    recorded: dict[tuple[int, int], Record] = {}
    for record in (record for records in rounds for record in records):
        place = sum(step == record["step"] for step, _ in recorded)
        recorded[record["step"], place] = record
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"]["path"])
    return Run(folder, rounds, metrics, Sequential(recipe, rows, tokenizer, model, recorded))


def with_adapter(model: torch.nn.Module, recipe: dict[str, Any]) -> torch.nn.Module:
    """Peft's own, its first weights from the seed."""
    from peft import LoraConfig, get_peft_model

    adapter = recipe["adapter"]
    settings = {"r": adapter["rank"], "lora_alpha": adapter["alpha"], "target_modules": adapter["target_modules"]}
    torch.manual_seed(recipe["train"]["seed"])
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


@pytest.fixture(scope="module")
def runs(world, folder) -> dict[str, Run]:
    inputs_of(folder)
    return {name: open_run(train(world, folder, name)) for name in SETTINGS}


@ranks(1)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_what_the_method_says(runs, name):
    run, reference = runs[name], runs[name].sequential
    steps, every = reference.steps, reference.recipe["selfgen"]["refresh_every"]
    assert len(run.metrics) == steps
    assert len(run.rounds) == (0 if name == "sft" else -(-steps // every))
    before = reference.weights()
    for step in range(steps):
        if step % every == 0 and run.rounds:
            records = reference.round(step // every + 1)
            written = [{key: row[key] for key in records[0]} for row in run.rounds[step // every]]
            assert written == [{**record, "mix_rate": pytest.approx(record["mix_rate"])} for record in records]
        expected = reference.update(step, records if run.rounds else [])
        row = run.metrics[step]
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)
        after = reference.weights()
        found = run.weights(step + 1)
        assert found.keys() == after.keys()
        moved = _norm({key: after[key] - before[key] for key in after})
        assert moved > 0
        # AdamW divides a tiny gradient by its own size, so its rounding shows, which depends on the number of threads.
        assert _norm({key: found[key] - after[key] for key in after}) < 1e-3 * moved
        before = after
    assert reference.ties <= 2


def _norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors.values()]).sum().sqrt())


@ranks(1)
def test_the_runs_hold_what_is_to_be_compared(runs):
    """Else the comparison would be one of nothing."""
    records = {name: [record for records in run.rounds for record in records] for name, run in runs.items()}
    for name, found in records.items():
        if "bss" in name:
            pairs = [(r["coins"], r["mixed_ids"], r["gold_ids"]) for r in found if r["mixed_ids"]]
            assert sum(m != g for _, mixed, gold in pairs for m, g in zip(mixed, gold, strict=True)) >= 5
            assert any(True in coins and False in coins[:-1] for coins, _, _ in pairs)
    cut = records["rac"] + records["bss+rac"]
    assert any(r["draft_kept"] < len(r["draft_ids"]) for r in cut)
    assert {r["draft_stop_id"] for r in cut} == {None, 2}
    rewritten = records["bss+rac"] + records["bss+rac-lora"]
    assert {"rewrite", "reference"} <= {r["target_kind"] for r in rewritten}
    assert {r["visit"] for r in records["bss-common"]} == {0, 1}
    assert len({r["mix_rate"] for r in runs["bss"].rounds[0]}) == 2
    norms = [row["grad_norm"] for row in runs["rac"].metrics]
    assert max(norms) > runs["rac"].sequential.recipe["train"]["clip"]
