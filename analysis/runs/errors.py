"""Errors that a user can mend, and how commands show them."""

import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something in the user's input is wrong.

    The message is one line: what was expected, what was found, where, and what mends it.
    """


class RecordError(UserError):
    """A run's own files are damaged; the other runs can still be judged."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with the message alone, and status 1, on a :class:`UserError`, or where the
    system refuses a file (a full disk, a directory that must not be written to).

    For the outermost frame of a command, and for the places where fairseq calls the plugin, which
    would print a traceback.
    """
    try:
        yield
    except UserError as error:
        stop_workers()
        raise SystemExit(f"error: {one_line(error)}") from error
    except OSError as error:
        stop_workers()
        where = f"{error.filename}: " if error.filename else ""
        missing = isinstance(error, FileNotFoundError)
        mend = "check the path" if missing else "free space or choose another directory"
        raise SystemExit(
            f"error: {where}{error.strerror or one_line(error)}; {mend}, and run the command again"
        ) from error


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split())


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
