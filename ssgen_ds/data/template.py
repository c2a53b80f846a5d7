"""The chat template with the recipe's arguments: the text around what the assistant says, and what it leaves out.

    Qwen3                <|im_start|>assistant\\n                  a prompt ends here, and the response goes on
    DeepSeek-R1, QwQ     <|im_start|>assistant\\n<think>\\n         the prompt opens the reasoning itself
    enable_thinking off  ...assistant\\n<think>\\n\\n</think>\\n\\n   the prompt closes it, too

What is trained is what the model sees when it answers: the prompt with its generation prompt, then the response.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta

from ssgen_ds.data.bad_row import BadRow
from ssgen_ds.data.messages import Message, extra_fields, message
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.checks import TEMPLATE_ARGUMENTS
from ssgen_ds.recipe.schema import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
SENTINEL = "SSGENSENTINEL"  # stands in for an assistant's content, to find what a template puts around it
# A template may expect other types than a row has, or fewer levels; then it raises Python's own errors.
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError)
_OPENER = re.compile(r"(<[^<>/\s]+>|\[[A-Z_]+\])\s*$")
_LONGEST_OPENER = 200  # characters
_GIVEN = frozenset({"raise_exception", "strftime_now", "bos_token", "eos_token", "pad_token", "unk_token"})


class Template:
    """Renders conversations. Raises UserError for arguments that the template does not have."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, arguments: dict[str, Any]) -> None:
        self.text = text
        self._tokenizer = tokenizer
        self._arguments = arguments
        self._shown_roles: set[str] = set()
        self._warned = False
        try:
            self._variables = _variables(text)
            refuse_arguments(arguments, self._variables)
            turn = self.render([message("user", "X"), message("assistant", SENTINEL)], generation=False)
        except _REFUSALS as error:
            raise UserError(f"data.chat_template: the chat template cannot be rendered: {error}") from None
        self.after_turn = after_sentinel(turn)

    def render(self, messages: list[Message], generation: bool, inputs: dict[str, Any] | None = None) -> str:
        """The text of a conversation, with `generation` up to where the assistant begins to answer."""
        return self._tokenizer.apply_chat_template(
            messages,
            chat_template=self.text,
            add_generation_prompt=generation,
            tokenize=False,
            **{**self._arguments, **(inputs or {})},
        )

    def prompt(self, messages: list[Message], inputs: dict[str, Any]) -> str:
        """The text before a response. Raises BadRow where the template refuses the messages."""
        try:
            return self.render(messages, True, inputs)
        except _REFUSALS as error:
            raise BadRow(f"the chat template refuses these messages: {error}") from None

    def response(self, messages: list[Message], inputs: dict[str, Any], prompt: str) -> str:
        """What the last message says after `prompt`, up to its end.

        Of plain content it is the content, less what the prompt has opened already. A message with other fields is what
        the template makes of them. Raises BadRow.
        """
        answer = messages[-1]
        if not extra_fields(answer):
            if not answer["content"].lstrip().startswith(("<", "[")):
                return answer["content"]
            return without_opener(self._opening(messages[:-1], inputs, prompt), answer["content"])
        try:
            whole = self.render(messages, False, inputs)
        except _REFUSALS as error:
            raise BadRow(f"the chat template refuses these messages: {error}") from None
        text = whole.removeprefix(prompt)
        if not whole.startswith(prompt) or not text.endswith(self.after_turn):
            what = " and ".join(extra_fields(answer))
            raise BadRow(
                f"the chat template writes an answer with {what} otherwise than after its generation prompt, so that "
                "it cannot be trained as the model will see it; write the answer out in its content"
            )
        return text[: len(text) - len(self.after_turn)]

    def warn_where_unclosed(
        self, where: str, messages: list[Message], inputs: dict[str, Any], prompt: str, response: str
    ) -> None:
        """Say once that a response never closes the reasoning that the generation prompt after `messages` opens."""
        if self._warned or not response.strip() or not unclosed_opener(prompt, response):
            return
        if tag := unclosed_opener(self._opening(messages, inputs, prompt), response):
            self._warned = True
            log.warning(
                "%s: the prompt opens %s, and the response never closes it: the answer is trained as reasoning "
                "(said once; data.chat_template_kwargs may have a switch, or give the reasoning)",
                where,
                tag,
            )

    def _opening(self, messages: list[Message], inputs: dict[str, Any], prompt: str) -> str:
        """What the generation prompt adds: a tag at the end of what the user said opens nothing."""
        without = self.render(messages, False, inputs)
        return prompt[len(without) :] if prompt.startswith(without) else ""

    def check_all_is_read(self, messages: list[Message], inputs: dict[str, Any], prompt: str) -> None:
        """Raises BadRow for anything that the template leaves out of a conversation.

        What it leaves out of an earlier turn alone, as reasoning templates do, counts as read.
        """
        for number, one in enumerate(messages[:-1], 1):
            content, role = one["content"].strip(), one["role"]
            if not content or (role in self._shown_roles and content in prompt):
                continue
            if not self._reads(messages, number, {**one, "content": ""}, inputs):
                raise BadRow(f"the chat template leaves out message {number}, of the role {role!r}")
            self._shown_roles.add(role)  # a short text may stand in a prompt by chance: each role is tried once
        for number, one in enumerate(messages, 1):
            for name in extra_fields(one):
                without = {key: value for key, value in one.items() if key != name}
                if not self._reads(messages, number, without, inputs):
                    raise BadRow(
                        f"message {number}: the chat template does not read its {name!r}; take it out, or leave it out "
                        f"by data.ignore_fields=[{name}]"
                    )
        for name in inputs:
            without = {key: value for key, value in inputs.items() if key != name}
            is_list = name in ("tools", "documents")
            if name not in self._variables or (
                is_list and self._text(messages, without) == self._text(messages, inputs)
            ):
                raise BadRow(
                    f"the chat template does not read the row's {name!r}; take it out, or leave it out by "
                    f"data.ignore_fields=[{name}]"
                )

    def _reads(self, messages: list[Message], number: int, changed: Message, inputs: dict[str, Any]) -> bool:
        """Whether another message in place of `number` (from 1) gives another text, in its place or as the last."""
        return any(
            self._text(conversation, inputs) != self._text([*conversation[: number - 1], changed, *rest], inputs)
            for conversation, rest in ((messages, messages[number:]), (messages[:number], []))
        )

    def _text(self, messages: list[Message], inputs: dict[str, Any]) -> str | None:
        try:
            return self.render(messages, False, inputs)
        except _REFUSALS:
            return None


