"""Whether what the recipe asks of bitsandbytes is there, found before any weight is read."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ssgen_ds.config import Recipe

_INSTALL = "pip install 'ssgen-ds[qlora]'"


def quantization_problems(recipe: Recipe) -> list[str]:
    """One sentence a problem, naming the field and the fix. Its CPU kernels count: slow, but they train."""
    asked = [
        f"{key}={value}"
        for key, value, plain in (
            ("quantization.kind", recipe.quantization.kind, "none"),
            ("train.optimizer", recipe.train.optimizer, "adamw"),
        )
        if value != plain
    ]
    if not asked:
        return []
    what = " and ".join(asked)
    if find_spec("bitsandbytes") is None:
        return [f"{what}: the package bitsandbytes is missing; {_INSTALL}"]
    problem = native_library_problem()
    return [f"{what}: {problem}"] if problem else []


def slow_quantization(recipe: Recipe, device: str) -> str:
    """What to expect where bitsandbytes has only its CPU kernels; "" where there is a GPU or nothing to quantise."""
    if recipe.quantization.kind == "none" or device != "cpu":
        return ""
    return (
        f"quantization.kind={recipe.quantization.kind} without CUDA: it trains on bitsandbytes' CPU kernels, slower "
        "than without quantisation; install a torch that is built for this machine's GPU, or set quantization.kind=none"
    )


def native_library_problem() -> str:
    """What is wrong with bitsandbytes' compiled part on this machine; "" when nothing is."""
    try:
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    except (ImportError, OSError, RuntimeError) as error:
        return f"bitsandbytes cannot be imported ({error}); {_INSTALL} anew"
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        return (
            "the compiled library of bitsandbytes did not load (`python -m bitsandbytes` says why); install a version "
            f"for this machine's CUDA {torch.version.cuda or '(none: the CPU build)'}"
        )
    return ""
