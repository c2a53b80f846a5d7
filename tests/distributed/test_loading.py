"""ZeRO-3 loading, training and saving on two gloo ranks."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled

from ssgen_ds.errors import UserError
from ssgen_ds.modeling.adapters import apply_adapter, param_groups
from ssgen_ds.modeling.export import save_model
from ssgen_ds.modeling.load import load_model, load_tokenizer
from ssgen_ds.recipe.schema import AdapterConfig, ModelConfig
from tests.support.ranks import ranks
from tests.support.tiny_models import FAMILIES, save_tiny_model

LORA = AdapterConfig(kind="lora", rank=4, alpha=8)
IDS = torch.arange(3, 23)[None]


def ds_config(bfloat16: bool = False) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def load(path: Path, adapter: AdapterConfig | None = None, **more: Any) -> torch.nn.Module:
    """A model whose parameters are partitioned, with room for an adapter."""
    config = ModelConfig(path=str(path), **more)
    return load_model(config, adapter or AdapterConfig(), ds_config(config.dtype == "bfloat16"), device="cpu")


def start(model: torch.nn.Module, lr: float, bfloat16: bool = False) -> Any:
    optimizer = torch.optim.AdamW(param_groups(model, 0.0), lr=lr)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(bfloat16))[0]


def train(engine: Any, ids: torch.Tensor, steps: int) -> list[float]:
    """`steps` updates on one sequence; the loss before each, and after the last."""
    losses = []
    engine.train()
    for _ in range(steps):
        loss = engine(ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.eval()
    with torch.no_grad():
        losses.append(engine(ids, labels=ids, use_cache=False).loss.item())
    return losses


def logits_of(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **more).logits


def whole(path: Path) -> torch.nn.Module:
    """The model as transformers loads it in one process."""
    return AutoModelForCausalLM.from_pretrained(path)


# -- every family ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(world, folder) -> Iterator[Path]:
    """A folder with a tiny model of each family, and a cache of its own for converted checkpoints."""
    models = folder / "loading"
    if world.is_main:
        for family in FAMILIES:
            save_tiny_model(family, models / family)
    world.barrier()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSGEN_CACHE", str(models / "cache"))
        yield models


@dataclass(frozen=True)
class Loaded:
    """What this rank saw of a model."""

    held: int  # elements of its partitions
    placeholders: int  # elements of the parameters themselves
    is_config_alive: bool  # transformers sees DeepSpeed's configuration
    is_streamed: bool
    logits: torch.Tensor
    saved: Path


@pytest.fixture(scope="module")
def loaded(world, models) -> Callable[[str], Loaded]:
    """Loads a family once, and saves it."""

    @functools.cache
    def load_family(family: str) -> Loaded:
        config = ModelConfig(path=str(models / family))
        model = load(models / family)
        alive = is_deepspeed_zero3_enabled()
        held = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
        placeholders = sum(parameter.numel() for parameter in model.parameters())
        saved = models / "saved" / family
        save_model(model, load_tokenizer(config), saved, config.path, is_main=world.is_main)
        engine = start(model, 1e-3)
        engine.eval()
        logits = logits_of(engine, use_cache=False)
        streamed = not hasattr(model, "_weight_conversions")
        engine.destroy()
        world.barrier()  # rank 0 has saved it
        return Loaded(held, placeholders, alive, streamed, logits, saved)

    return load_family


@ranks(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_partitions_hold_exactly_the_checkpoint(models, loaded, family):
    original, saved = whole(models / family), whole(loaded(family).saved)
    assert saved.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name
    assert saved.config.use_cache is True


@ranks(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_holds_its_share_only(models, loaded, family):
    parameters = list(whole(models / family).parameters())
    elements = sum(parameter.numel() for parameter in parameters)
    padding = len(parameters)  # an odd parameter is padded by one element
    assert elements / 2 <= loaded(family).held <= elements / 2 + padding
    assert loaded(family).placeholders == 0


@ranks(2)
def test_every_family_is_streamed(models, loaded):
    """None through transformers: Mixtral, whose experts are stored one by one, and GPT-NeoX are converted first."""
    assert all(loaded(family).is_streamed for family in FAMILIES)
    converted = {name.rpartition("-")[0] for name in os.listdir(models / "cache")}
    assert converted.intersection(FAMILIES) == {"mixtral", "gpt_neox"}


@ranks(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_one_process(models, loaded, family):
    assert torch.allclose(loaded(family).logits, logits_of(whole(models / family)), atol=1e-5)


@ranks(2)
def test_nothing_sees_a_deepspeed_configuration_after_loading(loaded):
    assert all(not loaded(family).is_config_alive for family in FAMILIES)


# -- training ----------------------------------------------------------------------------------------------------------


@ranks(2)
def test_experts_train_when_the_ranks_route_differently(world, models):
    """Ranks see different tokens, and so use different experts (one of four for each token)."""
    model = load(models / "mixtral")
    routed: set[int] = set()
    for module in model.modules():
        if type(module).__name__ == "MixtralTopKRouter":
            module.register_forward_hook(lambda _, __, out: routed.update(out[2].flatten().tolist()))
    engine = start(model, 1e-2)
    train(engine, torch.full((1, 4), 5 + 40 * world.rank), 1)
    first, second = world.gather(sorted(routed))
    assert first != second
    losses = train(engine, IDS + world.rank, 4)
    engine.destroy()
    assert losses[-1] < losses[1]


@dataclass(frozen=True)
class Adapted:
    """An adapter that was trained and saved, and then loaded and trained again."""

    folder: Path
    losses: list[float]
    logits: torch.Tensor  # after the training
    resumed_loss: float


@pytest.fixture(scope="module")
def adapted(world, models) -> Adapted:
    config, out = ModelConfig(path=str(models / "llama")), models / "adapter"
    engine = start(apply_adapter(load(models / "llama", LORA), LORA, None, seed=0), 1e-2)
    losses = train(engine, IDS, 4)
    logits = logits_of(engine, use_cache=False)
    save_model(engine.module, load_tokenizer(config), out, config.path, is_main=world.is_main)
    engine.destroy()
    world.barrier()
    engine = start(apply_adapter(load(models / "llama", LORA), LORA, str(out), seed=1), 1e-2)
    resumed = train(engine, IDS, 1)
    engine.destroy()
    return Adapted(out, losses, logits, resumed[0])


@ranks(2)
def test_a_trained_adapter_loads_with_peft_alone(models, adapted):
    found = logits_of(AutoPeftModelForCausalLM.from_pretrained(adapted.folder).eval())
    assert torch.allclose(found, adapted.logits, atol=1e-5)
    assert (logits_of(whole(models / "llama")) - adapted.logits).abs().max() > 1e-3
    config = json.loads((adapted.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models / "llama")


@ranks(2)
def test_adapter_training_goes_on_from_the_saved_one(adapted):
    assert adapted.resumed_loss == pytest.approx(adapted.losses[-1], abs=1e-5)
    assert adapted.losses[-1] < adapted.losses[0]


@ranks(2)
def test_bfloat16_adapters_train_under_gradient_checkpointing(models):
    model = load(models / "llama", LORA, dtype="bfloat16", gradient_checkpointing=True)
    model = apply_adapter(model, LORA, None, seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    engine = start(model, 1e-2, bfloat16=True)
    losses = train(engine, IDS, 3)
    engine.destroy()
    assert losses[-1] < losses[0]


# -- checkpoints that do not fit ---------------------------------------------------------------------------------------


@ranks(2)
def test_a_broken_checkpoint_is_an_error_on_every_rank(world, models):
    """Rank 0 alone reads weights, so rank 0 alone can see that they are damaged."""
    broken = models / "broken"
    if world.is_main:
        broken.mkdir()
        (broken / "config.json").write_bytes((models / "llama" / "config.json").read_bytes())
        (broken / "model.safetensors").write_bytes(b"damaged")
    world.barrier()
    with pytest.raises(UserError, match=r"model\.path: cannot load"):
        load(broken)


@ranks(2)
def test_tensors_that_are_missing_are_refused_by_name_on_every_rank(world, models):
    if world.is_main:
        save_tiny_model("qwen2", models / "headless")
        file = models / "headless" / "model.safetensors"
        state = load_file(file)
        del state["lm_head.weight"]
        save_file(state, file)
    world.barrier()
    with pytest.raises(UserError, match=r"missing, and would be random: lm_head\.weight"):
        load(models / "headless")


@ranks(2)
def test_a_head_of_its_own_is_kept_though_the_configuration_ties_it(world, models):
    path = models / "two-heads"
    if world.is_main:
        save_tiny_model("llama", path)  # tied by its configuration
        state = load_file(path / "model.safetensors")
        head = state["model.embed_tokens.weight"] * 2
        save_file({**state, "lm_head.weight": head}, path / "model.safetensors")
    world.barrier()
    engine = start(load(path), 1e-3)
    engine.eval()
    found = logits_of(engine, use_cache=False)
    assert engine.module.config.tie_word_embeddings is False
    engine.destroy()
    torch.testing.assert_close(found, logits_of(whole(path)), atol=1e-5, rtol=1e-5)


@ranks(2)
def test_parameter_groups_are_told_by_true_shapes(models):
    sizes = [len(group["params"]) for group in param_groups(load(models / "gpt2"), 0.1)]
    assert sizes == [10, 18]  # GPT-2: see test_adapters
