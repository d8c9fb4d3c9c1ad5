"""Errors that a user can mend, and how commands show them."""

import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from analysis.runs.errors import AnalysisError


class UserError(ValueError):
    """Something in the user's input is wrong.

    The message is one line: what was expected, what was found, where, and what mends it.
    """


class CacheError(UserError):
    """A teacher cache is missing, incomplete, damaged, or belongs to other data."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with the message alone, and status 1, on a :class:`UserError` (or one of
    ``analysis``, which reads text for both packages), or where the system refuses a file (a full disk, a directory that must not be written to).

    For the outermost frame of a command, and for the places where fairseq calls the plugin, which
    would print a traceback.
    """
    try:
        yield
    except (UserError, AnalysisError) as error:
        stop_workers()
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        stop_workers()
        where = f"{error.filename}: " if error.filename else ""
        raise SystemExit(
            f"error: {where}{error.strerror or error}; free space or choose another directory, and "
            "run the command again"
        ) from error


def stop_workers() -> None:
    """Kill the loader workers of this process: one that hands over a batch while its program ends
    prints a traceback after the message."""
    workers = multiprocessing.active_children()
    if workers and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker dies
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
