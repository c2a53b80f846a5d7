"""`ssgen report RUN` writes one self-contained report.html, during the run or after it. It needs no network or script.

`read_run` reads the run folder. `scores`, `gap`, `texts`, `costs` and `warnings` choose what is shown, `curves` draws,
and page.html.j2 puts it on a page.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

import yaml

from ssgen_ds.errors import UserError
from ssgen_ds.report.costs import generation_facts, memory_bars, seconds_by_phase, time_bars
from ssgen_ds.report.curves import draw_cost_curves, draw_curves, draw_score_curves, total
from ssgen_ds.report.gap import COLUMNS as GAP_COLUMNS
from ssgen_ds.report.gap import view_gaps
from ssgen_ds.report.read_run import Run, load_run
from ssgen_ds.report.scores import (
    base_of,
    behaviour_rows,
    correction_rows,
    describe_settings,
    group_evaluations,
    interval,
    main_evaluation,
    metric_title,
    number,
    paired_change,
    primary_metric,
    probability,
    shown_evaluations,
)
from ssgen_ds.report.texts import answer_texts, training_texts
from ssgen_ds.report.warnings import eval_losses_of, find_warnings, weighted_mean
from ssgen_ds.run.files import write_whole
from ssgen_ds.run.layout import REPORT_FILE
from ssgen_ds.run.progress import compact, duration

METHOD_TITLES = {
    "sft": "Supervised finetuning",
    "bss": "Batch-scheduled sampling",
    "rac": "Reference-answer-based correction",
    "bss+rac": "Batch-scheduled sampling with correction",
}
_SPECIAL = re.compile(r"&lt;(?:\|\w+\||/?s|eos|bos|pad|unk|start_of_turn|end_of_turn)&gt;")


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page to `out`, or to report.html in the run, and return its path; a reader never sees half a file.

    Raises:
        UserError: not a run folder, no finished step yet, a damaged file, which is named, or no place to write.
    """
    path = run_dir / REPORT_FILE if out is None else out
    if path.suffix != ".html" or path.is_dir():
        raise UserError(f"--out: {path} is no file that ends in .html")
    page = render_report(load_run(run_dir))
    try:
        write_whole(path, page)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); `ssgen report RUN --out FILE.html` writes it elsewhere"
        ) from None
    return path


def headline(run: Run) -> list[tuple[str, str]]:
    """The most important numbers of the run: (label, value), ready to print."""
    seconds = seconds_by_phase(run)
    last_losses = [row["loss"] for row in run.rows[-10:] if row["loss"] is not None]
    final = f"{statistics.fmean(last_losses):.3f}" if last_losses else "not a number"
    numbers = [(f"final loss, mean of {len(last_losses)} steps" if len(last_losses) > 1 else "final loss", final)]
    eval_losses = eval_losses_of(run.rows)
    if len(eval_losses) > 1:
        numbers.append(("evaluation loss, first → last", f"{eval_losses[0]:.3f} → {eval_losses[-1]:.3f}"))
    elif eval_losses:
        numbers.append(("evaluation loss", f"{eval_losses[0]:.3f}"))
    numbers.append(("tokens trained", compact(total(run.rows, "num_tokens"))))
    if "bss" in run.method:
        numbers.append(("sampled-token share", f"{weighted_mean(run.rows, 'sampled_token_share'):.1%}"))
    if "rac" in run.method:
        numbers.append(("corrections trained", compact(total(run.rows, "num_corrections"))))
    if run.method != "sft":
        share = seconds.get("generate", 0.0) / max(sum(seconds.values()), 1e-9)
        numbers.append(("generation's share of the time", f"{share:.0%}"))
    numbers.append(("total time", duration(sum(seconds.values()))))
    return numbers


def findings(run: Run) -> list[str]:
    """The results in plain sentences: the main metric before and after training, and what correcting did."""
    one = main_evaluation(run)
    metric = None if one is None else primary_metric(run, one)
    if one is None or metric is None:
        return []
    title, base = metric_title(metric), base_of(run, one)
    when = "before training" if run.is_base(one.content["model"]) else "after training"
    place = when if one.step is None else f"at step {one.step}"
    if base is None or metric not in base.scores:
        sentences = [f"{title} {place}: {interval(one.scores[metric])}."]
    else:
        after = "after" if one.correction is None else "after, corrected"
        text = f"{title} before training: {interval(base.scores[metric])}; {after}: {interval(one.scores[metric])}"
        change = paired_change(base, one, metric)
        paired = change and f", a paired change of {interval(change, '+')}, {probability(change['p_value'])}"
        sentences = [f"{text}{paired or ''}."]
    if one.correction is not None:
        change = one.correction["change"][metric]
        better, worse = one.correction["improved"][metric], one.correction["worsened"][metric]
        sentences.append(
            f"Correcting changed {title} by {interval(change, '+')}, {probability(change['p_value'])}: "
            f"{better} answers became better, {worse} worse."
        )
    return sentences


