"""The longest sequences that a recipe may make, in tokens."""

from __future__ import annotations

from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.recipe.schema import Recipe


def longest_evaluated(recipe: Recipe, chat: ChatFormat) -> tuple[int, str]:
    """The most tokens that answering an evaluation example may take, and the sum that this is."""
    evaluation = recipe.eval
    if not evaluation.metrics:
        return 0, ""
    longest, what = recipe.data.max_prompt_tokens + evaluation.max_new_tokens, "data.max_prompt_tokens + "
    if not evaluation.correct:
        return longest, f"{what}eval.max_new_tokens"
    longest += len(chat.correction_ids(recipe.method.rac.correction_cue)) + evaluation.max_new_tokens
    return longest, f"{what}2 * eval.max_new_tokens + the correction cue"


def longest_sequence(recipe: Recipe, chat: ChatFormat) -> tuple[int, str]:
    """The most tokens that a sequence may have by the recipe, and the sum that this is."""
    longest = recipe.data.max_prompt_tokens + recipe.data.max_response_tokens
    what = "data.max_prompt_tokens + data.max_response_tokens"
    if recipe.method.uses_rac:
        rac = recipe.method.rac
        longest += rac.max_draft_tokens + len(chat.correction_ids(rac.correction_cue))
        what += " + method.rac.max_draft_tokens + the correction cue"
        if rac.target == "rewrite":  # its prompt also shows the gold answer
            longest += recipe.data.max_response_tokens + len(chat.correction_ids(rac.rewrite_cue))
            what += " + data.max_response_tokens + the rewrite cue"
    return longest, what
