"""The tail law of a cache: how the mass outside the supports lies over the vocabulary.

``tail.arrow`` beside the shards has one float32 weight per token, proportional to the teacher's mean
probability of that token where it is outside the support.  One law serves all tokens of all splits:
of what needs nothing more per token it restores the teacher best (docs/tail.md has the figures).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analysis.runs.files import (
    DamagedFile,
    atomic_write,
    hash_content,
    is_sealed,
    sealed_arrow,
)
from sekd_fairseq.errors import CacheError

TAIL = "tail.arrow"
#: What the law was measured with.
OWNER = ("vocab_size", "dictionary_hash", "temperature", "truncation", "teacher")
#: The share of the law that lies evenly over all tokens, so that none has weight 0.
EVEN_SHARE = 0.01


def write_tail(directory: Path, outside: NDArray[np.float64], settings: Mapping[str, Any]) -> None:
    """Write the law of the summed mass that tokens had outside the supports, ``outside`` (V,).

    ``settings`` are those of the cache (:class:`~sekd_fairseq.teacher_cache.format.Manifest`).
    """
    total = outside.sum()
    share = outside / total if total > 0 else np.zeros_like(outside)
    law = share * (1.0 - EVEN_SHARE) + (EVEN_SHARE if total > 0 else 1.0) / len(outside)
    schema = pa.schema([pa.field("weight", pa.float32())], metadata={"owner": _owner(settings)})
    batch = pa.record_batch([pa.array((law * len(law)).astype(np.float32))], schema=schema)
    with atomic_write(directory / TAIL) as stream:
        stream.write(sealed_arrow(batch))


def read_tail(directory: Path, settings: Mapping[str, Any]) -> NDArray[np.float32]:
    """The weights of the vocabulary, (V,) with mean 1.

    Raises
    ------
    CacheError
        The cache has no law, or a damaged one, or another cache's.
    """
    path = directory / TAIL
    if "aligned_from" in settings["teacher"]:
        raise CacheError(
            f"{directory}: expected a cache with the teacher's tail law, found an aligned one, which has none; "
            "take another --missing-mass"
        )
    again = f"delete {TAIL} and manifest.json there and run its build_cache command again"
    try:
        whole = is_sealed(path)
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(0) if whole else None
            law = None if batch is None else batch.column("weight").to_numpy().copy()
            owner = None if batch is None else batch.schema.metadata[b"owner"].decode()
    except FileNotFoundError:
        raise CacheError(
            f"{directory}: expected the teacher's tail law ({TAIL}), found none: an earlier version "
            "built this cache, or an engine that gives the best tokens only; "
            "with --engine torch, delete manifest.json there and run its build_cache command "
            "again, which keeps the shards; or take another --missing-mass"
        ) from None
    except (OSError, DamagedFile, KeyError) as error:
        raise CacheError(f"{path}: not a tail law that can be read ({error}); {again}") from error
    if law is None or len(law) != settings["vocab_size"] or owner != _owner(settings):
        raise CacheError(f"{path}: expected the tail law of this cache, found another; {again}")
    return law


def _owner(settings: Mapping[str, Any]) -> str:
    return hash_content({key: settings[key] for key in OWNER})
