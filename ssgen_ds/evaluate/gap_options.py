"""What `ssgen gap` is given, as far as it can be looked at without torch."""

from __future__ import annotations

from pathlib import Path

from ssgen_ds.errors import UserError
from ssgen_ds.run.files import check_writable

GOLD, FREE = 0.0, 1.0  # mix rates that are always measured: what training sees, and what the model sees when it answers


def parse_rates(text: str) -> tuple[float, ...]:
    """`0,.1,.5` -> ascending rates; 0 and 1 are always among them. Raises UserError."""
    try:
        rates = {float(item) for item in text.split(",") if item.strip()}
    except ValueError:
        raise UserError(f"--rates: must be numbers with commas between them, got {text!r}") from None
    if not all(GOLD <= rate <= FREE for rate in rates):
        raise UserError(f"--rates: must lie between 0 and 1, got {text!r}")
    return tuple(sorted(rates | {GOLD, FREE}))


def check_folder(out: Path | None, models: list[str]) -> None:
    """Whether there is a folder to write to. Raises UserError."""
    if out is None:
        if len(models) > 1:
            raise UserError("--out: name the folder to write (a single run folder keeps its own in gap/)")
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; name a folder")
    if not out.exists() and not out.absolute().parent.is_dir():
        raise UserError(f"--out: {out.parent} is no folder")
    try:
        check_writable(out if out.exists() else out.absolute().parent)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror}); name a folder elsewhere") from None
