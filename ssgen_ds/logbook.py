"""What a run leaves to be plotted: metrics.jsonl (always), TensorBoard events, Weights & Biases. Rank 0 only.

with Logbook(run_dir, recipe.log, resume_step=0, run_name="demo") as logbook:
    logbook.log({"step": 1, "loss": 2.31, "lr": 1e-5})
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ssgen_ds.config import LogConfig
from ssgen_ds.errors import UserError
from ssgen_ds.files import write_whole

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb-run-id"


class Sink(Protocol):
    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Logbook:
    """One row per finished optimizer step, written everywhere the recipe asks for.

    Args:
        run_dir: the run folder; created where missing.
        log_config: `log` section of the recipe.
        resume_step: finished steps of the checkpoint that the run continues from, 0 without one; later rows are
            dropped, so that every step appears once.
        run_name: the name that Weights & Biases shows.
        recipe: the resolved recipe, stored with the Weights & Biases run.

    Raises:
        UserError: wandb is asked for and is missing or refuses to start; an old metrics.jsonl is damaged.
    """

    def __init__(
        self,
        run_dir: Path,
        log_config: LogConfig,
        resume_step: int,
        run_name: str,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        if problems := missing_packages(log_config):
            raise UserError("\n".join(problems))
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = drop_rows_after(run_dir / METRICS_FILE, resume_step)
        self._last_step = kept[-1]["step"] if kept else 0
        self._sinks: list[Sink] = []
        if log_config.tensorboard:
            self._sinks.append(_TensorBoard(run_dir / "tensorboard", first_step=resume_step + 1))
        if log_config.wandb:
            self._sinks.append(_Wandb(run_dir, log_config.project, run_name, recipe))
        self._file = open(run_dir / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115 (closed in close())

    def log(self, row: dict[str, Any]) -> None:
        """Append one row, on disk before this returns. `row["step"]` counts from 1 and grows; NaN becomes null."""
        step = row["step"]
        assert step > self._last_step, f"step {step} after step {self._last_step}"
        self._last_step = step
        self._file.write(json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()
        scalars = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        for sink in self._sinks:
            sink.write(step, scalars)

    def note(self, step: int, numbers: dict[str, float | None]) -> None:
        """More numbers of a step whose row is written, for what plots them; None is left out."""
        scalars = {key: value for key, value in numbers.items() if value is not None}
        for sink in self._sinks:
            sink.write(step, scalars)

    def close(self) -> None:
        self._file.close()
        while self._sinks:
            self._sinks.pop().close()

    def __enter__(self) -> Logbook:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def missing_packages(log_config: LogConfig) -> list[str]:
    """One sentence for each package that the `log` section needs and that is not installed. Imports nothing."""
    if not log_config.wandb:
        return []
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # no origin: merely a folder called wandb, which wandb leaves where it runs
        return ["log.wandb: the package wandb is not installed; run `pip install wandb` or set log.wandb=false"]
    return []


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file. A torn last line, left by a kill or a write under way, is not a row.

    Raises:
        UserError: a line before the last is not a JSON object.
    """
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:  # covers both broken JSON and a character cut in half
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise UserError(f"{path}:{number}: not a JSON object; repair or delete this line")
    return rows


def drop_rows_after(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Rewrite metrics.jsonl with the rows of steps 1..last_step and return them. A kill leaves the old file or the new.

    No file counts as no rows: a run may continue from a checkpoint of another run.
    """
    if last_step == 0 or not path.exists():
        path.unlink(missing_ok=True)
        return []
    rows = [row for row in read_rows(path) if row["step"] <= last_step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tag(key: str) -> str:
    """TensorBoard and wandb group charts by the part before the slash."""
    for group in ("eval", "selfgen"):
        if key.startswith(f"{group}_"):
            return f"{group}/{key.removeprefix(f'{group}_')}"
    return f"train/{key}"


class _TensorBoard:
    """Event files through TensorBoard's own writer: the same files as torch's SummaryWriter, without torch."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder), flush_secs=10)
        # A START marker tells TensorBoard to forget what earlier files say about this step and later ones.
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=_tag(key), simple_value=value) for key, value in scalars.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run that keeps its id in the run folder, so that it goes on in the same charts after every restart.

    wandb ignores rows at or before the last step it has, so redone steps appear once there too.
    """

    def __init__(self, run_dir: Path, project: str, run_name: str, recipe: dict[str, Any] | None) -> None:
        import wandb

        id_file = run_dir / WANDB_ID_FILE
        if not id_file.exists():
            write_whole(id_file, uuid.uuid4().hex[:12] + "\n")
        run_id = id_file.read_text(encoding="utf-8").strip()
        try:
            self._run = wandb.init(
                project=project, name=run_name, dir=str(run_dir), id=run_id, config=recipe, resume="allow"
            )
        except wandb.Error as error:
            fix = "run `wandb login`, set WANDB_MODE=offline, or set log.wandb=false"
            raise UserError(f"log.wandb: wandb did not start: {error}; {fix}") from error

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log({_tag(key): value for key, value in scalars.items()}, step=step)

    def close(self) -> None:
        self._run.finish()
