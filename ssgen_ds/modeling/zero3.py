"""Loading under ZeRO-3: parameters are partitioned as they are read, so that no rank ever holds the model.

The model is built without weights. Rank 0 then reads one tensor at a time and hands it to DeepSpeed, which broadcasts
it and leaves each rank its share. transformers' own ZeRO-3 loader lets rank 0 hold the whole checkpoint and keeps
more than half a model on the others (2 ranks, 514 MiB of weights: peaks of 977 and 567 MiB against 270 here). A
checkpoint whose tensors it would rename, fuse or stack is converted once, in a process of its own (`convert.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from ssgen_ds.distributed.device_errors import is_device_error
from ssgen_ds.errors import UserError
from ssgen_ds.modeling.convert import convert_checkpoint
from ssgen_ds.run.index_file import WEIGHT_INDEX, shard_names

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

Index = dict[str, tuple[str, tuple[int, ...]]]  # a tensor's name -> its file and shape
Files = dict[str, str]  # a tensor's name -> its file
Places = list[tuple[torch.nn.Module, str, str]]  # module, attribute and full name of each use of a parameter

_SCRATCH_ELEMENTS = 1 << 24


def load_partitioned(
    config: PreTrainedConfig,
    path: str,
    revision: str | None,
    ds_config: dict[str, Any],
    *,
    device: torch.device | str,
    control: dist.ProcessGroup | None,
    settings: BitsAndBytesConfig | None = None,
    **kwargs: Any,
) -> PreTrainedModel | None:
    """A model whose parameters are ZeRO-3 partitions filled from a checkpoint, in eval mode. All ranks call it.

    Args:
        config: the model's configuration, the same on every rank.
        path: a Hugging Face folder or hub id; only rank 0 fetches and reads its weights.
        ds_config: the DeepSpeed configuration, stage 3.
        device: of the partitions and buffers.
        control: a group without a short time limit, on which ranks wait for rank 0 to fetch and convert: that may take
            hours.
        settings: of a base to quantise; rank 0 quantises one weight at a time, so that each rank holds its share of
            the codes and all of their scales (about 1/30 of the codes).
        kwargs: for `AutoModelForCausalLM.from_config` (dtype, attn_implementation, trust_remote_code).

    Returns:
        The model, or None when even the converted checkpoint's tensors are not exactly the model's (missing ones, other
        shapes, some kept in float32): transformers' loader has to do it then.

    Raises:
        UserError: its tensors are not the model's.
        OSError: rank 0 could not get at the checkpoint. Both are raised on every rank.
    """
    import deepspeed

    model = _build(config, settings, **kwargs)
    files = _from_first_rank(lambda: _find_files(model, config, path, revision, **kwargs), control)
    if files is None:
        return None
    if _same_tensor_twice(model, files):
        config.tie_word_embeddings = False
        model = _build(config, settings, **kwargs)

    # DeepSpeed asks this module for its parameters one by one and partitions each before it asks for the next.
    deepspeed.zero.Init(module=_Stream(model, files, device, control), config_dict_or_path=ds_config)
    move_buffers(model, device)
    _fill_buffers(model, files)
    return model.eval()


def _build(config: PreTrainedConfig, settings: BitsAndBytesConfig | None, **kwargs: Any) -> PreTrainedModel:
    """`build_without_weights`, with quantised layers where the base is to be quantised."""
    built = build_without_weights(config, **kwargs)
    if settings is not None:
        from ssgen_ds.modeling.nf4 import replace_linears

        replace_linears(built, settings)
    return built


def _find_files(
    model: PreTrainedModel, config: PreTrainedConfig, path: str, revision: str | None, **kwargs: Any
) -> Files | None:
    """Of the checkpoint as it is, else of the converted one; None where neither agrees with the model."""
    found = _match(model, _read_index(path, revision))
    if found is not None:
        return found
    # It refuses tensors that are not the model's, and writes a head twice only where it is not the embedding.
    converted = _read_index(str(convert_checkpoint(path, revision, kwargs["trust_remote_code"])), None)
    found = _match(model, converted)
    if found is None and config.tie_word_embeddings:
        return _match(_build_untied(config, **kwargs), converted)
    return found


@contextmanager
def transformers_partitions(ds_config: dict[str, Any]) -> Iterator[None]:
    """Inside, transformers' own `from_pretrained` partitions as it loads. Nothing sees the configuration later."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(ds_config)  # transformers holds it by a weak reference only
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def partition_rest(model: torch.nn.Module, ds_config: dict[str, Any]) -> None:
    """Partition what of the model is still whole, such as an adapter: in training `deepspeed.initialize` does it."""
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path=ds_config)


