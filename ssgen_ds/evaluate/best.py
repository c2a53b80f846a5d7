"""Which step's evaluation is best by `eval.best`: `checkpoints/best.json`, and the checkpoint that stays."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssgen_ds.distributed.world import World
from ssgen_ds.run.evaluations import FIX, BestStep, best_of, value_of
from ssgen_ds.run.files import write_json
from ssgen_ds.run.layout import BEST_FILE, evaluations_by_step
from ssgen_ds.run.read_back import EvaluationFile, read_mapping

log = logging.getLogger(__name__)


@dataclass
class BestSoFar:
    """The best of the evaluations that are on disk. Rank 0 reads them; methods that say so are collective.

    Args:
        metric: `eval.best`; None chooses none.
        is_alike: whether the numbers of an evaluation can be compared with those to come.
    """

    run_dir: Path
    world: World
    metric: str | None
    is_alike: Callable[[dict[str, Any]], bool]
    _values: dict[int, float] | None = field(default=None, init=False)  # rank 0: of the metric, by step

    def known(self) -> dict[int, float]:
        """Rank 0: values by step. They are read once: the files only grow by what this process makes."""
        if self._values is None:
            self._values = {} if self.metric is None else self._read(self.metric)
        return self._values

    def add(self, step: int, result: dict[str, Any], known: dict[int, float]) -> None:
        """Rank 0: take in a new evaluation. `known` was asked for before its file was written."""
        if self.metric is not None and (value := value_of(result, self.metric)) is not None:
            known[step] = value

    def is_at(self, step: int) -> bool:
        """Whether the evaluation of this step is the best so far; the same on every rank. A collective."""
        best = self._best()
        return self.world.broadcast(best is not None and best.step == step)

    def step(self) -> int | None:
        """Rank 0: the step whose checkpoint retention spares."""
        best = self._best()
        return _kept_best_step(self.run_dir) if best is None else best.step

    def publish(self) -> None:
        """Write best.json, for people and the report, once that checkpoint is complete. A collective; rank 0 writes."""
        best, file = self._best(), self.run_dir / BEST_FILE

        def write() -> None:
            if best is not None:
                file.parent.mkdir(exist_ok=True)
                write_json(file, asdict(best))

        self.world.together(write)

    def _best(self) -> BestStep | None:
        """None on ranks other than 0, too."""
        return best_of(self.known(), self.metric) if self.world.is_main and self.metric is not None else None

    def _read(self, metric: str) -> dict[int, float]:
        values, other = {}, []
        for step, file in evaluations_by_step(self.run_dir).items():
            result = read_mapping(file, FIX, EvaluationFile)
            if not self.is_alike(result):
                other.append(step)
            elif (value := value_of(result, metric)) is not None:
                values[step] = value
        if other:
            what = "one evaluation" if len(other) == 1 else f"{len(other)} evaluations"
            log.warning(
                "eval.best: %s up to step %d had other examples or settings and cannot be compared: the best step is "
                "chosen among those from here on", what, other[-1],
            )  # fmt: skip
        return values


def _kept_best_step(run_dir: Path) -> int | None:
    """The step that an earlier start chose, where this one chooses none; None where the file is gone or broken."""
    try:
        step = json.loads((run_dir / BEST_FILE).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
