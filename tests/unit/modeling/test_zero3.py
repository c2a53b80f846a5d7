"""What loading under ZeRO-3 does besides partitioning: where buffers go, and the group on which ranks wait."""

from __future__ import annotations

from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist

from ssgen_ds.errors import UserError
from ssgen_ds.modeling import load, zero3
from ssgen_ds.modeling.nf4 import Nf4Linear, on_host, quantize_and_share
from tests.support.tiny_models import tiny_model

CONTROL = object()  # stands for the control group, whose limit is far away


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list, object]]:
    """What rank 0 broadcasts as objects, each with its group."""
    found: list[tuple[list, object]] = []
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box, src, group=None: found.append((box, group)))
    return found


def test_buffers_go_to_the_device_and_parameters_stay() -> None:
    """The meta device stands for a GPU. DeepSpeed has put the parameters where they belong."""
    model = tiny_model("llama")
    model.register_buffer("saved", torch.ones(2))
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    zero3.move_buffers(model, "meta")
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_ranks_wait_for_rank_0_on_the_control_group(sent) -> None:
    """The default group's limit is half an hour, a download or conversion may take longer."""
    assert zero3._from_first_rank(lambda: {"a": "file"}, CONTROL) == {"a": "file"}
    assert [group for _, group in sent] == [CONTROL]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError),
        (RuntimeError("broken header"), OSError),
        (UserError("model.path: wrong"), UserError),
    ],
)
def test_the_failure_of_rank_0_is_raised_after_the_others_have_it(sent, error, raised) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(raised, match=str(error)):
        zero3._from_first_rank(fail, CONTROL)
    assert len(sent) == 1


def test_quantisation_states_cross_on_the_host_by_the_control_group(sent) -> None:
    layer = Nf4Linear(64, 32, bias=False, quant_type="nf4")
    layer.source_cls = torch.nn.Linear
    parameter = quantize_and_share(torch.randn(32, 64), layer.weight, layer, "cpu", CONTROL)
    assert isinstance(parameter, bnb.nn.Params4bit)
    ((box, group),) = sent
    assert group is CONTROL
    _, state = box[0]
    tensors = [value for value in state.values() if torch.is_tensor(value)]
    assert tensors and {tensor.device.type for tensor in tensors} == {"cpu"}


def test_a_state_is_brought_to_the_host() -> None:
    """A tensor of the first GPU would be made again on that GPU by every rank that unpickles it."""
    moved: list[str] = []

    class OnGpu(torch.Tensor):
        def cpu(self) -> str:  # type: ignore[override]
            moved.append("cpu")
            return "on the host"

    assert on_host({"absmax": torch.zeros(2).as_subclass(OnGpu), "shape": (2, 3)}) == {
        "absmax": "on the host",
        "shape": (2, 3),
    }
    assert moved == ["cpu"]


@pytest.mark.parametrize(("device", "expected"), [("cpu", {}), ("cuda:1", {"device_map": {"": "cuda:1"}})])
def test_outside_zero3_weights_are_read_straight_to_a_gpu(device, expected, monkeypatch) -> None:
    """Else each rank of a node holds the whole model on the host first."""
    given: dict[str, object] = {}
    monkeypatch.setattr(load, "load_fitting", lambda path, shown, **kwargs: given.update(kwargs))
    load._load_whole(SimpleNamespace(path="p", revision=None), "p", {}, None, device)
    assert {key: value for key, value in given.items() if key == "device_map"} == expected
