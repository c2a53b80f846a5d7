"""Families that can and cannot be trained, told from transformers' own default configurations."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, GPT2Config, LlamaConfig

from ssgen_ds.errors import UserError
from ssgen_ds.modeling.families import check_family, check_packing

WORKING = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "olmo",
    "mixtral",
    "falcon",
]


@pytest.mark.parametrize("family", WORKING)
def test_decoders_pass(family):
    check_family(AutoConfig.for_model(family), uses_selfgen=True)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("bert", "encoder"),
        ("roberta", "encoder"),
        ("gemma3", "images or audio"),
        ("llama4", "images or audio"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_for_every_method(family, reason):
    for uses_selfgen in (False, True):
        with pytest.raises(UserError, match=reason) as error:
            check_family(AutoConfig.for_model(family), uses_selfgen)
        assert f"type {family} " in str(error.value)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        *(
            (family, "recurrent state")
            for family in ("mamba", "mamba2", "rwkv", "jamba", "falcon_h1", "bamba", "zamba")
        ),
        *((family, "recurrent state") for family in ("qwen3_next", "recurrent_gemma", "lfm2", "nemotron_h")),
        ("bloom", "ALiBi"),
        ("mpt", "ALiBi"),
        ("llama4_text", "chunked_attention"),
        ("deepseek_v4", "compressed_sparse_attention"),
    ],
)
def test_what_the_sampler_cannot_run_is_refused_for_selfgen_only(family, reason):
    config = AutoConfig.for_model(family)
    check_family(config, uses_selfgen=False)
    with pytest.raises(UserError, match=reason) as error:
        check_family(config, uses_selfgen=True)
    assert "method.name=sft works" in str(error.value)


def test_falcon_is_refused_only_with_alibi():
    with pytest.raises(UserError, match="ALiBi"):
        check_family(AutoConfig.for_model("falcon", alibi=True), uses_selfgen=True)


def test_an_unknown_family_is_judged_by_its_layers():
    config = LlamaConfig()
    config.model_type = "brand_new"
    config.layer_types = ["full_attention", "conv"]
    with pytest.raises(UserError, match=r"recurrent state \(layers: conv\)"):
        check_family(config, uses_selfgen=True)


def test_a_decoder_made_of_an_encoder_passes():
    check_family(AutoConfig.for_model("bert", is_decoder=True), uses_selfgen=False)
    check_family(GPT2Config(), uses_selfgen=False)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox", "cohere", "mixtral"])
def test_families_whose_attention_can_be_replaced_pack(family):
    check_packing(AutoConfig.for_model(family))


@pytest.mark.parametrize("family", ["bloom", "gpt_neo", "gptj", "falcon", "mpt"])
def test_an_attention_of_its_own_is_refused_for_packing_before_weights_load(family):
    with pytest.raises(UserError, match=rf"^data.packing: models of type {family} cannot .*; set data.packing=false$"):
        check_packing(AutoConfig.for_model(family))
