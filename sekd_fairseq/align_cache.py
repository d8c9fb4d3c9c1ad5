"""Bring a teacher's cache to the tokens of a student with another tokenizer.

    python -m sekd_fairseq.align_cache CACHE --data TEACHER_DATA --student-data DATA --output ALIGNED

CACHE holds the teacher over its own tokens, of TEACHER_DATA; DATA has the same sentences in the
student's tokens.  Written is an ordinary cache over these (:mod:`sekd_fairseq.teachers.alignment` says
how a distribution is carried over).  Sentences that are not one text in both get the reference alone,
as those too long for a teacher do; how many, and how tokens were matched, is printed.  Several
processes share the work with ``--num-shards`` and ``--shard-id``, and an interrupted one resumes.
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.terminal import progress
from sekd_fairseq.datasets import target_hashes
from sekd_fairseq.errors import CacheError, UserError, one_line_errors
from sekd_fairseq.llm.tokenizer import Tokenizer, byte_piece, load_tokenizer
from sekd_fairseq.llm.vocabulary import FILE, NEW_ROW, TOKENIZER, Vocabulary
from sekd_fairseq.plugin import quiet_fairseq
from sekd_fairseq.splits import dictionary_of, languages, sentences_of, stored_as
from sekd_fairseq.teacher_cache.description import describe
from sekd_fairseq.teacher_cache.format import hash_symbols, payload_dtypes, shard_name
from sekd_fairseq.teacher_cache.reader import CachedSentence, TeacherCache
from sekd_fairseq.teacher_cache.storage import split_directories
from sekd_fairseq.teacher_cache.writer import SentenceColumns, write_shard
from sekd_fairseq.teachers.alignment import END, Known, Pieces, Reader, carry_over, spans
from sekd_fairseq.teachers.caching import Part, add_part, begin, finish, finished, hash_of
from sekd_fairseq.teachers.truncation import Truncation, best_columns, reference_alone

#: The least log-probability that is no zero as a product of parts.
LEAST = -600.0
#: Sentences, of all of a split, from which it is found how many tokens carry a teacher.
LOOKED_AT = 2000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.align_cache",
        description="Carry a teacher's cache over to the tokens of a student with another tokenizer.",
    )
    out.add_argument(
        "cache",
        metavar="CACHE",
        help="the teacher's cache, or one split's, or its address (s3://...)",
    )
    out.add_argument("--data", required=True, metavar="DATA", help="the data it was built from")
    out.add_argument(
        "--student-data", required=True, metavar="DATA", help="the same sentences, for the student"
    )
    out.add_argument("--output", required=True, type=Path, metavar="CACHE", help="cache directory")
    out.add_argument(
        "--min-share",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="refuse where fewer of the student's tokens than this carry a teacher (default: %(default)s)",
    )
    out.add_argument(
        "--allow-implausible",
        action="store_true",
        help="finish a cache whose teacher is worse than the references' unigram frequencies",
    )
    add_part(out)
    return out


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Align the cache of each split."""
    args = parser().parse_args(argv)
    quiet_fairseq()
    if not 0 <= args.min_share <= 1:
        raise UserError(f"--min-share: expected 0 to 1, found {args.min_share}")
    part = Part.of(args)
    for directory in split_directories(args.cache):
        cache = TeacherCache.open(directory)
        split = cache.manifest.split
        teacher, student = (Side.open(data, split) for data in (args.data, args.student_data))
        aligned = align(
            cache,
            teacher,
            student,
            args.output / split,
            args.min_share,
            part,
            args.allow_implausible,
        )
        if aligned is not None:
            print(describe(aligned.directory, aligned.manifest), flush=True)


