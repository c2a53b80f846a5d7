"""Batch scripts for SLURM, all from one template: the three in `slurm/`, and `ssgen slurm` for one recipe.

python -m ssgen_ds.slurm slurm     writes the shipped ones again
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from ssgen_ds.errors import UserError
from ssgen_ds.recipe.deepspeed import find_shipped
from ssgen_ds.recipe.load import load_recipe

TEMPLATE = "slurm/job.sbatch.jinja"
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE", re.I)


@dataclass(frozen=True)
class Job:
    """What a script is made from; empty values leave the choice to the command line of sbatch."""

    title: str
    usage: str
    name: str = "ssgen"
    notes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # of sbatch, without --
    recipe: tuple[str, ...] = ()  # recipe file and key=value
    launcher: str = "srun"
    requeue: bool = False
    grace: int = 120  # seconds before the time limit at which the ranks are told to save
    modules: tuple[str, ...] = ()
    venv: str = ""
    container: str = ""

    def render(self) -> str:
        """The script. Raises UserError when the template is not found."""
        import jinja2

        file = find_shipped(TEMPLATE)
        if file is None:
            raise UserError(f"{TEMPLATE}: not found, neither here nor beside the package")
        environment = jinja2.Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            comment_start_string="{##",  # bash writes ${#array[@]}
            undefined=jinja2.StrictUndefined,
        )
        recipe = "".join(f"{shlex.quote(word)} " for word in self.recipe)
        values = vars(self) | {
            "recipe": recipe,
            "venv": shlex.quote(self.venv) if self.venv else "",
            "container": shlex.quote(self.container) if self.container else "",
        }
        return environment.from_string(file.read_text(encoding="utf-8")).render(values)


_PLAIN = Job(
    title="Train by a recipe on one or many nodes.",
    usage="sbatch --nodes=N slurm/train.sbatch RECIPE [key=value ...]",
    notes=("srun starts the ranks, and they find each other by SLURM's variables: no ssh, no hostfile, no MPI.",),
)
SHIPPED = {
    "train.sbatch": _PLAIN,
    "deepspeed.sbatch": replace(
        _PLAIN,
        title="Train by a recipe with the `deepspeed` launcher on every node.",
        usage="sbatch --nodes=N slurm/deepspeed.sbatch RECIPE [key=value ...]",
        notes=("For those who need that launcher's options; without ssh, each node starts its own ranks.",),
        launcher="deepspeed",
    ),
    "requeue.sbatch": replace(
        _PLAIN,
        title="Train by a recipe where jobs are preempted or run into their time limit, until it is done.",
        usage="sbatch --nodes=N slurm/requeue.sbatch RECIPE [key=value ...]",
        notes=(
            "The ranks are told in time, save and end; the job requeues itself and goes on, in the same log.",
            "The partition must allow requeueing (JobRequeue), and preemption there should be PreemptMode=REQUEUE.",
        ),
        requeue=True,
    ),
}


def write_shipped(folder: Path) -> None:
    for name, job in SHIPPED.items():
        (folder / name).write_text(job.render(), encoding="utf-8")


@dataclass(frozen=True)
class SlurmSettings:
    """The options of `ssgen slurm`."""

    recipe: Path
    overrides: list[str] = field(default_factory=list)
    nodes: int = 1
    gpus_per_node: int = 0
    time: str = ""
    account: str = ""
    partition: str = ""
    modules: list[str] = field(default_factory=list)
    venv: Path | None = None
    container: str = ""
    launcher: str = "srun"
    requeue: bool = False


def job_for(settings: SlurmSettings) -> Job:
    """Raises UserError with everything that is wrong, the recipe's own errors included."""
    recipe = load_recipe(settings.recipe, settings.overrides)
    if problems := _problems(settings):
        raise UserError.from_list("ssgen slurm", problems)
    options = [f"nodes={settings.nodes}"]
    options += [f"gpus-per-node={settings.gpus_per_node}"] if settings.gpus_per_node else []
    options += [
        f"{name}={value}"
        for name, value in (("time", settings.time), ("account", settings.account), ("partition", settings.partition))
        if value
    ]
    output = Path(recipe.output_dir)
    return Job(
        title=f"Train by {settings.recipe} on {settings.nodes} node{'s' * (settings.nodes > 1)}.",
        usage="sbatch THIS_FILE [key=value ...]",
        name=re.sub(r"[^\w.-]", "-", output.name) or "ssgen",
        notes=(f"Results: {output.absolute()}",),
        options=tuple(options),
        recipe=(str(settings.recipe.absolute()), *settings.overrides),
        launcher=settings.launcher,
        requeue=settings.requeue,
        modules=tuple(settings.modules),
        venv=str(settings.venv.absolute()) if settings.venv else "",
        container=settings.container,
    )


def _problems(settings: SlurmSettings) -> list[str]:
    problems = []
    if settings.launcher not in ("srun", "deepspeed"):
        problems.append(f"--launcher: {settings.launcher!r} is not srun or deepspeed")
    if settings.time and not _TIME.fullmatch(settings.time):
        problems.append(f"--time: {settings.time!r} is no SLURM time: minutes, HH:MM:SS or D-HH:MM:SS")
    if settings.venv is not None and not (settings.venv / "bin" / "activate").is_file():
        problems.append(f"--venv: {settings.venv} has no bin/activate")
    if settings.venv is not None and settings.container:
        problems.append("--venv and --container: give one of the two")
    for name, value in (("--account", settings.account), ("--partition", settings.partition)):
        if re.search(r"\s", value):
            problems.append(f"{name}: {value!r} has a blank in it")
    return problems


def slurm(settings: SlurmSettings, out: Path | None, submit: bool) -> None:
    """Write the script to `out` (to stdout without one), and hand it to sbatch when asked to."""
    script = job_for(settings).render()
    if submit and shutil.which("sbatch") is None:
        raise UserError("--submit: there is no sbatch on this machine; run it where SLURM is, or leave --submit out")
    if out is not None:
        out.write_text(script, encoding="utf-8")
        print(out)
    elif not submit:
        print(script, end="")
    if submit:
        command = ["sbatch", str(out)] if out is not None else ["sbatch"]
        done = subprocess.run(command, input=None if out is not None else script, text=True, capture_output=True)
        if done.returncode != 0:
            raise UserError(f"sbatch refused the job: {done.stderr.strip()}")
        print(done.stdout.strip())


if __name__ == "__main__":
    write_shipped(Path(sys.argv[1]))
