"""`ssgen doctor` on planted faults: each is found, with why and what mends it; the sound are left in peace."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from transformers import GenerationConfig
from typer.testing import CliRunner

from ssgen_ds.cli import app
from ssgen_ds.doctor import environment
from ssgen_ds.doctor.run import examine
from tests.support.shipped_recipes import RECIPES
from tests.support.tiny_models import save_tiny_model, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def model(tmp_path) -> Path:
    """A sound model: its template ends a turn with the tokenizer's EOS."""
    folder = tmp_path / "model"
    save_tiny_model("llama", folder, vocab_size=98)
    plant(folder)
    return folder


def plant(folder: Path, template: str = TEMPLATE, generation: dict | None = None, **tokens: str) -> None:
    tokenizer = tiny_tokenizer(98)
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"pad_token": "<unk>", **tokens})
    tokenizer.save_pretrained(folder)
    GenerationConfig(**(generation or {"eos_token_id": 2})).save_pretrained(folder)


def write_recipe(folder: Path, rows: list[dict] | None = None, **sections: str) -> Path:
    rows = rows or [{"id": str(i), "prompt": f"say {i}", "completion": f"it is {i}"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = {
        "model": f"{{path: {folder / 'model'}}}",
        "data": f"{{train: {folder / 'rows.jsonl'}, max_prompt_tokens: 60, max_response_tokens: 40}}",
        "train": "{max_steps: 1, global_batch: 4}",
        "output_dir": str(folder / "run"),
        **sections,
    }
    file = folder / "recipe.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return file


def found(file: Path, check: str, *overrides: str) -> list[tuple[str, str, str]]:
    findings = [f for f in examine(file, list(overrides)) if f.check == check]
    assert findings
    assert all(f.level == "ok" or (f.what and f.fix) for f in findings)
    return [(f.level, f.what, f.fix) for f in findings if f.level != "ok"]


def test_a_sound_recipe_has_nothing_but_oks(model, tmp_path):
    findings = examine(write_recipe(tmp_path), [])
    assert [f for f in findings if f.level in ("warning", "error")] == []
    checks = {f.check for f in findings}
    assert checks >= {"versions", "device", "bitsandbytes", "compiler", "network", "cluster", "room", "deepspeed"}
    assert checks >= {"model", "ends", "prefix", "data"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_false_alarm_on_the_shipped_recipes(path):
    assert [f for f in examine(path, []) if f.level == "error"] == []


def test_exit_codes_and_json(model, tmp_path):
    file = str(write_recipe(tmp_path))
    good = CliRunner().invoke(app, ["doctor", file, "--json"])
    assert good.exit_code == 0 and json.loads(good.stdout)["healthy"] is True
    few = CliRunner().invoke(app, ["doctor", file, "train.global_batch=99"])
    assert few.exit_code == 0 and "12 examples, train.global_batch=99" in few.output
    assert "1 warning," in few.output
    assert CliRunner().invoke(app, ["doctor", file, "train.global_batch=99", "--strict"]).exit_code == 2
    bad = CliRunner().invoke(app, ["doctor", file, "method.name=bass"])
    assert bad.exit_code == 2 and "method.name" in bad.output


def test_pad_that_is_eos_is_a_note(model, tmp_path):
    plant(model, pad_token="</s>")
    ((level, what, _),) = found(write_recipe(tmp_path), "ends")
    assert level == "note" and "pad is EOS" in what


def test_a_template_that_ends_turns_with_another_token(model, tmp_path):
    plant(model, TEMPLATE.replace("</s>", "<end>"), additional_special_tokens=["<end>"])
    levels = found(write_recipe(tmp_path), "ends")
    assert any("the tokenizer's EOS is '</s>'" in what and "eos_token" in fix for _, what, fix in levels)


def test_generation_that_never_sees_the_trained_end(model, tmp_path):
    plant(model, generation={"eos_token_id": 7})
    ((level, what, fix),) = found(write_recipe(tmp_path), "ends")
    assert (level, what) == ("error", "generation_config stops at [7], training ends with [2]")
    assert fix == "eos_token_id of generation_config.json = [2]"


def test_padding_among_the_stops(model, tmp_path):
    plant(model, generation={"eos_token_id": [2, 0], "pad_token_id": 0})
    ((level, what, _),) = found(write_recipe(tmp_path), "ends")
    assert level == "error" and "pad 0 is among its stops [2, 0]" in what


def test_more_tokens_than_logits(tmp_path):
    save_tiny_model("llama", tmp_path / "model", vocab_size=90)
    plant(tmp_path / "model")
    assert any(
        "the tokenizer knows 98 tokens, the model 90" in what for _, what, _ in found(write_recipe(tmp_path), "ends")
    )


def test_a_prompt_that_is_no_prefix(model, tmp_path):
    plant(model, TEMPLATE.replace("<|assistant|>{% endif %}", "<think>{% endif %}"))
    ((level, what, _),) = found(write_recipe(tmp_path), "prefix")
    assert (level, what) == ("warning", "the rendered prompt is no prefix of prompt and answer")


def test_a_template_that_hides_earlier_answers_is_an_error_for_corrections_only(model, tmp_path):
    hiding = TEMPLATE.replace(
        "{{ m['content'] }}", "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
    )
    plant(model, hiding)
    file = write_recipe(tmp_path)
    assert [level for level, *_ in found(file, "prefix")] == ["warning"]
    findings = examine(file, ["method.name=rac"])
    assert any(f.level == "error" and ("earlier answers" in f.what or "template" in f.what) for f in findings)


def test_answers_that_are_cut_or_empty(model, tmp_path):
    rows = [{"id": str(i), "prompt": "say", "completion": "long " * 30} for i in range(9)]
    ((level, what, fix),) = found(write_recipe(tmp_path, rows), "data")
    assert (level, what) == ("warning", "9 of 9 answers are cut") and "max_response_tokens" in fix


def test_rows_left_out_are_told(model, tmp_path):
    rows = [{"id": str(i), "prompt": "say", "completion": "so" if i else ""} for i in range(9)]
    file = write_recipe(tmp_path, rows)
    ((level, what, fix),) = found(file, "data", "data.on_bad_row=skip")
    assert (level, what) == ("note", "1 rows were left out") and "skipped.txt" in fix
    ((level, what, _),) = found(file, "data")
    assert level == "error" and "rows.jsonl:1" in what and "empty" in what


def test_an_end_of_turn_that_the_vocabulary_does_not_have(model, tmp_path):
    plant(model, TEMPLATE.replace("</s>", "é"))
    assert any(
        "the template's end of turn is the unknown token" in what
        for _, what, _ in found(write_recipe(tmp_path), "ends")
    )


def test_a_driver_without_a_torch_that_knows_it(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: False)
    (finding,) = [f for f in environment.check_device() if f.level == "error"]
    assert "there is an NVIDIA driver, but torch" in finding.what


def test_operators_that_deepspeed_will_not_compile(monkeypatch):
    from deepspeed.ops.op_builder.cpu.cpu_adam import CPUAdamBuilder

    monkeypatch.setattr(CPUAdamBuilder, "is_compatible", lambda self, verbose=False: False)
    (finding,) = environment.check_compiler(offloads=False)
    assert finding.level == "warning" and "will not compile: AdamW of offloaded states" in finding.what


def test_broken_rows_and_missing_files_are_errors(model, tmp_path):
    rows = [{"id": "1", "prompt": "say"}]
    ((level, what, _),) = found(write_recipe(tmp_path, rows), "data")
    assert level == "error" and "rows.jsonl:1" in what
    assert found(write_recipe(tmp_path), "model", "model.path=/no/such/folder")[0][0] == "error"


def test_versions_outside_the_bounds_and_known_bad_pairs():
    def find(package: str) -> str | None:
        return {"peft": "0.17.0", "gguf": None}.get(package, environment.installed(package))

    findings = environment.check_versions(find)
    whats = [f.what for f in findings]
    assert "peft 0.17.0 is installed" in whats and "gguf is not installed" in whats
    assert any(what.startswith("peft 0.17.0 with transformers 5") for what in whats)
    assert any("DeepSpeed#8072" in f.why for f in environment.check_versions({"deepspeed": "0.19.2"}.get))
    assert [f.level for f in environment.check_versions()] == ["ok"]


def test_missing_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = environment.check_compiler(offloads=False)
    assert (finding.level, finding.what, finding.fix) == ("error", "no C++ compiler", "apt-get install g++")


@pytest.mark.parametrize(("offloads", "level"), [(False, "note"), (True, "error")])
def test_a_missing_nvcc_matters_only_where_states_are_offloaded(monkeypatch, offloads, level):
    """PyTorch's own wheels bring no nvcc, and nothing but the host's AdamW is compiled with it."""
    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment.shutil, "which", lambda name: None if name == "nvcc" else f"/bin/{name}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    (finding,) = environment.check_compiler(offloads)
    assert (finding.level, finding.what) == (level, "no nvcc and no CUDA_HOME")


def test_an_interface_that_does_not_exist():
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        findings = environment.check_network({variable: "ib7"})
        assert [f.what for f in findings if f.level == "error"] == [f"{variable}=ib7: no such interface"]
    assert not [f for f in environment.check_network({"NCCL_SOCKET_IFNAME": "^docker"}) if f.level == "error"]


def test_slurm_against_the_ranks():
    step = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    inside = {**step, "SLURM_STEP_NODELIST": "n[1-2]"}
    assert [f.level for f in environment.check_cluster(inside)] == ["ok"]
    (finding,) = environment.check_cluster({**inside, "RANK": "0", "WORLD_SIZE": "2"})
    assert finding.what == "SLURM_PROCID=1, but RANK=0" and "unset RANK" in finding.fix
    (finding,) = environment.check_cluster(step)
    assert finding.level == "warning" and "the batch script itself" in finding.what
    (finding,) = environment.check_cluster({**inside, "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"})
    assert finding.fix == "--ntasks-per-node=8"


def test_room(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSGEN_CACHE", str(tmp_path / "file" / "cache"))
    (finding,) = [f for f in environment.check_room(None) if f.level == "error"]
    assert "cache" in finding.what and finding.fix == "SSGEN_CACHE=another folder"


def test_a_check_that_fails_is_a_finding(monkeypatch):
    monkeypatch.setattr(environment, "check_network", lambda: 1 / 0)
    (finding,) = [f for f in examine(None, []) if f.check == "network"]
    assert finding.level == "error" and "ZeroDivisionError" in finding.what


def test_a_quantised_base_without_cuda(model, tmp_path, monkeypatch):
    file = write_recipe(tmp_path, adapter="{kind: lora}", quantization="{kind: nf4}")
    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: False)
    ((level, what, _),) = found(file, "quantization")
    assert level == "warning" and "nf4 without CUDA" in what


def test_bitsandbytes_that_did_not_load(monkeypatch):
    cextension = sys.modules["bitsandbytes.cextension"]
    monkeypatch.setattr(cextension, "lib", object.__new__(cextension.ErrorHandlerMockBNBNativeLibrary))
    (finding,) = environment.check_bitsandbytes()
    assert finding.level == "error" and "did not load" in finding.what
