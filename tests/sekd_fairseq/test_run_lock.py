"""A run directory is one process's at a time."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sekd_fairseq import rounds, run_lock
from sekd_fairseq.errors import UserError
from sekd_fairseq.run_lock import NAME, held

from .conftest import (
    error_line,
    start_command,
    train,
    train_arguments,
    train_in_two_processes,
)


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE", 0.0)


def started(run: Path, work: Callable[[], Any]) -> int:
    """A process that works while it holds a run's lock; its id."""
    child = os.fork()
    if child == 0:
        try:
            with held(run):
                work()
        finally:
            os._exit(1)
    end = time.monotonic() + 60
    while time.monotonic() < end and f"process {child} " not in holder(run):
        time.sleep(0.01)
    return child


def holder(run: Path) -> str:
    path = run / NAME
    return path.read_text() if path.exists() else ""


def ended(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_the_other_process_is_named_and_none_is_left_of_a_killed_one(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    other = started(run, lambda: time.sleep(60))
    name = re.escape(socket.gethostname())
    told = rf"a run: expected no other process at work on this run, found process {other} on {name}, since 20"
    try:
        with pytest.raises(UserError, match=told), held(run):
            pass
    finally:
        ended(other)
    with held(run):
        assert f"process {os.getpid()} " in holder(run)
    with held(run):  # and again
        pass


def test_what_a_killed_process_started_still_holds_its_run(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    read, write = os.pipe()

    def work() -> None:
        child = subprocess.Popen(sleep, close_fds=False, stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline()
        os.write(write, str(child.pid).encode())
        child.wait()

    parent = started(tmp_path, work)
    orphan = int(os.read(read, 20))
    ended(parent)
    with pytest.raises(UserError, match=f"found process {parent} on "), held(tmp_path):
        pass
    os.kill(orphan, signal.SIGKILL)
    run_lock.PATIENCE = 60.0  # for its end, which is not ours to wait for
    with held(tmp_path):
        pass


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EBADF])
def test_a_file_system_without_locks(
    answer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held(tmp_path):
        pass


def test_a_run_that_another_user_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path):
        pass
    before, opened = holder(tmp_path), os.open

    def to_read_alone(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", to_read_alone)
    with held(tmp_path):
        assert holder(tmp_path) == before
        with pytest.raises(UserError, match="found process"), held(tmp_path):
            pass


def test_checkpoints_are_written_by_one_training(data: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    endless = train_arguments(data, save, "--max-update", 10**6, "--num-workers", 2)
    other = start_command(*endless)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and f"process {other} " not in holder(save):
            time.sleep(0.05)
        line = error_line(train(data, save, "--max-update", 10**6, check=False))
        assert line.startswith(
            f"error: {save}: expected no other process at work on this run, found"
        )
        assert f"found process {other} on " in line and "name another folder" in line
        train(data, save, "--no-save", "--restore-file", "none.pt")  # writes nothing there
        train(data, tmp_path / "beside")
    finally:
        ended(other)
    train(
        data, save, "--restore-file", tmp_path / "beside" / "checkpoint_last.pt", "--max-update", 13
    )


def test_processes_of_one_training_do_not_refuse_each_other(data: Path, tmp_path: Path) -> None:
    train_in_two_processes(train_arguments(data, tmp_path, "--max-update", 2))
    train_in_two_processes(train_arguments(data, tmp_path, "--max-update", 4))
    with held(tmp_path):
        pass


def test_trainings_of_one_process_follow_each_other(tmp_path: Path) -> None:
    run_lock.hold_for_training(tmp_path / "one")
    run_lock.hold_for_training(tmp_path / "one")
    with pytest.raises(UserError), held(tmp_path / "one"):
        pass
    run_lock.hold_for_training(tmp_path / "two")
    with held(tmp_path / "one"):
        pass


def test_rounds_of_one_run_are_made_by_one_process(
    data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    words = [
        "--student",
        teacher,
        "--teacher",
        teacher,
        "--teacher-cache",
        cache,
        "--run",
        tmp_path,
    ]
    other = started(tmp_path, lambda: time.sleep(60))
    try:
        with pytest.raises(SystemExit, match=f"error: .*found process {other} on "):
            rounds.main([*map(str, [data, *words]), "--", "--criterion", "cached_kd"])
    finally:
        ended(other)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
