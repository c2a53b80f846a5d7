"""What goes into a run on two ranks, what is refused on all of them, and what comes out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from ssgen_ds.errors import UserError
from ssgen_ds.modeling.export import save_model
from ssgen_ds.run.layout import ATTEMPTS_FILE
from ssgen_ds.train import fit_and_export
from tests.support.rank_runs import column, fresh, refusal, rows_of, trained, trainer_for, zero
from tests.support.ranks import ranks
from tests.support.tiny_runs import tiny_recipe


@ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_exported_model_gives_the_engines_logits(world, folder, adapter, stage):
    """`model/` loads with transformers or peft as it is."""
    recipe = fresh(folder, f"export-{adapter}-{stage}", world, adapter__kind=adapter, deepspeed=zero(stage))
    trainer = trainer_for(recipe, world)
    with trainer.progress:
        trainer.fit()
    module = trainer.engine.module.eval()
    ids = torch.tensor([[5, 9, 30, 40, 41, 42]])
    with torch.no_grad():
        expected = module(input_ids=ids).logits
    out = Path(recipe.output_dir) / "model"
    tokenizer = trainer.generator.chat.tokenizer
    save_model(module, tokenizer, out, recipe.model.path, is_main=world.is_main)
    world.barrier()
    loader = AutoPeftModelForCausalLM if adapter == "lora" else AutoModelForCausalLM
    if world.is_main:
        with torch.no_grad():
            loaded = loader.from_pretrained(out, dtype=torch.float32).eval()(input_ids=ids).logits
        assert (loaded - expected).abs().max().item() < 1e-5


@ranks(2)
@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        pytest.param({"data__train": "missing.jsonl"}, ["data.train: no such file: missing.jsonl"], id="file"),
        pytest.param(
            {"data__columns": {"completion": "answr"}},
            ["train.jsonl:1", "'answr'", "prompt, completion"],
            id="column",
        ),
        pytest.param({"data__train": "{folder}/empty.jsonl"}, ["empty.jsonl"], id="empty"),
        pytest.param(
            {"data__columns": {"completion": "blank"}, "data__ignore_fields": []},
            ["train.jsonl:1", "response"],
            id="masked",
        ),
        pytest.param({"model__path": "./no-such-model"}, ["model.path: ./no-such-model"], id="model"),
        pytest.param({"data__max_prompt_tokens": 4000}, ["data.max_prompt_tokens", "256 positions"], id="context"),
        pytest.param({"deepspeed": "ds_configs/zero9.json"}, ["deepspeed: no such file", "zero3.json"], id="ds"),
    ],
)
def test_bad_input_is_refused_on_all_ranks(world, folder, overrides, parts):
    """With the same message, before a row of metrics is written."""
    if world.is_main:
        (folder / "empty.jsonl").write_text("")
    world.barrier()
    train = overrides.get("data__train")
    placed = {"data__train": train.format(folder=folder)} if train else {}
    with pytest.raises(UserError) as error:
        fit_and_export(fresh(folder, "refused", world, **overrides | placed), world)
    messages = world.gather(str(error.value))
    assert len(set(messages)) == 1, messages
    assert not (folder / "ranks2" / "refused" / "metrics.jsonl").exists()
    for part in parts:
        assert part in messages[0]


@ranks(2)
def test_another_runs_folder_is_left_alone(world, folder):
    """Another recipe in the folder of a finished run, or `resume: never`: refused, and nothing is overwritten."""
    recipe = fresh(folder, "owner", world)
    run = trained(recipe, world)
    files = _contents_and_times(run)
    changed = tiny_recipe(folder, run, adapter__rank=4, train__lr=0.5, method__name="bss")
    message = refusal(changed, world)
    assert "train.lr: 0.01 -> 0.5" in message
    assert "method.name: 'sft' -> 'bss'" in message
    assert "resume is never" in refusal(tiny_recipe(folder, run, adapter__rank=4, resume="never"), world)
    trained(recipe, world)  # finished: says so, touches nothing
    assert files == _contents_and_times(run)


def _contents_and_times(run_dir: Path) -> dict[str, tuple[str, int]]:
    """Of all files; attempts.jsonl has no time: a start is noted there before it is refused, and then taken back."""
    return {
        str(path): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns if path.name != ATTEMPTS_FILE else 0,
        )
        for path in run_dir.rglob("*")
        if path.is_file()
    }


def write_conversations(folder: Path) -> None:
    """`chat.jsonl`, 8 conversations of two answers, and `chat.jinja`, their template."""
    turns = [
        {"role": "user", "content": "sun"},
        {"role": "assistant", "content": "moon"},
        {"role": "user", "content": "cat"},
    ]
    rows = [{"messages": [*turns, {"role": "assistant", "content": f"dog {i}"}]} for i in range(8)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (folder / "chat.jinja").write_text(template)


@ranks(2)
def test_weighted_mixture_of_conversations(world, folder):
    """8 x 2 + 26 examples in windows of 6 are 7 steps an epoch, the last whole; evaluated every 4 and at the end."""
    if world.is_main:
        write_conversations(folder)
    world.barrier()
    run = trained(
        fresh(
            folder,
            "mixture",
            world,
            method__name="bss+rac",
            deepspeed=zero(3),
            data__train=[{"path": str(folder / "chat.jsonl"), "weight": 2.0}, {"path": str(folder / "train.jsonl")}],
            data__eval=str(folder / "train.jsonl"),
            data__chat_template=str(folder / "chat.jinja"),
            data__loss_on="all",
            train__max_steps=None,
            train__epochs=2,
            eval__every=4,
        ),
        world,
    )
    assert len(column(run, "step")) == 14
    assert column(run, "epoch") == [0] * 7 + [1] * 7
    losses = [row.get("eval_loss") for row in rows_of(run)]
    assert [i + 1 for i, loss in enumerate(losses) if loss is not None] == [4, 8, 12, 14]
    found = [loss for loss in losses if loss is not None]
    assert found[-1] < found[0]
