"""A run directory is one process's at a time: a lock that ends with the process."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from sekd_fairseq.errors import UserError

#: The lock's file in a run directory; it says who holds it.
NAME = ".lock"
#: Seconds to wait for another process. The loader workers of a killed training live on for some seconds.
PATIENCE = 10.0
#: The lock of the training that this process runs. Its loader workers, which outlive a killed training for
#: some seconds and write nothing, do not hold it.
_TRAINING = ExitStack()
os.register_at_fork(after_in_child=_TRAINING.close)


def hold_for_training(save_dir: Path) -> None:
    """As :func:`held`, until this process ends or trains elsewhere."""
    _TRAINING.close()
    _TRAINING.enter_context(held(save_dir))


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Make a run directory, or one of checkpoints, and keep other processes out of it.

    The program that this process becomes (``os.execv``) holds the lock too, and so do processes that it
    starts with ``close_fds=False``: it ends with the last of them, however they end, so none is left
    of a killed run. Where the file system has no locks, nothing is kept out.

    Raises
    ------
    UserError
        Another process holds it; says which, on which machine and since when.
    """
    run.mkdir(parents=True, exist_ok=True)
    try:
        lock = os.open(run / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's, who began the run
        lock = os.open(run / NAME, os.O_RDONLY)
    try:
        end = time.monotonic() + PATIENCE
        while not _locked(lock):
            if time.monotonic() >= end:
                holder = os.pread(lock, 1000, 0).decode(errors="replace").strip()
                raise UserError(
                    f"{run}: expected no other process at work on this run, found {holder or 'one'}; wait "
                    "for it to end, stop it, or name another folder"
                )
            time.sleep(0.2)
        since = datetime.now().isoformat(" ", "seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {since}\n"
        with suppress(OSError):
            os.ftruncate(lock, 0)
            os.pwrite(lock, holder.encode(), 0)
        os.set_inheritable(lock, True)
        yield
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    """Try to lock a file; true also where that is not possible."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # file systems without locks have many answers
        return True
    return True
