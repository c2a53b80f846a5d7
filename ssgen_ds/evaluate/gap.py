"""`ssgen gap`: the training-inference gap of one model or of several, in numbers (gap.json) and one figure (gap.png).

For a single run, checkpoint or adapter the base model is measured first: before and after training, on the same
examples, coins and noise. Models are loaded one after another.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.data.paths import resolve_path
from ssgen_ds.errors import GenerationInterrupted, Problems, StopRequested, UserError
from ssgen_ds.evaluate.gap_file import find_file, find_folder, gap_identity
from ssgen_ds.evaluate.gap_measure import Contexts, GapSettings, Measurement, measure
from ssgen_ds.inference.session import Inference, InferenceSettings, Ticker, data_config, open_inference
from ssgen_ds.run.layout import CHECKPOINTS_FOLDER, FIGURE_SUFFIX, PARTIAL

if TYPE_CHECKING:
    from ssgen_ds.distributed.world import World
    from ssgen_ds.inference.model_source import ModelSource

BASE = "base"
# Keys of `data` that decide which tokens an example has.
_TOKEN_KEYS = (
    "train", "columns", "prompt", "system", "chat_template", "chat_template_kwargs", "ignore_fields",
    "max_prompt_tokens", "max_response_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One model to measure. `name` is short and stands in the figure; `model` is what the user gave."""

    name: str
    model: str
    inference: Inference


def gap(models: list[str], where: InferenceSettings, how: GapSettings, out: Path | None, with_base: bool) -> None:
    """Measure the models and write gap.json and gap.png into `out`; every input is checked before any weight loads.

    Args:
        models: as `--model` takes them; the first is the one that the others are compared with.
        where: every setting except the model.
        out: the default is `gap` in the run folder, for a single run.
        with_base: for a single trained model, measure its base model first.

    Raises:
        UserError: wrong input; rows without a response; models whose tokenizers differ.
        StopRequested: a signal came; nothing was written.
    """
    from ssgen_ds.distributed.process_group import process_group
    from ssgen_ds.distributed.signals import stop_on_signals

    with stop_on_signals() as stop, process_group(stop=stop) as world:
        began = time.perf_counter()
        problems = Problems()
        folder = problems.ask(lambda: find_folder(out, models)) if world.is_main else None
        subjects = open_subjects(models, where, with_base, world, problems)
        world.together(lambda: check_examples(subjects))

        def find() -> tuple[Path, str]:
            measured = [(subject.model, subject.inference) for subject in subjects]
            identity = gap_identity(measured, how, out)
            assert folder is not None
            return find_file(folder, out, measured[-1], how, identity), identity

        file, identity = world.on_main(find)
        measurements: list[Measurement] = []
        try:
            for subject in subjects:
                first = measurements[0].contexts if measurements else None
                measurements.append(_measure(subject, how, first, world))
        except GenerationInterrupted:
            raise StopRequested("stopped on request: nothing was written, start again") from None
        result = world.together(
            lambda: _write(subjects, measurements, how, file, identity, began) if world.is_main else None
        )
        if result is not None:
            print_summary(result)
            print(f"{file}, {file.with_suffix(FIGURE_SUFFIX)}")
        subjects[0].inference.say_what_was_cut()


def open_subjects(
    models: list[str], where: InferenceSettings, with_base: bool, world: World, problems: Problems
) -> list[Subject]:
    """The models in order, a base first, all with the same examples, but no weights.

    The first model that has a recipe says how the data is read. `problems` are told together with what is found here.
    """
    from ssgen_ds.inference.model_source import resolve_model_source

    trust = where.trust_remote_code
    resolved = [(model, problems.ask(partial(resolve_model_source, model, trust))) for model in models]
    if world.any(any(model_source is None for _, model_source in resolved)):
        problems.ask(lambda: resolve_path(where.data, "--data"))
        world.together(problems.refuse)
    found = [(model, model_source) for model, model_source in resolved if model_source is not None]
    reader, of_reader = next((item for item in found if item[1].recipe), found[0])
    opened = open_inference(replace(where, model=reader), world, problems)
    subjects = []
    for (model, model_source), name in zip(found, unique_names(models), strict=True):
        inference = opened if model == reader else _same_examples(opened, model, model_source, world)
        subjects.append(Subject(name, model, inference))
        if world.is_main and (keys := differing_keys(where, of_reader, model_source)):
            print(f"{name} was trained with another data.{', data.'.join(keys)} than {reader}, whose is used here")
    for subject in subjects:
        world.together(subject.inference.check_responses)
    base = base_of(found[0][1]) if with_base and len(models) == 1 else None
    if base is None:
        return subjects
    try:
        inference = _same_examples(opened, base.model.path, base, world)
    except UserError as error:
        raise UserError(f"{error}; --no-base leaves the base model out") from None
    names = unique_names([BASE, *models])
    return [Subject(BASE, base.model.path, inference), replace(subjects[0], name=names[1])]


def _same_examples(opened: Inference, model: str, model_source: ModelSource, world: World) -> Inference:
    """Another model for the examples of `opened`. Raises UserError when they would be other tokens for it."""
    from ssgen_ds.modeling.load import open_model

    other = world.main_first(lambda: open_model(model_source.model, opened.data))
    if other.chat.fingerprint() != opened.chat.fingerprint():
        raise UserError(
            f"--model: {model} has another tokenizer, chat template or end token than {opened.settings.model}: "
            "their tokens cannot be compared"
        )
    settings = replace(opened.settings, model=model)
    return replace(opened, settings=settings, model_source=model_source, chat=other.chat, config=other.text_config)


