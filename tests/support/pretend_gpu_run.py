"""What families do on a pretended GPU, a JSON line each. `python -m tests.support.pretend_gpu_run`: in a process of its
own, since a device that is registered stays, and libraries look for one."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ssgen_ds.data import window as windows
from ssgen_ds.data.window import Packing, Sequence, build_window
from ssgen_ds.modeling.cache_check import check_cache
from ssgen_ds.modeling.cached import CachedCausalLM
from ssgen_ds.modeling.loss import check_loss, token_loss
from ssgen_ds.modeling.packed import packed_attention
from ssgen_ds.sampler import filters, noise
from ssgen_ds.sampler.filters import Sampling
from ssgen_ds.sampler.fixed_point import sample_fixed_point
from ssgen_ds.sampler.requests import Request
from ssgen_ds.selfgen.bss import draw_coins
from tests.support.pretend_gpu import DEVICE, TALLY, moved, pretended_gpu
from tests.support.pretend_gpu_families import FAMILIES, settings_of


def model_of(family: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings_of(family))
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def requests() -> list[Request]:
    found = []
    for i in range(6):
        length = 40 + i
        gold = [(7 * i + 11 * j) % 300 for j in range(length)]
        prompt = [(3 * i + 5 * j) % 300 for j in range(20 + 2 * i)]
        found.append(Request(prompt, gold, draw_coins(length, 0.2, 1000 + i), 1000 + i))
    return found


def sampled(family: str) -> dict[str, Any]:
    """The checks before training and a sampler's work, beside the same on the host."""
    sampling = Sampling(banned_ids=(3, 4))
    expected, _ = sample_fixed_point(CachedCausalLM(model_of(family, torch.float32)), requests(), sampling, 4, 4)
    filters._ids_on.cache_clear()
    noise._token_words.cache_clear()
    with pretended_gpu():
        model = moved(model_of(family, torch.float32))
        check_loss(model, is_packed=True)
        check_cache(model)
        calls = []
        cached = CachedCausalLM(model, lambda: calls.append(1), DEVICE)
        sample_fixed_point(cached, requests()[:1], sampling, 4, 4)  # what is copied once
        TALLY.clear()
        calls.clear()
        found, _ = sample_fixed_point(cached, requests(), sampling, 4, 4)
        return {
            "same": [one.tokens for one in found] == [one.tokens for one in expected],
            "calls": len(calls),
            "waits": sum(TALLY.waits.values()),
            "copies": sum(TALLY.copies.values()),
            "lines": sorted({f"{what} at {line}" for what, line in (*TALLY.waits, *TALLY.copies)}),
        }


def trained(family: str) -> dict[str, Any]:
    """Packed micro steps."""
    with torch.autograd.set_multithreading_enabled(False), pretended_gpu():
        model = moved(model_of(family, torch.bfloat16).train())
        sequences = [Sequence([5 + i] * (20 + 7 * i), [-100] * 10 + [7] * (10 + 7 * i)) for i in range(4)]
        window = build_window(sequences, Packing(2, is_packed=True), 0, 1, DEVICE)
        TALLY.clear()
        for batch in window.micro_batches:
            with packed_attention(model, batch.layout) as attention:
                token_loss(model, batch, attention=attention).backward()
        return {
            "steps": len(window.micro_batches),
            "waits": sum(TALLY.waits.values()),
            "lines": sorted({f"{what} at {line}" for what, line in (*TALLY.waits, *TALLY.copies)}),
        }


def left_behind() -> str:
    """What the pretence says of buffers that stay on the host."""
    with pretended_gpu():
        model = moved(model_of("deepseek_v3", torch.float32), buffers=False)
        try:
            sample_fixed_point(CachedCausalLM(model, device=DEVICE), requests()[:1], Sampling(), 4)
        except RuntimeError as error:
            return str(error)
    return ""


def main() -> None:
    windows._to = lambda tensor, device: tensor.to(device)
    for family in FAMILIES:
        line: dict[str, Any] = {"family": family}
        for name, work in (("sampled", sampled), ("trained", trained)):
            try:
                line[name] = work(family)
            except Exception as error:
                line[name] = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(line), flush=True)
    print(json.dumps({"family": "left behind", "error": left_behind()}), flush=True)


if __name__ == "__main__":
    main()
