"""Token records: one row a reference token, ``tokens/<subset>/<step>.parquet`` of a run directory.

Everything is checked where it is read; what is wrong is said in one line that names the file.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.runs.errors import RecordError, one_line
from analysis.runs.files import DamagedFile, atomic_write, is_sealed, sealed_parquet
from analysis.runs.run_record import FORMAT_VERSION, UNSEALED_VERSION


class Column(NamedTuple):
    """A column of the token records: how it is stored, and what it says of a reference token."""

    type: pa.DataType
    meaning: str

    @property
    def kind(self) -> str:
        """``int``, ``float`` or ``text``; a file may hold another width of its kind."""
        if pa.types.is_dictionary(self.type):
            return "text"
        return "int" if pa.types.is_integer(self.type) else "float"

    def holds(self, found: pa.DataType) -> bool:
        """Whether a stored type is of this kind."""
        if self.kind == "text":
            found = found.value_type if pa.types.is_dictionary(found) else found
            return bool(pa.types.is_string(found) or pa.types.is_large_string(found))
        return bool((pa.types.is_integer if self.kind == "int" else pa.types.is_floating)(found))


_TEXT = pa.dictionary(pa.int32(), pa.string())
#: p is the teacher, q the student; both at the temperature of the teacher's cache.
COLUMNS: dict[str, Column] = {
    "sentence": Column(pa.int32(), "0-based line number in the subset"),
    "position": Column(pa.int32(), "0-based position in the target"),
    "token": Column(pa.int32(), "id of the reference token"),
    "piece": Column(_TEXT, "its piece"),
    "frequency": Column(pa.int64(), "how often it occurs in the training targets"),
    "p_gold": Column(pa.float32(), "teacher's probability of the reference token"),
    "q_gold": Column(pa.float32(), "student's"),
    "kl": Column(pa.float32(), "KL(p || q), nats"),
    "kl_target": Column(pa.float32(), "KL of (reference, everything else), nats"),
    "kl_nontarget": Column(
        pa.float32(), "(1 - p_gold) KL of the distributions over everything else, nats"
    ),
    "p_entropy": Column(pa.float32(), "teacher's entropy, nats"),
    "q_entropy": Column(pa.float32(), "student's"),
    "p_top1": Column(pa.int32(), "teacher's first choice"),
    "q_top1": Column(pa.int32(), "student's"),
    "p_top1_piece": Column(_TEXT, "piece of the teacher's first choice"),
    "q_top1_piece": Column(_TEXT, "of the student's"),
    "p_max": Column(pa.float32(), "probability that the teacher gives its own first choice"),
    "q_max": Column(pa.float32(), "that the student gives its own"),
    "p_of_q_top1": Column(pa.float32(), "teacher's probability of the student's first choice"),
    "overlap_top5": Column(
        pa.int8(), "how many of the teacher's 5 best are among the student's 5 best"
    ),
}
SCHEMA = pa.schema([(name, column.type) for name, column in COLUMNS.items()])
#: Symbols that stand for no piece, in every dictionary of fairseq's.
SPECIAL = {"<s>", "<pad>", "</s>", "<unk>"}
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


def write_records(
    path: Path,
    columns: Mapping[str, NDArray[Any]],
    symbols: Sequence[str],
    *,
    teacher: str,
    checkpoint: str,
    rows: int | None = None,
) -> None:
    """Write token records to ``tokens/<subset>/<step>.parquet``, complete or not at all.

    Parameters
    ----------
    columns : of numbers, each (N,), sorted by sentence and position; the pieces are those of
        ``token``, ``p_top1`` and ``q_top1``
    symbols : the dictionary, in the order of its ids
    teacher : fingerprint of the teacher's cache
    checkpoint : hash of the student's file
    rows : of a row group (default: pyarrow's)
    """
    names = pa.array(without_ids(symbols), pa.string())
    arrays = []
    for name, column in COLUMNS.items():
        if column.kind == "text":
            ids = columns["token" if name == "piece" else name.removesuffix("_piece")]
            # Only the pieces that occur, so that the file does not carry the whole vocabulary.
            used, index = np.unique(ids, return_inverse=True)
            found = names.take(pa.array(used))
            arrays.append(pa.DictionaryArray.from_arrays(pa.array(index, pa.int32()), found))
        else:
            arrays.append(pa.array(columns[name]).cast(column.type))
    footer = {
        "sekd.format_version": str(FORMAT_VERSION),
        "sekd.subset": path.parent.name,
        "sekd.step": path.stem,
        "sekd.cache_fingerprint": teacher,
        "sekd.checkpoint": checkpoint,
    }
    table = pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(footer))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write(sealed_parquet(table, compression="zstd", row_group_size=rows))


def without_ids(symbols: Sequence[str]) -> list[str]:
    """Pieces as people read them: of a language model without the token's id, which its dictionary puts
    before each (``ID:PIECE``)."""
    parts = [symbol.partition(":") for symbol in symbols]
    if all(head.isdecimal() if colon else head in SPECIAL for head, colon, _ in parts):
        return [piece if colon else head for head, colon, piece in parts]
    return list(symbols)


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
    for name, column in COLUMNS.items():
        index = file.schema_arrow.get_field_index(name)
        found = file.schema_arrow.field(index).type if index >= 0 else None
        if found is None or not column.holds(found):
            raise RecordError(
                f"{path}: expected column {name!r} ({column.kind}), found {found or 'none'}; "
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


def iterate_columns(path: Path, names: Sequence[str], rows: int = 1 << 17) -> Iterator[Columns]:
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
    index = column.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return without_ids(column.dictionary.to_pylist()), index  # records of earlier versions have ids


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
        if COLUMNS[name].kind == "float":
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
