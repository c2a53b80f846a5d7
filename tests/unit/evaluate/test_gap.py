"""The gap by hand: a model that knows only the token before, whose probabilities are written down here."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ssgen_ds.data.tokenize import Example
from ssgen_ds.data.window import Packing, build_window
from ssgen_ds.distributed.world import World
from ssgen_ds.errors import NonFiniteError, UserError
from ssgen_ds.evaluate.gap import base_of, check_examples, unique_names
from ssgen_ds.evaluate.gap_file import find_folder
from ssgen_ds.evaluate.gap_measure import GapSettings, Measurement, Scores, context_key, measure, score_gold
from ssgen_ds.evaluate.gap_numbers import Resamples, gap_result, position_edges
from ssgen_ds.evaluate.gap_options import parse_rates
from ssgen_ds.evaluate.gold_loss import window_loss
from ssgen_ds.inference.answers import answer_key
from ssgen_ds.inference.model_source import ModelSource
from ssgen_ds.recipe.schema import ModelConfig
from ssgen_ds.report.gap_figure import gap_curves, save_figure, spread
from ssgen_ds.sampler.engine import BatchLimit, EngineSampler
from ssgen_ds.sampler.noise import Stream, sequence_key
from ssgen_ds.selfgen.bss import context_sequence, draw_coins
from tests.support.launch import run
from tests.support.tiny_models import tiny_model
from tests.support.tiny_runs import tiny_recipe

V, A, B, C, END = 32, 5, 6, 7, 2


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 0, 1, torch.device("cpu"), control=dist.group.WORLD)
    dist.destroy_process_group()


def bigram_model(table: dict[int, dict[int, float]]) -> torch.nn.Module:
    """Qwen2 with layers that do nothing: p(next | last) is the table's, evenly split where it names nothing."""
    model = tiny_model("qwen2", vocab_size=V, hidden_size=V)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(V))
        model.model.norm.weight.fill_(1.0)
        for last, row in table.items():
            rest = (1 - sum(row.values())) / (V - len(row))
            logits = torch.full((V,), math.log(rest))
            for token, p in row.items():
                logits[token] = math.log(p)
            model.lm_head.weight[:, last] = logits / math.sqrt(V)  # the norm makes a unit vector sqrt(V) long
    return model


MODEL = {A: {B: 0.5, C: 0.25}, B: {C: 0.5, A: 0.25}, C: {A: 0.5, END: 0.25}}
OTHER = {A: {C: 0.5, B: 0.25}, B: {A: 0.5, C: 0.25}, C: {B: 0.5, END: 0.125}}


def example(name: str, prompt: list[int], response: list[int]) -> Example:
    return Example(name, prompt, None, response, truncated=False, gold_text="x")


EXAMPLES = [example("one", [B, A], [C, B, A, END]), example("two", [C], [A, END]), example("three", [A, B, A], [B])]
CHAT = SimpleNamespace(banned_ids=lambda vocab_size: [END])
GREEDY = GapSettings((0.0, 1.0), temperature=0.0)


def sampler_of(model: torch.nn.Module, world: World, rows: int = 2) -> EngineSampler:
    return EngineSampler(model, world, BatchLimit(rows))


def probabilities(scores: list[Scores]) -> list[list[float]]:
    return [np.exp(-item.nll_T.astype(float)).round(4).tolist() for item in scores]


def rest(known: float, named: int = 2) -> float:
    return round((1 - known) / (V - named), 4)


def test_gold_after_gold_and_after_own_tokens_by_hand(world: World) -> None:
    """The greedy contexts are B C A .. after `B A`, A .. after `C`; the last token is never context."""
    found = measure(sampler_of(bigram_model(MODEL), world), CHAT, EXAMPLES, V, GREEDY, None)
    assert found.contexts[0.0] == [[C, B, A, END], [A, END], [B]]
    assert found.contexts[1.0] == [[B, C, A, END], [A, END], [B]]
    unnamed = rest(0.75)
    assert probabilities(found.own[0.0]) == [[0.25, unnamed, 0.25, unnamed], [0.5, unnamed], [0.5]]
    # after B: B is not named; after B C: A .5; after B C A: END is not named
    assert probabilities(found.own[1.0]) == [[0.25, unnamed, 0.5, unnamed], [0.5, unnamed], [0.5]]
    assert [item.hit_T.tolist() for item in found.own[1.0]] == [[False, False, True, False], [True, False], [True]]
    assert found.own == found.shared
    assert found.sampled_share == {0.0: 0.0, 1.0: 4 / 7}


