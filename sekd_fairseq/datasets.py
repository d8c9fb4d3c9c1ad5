"""The dataset that carries teacher distributions beside each batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import (
    BaseWrapperDataset,
    ConcatDataset,
    FairseqDataset,
    LanguagePairDataset,
    data_utils,
)
from fairseq.data.indexed_dataset import MMapIndexedDataset
from numpy.typing import NDArray
from torch import Tensor

from analysis.runs.token_records import read_columns, read_token_set
from sekd_fairseq.errors import CacheError, UserError
from sekd_fairseq.losses import TeacherTokens
from sekd_fairseq.teacher_cache import TeacherCache, hash_targets

#: Sentences hashed at a time when a dataset is checked.
HASH_CHUNK = 8192
#: The least mass that probabilities near 1 are said to lack of it: half the distance of float32 numbers
#: there. By rounding it is 0 at tokens that a teacher is sure of, where KL(q || p) would be infinite.
LEAST_REST = 2.0**-24


def target_hashes(targets: FairseqDataset, pad: int) -> NDArray[np.uint64]:
    """Hash of every sentence of a target dataset, (n,) uint64 (see ``hash_targets``)."""
    hashes = [np.zeros(0, np.uint64)]
    for start in range(0, len(targets), HASH_CHUNK):
        end = min(start + HASH_CHUNK, len(targets))
        tokens, lengths = mapped(targets, start, end)
        if tokens is None or (tokens == pad).any():
            rows = [targets[i] for i in range(start, end)]
            rows = [row[row.ne(pad)] for row in rows]
            tokens, lengths = torch.cat(rows).numpy(), np.array([len(row) for row in rows])
        hashes.append(hash_targets(tokens, lengths))
    return np.concatenate(hashes)


def mapped(
    targets: FairseqDataset, start: int, end: int
) -> tuple[NDArray[np.integer] | None, NDArray[np.int64]]:
    """Tokens of sentences ``start`` to ``end``, one after the other as they lie in a memory-mapped file
    (``--dataset-impl mmap``; None where there is none), and their lengths."""
    if not isinstance(targets, MMapIndexedDataset):
        return None, np.zeros(0, np.int64)
    index = targets._index
    lengths = index.sizes[start:end].astype(np.int64)
    place = index._pointers[start]
    return np.frombuffer(targets._bin_buffer, index.dtype, int(lengths.sum()), place), lengths


class StableOrderDataset(BaseWrapperDataset):
    """A :class:`LanguagePairDataset` that makes the same batches in every epoch and process.

    fairseq draws the order of sentences of one length with ``seed + epoch`` when it first builds
    batches, and keeps the batches for later epochs; a training that resumes in epoch 5 would build
    others, and not end as one that was never stopped. Here the draw is always that of epoch 1, so that
    a training has the batches that fairseq's own task gives it. Their order still changes with the epoch.

    A language model reads prompt and translation as one row: with ``one_row`` sentences are ordered
    and batches are cut (``--max-tokens``) by the length of both together, so that little of a batch
    is padding, and batches hold

    - ``net_input["longest"]`` (int): positions of the longest row, for the model
    - ``net_input["beginning"]`` (int64 array, (n,)): the tokens that all prompts begin with, but for the
      last of the shortest, whose output predicts the translation's first
    - ``positions`` ((int, int)): positions that the model computes, and those of them that are padding
    """

    def __init__(
        self, dataset: "LanguagePairDataset | StableOrderDataset", one_row: bool = False
    ) -> None:
        super().__init__(dataset.dataset if isinstance(dataset, StableOrderDataset) else dataset)
        self.seed = 1
        #: Of the batches that are cut next, if they have a limit.
        self.max_tokens: int | None = None
        self.one_row = one_row

    @property
    def src(self) -> FairseqDataset:
        """Source sentences."""
        return self.dataset.src

    @property
    def tgt(self) -> FairseqDataset:
        """Target sentences."""
        return self.dataset.tgt

    def ordered_indices(self) -> NDArray[np.int64]:
        """Sentence numbers by length, ties drawn with :attr:`seed` as fairseq does in epoch 1."""
        with data_utils.numpy_seed(self.seed + 1):
            indices = self.dataset.ordered_indices()
        if self.one_row:
            indices = indices[np.argsort(self.num_tokens_vec(indices), kind="stable")]
        return indices

    def num_tokens(self, index: int) -> int:
        """What a sentence adds to a batch's ``--max-tokens``."""
        return int(self.num_tokens_vec(np.array([index]))[0])

    def num_tokens_vec(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """:meth:`num_tokens` of several sentences."""
        if not self.one_row:
            return self.dataset.num_tokens_vec(indices)
        return row_lengths(self.dataset.sizes[indices])

    def batch_by_size(self, indices: NDArray[np.int64], **limits: Any) -> Any:
        """Cut batches by :meth:`num_tokens`."""
        if not self.one_row:
            return self.dataset.batch_by_size(indices, **limits)
        return FairseqDataset.batch_by_size(self, indices, **limits)

    def collater(self, samples: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """Collate as the wrapped dataset does; of rows, say how long they are."""
        batch = self.dataset.collater(samples, **options)
        if batch and self.one_row:
            sides = [[sample["source"], sample.get("target")] for sample in samples]
            sizes = [[len(side) for side in pair if side is not None] for pair in sides]
            lengths = row_lengths(np.array(sizes))
            longest = int(lengths.max())
            batch["net_input"]["longest"] = longest
            shortest = min(size[0] for size in sizes) - 1  # without the end of the source
            prompts = np.stack([sample["source"][:shortest].numpy() for sample in samples])
            batch["net_input"]["beginning"] = common_beginning(prompts, shortest - 1)
            positions = longest * len(samples)
            batch["positions"] = (positions, positions - int(lengths.sum()))
        return batch


def common_beginning(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """What all rows (B, L) begin with, at most so many tokens."""
    starts = rows[:, : max(most, 0)]
    return starts[0, : int((starts == starts[0]).all(axis=0).cumprod().sum())]


def row_lengths(sizes: NDArray[Any]) -> NDArray[np.int64]:
    """Tokens that a language model reads of sentences with these sizes; (n, 2), or (n,) without
    targets. The end of the source is not part of the prompt, and that of the translation not read."""
    columns = sizes if sizes.ndim == 2 else sizes[:, np.newaxis]
    return (columns.astype(np.int64) - 1).sum(axis=1)


class StoredDifficulty:
    """Difficulty of every target token of a split, from a pass of ``score`` over it.

    Parameters
    ----------
    path
        Token records, ``tokens/<split>/<updates>.parquet`` of a run.

    Raises
    ------
    UserError
        No such file, or no token records.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(
                f"--stored-difficulty: expected token records, found no file at {path}; write them "
                "with: python -m sekd_fairseq.score DATA --subset train --path STUDENT "
                "--teacher-cache CACHE --run RUN"
            )
        try:
            records = read_token_set(path)
            self.values = read_columns(path, ["kl"])["kl"].astype(np.float32)  # nats
        except UserError as error:
            raise UserError(
                f"--stored-difficulty: {path} holds no token records that can be used ({error})"
            ) from error
        self.path = path
        self.cache_fingerprint = records.teacher
        self.lengths = np.bincount(records.sentences[records.sentence])
        self.hashes = hash_targets(records.token, self.lengths)
        self.ends = self.lengths.cumsum()

    def check_targets(self, hashes: NDArray[np.uint64], where: str) -> None:
        """Refuse records of other target sentences (:func:`target_hashes`)."""
        if not np.array_equal(self.hashes, hashes):
            raise UserError(
                f"--stored-difficulty: {self.path} has {len(self.hashes)} sentences that are not the "
                f"{len(hashes)} of {where}; run python -m sekd_fairseq.score on this split"
            )

    def check_teacher(self, cache: TeacherCache) -> None:
        """Refuse difficulty that was measured against another teacher's distributions."""
        if self.cache_fingerprint != cache.manifest.fingerprint:
            raise UserError(
                f"--stored-difficulty: {self.path} was scored with the teacher cache "
                f"{self.cache_fingerprint or 'of no name'}, expected "
                f"{cache.manifest.fingerprint} ({cache.directory}); run python -m "
                "sekd_fairseq.score with this one"
            )

    def __getitem__(self, sentence: int) -> NDArray[np.float32]:
        """Difficulty of a sentence's tokens, nats."""
        end = self.ends[sentence]
        return self.values[end - self.lengths[sentence] : end]


class TeacherDataset(StableOrderDataset):
    """A :class:`LanguagePairDataset` whose batches hold ``batch["teacher"]``.

    The entries of ``batch["teacher"]`` belong to the target tokens of the batch that are not
    padding, ``N`` in all, sentence after sentence in the batch's order; ``K`` is the largest
    support among them:

    - ``ids`` (LongTensor, ``(N, K)``): support tokens, the reference first; unused slots repeat it
    - ``size`` (LongTensor, ``(N,)``): how many slots are used
    - ``log_p`` (HalfTensor, ``(N, K)``): teacher's log-probabilities as stored
    - ``gold_log_p``, ``outside_mass`` (DoubleTensor, ``(N,)``): double, because fairseq casts
      every float32 tensor of a batch to half under ``--fp16``; the mass is at least
      :data:`LEAST_REST` where it is what the known tokens lack of 1 (``Manifest.outside_is_rest``)
      and not all tokens are known

    - ``temperature`` (float): the softmax temperature that they are at

    and, of a sampled cache, ``draws`` (IntTensor, ``(N, K)``) and ``samples`` (LongTensor, ``(N,)``).
    :func:`teacher_tokens` makes of it what the losses take. Beside it batches hold
    ``target_positions`` (LongTensor, ``(N,)``): the tokens' places in the flattened target, ascending;
    found here, because a GPU would have to be waited for.

    Parameters
    ----------
    dataset
        The sentences, with targets.
    caches
        One cache for each part that ``dataset`` is combined of (``train``, ``train1``, ...).
    where
        The data's name in messages.
    difficulty
        One for each part, or None; then batches also hold ``difficulty`` (DoubleTensor,
        ``(N,)``, nats).

    Raises
    ------
    CacheError
        The caches were not built from these target sentences.
    UserError
        Nor was the stored difficulty, or it was scored with another cache.
    """

    def __init__(
        self,
        dataset: "LanguagePairDataset | StableOrderDataset",
        caches: list[TeacherCache],
        where: str,
        difficulty: list[StoredDifficulty] | None = None,
    ) -> None:
        super().__init__(dataset, getattr(dataset, "one_row", False))
        self.caches = caches
        self.difficulty = difficulty
        self.pad = self.dataset.tgt_dict.pad()
        parts = [self.tgt]
        self._locate: Callable[[int], tuple[int, int]] = only_part
        if isinstance(self.tgt, ConcatDataset):
            parts = self.tgt.datasets
            self._locate = self.tgt._get_dataset_and_sample_index
        if len(parts) != len(caches):
            raise CacheError(
                f"{where}: expected a teacher cache for each of its {len(parts)} parts, found "
                f"{len(caches)}; build the missing ones with --subset"
            )
        rules = {"samples" in cache.manifest.truncation for cache in caches}
        if len(rules) > 1:
            raise CacheError(
                f"{where}: expected all caches of it to be sampled or none, found some of each; "
                "build them with the same options"
            )
        self.temperature = caches[0].manifest.temperature
        for cache in caches:
            self.check_temperature(cache)
        for index, (part, cache) in enumerate(zip(parts, caches, strict=True)):
            hashes = target_hashes(part, self.pad)
            cache.check_targets(hashes, where)
            if difficulty is not None:
                difficulty[index].check_targets(hashes, where)
                difficulty[index].check_teacher(cache)

    def check_temperature(self, cache: TeacherCache) -> None:
        """Refuse a cache, of this or of another split of a training, at another temperature."""
        if (found := cache.manifest.temperature) != self.temperature:
            raise CacheError(
                f"{cache.directory}: expected temperature {self.temperature:g}, as of "
                f"{self.caches[0].directory}, found {found:g}; build both with the same --temperature"
            )

    def collater(self, samples: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """Collate as the wrapped dataset does, then add ``teacher`` (class docstring)."""
        batch = super().collater(samples, **options)
        if batch:
            mask = batch["target"].ne(self.pad)
            batch["teacher"] = self._teacher(batch["id"], batch["target"], mask)
            batch["target_positions"] = mask.view(-1).nonzero().squeeze(1)
        return batch

    def _teacher(self, ids: Tensor, target: Tensor, mask: Tensor) -> dict[str, Any]:
        places = [self._locate(sentence) for sentence in ids.tolist()]
        sentences = [self.caches[part][index] for part, index in places]
        # The collater has reordered the batch; a sentence that strayed from its target is caught here.
        tokens = target[mask]
        hashes = hash_targets(tokens.numpy(), mask.sum(dim=1).numpy())
        if not np.array_equal(hashes, np.array([one.target_hash for one in sentences], np.uint64)):
            raise CacheError(
                "teacher distributions do not belong to the targets of their batch; the dataset changes "
                "its targets after loading, which a teacher cache cannot follow"
            )
        size = np.concatenate([one.support_size for one in sentences]).astype(np.int64)
        width = int(size.max())
        slots = np.arange(width) < size[:, None]  # (N, K)
        log_p = np.full(slots.shape, -np.inf, np.float16)
        log_p[slots] = np.concatenate([one.logprob for one in sentences])
        token_ids = np.repeat(tokens.numpy()[:, None], width, axis=1)
        token_ids[slots] = np.concatenate([one.token_id for one in sentences])
        gold = np.concatenate([one.gold_logprob for one in sentences]).astype(np.float64)
        outside = np.concatenate([one.outside_mass for one in sentences]).astype(np.float64)
        rests = [self.caches[part].manifest.outside_is_rest for part, _ in places]
        rest = np.repeat(np.array(rests), mask.sum(dim=1).numpy())
        partly_known = rest & (size < len(self.dataset.tgt_dict))
        outside[partly_known] = outside[partly_known].clip(min=LEAST_REST)
        entry: dict[str, Any] = {
            "ids": torch.from_numpy(token_ids),
            "size": torch.from_numpy(size),
            "log_p": torch.from_numpy(log_p),
            "gold_log_p": torch.from_numpy(gold),
            "outside_mass": torch.from_numpy(outside),
            "temperature": self.temperature,
        }
        if "samples" in self.caches[0].manifest.truncation:
            counts = np.zeros(slots.shape, np.int32)
            counts[slots] = np.concatenate([one.draws for one in sentences])
            entry["draws"] = torch.from_numpy(counts)
            samples = [self.caches[part].manifest.truncation["samples"] for part, _ in places]
            entry["samples"] = torch.from_numpy(
                np.repeat(np.array(samples), mask.sum(dim=1).numpy())
            )
        if self.difficulty is not None:
            stored = [self.difficulty[part][index] for part, index in places]
            entry["difficulty"] = torch.from_numpy(np.concatenate(stored).astype(np.float64))
        return entry


def only_part(index: int) -> tuple[int, int]:
    """Part and row of a sentence in a dataset of one part."""
    return 0, index


def teacher_tokens(entry: dict[str, Any]) -> TeacherTokens:
    """What the losses take of ``batch["teacher"]``, in float32, on its device.

    A batch is a dictionary of tensors on its way, because fairseq moves and casts no other things.
    """
    slots = torch.arange(entry["ids"].size(1), device=entry["ids"].device)
    log_p = entry["log_p"].to(torch.float32, copy=True)
    log_p[:, 0] = entry["gold_log_p"].float()
    log_weight = None
    if "draws" in entry:
        log_weight = (entry["draws"] / entry["samples"].unsqueeze(1)).log().float()
    return TeacherTokens(
        ids=entry["ids"],
        valid=slots < entry["size"].unsqueeze(1),
        log_p=log_p,
        log_outside=entry["outside_mass"].log().float(),
        log_weight=log_weight,
        temperature=entry["temperature"],
        difficulty=entry.get("difficulty"),
    )
