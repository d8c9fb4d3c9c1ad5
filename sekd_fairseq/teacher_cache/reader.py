"""Reading a teacher cache: memory-mapped, by sentence, from any number of processes."""

import errno
import mmap
import resource
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from analysis.runs.files import hash_file
from sekd_fairseq.errors import CacheError
from sekd_fairseq.teacher_cache.format import (
    TOKEN_COLUMNS,
    Manifest,
    Shard,
    decode_logprob,
    hash_symbols,
)
from sekd_fairseq.teacher_cache.tail import read_tail
from sekd_fairseq.teacher_cache.writer import payload_crc


class CachedSentence(NamedTuple):
    """One sentence of a cache: ``T`` target tokens, ``E`` support entries in all.

    ``support_size``, ``gold_logprob``, ``outside_mass`` and ``entropy`` are ``(T,)``; ``token_id``
    and ``logprob`` are ``(E,)``, token after token, each token's reference first; so is ``draws``,
    which only a sampled cache has.
    """

    target_hash: int
    support_size: NDArray[np.uint16]
    gold_logprob: NDArray[np.float32]
    outside_mass: NDArray[np.float32]
    entropy: NDArray[np.float32]
    token_id: NDArray[Any]
    logprob: NDArray[np.float16]
    draws: NDArray[np.uint16] | None = None

    @property
    def first(self) -> NDArray[np.int64]:
        """Where each token's entries begin: at its reference, (T,)."""
        sizes = self.support_size.astype(np.int64)
        return np.cumsum(sizes) - sizes

    @property
    def log_p(self) -> NDArray[np.float64]:
        """The log-probability of each entry, of references as exact as it is stored, (E,)."""
        values = self.logprob.astype(np.float64)
        values[self.first] = self.gold_logprob
        return values

    @property
    def without_teacher(self) -> bool:
        """Whether the reference stands alone at every token, as in a sentence too long for the teacher."""
        return len(self.token_id) == len(self.support_size) and not self.outside_mass.any()


class _MappedShard:
    """NumPy views of one shard's columns, where the manifest says that they are; of the rows nothing
    is read until it is touched.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It ends before its columns do, or its column ``target_hash`` is not the manifest's.
    """

    def __init__(self, path: Path, shard: Shard, dtypes: Mapping[str, str]) -> None:
        with open(path, "rb") as stream:
            content = mmap.mmap(stream.fileno(), shard.bytes, access=mmap.ACCESS_READ)

        def part(name: str, dtype: DTypeLike, count: int) -> NDArray[Any]:
            return np.frombuffer(content, dtype, count, shard.layout[name])

        self.target_hash = part("target_hash", np.uint64, shard.sentences)
        self.crc = part("crc", np.uint32, shard.sentences)
        self.offsets = {
            name: part(f"{name}.offsets", np.int32, shard.sentences + 1) for name in dtypes
        }
        self.values = {
            name: part(
                f"{name}.values", dtype, shard.tokens if name in TOKEN_COLUMNS else shard.entries
            )
            for name, dtype in dtypes.items()
        }
        if zlib.crc32(self.target_hash.data) != shard.target_hash_crc:
            raise ValueError("the column target_hash does not match its checksum")


