"""Batch scripts: the shipped ones are the template's, the rendered ones say what was asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ssgen_ds.errors import UserError
from ssgen_ds.slurm import SHIPPED, SlurmSettings, job_for, slurm

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smoke.yaml"


def parses(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_scripts_are_what_the_template_gives(name):
    """After a change of the template: `make slurm`."""
    assert (ROOT / "slurm" / name).read_text() == SHIPPED[name].render()
    assert parses(SHIPPED[name].render())


def test_every_script_there_is_is_shipped_on_purpose():
    assert {file.name for file in (ROOT / "slurm").glob("*.sbatch")} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_scripts_ask_for_no_resources(name):
    options = [line for line in SHIPPED[name].render().splitlines() if line.startswith("#SBATCH")]
    allowed = ("--job-name=ssgen", "--open-mode=append", "--requeue", "--signal=B:USR1@120")
    assert all(option.removeprefix("#SBATCH ") in allowed for option in options), options


def test_without_a_recipe_a_script_says_how_to_use_it(tmp_path):
    script = tmp_path / "train.sbatch"
    script.write_text(SHIPPED["train.sbatch"].render())
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "usage: sbatch --nodes=N slurm/train.sbatch RECIPE [key=value ...]\n"


STUBS = {
    "scontrol": 'echo "$*" >>"$CALLS"; if [ "$2" = job ]; then echo "JobState=$STATE"; else echo n1; fi',
    "srun": 'exit "$CODE"',
    "getent": "true",
    "sleep": "true",
}


@pytest.mark.parametrize(
    ("code", "restarts", "state", "requeued"),
    [
        (0, 0, "RUNNING", False),
        (2, 0, "RUNNING", False),
        (75, 0, "RUNNING", True),
        (75, 99, "RUNNING", True),  # it says itself when it gets no further
        (1, 3, "RUNNING", True),
        (127, 4, "RUNNING", False),  # no Python: a loop that nobody else would end
        (1, 4, "RUNNING", False),
        (75, 0, "COMPLETING", False),  # cancelled, or SLURM requeues it itself
    ],
)
def test_when_a_job_requeues_itself(tmp_path, code, restarts, state, requeued):
    """The script itself, with SLURM's commands replaced."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"CODE": str(code), "STATE": state, "CALLS": str(tmp_path / "calls")}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
    done = subprocess.run(
        ["bash", "-s", "recipe.yaml"],
        input=SHIPPED["requeue.sbatch"].render(),
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_RESTART_COUNT": str(restarts), **variables, **job},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done
    assert done.stderr == ""
    assert ("requeue 7" in (tmp_path / "calls").read_text().splitlines()) == requeued


def test_a_rendered_script_holds_everything_that_was_asked_for(tmp_path):
    (tmp_path / "my venv" / "bin").mkdir(parents=True)
    (tmp_path / "my venv" / "bin" / "activate").touch()
    settings = SlurmSettings(
        RECIPE,
        ["data.prompt={question} ?", "train.lr=1e-4"],
        nodes=3,
        gpus_per_node=8,
        time="1-12:00:00",
        account="physics",
        partition="gpu",
        modules=["cuda/12.8", "gcc"],
        venv=tmp_path / "my venv",
        requeue=True,
    )
    script = job_for(settings).render()
    assert parses(script)
    for line in (
        "#SBATCH --nodes=3",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=1-12:00:00",
        "#SBATCH --account=physics",
        "#SBATCH --partition=gpu",
        "#SBATCH --requeue",
        "module load cuda/12.8",
        "module load gcc",
        f"source '{tmp_path}/my venv'/bin/activate",
        f"recipe=({RECIPE} 'data.prompt={{question}} ?' train.lr=1e-4 \"$@\")",
    ):
        assert line in script.splitlines(), (line, script)
    assert 'scontrol requeue "$SLURM_JOB_ID"' in script
    assert "deepspeed.launcher" not in script
    contained = job_for(SlurmSettings(RECIPE, container="my image.sif", launcher="deepspeed")).render()
    assert parses(contained)
    assert "python=(apptainer exec --nv 'my image.sif' python)" in contained and "deepspeed.launcher" in contained
    assert "requeue" not in contained and "gpus-per-node=8 --time" in contained  # in the comment only


def test_what_cannot_work_is_refused_all_at_once(tmp_path):
    settings = SlurmSettings(
        RECIPE, launcher="mpirun", time="soon", venv=tmp_path, container="x.sif", account="my account"
    )
    with pytest.raises(UserError) as caught:
        job_for(settings)
    for part in ("--launcher: 'mpirun'", "--time: 'soon'", "has no bin/activate", "give one of the two", "--account"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        job_for(SlurmSettings(tmp_path / "missing.yaml"))
    with pytest.raises(UserError, match=r"train\.lr"):
        job_for(SlurmSettings(RECIPE, ["train.lr=fast"]))


def test_written_printed_and_not_submitted_without_sbatch(tmp_path, capsys, monkeypatch):
    out = tmp_path / "job.sbatch"
    slurm(SlurmSettings(RECIPE), out, submit=False)
    assert capsys.readouterr().out == f"{out}\n"
    slurm(SlurmSettings(RECIPE), None, submit=False)
    assert capsys.readouterr().out == out.read_text()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch"):
        slurm(SlurmSettings(RECIPE), None, submit=True)
