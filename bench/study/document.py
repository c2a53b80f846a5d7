"""docs/results-controlled.md: every figure from the summary; what it means from discussion.md beside this file."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from bench.study.plots import LABELS
from bench.study.tasks import MODULUS, TASKS

TITLES = {
    "reverse": "Reverse and substitute: the gold token is a function of one place of the prompt",
    "sort": "Sorting: the gold token follows from the whole prompt, most easily from the token before",
    "sums": "Running sums, written out: the right next step depends on the token before",
}


def write_document(summary: dict[str, Any], path: Path) -> None:
    tasks = {task: entries for task, entries in summary["tasks"].items() if entries}
    discussion = Path(__file__).with_name("discussion.md").read_text(encoding="utf-8").strip()
    parts = [_head(summary), discussion, _image("length", "Exact match against length"), _image("gap", "Gap curves")]
    for task, entries in tasks.items():
        parts += [
            f"### {TITLES[task]}",
            _size(summary, task),
            _answers(entries),
            _corrections(entries),
            _generated(entries),
            _gap(entries),
        ]
    parts += ["### What a method costs", _costs(tasks)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _head(summary: dict[str, Any]) -> str:
    settings, machine = summary["settings"], summary["machine"]
    runs = sum(len(entry["seeds"]) for entries in summary["tasks"].values() for entry in entries.values())
    seconds = [entry["seconds"] for entries in summary["tasks"].values() for entry in entries.values()]
    minutes = sum(item["cpu_per_step"] * run["num_steps"] for item in seconds for run in item["runs"]) / 60
    packages = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "deepspeed", "transformers"))
    return (
        "## Controlled study\n\n"
        "<!-- Written by `make study-controlled`; change bench/study/ instead. -->\n\n"
        f"Made by `make study-controlled` ({runs} runs, {minutes:.0f} minutes of processor time for training; "
        "`python -m bench.study.run --summary` writes this page "
        "again from runs that are there); all figures are in "
        "[bench/results/study-controlled.json](../bench/results/study-controlled.json). Llamas of "
        f"{settings['layers']} layers and width {settings['width']} are trained from scratch by the product's own "
        f"trainer, {settings['batch']} examples a step, on a fixed set of examples. All methods get the same steps, "
        "hence the same gold tokens; a seed sets initialisation, order of the data and noise. "
        f"{settings['eval_each']} held-out prompts of each length, the same noise for all models. "
        f"Machine: {machine['device']}, {machine['cores']} cores, one thread a run; {packages}.\n\n"
        "Differences are in points of exact match, to the SFT runs of the same seeds: the mean over seeds and prompts, "
        "[a 95 % interval from a paired bootstrap over prompts and seeds], (each seed's), for three seeds say little "
        "about a fourth. A corrected answer is compared with what SFT answers at once."
    )


def _image(name: str, text: str) -> str:
    return f"![{text}](../bench/results/study-controlled-{name}.png)"


def _size(summary: dict[str, Any], task: str) -> str:
    size = summary["settings"]["tasks"][task]
    low, high = size["train_lengths"]
    prompt, answer = TASKS[task](random.Random(0), 4)
    return (
        f"For instance `{prompt}` becomes `{answer}`{f', modulo {MODULUS}' if task == 'sums' else ''}. "
        f"{size['num_train']} training examples of {low} to {high} {'digits' if task == 'sums' else 'letters'}, "
        f"{size['steps']} steps, peak learning rate {size['lr']:g}; evaluated at "
        f"{', '.join(map(str, size['eval_lengths']))}."
    )


def _answers(entries: dict[str, Any]) -> str:
    lines = [
        "| method | greedy | difference to SFT | sampled | difference to SFT | tokens after gold; free-running |",
        "|---|---|---|---|---|---|",
    ]
    for method, entry in entries.items():
        accuracy = entry["token_accuracy"]
        tokens = f"{_percent(accuracy['teacher_forced']['mean'])}; {_percent(accuracy['free_running']['mean'])}"
        lines.append(
            f"| {LABELS[method]} | {_pair(method, entry, 'greedy')} | {_pair(method, entry, 'sampled')} | {tokens} |"
        )
        if "greedy_corrected" in entry["answers"]:
            cells = " | ".join(_pair(method, entry, f"{name}_corrected") for name in ("greedy", "sampled"))
            lines.append(f"| {LABELS[method]}, corrected once | {cells} | |")
    return "\n".join(lines)


def _pair(method: str, entry: dict[str, Any], name: str) -> str:
    """Exact match, and its difference to SFT."""
    difference = "" if method == "sft" else _difference(entry["versus_sft"][name])
    return f"{_percent(entry['answers'][name]['mean'])} | {difference}"


def _corrections(entries: dict[str, Any]) -> str:
    lines = ["| one correction turn | answers | wrong to right | right to wrong | gain |", "|---|---|---|---|---|"]
    for method, entry in entries.items():
        for name, found in entry.get("corrections", {}).items():
            counts = f"{found['answers']} | {found['wrong_to_right']} | {found['right_to_wrong']}"
            lines.append(f"| {LABELS[method]}, {name} | {counts} | {_difference(found)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _generated(entries: dict[str, Any]) -> str:
    lines = [
        "What training generated, from the first to the last quarter of the run, in percent (mean over the runs that "
        "recorded it):",
        "",
        "| method | tokens in contexts that are not gold | drafts that are right already |",
        "|---|---|---|",
    ]
    for method, entry in entries.items():
        if found := entry["generated"]:
            cells = [
                ", ".join(_percent(share) for share in found[name]) if name in found else ""
                for name in ("wrong_in_context", "drafts_right")
            ]
            lines.append(f"| {LABELS[method]} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 4 else ""


def _gap(entries: dict[str, Any]) -> str:
    rates = list(next(iter(entries.values()))["gap"]["own"])
    lines = [
        "NLL of gold tokens (nats) by the context's mix rate, each model after its own tokens / after the SFT model's:",
        "",
        f"| method | {' | '.join(rates)} |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for method, entry in entries.items():
        cells = [" / ".join(f"{entry['gap'][c][rate]['nll']['mean']:.3f}" for c in ("own", "sft")) for rate in rates]
        lines.append(f"| {LABELS[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _costs(tasks: dict[str, Any]) -> str:
    """Per step, medians over seeds."""
    lines = [
        "Processor time of a run over its steps as a multiple of SFT's, and the share of generation in the run's time "
        "(medians over the runs that recorded it). So small a model makes calls dear against arithmetic.",
        "",
        f"| method | {' | '.join(tasks)} |",
        "|---" * (len(tasks) + 1) + "|",
    ]
    methods = list(dict.fromkeys(method for entries in tasks.values() for method in entries))
    for method in methods:
        cells = []
        for entries in tasks.values():
            if method not in entries:
                cells.append("")
                continue
            seconds, base = entries[method]["seconds"], entries["sft"]["seconds"]
            ratio = seconds["cpu_per_step"] / base["cpu_per_step"]
            cells.append(f"{ratio:.2f}x ({1000 * seconds['cpu_per_step']:.0f} ms), {seconds['generation_share']:.0%}")
        lines.append(f"| {LABELS[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _difference(found: dict[str, Any]) -> str:
    seeds = ", ".join(f"{100 * value:+.1f}" for value in found["seeds"])
    return f"{100 * found['mean']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}] ({seeds})"
