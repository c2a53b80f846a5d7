"""GGUF conversion on a file written here: once, exactly, safely from several processes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssgen_ds.errors import UserError
from ssgen_ds.modeling import gguf as conversion
from ssgen_ds.modeling.gguf import convert_gguf
from tests.support.tiny_models import tiny_model

HEADS, KV_HEADS = 4, 2


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSGEN_CACHE", str(tmp_path / "cache"))


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp stores the two halves of a rotary pair side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _write_gguf(path, model) -> None:
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(chr(33 + i) for i in range(config.vocab_size - 4)), "!!"])
    writer.add_token_types([3, 3, 3, *([1] * (config.vocab_size - 3))])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = _interleaved(values, HEADS if "q_proj" in name else KV_HEADS)
        target = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(target, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_converted_weights_are_exact_and_the_folder_is_reused(tmp_path, caplog):
    model = tiny_model("llama", vocab_size=90)
    file = tmp_path / "tiny.gguf"
    _write_gguf(file, model)
    with caplog.at_level("INFO", logger=conversion.__name__):
        folder = convert_gguf(file)
    assert "F32 weights written as float32" in caplog.text
    converted = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.state_dict()
    assert converted.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 2
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert convert_gguf(file) == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_a_converted_file_is_not_parsed_again(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    _write_gguf(file, tiny_model("llama", vocab_size=90))
    folder = convert_gguf(file)

    def refuse(path) -> None:
        raise AssertionError(f"{path} was parsed again")

    monkeypatch.setattr("gguf.GGUFReader", refuse)
    assert convert_gguf(file) == folder


def test_another_content_is_another_folder(tmp_path):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    before = conversion._fingerprint(file)
    file.write_bytes(b"GGUF" + bytes(99) + b"x")
    assert conversion._fingerprint(file) != before


def test_every_process_gets_the_error_and_none_waits(tmp_path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"not a GGUF file at all" * 10)
    code = f"""
from pathlib import Path
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.gguf import convert_gguf
try:
    convert_gguf(Path({str(file)!r}))
except UserError as error:
    print("refused:", error)
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=120)
        assert "is not a GGUF file" in out
    assert not list((tmp_path / "cache").glob("broken-*[!k]")), "no half-made folder is left"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.gguf: no such file"):
        convert_gguf(tmp_path / "nowhere.gguf")
