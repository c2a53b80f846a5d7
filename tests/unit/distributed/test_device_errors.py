"""Errors of a device are told from those of a model."""

from __future__ import annotations

import pytest
import torch

from ssgen_ds.distributed.device_errors import is_device_error, is_out_of_memory
from ssgen_ds.modeling import adapters, loss, merge
from ssgen_ds.modeling.cache_check import check_cache
from ssgen_ds.modeling.cached import CachedCausalLM
from ssgen_ds.modeling.load import load_model
from ssgen_ds.modeling.loss import check_loss
from ssgen_ds.recipe.schema import AdapterConfig, ModelConfig
from tests.support.tiny_models import save_tiny_model, tiny_model

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.96 GiB.")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    ("error", "of_device", "of_memory"),
    [
        (OUT_OF_MEMORY, True, True),
        (CUBLAS, True, False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True, False),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1970, unhandled system error"), True, False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True, True),
        (RuntimeError("The size of tensor a (7) must match the size of tensor b (12)"), False, False),
        (ValueError("CUDA error is a word in a chat template"), False, False),
        (TypeError("unexpected keyword argument"), False, False),
    ],
)
def test_by_kind(error: BaseException, of_device: bool, of_memory: bool) -> None:
    assert (is_device_error(error), is_out_of_memory(error)) == (of_device, of_memory)


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, CUBLAS], ids=["memory", "cublas"])
def test_checks_and_loading_let_them_pass(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Otherwise a full GPU would be said to be a model of an unknown kind, or a damaged file."""

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    import peft
    import transformers

    model = tiny_model("llama")
    save_tiny_model("llama", tmp_path / "llama")
    monkeypatch.setattr(loss, "token_loss", fail)
    monkeypatch.setattr(CachedCausalLM, "__call__", fail)
    monkeypatch.setattr(peft.PeftModel, "from_pretrained", fail)
    monkeypatch.setattr(adapters, "read_adapter_config", lambda path: None)
    monkeypatch.setattr(adapters, "refuse_damaged_adapter", lambda path: None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    config = ModelConfig(path=str(tmp_path / "llama"))
    for work in (
        lambda: check_loss(model, True),
        lambda: check_cache(model),
        lambda: adapters._load_adapter(model, "adapter"),
        lambda: merge._with_adapter(model, "adapter", "base"),
        lambda: load_model(config, AdapterConfig(), {}, device="cpu"),
    ):
        with pytest.raises(type(error)) as caught:
            work()
        assert caught.value is error
