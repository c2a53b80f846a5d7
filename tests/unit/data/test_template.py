"""Templates that read more than role and content: what they read is trained, what they do not read is refused."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from ssgen_ds.data.readers import BadRow
from ssgen_ds.data.records import RecordMaker
from ssgen_ds.data.template import without_opener
from ssgen_ds.data.tokenize import ChatFormat, Example
from ssgen_ds.errors import UserError
from ssgen_ds.recipe.checks import TEMPLATE_ARGUMENTS
from ssgen_ds.recipe.schema import DataConfig
from tests.unit.data.helpers import CHATML, byte_tokenizer, data_config

SPECIALS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Reads every field; keeps the reasoning of the last turn alone, as reasoning models do.
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}{{ '\n' }}"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}" + GENERATION
)
OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
SWITCH = CHATML.removesuffix("{% endif %}") + (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NO_SYSTEM_SHOWN = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = [{"name": "weather", "arguments": {"city": "Bern"}}]
NESTED = json.loads("[" * 600 + "]" * 600)  # JSON reads so many levels; what renders a template does not


def tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    return byte_tokenizer(SPECIALS, template, eos_token="<|im_end|>")


def encode(template: str | None, row: dict, **config: object) -> Example:
    data: DataConfig = data_config(**{"max_prompt_tokens": 4096, "max_response_tokens": 4096, **config})
    chat = ChatFormat(tokenizer(template), data)
    return chat.encode(RecordMaker(data.train[0], data, "data.train")("f:1", row))


def texts(template: str | None, row: dict, **config: object) -> tuple[str, str]:
    """(prompt, response) as the model sees them."""
    example = encode(template, row, **config)
    one = tokenizer(template)
    return one.decode(example.prompt_ids), one.decode(example.response_ids)


def chat_row(*messages: dict, **columns: object) -> dict:
    return {"messages": list(messages), **columns}


def test_an_answer_with_fields_is_what_the_template_makes_of_it() -> None:
    prompt, response = texts(TOOLS, chat_row(USER, ANSWER | {"reasoning_content": "r", "tool_calls": CALL}))
    assert prompt == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert response == (
        '<think>\nr\n</think>\n\na<call>{"name": "weather", "arguments": {"city": "Bern"}}</call><|im_end|>'
    )
    # A turn that calls a tool and says nothing, as the chat interfaces write it.
    for silent in ({"content": None}, {"content": ""}, {}):
        _, response = texts(TOOLS, chat_row(USER, {"role": "assistant", **silent, "tool_calls": CALL}))
        assert response.startswith('<call>{"name": "weather"')


def test_what_the_row_and_earlier_turns_say_is_in_the_prompt() -> None:
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": CALL}, {"role": "tool", "content": "rain"}]
    for tools in ([{"name": "weather"}], '[{"name": "weather"}]'):
        prompt, response = texts(TOOLS, chat_row(USER | {"name": "Al"}, *turns[1:], ANSWER, tools=tools))
        assert '<|im_start|>tools\n[{"name": "weather"}]<|im_end|>' in prompt
        assert '<call>{"name": "weather", "arguments": {"city": "Bern"}}</call><|im_end|>\n' in prompt
        assert prompt.endswith("<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n")
        assert "<|im_start|>user Al\nq<|im_end|>" in prompt and response == "a<|im_end|>"


def test_a_renamed_column_of_tools_and_a_system_prompt_of_the_row() -> None:
    row = chat_row(USER, ANSWER, functions=[{"name": "f"}], system="mine")
    prompt, _ = texts(TOOLS, row, columns={"tools": "functions"}, system="the recipe's")
    assert prompt.startswith('<|im_start|>tools\n[{"name": "f"}]<|im_end|>\n<|im_start|>system\nmine<|im_end|>')
    prompt, _ = texts(TOOLS, row, columns={"tools": "functions", "system": ""}, system="the recipe's")
    assert "system\nthe recipe's<|im_end|>" in prompt
    prompt, _ = texts(TOOLS, row | {"system": ""}, columns={"tools": "functions"}, system="the recipe's")
    assert "system\nthe recipe's<|im_end|>" in prompt
    with pytest.raises(BadRow, match=r"two system prompts.*ignore_fields=.system. leaves it out"):
        texts(TOOLS, chat_row({"role": "system", "content": "s"}, USER, ANSWER, system="other"))
    # A column that the prompt is made of is spoken for.
    used = {"system": "s", "tools": "hammer", "completion": "a"}
    prompt, _ = texts(CHATML, used, prompt="{system}: {tools}")
    assert prompt == "<|im_start|>user\ns: hammer<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "row", "what"),
    [
        (CHATML, chat_row(USER, ANSWER | {"reasoning_content": "r"}), "message 2: .*does not read its 'reasoning_co"),
        (CHATML, chat_row(USER, ANSWER | {"weight": 0}), "message 2: .*'weight'.*ignore_fields=.weight."),
        (CHATML, chat_row(USER | {"name": "Al"}, ANSWER), "message 1: .*'name'"),
        (CHATML, chat_row(USER, ANSWER | {"tool_calls": CALL}), "message 2: .*'tool_calls'"),
        (CHATML, chat_row(USER, ANSWER, tools=[{"name": "f"}]), "does not read the row's 'tools'"),
        (CHATML, chat_row(USER, ANSWER, documents=[{"text": "d"}]), "does not read the row's 'documents'"),
        (CHATML, chat_row(USER, ANSWER, chat_template_kwargs={"x": 1}), "does not read the row's 'x'"),
        (SWITCH, chat_row(USER, ANSWER, chat_template_kwargs={"tokenize": True}), "'chat_template_kwargs' sets tokeni"),
        (TOOLS, chat_row(USER, ANSWER, tools="hammer"), "the column 'tools' must hold a list, or its JSON text"),
        (TOOLS, chat_row(USER, ANSWER | {"name": b"x"}), "message 2: name: no value of JSON"),
        (TOOLS, chat_row(USER, ANSWER | {"name": "\ud800"}), "message 2: name: not valid Unicode"),
        (TOOLS, chat_row(USER | {"name": NESTED}, ANSWER), "the chat template refuses these messages: maximum recur"),
        (TOOLS, chat_row(USER, ANSWER | {"name": "Al"}), "writes an answer with name otherwise than after its generat"),
        (None, {"prompt": "q", "completion": "a", "tools": [1]}, "no chat template, so that nothing reads tools"),
        (None, {"prompt": [USER], "completion": [ANSWER | {"weight": 1}]}, "no chat template.*weight"),
        (NO_SYSTEM_SHOWN, chat_row({"role": "system", "content": "s"}, USER, ANSWER), "leaves out message 1, .*'sys"),
        (TOOLS, chat_row(USER, {"role": "critic", "content": "c"}), "unknown role 'critic'"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(template: str | None, row: dict, what: str) -> None:
    with pytest.raises(BadRow, match=what):
        encode(template, row)


def test_fields_may_be_left_out_knowingly_and_empty_ones_say_nothing() -> None:
    plain = encode(CHATML, chat_row(USER, ANSWER))
    marked = chat_row(USER | {"id": 3}, ANSWER | {"weight": 1}, tools=[{"name": "f"}])
    assert encode(CHATML, marked, ignore_fields=["id", "weight", "tools"]) == plain
    empty = {"tool_calls": [], "name": None, "reasoning_content": ""}
    assert encode(CHATML, chat_row(USER, ANSWER | empty, tools=None, system="")).response_ids == plain.response_ids


def test_reasoning_that_a_template_keeps_in_the_last_turn_alone_counts_as_read() -> None:
    earlier = chat_row(USER, ANSWER | {"reasoning_content": "EARLIER"}, USER, ANSWER)
    prompt, _ = texts(TOOLS, earlier)
    assert "EARLIER" not in prompt
    with pytest.raises(BadRow, match=r"rewrites earlier turns.*loss_on=last"):
        texts(TOOLS, earlier, loss_on="all")


def test_earlier_turns_with_fields_are_trained_with_loss_on_all() -> None:
    example = encode(TOOLS, chat_row(USER, ANSWER | {"tool_calls": CALL}, USER, ANSWER), loss_on="all")
    assert example.prompt_loss_mask is not None
    learnt = [token for token, is_learnt in zip(example.prompt_ids, example.prompt_loss_mask, strict=True) if is_learnt]
    call = 'a<call>{"name": "weather", "arguments": {"city": "Bern"}}</call><|im_end|>'
    assert tokenizer(TOOLS).decode(learnt) == call
    assert example.prompt_ids == encode(TOOLS, chat_row(USER, ANSWER | {"tool_calls": CALL}, USER, ANSWER)).prompt_ids


@pytest.mark.parametrize(
    ("prompt", "content", "rest"),
    [
        ("assistant\n<think>\n", "<think>\nr\n</think>\n\n4", "r\n</think>\n\n4"),
        ("assistant\n<think>\n", "<think>r</think>4", "r</think>4"),
        ("assistant\n<think>\n", "\n<think>\n\nr</think>4", "r</think>4"),
        ("assistant\n<think>", "<think>\nr</think>4", "\nr</think>4"),
        ("assistant\n<think>\n", "r\n</think>\n\n4", "r\n</think>\n\n4"),
        ("assistant\n<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n4", "4"),
        ("assistant\n", "<think>\nr\n</think>\n\n4", "<think>\nr\n</think>\n\n4"),
        ("[THINK]", "[THINK]r[/THINK]4", "r[/THINK]4"),
        ("<|im_start|>assistant\n", "<|im_start|>assistant\n4", "4"),
        ("<|end_header_id|>\n\n", "<b>4</b>", "<b>4</b>"),
    ],
)
def test_what_the_prompt_has_opened_is_not_said_twice(prompt: str, content: str, rest: str) -> None:
    assert without_opener(prompt, content) == rest


def test_a_template_that_opens_the_reasoning_is_trained_as_the_model_answers(caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": "2+2?", "completion": "<think>\nadd them\n</think>\n\n4"}
    prompt, response = texts(OPENS, row)
    assert (prompt + response).count("<think>") == 1
    assert prompt.endswith("<|im_start|>assistant\n<think>\n") and response == "add them\n</think>\n\n4<|im_end|>"
    assert encode(OPENS, row).gold_text == "add them\n</think>\n\n4"
    with caplog.at_level(logging.WARNING):
        chat = ChatFormat(tokenizer(OPENS), data_config())
        maker = RecordMaker(data_config().train[0], data_config(), "data.train")
        for number in range(3):
            chat.encode(maker(f"f:{number}", {"prompt": "q", "completion": "4"}))
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "f:0: the prompt opens <think>, and the response never closes it: the answer is trained as reasoning"
    ]


def test_what_the_user_says_opens_nothing() -> None:
    bare = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    assert texts(bare, {"prompt": "Say <b>", "completion": "<b>it</b>"})[1] == "<b>it</b><|im_end|>"


def test_arguments_reach_the_template() -> None:
    row = {"prompt": "q", "completion": "4"}
    without, off = "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert texts(SWITCH, row)[0].endswith(without)
    assert texts(SWITCH, row, chat_template_kwargs={"enable_thinking": False})[0].endswith(off)
    assert texts(SWITCH, row | {"chat_template_kwargs": {"enable_thinking": False}})[0].endswith(off)
    own = row | {"chat_template_kwargs": '{"enable_thinking": true}'}  # the row's own say beats the recipe's
    assert texts(SWITCH, own, chat_template_kwargs={"enable_thinking": False})[0].endswith(without)
    reasoning = {"prompt": "q", "completion": "<think>r</think>4"}
    with pytest.raises(BadRow, match="opens <think>, and the generation prompt of the template has closed it"):
        texts(SWITCH, reasoning, chat_template_kwargs={"enable_thinking": False})


def test_arguments_that_nothing_looks_at_are_refused(tmp_path: Path) -> None:
    def chat(template: str | None, **arguments: object) -> ChatFormat:
        return ChatFormat(tokenizer(template), data_config(chat_template_kwargs=arguments))

    with pytest.raises(UserError, match=r"does not use 'enable_thinkin'; besides the messages it looks at enable_t"):
        chat(SWITCH, enable_thinkin=False)
    with pytest.raises(UserError, match=r"no chat template; set data\.chat_template"):
        chat(None, enable_thinking=False)
    marked = SWITCH.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")
    off = chat(marked, enable_thinking=False)
    assert off.fingerprint() != chat(marked, enable_thinking=True).fingerprint() != chat(marked).fingerprint()


def test_the_names_that_rendering_takes_are_all_refused_in_a_recipe() -> None:
    taken = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"self", "kwargs"}
    assert taken <= set(TEMPLATE_ARGUMENTS)


FIELDS = {"reasoning_content": "REASON", "tool_calls": [{"name": "TOOLCALL"}], "name": "NAMED", "weight": 0}


@settings(max_examples=60, deadline=None)
@given(
    template=st.sampled_from([CHATML, TOOLS, SWITCH, OPENS, NO_SYSTEM_SHOWN]),
    turns=st.lists(st.sets(st.sampled_from(sorted(FIELDS))), min_size=1, max_size=3),
    row=st.sets(st.sampled_from(["tools", "system"])),
)
def test_all_that_a_row_says_is_seen_or_refused(template: str, turns: list[set[str]], row: set[str]) -> None:
    """Of any mixture of fields: a row that is taken shows each of them, but for reasoning before the last turn."""
    messages: list[dict] = []
    for names in turns:
        messages += [dict(USER), {**ANSWER, **{name: FIELDS[name] for name in sorted(names)}}]
    columns = {"tools": [{"name": "ROWTOOL"}], "system": "ROWSYSTEM"}
    try:
        seen = "".join(texts(template, chat_row(*messages, **{name: columns[name] for name in row})))
    except BadRow:
        return
    assert "weight" not in set().union(*turns)
    assert seen.count("TOOLCALL") == sum("tool_calls" in names for names in turns)
    assert seen.count("REASON") == ("reasoning_content" in turns[-1])
    assert seen.count("ROWTOOL") == ("tools" in row) and seen.count("ROWSYSTEM") == ("system" in row)
