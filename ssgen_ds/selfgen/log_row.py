"""Columns of metrics.jsonl that tell what a step was trained on, and what generating its round cost."""

from __future__ import annotations

from typing import Any

from ssgen_ds.config import MethodConfig
from ssgen_ds.selfgen.rounds import Generated, RoundStats, Slot


def generated_row(method: MethodConfig, slots: list[Slot], records: list[Generated]) -> dict[str, Any]:
    """Of one step: its mix rate, what share of the response tokens was sampled, what share is not gold, its drafts."""
    response_tokens = sum(len(record.gold_ids) for record in records)
    row: dict[str, Any] = {
        "mix_rate": slots[0].mix_rate,
        "sampled_token_share": sum(sum(record.coins or []) for record in records) / response_tokens,
    }
    if method.uses_bss:
        row["changed_token_share"] = sum(map(_num_changed, records)) / response_tokens
    return row | (_correction_counts(records) if method.uses_rac else {})


def _num_changed(record: Generated) -> int:
    """Tokens of the mixed context that are not the gold ones: where there are none, BSS trains as SFT does."""
    mixed_ids = record.mixed_ids or record.gold_ids
    return sum(mixed != gold for mixed, gold in zip(mixed_ids, record.gold_ids, strict=True))


def _correction_counts(records: list[Generated]) -> dict[str, int]:
    return {
        "num_corrections": sum(record.target_ids is not None for record in records),
        "num_empty_drafts": sum(record.draft_ids == [] for record in records),
        "num_truncated_drafts": sum(_ran_out(record) for record in records),
        "num_right_drafts": sum(_is_gold(record) for record in records),
        "num_rewrites_used": sum(record.target_kind == "rewrite" for record in records),
    }


def _is_gold(record: Generated) -> bool:
    """Whether the draft is the reference, its end included: then there is nothing to correct."""
    draft_ids = [*(record.draft_ids or []), record.draft_stop_id]
    return record.draft_ids is not None and record.gold_ids[: len(draft_ids)] == draft_ids


def _ran_out(record: Generated) -> bool:
    """Whether the draft was ended by max_draft_tokens and not by the model."""
    return bool(record.draft_ids) and record.draft_stop_id is None


def round_row(stats: RoundStats, records: dict[int, list[Generated]]) -> dict[str, Any]:
    """What the round cost, on its first step's row; the passes of its mixed contexts on every row."""
    passes = [record.bss_passes for group in records.values() for record in group if record.bss_passes]
    sampler = stats.sampler
    return {
        "selfgen_passes": sum(passes) / len(passes) if passes else 0.0,
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
