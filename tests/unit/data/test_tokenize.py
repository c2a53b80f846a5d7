"""Token ids: the prompt is a prefix, labels cover the response, and turns end in exactly one end token."""

import copy
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ssgen_ds.data.readers import BadRow
from ssgen_ds.data.records import Message, Record, content_hash
from ssgen_ds.data.tokenize import ChatFormat, Example, OverLength
from ssgen_ds.errors import UserError
from tests.unit.data.helpers import CHATML, FORGETFUL, LLAMA3, NO_SYSTEM, byte_tokenizer, data_config

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=30)
IM_START, IM_END = 256, 257


def record(*contents: str, system: str | None = None) -> Record:
    """A conversation of alternating user and assistant turns."""
    roles = itertools.cycle(["user", "assistant"])
    messages: list[Message] = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Record(content_hash(messages), messages, "f:1", content_hash(messages))


def trained(chat: ChatFormat, example: Example) -> str:
    """The text of all tokens with a label."""
    pairs = zip(example.prompt_ids, example.prompt_loss_mask or [0] * len(example.prompt_ids), strict=True)
    return chat.decode([token for token, counted in pairs if counted] + example.response_ids)


def test_chatml_by_hand(chatml: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat(chatml, data_config())
    example = chat.encode(record("hi", "yo"))
    assert chat.decode(example.prompt_ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert example.prompt_ids[0] == IM_START
    assert chat.decode(example.response_ids) == "yo<|im_end|>"
    assert example.response_ids[-1] == IM_END  # trained, although pad is the same token
    assert (example.truncated, example.prompt_truncated, example.prompt_loss_mask) == (False, False, None)
    assert (chat.turn_end_id, chat.stop_ids) == (IM_END, (IM_END,))


def test_turn_end_that_is_not_eos(llama3: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat(llama3, data_config(), generation_eos_ids=[7])
    end, eos = llama3.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    assert chat.turn_end_id == end != eos == llama3.eos_token_id
    assert chat.stop_ids == (7, eos, end)
    example = chat.encode(record("hi", "yo"))
    assert example.response_ids[-1] == end and eos not in example.response_ids
    begin = llama3.convert_tokens_to_ids("<|begin|>")
    assert example.prompt_ids.count(begin) == 1  # the template's own; none is added on top


def test_smollm2(smollm2: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat(smollm2, data_config(), [2])
    assert (chat.turn_end_id, chat.stop_ids) == (2, (2,))
    assert chat.banned_ids(49152) == list(range(17))
    assert chat.banned_ids(49155, keep=[2, 5]) == [i for i in range(17) if i not in (2, 5)] + [49152, 49153, 49154]
    example = chat.encode(record("What is 2+2?", "4"))
    assert example.response_ids == [*smollm2("4")["input_ids"], 2]
    assert chat.decode(example.prompt_ids).endswith("What is 2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert (
        chat.decode(chat.correction_ids("Fix."))
        == "<|im_end|>\n<|im_start|>user\nFix.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.correction_ids("Fix.")[0] == chat.turn_end_id


def test_without_a_template(plain: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat(plain, data_config())
    example = chat.encode(record("hi", "yo", system="be kind"))
    assert chat.decode(example.prompt_ids) == "<s>be kind\n\nhi\n\n"  # BOS stays, the EOS behind it does not
    assert chat.decode(example.response_ids) == "yo</s>"
    assert chat.decode(chat.correction_ids("Fix.")) == "\n\nFix.\n\n"
    with pytest.raises(UserError, match=r"no chat template.*set data\.chat_template"):
        chat.encode(record("hi", "yo", "and?", "yes"))


def test_no_end_token_at_all() -> None:
    with pytest.raises(UserError, match=r"no EOS token.*set eos_token"):
        ChatFormat(byte_tokenizer(["<s>"]), data_config())
    chat = ChatFormat(byte_tokenizer(["<|im_start|>", "<|im_end|>"], CHATML), data_config())
    assert chat.stop_ids == (IM_END,)


def test_template_from_a_file(plain: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}")
    chat = ChatFormat(plain, data_config(chat_template=str(file)))
    example = chat.encode(record("hi", "yo", "and?", "yes"))
    assert chat.decode(example.prompt_ids + example.response_ids) == "[hi][yo][and?]>yes</s>"
    file.write_text("{% for %}")
    with pytest.raises(UserError, match="cannot be rendered"):
        ChatFormat(plain, data_config(chat_template=str(file)))
    file.write_text("nothing of the conversation")
    with pytest.raises(UserError, match="does not show the assistant's content"):
        ChatFormat(plain, data_config(chat_template=str(file)))
    with pytest.raises(UserError, match="cannot read"):
        ChatFormat(plain, data_config(chat_template=str(tmp_path / "none.jinja")))


def test_a_message_that_the_template_refuses_is_a_bad_row(chatml: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(NO_SYSTEM)
    chat = ChatFormat(chatml, data_config(chat_template=str(tmp_path / "t.jinja")))
    with pytest.raises(BadRow, match="no system role"):
        chat.encode(record("hi", "yo", system="s"))


def test_end_tokens_in_the_data(chatml: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat(chatml, data_config())
    example = chat.encode(record("hi", "yo<|im_end|><|im_end|>"))
    assert chat.decode(example.response_ids) == "yo<|im_end|>" and example.gold_text == "yo"
    with pytest.raises(BadRow, match="before its end"):
        chat.encode(record("hi", "yo<|im_end|> more"))
    with pytest.raises(BadRow, match="empty but for its end token"):
        chat.encode(record("hi", "<|im_end|>"))


def test_banned_ids_without_template(plain: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat(plain, data_config(), [9])
    assert chat.banned_ids(261) == [9, 256, 257, 258, 259, 260]
    assert chat.banned_ids(257, keep=[9]) == [256]  # the model's logits end before EOS


def test_loss_on_all_by_hand(chatml: PreTrainedTokenizerFast) -> None:
    chat = ChatFormat(chatml, data_config(loss_on="all"))
    example = chat.encode(record("hi", "yo", "and?", "yes", "ok", "bye"))
    assert trained(chat, example) == "yo<|im_end|>yes<|im_end|>bye<|im_end|>"
    whole = ChatFormat(chatml, data_config()).encode(record("hi", "yo", "and?", "yes", "ok", "bye"))
    assert whole.prompt_ids == example.prompt_ids


def test_loss_on_all_with_a_template_that_trims() -> None:
    specials = ["<|begin|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    llama3 = byte_tokenizer(specials, LLAMA3, bos_token="<|begin|>", eos_token="<|end_of_text|>")
    chat = ChatFormat(llama3, data_config(loss_on="all"))
    assert trained(chat, chat.encode(record("hi", " yo ", "and?", "yes"))) == "yo<|eot_id|>yes<|eot_id|>"


def test_loss_on_all_refuses_templates_that_rewrite_earlier_turns() -> None:
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"], FORGETFUL, eos_token="<|im_end|>")
    conversation = record("hi", "yo", "and?", "yes", "ok", "bye")
    with pytest.raises(BadRow, match=r"rewrites earlier turns.*data\.loss_on=last"):
        ChatFormat(tokenizer, data_config(loss_on="all")).encode(conversation)
    assert ChatFormat(tokenizer, data_config()).encode(conversation).response_ids[-1] == IM_END


def test_truncation_by_hand(chatml: PreTrainedTokenizerFast) -> None:
    # 1 + "user\n" 5 + content + 1 + "\n" 1 + 1 + "assistant\n" 10 = 19 tokens around the content
    chat = ChatFormat(chatml, data_config(max_prompt_tokens=23, max_response_tokens=3))
    example = chat.encode(record("abcdefghij", "vwxyz"))
    assert chat.decode(example.prompt_ids) == "<|im_start|>user\nabcd<|im_end|>\n<|im_start|>assistant\n"
    assert chat.decode(example.response_ids) == "vwx"  # no end token: the answer did not end here
    assert (example.truncated, example.prompt_truncated, example.gold_text) == (True, True, "vwxyz")
    fits = chat.encode(record("abcd", "vw"))
    assert chat.decode(fits.response_ids) == "vw<|im_end|>" and not fits.truncated and not fits.prompt_truncated
    assert chat.decode(chat.encode(record("abcd", "vwx")).response_ids) == "vwx"
    with pytest.raises(BadRow, match="36 tokens, and 35 even without its last user message"):
        chat.encode(record("q", "yo", system="sys" * 2))


def test_over_length_policies(chatml: PreTrainedTokenizerFast) -> None:
    limits = {"max_prompt_tokens": 23, "max_response_tokens": 3}
    what = r"prompt has 29 tokens \(data.max_prompt_tokens=23\), the response has 6 tokens"
    with pytest.raises(OverLength, match=what):
        ChatFormat(chatml, data_config(over_length="skip", **limits)).encode(record("abcdefghij", "vwxyz"))
    with pytest.raises(BadRow, match=what) as caught:
        ChatFormat(chatml, data_config(over_length="error", **limits)).encode(record("abcdefghij", "vwxyz"))
    assert not isinstance(caught.value, OverLength)


@given(contents=st.lists(TEXT, min_size=1, max_size=3), limit=st.integers(1, 60), answer_limit=st.integers(1, 12))
def test_invariants(chatml: PreTrainedTokenizerFast, contents: list[str], limit: int, answer_limit: int) -> None:
    """The whole is prompt + response; the response is a prefix of answer + end; limits hold; cutting is maximal."""
    settings = {"max_prompt_tokens": limit + 40, "max_response_tokens": answer_limit}
    turns = [text for text in contents for _ in range(2)]
    chat = ChatFormat(chatml, data_config(loss_on="all", **settings))
    try:
        example = chat.encode(record(*turns))
    except BadRow:
        without = ChatFormat(chatml, data_config()).encode(record(*turns[:-2], "", "a"))
        assert len(without.prompt_ids) > limit + 40
        return
    full = [*chatml(turns[-1])["input_ids"], IM_END]
    assert example.response_ids == full[:answer_limit]
    assert example.truncated == (len(full) > answer_limit)
    assert 1 <= len(example.prompt_ids) <= limit + 40
    assert len(example.prompt_loss_mask or []) == len(example.prompt_ids)
    assert chat.decode(example.prompt_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert trained(chat, example) == "".join(t + "<|im_end|>" for t in turns[1:-1:2]) + chat.decode(
        example.response_ids
    )
    if example.prompt_truncated:
        cut = chat.decode(example.prompt_ids).split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
        assert turns[-2].startswith(cut)
        longer = ChatFormat(chatml, data_config()).encode(record(*turns[:-2], turns[-2][: len(cut) + 1], "a"))
        assert len(longer.prompt_ids) > limit + 40


def test_fingerprint_follows_template_and_stops(chatml: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(CHATML + " ")
    formats = [
        ChatFormat(chatml, data_config()),
        ChatFormat(chatml, data_config(), [5]),
        ChatFormat(chatml, data_config(chat_template=str(tmp_path / "t.jinja"))),
    ]
    assert len({chat.fingerprint() for chat in formats}) == 3
    assert formats[0].fingerprint() == ChatFormat(chatml, data_config()).fingerprint()


def test_a_token_without_an_embedding_is_named_and_one_that_no_text_has_does_no_harm(chatml):
    beyond, tokenizer = len(chatml), copy.deepcopy(chatml)
    tokenizer.add_tokens(["<|mark|>", "[PAD]"], special_tokens=True)
    chat = ChatFormat(tokenizer, data_config(), embedding_rows=beyond)
    assert chat.encode(record("hi", "yo")).response_ids[-1] == IM_END
    for turns in (("hi", "a <|mark|>"), ("<|mark|>", "yo")):
        with pytest.raises(BadRow, match=rf"'<\|mark\|>' \({beyond}\) has no row in the model's embedding"):
            chat.encode(record(*turns))
    assert "<|mark|>" in chat.beyond_embedding(chat.correction_ids("Mind <|mark|>."))
    assert max(chat.banned_ids(beyond)) < beyond
    for rows in (None, beyond + 2):  # nobody looks tokens up; the model has a row for each
        assert ChatFormat(tokenizer, data_config(), embedding_rows=rows).encode(record("hi", "<|mark|>")).response_ids
