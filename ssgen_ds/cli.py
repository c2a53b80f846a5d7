"""`ssgen`: thin, one function a command. Heavy imports live inside the functions: `ssgen --help` needs no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ssgen_ds.errors import UserError
from ssgen_ds.launch import drop_local_rank, guarded

app = typer.Typer(
    help="Finetune language models on the tokens that they generate themselves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(help="Recipe (YAML).", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for instance train.lr=1e-5.")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]
ModelPath = Annotated[
    str, typer.Option("--model", help="Run folder, checkpoint, adapter, Hugging Face folder or id, or GGUF file.")
]
DataFile = Annotated[str, typer.Option(help="Prompts and references: a file, glob or hub id, in any data format.")]
Correct = Annotated[int, typer.Option(min=0, help="Correction turns after the first answer, at most.")]
MaxNewTokens = Annotated[int, typer.Option(min=1)]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopK = Annotated[int, typer.Option(min=0)]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0)]
Batch = Annotated[str, typer.Option(help="Sequences decoded together on a rank; auto: as many as memory allows.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first examples.")]
MaxPromptTokens = Annotated[
    int | None, typer.Option(min=1, help="Cut longer prompts, to compare a model with one that was trained so.")
]
Prompt = Annotated[str | None, typer.Option(help="Prompt template over the columns; default: the run's.")]
Reference = Annotated[str | None, typer.Option(help="Column of the gold answers; default: the run's, or completion.")]
DeepSpeedFile = Annotated[
    str | None, typer.Option("--deepspeed", help="DeepSpeed file; with ZeRO-3 the ranks share the model.")
]


def _batch(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch: must be auto or a whole number from 1 on, got {text!r}")
    return int(text)


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train by a recipe. Several processes: deepspeed, torchrun or srun with `-m ssgen_ds.train`."""
    from ssgen_ds.train import train as run

    run(recipe, overrides or [])


