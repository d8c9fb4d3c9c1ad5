"""Building the teacher cache of a split, shard by shard, so that an interrupted build resumes."""

import argparse
import hashlib
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.runs.files import DamagedFile, atomic_write, read_json, sealed_json
from analysis.terminal import progress
from sekd_fairseq.datasets import target_hashes
from sekd_fairseq.errors import CacheError, UserError
from sekd_fairseq.splits import load_split, token_batches, too_long
from sekd_fairseq.teacher_cache.finish import finish_cache, missing_shards, shard_range
from sekd_fairseq.teacher_cache.format import (
    MANIFEST,
    Manifest,
    hash_symbols,
    payload_dtypes,
    shard_name,
)
from sekd_fairseq.teacher_cache.reader import TeacherCache
from sekd_fairseq.teacher_cache.tail import TAIL, write_tail
from sekd_fairseq.teacher_cache.writer import write_shard
from sekd_fairseq.teachers.answers import same_probe
from sekd_fairseq.teachers.engine import Engine
from sekd_fairseq.teachers.truncation import (
    Truncation,
    reference_alone,
    truncation_of,
)
from sekd_fairseq.versions import versions

#: Beside the shards: what they are of, also once there is a manifest, which whoever mends a cache deletes.
SETTINGS = "build.json"
#: Shards of a large cache: each is an open file in all processes that read it.
SHARDS = 500
#: Tokens, about, from which a tail law is measured.
TAIL_TOKENS = 5000


@dataclass(frozen=True)
class Part:
    """One of the processes that share a build: ``shard_id`` of ``num_shards``, from 0.

    Raises
    ------
    UserError
        There is no such part.
    """

    shard_id: int = 0
    num_shards: int = 1

    def __post_init__(self) -> None:
        if self.num_shards < 1:
            raise UserError(f"--num-shards: expected 1 or more, found {self.num_shards}")
        if not 0 <= self.shard_id < self.num_shards:
            expected = f"0 to {self.num_shards - 1}"
            raise UserError(f"--shard-id: expected {expected}, found {self.shard_id}")

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Part":
        """Of the options of :func:`add_part`."""
        return cls(args.shard_id, args.num_shards)

    def shards(self, settings: dict[str, Any]) -> list[int]:
        """The numbers of its shards."""
        return list(shard_range(settings)[self.shard_id :: self.num_shards])


def add_part(group: argparse._ActionsContainer) -> None:
    """The options of a build that several processes share."""
    group.add_argument(
        "--num-shards",
        type=int,
        default=int(os.environ.get("WORLD_SIZE", 1)),
        metavar="N",
        help="share the work among N processes or jobs; each builds every N-th shard, and the one "
        "that finishes last completes the cache (default: 1, or the processes of torchrun)",
    )
    group.add_argument(
        "--shard-id",
        type=int,
        default=int(os.environ.get("RANK", 0)),
        metavar="I",
        help="which of these this is, from 0 (default: 0, or the rank under torchrun)",
    )


@dataclass(frozen=True)
class Build:
    """How the cache of every split is built; attributes are named as the options are
    (:class:`Part`'s too)."""

    data: str
    output: Path
    top_k: int
    top_p: float | None
    top_p_floor: int
    sample: int
    logprob_bits: int
    temperature: float
    max_tokens: int | None
    shard_sentences: int | None
    part: Part
    skip_too_long: bool
    allow_implausible: bool

    def truncation(self, vocab_size: int) -> Truncation:
        """What is kept of each distribution."""
        return truncation_of(self.top_k, self.top_p, self.top_p_floor, self.sample, vocab_size)


