"""Columns of metrics.jsonl that tell what a step was trained on, and what generating its round cost."""

from __future__ import annotations

from typing import Any

from ssgen_ds.recipe.schema import MethodConfig
from ssgen_ds.selfgen.generated import Draft, Generated
from ssgen_ds.selfgen.round import Round


def generated_row(method: MethodConfig, records: list[Generated]) -> dict[str, Any]:
    """Of one step: its mix rate, what share of the response tokens was sampled, what share is not gold, its drafts."""
    response_tokens = sum(len(record.gold_ids) for record in records)
    sampled_tokens = sum(sum(record.mixed.coins) for record in records if record.mixed)
    row: dict[str, Any] = {
        "mix_rate": records[0].mix_rate,
        "sampled_token_share": sampled_tokens / response_tokens,
    }
    if method.uses_bss:
        row["changed_token_share"] = sum(map(_num_changed, records)) / response_tokens
    return row | (_correction_counts(records) if method.uses_rac else {})


def _num_changed(record: Generated) -> int:
    """Tokens of the mixed context that are not the gold ones: where there are none, BSS trains as SFT does."""
    return sum(mixed != gold for mixed, gold in zip(record.context_ids, record.gold_ids, strict=True))


def _correction_counts(records: list[Generated]) -> dict[str, int]:
    targets = [record.target for record in records if record.target]
    drafts = [(record.draft, record.gold_ids) for record in records if record.draft]
    return {
        "num_corrections": len(targets),
        "num_empty_drafts": sum(not draft.ids for draft, _ in drafts),
        "num_truncated_drafts": sum(bool(draft.ids) and draft.stop_id is None for draft, _ in drafts),
        "num_right_drafts": sum(_is_gold(draft, gold_ids) for draft, gold_ids in drafts),
        "num_rewrites_used": sum(target.kind == "rewrite" for target in targets),
    }


def _is_gold(draft: Draft, gold_ids: list[int]) -> bool:
    """Whether the draft is the gold answer, its end included: then there is nothing to correct."""
    draft_ids = [*draft.ids, draft.stop_id]
    return gold_ids[: len(draft_ids)] == draft_ids


def round_row(round: Round, step: int) -> dict[str, Any]:
    """What the round cost, on the row of the step that it was opened before; its passes on every row."""
    stats = round.cost_at(step)
    sampler = stats.sampler
    return {
        "selfgen_passes": round.passes,
        "selfgen_seconds": stats.seconds,
        "selfgen_calls": sampler.calls,
        "selfgen_token_forwards": sampler.token_forwards,
        "selfgen_draws": sampler.draws,
        "selfgen_accepted_length": sampler.accepted_length,
        "selfgen_first_draws": sampler.first_draws,
        "selfgen_guess_hits": sampler.first_draws - sampler.misses,
        "selfgen_flips": sampler.flips,
        "selfgen_flip_rate": sampler.flip_rate,
        "selfgen_flip_bound": sampler.flip_bound,
        "selfgen_ties": sampler.ties,
        "selfgen_verified": sampler.verified,
        "selfgen_mismatches": sampler.mismatches,
        "selfgen_strategy": stats.strategy,
        "selfgen_block": stats.block,
    }
