"""Training sets of gold and generated pairs, as parts that fairseq combines (``train``, ``train1``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fairseq.data import indexed_dataset
from numpy.typing import NDArray
from torch import Tensor

from sekd_fairseq.splits import dictionary_of, languages, side_of


def training_side(data: Path, language: str) -> Any:
    """One side of the training set, as fairseq's indexed dataset."""
    return side_of(data, "train", languages(data, "train"), language, dictionary_of(data, language))


def link_data(data: Path, folder: Path, *splits: str) -> None:
    """Link what a data directory holds, but of training sets only those named."""
    for path in data.iterdir():
        split = path.name.split(".")[0]
        if not split.startswith("train") or split in splits:
            (folder / path.name).symlink_to(path.resolve())


def write_part(
    data: Path,
    folder: Path,
    split: str,
    chosen: NDArray[np.int64],
    targets: Sequence[Tensor] | None = None,
) -> None:
    """Write sentences of the training set as a split, with their own targets or with others."""
    source, target = languages(data, "train")
    for language in (source, target):
        sentences = training_side(data, language)
        rows = [sentences[int(i)] for i in chosen]
        if language == target and targets is not None:
            rows = list(targets)
        path = folder / f"{split}.{source}-{target}.{language}"
        write_indexed(path, "mmap", rows, len(dictionary_of(data, language)))


def write_indexed(path: Path, kind: str, sentences: Sequence[Tensor], vocab_size: int) -> None:
    """Write PATH.bin and PATH.idx in one of fairseq's formats."""
    builder: Any = indexed_dataset.make_builder(f"{path}.bin", kind, vocab_size=vocab_size)
    for sentence in sentences:
        builder.add_item(sentence)
    builder.finalize(f"{path}.idx")
