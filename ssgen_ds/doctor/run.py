"""`ssgen doctor`: look at everything, say what hurts and what mends it, and end with a code for scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ssgen_ds.doctor import environment, tokens
from ssgen_ds.doctor.finding import Finding, error, ok, warning
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.deepspeed import build_ds_config, offloads_optimizer
from ssgen_ds.recipe.load import load_recipe
from ssgen_ds.recipe.schema import Recipe

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
    findings += _run("compiler", lambda: environment.check_compiler(recipe is not None and _offloads(recipe)))
    findings += _run("network", environment.check_network)
    findings += _run("cluster", environment.check_cluster)
    findings += _run("room", lambda: environment.check_room(output))
    return findings if recipe is None else findings + _recipe_findings(recipe)


def _offloads(recipe: Recipe) -> bool:
    """Whether the recipe's DeepSpeed file keeps optimizer states on the host. What is wrong with it comes later."""
    with suppress(UserError):
        return offloads_optimizer(build_ds_config(recipe, 1, "float32"))
    return False


def _run(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except UserError as problem:
        return [error(name, str(problem), "training would be refused", "as the message says")]
    except Exception as problem:  # one broken check must not hide the others
        what = f"{type(problem).__name__}: {problem}"
        return [error(name, what, "this check itself failed", "report it with this message")]


def _recipe_findings(recipe: Recipe) -> list[Finding]:
    """Of the model and the data. Each problem is one finding, whichever check meets it first."""
    from ssgen_ds.modeling.load import open_model
    from ssgen_ds.modeling.preflight import data_problems
    from ssgen_ds.modeling.quantization import quantization_problems, slow_quantization

    def check_deepspeed(recipe: Recipe) -> list[Finding]:
        build_ds_config(recipe, 1, "float32")
        return ok("deepspeed", recipe.deepspeed)

    findings = [error("quantization", p, "it would be refused", "as it says") for p in quantization_problems(recipe)]
    if slow := slow_quantization(recipe, "cuda" if torch.cuda.is_available() else "cpu"):
        findings.append(warning("quantization", slow, "nf4 saves memory; only a GPU makes it fast", "as it says"))
    findings += _run("deepspeed", lambda: check_deepspeed(recipe))
    missing = data_problems(recipe.data)
    findings += [error("data", problem, "training would be refused", "as the message says") for problem in missing]
    try:
        opened = open_model(recipe.model, recipe.data)
    except UserError as problem:
        return [*findings, error("model", str(problem), "nothing could be trained", "as the message says")]
    findings += _run("model", lambda: tokens.check_model(recipe, opened.config))
    findings += _run("lengths", lambda: _length_findings(recipe, opened.chat, opened.config))
    findings += _run("ends", lambda: tokens.check_ends(opened, _generation_config(recipe)))
    findings += _run("prefix", lambda: tokens.check_prefix(recipe, opened.chat))
    return findings if missing else findings + _run("data", lambda: tokens.check_data(recipe, opened.chat))


def _generation_config(recipe: Recipe) -> Any:
    """What the model's folder says of generation; None where it says nothing."""
    from transformers import GenerationConfig

    from ssgen_ds.modeling.model_path import resolve_model_path

    with suppress(OSError):
        source = resolve_model_path(recipe.model.path, recipe.model.revision)
        return GenerationConfig.from_pretrained(source.path, revision=source.revision)
    return None


def _length_findings(recipe: Recipe, chat: Any, config: Any) -> list[Finding]:
    from ssgen_ds.modeling.positions import context_problems

    why = "a position beyond the last one that was trained means nothing"
    problems = context_problems(recipe, chat, config)
    return [error("lengths", problem, why, "as it says") for problem in problems]


def print_findings(file: Path | None, overrides: list[str], strict: bool, as_json: bool) -> bool:
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
