"""Closing a cache: the manifest over all shards, with what can be said of the teacher."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from sekd_fairseq.errors import CacheError
from sekd_fairseq.teacher_cache.format import (
    MANIFEST,
    Manifest,
    Shard,
    atomic_write,
    decode_logprob,
    hash_file,
    shard_name,
)
from sekd_fairseq.teacher_cache.reader import TeacherCache

#: Sums over a shard's tokens, whose means make the manifest's ``quality``.
SUMS = ("loss", "accuracy", "outside_mass", "entropy", "support", "reference_kept", "one_hot")


def shard_range(settings: dict[str, Any]) -> range:
    """Numbers of all shards of a cache."""
    return range(-(-settings["sentences"] // settings["shard_sentences"]))


def missing_shards(directory: Path, settings: dict[str, Any]) -> list[int]:
    """Numbers of the shards that are still to be built."""
    return [i for i in shard_range(settings) if not (directory / shard_name(i)).exists()]


def finish_cache(
    directory: Path,
    settings: dict[str, Any],
    dtypes: dict[str, np.dtype[Any]],
    versions: dict[str, str],
    allow_implausible: bool = False,
) -> TeacherCache:
    """Write the manifest over all shards; from then on the cache is complete.

    Raises
    ------
    CacheError
        The teacher predicts the references worse than their own unigram frequencies do, as one
        that is shifted by a token or belongs to another dictionary would.
    """
    shards, totals = [], np.zeros(len(SUMS))
    counts = np.zeros(settings["vocab_size"], np.int64)
    for index in shard_range(settings):
        shard, sums, references = _measure(directory / shard_name(index))
        shards.append(shard)
        totals += sums
        counts += np.bincount(references, minlength=len(counts))
    tokens = sum(shard.tokens for shard in shards)
    mean = dict(zip(SUMS, (totals / max(tokens, 1)).tolist(), strict=True))
    share = counts[counts > 0] / max(tokens, 1)
    loss = mean.pop("loss")
    quality = {
        "perplexity": float(np.exp(loss)),
        "unigram_perplexity": float(np.exp(-(share * np.log(share)).sum())),
        **mean,
    }
    # At another temperature a good teacher is flatter, or surer, than it is.
    judged = settings["temperature"] == 1.0 and not allow_implausible
    if quality["perplexity"] > quality["unigram_perplexity"] and judged:
        raise CacheError(
            f"{directory}: the teacher predicts the references with perplexity "
            f"{quality['perplexity']:.1f}, worse than their unigram frequencies "
            f"({quality['unigram_perplexity']:.1f}): expected a trained model of this direction "
            "and these dictionaries; --allow-implausible finishes the cache all the same"
        )
    manifest = Manifest(
        **settings,
        tokens=tokens,
        quality=quality,
        dtypes={name: str(dtype) for name, dtype in dtypes.items()},
        shards=tuple(shards),
        versions={**versions, "pyarrow": pyarrow.__version__},
    )
    with atomic_write(directory / MANIFEST) as stream:
        stream.write(manifest.to_json().encode())
    return TeacherCache.open(directory)


def _measure(path: Path) -> tuple[Shard, NDArray[np.float64], NDArray[np.int64]]:
    """A finished shard's entry in the manifest, its :data:`SUMS`, and its reference tokens."""
    with pyarrow.memory_map(str(path)) as source:
        batch = pyarrow.ipc.open_file(source).get_batch(0)
    value = {
        name: batch.column(name).values.to_numpy()
        for name in ("support_size", "gold_logprob", "outside_mass", "entropy", "token_id")
    }
    logprob = decode_logprob(batch.column("logprob").values.to_numpy()).astype(np.float32)
    sizes = value["support_size"].astype(np.int64)
    first = np.cumsum(sizes) - sizes
    gold = value["gold_logprob"]
    # The reference is exact, so it is put in place of its rounded twin among the others.
    others = logprob.copy()
    others[first] = -np.inf
    best = np.maximum.reduceat(others, first) if len(first) else others
    others[first] = np.inf
    worst = np.minimum.reduceat(others, first) if len(first) else others
    sums = [
        -gold.sum(dtype=np.float64),
        (gold >= best).sum(),
        value["outside_mass"].sum(dtype=np.float64),
        value["entropy"].sum(dtype=np.float64),
        sizes.sum(),
        # It would have been kept without being the reference.
        ((gold >= worst) & (sizes > 1) | (gold >= best)).sum(),
        ((sizes == 1) & (gold == 0)).sum(),
    ]
    shard = Shard(
        file=path.name,
        sentences=batch.num_rows,
        tokens=len(sizes),
        entries=int(sizes.sum()),
        bytes=path.stat().st_size,
        sha256=hash_file(path),
    )
    tokens = value["token_id"][first].astype(np.int64)
    return shard, np.array(sums, dtype=np.float64), tokens
