"""Warnings about what a careful reader of a run would notice. Fixed rules find them; each says what to look at."""

from __future__ import annotations

import statistics
from typing import Any

from ssgen_ds.report.curves import Rows, total
from ssgen_ds.report.read_run import Evaluation, Run
from ssgen_ds.report.scores import interval, metric_title
from ssgen_ds.report.texts import kept_draft

COPIED_SHARE = 0.2  # of corrections that teach nothing
TRUNCATED_SHARE = 0.5  # of drafts without an end
UNCHANGED_SHARE = 0.9  # of the corrected answers
SURE = 0.05  # p-value; a few answers that differ have an interval that is too short
REPEATED_SHARE = 0.25  # of an answer's 4-grams
LENGTH_RATIOS = (0.5, 2.0)
CHANGED_SHARE = 0.05  # of the sampled tokens; below it mixing changes next to nothing
RIGHT_SHARE = 0.5  # of drafts
MIX_TOLERANCE = 0.25  # of the mix rate
TIES_SHARE = 0.01  # of the draws: ten times what temperature 1 gives
MISMATCH_SHARE = 0.05  # of the verified draws, in bfloat16


def find_warnings(run: Run) -> list[str]:
    """All warnings, in this order: training, generation, corrections, evaluations."""
    evaluations = [*run.by_command, *run.during_training[-1:]]
    trained = [one for one in evaluations if not run.is_base(one.content["model"])]
    evaluation_warnings = [text for one in trained for text in _evaluation_warnings(one)]
    return [
        *_loss_warnings(run.rows),
        *_attempt_warnings(run.attempts),
        *_mixing_warnings(run),
        *_draft_warnings(run),
        *_sampler_warnings(run),
        *evaluation_warnings,
        *_other_number_warnings(run.other_numbers),
    ]


# -- training ----------------------------------------------------------------------------------------------------------


def _loss_warnings(rows: Rows) -> list[str]:
    warnings = []
    if broken := [row["step"] for row in rows if row["loss"] is None or row["grad_norm"] is None]:
        skipped = rows[-1].get("skipped_steps")
        consequence = (
            f"{_count(skipped, 'update was', 'updates were')} left out" if skipped else "do not trust the weights"
        )
        warnings.append(f"Loss or gradient norm was not finite at {_steps(broken)}; {consequence}.")
    if spikes := loss_spikes(rows):
        warnings.append(f"The loss jumped at {_steps(spikes)}; look at the data there, or lower train.lr.")
    eval_losses = eval_losses_of(rows)
    if len(eval_losses) > 1 and eval_losses[-1] > min(eval_losses) * 1.02:
        warnings.append(
            f"The evaluation loss ended at {eval_losses[-1]:.3f}, above its best, {min(eval_losses):.3f}: "
            "fewer steps or a lower train.lr may do better."
        )
    return warnings


def eval_losses_of(rows: Rows) -> list[float]:
    return [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]


