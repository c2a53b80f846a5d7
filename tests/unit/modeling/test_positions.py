"""Rotary factors that depend on the longest row of a call: found from the configuration, and by trying."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from ssgen_ds.errors import UserError
from ssgen_ds.modeling.cache_check import check_cache
from ssgen_ds.modeling.positions import positions
from tests.support.tiny_models import tiny_model

BORDER, LIMIT = 32, 256
LONGROPE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": LIMIT,
    "original_max_position_embeddings": BORDER,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": BORDER,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    },
}
DYNAMIC = {
    "max_position_embeddings": BORDER,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}


@pytest.mark.parametrize(
    ("family", "settings", "limit", "words"),
    [
        ("phi3", LONGROPE, BORDER, "longrope"),
        ("phi3", {**LONGROPE, "max_position_embeddings": BORDER}, BORDER, "32 positions"),
        ("llama", DYNAMIC, BORDER, "32 positions"),
        ("llama", {"max_position_embeddings": LIMIT}, LIMIT, "256 positions"),
        ("bloom", {}, None, ""),
    ],
)
def test_positions_end_where_the_factors_change(family, settings, limit, words):
    found, there = positions(AutoConfig.for_model(family, **settings))
    assert found == limit and words in there


def test_remote_code_names_its_factors_as_it_likes():
    config = AutoConfig.for_model("gpt2")
    del config.n_positions
    config.rope_scaling = {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}
    config.original_max_position_embeddings = BORDER
    assert positions(config)[0] == BORDER


@pytest.mark.parametrize(("family", "settings"), [("phi3", LONGROPE), ("llama", DYNAMIC)])
def test_a_row_beside_one_behind_the_border_is_another(family, settings):
    """Lengths on both sides of the border: up to it rows are computed alike, behind it they are not."""
    model = tiny_model(family, **settings)
    check_cache(model, longest=BORDER)
    with pytest.raises(UserError, match=f"beside one of {BORDER + 1} tokens"):
        check_cache(model, longest=BORDER + 1)
    check_cache(model, longest=BORDER)  # trying it has changed nothing
