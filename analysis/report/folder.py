"""Where a report goes: a directory that a new one takes the place of when it is complete."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from analysis.runs.errors import UserError
from analysis.runs.files import atomic_directory

#: A file of every report; a directory without it is never replaced.
MARK = "report.md"


def check_output(output: Path) -> None:
    """See, before anything is computed, that a report can be written to ``output``.

    Raises
    ------
    UserError
        There is something else than a report.
    OSError
        The directory cannot be written to.
    """
    other = output.exists() and not (output / MARK).exists()
    if other and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output}: expected a report or nothing there, found other files; choose another --output"
        )
    there = next(folder for folder in output.resolve().parents if folder.exists())
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=there):
        pass


def replace_report(output: Path, write: Callable[[Path], None]) -> None:
    """Have a report written beside ``output``, and put it in its place when it is complete."""
    check_output(output)
    with atomic_directory(output, replace=True) as made:
        write(made)