def loss_spikes(rows: Rows, window: int = 20) -> list[int]:
    """Steps whose loss is far above the `window` steps before: by over 6 median absolute deviations and over 25%."""
    known = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
    spikes = []
    for index in range(window // 2, len(known)):
        before = [loss for _, loss in known[max(index - window, 0) : index]]
        median = statistics.median(before)
        deviation = statistics.median(abs(loss - median) for loss in before)
        step, loss = known[index]
        if loss - median > max(6 * deviation, 0.25 * abs(median)):
            spikes.append(step)
    return spikes


def _attempt_warnings(attempts: list[dict[str, Any]]) -> list[str]:
    failures = [row for row in attempts if row.get("outcome") == "failed"]
    if not failures:
        return []
    return [f"It failed {_count(len(failures), 'time', 'times')} on the way, the last with: {failures[-1]['reason']}"]


# -- generation --------------------------------------------------------------------------------------------------------


def _mixing_warnings(run: Run) -> list[str]:
    if "bss" not in run.method or not total(run.rows, "mix_rate"):
        return []
    rate, share = weighted_mean(run.rows, "mix_rate"), weighted_mean(run.rows, "sampled_token_share")
    if share == 0:
        return ["No token was sampled although the mix rate is above 0: the responses may be too short for it."]
    if abs(share - rate) > MIX_TOLERANCE * rate and abs(share - rate) > 0.01:
        return [
            f"{share:.1%} of the response tokens were sampled, the mix rate was {rate:.1%} on average: the last token "
            "of a response is never sampled, which counts where responses are short."
        ]
    later = [row for row in run.rows if row.get("changed_token_share") is not None][-max(1, len(run.rows) // 2) :]
    sampled, changed = (weighted_mean(later, key) for key in ("sampled_token_share", "changed_token_share"))
    if changed < CHANGED_SHARE * sampled:
        ramp = "" if run.recipe["method"]["bss"]["schedule"] == "constant" else " method.bss.schedule=constant,"
        return [
            f"In the later half of the run only {changed / sampled:.0%} of the sampled tokens differed from gold: the "
            f"model knows what it trains on, and BSS did what SFT does. Try{ramp} more data, or fewer epochs."
        ]
    return []


def weighted_mean(rows: Rows, key: str) -> float:
    """The mean over the run, in which each step counts by its tokens."""
    known = [row for row in rows if row.get(key) is not None]
    return sum(row[key] * row["num_tokens"] for row in known) / max(sum(row["num_tokens"] for row in known), 1)


def _draft_warnings(run: Run) -> list[str]:
    if "rac" not in run.method:
        return []
    warnings = []
    num_empty, num_corrections = (round(total(run.rows, key)) for key in ("num_empty_drafts", "num_corrections"))
    num_drafts = num_empty + num_corrections
    if num_empty and not num_corrections:
        warnings.append("Every draft was empty, so nothing was corrected; look at the prompts with `ssgen preview`.")
    elif num_empty > num_corrections:
        warnings.append(f"{num_empty} of {num_drafts} drafts were empty.")
    num_truncated, limit = (
        round(total(run.rows, "num_truncated_drafts")),
        run.recipe["method"]["rac"]["max_draft_tokens"],
    )
    if num_drafts and num_truncated == num_drafts:
        warnings.append(
            f"No draft ended by itself: all {num_drafts} were cut at method.rac.max_draft_tokens, {limit}. Raise it, "
            "unless the model never produces its end token."
        )
    elif num_truncated > TRUNCATED_SHARE * num_drafts:
        warnings.append(f"{num_truncated} of {num_drafts} drafts were cut at method.rac.max_draft_tokens, {limit}.")
    num_right = round(total(run.rows, "num_right_drafts"))
    if num_right > RIGHT_SHARE * num_drafts:
        warnings.append(
            f"{num_right} of {num_drafts} drafts were the reference already: there was little to correct. Give RAC "
            "prompts that the model has not learnt by heart: more data, fewer epochs."
        )
    return [*warnings, *_copy_warnings(run.samples)]


def _copy_warnings(samples: list[dict[str, Any]]) -> list[str]:
    pairs = [(kept_draft(sample), sample["correction_target"]) for sample in samples if sample["correction_target"]]
    copies = sum(kept.strip() == target.strip() for kept, target in pairs)
    if not pairs or copies < COPIED_SHARE * len(pairs):
        return []
    return [f"{copies} of {len(pairs)} sampled corrections copy their draft: they teach no correcting."]


def _sampler_warnings(run: Run) -> list[str]:
    warnings = []
    draws, ties = total(run.rows, "selfgen_draws"), total(run.rows, "selfgen_ties")
    if ties > TIES_SHARE * draws:
        warnings.append(
            f"Rounding may have decided {ties / draws:.1%} of the draws, {ties:,.0f} of {draws:,.0f}: such tokens may "
            "differ on another machine. A low temperature or bfloat16 makes ties."
        )
    verified, mismatches = total(run.rows, "selfgen_verified"), total(run.rows, "selfgen_mismatches")
    if mismatches > MISMATCH_SHARE * verified:
        warnings.append(
            f"{mismatches:,.0f} of {verified:,.0f} sampled tokens came out differently when they were drawn again to "
            "verify them: bfloat16 rounds too much here; compare with a run in float32."
        )
    return warnings


# -- evaluations -------------------------------------------------------------------------------------------------------


def _evaluation_warnings(one: Evaluation) -> list[str]:
    behaviour, place = one.content["behaviour"], f"Evaluation {one.label}"
    warnings: list[str] = []
    if not behaviour:
        return warnings
    if behaviour["eos_rate"] == 0:
        limit = one.content["settings"]["max_new_tokens"]
        warnings.append(
            f"{place}: no answer ended by itself within {limit} tokens; look at the labels with `ssgen preview`."
        )
    if behaviour["empty_rate"] > 0.1:
        warnings.append(f"{place}: {behaviour['empty_rate']:.0%} of the answers are empty; they score 0.")
    if behaviour["repetition"] > REPEATED_SHARE:
        warnings.append(
            f"{place}: answers repeat themselves, {behaviour['repetition']:.0%} of their 4-grams on average."
        )
    ratio = behaviour["length_ratio"]
    if ratio is not None and not LENGTH_RATIOS[0] <= ratio <= LENGTH_RATIOS[1]:
        warnings.append(f"{place}: answers are {ratio:.2g} times as long as the references.")
    return [*warnings, *_correction_warnings(one, place)]


def _correction_warnings(one: Evaluation, place: str) -> list[str]:
    found = one.correction
    if found is None:
        return []
    warnings = []
    if found["unchanged_share"] > UNCHANGED_SHARE:
        warnings.append(f"{place}: correcting left {found['unchanged_share']:.0%} of the answers as they were.")
    for name, change in found["change"].items():
        if change["high"] < 0 and change["p_value"] < SURE:
            text = f"{place}: correcting made answers worse, {metric_title(name)} changed by {interval(change, '+')}."
            warnings.append(text)
    return warnings


def _other_number_warnings(files: dict[str, dict[str, float]]) -> list[str]:
    return [
        f"evaluations/{name}.json: no answer ended with EOS ({key} is 0); look at the labels with `ssgen preview`."
        for name, numbers in files.items()
        for key, value in numbers.items()
        if key.rpartition(".")[2] == "eos_rate" and value == 0
    ]


def _steps(steps: list[int], shown: int = 5) -> str:
    listed = ", ".join(map(str, steps[:shown]))
    more = f" and {len(steps) - shown} more" if len(steps) > shown else ""
    return f"step{'s' * (len(steps) > 1)} {listed}{more}"


def _count(value: int, one: str, many: str) -> str:
    return f"{value} {one if value == 1 else many}"
