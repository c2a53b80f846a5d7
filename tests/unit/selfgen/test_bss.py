"""Coins, and the sequence that a mixed context becomes."""

from __future__ import annotations

from ssgen_ds.data.tokenize import Example
from ssgen_ds.data.window import IGNORE
from ssgen_ds.selfgen.bss import bss_request, context_sequence, draw_coins, prompt_labels

EXAMPLE = Example("a", [5, 6], None, [7, 8, 9, 2], False, "gold")


def test_coins():
    """Rate 0 none, rate 1 all but the last; in between the share, and a coin stays on when the rate grows."""
    assert not any(draw_coins(50, 0.0, key=5))
    assert draw_coins(50, 1.0, key=5) == [True] * 49 + [False]
    low, high = draw_coins(4001, 0.2, key=5), draw_coins(4001, 0.5, key=5)
    assert 0.17 < sum(low) / 4000 < 0.23
    assert all(b for a, b in zip(low, high, strict=True) if a)


def test_mixed_context_reads_mixed_and_predicts_gold():
    mixed = context_sequence(EXAMPLE, [50, 8, 9, 2])
    assert mixed.input_ids == [5, 6, 50, 8, 9, 2] and mixed.labels == [IGNORE, IGNORE, 7, 8, 9, 2]
    assert context_sequence(EXAMPLE, None).input_ids == [5, 6, 7, 8, 9, 2], "plain SFT"


def test_labels_inside_the_prompt_are_those_of_earlier_answers():
    example = Example("a", [5, 6, 2, 5], [0, 1, 1, 0], [7, 2], False, "gold")
    assert prompt_labels(example) == [IGNORE, 6, 2, IGNORE]
    assert context_sequence(example, None).labels == [IGNORE, 6, 2, IGNORE, 7, 2]


def test_an_earlier_context_is_guessed_at_coins_and_gold_elsewhere():
    coins = draw_coins(4, 0.5, key=3)
    assert True in coins and False in coins[:-1]
    request = bss_request(EXAMPLE, 0.5, 3, guess_ids=[91, 92, 93, 94])
    assert request.coins == coins and request.prompt_ids == [5, 6] and request.stop_ids == frozenset()
    earlier_or_gold = list(zip([91, 92, 93, 94], EXAMPLE.response_ids, strict=True))
    wanted = [earlier if coin else gold for coin, (earlier, gold) in zip(coins, earlier_or_gold, strict=True)]
    assert request.guess_ids == wanted
    assert bss_request(EXAMPLE, 0.5, 3).guess_ids == [7, 8, 9, 2]
