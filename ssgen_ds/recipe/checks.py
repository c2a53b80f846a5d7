"""What no single field of a recipe shows: fields that contradict or need each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssgen_ds.errors import UserError

if TYPE_CHECKING:
    from ssgen_ds.recipe.schema import Recipe

# What rendering a chat template takes for itself, so that data.chat_template_kwargs cannot mean something else by it.
TEMPLATE_ARGUMENTS = (
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip


def cross_field_problems(recipe: Recipe) -> list[str]:
    """What no single field shows. One sentence a problem, naming the field and the fix."""
    problems: list[str] = []
    train, data, method = recipe.train, recipe.data, recipe.method
    if (train.epochs is None) == (train.max_steps is None):
        problems.append("train: give exactly one of train.epochs and train.max_steps")
    if data.streaming and train.max_steps is None:
        problems.append("train.max_steps: required with data.streaming, whose length is not known")
    if data.streaming and data.eval_fraction:
        problems.append("data.eval_fraction: not possible with data.streaming; name a file in data.eval")
    if data.eval and data.eval_fraction:
        problems.append("data.eval_fraction: give either data.eval or data.eval_fraction")
    if recipe.eval.every and not (data.eval or data.eval_fraction):
        problems.append("eval.every: nothing to evaluate on; set data.eval or data.eval_fraction")
    problems += _evaluation_problems(recipe)
    if recipe.model.adapter_path and recipe.adapter.kind == "none":
        problems.append("model.adapter_path: set adapter.kind=lora to train it")
    if recipe.quantization.kind != "none" and recipe.adapter.kind == "none":
        problems.append(
            "quantization.kind: a quantised base is frozen; set adapter.kind=lora to train an adapter on it"
        )
    if method.uses_rac and "{reference}" not in method.rac.rewrite_cue:
        problems.append("method.rac.rewrite_cue: must contain {reference}")
    if taken := [name for name in data.chat_template_kwargs if name in TEMPLATE_ARGUMENTS]:
        problems.append(f"data.chat_template_kwargs: {', '.join(taken)} cannot be set here; rendering sets it")
    if always := [name for name in data.ignore_fields if name in ("role", "content", "messages")]:
        problems.append(f"data.ignore_fields: {', '.join(always)} cannot be left out")
    if not data.train:
        problems.append("data.train: names no file")
    if recipe.output_dir.strip() == "":
        problems.append("output_dir: is empty")
    if train.warmup != int(train.warmup) and train.warmup >= 1:
        problems.append("train.warmup: below 1 a share of all steps, from 1 on a whole number of steps")
    return problems


def _evaluation_problems(recipe: Recipe) -> list[str]:
    from ssgen_ds.metrics.scorer import metric_names

    evaluation, problems = recipe.eval, []
    try:
        names = metric_names(evaluation.metrics, "eval.metrics")
    except UserError as error:
        return [str(error)]
    has_data = bool(recipe.data.eval or recipe.data.eval_fraction)
    if names and not has_data:
        problems.append("eval.metrics: nothing to evaluate on; set data.eval or data.eval_fraction")
    if evaluation.best is not None and not has_data:
        problems.append("eval.best: nothing to evaluate on; set data.eval or data.eval_fraction")
    elif evaluation.best not in (None, "loss", *names):
        there = ", ".join(["loss", *names])
        problems.append(f"eval.best: {evaluation.best!r} is not measured; there are {there} (see eval.metrics)")
    return problems