def test_another_model_on_its_own_and_on_the_first_ones_contexts(world: World) -> None:
    first = measure(sampler_of(bigram_model(MODEL), world), CHAT, EXAMPLES, V, GREEDY, None)
    found = measure(sampler_of(bigram_model(OTHER), world), CHAT, EXAMPLES, V, GREEDY, first.contexts)
    assert found.contexts[1.0] == [[C, B, A, END], [B, END], [B]]
    unnamed = rest(0.75)
    assert probabilities(found.own[1.0])[0] == [0.5, 0.5, 0.5, unnamed]
    assert probabilities(found.shared[1.0])[0] == [0.5, unnamed, rest(0.625), unnamed]
    assert found.shared[0.0] is found.own[0.0]


def random_examples() -> list[Example]:
    draw = np.random.default_rng(3)
    tokens = lambda n: draw.integers(3, 90, n).tolist()  # noqa: E731
    return [example(f"row-{i}", tokens(2 + i % 5), [*tokens(i % 7), END]) for i in range(9)]


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_rate_0_is_the_evaluation_loss_of_training(world: World, rows: int) -> None:
    model, examples = tiny_model("llama"), random_examples()
    sequences = [context_sequence(item, None) for item in examples]
    loss = window_loss(model, build_window(sequences, Packing(3), 0, 1, "cpu"), world)
    [scores] = score_gold(sampler_of(model, world, rows), examples, [[item.response_ids for item in examples]])
    assert [len(item.nll_T) for item in scores] == [len(item.response_ids) for item in examples]
    assert np.concatenate([item.nll_T for item in scores]).mean() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mistral", "granite"])
