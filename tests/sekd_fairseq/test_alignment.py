"""A teacher's distributions over another tokenizer's tokens, against sums over all texts."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sekd_fairseq.teachers.alignment import END, Known, Pieces, Reader, carry_over, spans

LETTERS = [b"a", b"b", b" a", b" b"]
WORDS = [b" ab", b" ba", b"aa", b" aab", b"bb", b"ab"]


def tokens_of(pieces: Pieces, text: bytes) -> list[int]:
    """The tokenizer itself: the longest pieces from the left, and the end."""
    read = pieces.read(text)
    assert read is not None
    return [*read, list(pieces.text).index(END)]


def teacher_at(tokens: Sequence[int], size: int, kept: int | None = None) -> list[Known]:
    """A language model's distributions along a sentence, of which the best are known."""
    found = []
    for place, token in enumerate(tokens):
        generator = np.random.default_rng([7, *tokens[:place]])
        p = generator.dirichlet(np.full(size, 0.3))
        order = np.argsort(-p)[: kept or size].tolist()
        chosen = dict.fromkeys([token, *order])
        found.append(Known(token, {i: float(p[i]) for i in chosen}))
    return found


@pytest.mark.parametrize("kept", [None, 3])
def test_equal_tokenizers_carry_over(kept: int | None) -> None:
    # Two pieces with one text, a control token: what cannot be told by its text is itself.
    pieces = Pieces([None, *LETTERS, *WORDS, END, b"a"], frozenset([len(LETTERS) + len(WORDS) + 2]))
    tokens = tokens_of(pieces, b" ab aab ba")
    known = teacher_at(tokens, len(pieces.text), kept)
    rows = carry_over(known, tokens, Reader(pieces, pieces))
    assert rows == [dict(one.probability) for one in known]


@given(
    words=st.lists(st.sampled_from(["a", "b", "ab", "ba", "aab", "abab"]), min_size=1, max_size=4)
)
@settings(max_examples=60, deadline=None)
def test_a_student_that_splits_gets_the_exact_marginal(words: list[str]) -> None:
    """The student's pieces are letters, the teacher's are words: P(next letter | letters before) is a
    ratio of sums over the teacher's texts, the reference's words before the current one being given."""
    teacher, student = Pieces([*LETTERS, *WORDS, END]), Pieces([END, *LETTERS])
    text = b"".join(b" " + word.encode() for word in words)
    theirs, ours = tokens_of(teacher, text), tokens_of(student, text)
    known = teacher_at(theirs, len(teacher.text))
    rows = carry_over(known, ours, Reader(teacher, student))
    assert rows is not None and len(rows) == len(ours)
    # The teacher's texts of up to two tokens after the reference's, as letters.
    for place, row in enumerate(rows):
        before = ours[:place]
        sums: dict[int, float] = {}
        lost = 0.0
        reached = 1.0
        for position, one in enumerate(known):
            read = [i for token in theirs[:position] for i in letters(teacher, student, token)]
            for token, p in one.probability.items():
                spelled = [*read, *letters(teacher, student, token)]
                if token == one.token:
                    continue
                if spelled[: len(before)] == before and len(spelled) > len(before):
                    following = spelled[len(before)]
                    sums[following] = sums.get(following, 0.0) + reached * p
                elif spelled == before:
                    lost += reached * p
            reached *= one.probability[one.token]
        sums[ours[place]] = sums.get(ours[place], 0.0) + reached
        # The sum over all texts that agree so far, but those that the teacher would not have cut so.
        total = math.fsum(sums.values()) + lost
        for token, value in sums.items():
            assert row[token] == pytest.approx(value / total, rel=1e-9), (place, token)
        assert math.fsum(row.values()) <= 1 + 1e-9


def letters(teacher: Pieces, student: Pieces, token: int) -> list[int]:
    read = student.read(teacher.text[token] or b"")
    assert read is not None
    return list(read)


def test_a_student_that_joins_gets_the_product() -> None:
    teacher, student = Pieces([*LETTERS, END]), Pieces([END, *LETTERS, *WORDS])
    theirs, ours = tokens_of(teacher, b" ab aab"), tokens_of(student, b" ab aab")
    assert len(theirs) == 6 and len(ours) == 3
    known = teacher_at(theirs, len(teacher.text))
    rows = carry_over(known, ours, Reader(teacher, student))
    assert rows is not None
    p = [one.probability[one.token] for one in known]
    for row, token, parts in zip(rows, ours, (p[:2], p[2:5], p[5:]), strict=True):
        assert row[token] == pytest.approx(math.prod(parts))
    # Beside it: every text that leaves the reference, if the student has a piece for it.
    first, second = (one.probability for one in known[:2])
    a = list(teacher.text).index(b" a")
    for letter, piece in ((b"a", None), (b" b", b" b"), (b"b", None)):
        token = list(teacher.text).index(letter)
        if piece is not None:
            assert rows[0][list(student.text).index(piece)] == pytest.approx(first[token])
    stopped = first[a] * second[list(teacher.text).index(END)]
    assert math.fsum(rows[0].values()) == pytest.approx(1 - stopped)


def test_never_off_by_a_shift() -> None:
    """A teacher that knows the reference gives it to the student at every token, however both cut."""
    cutters = [
        Pieces([END, *LETTERS, *extra])
        for size in range(4)
        for extra in itertools.combinations(WORDS, size)
    ]
    text = b" ab aab ba abb b"
    for teacher, student in itertools.product(cutters[::5], cutters[::7]):
        theirs, ours = tokens_of(teacher, text), tokens_of(student, text)
        known = [Known(token, {token: 0.97, 0 if token else 1: 0.01}) for token in theirs]
        rows = carry_over(known, ours, Reader(teacher, student))
        assert rows is not None
        for row, token in zip(rows, ours, strict=True):
            assert max(row, key=row.__getitem__) == token and row[token] > 0.5
            assert math.fsum(row.values()) <= 1 + 1e-9


def test_the_space_at_the_start() -> None:
    """SentencePiece puts a space before a sentence, byte-level BPE after a prompt does not."""
    teacher, student = Pieces([END, b"ab", b"b", b" b"]), Pieces([b" ab", b" b", b"b", END])
    known = [Known(1, {1: 0.5, 2: 0.25}), Known(3, {3: 0.5, 0: 0.5}), Known(0, {0: 1.0})]
    rows = carry_over(known, [0, 1, 3], Reader(teacher, student))
    assert rows == [{0: 0.5, 1: 0.25}, {1: 0.5, 3: 0.5}, {3: 1.0}]


def test_what_is_not_one_text_is_not_matched() -> None:
    pieces = Pieces([END, None, *LETTERS])
    reader = Reader(pieces, pieces)
    a, b = (list(pieces.text).index(letter) for letter in (b" a", b"b"))
    known = [Known(a, {a: 1.0}), Known(b, {b: 1.0}), Known(0, {0: 1.0})]
    assert carry_over(known, [a, b, 0], reader) is not None
    assert carry_over(known, [a, a, 0], reader) is None  # another text
    assert carry_over(known, [a, 0], reader) is None
    assert carry_over(known, [a, 1, 0], reader) is None  # no text
    assert carry_over(known[:2], [a, b, 0], reader) is None  # no end
    assert spans([b" a", b"b", END], [b" ab", END]) == [
        (range(2), range(1)),
        (range(2, 3), range(1, 2)),
    ]
    assert spans([END], [END]) == [(range(1), range(1))]
