"""Answers of a teacher's server, kept in a file until they are in the cache."""

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

from sekd_fairseq.errors import UserError


class Answers:
    """Answers that were paid for, in a file: what a stopped run need not ask again."""

    def __init__(self, path: Path) -> None:
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
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path}: expected answers of a teacher's server, found a damaged file ({error}); "
                "delete it and run the command again"
            ) from error

    def get(self, key: str) -> Any | None:
        """The answer to a request, or None."""
        with self._lock:
            self._used.add(key)
            row = self._file.execute(
                "select answer from answers where request = ?", (key,)
            ).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer."""
        with self._lock:
            self._file.execute(
                "insert or replace into answers values (?, ?)", (key, json.dumps(answer))
            )

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
