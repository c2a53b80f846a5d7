"""Bytes on one rank, by phase and by what they are for. Pure arithmetic on counts; the rules are DeepSpeed 0.19's.

Symbols: P parameters of the base, T trained ones, Q quantised ones, c bytes of the dtype to compute in, W ranks.

    weights     (P - Q + T_lora) c, and of nf4 half a byte a weight plus scales; at ZeRO-3 a W-th, small ones whole
    masters     4 T: float32 weights that the optimizer updates; at ZeRO 1-3 always, a W-th; at ZeRO 0 only in bfloat16
    moments     8 T of AdamW, 2.03 T in 8 bits; at ZeRO 1-3 a W-th
    gradients   c T, or 4 T where the DeepSpeed file sums them in float32; at ZeRO-2 a W-th and a bucket on the way, at
                ZeRO-3 a W-th and a bucket; in bfloat16 without ZeRO also 4 T of float32 sums
    gathered    at ZeRO-3 what is whole at a time: up to `stage3_max_live_parameters`
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ssgen_ds.modeling.loss import CHUNK_LOGITS
from ssgen_ds.plan.sizes import Sizes
from ssgen_ds.sampler.draw import draws_at_once
from ssgen_ds.sampler.limits import (
    CACHE_SHARE,
    MOST_ROWS_CPU,
    RECORDED_SHARE,
    USABLE,
    call_bytes_per_token,
    call_limit,
    rows_that_fit,
)
from ssgen_ds.sampler.requests import CallLimit

_NO_CALL = CallLimit(0, 0)
PHASES = ("load", "generate", "train", "optimizer")


@dataclass(frozen=True)
class Setting:
    """The facts of the recipe, the DeepSpeed file and the hardware that decide the memory."""

    stage: int
    ranks: int
    element: int  # bytes of the dtype to compute in
    is_mixed: bool  # DeepSpeed keeps float32 masters because the model is in bfloat16
    adapter_element: int
    gradient_element: int  # bytes of the dtype in which gradients are summed over micro batches
    nf4: bool
    double: bool
    moments: float  # bytes per trained parameter
    offload_optimizer: bool
    offload_param: bool
    checkpointing: bool
    micro_tokens: int  # tokens of the largest micro batch
    accumulates: bool  # whether a step has several micro batches
    labels: int  # label tokens of the largest micro batch
    rows: int  # sequences generated together
    row_tokens: int  # tokens of the longest generated sequence
    strategy: str  # auto, sharded, gathered
    generates: bool
    reduce_bucket: int
    live: int  # elements that ZeRO-3 may hold whole
    memory: float  # bytes of the device; inf when not known
    overhead: float  # bytes that neither torch nor we allocate: the device's context, fragmentation
    is_cpu: bool = False
    recorded_tokens: int = 0  # of a step, whose layers' outputs the sampler may record (`selfgen.reuse`)


@dataclass
class MemoryPlan:
    """Bytes on the rank's device by phase and part, and in host memory."""

    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    strategy: str = "local"
    cache_rows: int = 0
    call: CallLimit = _NO_CALL  # what the largest call of generation feeds and wants

    def peak(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())

    @property
    def highest(self) -> float:
        return max(map(self.peak, self.phases))


