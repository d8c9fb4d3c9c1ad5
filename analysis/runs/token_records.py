"""Token records: one row a reference token, ``tokens/<subset>/<step>.parquet`` of a run directory.

Everything is checked where it is read; what is wrong is said in one line that names the file.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.runs.errors import RecordError, one_line
from analysis.runs.files import DamagedFile, is_sealed
from analysis.runs.run_record import FORMAT_VERSION, UNSEALED_VERSION

#: Columns of the token records and their kind. ``int``, ``float`` and ``text`` (dictionary-encoded).
COLUMNS: dict[str, str] = {
    "sentence": "int",  # 0-based line number in the subset
    "position": "int",  # 0-based position in the target
    "token": "int",  # reference token id
    "piece": "text",  # its piece
    "frequency": "int",  # occurrences in the training targets
    "p_gold": "float",  # teacher's probability of the reference token
    "q_gold": "float",  # student's
    "kl": "float",  # KL(p || q), nats
    "kl_target": "float",  # KL of (reference, everything else), nats
    "kl_nontarget": "float",  # (1 - p_gold) KL of the distributions over everything else, nats
    "p_entropy": "float",  # nats
    "q_entropy": "float",
    "p_top1": "int",
    "q_top1": "int",
    "p_top1_piece": "text",
    "q_top1_piece": "text",
    "p_max": "float",  # probability of the teacher's own first choice
    "q_max": "float",
    "p_of_q_top1": "float",  # teacher's probability of the student's first choice
    "overlap_top5": "int",  # how many of the teacher's 5 best are among the student's 5 best
}
PROBABILITIES = ("p_gold", "q_gold", "p_max", "q_max", "p_of_q_top1")
#: Tolerance of the identity kl = kl_target + kl_nontarget (float32 sums over some tens of events).
IDENTITY_ATOL = 1e-4
IDENTITY_RTOL = 1e-4

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class TokenSet:
    """Which reference tokens a record file is about, and against which teacher.

    Attributes
    ----------
    sentences : (S,) int64, the sentence numbers that occur, ascending
    sentence : (N,) int32, the index of each token's sentence in ``sentences``
    position, token : (N,) int32
    teacher : fingerprint of the teacher cache
    digest : of all of it; two files of one digest can be compared row by row
    sealed : whether the file carries a checksum, which it matches
    """

    sentences: NDArray[np.int64]
    sentence: NDArray[np.int32]
    position: NDArray[np.int32]
    token: NDArray[np.int32]
    teacher: str
    digest: str
    sealed: bool = False


def open_records(path: Path) -> tuple[pq.ParquetFile, bool]:
    """Open a token record file; check its checksum, its footer and its columns.

    Returns the file and whether it has a checksum: those of an earlier version have none.
    """
    with _readable(path):
        sealed = is_sealed(path)  # before anything in it is believed
        file = pq.ParquetFile(path)
    footer = {
        key.decode(errors="replace"): value.decode(errors="replace")
        for key, value in (file.metadata.metadata or {}).items()
    }
    expected = {
        "sekd.format_version": str(FORMAT_VERSION if sealed else UNSEALED_VERSION),
        "sekd.subset": path.parent.name,
        "sekd.step": path.stem,
    }
    for key, value in expected.items():
        if footer.get(key) != value:
            raise RecordError(
                f"{path}: expected {key} {value!r} in the footer, found {footer.get(key)!r}; "
                "score the checkpoint again"
            )
    for name, kind in COLUMNS.items():
        index = file.schema_arrow.get_field_index(name)
        found = file.schema_arrow.field(index).type if index >= 0 else None
        if found is None or not _is_kind(found, kind):
            raise RecordError(
                f"{path}: expected column {name!r} ({kind}), found {found or 'none'}; "
                "score the checkpoint again"
            )
    if file.metadata.num_rows == 0:
        raise RecordError(f"{path}: expected token records, found no row; score the run again")
    return file, sealed


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the file where its checksum, or without one Arrow, finds it damaged."""
    try:
        yield
    except DamagedFile as error:
        raise RecordError(f"{error}; score the checkpoint again") from error
    except (OSError, pa.ArrowException) as error:
        raise RecordError(
            f"{path}: expected a complete Parquet file, {one_line(error)}; score the checkpoint again"
        ) from error


def _is_kind(found: pa.DataType, kind: str) -> bool:
    if kind == "text":
        found = found.value_type if pa.types.is_dictionary(found) else found
        return bool(pa.types.is_string(found) or pa.types.is_large_string(found))
    return bool((pa.types.is_integer if kind == "int" else pa.types.is_floating)(found))


