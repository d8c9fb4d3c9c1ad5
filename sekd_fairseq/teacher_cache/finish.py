"""Closing a cache: the manifest over all shards, with what can be said of the teacher."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from analysis.runs.files import DamagedFile, atomic_write, hash_file, is_sealed
from sekd_fairseq.errors import CacheError
from sekd_fairseq.teacher_cache.format import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    Shard,
    decode_logprob,
    read_manifest,
    shard_name,
)
from sekd_fairseq.teacher_cache.reader import TeacherCache

#: Sums over a shard's tokens, whose means make the manifest's ``quality``.
SUMS = (
    "loss",
    "accuracy",
    "outside_mass",
    "entropy",
    "support",
    "reference_kept",
    "one_hot",
    "capped",
)


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
    truncation = settings["truncation"]
    for index in shard_range(settings):
        shard, sums, references = _measure(directory / shard_name(index), truncation)
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
        stream.write(manifest.to_json())
    return TeacherCache.open(directory)


def upgrade_cache(directory: Path) -> TeacherCache:
    """Bring a cache of format version 1 up to date: its shards stay, its manifest is written anew.

    Version 1 did not say where a shard's columns lie. Every shard is read and checked against the
    SHA-256 of the old manifest before it is looked into.

    Raises
    ------
    CacheError
        A damaged shard or manifest.
    """
    content = read_manifest(directory)
    if content.get("format_version") == 1:
        try:
            shards = [
                {**shard, **_places(_whole_shard(directory / shard["file"], shard["sha256"]))}
                for shard in content["shards"]
            ]
        except (KeyError, TypeError) as error:
            raise CacheError(
                f"{directory / MANIFEST}: not a manifest of a teacher cache ({error}); build the "
                "cache again"
            ) from error
        content |= {"shards": shards, "format_version": FORMAT_VERSION}
        manifest = Manifest.of(directory / MANIFEST, content)
        with atomic_write(directory / MANIFEST) as stream:
            stream.write(manifest.to_json())
    return TeacherCache.open(directory)


def _whole_shard(path: Path, sha256: str | None = None) -> pyarrow.Buffer:
    """A shard's bytes, mapped, after a check of all of them: against ``sha256``, or where that is not
    known yet against the checksum in the file itself."""
    try:
        whole = is_sealed(path) if sha256 is None else hash_file(path) == sha256
        with pyarrow.memory_map(str(path)) as source:
            content = source.read_buffer()
    except (OSError, DamagedFile):
        whole = False
    if not whole:
        raise CacheError(
            f"{path}: expected a whole shard of this version, found a damaged or an older one; "
            "delete it and run its build_cache command again"
        )
    return content


def _read_shard(content: pyarrow.Buffer) -> pyarrow.RecordBatch:
    return pyarrow.ipc.open_file(pyarrow.BufferReader(content)).get_batch(0)


def _places(content: pyarrow.Buffer) -> dict[str, Any]:
    """What the manifest says of the inside of a shard: ``layout`` and ``target_hash_crc``."""
    batch = _read_shard(content)
    buffers = {name: batch.column(name).buffers()[1] for name in ("target_hash", "crc")}
    for name in batch.schema.names[2:]:
        _, buffers[f"{name}.offsets"], _, buffers[f"{name}.values"] = batch.column(name).buffers()
    return {
        "layout": {name: buffer.address - content.address for name, buffer in buffers.items()},
        "target_hash_crc": zlib.crc32(batch.column("target_hash").to_numpy().data),
    }


def _measure(
    path: Path, truncation: dict[str, Any]
) -> tuple[Shard, NDArray[np.float64], NDArray[np.int64]]:
    """A finished shard's entry in the manifest, its :data:`SUMS`, and its reference tokens."""
    wanted_mass, most = truncation.get("p", 0.0), truncation.get("k", 0)
    content = _whole_shard(path)
    batch = _read_shard(content)
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
    kept = (gold >= worst) & (sizes > 1) | (gold >= best)
    if "draws" in batch.schema.names:
        kept = batch.column("draws").values.to_numpy()[first] > 0
    sums = [
        -gold.sum(dtype=np.float64),
        (gold >= best).sum(),
        value["outside_mass"].sum(dtype=np.float64),
        value["entropy"].sum(dtype=np.float64),
        sizes.sum(),
        # It would have been kept without being the reference.
        kept.sum(),
        ((sizes == 1) & (gold == 0)).sum(),
        # Less than --top-p asks for, because of --top-k; what is stored is rounded. With fewer tokens there
        # were no more to keep: no others were told, or have a reading in the student's pieces.
        ((value["outside_mass"] > (1.0 - wanted_mass) * 1.001 + 1e-6) & (sizes >= most)).sum()
        if wanted_mass
        else 0,
    ]
    shard = Shard(
        file=path.name,
        sentences=batch.num_rows,
        tokens=len(sizes),
        entries=int(sizes.sum()),
        bytes=path.stat().st_size,
        sha256=hash_file(path),
        **_places(content),
    )
    tokens = value["token_id"][first].astype(np.int64)
    return shard, np.array(sums, dtype=np.float64), tokens