def plan_memory(sizes: Sizes, s: Setting) -> MemoryPlan:
    """The parts of every phase. Hand-worked values are in the tests."""
    plan = MemoryPlan()
    weights, whole = _weights(sizes, s)
    shared = s.ranks if s.stage >= 1 else 1
    masters = 4.0 * sizes.trained / shared if s.stage >= 1 or s.is_mixed else 0.0
    moments = s.moments * sizes.trained / shared
    on_host: dict[str, float] = {}
    if s.offload_optimizer:
        on_host |= {"masters": masters, "moments": moments, "gradients": 4.0 * sizes.trained / shared}
        masters = moments = 0.0
    if s.offload_param:
        on_host["weights"] = weights
        weights = 0.0
    plan.host = on_host
    overhead = {"overhead": s.overhead}
    resident = {"weights": weights, "masters": masters, "moments": moments}
    plan.phases["load"] = {"weights": weights, "largest tensor": _largest_tensor(sizes, s), **overhead}
    recorded = _recorded(sizes, s, sum(resident.values()))
    if s.generates:
        parts = _generation(sizes, s, plan, sum(resident.values()), whole)
        plan.phases["generate"] = {**resident, **parts, **recorded, **overhead}
    activations, (gradients, bucket) = _activations(sizes, s), _gradients(sizes, s)
    plan.phases["train"] = {
        **resident,
        # With one micro batch, gradients take the memory of the activations that the backward frees.
        "gradients": gradients if s.accumulates else max(0.0, gradients - activations),
        "bucket": bucket,
        "activations": activations,
        "logits": max(_logits(sizes, s), _transient(sizes, s)),
        "gathered": _live(sizes, s, whole),
        **recorded,
        **overhead,
    }
    step = 0.0 if s.offload_optimizer else _step_bytes(sizes, s, shared)
    gradients = 0.0 if s.offload_optimizer else _gradients_at_step(sizes, s)
    plan.phases["optimizer"] = {**resident, "gradients": gradients, "update": step, **overhead}
    return plan


def _weights(sizes: Sizes, s: Setting) -> tuple[float, float]:
    """Bytes of weights on one rank, and of the whole model."""
    quantised = sizes.quantizable if s.nf4 else 0
    scales = quantised * (1 / 64 + 4 / (64 * 256) if s.double else 4 / 64)
    plain = (sizes.parameters - quantised) * s.element + sizes.adapter * s.adapter_element
    whole = plain + quantised * 0.5 + scales
    if s.stage < 3:
        return whole, whole
    small = sizes.small * s.element
    return (whole - scales - small) / s.ranks + scales + small, whole


def _largest_tensor(sizes: Sizes, s: Setting) -> float:
    """ZeRO-3 and quantisation read one tensor at a time; without them it is read into its place."""
    tensor = sizes.vocabulary * sizes.hidden
    return float(tensor * s.element) if s.stage == 3 or s.nf4 else 0.0


def _gradients(sizes: Sizes, s: Setting) -> tuple[float, float]:
    """Gradients as they stay between micro batches, and the bucket in which they are reduced."""
    trained, c = sizes.trained, s.gradient_element
    if s.stage == 0:
        return trained * (c + (4.0 if s.is_mixed else 0.0)), 0.0
    if s.stage == 1:
        return float(trained * c), 0.0
    bucket = float(min(s.reduce_bucket, trained) * c)
    if s.stage == 2 and s.ranks > 1:
        bucket *= 2  # one is filled while the other is on its way
    return (0.0 if s.offload_optimizer else trained * c / s.ranks), bucket


def _gradients_at_step(sizes: Sizes, s: Setting) -> float:
    if s.stage == 0:
        return _gradients(sizes, s)[0]
    return sizes.trained * s.gradient_element / s.ranks


def _step_bytes(sizes: Sizes, s: Setting, shared: int) -> float:
    """A float32 copy of the rank's gradients; fused AdamW needs no more."""
    return (4.0 if s.stage >= 1 else 0.0) * sizes.trained / shared


def _activations(sizes: Sizes, s: Setting) -> float:
    if s.checkpointing:
        kept = sizes.layers * sizes.hidden * s.element
        rest = sizes.activations - sizes.layers * sizes.layer_activations
        per_token = kept + sizes.layer_activations + max(0.0, rest)
    else:
        per_token = sizes.activations
    return s.micro_tokens * per_token


def _transient(sizes: Sizes, s: Setting) -> float:
    """Gradients on their way through the widest layer, and its weights dequantised."""
    dequantised = sizes.largest_unit * s.element / 2 if s.nf4 else 0.0
    return s.micro_tokens * 2.0 * sizes.widest * s.element + dequantised


