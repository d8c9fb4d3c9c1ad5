"""The splits of a fairseq data directory: their files and formats, loading one, batches of its sentences."""

import glob
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fairseq import utils
from fairseq.data import Dictionary, FairseqDataset, data_utils, indexed_dataset
from numpy.typing import NDArray
from torch import Tensor

from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.vocabulary import FILE
from sekd_fairseq.teacher_cache.format import parts_of


def check_splits(data: str, splits: Sequence[str]) -> None:
    """Refuse splits that a data directory (the first of ``a:b``) does not have."""
    folder = Path(utils.split_paths(data)[0])
    if not folder.is_dir():
        raise UserError(f"{data}: expected a fairseq data directory, found none")
    found = {path.name.split(".")[0] for path in folder.glob("*.*-*.*")}
    if missing := [split for split in splits if split not in found]:
        raise UserError(
            f"{data}: expected a binarised split {missing[0]!r}, found {sorted(found) or 'none'}; make "
            "it with fairseq-preprocess or leave it out with --subset"
        )


def languages(data: Path, split: str) -> tuple[str, str]:
    """Source and target language of a binarised split, from its file names."""
    for path in sorted(data.glob(f"{glob.escape(split)}.*-*.*")):
        pair = path.name.removeprefix(f"{split}.").split(".")[0]
        source, _, target = pair.partition("-")
        if stored_as(data, split, source, target, target):
            return source, target
    raise UserError(f"{data}: expected a binarised split {split!r} with targets, found none")


def dictionary_of(data: Path, language: str) -> Dictionary:
    """A data directory's dictionary of a language."""
    return Dictionary.load(str(data / f"dict.{language}.txt"))


def stored_as(
    data: Path | str, split: str, source: str, target: str, language: str
) -> tuple[str, str] | None:
    """Where one side of a split is, without the suffix, and its ``--dataset-impl``; None: nowhere.

    Files of the old format (``lazy``, ``cached``) are ``cached``.
    """
    for pair in (f"{source}-{target}", f"{target}-{source}"):
        path = str(Path(data, f"{split}.{pair}.{language}"))
        if kind := indexed_dataset.infer_dataset_impl(path):
            return path, kind
    return None


def sentences_of(path: str, kind: str, dictionary: Dictionary) -> Any:
    """One side of a split, stored as :func:`stored_as` says, its sentences in any order.

    The old format (``cached``) is read as ``lazy``, which needs no list of sentences beforehand, and counts
    tokens from 1.
    """
    kind = "lazy" if kind == "cached" else kind
    found = indexed_dataset.make_dataset(path, kind, fix_lua_indexing=True, dictionary=dictionary)
    check_places(found)
    return found


def count_sentences(path: str, kind: str, dictionary: Dictionary) -> int:
    """How many sentences one side of a split has; of memory-mapped ones the tokens are not read."""
    if kind == "mmap":
        index = indexed_dataset.index_file_path(path)
        return len(indexed_dataset.MMapIndexedDataset.Index(index))
    return len(sentences_of(path, kind, dictionary))


def check_places(sentences: Any) -> None:
    """Refuse one side of a split, of one part or several, whose file of places is not that of its tokens.

    Where one is cut short, or where several workers of fairseq-preprocess wrote more than 2 GiB without
    the plugin (:func:`~sekd_fairseq.patches.merge_large_files`), other tokens would be read.
    """
    for part in getattr(sentences, "datasets", [sentences]):
        if isinstance(part, indexed_dataset.MMapIndexedDataset) and len(part):
            index = part._index
            end = int(index._pointers[-1]) + int(index.sizes[-1]) * np.dtype(index.dtype).itemsize
            if end != len(part._bin_buffer):
                raise UserError(
                    f"{part._path}.idx: expected sentences up to the end of {part._path}.bin, "
                    f"{len(part._bin_buffer)} bytes, found the last to end at {end}; binarise again, more than "
                    "2 GiB with fairseq-preprocess --user-dir sekd_fairseq or with --workers 1"
                )


def side_of(
    data: Path, split: str, language_pair: tuple[str, str], side: str, dictionary: Dictionary
) -> Any:
    """One side of a split; ``UserError`` where it is not there, or raw text."""
    stored = stored_as(data, split, *language_pair, side)
    if stored is None or stored[1] in ("raw", "huffman"):
        raise UserError(
            f"{data}: expected the {side} side of {split} binarised (--dataset-impl mmap, lazy or cached), "
            f"found {'none' if stored is None else stored[1]}"
        )
    return sentences_of(*stored, dictionary)


def training_side(data: Path, language: str) -> Any:
    """One side of the training set, as fairseq's indexed dataset."""
    return side_of(data, "train", languages(data, "train"), language, dictionary_of(data, language))


def link_others(data: Path, folder: Path, written: Sequence[str]) -> None:
    """Link all that a data directory holds but the sides of splits that are written anew, by the names of
    their files without suffix."""
    for path in data.iterdir():
        if path.name not in written and path.stem not in written:
            (folder / path.name).symlink_to(path.resolve())