def build_split(engine: Engine, build: Build, split: str) -> TeacherCache | None:
    """Build (or finish) the cache of one split and open it; None while others have to finish."""
    directory = build.output / split
    dataset = load_split(engine.task, split, build.data)
    symbols = engine.task.target_dictionary.symbols
    hashes = target_hashes(dataset.tgt, engine.task.target_dictionary.pad())
    truncation = build.truncation(len(symbols))
    dtypes = payload_dtypes(len(symbols), build.logprob_bits, counts=bool(build.sample))
    settings: dict[str, Any] = {
        "split": split,
        "vocab_size": len(symbols),
        "dictionary_hash": hash_symbols(symbols),
        "dataset_hash": hash_of(hashes),
        "sentences": len(dataset),
        "shard_sentences": build.shard_sentences
        or shard_size(directory, len(dataset), build.part.num_shards),
        "temperature": build.temperature,
        "truncation": truncation.record(),
        "teacher": engine.identity,
    }
    if cache := finished(directory, settings, dtypes):
        return cache
    skipped = too_long(dataset, engine.limits(), split, allow=build.skip_too_long)
    split_to_cache = Sentences(dataset, hashes, skipped, settings["shard_sentences"])
    settings["teacher"] = begin(directory, settings, dtypes)["teacher"]
    measure_tail(engine, build, directory, split_to_cache, settings)
    shards = build.part.shards(settings)
    build_shards(engine, build, directory, shards, split_to_cache, dtypes)
    return finish(directory, settings, dtypes, build.part, build.allow_implausible)


@dataclass(frozen=True)
class Sentences:
    """A split to cache: its dataset, the hash of each target, which the teacher cannot read, and how many
    a shard holds."""

    dataset: Any
    hashes: NDArray[np.uint64]
    skipped: frozenset[int]
    per_shard: int


