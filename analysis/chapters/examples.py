"""The sentences that gained and lost most, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.runs.token_records import read_columns, read_pieces
from analysis.sums.buckets import HARD
from analysis.sums.direction import Direction, Options, ScoredRun
from analysis.sums.pairing import partner

#: Sentences shown of each kind.
SHOWN = 25
#: The baseline's KL in nats at which the shade of a token is deepest.
DEEPEST = 4.0
BETTER, WORSE = "#0072b2", "#e69f00"


@dataclass(frozen=True)
class Example:
    """A sentence, its two translations and its reference's tokens."""

    number: int
    before: float
    after: float
    source: str | None
    reference: str
    baseline: str
    treatment: str
    tokens: list[dict[str, Any]]

    @property
    def hard_share(self) -> int:
        """Hard tokens among its tokens, in per cent."""
        hard = sum(token["hard"] for token in self.tokens)
        return round(100 * hard / len(self.tokens)) if self.tokens else 0


@dataclass(frozen=True)
class Group:
    """Examples of two runs."""

    direction: str
    treatment: str
    baseline: str
    seed: int
    examples: list[Example]

    @property
    def has_pieces(self) -> bool:
        """Whether the tokens have text; a restored study's have none."""
        return any(token["piece"].strip() for item in self.examples for token in item.tokens)


def example_groups(directions: Sequence[Direction], options: Options) -> list[Group]:
    """For the first seed of every SE-KD method, the sentences that gained and lost most chrF over the
    baseline; none where two runs cannot be compared."""
    groups = []
    for direction in directions:
        runs = [run for run in direction.scored if run.translations is not None]
        for method in sorted({str(run.method) for run in runs if run.method.is_treatment}):
            run = min((run for run in runs if str(run.method) == method), key=lambda run: run.seed)
            other = partner(run, runs, options.baseline)
            if other is not None:
                examples = _examples(direction, run, other, options)
                names = run.method.label, other.method.label
                groups.append(Group(direction.name, *names, run.seed, examples))
    return groups


def _examples(
    direction: Direction, run: ScoredRun, other: ScoredRun, options: Options
) -> list[Example]:
    assert run.translations is not None and other.translations is not None
    texts, others = run.translations.texts, other.translations.texts
    after, before = run.translations.chrf, other.translations.chrf
    order = np.argsort(before - after, kind="stable")
    count = min(SHOWN, len(order) // 2)
    best, worst = order[:count], order[len(order) - count :][::-1]
    tokens = _tokens(direction, run, other, [*best.tolist(), *worst.tolist()], options)
    return [
        Example(
            number=int(i) + 1,
            before=float(before[i]),
            after=float(after[i]),
            source=texts.sources[i] if texts.sources else None,
            reference=texts.references[i],
            baseline=others.hypotheses[i],
            treatment=texts.hypotheses[i],
            tokens=tokens.get(int(i), []),
        )
        for i in (*best, *worst)
    ]


def _tokens(
    direction: Direction,
    run: ScoredRun,
    other: ScoredRun,
    sentences: Sequence[int],
    options: Options,
) -> dict[int, list[dict[str, Any]]]:
    """What is shown of the tokens of some sentences."""
    partition = direction.cut(run, other)
    assert run.step is not None and run.kl is not None and other.kl is not None
    path = run.run.records(options.subset, run.step)
    sentence = read_columns(path, ["sentence"])["sentence"]
    texts = {
        name: _texts(*read_pieces(path, name)) for name in ("piece", "p_top1_piece", "q_top1_piece")
    }
    hard = partition.codes("difficulty")
    wanted = np.flatnonzero(np.isin(sentence, list(sentences)))
    shown: dict[int, list[dict[str, Any]]] = {}
    for i in wanted.tolist():
        before, after = float(other.kl[i]), float(run.kl[i])
        gain = before - after
        shown.setdefault(int(sentence[i]), []).append(
            {
                "piece": texts["piece"][i],
                "teacher": texts["p_top1_piece"][i],
                "student": texts["q_top1_piece"][i],
                "hard": bool(hard[i] == HARD),
                "shade": round(min(before / DEEPEST, 1.0) * 0.6, 3),
                "line": "transparent" if abs(gain) < 0.05 else BETTER if gain > 0 else WORSE,
                "before": f"{before:.2f}",
                "after": f"{after:.2f}",
            }
        )
    return shown


def _texts(pieces: Sequence[str], index: NDArray[np.int64]) -> NDArray[np.object_]:
    texts = [piece.replace("▁", " ") for piece in pieces]
    if any(piece.startswith("Ġ") for piece in pieces):
        texts = [_byte_level_text(piece) for piece in pieces]
    return np.array(texts, dtype=object)[index]


#: The byte of each character in a vocabulary of bytes (GPT-2's and its successors'): characters that can
#: be seen stand for themselves, those from Ā on for the other bytes in their order.
_SEEN = (*range(33, 127), *range(161, 173), *range(174, 256))
_UNSEEN = (byte for byte in range(256) if byte not in _SEEN)
BYTES = {chr(byte): byte for byte in _SEEN} | {chr(256 + n): b for n, b in enumerate(_UNSEEN)}


def _byte_level_text(piece: str) -> str:
    """The text of a piece of bytes, "�" where it ends within a character; a special token's name as it is."""
    if not all(character in BYTES for character in piece):
        return piece
    return bytes(BYTES[character] for character in piece).decode(errors="replace")