@app.command()
def preview(
    recipe: RecipeFile,
    overrides: Overrides = None,
    number: Annotated[int, typer.Option("-n", min=1, help="Examples to show.")] = 3,
) -> None:
    """Show tokens, labels, EOS, the gold/self mix and a correction example, coloured, before training."""
    from ssgen_ds.config import load_recipe
    from ssgen_ds.preview import preview as run

    run(load_recipe(recipe, overrides), number)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="Of a node; default: those here. 0: a CPU.")] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Of one GPU: 24GiB, 80GB. Default: that of the one here.")] = "",
    host_memory: Annotated[str, typer.Option(help="Of a node, for what is offloaded: 256GiB.")] = "",
    card: Annotated[str, typer.Option(help="For the seconds: H200, H100, A100, L40S, 4090, 3090, A10, T4.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Say before any weight is read whether a recipe fits, what would make it fit, and how long it takes.

    Exit code 1 when it does not fit.
    """
    from ssgen_ds.plan.run import command, find_hardware

    if not command(recipe, overrides or [], find_hardware(gpus, nodes, gpu_memory, host_memory), card, as_json):
        raise typer.Exit(1)


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe (YAML); none: the machine alone.")] = None,
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Look for what hurts later: versions, compilers, network, SLURM, tokenizer, data. Exit code 2 when it does."""
    from ssgen_ds.doctor.run import command

    if not command(recipe, overrides or [], strict, as_json):
        raise typer.Exit(2)


@app.command()
def generate(
    model: ModelPath,
    data: DataFile,
    out: Annotated[Path, typer.Option(help="JSON lines to write.")],
    correct: Correct = 0,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: int = 0,
    batch: Batch = "auto",
    limit: Limit = None,
    prompt: Prompt = None,
    max_prompt_tokens: MaxPromptTokens = None,
    deepspeed: DeepSpeedFile = None,
) -> None:
    """Answer every prompt of a file, with optional self-correction."""
    from ssgen_ds.evaluate.answers import AnswerSettings
    from ssgen_ds.generate import generate as run
    from ssgen_ds.inference import InferenceSettings

    where = InferenceSettings(model, data, prompt, limit, _batch(batch), deepspeed, max_prompt_tokens=max_prompt_tokens)
    run(where, AnswerSettings(max_new_tokens, temperature, top_k, top_p, seed, correct), out)


@app.command()
def evaluate(
    model: ModelPath,
    data: DataFile,
    metrics: Annotated[str, typer.Option(help="rouge, em, f1, math, or your own module:function.")] = "rouge,em",
    out: Annotated[Path | None, typer.Option(help="JSON to write; default: in the run's evaluations/.")] = None,
    correct: Correct = 0,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt, averaged.")] = 1,
    seed: int = 0,
    batch: Batch = "auto",
    limit: Limit = None,
    prompt: Prompt = None,
    max_prompt_tokens: MaxPromptTokens = None,
    reference: Reference = None,
    deepspeed: DeepSpeedFile = None,
) -> None:
    """Answer, score with confidence intervals, and keep every prediction. Goes on where it was stopped."""
    from ssgen_ds.evaluate.answers import AnswerSettings
    from ssgen_ds.evaluate.run import evaluate as run
    from ssgen_ds.inference import InferenceSettings

    where = InferenceSettings(model, data, prompt, limit, _batch(batch), deepspeed, reference, max_prompt_tokens)
    how = AnswerSettings(max_new_tokens, temperature, top_k, top_p, seed, correct, samples)
    run(where, how, [name.strip() for name in metrics.split(",") if name.strip()], out)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="F.json of `ssgen evaluate`.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="That of another model, on the same examples.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Compare two evaluations of the same examples, paired: differences, intervals, p-values."""
    import json

    from ssgen_ds.evaluate.compare import compare as run
    from ssgen_ds.evaluate.table import print_comparison

    result = run(before, after)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print_comparison(result)


@app.command()
def gap(
    model: Annotated[
        list[str], typer.Option("--model", help="As for generate; several times: all in one figure, against the first.")
    ],
    data: DataFile,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: gap/ in a single run's folder.")] = None,
    rates: Annotated[str, typer.Option(help="Mix rates; 0 and 1 are always among them.")] = "0,.05,.1,.25,.5,1",
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: int = 0,
    batch: Batch = "auto",
    limit: Limit = 256,
    prompt: Prompt = None,
    max_prompt_tokens: MaxPromptTokens = None,
    reference: Reference = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Not the base of a single trained model.")] = False,
    deepspeed: DeepSpeedFile = None,
) -> None:
    """Measure the training-inference gap: gold tokens after gold contexts and after the model's own."""
    from ssgen_ds.evaluate.gap import GapSettings
    from ssgen_ds.gap import gap as run
    from ssgen_ds.gap import parse_rates
    from ssgen_ds.inference import InferenceSettings

    where = InferenceSettings("", data, prompt, limit, _batch(batch), deepspeed, reference, max_prompt_tokens)
    run(model, where, GapSettings(parse_rates(rates), temperature, top_k, top_p, seed), out, with_base=not no_base)


@app.command()
def report(run: RunFolder) -> None:
    """Write one self-contained report.html for a run; also while it is running."""
    from ssgen_ds.evaluate.report import write_report

    print(write_report(run))


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into its base.")] = False,
) -> None:
    """Write the trained model as a Hugging Face folder."""
    from ssgen_ds.references import export_run

    export_run(run, out, merge)


@app.command()
def slurm(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="0: nodes without GPUs, one rank on each.")] = 0,
    time: Annotated[str, typer.Option(help="Limit, as sbatch takes it: 24:00:00.")] = "",
    account: str = "",
    partition: str = "",
    module: Annotated[list[str] | None, typer.Option(help="To load; may be given several times.")] = None,
    venv: Annotated[Path | None, typer.Option(help="To activate.")] = None,
    container: Annotated[str, typer.Option(help="Image for apptainer.")] = "",
    launcher: Annotated[str, typer.Option(help="srun or deepspeed.")] = "srun",
    requeue: Annotated[bool, typer.Option("--requeue", help="Go on by itself after preemption or time limit.")] = False,
    out: Annotated[Path | None, typer.Option(help="Script to write; default: standard output.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Hand it to sbatch.")] = False,
) -> None:
    """Make a batch script for SLURM from a recipe, and submit it."""
    from ssgen_ds.slurm import SlurmSettings
    from ssgen_ds.slurm import slurm as run

    settings = SlurmSettings(
        recipe, overrides or [], nodes, gpus_per_node, time, account, partition, module or [], venv, container,
        launcher, requeue,
    )  # fmt: skip
    run(settings, out, submit)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="selfgen or train.", show_default=False)],
    rows: Annotated[str, typer.Option(help="Rows to measure, S1,S2,...; earlier results of the others stay.")] = "",
    model: Annotated[str, typer.Option(help="smollm2, tiny (random weights), or what model.path takes.")] = "smollm2",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
) -> None:
    """Measure the product beside its peers; needs the checkout and its extra `bench`."""
    checkout = Path(__file__).parents[1]
    if not (checkout / "bench" / "__init__.py").is_file():
        raise UserError(f"the benchmarks are not in the installed package: run ssgen from a checkout, not {checkout}")
    if what not in ("selfgen", "train"):
        raise UserError(f"no benchmark {what!r}; there are: selfgen, train")
    sys.path.insert(0, str(checkout))
    if what == "train":
        from bench.train.run import command as train_command

        if not train_command(rows.split(",") if rows else None, as_json):
            raise typer.Exit(1)
        return
    from bench.selfgen.run import command

    if not command(model, rows.split(",") if rows else None, as_json):
        raise typer.Exit(1)


def main() -> None:
    """Console entry: exit codes and messages as INTERFACE has them."""
    guarded(lambda arguments: app(args=arguments, standalone_mode=True), drop_local_rank(sys.argv[1:]))