def _logits(sizes: Sizes, s: Setting) -> float:
    """A chunk in the model's dtype and in float32, both with their gradients; then the gradient of its rows."""
    rows = min(s.labels, max(1, CHUNK_LOGITS // sizes.vocabulary))
    return rows * sizes.vocabulary * (2.0 * s.element + 8.0) + s.labels * sizes.hidden * s.element


def _live(sizes: Sizes, s: Setting, whole: float) -> float:
    """Bytes that ZeRO-3 gathers, in addition to the rank's own share."""
    if s.stage != 3 or (s.ranks == 1 and not s.offload_param):
        return 0.0
    elements = sizes.parameters + sizes.adapter
    return whole * min(1.0, max(s.live, sizes.largest_unit) / elements)


def _generation(sizes: Sizes, s: Setting, plan: MemoryPlan, resident: float, whole: float) -> dict[str, float]:
    """Weights as the strategy holds them, and keys and values of as many rows as fit; by the rules of the sampler."""
    free = s.memory - s.overhead - resident - _gradients_to_come(sizes, s)
    parts: dict[str, float] = {}
    if s.stage == 3:
        wanted = whole + sizes.largest_unit * s.element
        gather = s.strategy == "gathered" or (s.strategy == "auto" and wanted <= USABLE * free)
        plan.strategy = "gathered" if gather else "sharded"
        parts["gathered"] = whole if gather else 2.0 * sizes.largest_unit * s.element
        free -= parts["gathered"]
    elif s.nf4:
        dequantised = float(sizes.quantizable * s.element)
        hold = s.strategy == "gathered" or (s.strategy == "auto" and dequantised <= USABLE * free)
        plan.strategy = "dequantized" if hold else "local"
        parts["gathered"] = dequantised if hold else sizes.largest_unit * s.element / 2
        free -= parts["gathered"]
    row = s.row_tokens * sizes.cache
    most = min(s.rows, MOST_ROWS_CPU) if s.is_cpu and plan.strategy != "sharded" else s.rows
    free = max(0.0, free)
    plan.cache_rows = fitting = rows_that_fit(CACHE_SHARE * free, row, most)
    parts["cache"] = float(fitting * row)
    adapter = s.adapter_element if sizes.adapter else 0
    token_bytes = call_bytes_per_token(sizes.hidden, sizes.widest, adapter, s.element)
    call = call_limit(free, token_bytes, sizes.vocabulary * s.element, most)
    tokens = fitting * s.row_tokens
    plan.call = CallLimit(min(call.tokens, tokens), min(call.logits, call.tokens, tokens))
    activations = plan.call.tokens * token_bytes
    # Scores and noise take four rows in float32 for each draw. All this comes when the activations are gone.
    logits = plan.call.logits
    drawn = min(logits, draws_at_once(sizes.vocabulary, is_cpu=s.is_cpu))
    parts["activations"] = float(activations)
    parts["logits"] = max(0.0, float(sizes.vocabulary * (logits * s.element + drawn * 16) - activations))
    return parts


def _recorded(sizes: Sizes, s: Setting, resident: float) -> dict[str, float]:
    """What one forward records, where that is a small enough part of what is free: `selfgen.reuse: auto`."""
    need = float(s.recorded_tokens * sizes.layers * sizes.hidden * s.element)
    free = s.memory - s.overhead - resident - _gradients_to_come(sizes, s)
    return {"recorded": need} if 0 < need <= RECORDED_SHARE * free else {}


def _gradients_to_come(sizes: Sizes, s: Setting) -> float:
    """What generation leaves free for the gradients of training, in float32; the moments are counted as there."""
    return 0.0 if s.offload_optimizer else 4.0 * sizes.trained / (s.ranks if s.stage >= 2 else 1)


def as_json(plan: MemoryPlan) -> dict[str, Any]:
    """Bytes by phase and part."""
    return {
        "phases": {name: {**parts, "total": plan.peak(name)} for name, parts in plan.phases.items()},
        "host": plan.host,
        "peak": plan.highest,
        "strategy": plan.strategy,
        "rows": plan.cache_rows,
    }
