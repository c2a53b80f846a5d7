"""What is gathered and let go, on partitions that are pretended: no process group, no DeepSpeed."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace

import pytest
import torch

from ssgen_ds.modeling.shards import Shards
from tests.support.tiny_models import tiny_model


class Status(Enum):
    NOT_AVAILABLE = 0
    AVAILABLE = 1


def partition(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter what ZeRO-3 would; the data stay, so that a forward works."""

    def gather(parameters: list[torch.nn.Parameter]) -> SimpleNamespace:
        def wait() -> None:
            for parameter in parameters:
                parameter.ds_status = Status.AVAILABLE

        return SimpleNamespace(wait=wait)

    def let_go(parameter: torch.nn.Parameter) -> None:
        parameter.ds_status = Status.NOT_AVAILABLE

    for parameter in model.parameters():
        parameter.ds_status, parameter.ds_numel = Status.NOT_AVAILABLE, parameter.numel()
        parameter.ds_tensor = parameter.detach()
        parameter.ds_secondary_tensor = object()  # gathered by DeepSpeed's own call
        parameter.all_gather_coalesced = gather
        parameter.partition = lambda parameter=parameter: let_go(parameter)
    return model


def whole(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.ds_status is Status.AVAILABLE}


def whole_layers(model: torch.nn.Module) -> set[str]:
    return {name.split(".")[2] for name in whole(model) if ".layers." in name}


def forward(model: torch.nn.Module) -> None:
    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)


@pytest.mark.parametrize("error", [False, True])
def test_gathered_parameters_are_released_also_after_an_error(error):
    model = partition(tiny_model("llama"))
    everything = {name for name, _ in model.named_parameters()}
    with pytest.raises(KeyError) if error else torch.no_grad(), Shards(model, None).gathered():
        assert whole(model) == everything
        forward(model)
        assert whole(model) == everything
        if error:
            raise KeyError
    assert whole(model) == set()


def test_what_another_has_gathered_stays():
    """A parameter that is whole already (it is small, DeepSpeed keeps it) is not this class's to release."""
    model = partition(tiny_model("llama"))
    model.model.norm.weight.ds_status = Status.AVAILABLE
    shards = Shards(model, None)
    with shards.gathered():
        pass
    assert whole(model) == {"model.norm.weight"}
    with shards.sharded():
        forward(model)
    assert whole(model) == {"model.norm.weight"}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_sharded_holds_one_layer_at_a_time_and_nothing_afterwards(family):
    model = partition(tiny_model(family))
    seen, hooks = [], len(model._forward_hooks)
    handles = [
        layer.mlp.register_forward_hook(lambda *_: seen.append(whole_layers(model))) for layer in model.model.layers
    ]
    shards = Shards(model, None)
    with torch.no_grad(), shards.sharded():
        seen.clear()  # it has learnt the order from a forward of its own
        for _ in range(2):
            forward(model)
            assert whole(model) == set()
        shards.take_part()
        assert whole(model) == set()
        failing = model.model.layers[1].mlp.register_forward_hook(_fail)
        with pytest.raises(KeyError):
            forward(model)
        assert whole(model) == set()
        failing.remove()
    assert seen == [{"0"}, {"1"}] * 3
    assert len(model._forward_hooks) == hooks
    for handle in handles:
        handle.remove()


def _fail(*_) -> None:
    raise KeyError
