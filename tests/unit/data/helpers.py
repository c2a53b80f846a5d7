"""What the data tests share: chat templates, tiny real tokenizers, recipes' data sections."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssgen_ds.data.readers import BadRow, read_files
from ssgen_ds.recipe.schema import DataConfig, SourceConfig

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Shows what the model said only in the last turn, as templates that drop earlier reasoning do.
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.index < loop.length - 1 %}<|im_start|>(gone)"
    "<|im_end|>{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


def byte_tokenizer(specials: list[str], template: str | None = None, **named: str) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0-255), then `specials`; `named` are eos_token, bos_token, pad_token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = template
    return tokenizer


def data_config(*sources: str | Path | SourceConfig, **settings: object) -> DataConfig:
    entries = [s if isinstance(s, SourceConfig) else SourceConfig(path=str(s)) for s in sources]
    return DataConfig(train=entries or [SourceConfig(path="unused.jsonl")], **settings)


def rows(file: Path) -> list[tuple[str, object]]:
    """(place within the folder, row or the text of what is wrong)."""
    read = [(where.removeprefix(f"{file.parent}/"), row) for where, row in read_files([file])]
    return [(where, str(row) if isinstance(row, BadRow) else row) for where, row in read]