def write_indexed(path: Path, kind: str, sentences: Iterable[Tensor], vocab_size: int) -> None:
    """Write one side of a split, PATH.bin and PATH.idx, in one of fairseq's formats."""
    builder: Any = indexed_dataset.make_builder(f"{path}.bin", kind, vocab_size=vocab_size)
    for sentence in sentences:
        builder.add_item(sentence)
    builder.finalize(f"{path}.idx")


@contextmanager
def readable(config: Any, data: str, split: str) -> Iterator[None]:
    """Within, a translation task's configuration lets fairseq read the format of a split's files.

    The one that is configured may be that of other data, of those that a teacher was trained on.

    Raises
    ------
    UserError
        There is no such split, or it has a language model's prompts from target to source.
    """
    source, target = config.source_lang, config.target_lang
    found = stored_as(data, split, source, target, source)
    if found is None:
        check_splits(data, [split])
        raise UserError(
            f"{data}: expected split {split!r} in {source}-{target}, found "
            "other languages; give --source-lang and --target-lang"
        )
    if Path(found[0]).name.startswith(f"{split}.{target}-{source}.") and Path(data, FILE).is_file():
        raise UserError(
            f"{data}: expected data from {source} to {target}, found prompts from {target} to {source}; "
            "make data of the other direction with: python -m sekd_fairseq.prepare_llm_data --source-lang "
            f"{source} --target-lang {target}"
        )
    # fairseq finds out the others by itself, part by part.
    before, config.dataset_impl = config.dataset_impl, "raw" if found[1] == "raw" else None
    try:
        yield
    finally:
        config.dataset_impl = before


def read_whole(dataset: Any) -> None:
    """Make sure that every sentence of a split can be had, in any order and by every loader worker: of
    the old format all are read into memory, because workers would move each other's place in a file that
    they share; memory-mapped ones are where they are said to be (:func:`check_places`)."""
    for sentences in (dataset.src, dataset.tgt):
        check_places(sentences)
    if dataset.supports_prefetch:
        dataset.prefetch(range(len(dataset)))


def train_targets(task: Any) -> Iterator[list[FairseqDataset]]:
    """Of every data directory of a task the targets of its parts (``train``, ``train1``, ...)."""
    config = task.cfg
    for data in utils.split_paths(config.data):
        parts = []
        for name in parts_of("train"):
            found = stored_as(
                data, name, config.source_lang, config.target_lang, config.target_lang
            )
            if found is None:
                break
            parts.append(sentences_of(*found, task.target_dictionary))
        yield parts


def training_part(sentences: int, wanted: int) -> NDArray[np.int64]:
    """The numbers of the sentences, of so many, that ``--train-sentences`` takes; the smaller part is within
    the larger one."""
    return np.random.default_rng(0).permutation(sentences)[:wanted]


def load_split(task: Any, split: str, data: str) -> FairseqDataset:
    """Load one split of the task's data; ``UserError`` if it is not there."""
    with readable(task.cfg, utils.split_paths(data)[0], split):
        task.load_dataset(split)
    dataset = task.dataset(split)
    read_whole(dataset)
    return dataset


def token_batches(dataset: FairseqDataset, sentences: Any, max_tokens: int) -> list[list[int]]:
    """Batches of sentences of similar length, at most ``max_tokens`` padded tokens per side, of a
    language model's data at most so many positions of prompt and translation together."""
    indices = np.asarray(sentences, dtype=np.int64)
    sizes = dataset.sizes[indices]  # (n, 2): source, target
    together = getattr(dataset, "one_row", False)
    indices = indices[np.lexsort((sizes[:, 0], sizes.sum(axis=1) if together else sizes[:, 1]))]
    lengths = dataset.num_tokens_vec(indices).astype(np.int64)
    longest = int(lengths.max()) if len(lengths) else 0
    batches = data_utils.batch_by_size(
        indices,
        num_tokens_fn=None,
        num_tokens_vec=lengths,
        max_tokens=max(max_tokens, longest),
        required_batch_size_multiple=1,
    )
    return [list(batch) for batch in batches]


def too_long(
    dataset: FairseqDataset,
    limits_of_models: Sequence[tuple[float, ...]],
    split: str,
    allow: bool = False,
) -> frozenset[int]:
    """Sentences longer than a model's positions; ``UserError`` names the first unless allowed."""
    found: set[int] = set()
    lengths = np.column_stack([dataset.sizes, dataset.sizes.sum(axis=1)])
    for limits in limits_of_models:
        lines = np.flatnonzero((lengths > np.array(limits)).any(axis=1))
        if len(lines) and not allow:
            source, target = dataset.sizes[lines[0]]
            raise UserError(
                f"{split} line {lines[0] + 1}: {source} source and {target} target tokens, "
                f"but the model takes {limits[0]} and {limits[1]}, together {limits[2]} "
                f"({len(lines)} such lines); remove or split them and binarise again"
            )
        found.update(lines.tolist())
    return frozenset(found)
