r"""A teacher's distributions over its own tokens, read as distributions over another tokenizer's.

Both tokenizers cut one text.  Where they cut at the same byte a *span* ends; in a span of ``m``
teacher tokens ``t`` and ``n`` student tokens ``s`` the teacher's cache knows the texts ``x`` that
leave the reference at the ``k``-th token, each with the product of its parts::

    P(t_1 .. t_{k-1} u) = p(t_1) .. p(t_{k-1} | ..) p(u | ..)        u != t_k
    P(t_1 .. t_m)       = p(t_1) .. p(t_m | ..)                      the reference

A text is read as the student's pieces, so the student's distribution at ``s_j`` sums the texts that
agree with ``s_1 .. s_{j-1}`` by their next piece, over the sum of all of these (a text that goes on
beyond the span waits for its turn).  What has no reading in the student's pieces, what the cache
leaves out, and a text that ends inside the span without being the reference (the teacher would not
have cut it so) is mass outside.

With equal tokenizers every span is one to one and the distribution is carried over.  Where the
student only splits the teacher's pieces it is the exact marginal, where it only joins them the
exact product.

Related: ULD (Boizard et al., 2024) compares sorted probabilities without matching tokens; GOLD
(Hugging Face, 2025) matches spans and merges those of several tokens as products, in the loss of one
step. Here the teacher is matched once, when the cache is built, and split spans are marginalised.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: A token that stands for no text, by a name that no text has.
END = b"\xff</s>"


@dataclass(frozen=True)
class Known:
    """What a cache knows of the teacher at one token: probabilities of some tokens, the reference
    among them."""

    token: int
    probability: Mapping[int, float]


@dataclass
class Pieces:
    """A tokenizer as texts of its tokens.

    Parameters
    ----------
    text
        The bytes of each token; None for one without text (a control token), :data:`END` for the end
        of a sentence.
    spare
        Tokens that are meant only where no other has their text (single bytes).
    """

    text: Sequence[bytes | None]
    spare: frozenset[int] = frozenset()
    _token: dict[bytes, int] = field(init=False)
    _longest: int = field(init=False)

    def __post_init__(self) -> None:
        self._token = {}
        order = sorted(range(len(self.text)), key=lambda token: (token in self.spare, token))
        for token in order:
            if text := self.text[token]:
                self._token.setdefault(text, token)
        self._longest = max(map(len, self._token), default=0)

    def read(self, text: bytes) -> tuple[int, ...] | None:
        """The tokens of a text: the one that is the text, else the longest that fit, from the left;
        None where some byte has no token."""
        found: list[int] = []
        place = 0
        while place < len(text):
            for end in range(min(len(text), place + self._longest), place, -1):
                token = self._token.get(text[place:end])
                if token is not None:
                    found.append(token)
                    place = end
                    break
            else:
                return None
        return tuple(found)


class Reader:
    """Reads texts of a teacher's tokens as a student's, and remembers how.

    A teacher's token that the student has too (``text`` and ``name`` alike) is that token, so that
    equal tokenizers carry over whatever their pieces are.
    """

    def __init__(self, teacher: Pieces, student: Pieces) -> None:
        self.teacher, self.student = teacher, student
        self.alike = list(teacher.text) == list(student.text)
        self._known: dict[tuple[int, int], tuple[int, ...] | None] = {}

    def token(self, token: int, spaces: int = 0) -> tuple[int, ...] | None:
        """One teacher token as student tokens; see :meth:`text`."""
        if self.alike:
            return (token,)
        key = (token, spaces)
        if key not in self._known:
            text = self.teacher.text[token]
            self._known[key] = None if text is None else self.text(text, spaces)
        return self._known[key]

    def text(self, text: bytes, spaces: int = 0) -> tuple[int, ...] | None:
        """A text as student tokens, None where it cannot be read. ``spaces`` is for the start of a
        sentence: 1 where the student's tokenizer puts a space there and the teacher's does not, -1
        where it is the other way round."""
        if spaces > 0 and text != END:
            text = b" " + text
        elif spaces < 0 and text != END:
            if not text.startswith(b" "):
                return None
            text = text[1:]
        return self.student.read(text)


def cuts(pieces: Sequence[bytes]) -> list[int]:
    """Where each piece of a sentence ends, in bytes of the text without a space at its start."""
    ends, place = [], -1 if pieces and pieces[0].startswith(b" ") else 0
    for piece in pieces:
        place += 0 if piece == END else len(piece)
        ends.append(place)
    return ends


def spans(teacher: Sequence[bytes], student: Sequence[bytes]) -> list[tuple[range, range]] | None:
    """Places of teacher and student tokens between common cuts; None where the texts differ.

    Both sentences end with :data:`END`, a span of its own.
    """
    texts = [b"".join(side[:-1]).removeprefix(b" ") for side in (teacher, student)]
    if texts[0] != texts[1]:
        return None
    found = []
    first, second = 0, 0  # where the span begins
    ends = cuts(teacher[:-1]), cuts(student[:-1])
    i, j = 0, 0
    while i < len(ends[0]) and j < len(ends[1]):
        if ends[0][i] == ends[1][j]:
            found.append((range(first, i + 1), range(second, j + 1)))
            first, second = i + 1, j + 1
            i, j = first, second
        elif ends[0][i] < ends[1][j]:
            i += 1
        else:
            j += 1
    # A piece of the space at the start alone has no byte of the text.
    if first < len(teacher) - 1 or second < len(student) - 1:
        return None
    found.append((range(first, len(teacher)), range(second, len(student))))
    return found


@dataclass
class _Text:
    """A text that may follow: its probability and the student tokens that are left of it."""

    weight: float
    left: tuple[int, ...]
    reference: bool = False


def carry_over(
    known: Sequence[Known], student: Sequence[int], reader: Reader
) -> list[dict[int, float]] | None:
    """The teacher's known probabilities at each student token of a sentence, the reference among them.

    Parameters
    ----------
    known
        The teacher at each of its own tokens of the sentence, the end included.
    student
        The student's tokens of the same sentence, the end included.

    Returns
    -------
    Probabilities by student token; what they lack of 1 is outside. None where the two sentences are
    not one text.
    """
    sides = []
    for pieces, tokens in (
        (reader.teacher, [one.token for one in known]),
        (reader.student, student),
    ):
        side = [pieces.text[token] for token in tokens]
        if None in side or side[-1:] != [END] or END in side[:-1]:
            return None
        sides.append([text for text in side if text is not None])
    found = spans(*sides)
    if found is None:
        return None
    spaces = sides[1][0].startswith(b" ") - sides[0][0].startswith(b" ")
    rows: list[dict[int, float]] = []
    going: list[_Text] = []  # texts that go beyond the last span
    reached = 1.0  # that the teacher is at the place where the span begins
    for theirs, ours in found:
        texts = [*going, *_texts(known, theirs, reader, reached, spaces)]
        texts.append(_reference(known, theirs, reached, tuple(student[j] for j in ours)))
        for j in ours:
            row: dict[int, float] = defaultdict(float)
            for text in texts:
                if text.left:
                    row[text.left[0]] += text.weight
            rows.append(dict(row))
            agreed = [text for text in texts if text.left[:1] == (student[j],)]
            total = math.fsum(text.weight for text in agreed)
            texts = [_Text(t.weight / total, t.left[1:], t.reference) for t in agreed]
        reached = math.fsum(text.weight for text in texts if text.reference)
        going = [text for text in texts if text.left]
    return rows


def _texts(
    known: Sequence[Known], places: range, reader: Reader, reached: float, spaces: int
) -> list[_Text]:
    """What may stand in place of a span's reference, as far as it is known and can be read."""
    found = []
    spaces = spaces if places.start == 0 else 0
    before, weight = b"", reached
    for place in places:
        reference = known[place].token
        for token, probability in known[place].probability.items():
            if token == reference:
                continue
            text = reader.teacher.text[token]
            if place == places.start:
                left = reader.token(token, spaces)
            elif text is None or text == END:
                left = None  # a sentence that ends within a span is cut otherwise
            else:
                left = reader.text(before + text, spaces)
            if left is not None:
                found.append(_Text(weight * probability, left))
        before += reader.teacher.text[reference] or b""
        weight *= known[place].probability[reference]
    return found


def _reference(
    known: Sequence[Known], places: range, reached: float, left: tuple[int, ...]
) -> _Text:
    parts = (known[place].probability[known[place].token] for place in places)
    return _Text(reached * math.prod(parts), left, reference=True)
