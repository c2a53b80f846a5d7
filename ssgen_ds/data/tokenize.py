"""Records -> token ids. Prompt and response are tokenised apart and joined as ids, so that the prompt is always a token
prefix of the whole, and the labels cover exactly the response and its end token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ssgen_ds.data.messages import Message, extra_fields, message
from ssgen_ds.data.readers import BadRow
from ssgen_ds.data.records import Record
from ssgen_ds.data.template import SENTINEL, Template, after_sentinel, open_template
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_SEPARATOR = "\n\n"  # between the parts of a prompt where there is no chat template


class OverLength(BadRow):
    """A row left out because of `over_length: skip`: counted apart from rows that are wrong."""


@dataclass(frozen=True)
class Example:
    """One training example.

    prompt_ids: at least one token. prompt_loss_mask: with `loss_on: all` 1 on earlier assistant turns, as long as
    prompt_ids; else None. response_ids: end with the turn end, unless `truncated`. gold_text: the response as text.
    """

    id: str
    prompt_ids: list[int]
    prompt_loss_mask: list[int] | None
    response_ids: list[int]
    truncated: bool
    gold_text: str
    prompt_truncated: bool = False


class ChatFormat:
    """How conversations become tokens: the prompt's rendering, the end of a turn, and which ids stop or are banned.

    `generation_eos_ids` are the model's own stop ids; `embedding_rows` is how many tokens the model has a row for, None
    where nobody looks them up. Raises UserError for a template that cannot be used, or when
    neither the tokenizer nor the template has an end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        generation_eos_ids: Iterable[int] = (),
        embedding_rows: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.data = data
        is_larger = embedding_rows is not None and len(tokenizer) > embedding_rows
        # Rows of the embedding where the tokenizer has ids beyond it, which the model cannot look up; else None.
        self.rows_below_tokenizer: int | None = embedding_rows if is_larger else None
        self.template = open_template(tokenizer, data)
        self.special_ids = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        end = self._template_turn_end()
        end = tokenizer.eos_token_id if end is None else end
        if end is None:
            raise UserError(
                "model.path: the tokenizer has no EOS token, so that the model could never learn to stop; set "
                "eos_token in tokenizer_config.json, or a data.chat_template whose turns end in a special token"
            )
        self.turn_end_id: int = end
        own_ends = {end} if tokenizer.eos_token_id is None else {end, tokenizer.eos_token_id}
        self.end_ids = frozenset(own_ends)
        self.stop_ids: tuple[int, ...] = tuple(sorted(own_ends.union(generation_eos_ids)))
        self._end_texts = tuple(tokenizer.convert_ids_to_tokens(sorted(own_ends)))

    def encode(self, record: Record) -> Example:
        """Token ids of one record, within the recipe's lengths. Raises BadRow, or OverLength with `skip`."""
        text, content = self._texts(record)
        content = self._without_end(content)
        response_ids = self._ids(content)
        if not response_ids and record.messages[-1]["content"].strip():
            raise BadRow("the response is empty but for its end token")
        if not self.end_ids.isdisjoint(response_ids):
            raise BadRow(f"the response holds an end token ({' or '.join(self._end_texts)}) before its end")
        prompt, loss_mask = self._prompt(record, text)
        if not prompt:
            raise BadRow("the prompt has no tokens")
        response_ids = [*response_ids, self.turn_end_id]
        too_long = self._too_long(len(prompt), len(response_ids))
        if too_long and self.data.over_length != "truncate":
            raise OverLength(too_long) if self.data.over_length == "skip" else BadRow(too_long)
        prompt_truncated = len(prompt) > self.data.max_prompt_tokens
        if prompt_truncated:
            prompt, loss_mask = self._shortened_prompt(record, len(prompt))
        truncated = len(response_ids) > self.data.max_response_tokens
        if what := self.beyond_embedding([*prompt, *response_ids[: self.data.max_response_tokens]]):
            raise BadRow(what)
        return Example(
            record.id,
            prompt,
            loss_mask,
            response_ids[: self.data.max_response_tokens],
            truncated,
            content,
            prompt_truncated,
        )

    def beyond_embedding(self, ids: list[int]) -> str:
        """What is wrong with ids that the model has no embedding for; "" where there are none."""
        rows = self.rows_below_tokenizer
        if rows is None or max(ids, default=0) < rows:
            return ""
        first = next(token for token in ids if token >= rows)
        return (
            f"the token {self.tokenizer.convert_ids_to_tokens(first)!r} ({first}) has no row in the model's embedding, "
            f"which has {rows}: take it out of the text, or the tokenizer that belongs to the model"
        )

    def correction_ids(self, cue: str) -> list[int]:
        """Ids between a spliced-in assistant turn (without its end token) and the start of the next assistant turn."""
        if self.template is None:
            return self._ids(f"{PLAIN_SEPARATOR}{cue}{PLAIN_SEPARATOR}")
        turns = [message("user", "X"), message("assistant", SENTINEL), message("user", cue)]
        try:
            text = self.template.prompt(turns, {})
        except BadRow as error:
            raise UserError(f"data.chat_template: refuses a correction turn: {error}") from None
        return self._ids(after_sentinel(text))

    def banned_ids(self, vocab_size: int, keep: Iterable[int] = ()) -> list[int]:
        """Ids that generation must not produce, sorted; `vocab_size` is the width of the model's logits.

        Every special entry of the vocabulary (`all_special_ids` knows only a few of them), all stop ids and the
        padding rows beyond the tokenizer, minus `keep`.
        """
        banned = self.special_ids.union(self.stop_ids, range(len(self.tokenizer), vocab_size))
        return sorted(token for token in banned.difference(keep) if token < vocab_size)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def fingerprint(self) -> str:
        """Hex over everything that decides how text becomes ids, for cache keys."""
        tokenizer = self.tokenizer
        rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
        parts = [
            type(tokenizer).__name__,
            rules,
            None if self.template is None else self.template.text,
            self.turn_end_id,
            self.stop_ids,
            sorted(self.special_ids),
        ]
        if self.data.chat_template_kwargs:
            parts.append(json.dumps(self.data.chat_template_kwargs, sort_keys=True))
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _template_turn_end(self) -> int | None:
        """The first special token after an assistant's content; it need not be the tokenizer's EOS."""
        if self.template is None:
            return None
        return next((i for i in self._ids(self.template.after_turn) if i in self.special_ids), None)

    def _texts(self, record: Record) -> tuple[str, str]:
        """(rendered prompt, response) of a conversation, of which the template leaves out nothing. Raises BadRow."""
        messages, inputs = record.messages, record.inputs
        if self.template is None:
            more = [*inputs, *(name for one in messages for name in extra_fields(one))]
            if more:
                raise BadRow(
                    f"the tokenizer has no chat template, so that nothing reads {', '.join(more)}: set "
                    f"data.chat_template, or leave it out by data.ignore_fields=[{','.join(more)}]"
                )
            return "", messages[-1]["content"]
        prompt = self.template.prompt(messages[:-1], inputs)
        self.template.check_all_is_read(messages, inputs, prompt)
        response = self.template.response(messages, inputs, prompt)
        self.template.warn_where_unclosed(record.where, messages[:-1], inputs, prompt, response)
        return prompt, response

    def _without_end(self, content: str) -> str:
        """The response without end tokens that the data already carries: one is added, and one is enough."""
        while content.endswith(self._end_texts):
            for text in self._end_texts:
                content = content.removesuffix(text)
        return content

    def _prompt(self, record: Record, text: str) -> tuple[list[int], list[int] | None]:
        """Ids of everything before the response, and the loss mask with `loss_on: all`. `text`: the rendered prompt."""
        if self.template is None:
            ids = self._plain_prompt(record.messages[:-1])
            return ids, [0] * len(ids) if self.data.loss_on == "all" else None
        if self.data.loss_on == "all":
            return self._prompt_by_segments(self.template, record, text)
        return self._ids(text), None

    def _plain_prompt(self, messages: list[Message]) -> list[int]:
        if [one["role"] for one in messages] not in (["user"], ["system", "user"]):
            raise UserError(
                "the tokenizer has no chat template, and the data holds conversations of several turns; "
                "set data.chat_template"
            )
        parts = [one["content"] for one in messages]
        ids = self._ids(PLAIN_SEPARATOR.join([*parts, ""]), special=True)
        # Some tokenizers end every text with EOS; before a response it would say that all is over.
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _prompt_by_segments(self, template: Template, record: Record, text: str) -> tuple[list[int], list[int]]:
        """Tokenise the text around each assistant turn apart, so that the mask is exact to the token."""
        ids: list[int] = []
        mask: list[int] = []
        done = 0
        for number, turn in enumerate(record.messages[:-1]):
            if turn["role"] != "assistant":
                continue
            before = template.prompt(record.messages[:number], record.inputs)
            content = template.response(record.messages[: number + 1], record.inputs, before)
            content = content if text.startswith(before + content) else content.strip()  # some templates trim
            if not text.startswith(before + content) or len(before) < done:
                raise BadRow(
                    "the chat template rewrites earlier turns, so that they cannot be trained as the model will see "
                    "them; set data.loss_on=last"
                )
            self._extend(ids, mask, text[done : len(before)])
            content_ids = self._ids(self._without_end(content))
            ids += content_ids
            mask += [1] * len(content_ids)
            done = len(before) + len(content)
        self._extend(ids, mask, text[done:])
        return ids, mask

    def _extend(self, ids: list[int], mask: list[int], text: str) -> None:
        """Append a stretch that is read only, but for the end token of an assistant turn that it follows."""
        new = self._ids(text)
        new_mask = [0] * len(new)
        if mask and self.turn_end_id in new:
            new_mask[new.index(self.turn_end_id)] = 1
        ids += new
        mask += new_mask

    def _too_long(self, prompt: int, response: int) -> str:
        limits = self.data.max_prompt_tokens, self.data.max_response_tokens
        sides = [("prompt", prompt, limits[0]), ("response", response, limits[1])]
        return ", ".join(
            f"the {side} has {length} tokens (data.max_{side}_tokens={limit})"
            for side, length, limit in sides
            if length > limit
        )

    def _shortened_prompt(self, record: Record, full_tokens: int) -> tuple[list[int], list[int] | None]:
        """The prompt with the last user message cut at its end until all fits; the template around it stays whole."""
        messages = record.messages
        last = max(number for number, one in enumerate(messages) if one["role"] == "user")
        content, limit = messages[last]["content"], self.data.max_prompt_tokens

        def keep(chars: int) -> tuple[list[int], list[int] | None]:
            cut = [*messages[:last], {**messages[last], "content": content[:chars]}, *messages[last + 1 :]]
            text = "" if self.template is None else self.template.prompt(cut[:-1], record.inputs)
            return self._prompt(replace(record, messages=cut), text)

        best = keep(0)
        if len(best[0]) > limit:
            raise BadRow(
                f"the prompt has {full_tokens} tokens, and {len(best[0])} even without its last user message "
                f"(data.max_prompt_tokens={limit})"
            )
        # `fits` fits and `over` does not. Tokens grow about linearly with characters, so interpolation lands close at
        # once; every other guess bisects, so that odd text costs no more than a logarithm.
        fits, over, over_tokens = 0, len(content), full_tokens
        interpolate = True
        while over - fits > 1 and len(best[0]) < limit:
            share = (limit - len(best[0])) / (over_tokens - len(best[0])) if interpolate else 0.5
            interpolate = not interpolate
            middle = min(over - 1, max(fits + 1, fits + int((over - fits) * share)))
            tried = keep(middle)
            if len(tried[0]) <= limit:
                fits, best = middle, tried
            else:
                over, over_tokens = middle, len(tried[0])
        return best
