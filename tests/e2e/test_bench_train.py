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
    done = run.bench_train(None, True, sizes, folder)
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


SHAPE = {"gpu_layers": 2, "gpu_hidden": 64, "gpu_heads": 4, "gpu_vocabulary": 200}


def test_the_sides_of_the_gpu_row_run_with_a_small_shape(tmp_path):
    """Ours on a quantised base and TRL's, each in a process of its own, as on a GPU."""
    pytest.importorskip("trl", reason="needs the extra bench")
    save_tiny_model("llama", tmp_path / "model", vocab_size=98)
    sizes = Sizes(model=str(tmp_path / "model"), gpu_length=32, gpu_rows=2, gpu_steps=3, timeout_seconds=300, **SHAPE)
    sides = {name: run.side(f"gpu-{name}", sizes, tmp_path) for name in ("trl", "qlora")}
    sides["ours"] = sides["qlora"]
    assert all(side["tokens_per_second"] > 0 and side["peak_bytes"] > 0 for side in sides.values())
    row = gpu.table_row(sides, gpu.operations(sizes), "NVIDIA H100 80GB HBM3")
    assert row["checks"].keys() == {"MFU >= 45 %", "peak memory below TRL's"}
    assert row["ratio"]["tokens/s"] == sides["ours"]["tokens_per_second"] / sides["trl"]["tokens_per_second"]
    assert row["ours"]["QLoRA tokens/s"] == sides["qlora"]["tokens_per_second"]


def test_operations_of_a_token_are_counted_by_hand():
    """Four times the weights, six times the adapter's, the causal attention; the head for a quarter of the tokens."""
    attention, ffn = 64 * 64 * 2 + 2 * 64 * 16, 3 * 64 * 224
    lora = 16 * (2 * (64 + 64) + 2 * (64 + 16) + 3 * (64 + 224))
    dense = 2 * (attention + ffn + 2 * 64) + 64
    expected = 4 * dense + 6 * 2 * lora + 8 * 2 * 64 * 32 + 4 * 200 * 64 / 4
    assert gpu.operations(Sizes(gpu_length=32, **SHAPE)) == expected


def test_the_bar_of_the_gpu_row_needs_both_speed_and_memory():
    def checks(rate: float, peak: float) -> list[bool]:
        sides = {name: {"tokens_per_second": 1e3, "peak_bytes": 2e10} for name in ("trl", "qlora")}
        ours = {"tokens_per_second": rate, "peak_bytes": peak}
        return list(gpu.table_row({"ours": ours, **sides}, 46e9, "H100")["checks"].values())

    assert checks(9700.0, 1.9e10) == [True, True]
    assert checks(9600.0, 2.1e10) == [False, False]
