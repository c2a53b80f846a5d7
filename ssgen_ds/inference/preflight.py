"""What can be told without torch, before the ranks meet: models and files that must exist, and where answers go."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ssgen_ds.data.paths import resolve_path
from ssgen_ds.distributed.launch import before_meeting, is_first_rank
from ssgen_ds.errors import Problems
from ssgen_ds.inference.model_source import check_model_name
from ssgen_ds.inference.session import InferenceSettings
from ssgen_ds.recipe.deepspeed import inference_config


def check_before_meeting(
    models: list[str], settings: InferenceSettings, *own: Callable[[], object], of_first: Callable[[], object] | None
) -> None:
    """Look at what a command is given, before torch is imported.

    Args:
        models: every `--model`; that of `settings` is not looked at.
        own: more checks of the command, which raise UserError.
        of_first: one that only rank 0 makes, for it alone writes.

    Raises:
        UserError: with every problem, on all ranks.
    """

    def check() -> None:
        problems = Problems()
        for model in models:
            problems.ask(partial(check_model_name, model))
        problems.ask(lambda: resolve_path(settings.data, "--data"))
        problems.ask(lambda: inference_config(settings.deepspeed, 1))
        for one in own:
            problems.ask(one)
        if of_first is not None and is_first_rank():
            problems.ask(of_first)
        problems.refuse()

    before_meeting(check)
