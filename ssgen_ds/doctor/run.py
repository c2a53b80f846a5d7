"""`ssgen doctor`: look at everything, say what hurts and what mends it, and end with a code for scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ssgen_ds.config import Recipe, load_recipe
from ssgen_ds.doctor import environment, tokens
from ssgen_ds.doctor.finding import Finding, error, ok, warning
from ssgen_ds.errors import UserError

_MARKS = {"ok": "[green]ok[/green]     ", "note": "[cyan]note[/cyan]   ", "warning": "[yellow]warning[/yellow]",
          "error": "[red]error[/red]  "}  # fmt: skip


def examine(file: Path | None, overrides: list[str]) -> list[Finding]:
    """Every check; one that fails is a finding itself."""
    findings: list[Finding] = []
    recipe: Recipe | None = None
    if file is not None:
        try:
            recipe = load_recipe(file, overrides)
        except UserError as problem:
            findings.append(error("recipe", str(problem), "it would be refused", "mend the keys named"))
    output = None if recipe is None else recipe.output_dir
    findings += _run("versions", environment.check_versions)
    findings += _run("device", environment.check_device)
    findings += _run("compiler", environment.check_compiler)
    findings += _run("network", environment.check_network)
    findings += _run("cluster", environment.check_cluster)
    findings += _run("room", lambda: environment.check_room(output))
    return findings if recipe is None else findings + _recipe_findings(recipe)


def _run(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except UserError as problem:
        return [error(name, str(problem), "training would be refused", "as the message says")]
    except Exception as problem:  # one broken check must not hide the others
        what = f"{type(problem).__name__}: {problem}"
        return [error(name, what, "this check itself failed", "report it with this message")]


def _recipe_findings(recipe: Recipe) -> list[Finding]:
    """Of the model and the data; what one of them needs and cannot be loaded is one finding, not many."""
    from transformers import GenerationConfig

    from ssgen_ds.build import generation_stops
    from ssgen_ds.data.tokenize import ChatFormat
    from ssgen_ds.ds_config import build_ds_config
    from ssgen_ds.modeling.load import load_config, load_tokenizer, resolve_model_path
    from ssgen_ds.modeling.quantization import quantization_problems, slow_quantization

    findings = [error("quantization", p, "it would be refused", "as it says") for p in quantization_problems(recipe)]
    if slow := slow_quantization(recipe, "cuda" if torch.cuda.is_available() else "cpu"):
        findings.append(warning("quantization", slow, "nf4 saves memory; only a GPU makes it fast", "as it says"))
    findings += _run("deepspeed", lambda: build_ds_config(recipe, 1, "float32") and ok("deepspeed", recipe.deepspeed))
    try:
        config, tokenizer = load_config(recipe.model), load_tokenizer(recipe.model)
        chat = ChatFormat(tokenizer, recipe.data, generation_stops(config))
    except UserError as problem:
        return [*findings, error("model", str(problem), "nothing could be trained", "as the message says")]
    generation = None
    with suppress(OSError):
        source = resolve_model_path(recipe.model.path, recipe.model.revision)
        generation = GenerationConfig.from_pretrained(source.path, revision=source.revision)
    findings += _run("model", lambda: tokens.check_model(recipe, config))
    findings += _run("lengths", lambda: _length_findings(recipe, chat, config))
    findings += _run("ends", lambda: tokens.check_ends(recipe, tokenizer, chat, config, generation))
    findings += _run("prefix", lambda: tokens.check_prefix(recipe, tokenizer, chat))
    return findings + _run("data", lambda: tokens.check_data(recipe, chat))


def _length_findings(recipe: Recipe, chat: Any, config: Any) -> list[Finding]:
    from ssgen_ds.build import context_problems

    why = "a position beyond the last one that was trained means nothing"
    problems = context_problems(recipe, chat, config)
    return [error("lengths", problem, why, "as it says") for problem in problems]


def command(file: Path | None, overrides: list[str], strict: bool, as_json: bool) -> bool:
    """Print the findings; whether nothing is wrong (with `strict`, nothing even to be warned of)."""
    findings = examine(file, overrides)
    bad = {"error", "warning"} if strict else {"error"}
    healthy = not any(finding.level in bad for finding in findings)
    if as_json:
        print(json.dumps({"healthy": healthy, "findings": [finding.as_dict() for finding in findings]}, indent=1))
        return healthy
    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        console.print(f"{_MARKS[finding.level]} {finding.check + ':':<14}", end="")
        console.print(finding.what, markup=False)
        for label, text in (("why", finding.why), ("fix", finding.fix)):
            if text and finding.level != "ok":
                console.print(f"          {label}: {text}", markup=False)
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning", "note")}
    console.print(", ".join(f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items()))
    return healthy
