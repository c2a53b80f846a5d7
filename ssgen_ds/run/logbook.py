"""What a run leaves to be plotted: metrics.jsonl (always), TensorBoard events, Weights & Biases. Rank 0 only.

with Logbook(run_dir, recipe.log, resume_step=0, run_name="demo") as logbook:
    logbook.log({"step": 1, "loss": 2.31, "lr": 1e-5})
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import socket
import time
import uuid
from io import BytesIO, FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ssgen_ds.errors import UserError
from ssgen_ds.recipe.schema import LogConfig
from ssgen_ds.run.files import write_or_undo, write_whole
from ssgen_ds.run.layout import METRICS_FILE, TENSORBOARD_FOLDER, WANDB_ID_FILE
from ssgen_ds.run.read_back import StepRow, read_rows

log = logging.getLogger(__name__)


class Sink(Protocol):
    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Logbook:
    """Writes one row for each finished optimizer step to everything that the recipe asks for.

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
        if self._last_step < resume_step:
            log.warning(
                "%s ends at step %d: the steps up to %d, which are trained, are missing in it",
                run_dir / METRICS_FILE, self._last_step, resume_step,
            )  # fmt: skip
        self._sinks: list[Sink] = []
        if log_config.tensorboard:
            self._sinks.append(_TensorBoard(run_dir / TENSORBOARD_FOLDER, first_step=resume_step + 1))
        if log_config.wandb:
            self._sinks.append(_Wandb(run_dir, log_config.project, run_name, recipe))
        self._path = run_dir / METRICS_FILE

    def log(self, row: dict[str, Any]) -> None:
        """Append one row, with the system before this returns. `row["step"]` counts from 1 and grows; NaN becomes null.

        Raises OSError: it cannot be written whole; then nothing of it is left, and no empty file.
        """
        step = row["step"]
        assert step > self._last_step, f"step {step} after step {self._last_step}"
        line = json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False) + "\n"
        with open(self._path, "ab", buffering=0) as stream:
            write_or_undo(stream, line.encode())
        self._last_step = step
        scalars = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        for sink in self._sinks:
            sink.write(step, scalars)

    def note(self, step: int, numbers: dict[str, float | None]) -> None:
        """Send more numbers of a step whose row is written to the plotting tools. None is left out."""
        scalars = {key: value for key, value in numbers.items() if value is not None}
        for sink in self._sinks:
            sink.write(step, scalars)

    def close(self) -> None:
        while self._sinks:
            sink = self._sinks.pop()
            try:
                sink.close()
            except OSError as error:  # a full disk: metrics.jsonl has it all
                log.warning("%s: the last numbers may be missing: %s", type(sink).__name__.strip("_"), error)

    def __enter__(self) -> Logbook:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def missing_packages(log_config: LogConfig) -> list[str]:
    """A sentence for each package that the `log` section needs and that is not installed. Imports nothing."""
    if not log_config.wandb:
        return []
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # no origin: merely a folder called wandb, which wandb leaves where it runs
        return ["log.wandb: the package wandb is not installed; run `pip install wandb` or set log.wandb=false"]
    return []


def carry_over(origin: Path, path: Path, last_step: int) -> None:
    """Start metrics.jsonl, if there is none, with the steps up to `last_step` of the run that this one continues."""
    if origin.is_file() and not path.exists():
        rows = [row for row in read_rows(origin, StepRow) if row["step"] <= last_step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def drop_rows_after(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Rewrite metrics.jsonl with the rows of steps 1..last_step and return them. A kill leaves the old or the new file.

    No file counts as no rows: a run may continue from a checkpoint of another run.
    """
    if last_step == 0 or not path.exists():
        path.unlink(missing_ok=True)
        return []
    rows = [row for row in read_rows(path, StepRow) if row["step"] <= last_step]
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
    """Event files by TensorBoard's own record writer: the same files as torch's SummaryWriter, without torch.

    Each event is with the system at once, whole or not at all. TensorBoard's file writer does that in a thread, whose
    error on a full disk comes up at some later step. Charts are no reason to end a run: metrics.jsonl has every number,
    so the first event that cannot be written is said, and the last that is tried.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._step = first_step
        self._file: FileIO | None = None
        # TensorBoard reads files by name; two of one second and process differ in the last number.
        seconds, rest = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{rest:09d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(folder / name, "a")
        except OSError as error:
            self._give_up(error)
        # A START marker tells TensorBoard to forget what earlier files say about this step and later ones.
        start = SessionLog(status=SessionLog.START)
        self._add(
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=first_step, session_log=start),
        )

    def write(self, step: int, scalars: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._step = step
        values = [Summary.Value(tag=_tag(key), simple_value=value) for key, value in scalars.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _add(self, *events: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is None:
            return
        records = BytesIO()
        for event in events:
            RecordWriter(records).write(event.SerializeToString())
        try:
            write_or_undo(self._file, records.getvalue())
        except OSError as error:
            self.close()
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning(
            "tensorboard: from step %d on there are no charts: %s (metrics.jsonl has every step)", self._step, error
        )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _Wandb:
    """Keeps its run id in the run folder, so that the same charts continue after every restart.

    wandb ignores rows at or before the last step it has, so redone steps appear once there too.
    """

    def __init__(self, run_dir: Path, project: str, run_name: str, recipe: dict[str, Any] | None) -> None:
        import wandb

        id_file = run_dir / WANDB_ID_FILE
        run_id = id_file.read_bytes().strip(b"\0\n \r").decode(errors="replace") if id_file.is_file() else ""
        if not re.fullmatch(r"[\w-]{1,128}", run_id):
            run_id = uuid.uuid4().hex[:12]
            write_whole(id_file, f"{run_id}\n")
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
