"""What a written model says besides its weights, and that a merged one is what base and adapter are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ssgen_ds.errors import NotPublished, UserError
from ssgen_ds.inference.model_source import resolve_model_source
from ssgen_ds.inference.session import InferenceSettings, data_config, trained_data
from ssgen_ds.modeling import merge
from ssgen_ds.modeling.adapters import apply_adapter
from ssgen_ds.modeling.export import save_model
from ssgen_ds.modeling.load import load_model, load_tokenizer
from ssgen_ds.modeling.merge import merge_adapter
from ssgen_ds.modeling.model_folder import Notes, TrainedAs, read_notes
from ssgen_ds.recipe.schema import AdapterConfig, ModelConfig
from tests.support.tiny_models import save_tiny_model

IDS = (torch.arange(40) * 7 % 96)[None]
END = 5  # what the turns of the template end with; the source's EOS is 2
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
NOTES = Notes(
    system="Be brief.",
    correction_cue="Again, better:",
    max_prompt_tokens=77,
    chat_template_kwargs={"enable_thinking": False},
)
TRAINED = TrainedAs(turn_end_id=END, chat_template=TEMPLATE, notes=NOTES)
NONE = AdapterConfig()
LORA = AdapterConfig(kind="lora", rank=4, alpha=8)


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**read(file), **changes}), encoding="utf-8")


def save(source: Path, out: Path, adapter: AdapterConfig = NONE, trained: TrainedAs | None = TRAINED):
    """The model of `source`, or a trained-looking adapter on it, as a run writes it."""
    config = ModelConfig(path=str(source), trust_remote_code=trained is not None and trained.carries_code)
    model = load_model(config, adapter, {}, device="cpu")
    if adapter.kind == "lora":
        model = apply_adapter(model, adapter, None, seed=0)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name or "embedding_A" in name:
                    value.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    save_model(model, load_tokenizer(config), out, str(source), is_main=True, trained=trained)
    return model.eval()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model as published for transformers 4, with stop ids and a rope of its own."""
    save_tiny_model("llama", tmp_path / "source", rope_theta=1e6)
    config = read(tmp_path / "source" / "config.json")
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "top_k": 3}))
    edit(tmp_path / "source" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", own_words=["a"])
    return tmp_path / "source"


@pytest.mark.parametrize("adapter", [NONE, LORA], ids=["full", "adapter"])
def test_it_stops_where_it_was_trained_to_and_carries_template_and_notes(source, tmp_path, adapter):
    out = tmp_path / "out"
    save(source, out, adapter)
    generation = GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == [END, 2, 7] and generation.top_k == 3
    assert load_tokenizer(ModelConfig(path=str(source))).pad_token_id == 2, "padding stands in for EOS in training only"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token is None and tokenizer.chat_template == TEMPLATE
    assert read(out / "tokenizer_config.json") == {
        **read(source / "tokenizer_config.json"),
        "chat_template": TEMPLATE,
    }
    assert read_notes(str(out)) == NOTES
    model_source = resolve_model_source(str(out))
    data = data_config(InferenceSettings(str(out), "b.jsonl"), trained_data(model_source))
    assert (data.system, data.max_prompt_tokens) == ("Be brief.", 77)
    assert data.chat_template_kwargs == {"enable_thinking": False}


def test_a_template_that_was_not_replaced_stays_the_sources(source, tmp_path):
    edit(source / "tokenizer_config.json", chat_template="{{ 'own' }}")
    save(source, tmp_path / "out", trained=TrainedAs(END, None, NOTES))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_transformers_4_finds_its_settings_where_it_looks(source, tmp_path):
    model = save(source, tmp_path / "out")
    config = read(tmp_path / "out" / "config.json")
    assert config["rope_theta"] == 1e6 and "rope_parameters" not in config and config["torch_dtype"] == "float32"
    assert config["tie_word_embeddings"] is True and config["architectures"] == ["LlamaForCausalLM"]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_what_transformers_5_wrote_gets_what_4_needs(tmp_path):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    save_tiny_model("llama", tmp_path / "source", rope_parameters=scaled)
    edit(tmp_path / "source" / "tokenizer_config.json", extra_special_tokens=["<s>"])
    model = save(tmp_path / "source", tmp_path / "out")
    config = read(tmp_path / "out" / "config.json")
    assert config["rope_theta"] == 5e5 and config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    tokenizer = read(tmp_path / "out" / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["additional_special_tokens"] == ["<s>"] and "extra_special_tokens" not in tokenizer
    assert AutoTokenizer.from_pretrained(tmp_path / "out").extra_special_tokens == ["<s>"]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_an_adapter_names_its_base_by_its_full_path(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("source"), tmp_path / "out", LORA)
    assert read(tmp_path / "out" / "adapter_config.json")["base_model_name_or_path"] == os.path.abspath("source")


@pytest.mark.parametrize("text", ["no json", "[]", '{"system": 3}', '{"format": 2}', '{"unknown": 1}'])
def test_damaged_notes_are_named(tmp_path, text):
    save_tiny_model("llama", tmp_path)
    (tmp_path / "ssgen.json").write_text(text)
    with pytest.raises(UserError, match=r"ssgen\.json: "):
        resolve_model_source(str(tmp_path))


OWN = """from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_goes_with_the_model_only_where_it_was_allowed_to_run(source, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (source / "modeling_own.py").write_text(OWN)
    save(source, tmp_path / "closed")
    assert not (tmp_path / "closed" / "modeling_own.py").exists()
    edit(source / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=auto_map)
    save(source, tmp_path / "open", trained=TrainedAs(END, None, NOTES, carries_code=True))
    assert (tmp_path / "open" / "modeling_own.py").read_text() == OWN
    assert read(tmp_path / "open" / "config.json")["auto_map"] == auto_map
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "open", trust_remote_code=True)
    assert type(again).__name__ == "OwnForCausalLM"


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"], ["q_proj", "embed_tokens", "lm_head"]])
def test_an_adapter_of_tied_ends_is_merged_into_two_matrices(source, tmp_path, targets):
    adapted = save(source, tmp_path / "adapter", LORA.model_copy(update={"target_modules": targets}))
    base = ModelConfig(path=str(source))
    difference = merge_adapter(base, str(tmp_path / "adapter"), tmp_path / "merged", torch.float32, trained=TRAINED)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert read(tmp_path / "merged" / "config.json")["tie_word_embeddings"] is False
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [END, 2, 7]
    with torch.no_grad():
        wanted = adapted(IDS).logits
        assert (merged(IDS).logits - wanted).abs().max() < 1e-4 and difference < 1e-4
        assert (load_model(base, AdapterConfig(), {}, device="cpu")(IDS).logits - wanted).abs().max() > 0.1


def test_a_merge_that_is_off_by_more_than_rounding_publishes_nothing(source, tmp_path, monkeypatch):
    save(source, tmp_path / "adapter", LORA)
    monkeypatch.setitem(merge.ROUNDING, "float32", 0.0)
    with pytest.raises(NotPublished, match="logits differ from those of base and adapter by up to"):
        merge_adapter(ModelConfig(path=str(source)), str(tmp_path / "adapter"), tmp_path / "m", torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "source"]