@dataclass
class Side:
    """The target side of one split.

    Attributes
    ----------
    symbols, pieces
        The dictionary, and the text of each of its symbols.
    sentences
        Token ids by sentence, the end included.
    hashes
        Of each sentence's ids (:func:`~sekd_fairseq.datasets.target_hashes`).
    """

    where: str
    symbols: list[str]
    pieces: Pieces
    sentences: Any
    hashes: NDArray[np.uint64]

    @classmethod
    def open(cls, data: str, split: str) -> "Side":
        """Read it; ``UserError`` where it is not there."""
        folder = Path(data)
        source, target = languages(folder, split)
        dictionary = dictionary_of(folder, target)
        stored = stored_as(folder, split, source, target, target)
        assert stored is not None  # languages() has seen it
        sentences = sentences_of(*stored, dictionary)
        hashes = target_hashes(sentences, dictionary.pad())
        pieces = pieces_of(folder, dictionary.symbols)
        return cls(f"{split} ({data})", dictionary.symbols, pieces, sentences, hashes)

    def texts(self, sentence: int) -> list[bytes | None]:
        """The text of each of a sentence's tokens."""
        return [self.pieces.text[token] for token in self.sentences[sentence].tolist()]


def pieces_of(folder: Path, symbols: Sequence[str]) -> Pieces:
    """The texts of a dictionary's symbols: pieces of SentencePiece, or tokens of a language model."""
    special = 4  # <s>, <pad>, </s>, <unk>
    if (folder / FILE).is_file():
        tokenizer = load_tokenizer(str(folder / TOKENIZER))
        rows = Vocabulary.load(folder, symbols).rows
        names = ["" if row == NEW_ROW else tokenizer.pieces[row] for row in rows]
        controls = set(tokenizer.controls.values())
        text = text_of(tokenizer)
        found = [
            None if symbol < special or row in controls else text(names[symbol])
            for symbol, row in enumerate(rows)
        ]
    else:
        if not any(symbol.startswith("▁") for symbol in symbols):
            raise UserError(
                f"{folder}: expected a dictionary of SentencePiece's pieces (▁ for a space) or data of a "
                "language model, found another; prepare the data with python -m sekd_fairseq.prepare_data"
            )
        names = list(symbols)
        found = [
            None if i < special or name.startswith("madeupword") else piece_text(name)
            for i, name in enumerate(names)
        ]
    found[2] = END
    bytes_alone = {byte_piece(byte) for byte in range(256)}
    return Pieces(found, frozenset(i for i, name in enumerate(names) if name in bytes_alone))


def piece_text(piece: str) -> bytes:
    """What a SentencePiece piece says."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def text_of(tokenizer: Tokenizer) -> Any:
    """What turns a tokenizer's pieces into bytes."""
    if byte_piece(0) in tokenizer.pieces or not any("Ġ" in piece for piece in tokenizer.pieces):
        return piece_text
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def text(piece: str) -> bytes | None:
        known = [byte_of.get(character) for character in piece]
        return None if None in known else bytes(byte for byte in known if byte is not None)

    return text


