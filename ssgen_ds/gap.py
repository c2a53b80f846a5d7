"""`ssgen gap`: the training-inference gap of one model or of several, in numbers (gap.json) and one figure (gap.png).

Of a single run, checkpoint or adapter the base model is measured, too, first: before and after training, on the same
examples, coins and noise. Models are loaded one after another.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.errors import GenerationInterrupted, StopRequested, UserError
from ssgen_ds.evaluate.gap import FREE, GOLD, Contexts, GapSettings, Measurement, measure
from ssgen_ds.inference import Inference, InferenceSettings, Ticker, data_config, open_inference

if TYPE_CHECKING:
    from ssgen_ds.distributed import World
    from ssgen_ds.references import Reference

BASE = "base"
RESULT_FILE, FIGURE_FILE = "gap.json", "gap.png"
# Of `data`: what decides which tokens an example has.
_TOKEN_KEYS = ("train", "columns", "prompt", "system", "chat_template", "max_prompt_tokens", "max_response_tokens")


@dataclass(frozen=True)
class Subject:
    """One model to measure. `model`: what the user calls it; a base has no name of its own."""

    name: str
    model: str
    inference: Inference


def gap(models: list[str], where: InferenceSettings, how: GapSettings, out: Path | None, with_base: bool) -> None:
    """Measure the models and write gap.json and gap.png into `out`; every input is checked before any weight loads.

    Args:
        models: references; the first is the one that the others are compared with.
        where: all but the model.
        out: default: `gap` in the run folder, of a single run.
        with_base: of a single trained model, measure its base, too, as the first.

    Raises:
        UserError: wrong input; rows without a response; models whose tokenizers differ.
        StopRequested: on a signal; nothing was written.
    """
    from ssgen_ds.distributed import process_group
    from ssgen_ds.signals import stop_on_signals

    with stop_on_signals() as stop, process_group(stop=stop) as world:
        began = time.perf_counter()
        folder = world.together(lambda: find_folder(out, models))
        subjects = open_subjects(models, where, with_base, world)
        world.together(lambda: check_examples(subjects))
        measurements: list[Measurement] = []
        try:
            for subject in subjects:
                first = measurements[0].contexts if measurements else None
                measurements.append(_measure(subject, how, first, world))
        except GenerationInterrupted:
            raise StopRequested("stopped on request: nothing was written, start again") from None
        result = world.together(lambda: _write(subjects, measurements, how, folder, began) if world.is_main else None)
        if result is not None:
            print_summary(result)
            print(f"{folder / RESULT_FILE}, {folder / FIGURE_FILE}")
        subjects[0].inference.say_what_was_cut()


def parse_rates(text: str) -> tuple[float, ...]:
    """`0,.1,.5` -> ascending rates; 0 and 1 are always among them. Raises UserError."""
    try:
        rates = {float(item) for item in text.split(",") if item.strip()}
    except ValueError:
        raise UserError(f"--rates: must be numbers with commas between them, got {text!r}") from None
    if not all(GOLD <= rate <= FREE for rate in rates):
        raise UserError(f"--rates: must lie between 0 and 1, got {text!r}")
    return tuple(sorted(rates | {GOLD, FREE}))


def find_folder(out: Path | None, models: list[str]) -> Path:
    """Where the results go; made when they are written. Raises UserError where that cannot be."""
    if out is None:
        run_dir = Path(models[0]).expanduser()
        if len(models) > 1 or not (run_dir / "recipe.yaml").is_file() or (run_dir / "COMPLETE").exists():
            raise UserError("--out: name the folder to write (a single run folder keeps its own in gap/)")
        return run_dir / "gap"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; name a folder")
    if not out.exists() and not out.absolute().parent.is_dir():
        raise UserError(f"--out: {out.parent} is no folder")
    return out


def open_subjects(models: list[str], where: InferenceSettings, with_base: bool, world: World) -> list[Subject]:
    """The models in order, a base first, all with the same examples, but no weights.

    The first model that has a recipe says how the data is read.
    """
    from ssgen_ds.references import resolve_reference

    found = [(model, world.together(lambda model=model: resolve_reference(model))) for model in models]
    reader, of_reader = next((item for item in found if item[1].recipe), found[0])
    opened = open_inference(replace(where, model=reader), world)
    subjects = []
    for (model, reference), name in zip(found, unique_names(models), strict=True):
        inference = opened if model == reader else _same_examples(opened, model, reference, world)
        subjects.append(Subject(name, model, inference))
        if world.is_main and (keys := differing_keys(where, of_reader, reference)):
            print(f"{name} was trained with another data.{', data.'.join(keys)} than {reader}, whose is used here")
    base = base_of(found[0][1]) if with_base and len(models) == 1 else None
    if base is None:
        return subjects
    try:
        inference = _same_examples(opened, base.model.path, base, world)
    except UserError as error:
        raise UserError(f"{error}; --no-base leaves the base model out") from None
    names = unique_names([BASE, *models])
    return [Subject(BASE, base.model.path, inference), replace(subjects[0], name=names[1])]


def _same_examples(opened: Inference, model: str, reference: Reference, world: World) -> Inference:
    """Another model for the examples of `opened`. Raises UserError when they would be other tokens for it."""
    from ssgen_ds.build import generation_stops
    from ssgen_ds.modeling.load import load_config, load_tokenizer

    tokenizer = world.main_first(lambda: load_tokenizer(reference.model))
    config = world.together(lambda: load_config(reference.model))
    chat = world.together(lambda: ChatFormat(tokenizer, opened.data, generation_stops(config)))
    if chat.fingerprint() != opened.chat.fingerprint():
        raise UserError(
            f"--model: {model} has another tokenizer, chat template or end token than {opened.settings.model}: "
            "their tokens cannot be compared"
        )
    settings = replace(opened.settings, model=model)
    return replace(opened, settings=settings, reference=reference, chat=chat, config=config.get_text_config())


def base_of(reference: Reference) -> Reference | None:
    """What a run or an adapter was trained from; None for a model of which that is not known."""
    from ssgen_ds.references import Reference

    recipe = reference.recipe
    if recipe is None:
        return None if reference.adapter is None else Reference(reference.model)
    start = recipe.model.adapter_path
    return Reference(recipe.model, adapter=None if start is None else Path(start), recipe=recipe)


def unique_names(models: list[str]) -> list[str]:
    """Short names: a run's folder, a checkpoint's step, a file's stem; in full where two would be the same."""
    short = [_short_name(model) for model in models]
    names = [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--model: {twice[0]} is given twice")
    return names


def _short_name(model: str) -> str:
    path = Path(model)
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name} {path.name}"
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() else model