def key_facts(run: Run) -> list[tuple[str, str]]:
    """The recipe at a glance: (label, value)."""
    recipe, environment = run.recipe, run.environment
    method, train, adapter = recipe["method"], recipe["train"], recipe["adapter"]
    ranks = environment.get("world_size")
    where = [f"{ranks} rank{'s' * (ranks != 1)}" if ranks else "", str(environment.get("device") or "")]
    where.append(f"ZeRO {environment['zero_stage']}" if "zero_stage" in environment else "")
    facts = [
        ("model", recipe["model"]["path"]),
        ("data", _sources(recipe["data"]["train"])),
        ("trained weights", "all" if adapter["kind"] == "none" else f"{adapter['kind']}, rank {adapter['rank']}"),
        ("batch", f"{train['global_batch']} examples a step"),
        ("learning rate", f"{train['lr']:g}, {train['schedule']}"),
        ("generated again", f"every {recipe['selfgen']['refresh_every']} steps" if run.method != "sft" else ""),
    ]
    if "bss" in run.method:
        facts.append(("mix rate", f"{method['bss']['mix_rate']:g}, {method['bss']['schedule']}"))
    if "rac" in run.method:
        rac = method["rac"]
        facts.append(("drafts", f"at most {rac['max_draft_tokens']} tokens, cut: {rac['cut']}"))
        facts.append(("corrections", f"towards the {rac['target']}, weight {rac['correction_weight']:g}"))
    facts += [("ran on", ", ".join(filter(None, where))), ("began", str(environment.get("time") or "")[:16])]
    return [(label, value.replace("T", " ") if label == "began" else value) for label, value in facts if value]


def _sources(train: Any) -> str:
    sources = train if isinstance(train, list) else [train]
    return ", ".join(str(source["path"]) if isinstance(source, dict) else str(source) for source in sources)


def special_tokens(text: str) -> Any:
    """Template filter: escape a text, and show special tokens of chat templates in grey."""
    from markupsafe import Markup, escape

    return Markup(_SPECIAL.sub(lambda found: f'<span class="special">{found[0]}</span>', str(escape(text))))


def render_report(run: Run) -> str:
    """The page as HTML. Everything that a run wrote is escaped; only the figures are markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "special": special_tokens,
        "interval": interval,
        "number": number,
        "probability": probability,
        "metric_title": metric_title,
        "settings": describe_settings,
    }
    last_step = run.rows[-1]["step"]
    of_total = f" of {run.total_steps}" if run.total_steps else ""
    steps = [(one.step, one.scores) for one in run.during_training if one.step is not None]
    return templates.get_template("page.html.j2").render(
        run=run,
        method_title=METHOD_TITLES[run.method],
        status="finished" if run.is_finished else "in progress",
        steps=f"step {last_step}{of_total}",
        headline=headline(run),
        findings=findings(run),
        facts=key_facts(run),
        warnings=find_warnings(run),
        groups=group_evaluations(run),
        corrections=[(one, correction_rows(one)) for one in shown_evaluations(run) if one.correction is not None],
        behaviour=behaviour_rows(shown_evaluations(run)),
        score_curves=draw_score_curves(steps, run.best, metric_title),
        other_metrics=sorted({key for numbers in run.other_numbers.values() for key in numbers}),
        gaps=view_gaps(run),
        gap_columns=GAP_COLUMNS,
        answers=answer_texts(run),
        curves=draw_curves(run.rows, run.best),
        cost_curves=draw_cost_curves(run.rows),
        time_bars=time_bars(run),
        memory_bars=memory_bars(run.rows),
        generation=generation_facts(run),
        trained_on=training_texts(run.samples),
        recipe_text=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True),
        environment_text=yaml.safe_dump(run.environment, sort_keys=False, allow_unicode=True),
    )
