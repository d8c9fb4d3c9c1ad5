"""Training sets of gold and generated pairs, as parts that fairseq combines (``train``, ``train1``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fairseq.data import Dictionary
from numpy.typing import NDArray
from torch import Tensor

from analysis.runs.texts import read_lines
from sekd_fairseq.distilled_data import (
    against_reference,
    encode,
    readers,
    repeats,
    side_of,
    translations,
    write_indexed,
)
from sekd_fairseq.errors import UserError
from sekd_fairseq.splits import languages


def training_side(data: Path, language: str) -> Any:
    """One side of the training set, as fairseq's indexed dataset."""
    return side_of(data, "train", languages(data, "train"), language, dictionary_of(data, language))


def dictionary_of(data: Path, language: str) -> Dictionary:
    """A data directory's dictionary of a language."""
    return Dictionary.load(str(data / f"dict.{language}.txt"))


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


def with_an_end(targets: Sequence[Tensor], data: Path) -> NDArray[np.bool_]:
    """Which translations of the training set of ``data`` do not repeat themselves without end."""
    references = training_side(data, languages(data, "train")[1])
    return ~np.array([repeats(*pair) for pair in zip(targets, references, strict=True)])


def nearest_to_references(generated: Path, data: Path) -> tuple[list[Tensor], int]:
    """Of each training sentence's translations the one nearest to its reference, by chrF.

    Parameters
    ----------
    generated
        What fairseq-generate printed of the training set of ``data``, in pieces.

    Returns
    -------
    tuple
        Token ids of each sentence's translation, and for how many it is not the model's best.

    Raises
    ------
    UserError
        A sentence has no translation.
    """
    target = languages(data, "train")[1]
    dictionary, references = dictionary_of(data, target), training_side(data, target)
    read, cut = readers(data, dictionary)
    found = translations(read_lines(generated))
    if missing := sorted(set(range(len(references))) - set(found)):
        raise UserError(
            f"{generated}: expected {len(references)} translations, found none of sentence "
            f"{missing[0]}; delete the file and translate again"
        )
    targets, changed = [], 0
    for sentence, reference in enumerate(references):
        texts = [cut(text) for text in found[sentence]]
        scores = against_reference(
            [read(text) for text in texts], read(dictionary.string(reference))
        )
        best = int(np.argmax(scores))  # of equals the model's best
        changed += best > 0
        targets.append(encode(texts[best], dictionary, generated, sentence))
    return targets, changed
