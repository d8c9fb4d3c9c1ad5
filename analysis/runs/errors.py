"""Errors that a user can mend, and how commands show them."""

from collections.abc import Iterator
from contextlib import contextmanager


class AnalysisError(ValueError):
    """Something in the user's input is wrong.

    The message is one line: what was expected, what was found, where, and what mends it.
    """


class RecordError(AnalysisError):
    """A run's own files are damaged; the other runs can still be judged."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with the message alone, and status 1, on an :class:`AnalysisError`, or where
    the system refuses a file (a full disk, a directory that must not be written to)."""
    try:
        yield
    except AnalysisError as error:
        raise SystemExit(f"error: {one_line(error)}") from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise SystemExit(
            f"error: {where}{error.strerror or one_line(error)}; free space or choose another "
            "directory, and run the command again"
        ) from error


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split())