def base_of(model_source: ModelSource) -> ModelSource | None:
    """What a run or an adapter was trained from. None: that is not known."""
    from ssgen_ds.inference.model_source import ModelSource

    recipe = model_source.recipe
    if recipe is None:
        return None if model_source.adapter is None else ModelSource(model_source.model, notes=model_source.notes)
    start = recipe.model.adapter_path
    return ModelSource(recipe.model, adapter=None if start is None else Path(start), recipe=recipe)


def unique_names(models: list[str]) -> list[str]:
    """Short names: a run's folder, a checkpoint's step, a file's stem; in full where two would be equal."""
    short = [_short_name(model) for model in models]
    names = [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--model: {twice[0]} is given twice")
    return names


def _short_name(model: str) -> str:
    path = Path(model)
    if path.parent.name == CHECKPOINTS_FOLDER:
        return f"{path.parent.parent.name} {path.name}"
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() else model


def differing_keys(where: InferenceSettings, one: ModelSource, other: ModelSource) -> list[str]:
    """Keys of `data` by which two runs would read other tokens from the same file; none unless both are runs."""
    if one.recipe is None or other.recipe is None:
        return []
    settings = [data_config(where, recipe.data).model_dump() for recipe in (one.recipe, other.recipe)]
    return [key for key in _TOKEN_KEYS if settings[0][key] != settings[1][key]]


def check_examples(subjects: list[Subject]) -> None:
    """Raise UserError unless every row has a response and fits the positions of every model."""
    opened = subjects[0].inference
    missing = [example.id for example, gold in zip(opened.examples, opened.gold_texts, strict=True) if not gold]
    if missing:
        raise UserError(
            f"--data: {len(missing)} of {len(opened.examples)} rows have no response to measure (the first: "
            f"{missing[0]}); name their column with --reference, or leave these rows out"
        )
    lengths = {example.id: len(example.prompt_ids) + len(example.response_ids) for example in opened.examples}
    longest = max(lengths, key=lengths.__getitem__)
    for subject in subjects:
        limit = getattr(subject.inference.config, "max_position_embeddings", None)  # a family trait: some have none
        if limit is not None and lengths[longest] > limit:
            raise UserError(
                f"--data: {longest} has {lengths[longest]} tokens, and {subject.model} {limit} positions: leave out "
                "what is longer"
            )


def _measure(subject: Subject, how: GapSettings, first: Contexts | None, world: World) -> Measurement:
    """Load one model, measure it, and free its memory."""
    ticker, inference = Ticker(world.is_main), subject.inference
    sampler = inference.load()
    try:
        with world.phase("gap"):
            return measure(
                sampler, inference.chat, inference.examples, inference.vocab_size, how, first,
                lambda phase: ticker.at(f"{subject.name}, {phase}:"),
            )  # fmt: skip
    finally:
        del sampler
        release(world)


def release(world: World) -> None:
    """Free memory for the next model: a model refers to itself in cycles, which only the collector frees."""
    import torch

    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def _write(
    subjects: list[Subject],
    measurements: list[Measurement],
    how: GapSettings,
    file: Path,
    identity: str,
    began: float,
) -> dict[str, Any]:
    from ssgen_ds.evaluate.gap_numbers import gap_result
    from ssgen_ds.report.gap_figure import save_figure
    from ssgen_ds.run.files import write_json

    opened = subjects[0].inference
    models = [(subject.name, subject.model) for subject in subjects]
    result = gap_result(models, measurements, [example.response_ids for example in opened.examples], how)
    seconds = round(time.perf_counter() - began, 3)
    result = {**result, "data": opened.settings.data, "identity": identity, "seconds": seconds}
    figure = file.with_suffix(FIGURE_SUFFIX)
    partial = figure.with_name(f"{PARTIAL}{figure.name}")
    file.parent.mkdir(exist_ok=True)
    try:
        save_figure(result, partial)
        write_json(file, result)
        partial.replace(figure)
    finally:
        partial.unlink(missing_ok=True)
    return result


def print_summary(result: dict[str, Any]) -> None:
    """Print a table of the gaps, with one row for each model."""
    from rich.console import Console
    from rich.table import Table

    first = result["models"][0]["name"]
    table = Table(
        title=f"{result['num_examples']} examples, {result['num_tokens']} gold tokens: NLL in nats and top-1 accuracy, "
        "after gold and after self-generated tokens",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("", overflow="fold")
    for column in ("gold", "self", "gap", "95 %", "top-1 gold", "self"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["summary"]:
        table.add_row(
            row["model"],
            f"{row['nll_gold']:.3f}",
            f"{row['nll_free']:.3f}",
            f"{row['gap_nll']:.3f}",
            f"{row['gap_nll_low']:.3f} to {row['gap_nll_high']:.3f}",
            f"{row['accuracy_gold']:.1%}",
            f"{row['accuracy_free']:.1%}",
        )
    console = Console(highlight=False)
    console.print(table)
    for row in result["summary"][1:]:
        own, shared = (_change(row, key) for key in ("change_gap_nll", "change_gap_nll_shared"))
        console.print(f"{row['model']}: gap {own} against {first}; on the contexts of {first} {shared}", soft_wrap=True)


def _change(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:+.3f} ({row[f'{key}_low']:+.3f} to {row[f'{key}_high']:+.3f})"
