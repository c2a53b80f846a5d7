"""Whether what the recipe asks of bitsandbytes is there, found before any weight is read.

`missing_bitsandbytes` imports no torch; the other checks do.
"""

from __future__ import annotations

from importlib.util import find_spec

from ssgen_ds.recipe.schema import Recipe

_INSTALL = "pip install 'ssgen-ds[qlora]'"


def missing_bitsandbytes(recipe: Recipe) -> list[str]:
    """A sentence where the recipe needs the package and it is not installed."""
    if _asked(recipe) and find_spec("bitsandbytes") is None:
        return [f"{_asked(recipe)}: the package bitsandbytes is missing; {_INSTALL}"]
    return []


def quantization_problems(recipe: Recipe) -> list[str]:
    """One sentence a problem, naming the field and the fix. Its CPU kernels count: slow, but they train."""
    if not _asked(recipe):
        return []
    if missing := missing_bitsandbytes(recipe):
        return missing
    problem = native_library_problem()
    return [f"{_asked(recipe)}: {problem}"] if problem else []


def _asked(recipe: Recipe) -> str:
    """The settings that need bitsandbytes: `quantization.kind=nf4 and train.optimizer=adamw_8bit`; "" for none."""
    settings = (
        ("quantization.kind", recipe.quantization.kind, "none"),
        ("train.optimizer", recipe.train.optimizer, "adamw"),
    )
    return " and ".join(f"{key}={value}" for key, value, plain in settings if value != plain)


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
        return f"bitsandbytes cannot be imported ({error}); {_INSTALL} again"
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        import torch

        return (
            "the compiled library of bitsandbytes did not load (`python -m bitsandbytes` says why); install a version "
            f"for this machine's CUDA {torch.version.cuda or '(none: the CPU build)'}"
        )
    return ""