def shard_size(directory: Path, sentences: int, parts: int = 1) -> int:
    """Sentences per shard where none are asked for: those of a build that was begun, or 10,000, less where
    these would leave some of the processes that share the build without a shard, and more where they would
    make more than :data:`SHARDS`."""
    if (directory / MANIFEST).exists():
        return Manifest.load(directory).shard_sentences
    if (directory / SETTINGS).exists():
        return int(read_settings(directory)["shard_sentences"])
    most = 10_000 if parts == 1 else max(1, min(10_000, -(-sentences // parts)))
    return max(most, -(-sentences // SHARDS))


def build_shards(
    engine: Engine,
    build: Build,
    directory: Path,
    shards: Sequence[int],
    split: Sentences,
    dtypes: dict[str, np.dtype[Any]],
) -> None:
    """Write those of some shards that are not there yet."""
    dataset = split.dataset
    truncation = build.truncation(len(engine.task.target_dictionary))
    lengths = dataset.sizes[:, 1].astype(np.int64)
    size = split.per_shard
    spans = {index: np.arange(len(dataset))[index * size :][:size] for index in shards}
    total = int(sum(lengths[sentences].sum() for sentences in spans.values()))
    with progress(total=total, unit="tok", unit_scale=True, desc=directory.name) as bar:
        for index, sentences in spans.items():
            if (directory / shard_name(index)).exists():
                bar.update(int(lengths[sentences].sum()))
                continue
            skipped = [i for i in sentences if i in split.skipped]
            found = {i: reference_alone(dataset.tgt[i].numpy()) for i in skipped}
            readable = np.array([i for i in sentences if i not in found], dtype=np.int64)
            for batch in token_batches(dataset, readable, build.max_tokens or engine.batch_tokens):
                sample = dataset.collater([dataset[i] for i in batch])
                found.update(engine.sentences(sample, truncation, build.temperature))
                bar.update(int(lengths[batch].sum()))
            try:
                ordered = [found[i] for i in sentences]
                write_shard(directory, index, ordered, split.hashes[sentences], dtypes)
            except OSError as error:
                raise UserError(f"{directory}: cannot write shard {index} ({error})") from error
            engine.written()


def measure_tail(
    engine: Engine, build: Build, directory: Path, split: Sentences, settings: dict[str, Any]
) -> None:
    """Write the teacher's tail law, from some sentences that it can read, where the engine gives whole
    distributions and the cache has supports of the best tokens."""
    truncation = build.truncation(settings["vocab_size"])
    if engine.outside is None or truncation.rule == "sample" or (directory / TAIL).exists():
        return
    dataset = split.dataset
    readable = np.setdiff1d(np.arange(len(dataset)), list(split.skipped))
    mean = dataset.sizes[readable, 1].mean() if len(readable) else 1.0
    count = min(len(readable), max(1, int(TAIL_TOKENS / mean)))
    chosen = readable[np.unique(np.linspace(0, len(readable) - 1, count).astype(np.int64))]
    total = np.zeros(settings["vocab_size"])
    for batch in token_batches(dataset, chosen, build.max_tokens or engine.batch_tokens):
        sample = dataset.collater([dataset[i] for i in batch])
        total += engine.outside(sample, truncation, settings["temperature"])
    write_tail(directory, total, settings)


def hash_of(hashes: NDArray[np.uint64]) -> str:
    """Identifies a split by the hashes of its target sentences."""
    return hashlib.sha256(hashes.tobytes()).hexdigest()


def finished(
    directory: Path, settings: dict[str, Any], dtypes: dict[str, np.dtype[Any]]
) -> TeacherCache | None:
    """The cache in ``directory``, or None where it is not complete; ``CacheError`` where it is of other
    settings."""
    if not (directory / MANIFEST).exists():
        return None
    cache = TeacherCache.open(directory)
    wanted = record_of(settings, dtypes)
    check_same(directory, wanted, {key: getattr(cache.manifest, key) for key in wanted})
    return cache


def begin(
    directory: Path, settings: dict[str, Any], dtypes: dict[str, np.dtype[Any]]
) -> dict[str, Any]:
    """Record what is being built, so that another build cannot go on in the same directory; returns
    the record, which an earlier run may have made.

    Raises
    ------
    CacheError
        A build of other settings was begun here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    wanted = record_of(settings, dtypes)
    path = directory / SETTINGS
    if path.exists():
        found = read_settings(directory)
        check_same(directory, wanted, found)
        return found
    with atomic_write(path) as stream:
        stream.write(sealed_json(wanted))
    return wanted


def finish(
    directory: Path,
    settings: dict[str, Any],
    dtypes: dict[str, np.dtype[Any]],
    part: Part,
    allow_implausible: bool,
) -> TeacherCache | None:
    """Close a cache whose shards are all there (:func:`finish_cache`); None, and a line that says so,
    while others have to finish."""
    missing = missing_shards(directory, settings)
    if missing:
        print(
            f"{directory}: part {part.shard_id} of {part.num_shards} is built; shards of other "
            f"parts are still missing ({len(missing)})"
        )
        return None
    return finish_cache(directory, settings, dtypes, versions(), allow_implausible)


def record_of(settings: dict[str, Any], dtypes: dict[str, np.dtype[Any]]) -> dict[str, Any]:
    """What makes a build the one that it is, for JSON."""
    return {**settings, "dtypes": {name: str(dtype) for name, dtype in dtypes.items()}}


def read_settings(directory: Path) -> dict[str, Any]:
    """What the shards in ``directory`` are of; ``CacheError`` where that is damaged."""
    path = directory / SETTINGS
    try:
        settings, sealed = read_json(path)
    except DamagedFile as error:
        raise CacheError(f"{error}; delete {directory} and build it again") from error
    if not sealed:
        raise CacheError(
            f"{path}: expected settings with a checksum, found none (an earlier version began "
            f"here); delete {directory} and build it again"
        )
    return settings


def check_same(directory: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Refuse to go on with what was built otherwise; ``CacheError`` names the first difference."""
    for key, value in wanted.items():
        same = same_teacher if key == "teacher" else operator.eq
        if not same(value, found.get(key)):
            raise CacheError(
                f"{directory}: holds a cache with another {key.replace('_', ' ')} (expected "
                f"{value}, found {found.get(key)}); give another --output or delete the directory"
            )


def same_teacher(one: dict[str, Any], other: Any) -> bool:
    """Whether two records are of one teacher; of a served one by what it says of a known text (``probe``)."""
    if not isinstance(other, dict) or {**one, "probe": 0} != {**other, "probe": 0}:
        return False
    return same_probe(one.get("probe", []), other.get("probe", []))
