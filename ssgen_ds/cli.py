"""`ssgen`: thin, one function a command. Heavy imports live inside the functions: `ssgen --help` needs no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ssgen_ds.distributed.launch import drop_local_rank, guarded
from ssgen_ds.errors import UserError
from ssgen_ds.inference import options
from ssgen_ds.recipe.user_paths import expanded_arguments
from ssgen_ds.run.result_names import DEFAULT_METRICS

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
    from ssgen_ds.distributed.launch import before_meeting
    from ssgen_ds.modeling.preflight import recipe_to_read

    checked = before_meeting(lambda: recipe_to_read(recipe, overrides or []))
    from ssgen_ds.preview import preview as run

    run(checked, number)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs of a node. Default: this machine's. 0: a CPU.")] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Memory of one GPU: 24GiB, 80GB. Default: this machine's.")] = "",
    host_memory: Annotated[str, typer.Option(help="Memory of one node, for offloading: 256GiB.")] = "",
    card: Annotated[str, typer.Option(help="Card to time: H200, H100, A100, L40S, 4090, 3090, A10, T4.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Say before any weight is read whether a recipe fits, what would make it fit, and how long it takes.

    Exit code 1 when it does not fit.
    """
    from ssgen_ds.modeling.preflight import recipe_to_plan

    recipe_to_plan(recipe, overrides or [])
    from ssgen_ds.plan.run import find_hardware, print_plan

    if not print_plan(recipe, overrides or [], find_hardware(gpus, nodes, gpu_memory, host_memory), card, as_json):
        raise typer.Exit(1)


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe (YAML); none: the machine alone.")] = None,
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Look for problems before a run: versions, compilers, network, SLURM, tokenizer, data. Errors: exit code 2."""
    from ssgen_ds.doctor.run import print_findings

    if not print_findings(recipe, overrides or [], strict, as_json):
        raise typer.Exit(2)


@app.command()
def generate(
    model: options.Model,
    data: options.DataFile,
    out: Annotated[Path, typer.Option(help="JSON lines to write.")],
    correct: options.Correct = 0,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: int = 0,
    batch: options.Batch = "auto",
    limit: options.Limit = None,
    prompt: options.Prompt = None,
    max_prompt_tokens: options.MaxPromptTokens = None,
    deepspeed: options.DeepSpeedFile = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Answer every prompt of a file, with optional self-correction."""
    from ssgen_ds.inference.preflight import check_before_meeting
    from ssgen_ds.inference.session import InferenceSettings, check_new

    where = InferenceSettings(
        model=model, data=data, prompt=prompt, limit=limit, batch=options.rows_of(batch), deepspeed=deepspeed,
        max_prompt_tokens=max_prompt_tokens, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    check_before_meeting([model], where, of_first=lambda: check_new(out))
    from ssgen_ds.inference.answers import AnswerSettings
    from ssgen_ds.inference.generate import generate as run

    how = AnswerSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, correct=correct,
    )  # fmt: skip
    run(where, how, out)


