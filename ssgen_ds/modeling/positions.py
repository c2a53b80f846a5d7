"""Positions of a model in which a token depends on itself and those before it alone; what a recipe asks of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ssgen_ds.data.lengths import longest_evaluated, longest_sequence
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.recipe.schema import Recipe


def positions(config: Any) -> tuple[int | None, str]:
    """Positions that a sequence may have, None for no limit, and what they are, for a message: `128 positions`.

    Rotary factors of the kind longrope (Phi-3, Phi-4-mini) are others as soon as one token of a call lies behind the
    length that the model was first trained with: a row would then depend on the rows next to it, and on whether it is
    computed at once or token by token. Dynamic NTK scaling does the same behind max_position_embeddings.

    Args:
        config: of the model's text part.
    """
    limit = getattr(config, "max_position_embeddings", None)  # a family trait: some have no limit
    border = min(_borders(config), default=None)
    if border is None or (limit is not None and limit <= border):
        return limit, f"{limit} positions"
    return border, f"{border} positions up to which its rotary factors (longrope) are the same for every row of a batch"


def _borders(config: Any) -> Iterator[int]:
    """Lengths at which longrope changes its factors."""
    settings = vars(config)
    # transformers' own families have rope_parameters, one set or one for each kind of layer; remote code the others.
    for found in (settings.get("rope_parameters"), settings.get("rope_scaling")):
        if not isinstance(found, dict):
            continue
        for one in (found, *(part for part in found.values() if isinstance(part, dict))):
            is_longrope = one.get("rope_type", one.get("type")) in ("longrope", "su")
            border = one.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
            if is_longrope and border is not None:
                yield border


def context_problems(recipe: Recipe, chat: ChatFormat, config: Any) -> list[str]:
    """Whether the longest sequence that the recipe allows fits the model's positions."""
    limit, there = positions(config)
    rac = recipe.method.rac
    cues = {"correction_cue": rac.correction_cue, "rewrite_cue": rac.rewrite_cue} if recipe.method.uses_rac else {}
    if recipe.eval.metrics and recipe.eval.correct:
        cues["correction_cue"] = rac.correction_cue
    beyond = {key: chat.beyond_embedding(chat.correction_ids(cue)) for key, cue in cues.items()}
    return [f"method.rac.{key}: {what}" for key, what in beyond.items() if what] + [
        f"{what} = {longest} tokens, but the model has {there}; lower data.max_prompt_tokens"
        for longest, what in (longest_sequence(recipe, chat), longest_evaluated(recipe, chat))
        if limit is not None and longest > limit
    ]
