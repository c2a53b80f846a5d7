"""Counts and bytes against hand-worked values, advice, and the recipes for hardware that is not here."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig
from typer.testing import CliRunner

from ssgen_ds.cli import app
from ssgen_ds.distributed.host_memory import GIB
from ssgen_ds.errors import UserError
from ssgen_ds.plan.memory import Setting, plan_memory
from ssgen_ds.plan.run import Hardware, advise, fits, longest_rows, offload_problems, parse_size, plan_recipe
from ssgen_ds.plan.sizes import Sizes, measure
from ssgen_ds.plan.timing import Rate, Work, operations_per_token, seconds
from ssgen_ds.recipe.load import load_recipe
from ssgen_ds.recipe.schema import AdapterConfig
from tests.support.shipped_recipes import EVERY, RECIPES
from tests.support.tiny_models import FAMILIES, save_tiny_model, tiny_config, tiny_model
from tests.support.tiny_runs import tiny_recipe

FOR_GPUS = [path for path in EVERY if path not in RECIPES]
SIZES = Sizes(
    parameters=1000, trained=1000, adapter=0, quantizable=600, small=20, largest_unit=300, layers=3, hidden=8,
    vocabulary=50, activations=700.0, layer_activations=200.0, widest=16, cache=96,
)  # fmt: skip
SETTING = Setting(
    stage=0, ranks=1, element=2, is_mixed=True, adapter_element=2, gradient_element=2, nf4=False, double=True,
    moments=8.0, offload_optimizer=False, offload_param=False, checkpointing=False, micro_tokens=10, accumulates=True,
    labels=4, rows=5, row_tokens=7, strategy="auto", generates=True, reduce_bucket=400, live=500, memory=1e5,
    overhead=0.0,
)  # fmt: skip


def parts(phase: str, sizes: Sizes = SIZES, **changes) -> dict[str, float]:
    return plan_memory(sizes, replace(SETTING, **changes)).phases[phase]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family):
    sizes = measure(tiny_config(family), AdapterConfig(), torch.float32, 100, is_packed=True)
    model = tiny_model(family)
    assert sizes.parameters == sizes.trained == sum(p.numel() for p in model.parameters())
    assert sizes.small == sum(p.numel() for p in model.parameters() if p.numel() < 100)
    lora = measure(tiny_config(family), AdapterConfig(kind="lora", rank=2), torch.float32, 100, is_packed=False)
    assert lora.parameters == sizes.parameters
    assert 0 < lora.trained == lora.adapter < sizes.parameters
    assert sizes.layer_activations > 0


def test_states_by_stage():
    """1000 parameters in bfloat16: 2000 bytes of weights, 4000 of masters, 8000 of moments, 2000 of gradients."""
    one = parts("train")
    assert (one["weights"], one["masters"], one["moments"], one["gradients"]) == (2000, 4000, 8000, 6000)
    two = {stage: parts("train", stage=stage, ranks=4) for stage in (1, 2, 3)}
    assert [(p["masters"], p["moments"]) for p in two.values()] == [(1000, 2000)] * 3
    assert [p["gradients"] for p in two.values()] == [2000, 500, 500]
    assert [p["bucket"] for p in two.values()] == [0, 1600, 800]  # 400 elements; ZeRO-2 has two
    assert two[3]["weights"] == (2000 - 40) / 4 + 40
    assert two[3]["gathered"] == 1000  # 500 of 1000 elements
    eight = parts("train", moments=2.0 + 8 / 256)
    assert eight["moments"] == 2031.25
    plain = parts("train", is_mixed=False, element=4, gradient_element=4)
    assert (plain["masters"], plain["gradients"]) == (0, 4000)


def test_a_quantised_base():
    """600 weights at half a byte, a byte of scale for 64 of them and four for 256 of these; the rest as it is."""
    sizes = replace(SIZES, trained=30, adapter=30)
    weights = parts("train", sizes, nf4=True)["weights"]
    assert weights == 400 * 2 + 30 * 2 + 300 + 600 * (1 / 64 + 4 / 64 / 256)
    assert parts("train", sizes, nf4=True, double=False)["weights"] == 860 + 300 + 600 * 4 / 64


def test_offloaded_states_are_on_the_host():
    plan = plan_memory(SIZES, replace(SETTING, stage=3, ranks=2, offload_optimizer=True, offload_param=True))
    assert plan.host == {"masters": 2000, "moments": 4000, "gradients": 2000, "weights": (2000 - 40) / 2 + 40}
    assert plan.phases["optimizer"]["moments"] == 0
    assert plan.phases["train"]["weights"] == 0


def test_activations_and_logits():
    kept = parts("train")
    assert kept["activations"] == 7000
    assert parts("train", checkpointing=True)["activations"] == 10 * (3 * 8 * 2 + 200 + 100)
    assert kept["logits"] == 4 * 50 * (4 + 8) + 4 * 8 * 2  # four labels, a chunk of all of them
    first = parts("train", accumulates=False)
    assert first["gradients"] == 0  # they take the place of activations that are let go


def test_generation_takes_what_is_free():
    """Resident 14000 of 100000 bytes, 4000 for gradients to come; a row has 7 tokens of 96 bytes. Of what is free then
    .4 go to the cache and .2 to the activations of a call, (3 * 16 + 4 * 8) * 2 bytes a token."""
    free = parts("generate")
    assert (free["cache"], free["activations"]) == (5 * 7 * 96, 5 * 7 * 160)
    tight = plan_memory(SIZES, replace(SETTING, memory=14000 + 4000 + 2 * 7 * 96 / 0.4 + 40.0))
    assert tight.phases["generate"]["cache"] == 2 * 7 * 96
    many = plan_memory(SIZES, replace(SETTING, rows=200, memory=18000 + 70 * 160 / 0.2 + 40.0))
    assert many.call.tokens == 70 < many.cache_rows * 7
    assert many.phases["generate"]["activations"] == 70 * 160
    sharded = plan_memory(SIZES, replace(SETTING, stage=3, ranks=4, memory=5000.0))
    assert (sharded.strategy, sharded.phases["generate"]["gathered"]) == ("sharded", 2 * 300 * 2)
    gathered = plan_memory(SIZES, replace(SETTING, stage=3, ranks=4))
    assert (gathered.strategy, gathered.phases["generate"]["gathered"]) == ("gathered", 2000)


def test_what_one_forward_records_is_counted_where_it_is_used():
    """Three layers of eight elements in bfloat16: 48 bytes a token. .15 of 82000 free bytes may be taken."""
    some = plan_memory(SIZES, replace(SETTING, recorded_tokens=250))
    assert some.phases["generate"]["recorded"] == some.phases["train"]["recorded"] == 250 * 48
    assert "recorded" not in plan_memory(SIZES, replace(SETTING, recorded_tokens=260)).phases["train"]
    assert "recorded" not in plan_memory(SIZES, SETTING).phases["train"]


@pytest.mark.parametrize(
    ("overrides", "records"),
    [
        ([], True),
        (["selfgen.refresh_every=2"], False),
        (["selfgen.reuse=off"], False),
        (["method.name=bss+rac"], False),
        (["data.packing=false"], False),
        (["deepspeed=ds_configs/zero3.json"], False),
    ],
)
def test_only_a_step_that_may_be_recorded_is_counted(overrides, records):
    asked = ["data.train=x", "method.name=bss", "selfgen.refresh_every=1", "data.packing=true"]
    recipe = load_recipe("recipes/llama8b_lora_24gb.yaml", [*asked, *overrides])
    _, _, setting = plan_recipe(recipe, Hardware(1, 1, 80e9, "", False))
    assert (setting.recorded_tokens > 0) == records


def test_a_cpu_generates_sixteen_rows_at_once_unless_each_call_gathers():
    many = {"rows": 64, "memory": 1e9}
    assert plan_memory(SIZES, replace(SETTING, **many, is_cpu=True)).cache_rows == 16
    assert plan_memory(SIZES, replace(SETTING, **many)).cache_rows == 64
    sharded = replace(SETTING, **many, is_cpu=True, stage=3, ranks=2, strategy="sharded")
    assert plan_memory(SIZES, sharded).cache_rows == 64


def test_seconds():
    """600 parameters beside the embedding's 400: 6 x 600 operations a token and attention's 12 x 3 x 8 x 10."""
    assert operations_per_token(SIZES, 10.0, False) == 6 * 600 + 12 * 240
    assert operations_per_token(SIZES, 10.0, True) == 8 * 600 + 16 * 240
    lora = replace(SIZES, trained=30, adapter=30)
    assert operations_per_token(lora, 10.0, False) == 4 * 600 + 6 * 30 + 8 * 240
    work = Work(100, 10.0, 20.0, 8, 0.25, 0, 2, 4, 2, False, 2)
    found = seconds(SIZES, work, Rate(1e3, 1e3, ""))
    assert found["step"] == 100 * (6 * 600 + 12 * 240) / 1e3 / 2
    # 16 sequences in two batches a rank: the prompt, then 5 coins' calls that read 2000 bytes, or 80 tokens' operations
    assert found["round"] == 2 * (4 * 10 * 1.2 + max(5 * 2.0, 80 * 1.2))


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("80GB", 80e9), ("16g", 16 * GIB), ("500 MiB", 500 * 2**20), ("2t", 2 * 2**40)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


def test_a_size_that_is_none_is_refused():
    with pytest.raises(UserError, match="'much' is no size of memory such as 24GiB"):
        parse_size("much")


def commands(path: Path) -> list[str]:
    lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    (found,) = [line for line in lines if line.startswith("ssgen plan ")]
    return shlex.split(found)[1:]


def test_the_recipes_for_gpus_are_counted():
    paper = {f"{task}_{method}" for task in ("tldr", "ultrachat", "gsm8k", "math") for method in ("bss", "rac")}
    ours = {"llama8b_lora_24gb", "qwen7b_qlora_12gb", "llama8b_full_8gpu", "llama70b_lora_nodes"}
    assert {path.stem for path in FOR_GPUS} == ours | paper


@pytest.mark.parametrize("path", FOR_GPUS, ids=lambda path: path.stem)
def test_each_recipe_fits_the_hardware_that_it_names(path):
    """By the command line that its comment gives; and the smallest GPU that its memory would need is not far away."""
    result = CliRunner().invoke(app, [*commands(path), "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output.strip().splitlines()[-1])
    assert plan["fits"] and plan["changes"] is None
    assert plan["seconds"]["step"] > 0 and plan["seconds"]["round"] > 0
    told = re.findall(rf"^\| \[{path.stem}\].*\| ([0-9.]+) GiB \|$", Path("docs/plan.md").read_text(), re.MULTILINE)
    assert told == ([] if path.parent.name == "paper" else [f"{plan['peak'] / GIB:.1f}"])
    assert "shape shipped with ssgen" in plan["model"]


@pytest.mark.parametrize(
    ("gpus", "memory", "expected"),
    [(2, 80e9, ["train.optimizer=paged_adamw_8bit"]), (1, 24 * GIB, ["deepspeed=ds_configs/zero3_offload.json"])],
)
def test_what_would_make_it_fit_is_the_mildest_change_that_does(gpus, memory, expected):
    file, hardware = Path("recipes/llama8b_full_8gpu.yaml"), Hardware(gpus, 1, memory, "", False)
    plan, _, setting = plan_recipe(load_recipe(file), hardware)
    assert not fits(plan, setting, hardware)
    assert advise(load_recipe(file), hardware) == expected
    plan, _, setting = plan_recipe(load_recipe(file, expected), hardware)
    assert fits(plan, setting, hardware)


def test_offloading_needs_memory_of_the_host():
    """Of each parameter 12 bytes of states, 4 of gradients and 2 of weights, of all four ranks of the node."""
    recipe = load_recipe("recipes/llama8b_full_8gpu.yaml", ["deepspeed=ds_configs/zero3_offload.json"])
    roomy, tight = (Hardware(4, 1, 40 * GIB, "", False, host) for host in (200 * GIB, 100 * GIB))
    plan, sizes, setting = plan_recipe(recipe, roomy)
    assert 4 * plan.host_bytes == pytest.approx(18 * sizes.parameters, rel=1e-3)
    assert fits(plan, setting, roomy) and not fits(plan, setting, tight)


def test_offloading_without_memory_is_refused_with_what_would_help():
    """8.03e9 parameters: 18 bytes of each are shared by eight ranks."""
    recipe = load_recipe("recipes/llama8b_full_8gpu.yaml", ["deepspeed=ds_configs/zero3_offload.json"])
    assert offload_problems(recipe, "bfloat16", 8, 20 * GIB) == []
    (problem,) = offload_problems(recipe, "bfloat16", 8, 10 * GIB)
    assert problem.startswith("deepspeed: ds_configs/zero3_offload.json keeps 16.8 GiB of each rank in its host's")
    assert "10 GiB a rank are free" in problem and "adapter.kind=lora" in problem


def test_a_family_that_cannot_pack_is_refused_here_too(tmp_path):
    save_tiny_model("llama", tmp_path / "model")
    BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=96).save_pretrained(tmp_path / "model")
    arguments = ["plan", "recipes/llama8b_lora_24gb.yaml", f"model.path={tmp_path / 'model'}", "method.name=sft"]
    result = CliRunner().invoke(app, [*arguments, "--gpus", "1", "--gpu-memory", "24GiB"])
    assert isinstance(result.exception, UserError)
    assert "data.packing: models of type bloom cannot" in str(result.exception)


def test_a_model_too_large_for_anything_says_so():
    result = CliRunner().invoke(
        app, ["plan", "recipes/llama70b_lora_nodes.yaml", "--gpus", "1", "--gpu-memory", "4GiB"]
    )
    assert result.exit_code == 1
    assert "does not fit" in result.output and "more ranks, or a smaller model" in result.output


def test_an_unknown_model_names_the_shapes_there_are(tmp_path):
    recipe = load_recipe("recipes/llama8b_lora_24gb.yaml", ["model.path=./nowhere"])
    with pytest.raises(UserError, match=r"shapes that `plan` knows without the hub: .*Llama-3\.1-8B-Instruct"):
        plan_recipe(recipe, Hardware(1, 1, 24 * GIB, "", False))


def test_corrections_make_the_longest_sequence(tmp_path):
    recipe = tiny_recipe(tmp_path, "r", method__name="rac", data__max_prompt_tokens=30, data__max_response_tokens=10)
    cue = len(recipe.method.rac.correction_cue) // 3 + 8
    assert longest_rows(recipe) == (30 + 8 + cue + 10, 40)
