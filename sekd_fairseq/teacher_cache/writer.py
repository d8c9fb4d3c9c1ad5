"""Writing a teacher cache: shards that can be built in any order, by any process."""

import zlib
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analysis.runs.files import atomic_write, sealed_arrow
from sekd_fairseq.errors import CacheError
from sekd_fairseq.teacher_cache.format import (
    ENTRY_COLUMNS,
    TOKEN_COLUMNS,
    encode_logprob,
    shard_name,
)

#: The teacher at one sentence's ``T`` target tokens, ``E`` support entries in all: arrays named as in
#: :mod:`sekd_fairseq.teacher_cache.format`, ``(T,)`` for token columns, ``(E,)`` for entry columns, any float
#: or integer type (stored types are narrower).
SentenceColumns: TypeAlias = dict[str, NDArray[Any]]


def write_shard(
    directory: Path,
    index: int,
    sentences: list[SentenceColumns],
    target_hash: NDArray[np.uint64],
    dtypes: dict[str, np.dtype[Any]],
) -> Path:
    """Write shard ``index`` (complete or not at all) and return its path.

    The same rows give the same bytes, whoever writes them.  ``dtypes`` are the payload columns with
    their stored types (:func:`~sekd_fairseq.teacher_cache.format.payload_dtypes`).

    Raises
    ------
    CacheError
        A value that is not a number or not finite (the reference's probability among them), or a
        sentence whose columns do not fit together; names the sentence within the shard.
    """
    stored: dict[str, list[NDArray[Any]]] = {name: [] for name in dtypes}
    crc = np.zeros(len(sentences), dtype=np.uint32)
    for row, sentence in enumerate(sentences):
        _check_row(sentence, row)
        narrow = {
            name: encode_logprob(sentence[name], dtype)
            if name == "logprob"
            else np.ascontiguousarray(sentence[name], dtype)
            for name, dtype in dtypes.items()
        }
        crc[row] = payload_crc(narrow)
        for name, values in narrow.items():
            stored[name].append(values)
    arrays: list[pa.Array] = [pa.array(target_hash, pa.uint64()), pa.array(crc, pa.uint32())]
    for name in dtypes:
        sizes = np.array([len(values) for values in stored[name]], dtype=np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        if offsets[-1] > np.iinfo(np.int32).max:
            raise CacheError(
                f"shard {index} would hold {offsets[-1]} support entries, more than 2^31 - 1; "
                "build the cache with a smaller --shard-sentences"
            )
        values = np.concatenate(stored[name])
        arrays.append(
            pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
        )
    batch = pa.record_batch(arrays, names=["target_hash", "crc", *dtypes])
    path = directory / shard_name(index)
    with atomic_write(path) as stream:
        stream.write(sealed_arrow(batch))
    return path


def payload_crc(columns: dict[str, NDArray[Any]]) -> int:
    """CRC-32 of a row's stored columns, in the order of the format."""
    crc = 0
    for values in columns.values():
        crc = zlib.crc32(values.data, crc)
    return crc


def _check_row(columns: SentenceColumns, row: int) -> None:
    tokens = {len(columns[name]) for name in TOKEN_COLUMNS}
    entries = {len(columns[name]) for name in ENTRY_COLUMNS if name in columns}
    assert len(tokens) == 1 and len(entries) == 1, "columns of one sentence differ in length"
    assert entries == {int(columns["support_size"].sum(dtype=np.int64))}
    for name in ("gold_logprob", "outside_mass", "entropy", "logprob"):
        bad = ~np.isfinite(columns[name])
        if bad.any():
            raise CacheError(
                f"the teacher gave {name} = {columns[name][bad][0]} at sentence {row} of a shard; "
                "expected finite numbers: check the teacher (half-precision overflow, a token that "
                "it forbids in the references)"
            )
