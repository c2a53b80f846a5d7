"""The recipe's tokenizer, template, model and data; no weight is read."""

from __future__ import annotations

from typing import Any

from ssgen_ds.data.datasets import StreamPlan, build_datasets
from ssgen_ds.data.tokenize import ChatFormat
from ssgen_ds.doctor.finding import Finding, error, note, ok, warning
from ssgen_ds.modeling.families import check_trainable
from ssgen_ds.modeling.load import OpenedModel
from ssgen_ds.recipe.schema import Recipe
from ssgen_ds.recipe.user_paths import cache_root

_SAMPLE = 200  # examples looked at


def check_model(recipe: Recipe, config: Any) -> list[Finding]:
    """The family. Raises UserError, which the runner makes a finding."""
    check_trainable(config, recipe)
    return ok("model", f"{config.model_type}, {config.get_text_config().vocab_size} logits")


def check_ends(opened: OpenedModel, generation: Any) -> list[Finding]:
    """Whether everybody agrees on what ends an answer and what is padding."""
    findings = []
    tokenizer, chat, width = opened.tokenizer, opened.chat, opened.vocab_size
    eos, pad, unknown = tokenizer.eos_token_id, tokenizer.init_kwargs.get("pad_token"), tokenizer.unk_token_id

    def name(token: int) -> str:
        return f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})"

    if pad is not None and str(pad) == tokenizer.eos_token:
        why = "trainers that mask padding by its id mask every end, too, and the model never stops; here lengths mask"
        findings.append(
            note("ends", f"pad is EOS, {tokenizer.eos_token!r}", why, "nothing to do here; beware elsewhere")
        )
    if chat.turn_end_id != eos:
        why = "training ends answers as the template does; other programs stop at the tokenizer's EOS only"
        fix = f"eos_token of tokenizer_config.json = {tokenizer.convert_ids_to_tokens(chat.turn_end_id)!r}"
        findings.append(
            warning(
                "ends",
                f"the template ends a turn with {name(chat.turn_end_id)}, the tokenizer's EOS is {name(eos)}",
                why,
                fix,
            )
        )
    if chat.turn_end_id == unknown and unknown != eos:
        why = "the end is spelt by a token that the vocabulary does not have"
        findings.append(
            error(
                "ends",
                "the template's end of turn is the unknown token",
                why,
                "mend the template or the vocabulary",
            )
        )
    findings += _stop_findings(chat, generation)
    if len(tokenizer) > width:
        why = "a row whose text has one of the others is refused: the model has no embedding for it"
        fix = "nothing while no text has one (padding is never looked up); else the tokenizer that belongs to the model"
        findings.append(note("ends", f"the tokenizer knows {len(tokenizer)} tokens, the model {width}", why, fix))
    return findings or ok("ends", f"answers end with {name(chat.turn_end_id)}; stops {list(chat.stop_ids)}")


def _stop_findings(chat: ChatFormat, generation: Any) -> list[Finding]:
    """What generation_config.json, if there is one, stops at."""
    if generation is None:
        return []
    findings = []
    stops = _ids(generation.eos_token_id)
    if stops and not set(chat.end_ids) & set(stops):
        why = "generation outside would never see the end that was trained"
        fix = f"eos_token_id of generation_config.json = {sorted(chat.end_ids)}"
        findings.append(
            error(
                "ends",
                f"generation_config stops at {stops}, training ends with {sorted(chat.end_ids)}",
                why,
                fix,
            )
        )
    pad_id = generation.pad_token_id
    if pad_id is not None and pad_id in stops and pad_id not in chat.end_ids:
        why = "a padding token would end answers (transformers#48016)"
        findings.append(
            error(
                "ends",
                f"generation_config: pad {pad_id} is among its stops {stops}",
                why,
                "take it out of eos_token_id",
            )
        )
    return findings


def _ids(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def check_prefix(recipe: Recipe, chat: ChatFormat) -> list[Finding]:
    """Whether rendering prompt and answer together begins with the prompt rendered alone."""
    if chat.template is None:
        return ok("prefix", "no chat template: prompt and answer are joined as ids")
    user, assistant = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is blue."}

    render = chat.template.render
    findings = []
    alone, whole = render([user], True), render([user, assistant], False)
    if not whole.startswith(alone):
        why = "trainers that cut the prompt off put the loss on the wrong tokens (TRL#5213); here ids are joined"
        fix = (
            "nothing to do here; a template whose generation prompt is what stands before an answer mends it elsewhere"
        )
        findings.append(warning("prefix", "the rendered prompt is no prefix of prompt and answer", why, fix))
    again = {"role": "user", "content": "Are you sure?"}
    later = render([user, assistant, again], True)
    if assistant["content"] not in later:
        why = "a correction shows the model its first answer: the template drops it"
        say = error if recipe.method.uses_rac else warning
        findings.append(say("prefix", "the template hides earlier answers", why, "data.chat_template=your own"))
    return findings or ok("prefix", "the prompt is a prefix of prompt and answer; earlier answers stay")


def check_data(recipe: Recipe, chat: ChatFormat) -> list[Finding]:
    """What the labels of the first examples look like."""
    datasets = build_datasets(recipe, chat, cache_root() / "data")
    if isinstance(datasets.plan, StreamPlan):
        return ok("data", "streaming: looked at while training")
    store = datasets.plan.store
    sample = [store[i] for i in range(min(_SAMPLE, len(store)))]
    findings = []
    cut = sum(example.truncated for example in sample)
    if cut > len(sample) // 10:
        why = "a cut answer has no end to learn: the model learns to go on"
        fix = f"data.max_response_tokens higher than {recipe.data.max_response_tokens}, or data.over_length=skip"
        findings.append(warning("data", f"{cut} of {len(sample)} answers are cut", why, fix))
    short = sum(example.prompt_truncated for example in sample)
    if short > len(sample) // 2:
        why = "what is asked stands behind the cut in many templates"
        findings.append(note("data", f"{short} of {len(sample)} prompts are cut", why, "data.max_prompt_tokens higher"))
    skipped = datasets.summary["bad_rows"] + datasets.summary["over_length_rows"]
    if skipped:
        findings.append(
            note(
                "data", f"{skipped} rows were left out", "they are not trained on", f"see {datasets.summary['skipped']}"
            )
        )
    batch = recipe.train.global_batch
    if len(store) < batch:
        why = "a step would see examples of several passes"
        findings.append(
            warning(
                "data",
                f"{len(store)} examples, train.global_batch={batch}",
                why,
                "a smaller train.global_batch",
            )
        )
    tokens = sum(len(example.prompt_ids) + len(example.response_ids) for example in sample) / len(sample)
    return findings or ok("data", f"{len(store)} examples, {tokens:.0f} tokens on average, longest {datasets.longest}")
