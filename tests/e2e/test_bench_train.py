"""`ssgen bench train` with a tiny model: every side really runs, rows and table are made of what they found."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from bench.train import gpu, run
from bench.train.sizes import ROWS, Sizes
from ssgen_ds.cli import app
from tests.support.tiny_models import save_tiny_model

TINY = {"batch": 2, "steps": 3, "warm_up": 1, "repeats": 1, "max_prompt": 96, "bss_batch": 2, "bss_steps": 2}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results of all rows, and whether the command said that all could be measured."""
    pytest.importorskip("trl", reason="needs the extra bench")
    folder = tmp_path_factory.mktemp("bench")
    save_tiny_model("llama", folder / "model", vocab_size=98, max_position_embeddings=2048)
    sizes = Sizes(model=str(folder / "model"), lengths=(16, 64), examples=(50, 500), timeout_seconds=300, **TINY)
    done = run.command(None, True, sizes, folder)
    return json.loads((folder / "train-smollm2.json").read_text())["rows"], done


def test_every_row_is_measured_or_says_why_not(measured):
    rows, done = measured
    assert done and tuple(rows) == ROWS
    assert rows["T3"]["ours"] == "not measured" and rows["T3"]["why"] == "no GPU at hand"
    for name in ("T1", "T2", "T4"):
        assert rows[name]["machine"]["packages"]["trl"]
        assert rows[name]["holds"] == all(rows[name]["checks"].values())


def test_both_sides_of_t1_train_on_the_same_tokens(measured):
    """Same batches, same model, same optimizer: the losses agree, whatever the speed."""
    (ours,), (trl,) = (measured[0]["T1"]["details"][side] for side in ("ours", "trl"))
    assert ours["losses"] == pytest.approx(trl["losses"], rel=2e-3)
    assert ours["tokens_per_second"] > 0 and trl["peak_bytes"] > 0


def test_ratios_are_of_what_was_measured(measured):
    t2 = measured[0]["T2"]
    assert t2["ratio"]["XSum"] == pytest.approx(t2["ours"]["XSum s/step"] / t2["peer"]["XSum SFT s/step"])
    assert t2["ratio"]["XSum"] > 1
    assert measured[0]["T4"]["ours"]["calls at T=64"] >= measured[0]["T4"]["ours"]["calls at T=16"] > 0


def test_the_table_has_a_line_a_row(measured):
    lines = run.markdown({"rows": measured[0]}).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert "not measured: no GPU at hand" in lines[4]


def test_unknown_rows_and_benchmarks_are_refused():
    for arguments in (["bench", "train", "--rows", "T9"], ["bench", "speed"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code != 0
        assert "T9" in str(result.exception) or "speed" in str(result.exception)


def test_utilisation_of_a_gpu_is_the_formula():
    """46 Tflop/s of an H100's 989: 4.65 %; a card without a published rate has none."""
    assert gpu.utilisation(46e9, 1000.0, "NVIDIA H100 80GB HBM3") == pytest.approx(0.0465, abs=1e-4)
    assert gpu.utilisation(46e9, 1000.0, "Unknown") is None


def test_the_gpu_row_runs_with_a_small_shape():
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 200,
    }
    found = gpu.lora_steps(2, "cpu", 32, 2, 3, **shape)
    assert found["tokens_per_second"] > 0
    assert found["operations"] > 4 * 2 * (64 * 64 * 3 + 3 * 64 * 96)
