"""The teacher cache on disk: columns, manifest, hashes.

A cache is a directory with one folder a split, and in it ``manifest.json`` and Arrow IPC files
``shard-00000.arrow``, ... of ``shard_sentences`` rows each (the last may be shorter).  A row is a
sentence, in the order of the split::

    target_hash    uint64            of the target's token ids (:func:`hash_targets`)
    crc            uint32            CRC-32 of the row's payload, the columns below in order
    support_size   list<uint16>      a target token: how many entries its support has
    gold_logprob   list<float32>     a target token: teacher's log-probability of the reference
    outside_mass   list<float32>     a target token: teacher's mass outside the support
    entropy        list<float32>     a target token: entropy of the full distribution, nats
    token_id       list<uint16|32>   an entry: token id; the reference first, then by probability
    logprob        list<float16>     an entry: log-probability; or list<uint8>, a code of 8 bits
                                     (:func:`encode_logprob`)
    draws          list<uint16>      an entry, of a sampled support only: how often it was drawn

The manifest is written last, so a directory with a manifest is complete, and one without is not. It
says where each column lies in its file (:func:`layout_of`), so that a reader asks no file about itself:
a damaged one can be refused, but not followed out of its bounds.
"""

import hashlib
import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.runs.files import DamagedFile, hash_content, read_json, sealed_json
from sekd_fairseq.errors import CacheError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"

#: Columns with one value a target token, with their stored types.
TOKEN_COLUMNS: dict[str, np.dtype[Any]] = {
    "support_size": np.dtype(np.uint16),
    "gold_logprob": np.dtype(np.float32),
    "outside_mass": np.dtype(np.float32),
    "entropy": np.dtype(np.float32),
}
#: Columns with one value an entry of the support, with their (narrowest) stored types.
ENTRY_COLUMNS: dict[str, np.dtype[Any]] = {
    "token_id": np.dtype(np.uint16),
    "logprob": np.dtype(np.float16),
    "draws": np.dtype(np.uint16),
}
#: Steps a nat of an 8-bit log-probability. Rounding in steps of s nats costs about s^2 / 24 nats of
#: KL divergence, here 1.6e-4; the smallest that can be told apart is exp(-255 / 16) = 1.2e-7.
LOGPROB_STEPS = 16


def payload_dtypes(
    vocab_size: int, logprob_bits: int = 16, counts: bool = False
) -> dict[str, np.dtype[Any]]:
    """Payload columns of a cache with their stored types, in the order of a row's checksum."""
    dtypes = {**TOKEN_COLUMNS, **ENTRY_COLUMNS}
    if vocab_size > 2**16:
        dtypes["token_id"] = np.dtype(np.uint32)
    if logprob_bits == 8:
        dtypes["logprob"] = np.dtype(np.uint8)
    if not counts:
        del dtypes["draws"]
    return dtypes