def read_token_set(path: Path) -> TokenSet:
    """Read which tokens a file holds; checks that rows are sorted by (sentence, position)."""
    file, sealed = open_records(path)
    with _readable(path):
        columns = [
            _numbers(path, file.read(columns=[name]), name)
            for name in ("sentence", "position", "token")
        ]
    sentence, position, token = (column.astype(np.int32) for column in columns)
    starts = np.flatnonzero(np.diff(sentence, prepend=sentence[0] - 1))
    expected = np.arange(len(sentence), dtype=np.int32)
    expected -= np.repeat(starts, np.diff(starts, append=len(sentence))).astype(np.int32)
    wrong = (np.diff(sentence, prepend=sentence[0]) < 0) | (position != expected)
    if wrong.any() or sentence[0] < 0:
        row = int(np.argmax(wrong))
        raise RecordError(
            f"{path}: expected rows sorted by sentence and position, positions from 0 without a gap; "
            f"row {row} holds sentence {sentence[row]}, position {position[row]}; score the run again"
        )
    digest = hashlib.sha256()
    for column in (sentence, position, token):
        digest.update(np.ascontiguousarray(column, dtype="<i4").tobytes())
    teacher = (file.metadata.metadata or {}).get(b"sekd.cache_fingerprint", b"").decode()
    digest.update(teacher.encode())
    index = np.repeat(np.arange(len(starts), dtype=np.int32), np.diff(starts, append=len(sentence)))
    sentences = sentence[starts].astype(np.int64)
    return TokenSet(sentences, index, position, token, teacher, digest.hexdigest(), sealed)


def iterate_columns(path: Path, names: Sequence[str], rows: int = 1 << 18) -> Iterator[Columns]:
    """Read some number columns of a file, ``rows`` at a time, and check every value.

    Raises
    ------
    RecordError
        Missing or NaN values, a probability outside [0, 1], a negative KL, or (when the three KL
        columns are read together) a row where kl is not kl_target + kl_nontarget; the sentence is
        named.
    """
    file, _ = open_records(path)
    with _readable(path):
        for batch in file.iter_batches(batch_size=rows, columns=["sentence", "position", *names]):
            columns = {
                name: _numbers(path, batch, name) for name in ("sentence", "position", *names)
            }
            _check_values(path, columns, names)
            yield {name: columns[name] for name in names}


def read_columns(path: Path, names: Sequence[str]) -> Columns:
    """Read some number columns whole, each (N,); checked as in :func:`iterate_columns`."""
    parts = list(iterate_columns(path, names))
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def read_pieces(path: Path, name: str) -> tuple[list[str], NDArray[np.int64]]:
    """Read a text column as (distinct pieces, (N,) index of each row's piece)."""
    with _readable(path):
        column = open_records(path)[0].read(columns=[name]).column(0)
    if column.null_count:
        raise RecordError(f"{path}: expected no missing {name}, found {column.null_count}")
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    column = column.unify_dictionaries().combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    return column.dictionary.to_pylist(), column.indices.to_numpy(zero_copy_only=False).astype(
        np.int64
    )


def _numbers(path: Path, table: pa.Table | pa.RecordBatch, name: str) -> NDArray[Any]:
    column = table.column(table.schema.get_field_index(name))
    if column.null_count:
        raise RecordError(f"{path}: expected no missing {name}, found {column.null_count}")
    values: NDArray[Any] = (
        column.to_numpy()
        if isinstance(column, pa.ChunkedArray)
        else column.to_numpy(zero_copy_only=False)
    )
    return values


def _check_values(path: Path, columns: Columns, names: Sequence[str]) -> None:
    wrong: list[tuple[str, NDArray[np.bool_]]] = []
    for name in names:
        values = columns[name]
        if COLUMNS[name] == "float":
            wrong.append((f"a finite {name}", ~np.isfinite(values)))
        if name in PROBABILITIES:
            wrong.append((f"{name} in [0, 1]", (values < 0) | (values > 1 + 1e-5)))
        if name.startswith("kl"):
            wrong.append((f"{name} >= 0", values < -IDENTITY_ATOL))
    if {"kl", "kl_target", "kl_nontarget"} <= set(names):
        parts = columns["kl_target"] + columns["kl_nontarget"]
        allowed = IDENTITY_ATOL + IDENTITY_RTOL * np.abs(columns["kl"])
        wrong.append(("kl = kl_target + kl_nontarget", np.abs(columns["kl"] - parts) > allowed))
    for what, mask in wrong:
        if mask.any():
            row = int(np.argmax(mask))
            shown = ", ".join(f"{name} {columns[name][row]:.6g}" for name in names if name in what)
            raise RecordError(
                f"{path}: sentence {columns['sentence'][row]}, position {columns['position'][row]}: "
                f"expected {what}, found {shown}; the records are damaged: score the checkpoint again"
            )