def open_template(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Template | None:
    """The recipe's template, else the tokenizer's own; None where there is none. Raises UserError."""
    text = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if data.chat_template is not None:
        try:
            text = Path(data.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template: cannot read {data.chat_template}: {error}") from None
    if text is not None:
        return Template(tokenizer, text, data.chat_template_kwargs)
    if data.chat_template_kwargs:
        raise UserError("data.chat_template_kwargs: the tokenizer has no chat template; set data.chat_template")
    return None


def after_sentinel(text: str) -> str:
    """What follows the assistant's content. Raises UserError where the template does not show it."""
    _, found, after = text.partition(SENTINEL)
    if not found:
        raise UserError("data.chat_template: the chat template does not show the assistant's content")
    return after


def without_opener(prompt: str, content: str) -> str:
    """A response without what the end of its prompt says already, such as `<think>` and a line break.

    Raises BadRow for a response that opens its reasoning where the prompt has closed it.
    """
    end = prompt[-_LONGEST_OPENER:]
    for start in (match.start() for match in re.finditer(r"[<\[]", end)):
        if content.startswith(end[start:]):
            return content[len(end) - start :]
    opener = _OPENER.search(end)
    if opener is not None and content.lstrip().startswith(opener[1]):
        rest = content.lstrip().removeprefix(opener[1])
        return rest.lstrip() if opener[0] != opener[1] else rest
    opened = re.match(r"\s*<([^<>/\s]+)>", content)
    if opened is not None and end.rstrip().endswith(f"</{opened[1]}>"):
        raise BadRow(
            f"the response opens <{opened[1]}>, and the generation prompt of the template has closed it already: give "
            "the answer alone, or set data.chat_template_kwargs so that the template leaves it open"
        )
    return content


def unclosed_opener(prompt: str, response: str) -> str:
    """The tag that a prompt opens and its response never closes; "" where there is none."""
    opener = _OPENER.search(prompt[-_LONGEST_OPENER:])
    if opener is None or not opener[1].startswith("<") or opener[1].startswith("<|"):
        return ""
    return "" if f"</{opener[1][1:]}" in response else opener[1]


def refuse_arguments(arguments: dict[str, Any], variables: frozenset[str]) -> None:
    """Raises UserError for arguments that a template with these variables never looks at."""
    if unknown := sorted(arguments.keys() - variables):
        own = ", ".join(sorted(variables - _GIVEN.union(TEMPLATE_ARGUMENTS))) or "nothing"
        raise UserError(
            f"data.chat_template_kwargs: the chat template does not use {' or '.join(map(repr, unknown))}; besides the "
            f"messages it looks at {own}"
        )


def _variables(text: str) -> frozenset[str]:
    """Names that a template takes from outside."""
    marks = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own tags: they name nothing
    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(marks.sub("", text))
    return frozenset(jinja2.meta.find_undeclared_variables(tree))