@app.command()
def evaluate(
    model: options.Model,
    data: options.DataFile,
    metrics: Annotated[str, typer.Option(help="rouge, em, f1, math, or your own module:function.")] = DEFAULT_METRICS,
    out: Annotated[Path | None, typer.Option(help="JSON to write; default: in the run's evaluations/.")] = None,
    correct: options.Correct = 0,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt, averaged.")] = 1,
    seed: int = 0,
    batch: options.Batch = "auto",
    limit: options.Limit = None,
    prompt: options.Prompt = None,
    max_prompt_tokens: options.MaxPromptTokens = None,
    reference: options.ReferenceColumn = None,
    deepspeed: options.DeepSpeedFile = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Answer, score with confidence intervals, and keep every prediction. A stopped evaluation continues."""
    from ssgen_ds.inference.preflight import check_before_meeting
    from ssgen_ds.inference.session import InferenceSettings, check_out, check_samples
    from ssgen_ds.metrics.scorer import metric_names

    where = InferenceSettings(
        model=model, data=data, prompt=prompt, limit=limit, batch=options.rows_of(batch), deepspeed=deepspeed,
        reference_column=reference, max_prompt_tokens=max_prompt_tokens, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    wanted = [name.strip() for name in metrics.split(",") if name.strip()]
    check_before_meeting(
        [model],
        where,
        lambda: metric_names(wanted),
        lambda: check_samples(samples, temperature),
        of_first=None if out is None else lambda: check_out(out),
    )
    from ssgen_ds.evaluate.evaluate import evaluate as run
    from ssgen_ds.inference.answers import AnswerSettings

    how = AnswerSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, correct=correct,
        samples=samples,
    )  # fmt: skip
    run(where, how, wanted, out)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="JSON file that `ssgen evaluate` wrote.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="JSON file of another model on the same examples.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Compare two evaluations of the same examples, paired: differences, intervals, p-values."""
    from ssgen_ds.evaluate.compare import compare as run
    from ssgen_ds.evaluate.table import print_comparison

    result = run(before, after)
    print(json.dumps(result, indent=2)) if as_json else print_comparison(result)


@app.command()
def gap(
    model: Annotated[
        list[str], typer.Option("--model", help="As for generate. Give several to compare them with the first one.")
    ],
    data: options.DataFile,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: gap/ in a single run's folder.")] = None,
    rates: Annotated[str, typer.Option(help="Mix rates; 0 and 1 are always among them.")] = "0,.05,.1,.25,.5,1",
    temperature: options.Temperature = 1.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: int = 0,
    batch: options.Batch = "auto",
    limit: options.Limit = 256,
    prompt: options.Prompt = None,
    max_prompt_tokens: options.MaxPromptTokens = None,
    reference: options.ReferenceColumn = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Do not also measure the base model.")] = False,
    deepspeed: options.DeepSpeedFile = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure the training-inference gap: gold tokens after gold contexts and after the model's own."""
    from ssgen_ds.evaluate.gap_options import check_folder, parse_rates
    from ssgen_ds.inference.preflight import check_before_meeting
    from ssgen_ds.inference.session import InferenceSettings

    where = InferenceSettings(
        model="", data=data, prompt=prompt, limit=limit, batch=options.rows_of(batch), deepspeed=deepspeed,
        reference_column=reference, max_prompt_tokens=max_prompt_tokens, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    check_before_meeting(model, where, lambda: parse_rates(rates), of_first=lambda: check_folder(out, model))
    from ssgen_ds.evaluate.gap import gap as run
    from ssgen_ds.evaluate.gap_measure import GapSettings

    how = GapSettings(rates=parse_rates(rates), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    run(model, where, how, out, with_base=not no_base)


@app.command()
def report(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="Page to write; default: report.html in the run.")] = None,
) -> None:
    """Write one self-contained report.html for a run, finished or still running."""
    from ssgen_ds.report.page import write_report

    print(write_report(run, out))


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into its base.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Write the trained model as a Hugging Face folder."""
    from ssgen_ds.inference.export import export_run

    export_run(run, out, merge, trust_remote_code)


@app.command()
def slurm(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="0: nodes without GPUs, one rank on each.")] = 0,
    time: Annotated[str, typer.Option(help="Time limit in the format of sbatch: 24:00:00.")] = "",
    account: str = "",
    partition: str = "",
    module: Annotated[list[str] | None, typer.Option(help="Module to load. May be given several times.")] = None,
    venv: Annotated[Path | None, typer.Option(help="Virtual environment to activate.")] = None,
    container: Annotated[str, typer.Option(help="Image for apptainer.")] = "",
    launcher: Annotated[str, typer.Option(help="srun or deepspeed.")] = "srun",
    requeue: Annotated[bool, typer.Option("--requeue", help="Continue after preemption or the time limit.")] = False,
    out: Annotated[Path | None, typer.Option(help="Script to write; default: standard output.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Hand it to sbatch.")] = False,
) -> None:
    """Make a batch script for SLURM from a recipe, and submit it."""
    from ssgen_ds.slurm import SlurmSettings
    from ssgen_ds.slurm import slurm as run

    settings = SlurmSettings(
        recipe=recipe, overrides=overrides or [], nodes=nodes, gpus_per_node=gpus_per_node, time=time, account=account,
        partition=partition, modules=module or [], venv=venv, container=container, launcher=launcher, requeue=requeue,
    )  # fmt: skip
    run(settings, out, submit)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="selfgen or train.", show_default=False)],
    rows: Annotated[str, typer.Option(help="Rows to measure: S1,S2,... Results of other rows stay.")] = "",
    model: Annotated[str, typer.Option(help="smollm2, tiny (random weights), or what model.path takes.")] = "smollm2",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
) -> None:
    """Measure the product against its peers. This needs the checkout and its extra `bench`."""
    import runpy

    checkout = Path(__file__).parents[1]
    if not (checkout / "bench" / "__main__.py").is_file():
        raise UserError(f"the benchmarks are not in the installed package: run ssgen from a checkout, not {checkout}")
    sys.path.insert(0, str(checkout))
    sys.argv = ["bench", what, f"--rows={rows}", f"--model={model}", *(["--json"] if as_json else [])]
    runpy.run_module("bench", run_name="__main__")


def main() -> None:
    """Console entry: every failure becomes one message and an exit code."""
    guarded(
        lambda arguments: app(args=expanded_arguments(arguments), standalone_mode=True), drop_local_rank(sys.argv[1:])
    )
