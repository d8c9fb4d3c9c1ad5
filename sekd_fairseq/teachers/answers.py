"""Answers of a teacher's server, kept in a file until they are in the cache."""

import json
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sekd_fairseq.errors import UserError


def same_probe(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two teachers said the same of a known text, as far as the kernels of a GPU do from run to
    run."""
    mine, theirs = np.array(one, np.float64), np.array(other, np.float64)
    return mine.shape == theirs.shape and bool(np.allclose(mine, theirs, rtol=0.02, atol=0.1))


class Answers:
    """Answers that were paid for, in a file: what a stopped run need not ask again.

    ``probe`` is what the teacher says of a known text: a server may have another one under the same name,
    which is given none of the first one's answers.
    """

    def __init__(self, path: Path, probe: Sequence[float]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = threading.Lock()
        self._used: set[str] = set()
        self._file = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            self._file.execute("pragma journal_mode = wal")
            self._file.execute("pragma synchronous = normal")
            self._file.execute(
                "create table if not exists answers (request text primary key, answer text)"
            )
            self._file.execute(
                "create table if not exists teachers (number integer primary key, probe text)"
            )
            self._teacher = self._number_of(probe)
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path}: expected answers of a teacher's server, found a damaged file ({error}); "
                "delete it and run the command again"
            ) from error

    def _number_of(self, probe: Sequence[float]) -> int:
        for number, known in self._file.execute("select number, probe from teachers"):
            if same_probe(json.loads(known), probe):
                return int(number)
        new = (json.dumps(list(probe)),)
        return int(
            self._file.execute("insert into teachers (probe) values (?)", new).lastrowid or 0
        )

    def get(self, key: str) -> Any | None:
        """The answer to a request, or None."""
        key = f"{self._teacher} {key}"
        with self._lock:
            self._used.add(key)
            row = self._file.execute(
                "select answer from answers where request = ?", (key,)
            ).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer."""
        values = (f"{self._teacher} {key}", json.dumps(answer))
        with self._lock:
            self._file.execute("insert or replace into answers values (?, ?)", values)

    def forget_used(self) -> None:
        """Delete the answers that were asked for since the last time; the file uses their place again."""
        with self._lock:
            self._file.execute("begin")
            self._file.executemany(
                "delete from answers where request = ?", [(key,) for key in self._used]
            )
            self._file.execute("commit")
            self._used.clear()

    def forget(self) -> None:
        """Delete the file."""
        self._file.close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)
