import json
import re
from pathlib import Path

import pytest

from ssgen_ds.errors import UserError
from ssgen_ds.recipe.deepspeed import (
    build_ds_config,
    merge,
    offloads_optimizer,
    sums_in_float32,
    with_fitting_bucket,
    zero_stage,
)
from ssgen_ds.recipe.load import parse_recipe

SHIPPED = sorted(Path("ds_configs").rglob("*.json"))


def recipe(deepspeed: str, **train):
    return parse_recipe(
        {
            "model": {"path": "m"},
            "data": {"train": "a"},
            "train": {"max_steps": 1, "global_batch": 10, "micro_batch": 2, "clip": 0.5, **train},
            "deepspeed": deepspeed,
            "output_dir": "r",
        }
    )


def test_shipped_files_are_counted():
    assert {path.stem for path in SHIPPED} == {"zero0", "zero1", "zero2", "zero3", "zero3_offload"}


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_auto_is_filled_everywhere(path):
    config = build_ds_config(recipe(str(path)), world_size=2, dtype="bfloat16")
    assert '"auto"' not in json.dumps(config)
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    # DeepSpeed insists on the product; 10 examples in micro batches of 2 on 2 ranks need 3 micro steps
    assert (config["gradient_accumulation_steps"], config["train_batch_size"]) == (3, 12)


def test_stage_and_offload_of_shipped_files():
    stages = {path.stem: zero_stage(json.loads(path.read_text())) for path in SHIPPED}
    assert stages == {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
    assert [path.stem for path in SHIPPED if offloads_optimizer(json.loads(path.read_text()))] == ["zero3_offload"]


def test_clipping_is_written_also_when_off(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text("{}")
    assert build_ds_config(recipe(str(file), clip=0), 1, "float32")["gradient_clipping"] == 0


def test_contradictions_are_named_together(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(
        json.dumps(
            {
                "gradient_clipping": 1.0,
                "bf16": {"enabled": True},
                "fp16": {"enabled": True},
                "optimizer": {"type": "Adam"},
                "zero_optimization": {"stage": 5},
                "train_micro_batch_size_per_gpu": 2,
                "wall_clock_breakdown": "auto",
            }
        )
    )
    with pytest.raises(UserError) as caught:
        build_ds_config(recipe(str(file)), 1, "float32")
    message = str(caught.value)
    for part in (
        "gradient_clipping: 1.0, but the recipe gives 0.5",
        "bf16.enabled: True, but the recipe gives False",
        "fp16: remove it",
        "optimizer: remove it",
        "stage: must be",
        'wall_clock_breakdown: "auto", but nothing',
    ):
        assert part in message
    assert "train_micro_batch_size_per_gpu" not in message


@pytest.mark.parametrize(
    ("types", "stage", "dtype", "problem"),
    [
        ({"grad_accum_dtype": "fp32"}, 2, "bfloat16", None),
        ({"grad_accum_dtype": "fp32"}, 3, "bfloat16", None),
        ({"grad_accum_dtype": "fp32"}, 0, "float32", None),
        ({"grad_accum_dtype": "fp32"}, 1, "bfloat16", "at ZeRO-2 and 3 only; set zero_optimization.stage=2"),
        ({"grad_accum_dtype": "fp16"}, 2, "bfloat16", "must be one of bf16, fp32, got 'fp16'"),
        ({"grad_accum_dtype": "bf16"}, 2, "float32", "the model computes in float32; remove it"),
        ({"other": 1}, 2, "bfloat16", "data_types.other: remove it, only grad_accum_dtype may be set"),
    ],
)
def test_the_sums_of_gradients_may_be_asked_for_in_float32(tmp_path, types, stage, dtype, problem):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"data_types": types, "zero_optimization": {"stage": stage}}))
    if problem is None:
        assert sums_in_float32(build_ds_config(recipe(str(file)), 2, dtype))
        return
    with pytest.raises(UserError, match=re.escape(problem)):
        build_ds_config(recipe(str(file)), 2, dtype)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match=r"no such file: nope\.json; shipped with ssgen: .*zero3\.json"):
        build_ds_config(recipe("nope.json"), 1, "float32")
    broken = tmp_path / "x.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        build_ds_config(recipe(str(broken)), 1, "float32")


def test_templates_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert zero_stage(build_ds_config(recipe("ds_configs/zero3.json"), 1, "float32")) == 3


def test_merge_keeps_what_the_recipe_does_not_know():
    assert merge({"a": "auto", "z": 1}, {"a": 2, "b": {"c": 3}}) == ({"a": 2, "z": 1, "b": {"c": 3}}, [])


@pytest.mark.parametrize(
    ("name", "trained", "ranks", "bucket"),
    [
        ("zero2", 10**9, 2, 200_000_000),
        ("zero2", 10**6, 2, 10**6),
        ("zero3", 10**9, 1, 8_000_000),
        ("zero1", 10**6, 1, 10**6),
    ],
)
def test_the_bucket_fits_what_is_trained_and_who_is_there(name, trained, ranks, bucket):
    config = build_ds_config(recipe(f"ds_configs/{name}.json"), ranks, "float32")
    fitted = with_fitting_bucket(config, trained, ranks)
    assert fitted["zero_optimization"] == {**config["zero_optimization"], "reduce_bucket_size": bucket}


def test_without_zero_there_is_no_bucket():
    config = build_ds_config(recipe("ds_configs/zero0.json"), 1, "float32")
    assert with_fitting_bucket(config, 10**6, 1) is config


def test_8bit_moments_cannot_be_offloaded():
    with pytest.raises(UserError, match=r"train.optimizer=adamw_8bit has no kernels; set train.optimizer=adamw"):
        build_ds_config(recipe("ds_configs/zero3_offload.json", optimizer="adamw_8bit"), 1, "bfloat16")


def test_a_float32_adapter_is_trained_without_deepspeeds_own_copy():
    raw = recipe("ds_configs/zero3.json").model_dump()
    raw["adapter"] = {"kind": "lora", "dtype": "float32"}
    assert build_ds_config(parse_recipe(raw), 1, "bfloat16")["bf16"] == {"enabled": False}
