"""The examples run, and the files of the front of the house can be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from ssgen_ds.recipe.load import load_recipe
from tests.support.tiny_models import tiny_tokenizer


def test_the_fixed_point_has_the_tokens_of_sequential_sampling(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, "examples/fixed_point.py", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout.splitlines()
    assert said[2] == "the same tokens"
    sequential, parallel = (int(word) for word in said[1].replace(",", "").split() if word.isdigit())
    assert sequential == 128 and parallel < 30


@pytest.mark.parametrize("file", ["CITATION.cff", ".pre-commit-config.yaml", ".github/ISSUE_TEMPLATE/bug.yml"])
def test_the_files_for_other_programs_are_yaml(file: str) -> None:
    assert isinstance(yaml.safe_load(Path(file).read_text(encoding="utf-8")), dict)


def test_the_recipe_for_own_data_takes_rows_of_prompt_and_completion() -> None:
    recipe = load_recipe("recipes/own_data.yaml", ["model.path=MODEL", "data.train=FILE"])
    assert recipe.data.columns == {} and recipe.data.prompt is None