def differing_keys(where: InferenceSettings, one: Reference, other: Reference) -> list[str]:
    """Keys of `data` by which two runs would read other tokens from the same file; none for what is no run."""
    if one.recipe is None or other.recipe is None:
        return []
    settings = [data_config(where, reference.recipe.data).model_dump() for reference in (one, other)]
    return [key for key in _TOKEN_KEYS if settings[0][key] != settings[1][key]]


def check_examples(subjects: list[Subject]) -> None:
    """Whether every row has a response, and fits the positions of every model. Raises UserError."""
    opened = subjects[0].inference
    missing = [example.id for example, gold in zip(opened.examples, opened.references, strict=True) if not gold]
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
    """Load one model, measure it, let it go."""
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
    """Models hold themselves in cycles; the next one needs their memory."""
    import torch

    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def _write(
    subjects: list[Subject], measurements: list[Measurement], how: GapSettings, folder: Path, began: float
) -> dict[str, Any]:
    from ssgen_ds.evaluate.gap_figure import save_figure
    from ssgen_ds.evaluate.gap_numbers import gap_result
    from ssgen_ds.evaluate.journal import write_json

    opened = subjects[0].inference
    models = [(subject.name, subject.model) for subject in subjects]
    result = gap_result(models, measurements, [example.response_ids for example in opened.examples], how)
    result = {**result, "data": opened.settings.data, "seconds": round(time.perf_counter() - began, 3)}
    folder.mkdir(exist_ok=True)
    partial = folder / f".partial-{FIGURE_FILE}"
    save_figure(result, partial)
    write_json(folder / RESULT_FILE, result)
    partial.replace(folder / FIGURE_FILE)
    return result


def print_summary(result: dict[str, Any]) -> None:
    """A table of the gaps, a row a model."""
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
