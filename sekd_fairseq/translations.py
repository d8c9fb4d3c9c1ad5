"""Translations in pieces: compared by chrF, the nearest chosen, endless ones found, and made tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from fairseq.data import Dictionary
from numpy.typing import NDArray
from sacrebleu.metrics import CHRF

from sekd_fairseq.errors import UserError
from sekd_fairseq.generated import read_nbest
from sekd_fairseq.llm.text import LanguageModelText
from sekd_fairseq.llm.vocabulary import FILE
from sekd_fairseq.splits import dictionary_of, languages, training_side

#: Tokens that a translation may be longer than twice its reference, or its source.
SLACK = 10


def readers(
    data: Path, dictionary: Dictionary
) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """What makes of pieces the text that chrF compares, and of a model's the translation alone.

    chrF leaves out spaces, so pieces are their text whatever cut them; but not a language model's symbols,
    and it may go on after the translation.
    """
    if not (data / FILE).is_file():
        return str, str
    text = LanguageModelText(data, dictionary)
    return text.decode, text.translation


def encode(line: str, dictionary: Dictionary, path: Path, sentence: int) -> torch.Tensor:
    """Token ids of a translation's pieces, end of sentence included; int32."""
    pieces = line.split()
    unknown = [piece for piece in pieces if piece not in dictionary.indices]
    if unknown:
        raise UserError(
            f"{path}: sentence {sentence} has {unknown[0]!r}, which is no symbol of the "
            "dictionary; expected pieces as the model makes them: run fairseq-generate without "
            "--remove-bpe and with this data directory, or give --sentencepiece-model"
        )
    return torch.tensor(
        [*(dictionary.index(piece) for piece in pieces), dictionary.eos()], dtype=torch.int32
    )


def repeats(target: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a translation has a length that none has beside its reference, or its source: more than
    twice its tokens and :data:`SLACK`, as of a model that repeats itself without end."""
    return len(target) > 2 * len(other) + SLACK


def with_an_end(targets: Sequence[torch.Tensor], data: Path) -> NDArray[np.bool_]:
    """Which translations of the training set of ``data`` do not repeat themselves without end."""
    references = training_side(data, languages(data, "train")[1])
    return ~np.array([repeats(*pair) for pair in zip(targets, references, strict=True)])


def nearest_to_references(generated: Path, data: Path) -> tuple[list[torch.Tensor], int]:
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
    found = read_nbest(generated, "H-", len(references))
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


def joined_chrf(pieces: str, other: str) -> float:
    """chrF of a translation against another text, both in pieces (:func:`readers`); the marks of
    SentencePiece and subword-nmt are no characters of theirs."""
    texts = (
        f"{text} ".replace("@@ ", "").replace(" ", "").replace("▁", "") for text in (pieces, other)
    )
    return float(CHRF().sentence_score(next(texts), [next(texts)]).score)


def against_reference(texts: Sequence[str], reference: str) -> list[float]:
    """chrF of each translation; a single one need not be compared."""
    return [joined_chrf(text, reference) for text in texts] if len(texts) > 1 else [0.0]


def mean_chrf(texts: Sequence[str]) -> list[float]:
    """Of each translation the mean chrF against the others, as references: its expected utility where
    each is as likely (Kumar and Byrne, 2004)."""
    return [
        float(
            np.mean([joined_chrf(text, other) for j, other in enumerate(texts) if j != i] or [0.0])
        )
        for i, text in enumerate(texts)
    ]