def test_several_contexts_after_one_prompt_are_what_each_is_alone(
    world: World, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against plain forwards; logits in chunks of three rows."""
    monkeypatch.setattr("ssgen_ds.evaluate.gap_measure.CHUNK_LOGITS", 3 * 96)
    model, examples, draw = tiny_model(family), random_examples(), np.random.default_rng(4)
    contexts = [[draw.integers(3, 90, len(item.response_ids)).tolist() for item in examples] for _ in range(3)]
    for texts, scores in zip(contexts, score_gold(sampler_of(model, world, 4), examples, contexts), strict=True):
        for item, context, found in zip(examples, texts, scores, strict=True):
            with torch.no_grad():
                logits_LV = model(input_ids=torch.tensor([item.prompt_ids + context]), use_cache=False).logits[0]
            logits_TV = logits_LV[len(item.prompt_ids) - 1 : -1]
            labels_T = torch.tensor(item.response_ids)
            nll_T = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="none")
            torch.testing.assert_close(torch.from_numpy(found.nll_T), nll_T, rtol=1e-4, atol=1e-4)
            assert found.hit_T.tolist() == (logits_TV.argmax(-1) == labels_T).tolist()


def test_a_token_sampled_at_one_rate_is_sampled_at_all_higher_ones(world: World) -> None:
    settings = GapSettings((0.0, 0.3, 0.6, 1.0), seed=5)
    examples = [example(str(i), [A], [A, B, C] * 6) for i in range(4)]
    found = measure(sampler_of(bigram_model(MODEL), world), CHAT, examples, V, settings, None)
    shares = [0, 0, 0, 0]
    for n, item in enumerate(examples):
        before = [False] * len(item.response_ids)
        for i, rate in enumerate(settings.rates):
            coins = draw_coins(len(item.response_ids), rate, context_key(5, item.id))
            assert all(coin or not earlier for coin, earlier in zip(coins, before, strict=True))
            for coin, token, gold in zip(coins, found.contexts[rate][n], item.response_ids, strict=True):
                assert coin or token == gold
            before, shares[i] = coins, shares[i] + sum(coins)
    assert list(found.sampled_share.values()) == [share / 72 for share in shares]
    assert 0 < shares[1] < shares[2] < shares[3] == 68
    assert all(END not in text for text in found.contexts[1.0]), "no end in mid-context"


def test_a_model_that_overflows_ends_with_a_message(world: World) -> None:
    model = bigram_model(MODEL)
    with torch.no_grad():
        model.lm_head.weight[0, A] = math.inf
    with pytest.raises(NonFiniteError, match="a gold token is not finite"):
        score_gold(sampler_of(model, world), EXAMPLES, [[item.response_ids for item in EXAMPLES]])


# -- numbers -----------------------------------------------------------------------------------------------------------


def scores_of(*nll: float, hits: int = 0) -> Scores:
    return Scores(np.array(nll, np.float32), np.arange(len(nll)) < hits)


def measurement(gold: list[Scores], own: list[Scores], shared: list[Scores]) -> Measurement:
    contexts = {0.0: [[1, 2, 3], [4]], 1.0: [[1, 9, 3], [8]]}
    return Measurement(contexts, {0.0: gold, 1.0: own}, {0.0: gold, 1.0: shared}, {0.0: 0.0, 1.0: 0.5})


@pytest.fixture
def result() -> dict:
    gold, own = [scores_of(1, 2, 3, hits=3), scores_of(6, hits=1)], [scores_of(2, 4, 6, hits=1), scores_of(8)]
    later = [scores_of(1, 3, 5, hits=2), scores_of(7)]
    elsewhere = [scores_of(1, 2, 4, hits=1), scores_of(13)]
    measured = [measurement(gold, own, own), measurement(gold, later, elsewhere)]
    return gap_result([("base", "a.gguf"), ("run", "runs/run")], measured, [[1, 2, 3], [4]], GapSettings((0.0, 1.0)))


def test_curves_are_means_over_tokens(result: dict) -> None:
    base, run, shared = result["curves"]
    assert [(curve["model"], curve["contexts"]) for curve in result["curves"]] == [
        ("base", "own"), ("run", "own"), ("run", "base"),
    ]  # fmt: skip
    assert (base["nll"], base["accuracy"]) == ([3.0, 5.0], [1.0, 0.25])
    assert (run["nll"], run["accuracy"]) == ([3.0, 4.0], [1.0, 0.5])
    assert (shared["nll"], shared["accuracy"]) == ([3.0, 5.0], [1.0, 0.25])
    assert base["sampled_share"] == [0.0, 0.5] and base["changed_share"] == [0.0, 0.5]
    # of two examples, resamples hold one or the other alone about every fourth time
    assert (base["nll_low"][0], base["nll_high"][0]) == (2.0, 6.0)


def test_positions(result: dict) -> None:
    free = next(line for line in result["by_position"] if line["model"] == "run" and line["rate"] == 1.0)
    assert (free["begin"], free["end"]) == ([0, 1, 2], [1, 2, 3])
    assert (free["nll"], free["num_tokens"]) == ([4.0, 3.0, 5.0], [2, 1, 1])
    assert position_edges(20) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert position_edges(1) == [0, 1] and position_edges(4) == [0, 1, 2, 3, 4]


def test_summary_pairs_rates_and_models(result: dict) -> None:
    base, run = result["summary"]
    assert (base["nll_gold"], base["nll_free"], base["gap_nll"], base["gap_nll_shared"]) == (3.0, 5.0, 2.0, 2.0)
    assert (base["accuracy_gold"], base["accuracy_free"], base["gap_accuracy"]) == (1.0, 0.25, 0.75)
    # the gap is 2 a token in both examples: paired, nothing is left to chance
    assert (base["gap_nll_low"], base["gap_nll_high"]) == (2.0, 2.0)
    assert "change_gap_nll" not in base
    assert (run["gap_nll"], run["change_gap_nll"]) == (1.0, -1.0)
    assert (run["change_gap_nll_low"], run["change_gap_nll_high"]) == (-1.0, -1.0)
    assert (run["gap_nll_shared"], run["change_gap_nll_shared"]) == (2.0, 0.0)
    # (1 - 6) / 3 in the first example, 7 - 2 in the second
    assert run["change_gap_nll_shared_low"] == pytest.approx(-5 / 3, abs=1e-6)
    assert run["change_gap_nll_shared_high"] == 5.0


def test_an_interval_covers_what_it_should() -> None:
    """95 % of the intervals of samples of a ratio hold the true one, give or take."""
    draw, covered = np.random.default_rng(0), 0
    resamples = Resamples(60)
    for _ in range(200):
        tokens = draw.integers(1, 40, 60).astype(float)
        found = resamples.mean(draw.exponential(2.0, 60) * tokens, tokens)
        covered += found.low <= 2.0 <= found.high
    assert 180 <= covered <= 199
    assert Resamples(1).mean(np.array([6.0]), np.array([3.0])).low == 2.0


# -- figure ------------------------------------------------------------------------------------------------------------


def test_the_figure_has_a_panel_for_shared_contexts_when_there_are_others(result: dict, tmp_path: Path) -> None:
    alone = {**result, "models": result["models"][:1], "curves": result["curves"][:1]}
    alone["by_position"] = [line for line in result["by_position"] if line["model"] == "base"]
    assert [curve.title for curve in gap_curves(alone)] == [
        "On its own contexts", "Accuracy, own contexts", "Where the gap is",
    ]  # fmt: skip
    curves = gap_curves(result)
    assert curves[1].title == "All on the contexts of base" and len(curves) == 4
    for curve in curves:
        assert curve.svg.startswith("<svg") and ">run</text>" in curve.svg
        assert "var(--muted)" in curve.svg and "var(--gold)" in curve.svg and "#0072b2" not in curve.svg
    save_figure(result, tmp_path / "gap.png")
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_moved_apart_and_stay_in_order() -> None:
    assert spread([0.0, 50.0], 10) == [0.0, 50.0]
    assert spread([20.0, 20.0, 20.0], 10) == [10.0, 20.0, 30.0]
    assert spread([21.0, 0.0, 19.0], 10) == [25.0, 0.0, 15.0]
    assert spread([0.0, 9.0, 18.0], 10) == [-1.0, 9.0, 19.0]
    assert spread([], 10) == []


# -- what the user gives -----------------------------------------------------------------------------------------------


def test_rates() -> None:
    assert parse_rates(" .5, .1,.5 ") == (0.0, 0.1, 0.5, 1.0)
    for wrong in ("a", ".5;.6", "1.5", "-.1", "nan"):
        with pytest.raises(UserError, match="--rates: must"):
            parse_rates(wrong)


def test_names(tmp_path: Path) -> None:
    run = tmp_path / "sft"
    run.mkdir()
    models = [str(run), "hub/model", "package:m/x.Q4_1.gguf", str(run / "checkpoints" / "step-00000004")]
    assert unique_names(models) == ["sft", "hub/model", "x.Q4_1", "sft step-00000004"]
    other = tmp_path / "b" / "sft"
    other.mkdir(parents=True)
    assert unique_names([str(run), str(other)]) == [str(run), str(other)]
    with pytest.raises(UserError, match="hub/model is given twice"):
        unique_names(["hub/model", "hub/model"])


def test_folders(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").touch()
    assert find_folder(None, [str(run)]) == run / "gap"
    assert find_folder(tmp_path / "new", ["x"]) == tmp_path / "new"
    for models in (["x.gguf"], [str(run), str(run)]):
        with pytest.raises(UserError, match="--out: name the folder"):
            find_folder(None, models)
    with pytest.raises(UserError, match="is a file"):
        find_folder(run / "recipe.yaml", ["x"])
    with pytest.raises(UserError, match="is no folder"):
        find_folder(tmp_path / "no" / "new", ["x"])


def test_what_is_wrong_with_the_command_is_told_at_once_and_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from ssgen_ds.cli import app\n"
        "try: app(sys.argv[1:], standalone_mode=False)\n"
        "except Exception as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    given = [
        "gap",
        "--model",
        "no/such/model",
        "--data",
        "no.jsonl",
        "--rates",
        "2",
        "--out",
        str(tmp_path / "a" / "b"),
    ]
    finished = run([sys.executable, "-c", code, *given], 60)
    assert finished.stdout.splitlines()[-1] == "False", finished
    for name in ("4 problems", "--model: no/such/model", "--data: no such file", "--rates: must lie", "--out: "):
        assert name in finished.stdout


def test_the_base_of_a_run_is_what_it_was_trained_from(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "o", adapter__kind="lora", model__adapter_path="a")
    trained = ModelSource(recipe.model, adapter=Path("o/model"), recipe=recipe)
    assert base_of(trained) == ModelSource(recipe.model, adapter=Path("a"), recipe=recipe)
    assert base_of(ModelSource(ModelConfig(path="m"), adapter=Path("x"))) == ModelSource(ModelConfig(path="m"))
    assert base_of(ModelSource(ModelConfig(path="m"))) is None


def test_rows_without_a_response_or_too_long_are_named() -> None:
    def subject(gold_texts: list[tuple[str, ...]], positions: int) -> SimpleNamespace:
        config = SimpleNamespace(max_position_embeddings=positions)
        return SimpleNamespace(
            model="m", inference=SimpleNamespace(examples=EXAMPLES, gold_texts=gold_texts, config=config)
        )

    check_examples([subject([("x",)] * 3, 6)])
    with pytest.raises(UserError, match=r"2 of 3 rows have no response to measure \(the first: two\).*--reference"):
        check_examples([subject([("x",), (), ()], 6)])
    with pytest.raises(UserError, match="one has 6 tokens, and m 5 positions"):
        check_examples([subject([("x",)] * 3, 5)])


def test_contexts_have_noise_of_their_own() -> None:
    """Neither the answers of `generate` and `evaluate` nor training's contexts are drawn with it."""
    others = [answer_key(0, "row", sample, turn) for sample in range(3) for turn in range(3)]
    assert context_key(0, "row") not in [*others, sequence_key(0, Stream.BSS, "row", 0), context_key(1, "row")]