def build_without_weights(config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """The model with parameters on the meta device and real buffers (rotary frequencies are computed when built)."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, **kwargs)
    model.tie_weights()
    return model


def _build_untied(config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    return build_without_weights(untied, **kwargs)


def _same_tensor_twice(model: PreTrainedModel, files: Files) -> bool:
    """Whether the files have a tensor of their own for two names of one parameter: what is tied by the configuration
    is not tied in the checkpoint."""
    names = [name for name in model.state_dict(keep_vars=True) if name in files]
    return len({id(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name in files}) < len(names)


def _from_first_rank(compute: Callable[[], Files | None], control: dist.ProcessGroup | None) -> Files | None:
    """What rank 0 computes, on every rank. Its failure is raised on every rank: none is left waiting."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = compute()
        except UserError as error:
            box[1] = error
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            box[1] = error if is_device_error(error) else OSError(str(error))
    dist.broadcast_object_list(box, src=0, group=control)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _read_index(path: str, revision: str | None) -> Index:
    """The tensors of a folder or hub id with safetensors, from the headers alone; empty when there are none."""
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    index = find(WEIGHT_INDEX)
    names = ["model.safetensors"] if index is None else shard_names(Path(index))
    found: Index = {}
    for name in names:
        file = find(name)
        if file is None:
            return {}
        with safe_open(file, framework="pt") as opened:
            found.update({key: (file, tuple(opened.get_slice(key).get_shape())) for key in opened.keys()})  # noqa: SIM118
    return found


def _match(model: PreTrainedModel, index: Index) -> Files | None:
    """File of every parameter and saved buffer, or None unless checkpoint and model agree exactly."""
    if getattr(model, "_keep_in_fp32_modules_strict", None):
        return None  # these need a dtype of their own
    wanted = model.state_dict(keep_vars=True)
    names_of: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        names_of.setdefault(id(tensor), []).append(name)
    if any(len([name for name in names if name in index]) != 1 for names in names_of.values()):
        return None  # something is missing, or a tied tensor was saved twice
    if any(name not in wanted or tuple(wanted[name].shape) != shape for name, (_, shape) in index.items()):
        return None
    return {name: file for name, (file, _) in index.items()}


def _read(file: str, name: str) -> torch.Tensor:
    """One tensor. The file is opened again each time, so that pages of tensors read before are not kept mapped."""
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


class _Stream(torch.nn.Module):
    """Gives out the model's parameters one by one, each made real, and on rank 0 filled, just before it is given."""

    def __init__(
        self, model: PreTrainedModel, files: Files, device: torch.device | str, control: dist.ProcessGroup | None
    ):
        super().__init__()
        self._device, self._control = device, control
        self._places: dict[int, Places] = {}
        for prefix, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                path = f"{prefix}.{key}" if prefix else key
                self._places.setdefault(id(parameter), []).append((module, key, path))
        self._files = files
        # One buffer to receive into: hundreds of allocations between those that stay would fragment the heap (on
        # Linux by a third of the model). Above its size the system hands out and takes back whole mappings anyway.
        self._scratch: torch.Tensor | None = None

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        # The largest come first, when least else is held: the peak is then the share plus little.
        for places in sorted(self._places.values(), key=lambda one: -getattr(*one[0][:2]).numel()):
            module, key, _ = places[0]
            meta = module._parameters[key]
            assert meta is not None
            real = self._quantized(places, meta) if hasattr(meta, "quant_state") else self._real(places, meta)
            for owner, attribute, _ in places:
                owner._parameters[attribute] = real
            yield real

    def _real(self, places: Places, meta: torch.Tensor) -> torch.nn.Parameter:
        # On the other ranks DeepSpeed broadcasts rank 0's values into what they receive in.
        value = self._values(places, meta.dtype) if dist.get_rank() == 0 else self._receiver(meta)
        return torch.nn.Parameter(value, requires_grad=meta.requires_grad)

    def _quantized(self, places: Places, meta: Any) -> torch.nn.Parameter:
        from ssgen_ds.modeling.nf4 import quantize_and_share

        values = self._values(places, meta.quant_storage) if dist.get_rank() == 0 else None
        return quantize_and_share(values, meta, cast(Any, places[0][0]), self._device, self._control)

    def _values(self, places: Places, dtype: torch.dtype) -> torch.Tensor:
        name = next(path for _, _, path in places if path in self._files)
        return _read(self._files[name], name).to(dtype)

    def _receiver(self, meta: torch.Tensor) -> torch.Tensor:
        if self._scratch is None or self._scratch.dtype != meta.dtype:
            self._scratch = torch.empty(_SCRATCH_ELEMENTS, dtype=meta.dtype)
        if meta.numel() > _SCRATCH_ELEMENTS:
            return torch.empty(meta.shape, dtype=meta.dtype)
        return self._scratch[: meta.numel()].view(meta.shape)


def move_buffers(model: torch.nn.Module, device: torch.device | str) -> None:
    """ZeRO-3 takes parameters to the device and leaves buffers where they were made: on the host, where a model's
    forward would not find them, or would wait for a copy each time."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _fill_buffers(model: PreTrainedModel, files: Files) -> None:
    """Saved buffers. They are broadcast where they are: the default group of GPUs takes nothing from the host."""
    for name, buffer in model.named_buffers():
        if name in files:
            if dist.get_rank() == 0:
                buffer.copy_(_read(files[name], name))
            dist.broadcast(buffer, src=0)