def encode_logprob(logprob: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Log-probabilities as stored: float16, or ``round(-16 logprob)`` up to 255 as uint8."""
    if dtype == np.uint8:
        steps = np.rint(np.asarray(logprob, np.float32) * np.float32(-LOGPROB_STEPS))
        return steps.clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(logprob, dtype)


def decode_logprob(stored: NDArray[Any]) -> NDArray[np.float16]:
    """The inverse of :func:`encode_logprob`, float16."""
    if stored.dtype == np.uint8:
        return stored.astype(np.float16) / np.float16(-LOGPROB_STEPS)
    return stored


def column_places(dtypes: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the parts of a shard: the two columns of numbers, and of each list column where its
    rows begin (``NAME.offsets``, int32, one more than rows) and its values (``NAME.values``)."""
    parts = (f"{name}.{part}" for name in dtypes for part in ("offsets", "values"))
    return ("target_hash", "crc", *parts)


def shard_name(index: int) -> str:
    """File name of shard ``index``."""
    return f"shard-{index:05d}.arrow"


def parts_of(split: str) -> Iterator[str]:
    """What the parts are called that fairseq combines to a split, of data and of caches: ``train``,
    ``train1``, ``train2`` and so on without end."""
    return (f"{split}{part or ''}" for part in itertools.count())


def hash_targets(
    tokens: NDArray[np.integer], lengths: Sequence[int] | NDArray[np.integer]
) -> NDArray[np.uint64]:
    """64-bit hash of each sentence's token ids, order included.

    Parameters
    ----------
    tokens : (sum of lengths,) int
        Token ids of all sentences, one after the other, end of sentence included, no padding.
    lengths : (n,) int

    Returns
    -------
    (n,) uint64

    Notes
    -----
    A sum over positions of a mix (SplitMix64's finaliser; Steele et al., 2014) of token and
    position, mixed again with the length: vectorised, for finding accidents, not for security.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(sizes)
    position = np.arange(len(tokens), dtype=np.int64) - np.repeat(ends - sizes, sizes)
    with np.errstate(over="ignore"):
        mixed = _mix(
            (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            ^ (position.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
        )
        running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
        return _mix(running[ends] - running[ends - sizes] + sizes.astype(np.uint64))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_symbols(symbols: Sequence[str]) -> str:
    """Hash of a dictionary: its symbols in the order of their ids."""
    return hashlib.sha256("\n".join(symbols).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Shard:
    """One shard file as the manifest lists it.

    Attributes
    ----------
    target_hash_crc
        CRC-32 of its column ``target_hash``, which the rows' own checksums leave out.
    layout
        Where in the file each part begins (:func:`column_places`), in bytes.
    """

    file: str
    sentences: int
    tokens: int
    entries: int
    bytes: int
    sha256: str
    target_hash_crc: int
    layout: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """What a cache is of, and what its files must be.

    ``teacher``, ``truncation`` and ``quality`` are for people and tools: who the teacher was, how
    its distributions were cut, how well it predicts the references.
    """

    split: str
    vocab_size: int
    dictionary_hash: str
    dataset_hash: str
    sentences: int
    tokens: int
    shard_sentences: int
    temperature: float
    truncation: dict[str, Any]
    teacher: dict[str, Any]
    quality: dict[str, float]
    dtypes: dict[str, str]
    shards: tuple[Shard, ...]
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        """The manifest as JSON, with a checksum of its own."""
        return sealed_json(asdict(self))

    @property
    def fingerprint(self) -> str:
        """Identifies the cache's content in run records (16 hexadecimal digits)."""
        return hash_content([shard.sha256 for shard in self.shards])[:16]

    @property
    def outside_is_rest(self) -> bool:
        """Whether ``outside_mass`` is what the known tokens lack of 1, of a teacher that told its best
        tokens alone or of one that was aligned; else it is a sum over the tokens outside."""
        arch = str(self.teacher.get("arch", ""))
        return "aligned_from" in self.teacher or arch == "vllm" or arch.startswith("server, ")

    @property
    def why_alone(self) -> str:
        """Why tokens have the reference alone, with probability 1."""
        if "aligned_from" in self.teacher:
            return "the rest of a piece that no other cached piece begins like, and sentences of another text"
        return "sentences too long for the teacher, --skip-too-long"

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read and check ``directory/manifest.json``.

        Raises
        ------
        CacheError
            No manifest (nothing there, or a build that has not finished), a format version from
            the future, or a manifest that was cut or edited.
        """
        path = directory / MANIFEST
        content = read_manifest(directory)
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise CacheError(
                f"{path}: expected format version {FORMAT_VERSION}, found {version}; "
                + (
                    f"bring the cache up to date with: python -m sekd_fairseq.inspect_cache "
                    f"{shlex.quote(str(directory))} --upgrade"
                    if version == 1
                    else "update sekd_fairseq or build the cache again with this version"
                )
            )
        return cls.of(path, content)

    @classmethod
    def of(cls, path: Path, content: dict[str, Any]) -> "Manifest":
        """The manifest of what was read from ``path``; ``CacheError`` where no cache has such values."""
        try:
            shards = tuple(Shard(**shard) for shard in content["shards"])
            manifest = cls(**{**content, "shards": shards})
            manifest._check()
        except (KeyError, TypeError) as error:
            raise CacheError(
                f"{path}: not a manifest of a teacher cache ({error}); restore the file or build "
                "the cache again"
            ) from error
        return manifest

    def _check(self) -> None:
        """``TypeError`` where somebody wrote values that no cache has."""
        if not isinstance(self.dtypes, dict) or self.dtypes not in _known_dtypes():
            raise TypeError(f"dtypes: found {self.dtypes!r}")
        places = set(column_places(self.dtypes))
        numbers = {"sentences": 0, "tokens": 0, "vocab_size": 1, "shard_sentences": 1}
        values: list[tuple[str, Any, int | None]] = [
            (name, getattr(self, name), low) for name, low in numbers.items()
        ]
        for shard in self.shards:
            values += [("file", shard.file, None), ("sha256", shard.sha256, None)]
            for name in ("sentences", "tokens", "entries", "bytes", "target_hash_crc"):
                values.append((f"a shard's {name}", getattr(shard, name), 0))
            if not isinstance(shard.layout, dict) or set(shard.layout) != places:
                raise TypeError(f"a shard's layout: found {shard.layout!r}")
            values += [(f"a shard's {name}", place, 0) for name, place in shard.layout.items()]
        values += [(name, getattr(self, name), None) for name in ("split", "dictionary_hash")]
        values += [("dataset_hash", self.dataset_hash, None)]
        for name, value, low in values:
            if low is None:
                wrong = not isinstance(value, str)
            else:
                wrong = type(value) is not int or value < low
            if wrong:
                raise TypeError(f"{name}: found {value!r}")
        if type(self.temperature) not in (int, float) or not self.temperature > 0:
            raise TypeError(f"temperature: found {self.temperature!r}")
        for name in ("truncation", "teacher", "quality", "versions"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"{name}: found {getattr(self, name)!r}")
        if len(self.shards) != -(-self.sentences // self.shard_sentences):
            raise TypeError(f"shards: found {len(self.shards)}")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The content of ``directory/manifest.json``, of any format version.

    Raises
    ------
    CacheError
        None there, or one that was cut or edited.
    """
    path = directory / MANIFEST
    try:
        content, sealed = read_json(path)
    except FileNotFoundError:
        begun = directory.is_dir() and any(directory.iterdir())
        raise CacheError(
            f"{directory}: expected a finished teacher cache ({MANIFEST}), found "
            + (
                "an unfinished build; run its build_cache command again, it goes on where it stopped"
                if begun
                else "none; build it with: python -m sekd_fairseq.build_cache DATA "
                f"--path TEACHER --output CACHE --subset {shlex.quote(directory.name)}"
            )
        ) from None
    except (OSError, DamagedFile) as error:
        raise CacheError(
            f"{path}: not a manifest of a teacher cache ({error}); restore the file or build the "
            "cache again"
        ) from error
    if not sealed:
        raise CacheError(
            f"{path}: not a manifest of a teacher cache (it has no checksum); restore the file or "
            "build the cache again"
        )
    return content


def _known_dtypes() -> list[dict[str, str]]:
    return [
        {name: str(dtype) for name, dtype in payload_dtypes(vocabulary, bits, counts).items()}
        for vocabulary in (2, 2**17)
        for bits in (8, 16)
        for counts in (False, True)
    ]