def align(
    cache: TeacherCache,
    teacher: Side,
    student: Side,
    directory: Path,
    min_share: float,
    part: Part,
    allow_implausible: bool,
) -> TeacherCache | None:
    """Write a part of the aligned cache of one split; finished shards are kept.

    Returns
    -------
    The aligned cache; None while other parts have to finish.

    Raises
    ------
    CacheError
        The cache is not of these data, or sampled, or at another temperature than 1; or too few tokens
        carry a teacher; or ``directory`` holds what was aligned from another cache.
    """
    manifest = cache.manifest
    cache.check_dictionary(teacher.symbols)
    cache.check_targets(teacher.hashes, teacher.where)
    if len(student.sentences) != len(cache):
        raise CacheError(
            f"{student.where}: expected the {len(cache)} sentences of {cache.directory}, found "
            f"{len(student.sentences)}; prepare both data from the same text"
        )
    if "samples" in manifest.truncation or manifest.temperature != 1.0:
        raise CacheError(
            f"{cache.directory}: expected the teacher's best tokens at temperature 1, found another cache; "
            "build it with --top-k or --top-p"
        )
    looked_at = np.unique(np.linspace(0, len(cache) - 1, min(len(cache), LOOKED_AT)).astype(int))
    share, ways = matched(teacher, student, looked_at)
    of = "" if len(looked_at) == len(cache) else f" (of {len(looked_at):,} sentences)"
    print(
        f"{directory}: {share:.2%} of the student's tokens{of} carry a teacher; {ways}", flush=True
    )
    if share < min_share:
        raise CacheError(
            f"{directory}: {share:.2%} of the student's tokens carry a teacher, expected {min_share:.0%} "
            "(--min-share): the two data are not the same text, or are normalised otherwise; prepare "
            "both from the same files, or distil the teacher's translations (python -m "
            "sekd_fairseq.distilled_data)"
        )
    dtypes = payload_dtypes(
        len(student.symbols), 8 if manifest.dtypes["logprob"] == "uint8" else 16
    )
    settings = {
        "split": manifest.split,
        "vocab_size": len(student.symbols),
        "dictionary_hash": hash_symbols(student.symbols),
        "dataset_hash": hash_of(student.hashes),
        "sentences": len(cache),
        "shard_sentences": manifest.shard_sentences,
        "temperature": 1.0,
        "truncation": manifest.truncation,
        "teacher": {**manifest.teacher, "aligned_from": manifest.fingerprint},
    }
    if done := finished(directory, settings, dtypes):
        return done
    begin(directory, settings, dtypes)
    truncation = Truncation(**manifest.truncation)
    reader = Reader(teacher.pieces, student.pieces)
    for index in progress(part.shards(settings), desc=f"align {manifest.split}", unit="shard"):
        if (directory / shard_name(index)).exists():
            continue
        sentences = range(len(cache))[index * manifest.shard_sentences :][
            : manifest.shard_sentences
        ]
        rows = []
        for sentence in sentences:
            tokens = student.sentences[sentence].tolist()
            rows.append(aligned_row(cache[sentence], tokens, reader, truncation))
        write_shard(directory, index, rows, student.hashes[list(sentences)], dtypes)
    return finish(directory, settings, dtypes, part, allow_implausible)


def aligned_row(
    row: CachedSentence, tokens: list[int], reader: Reader, truncation: Truncation
) -> SentenceColumns:
    """One sentence over the student's ``tokens``."""
    known = known_tokens(row)
    if reader.alike and [one.token for one in known] == tokens:  # the row as it is
        return {name: of for name, of in row._asdict().items() if isinstance(of, np.ndarray)}
    found = carry_over(known, tokens, reader)
    if found is None:
        return reference_alone(np.array(tokens))
    logs = [{token: math.log(p) for token, p in one.items() if p > 0} for one in found]
    return best_columns(logs, tokens, truncation)


def known_tokens(row: CachedSentence) -> list[Known]:
    """What a cached sentence knows at each of its tokens."""
    p = np.exp(np.maximum(row.log_p, LEAST)).tolist()
    ids = row.token_id.tolist()
    ends = (row.first + row.support_size).tolist()
    return [
        Known(ids[start], dict(zip(ids[start:end], p[start:end], strict=True)))
        for start, end in zip(row.first.tolist(), ends, strict=True)
    ]


def matched(teacher: Side, student: Side, sentences: Iterable[int]) -> tuple[float, str]:
    """Of these sentences the share of the student's tokens that are in one of one text, and how tokens
    meet."""
    count: Counter[str] = Counter()
    for sentence in sentences:
        sides = teacher.texts(sentence), student.texts(sentence)
        size = len(sides[1])
        whole = [[text for text in side if text is not None] for side in sides]
        found = None
        if all(len(one) == len(side) for one, side in zip(whole, sides, strict=True)):
            found = spans(*whole)
        if found is None:
            count["in sentences of another text"] += size
            continue
        for theirs, ours in found:
            way = {
                (True, True): "one to one",
                (True, False): "parts of a teacher's token",
                (False, True): "made of several",
            }.get((len(theirs) == 1, len(ours) == 1), "in spans that both cut")
            count[way] += len(ours)
    total = max(1, sum(count.values()))
    ways = ", ".join(f"{tokens / total:.2%} {way}" for way, tokens in count.most_common())
    return 1 - count["in sentences of another text"] / total, ways


if __name__ == "__main__":
    main()
