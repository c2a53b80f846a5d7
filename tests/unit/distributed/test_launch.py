import os
import resource
import subprocess
import sys

import pytest

from ssgen_ds.distributed.launch import drop_local_rank, guarded, split_arguments
from ssgen_ds.errors import RankError, StopRequested, UserError


@pytest.mark.parametrize(
    "arguments",
    [["--local_rank=1", "r.yaml", "a.b=1"], ["--local-rank", "1", "r.yaml", "a.b=1"], ["r.yaml", "a.b=1"]],
)
def test_launcher_arguments_are_accepted(arguments, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert split_arguments(arguments, usage="RECIPE", expected=1) == (["r.yaml"], ["a.b=1"])


def test_other_options_and_missing_recipe_are_refused():
    with pytest.raises(UserError, match="unknown option --foo"):
        split_arguments(["--foo", "r.yaml"], usage="RECIPE", expected=1)
    with pytest.raises(UserError, match="usage: RECIPE"):
        split_arguments(["a=1"], usage="RECIPE", expected=1)
    assert drop_local_rank(["x", "--local_rank", "3"]) == ["x"]


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("the place and the fix"), 2), (StopRequested("stopped"), 75), (None, 0)]
)
def test_exit_codes(error, code, capsys):
    def work(arguments):
        if error:
            raise error

    with pytest.raises(SystemExit) as caught:
        guarded(work, [])
    assert caught.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def test_only_rank_0_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")

    def work(arguments):
        raise UserError("said once")

    with pytest.raises(SystemExit):
        guarded(work, [])
    assert capsys.readouterr().err == ""


def test_help_is_quick_and_imports_no_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import sys, ssgen_ds.cli, ssgen_ds.recipe.schema, ssgen_ds.recipe.deepspeed; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    result = subprocess.run([sys.executable, "-m", "ssgen_ds", "--help"], capture_output=True, text=True, timeout=60)
    assert "train" in result.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of two interpreters, in time of a processor: the machine may be busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4


@pytest.mark.parametrize(("rank", "told"), [("0", ["info", "warning"]), ("1", ["warning"])])
def test_information_comes_from_rank_0_and_warnings_from_all(rank, told):
    code = (
        "import logging; from ssgen_ds.distributed.launch import quiet_libraries; quiet_libraries(); "
        "log = logging.getLogger('ssgen_ds.any'); log.info('info'); log.warning('warning'); "
        "logging.getLogger('library').info('chatter')"
    )
    environment = {**os.environ, "RANK": rank}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert result.stderr.split() == told


@pytest.mark.parametrize(("error", "said"), [(RankError("alone"), "error: alone\n"), (UserError("together"), "")])
def test_another_rank_speaks_only_when_the_first_may_not_know(monkeypatch, capsys, error, said):
    monkeypatch.setenv("RANK", "1")

    def fail(arguments: list[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        guarded(fail, [])
    assert (caught.value.code, capsys.readouterr().err) == (2, said)


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_of_a_gpu_grows_in_place_unless_the_user_says_otherwise(own, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(own, "max_split_size_mb:128")
    with pytest.raises(SystemExit):
        guarded(lambda arguments: None, [])
    settings = {name: os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
    assert [value for value in settings.values() if value] == [
        "max_split_size_mb:128" if own else "expandable_segments:True"
    ]
