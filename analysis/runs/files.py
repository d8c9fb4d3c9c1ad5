"""Files that are complete or not there, and that carry a checksum, so that a damaged one is refused
before it is believed.

=============  ====================================================================================
JSON           ``checksum``, a key beside the others: SHA-256 of the content without it
Parquet,       64 digits after :data:`MARK` in the metadata: SHA-256 of the whole file with zeros in
Arrow IPC      their place
text           SHA-256 of its lines, kept in a JSON file that is written with it
=============  ====================================================================================

The checksum goes wherever the file is copied. It finds accidents; it is no signature.
"""

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.runs.errors import UserError

CHECKSUM = "checksum"
#: Key of the seal in the metadata of Parquet and Arrow files, and what its value begins with.
SEAL = "sekd.seal"
MARK = b"sekd.sha256:"
DIGITS = 64
#: The metadata lie at the ends of a file: bytes of either end that are searched for the mark.
ENDS = 1 << 16


class DamagedFile(ValueError):
    """A file does not match its checksum, or is not of its kind at all; one line with its path."""


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Write a file so that ``path`` never holds a part of it.

    The bytes go to a temporary name in the same directory, are flushed to disk and renamed; on any
    error the temporary file is removed and ``path`` is as before.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """Make a new directory so that ``path`` is whole or not there.

    It is filled under a temporary name beside it and renamed; on any error nothing is left. A link is
    followed, so that the directory is where it leads. With ``replace`` it takes the place of one that is
    there, which until then stays as it is.

    Raises
    ------
    UserError
        There is something at ``path`` already, other than an empty directory, and not ``replace``.
    """
    path = path.resolve()
    if not replace and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(
            f"{path}: expected a new directory, found one with files; delete it or name another"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        made = Path(temporary) / "new"
        made.mkdir()
        yield made
        if replace and path.exists():
            os.rename(path, Path(temporary) / "old")
        os.rename(made, path)


def hash_content(content: Any) -> str:
    """SHA-256 of anything that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_lines(lines: Sequence[str]) -> str:
    """SHA-256 of the lines of a text, however they end."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sealed_json(content: Mapping[str, Any], indent: int | None = 1) -> bytes:
    """A JSON object with its checksum, as the bytes of a file."""
    sealed = {**content, CHECKSUM: hash_content(content)}
    return (json.dumps(sealed, indent=indent) + "\n").encode()


def read_json(path: Path) -> tuple[dict[str, Any], bool]:
    """A JSON object without its checksum, and whether it had one.

    Raises
    ------
    OSError
        The file cannot be read.
    DamagedFile
        No JSON object, or not the one that the checksum was made of.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DamagedFile(f"{path}: expected a JSON file, {reason}") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{path}: expected a JSON object, found {type(content).__name__}")
    if CHECKSUM not in content:
        return content, False
    if content.pop(CHECKSUM) != hash_content(content):
        raise DamagedFile(
            f"{path}: content does not match its checksum, so it was edited or damaged"
        )
    return content, True


def sealed_parquet(table: pa.Table, **options: Any) -> bytes:
    """A Parquet file that carries its checksum; ``options`` are those of ``write_table``."""
    table = table.replace_schema_metadata(_with_seal(table.schema.metadata))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return _seal(sink.getvalue().to_pybytes())


def sealed_arrow(batch: pa.RecordBatch) -> bytes:
    """An Arrow IPC file of one record batch that carries its checksum."""
    batch = batch.replace_schema_metadata(_with_seal(batch.schema.metadata))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return _seal(sink.getvalue().to_pybytes())


def is_sealed(path: Path) -> bool:
    """Check a Parquet or Arrow file against the checksum that it carries; False where it has none.

    The file's bytes are all read, and nothing of it is interpreted.

    Raises
    ------
    OSError
        The file cannot be read.
    DamagedFile
        It does not match.
    """
    with open(path, "rb") as stream:
        try:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise DamagedFile(f"{path}: the file is empty") from None
        with content:
            places = _places(content)
            if not places:
                return False
            digest = _digest(content, places)
            if any(content[place : place + DIGITS] != digest for place in places):
                raise DamagedFile(f"{path}: content does not match its checksum, so it is damaged")
    return True


def _with_seal(metadata: Mapping[bytes, bytes] | None) -> dict[bytes, bytes]:
    return {**(metadata or {}), SEAL.encode(): MARK + b"0" * DIGITS}


def _seal(content: bytes) -> bytes:
    places = _places(content)
    digest = _digest(content, places)
    sealed = bytearray(content)
    for place in places:
        sealed[place : place + DIGITS] = digest
    return bytes(sealed)


def _places(content: bytes | mmap.mmap) -> list[int]:
    """Where the digits are: after each mark, in either end of the file."""
    found = []
    for start in sorted({0, max(ENDS, len(content) - ENDS)}):
        part = content[start : start + ENDS]
        place = part.find(MARK)
        while place >= 0:
            found.append(start + place + len(MARK))
            place = part.find(MARK, place + 1)
    return found


def _digest(content: bytes | mmap.mmap, places: Sequence[int]) -> bytes:
    sha = hashlib.sha256()
    done = 0
    with memoryview(content) as view:
        for place in places:
            with view[done:place] as part:
                sha.update(part)
            sha.update(b"0" * DIGITS)
            done = place + DIGITS
        with view[done:] as part:
            sha.update(part)
    return sha.hexdigest().encode()
