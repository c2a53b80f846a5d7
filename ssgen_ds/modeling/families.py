"""Which model families the trainer can take, decided from the configuration before any weight is read.

Fine-tuning needs a causal language model. Self-generation needs more: a key-value cache that can be cut back to any
position, and token positions that come from `position_ids`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssgen_ds.errors import Problems, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ssgen_ds.recipe.schema import Recipe

ENCODERS = frozenset((
    "albert", "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "deberta", "deberta-v2",
    "distilbert", "electra", "ernie", "megatron-bert", "modernbert", "mpnet", "nomic_bert", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
))  # fmt: skip
# Families whose state is not a list of keys and values, so that it cannot be cut back to an earlier position.
RECURRENT = frozenset((
    "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "hrm_text", "inkling_text",
    "inkling2_text", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h",
    "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "reformer",
    "rwkv", "xlstm", "zamba", "zamba2", "zaya",
))  # fmt: skip
RECURRENT_LAYERS = ("linear", "mamba", "conv", "recurrent", "hybrid", "ssm", "rwkv")
ALIBI = frozenset({"bloom", "mpt"})
# Layer types whose cache can be cut: a plain list of keys and values, whatever the attention mask selects from it.
CUTTABLE_LAYERS = frozenset({"full_attention", "sliding_attention", "attention", "sparse", "dense", "moe", "mlp"})

_WORKS = "Decoder-only transformers such as Llama, Qwen2/3, Mistral, Gemma, GPT-2, GPT-NeoX, OLMo and Mixtral work."


def check_trainable(config: PreTrainedConfig, recipe: Recipe) -> None:
    """Whether the family can be trained as the recipe wants it. Raises UserError with every reason."""
    problems = Problems()
    problems.ask(lambda: check_family(config, recipe.generates))
    if recipe.data.packing:
        problems.ask(lambda: check_packing(config))
    problems.refuse()


def check_family(config: PreTrainedConfig, uses_selfgen: bool) -> None:
    """Refuse what cannot be trained, naming the family, the reason and what would work.

    Args:
        config: from `load_config`.
        uses_selfgen: the run generates with the model (BSS, RAC, `generate`, `evaluate`, `gap`); SFT alone does not.

    Raises:
        UserError: with every reason at once.
    """
    reasons = _not_causal(config) or (_not_cuttable(config) if uses_selfgen else [])
    if reasons:
        raise UserError.from_list(f"model.path: models of type {config.model_type} are not supported here", reasons)


def refuse_quantized(config: PreTrainedConfig, path: str) -> None:
    """Refuse a base whose weights are stored in 8 bits or fewer: it could neither be partitioned nor merged into.

    Raises:
        UserError: naming the method, as config.json has it.
    """
    # What transformers keeps of config.json where it has such an entry; plain models have no such attribute.
    found = vars(config).get("quantization_config") or vars(config.get_text_config()).get("quantization_config")
    if not found:
        return
    settings = found if isinstance(found, dict) else found.to_dict()
    raise UserError(
        f"model.path: {path} is already quantised (config.json, quantization_config: {_method(settings)}). Name the "
        "checkpoint that it was made from; where memory is short, quantization.kind=nf4 quantises that one as it loads"
    )


def _method(settings: dict[str, Any]) -> str:
    """`gptq, 4 bits`, in the words of config.json."""
    method = str(settings.get("quant_method", "unknown method"))
    for key, bits in (("load_in_4bit", 4), ("load_in_8bit", 8), ("bits", settings.get("bits"))):
        if settings.get(key):
            return f"{method}, {bits} bits"
    return method


def check_packing(config: PreTrainedConfig) -> None:
    """Refuse `data.packing` where the attention cannot be replaced, so that packed sequences would see each other.

    Code that comes with a model is judged when it has been loaded, by `loss.check_loss`.
    """
    from transformers import AutoModelForCausalLM

    architecture = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if architecture is not None and not architecture._supports_attention_backend:
        raise UserError(
            f"data.packing: models of type {config.model_type} cannot train on packed sequences: they have an "
            "attention of their own, in which the sequences would see each other; set data.packing=false"
        )


def _not_causal(config: PreTrainedConfig) -> list[str]:
    """Why the model is no causal language model over text alone."""
    # Composite configurations keep their parts in attributes that plain ones do not have.
    parts = vars(config)
    if config.is_encoder_decoder:
        return [f"it is an encoder-decoder: it has no single sequence to train on. {_WORKS}"]
    if config.model_type in ENCODERS and not parts.get("is_decoder", False):
        return [f"it is an encoder: it does not predict the next token. {_WORKS}"]
    if parts.get("vision_config") is not None or parts.get("audio_config") is not None:
        return [
            "it takes images or audio as well as text. Use the text-only model of the same family "
            "(for instance google/gemma-3-1b-it, not gemma-3-4b-it)."
        ]
    return []


def _not_cuttable(config: PreTrainedConfig) -> list[str]:
    """Why the model cannot generate with the sampler."""
    layers = set(vars(config).get("layer_types") or [])
    recurrent = sorted(layer for layer in layers if any(word in layer for word in RECURRENT_LAYERS))
    if config.model_type in RECURRENT or recurrent:
        found = f" (layers: {', '.join(recurrent)})" if recurrent else ""
        return [
            f"it keeps a recurrent state{found}, which cannot be cut back to an earlier position as the sampler needs. "
            f"method.name=sft works with it. {_WORKS}"
        ]
    if config.model_type in ALIBI or vars(config).get("alibi"):
        return [
            "it uses ALiBi, which takes positions from the mask and not from position_ids. "
            f"method.name=sft works with it. {_WORKS}"
        ]
    other = sorted(layers - CUTTABLE_LAYERS)
    if other:
        return [
            f"its cache for {', '.join(other)} layers cannot be cut back to an earlier position as the sampler needs. "
            f"method.name=sft works with it. {_WORKS}"
        ]
    return []
