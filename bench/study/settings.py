"""How much of everything, and which runs: a run is a task, a method and a seed.

Sizes were chosen on seed 0 so that SFT answers between a third and nine tenths of the prompts: with unlimited data all
methods answer all. One of the pilots, that of `sort`, also ran BSS (at a constant .25); its size was kept as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.study.tasks import CUE, TASKS
from ssgen_ds.recipe.load import parse_recipe
from ssgen_ds.recipe.schema import Recipe

METHODS: dict[str, dict[str, Any]] = {
    "sft": {"name": "sft"},
    "sft 2x": {"name": "sft"},  # twice the steps: about what BSS and RAC cost
    "bss .1": {"name": "bss", "bss": {"mix_rate": 0.1, "schedule": "linear"}},
    "bss .25": {"name": "bss", "bss": {"mix_rate": 0.25, "schedule": "linear"}},
    "bss .1 constant": {"name": "bss", "bss": {"mix_rate": 0.1, "schedule": "constant"}},
    "bss .25 constant": {"name": "bss", "bss": {"mix_rate": 0.25, "schedule": "constant"}},
    "rac": {"name": "rac"},
    "bss+rac": {"name": "bss+rac", "bss": {"mix_rate": 0.1, "schedule": "linear"}},
}
STEPS_FACTOR = {"sft 2x": 2}
RATES = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)  # of the gap curve


@dataclass(frozen=True)
class TaskSize:
    """Examples to train on, their lengths (letters or digits), steps, and the lengths to evaluate."""

    num_train: int
    train_lengths: tuple[int, int]
    eval_lengths: tuple[int, ...]
    steps: int
    lr: float = 3e-3


@dataclass(frozen=True)
class Settings:
    tasks: dict[str, TaskSize] = field(
        default_factory=lambda: {
            "reverse": TaskSize(2000, (4, 16), (4, 7, 10, 13, 16), 600),
            "sort": TaskSize(1000, (4, 16), (4, 7, 10, 13, 16), 500),
            "sums": TaskSize(120, (3, 10), (4, 6, 8, 10), 300),
        }
    )
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0, 1, 2)
    layers: int = 3
    width: int = 96
    batch: int = 32
    refresh_every: int = 8
    eval_each: int = 80  # prompts of each length


@dataclass(frozen=True)
class Run:
    task: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.method.replace(' ', '-').replace('+', '-').replace('.', '')}-{self.seed}"


def list_runs(settings: Settings) -> list[Run]:
    """SFT first: the gap of the others is measured on its contexts, too. Then seed by seed, what costs most last."""
    assert set(settings.tasks) <= set(TASKS)
    others = [method for method in settings.methods if method != "sft"]
    first = [Run(task, "sft", seed) for seed in settings.seeds for task in settings.tasks]
    return first + [Run(task, method, seed) for seed in settings.seeds for method in others for task in settings.tasks]


def max_answer(size: TaskSize, task: str) -> int:
    """Tokens of the longest answer with its end, and some to spare."""
    longest = max(size.train_lengths[1], *size.eval_lengths)
    return (3 if task == "sums" else 1) * longest + 4


def recipe_of(run: Run, settings: Settings, folder: Path) -> Recipe:
    """What `ssgen train` would read."""
    size = settings.tasks[run.task]
    answer = max_answer(size, run.task)
    method = {"rac": {}, **METHODS[run.method]}
    method["rac"] = {"max_draft_tokens": answer, "correction_cue": CUE, **method["rac"]}
    return parse_recipe(
        {
            "model": {"path": str(folder / f"model-{run.seed}"), "dtype": "float32"},
            "data": {
                "train": str(folder / f"{run.task}-train.jsonl"),
                "max_prompt_tokens": answer + 4,
                "max_response_tokens": answer,
                "over_length": "error",
            },
            "method": method,
            "train": {
                "max_steps": size.steps * STEPS_FACTOR.get(run.method, 1),
                "global_batch": settings.batch,
                "micro_batch": settings.batch,
                "lr": size.lr,
                "warmup": 0.05,
                "seed": run.seed,
            },
            "deepspeed": "ds_configs/zero0.json",
            "selfgen": {"refresh_every": settings.refresh_every, "batch": 64},
            "log": {"tensorboard": False},
            "output_dir": str(folder / "runs" / run.name),
        }
    )
