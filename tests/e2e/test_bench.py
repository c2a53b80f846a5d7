"""`ssgen bench selfgen`: all rows end to end on a tiny model, and the results file and table on their own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from bench.selfgen import table
from bench.selfgen.baselines import token_by_token
from bench.selfgen.peers import left_padded
from bench.selfgen.rows import NOT_MEASURED, Row, times_better
from bench.selfgen.single import accepted_share, different_rows
from bench.selfgen.sizes import ROWS
from ssgen_ds.modeling.cached import CachedCausalLM
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.fixed_point import sample_fixed_point
from ssgen_ds.sampler.requests import Request, Sampled
from tests.support.launch import ROOT, run
from tests.support.tiny_models import tiny_model

SSGEN = str(Path(sys.executable).parent / "ssgen")
COPY = [sys.executable, "-P", "-m", "ssgen_ds"]  # -P: not the one in the working directory
KEYS = {"work", "ours", "peer", "ratio", "bar", "holds"}


def row(ours: float, **checks: bool) -> dict:
    mine, peer = {"0.1": ours}, {"0.1": {"a": 12.0, "b": 3.0}}
    return Row(mine, peer, times_better(mine, peer, higher_is_better=False), checks).to_json("S1")


@pytest.mark.timeout(400)
def test_all_rows_on_a_tiny_model(tmp_path: Path) -> None:
    """In a copy, so that the checkout's results stay; what cannot depend on the machine's speed must hold."""
    for name in ("bench", "ssgen_ds", "tests", "ds_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    command = [*COPY, "bench", "selfgen", "--model", "tiny", "--json"]
    finished = run(command, 350, PYTHONPATH=str(tmp_path))
    assert finished.returncode == 0, finished.stderr[-6000:]
    results = json.loads(finished.stdout)  # nothing but the JSON
    assert tuple(results["rows"]) == ROWS
    for name, entry in results["rows"].items():
        assert entry.keys() >= KEYS, name
        assert entry["ours"] != NOT_MEASURED and entry["ratio"].keys() == entry["peer"].keys() == entry["ours"].keys()
        identical = [held for check, held in entry["checks"].items() if check.startswith("tokens identical")]
        assert all(identical), name
        assert identical or name not in ("S1", "S3", "S4")
    assert results["rows"]["S1"]["holds"]
    assert results["rows"]["S5"]["peer"]["sharded"].keys() == {"TRL", "HybridEngineRollout"}
    written = tmp_path / "bench" / "results"
    assert json.loads((written / "selfgen-tiny.json").read_text()) == results
    assert (written / "selfgen-tiny-passes.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["selfgen", "--rows", "S1,S9"], "unknown S9"),
        (["elsewhere"], "no benchmark 'elsewhere'; there are: selfgen, train"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    finished = run([SSGEN, "bench", *arguments], 60)
    assert finished.returncode == 2
    assert message in finished.stderr


def test_without_a_checkout(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "ssgen_ds", tmp_path / "ssgen_ds", ignore=shutil.ignore_patterns("__pycache__"))
    finished = run([*COPY, "bench", "selfgen"], 60, PYTHONPATH=str(tmp_path))
    assert finished.returncode == 2
    assert "run ssgen from a checkout" in finished.stderr


def test_a_later_partial_run_is_merged(tmp_path: Path) -> None:
    file = tmp_path / "results" / "selfgen-tiny.json"
    first = table.merge(table.read(file), "tiny", {"S1": row(4.0, fast=True), "S2": row(2.0)}, {}, {"rows": 8})
    table.write(file, first)
    second = table.merge(table.read(file), "tiny", {"S2": row(1.0)}, {"S4": "no end within 5 s"}, {"rows": 16})
    assert tuple(second["rows"]) == ROWS
    assert second["rows"]["S1"] == first["rows"]["S1"]
    assert second["rows"]["S2"]["ours"] == {"0.1": 1.0} and second["rows"]["S2"]["sizes"] == {"rows": 16}
    assert second["rows"]["S4"]["ours"] == NOT_MEASURED and second["rows"]["S4"]["why"] == "no end within 5 s"
    assert second["rows"]["S6"]["why"] == "not asked for"
    failed = table.merge(second, "tiny", {}, {"S1": "the worker ended with exit code 1"}, {})
    assert failed["rows"]["S1"]["ours"] == NOT_MEASURED


def test_table_says_what_holds_and_what_does_not() -> None:
    rows = {"S1": row(4.0, fast=True), "S2": row(4.0, fast=True, right=False), "S6": row(4.0)}
    lines = table.markdown(table.merge({}, "tiny", rows, {}, {})).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert "0.1: a 12 (3x), b 3 (0.75x)" in lines[2] and lines[2].endswith("| yes |")
    assert lines[3].endswith("| no: right |")
    assert lines[4].count(NOT_MEASURED) == 3
    assert lines[7].endswith("| reported |")
    assert {line.count("|") for line in lines} == {7}


def test_ratio_above_one_is_in_our_favour() -> None:
    assert times_better({"x": 2.0}, {"x": {"peer": 6.0}}, higher_is_better=False) == {"x": {"peer": 3.0}}
    assert times_better({"x": 6.0}, {"x": {"peer": 2.0}}, higher_is_better=True) == {"x": {"peer": 3.0}}


def test_token_by_token_is_the_sequential_definition() -> None:
    """Against the sampler at every block size, on prompts of different lengths; some positions draw for no row."""
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    requests = []
    for i, length in enumerate((3, 9, 5)):
        ids = torch.randint(3, 96, (length + 20,), generator=generator).tolist()
        coins = [t % 7 in (i, 3) for t in range(20)]
        requests.append(Request(ids[:length], ids[length:], coins, key=100 + i))
    sampling = Sampling(banned_ids=(0, 1, 2))
    contexts, calls, _ = token_by_token(CachedCausalLM(model), requests, sampling)
    assert calls == 20
    for block in (1, 3, None):
        results, _ = sample_fixed_point(CachedCausalLM(model), requests, sampling, block)
        assert [result.tokens for result in results] == contexts
        assert different_rows(results, contexts) == 0
    assert contexts != [request.guess_ids for request in requests]


def test_different_rows_excuses_ties_only() -> None:
    results = [Sampled([1, 2]), Sampled([1, 3]), Sampled([1, 3], ties=1)]
    assert different_rows(results, [[1, 2], [1, 2], [1, 2]]) == 1


def test_accepted_share_of_a_guess() -> None:
    guess = Request([9], [5, 2, 7, 4], [True, False, True, False], key=0)
    assert accepted_share(guess, Sampled([5, 2, 0, 4])) == 0.5
    assert accepted_share(guess, Sampled([5, 2, 7, 4])) == 1.0
    assert accepted_share(guess, Sampled([0, 2, 7, 4])) == 0.0


def test_peers_tokens_count_up_to_the_first_stop() -> None:
    prompts = left_padded([[5, 6], [7]], 4, stop_ids=(2, 3), pad_id=2, device=torch.device("cpu"))
    assert prompts.ids_BL.tolist() == [[5, 6], [2, 7]] and prompts.mask_BL.tolist() == [[1, 1], [0, 1]]
    assert prompts.count(torch.tensor([[5, 6, 8, 3, 2, 2], [2, 7, 8, 8, 8, 8]])) == 2 + 4