def allow_open_files() -> None:
    """Let this process have as many files open as it may: a shard that is mapped holds one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # some systems have a lower limit than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class TeacherCache(Sequence[CachedSentence]):
    """The cache of one split, by sentence number.

    >>> cache = TeacherCache.open("cache/train")
    >>> cache[17].token_id

    Every row that is read is checked against its checksum, so a damaged file cannot train in
    silence. Safe to share between threads and processes; a pickle carries the path only.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._shards: dict[int, _MappedShard] = {}

    @classmethod
    def open(cls, directory: str | Path) -> "TeacherCache":
        """Open a cache and check that its files are all there and of the right size.

        Raises
        ------
        CacheError
            With the file, what was expected and found, and what mends it.
        """
        directory = Path(directory)
        manifest = Manifest.load(directory)
        for shard in manifest.shards:
            path = directory / shard.file
            if Path(shard.file).name != shard.file:
                raise CacheError(f"{directory}: the manifest names a file elsewhere: {shard.file}")
            if not path.is_file():
                raise CacheError(
                    f"{path}: expected a shard of {shard.bytes} bytes, found no file; "
                    "restore it, or delete manifest.json and run its build_cache command again"
                )
            if path.stat().st_size != shard.bytes:
                raise CacheError(
                    f"{path}: expected {shard.bytes} bytes, found {path.stat().st_size}; restore "
                    "it, or delete it and manifest.json and run its build_cache command again"
                )
        if sum(shard.sentences for shard in manifest.shards) != manifest.sentences:
            raise CacheError(f"{directory}: the manifest's shards do not add up; build it again")
        allow_open_files()
        return cls(directory, manifest)

    def __len__(self) -> int:
        return self.manifest.sentences

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        sentence = int(index)
        if sentence < 0:
            sentence += len(self)
        if not 0 <= sentence < len(self):
            raise IndexError(f"{self.directory}: sentence {index} of {len(self)}")
        shard_index, row = divmod(sentence, self.manifest.shard_sentences)
        shard = self._shard(shard_index)
        columns: dict[str, NDArray[Any]] = {}
        for name in self.manifest.dtypes:
            start, end = shard.offsets[name][row], shard.offsets[name][row + 1]
            columns[name] = shard.values[name][start:end]
        tokens = len(columns["support_size"])
        if payload_crc(columns) != shard.crc[row] or any(
            len(columns[name]) != tokens for name in TOKEN_COLUMNS
        ):
            raise CacheError(
                f"{self.directory / self.manifest.shards[shard_index].file}: sentence {sentence} "
                "does not match its checksum, so the file is damaged; restore it, or delete it and "
                "manifest.json and run its build_cache command again"
            )
        columns["logprob"] = decode_logprob(columns["logprob"])
        return CachedSentence(int(shard.target_hash[row]), **columns)

    def target_hashes(self) -> NDArray[np.uint64]:
        """The target hash of every sentence, in order; (sentences,)."""
        shards = range(len(self.manifest.shards))
        hashes = [self._shard(i).target_hash for i in shards]
        return np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)

    def tail_law(self) -> NDArray[np.float32]:
        """Weights by which the mass outside a support is spread over the tokens there, (V,); see
        :mod:`sekd_fairseq.teacher_cache.tail`."""
        return read_tail(self.directory, asdict(self.manifest))

    def verify(self, progress: Iterable[int] | None = None) -> None:
        """Read every byte: checksums of all shards and rows, sizes that add up, finite values.

        ``progress`` may wrap ``range(number of shards)``, for a progress bar.
        """
        for index in progress if progress is not None else range(len(self.manifest.shards)):
            shard = self.manifest.shards[index]
            found = hash_file(self.directory / shard.file)
            if found != shard.sha256:
                raise CacheError(
                    f"{self.directory / shard.file}: expected SHA-256 {shard.sha256[:12]}..., "
                    f"found {found[:12]}...; restore it, or delete it and manifest.json and run "
                    "its build_cache command again"
                )
            first = index * self.manifest.shard_sentences
            for sentence in range(first, first + shard.sentences):
                row = self[sentence]
                values = (row.gold_logprob, row.outside_mass, row.entropy, row.logprob)
                if not all(np.isfinite(value).all() for value in values):
                    raise CacheError(
                        f"{self.directory / shard.file}: sentence {sentence} holds a value that "
                        "is not finite; build the cache again"
                    )
                entries = int(row.support_size.sum(dtype=np.int64))
                if not entries == len(row.token_id) == len(row.logprob):
                    raise CacheError(
                        f"{self.directory / shard.file}: sentence {sentence} counts {entries} "
                        f"support tokens and holds {len(row.token_id)}; build the cache again"
                    )

    def check_dictionary(self, symbols: Sequence[str]) -> None:
        """Refuse a dictionary other than the one the cache was built with.

        Raises
        ------
        CacheError
            With both sizes, or the reason when only the order or the symbols differ.
        """
        if len(symbols) != self.manifest.vocab_size:
            found = f"one of {len(symbols)} symbols"
        elif hash_symbols(symbols) != self.manifest.dictionary_hash:
            found = "another one of the same size"
        else:
            return
        raise CacheError(
            f"{self.directory}: expected the target dictionary of {self.manifest.vocab_size} "
            f"symbols that the cache was built with, found {found}; binarise the data with that "
            "dictionary (fairseq-preprocess --tgtdict), or build the cache again for this data; that of "
            "a teacher with another tokenizer is carried over with: python -m sekd_fairseq.align_cache"
        )

    def check_targets(self, hashes: NDArray[np.uint64], where: str) -> None:
        """Refuse target sentences other than those the cache was built from.

        Parameters
        ----------
        hashes : (n,) uint64
            From :func:`~sekd_fairseq.teacher_cache.format.hash_targets`.
        where : str
            The data's name in the message.
        """
        self.check_length(len(hashes), where)
        differs = np.flatnonzero(hashes != self.target_hashes())
        if len(differs):
            raise CacheError(
                f"{self.directory}: target line {differs[0] + 1} of {where} is not the sentence "
                f"that the cache was built from ({len(differs)} of {len(self)} lines differ); "
                "build the cache again for this data"
            )

    def check_length(self, sentences: int, where: str) -> None:
        """Refuse another number of target sentences than the cache was built from."""
        if sentences != len(self):
            raise CacheError(
                f"{self.directory}: expected {len(self)} sentences (split "
                f"{self.manifest.split!r}), found {sentences} in {where}; build the cache again "
                "for this data"
            )

    def _shard(self, index: int) -> _MappedShard:
        if index not in self._shards:
            shard = self.manifest.shards[index]
            path = self.directory / shard.file
            try:
                self._shards[index] = _MappedShard(path, shard, self.manifest.dtypes)
            except (OSError, ValueError, OverflowError) as error:
                if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                    raise CacheError(
                        f"{path}: expected to open each of {len(self.manifest.shards)} shards, found "
                        f"{len(self._shards)} open and no more allowed; raise the limit (ulimit -n), or build "
                        "the cache with a larger --shard-sentences"
                    ) from error
                raise CacheError(
                    f"{path}: not a readable shard ({error}); restore it, or delete it and "
                    "manifest.json and run its build_cache command again"
                ) from error
        return self._shards[index]

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "manifest": self.manifest, "_shards": {}}
