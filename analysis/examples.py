"""The sentences that gained and lost most, token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.judge import Judge
from analysis.quality import Quality
from analysis.runs.methods import Method, label_of
from analysis.runs.run_record import Run
from analysis.runs.token_records import read_columns, read_pieces
from analysis.study import partner

#: Sentences shown of each kind.
SHOWN = 5
#: Difficulty in nats at which the shade of a token is deepest.
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


@dataclass(frozen=True)
class Group:
    """Examples of two runs."""

    direction: str
    treatment: str
    baseline: str
    seed: int
    examples: list[Example]


def example_groups(
    judges: Sequence[Judge], qualities: Mapping[str, Quality], baseline: str
) -> list[Group]:
    """For the first seed of every SE-KD method, the sentences that gained and lost most chrF over
    ``baseline``; none where two runs cannot be compared."""
    groups = []
    for judge in judges:
        quality = qualities.get(judge.direction.name)
        if quality is None:
            continue
        scored = [run for run in judge.runs if run.label in judge.direction.texts]
        for method in sorted({r.method for r in scored if Method.of(r.method).is_treatment}):
            run = min((r for r in scored if r.method == method), key=lambda r: r.seed)
            other = partner(run, scored, baseline)
            if other is not None:
                examples = _examples(judge, quality, run, other)
                names = label_of(run.method), label_of(other.method)
                groups.append(Group(judge.direction.name, *names, run.seed, examples))
    return groups


def _examples(judge: Judge, quality: Quality, run: Run, other: Run) -> list[Example]:
    after, before = (quality.sentence_scores(item, "chrF") for item in (run, other))
    order = np.argsort(before - after, kind="stable")
    count = min(SHOWN, len(order) // 2)
    best, worst = order[:count], order[len(order) - count :][::-1]
    texts, others = quality.texts(run), quality.texts(other)
    tokens = _tokens(judge, run, other, [*best.tolist(), *worst.tolist()])
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
    judge: Judge, run: Run, other: Run, sentences: Sequence[int]
) -> dict[int, list[dict[str, Any]]]:
    """What is shown of the tokens of some sentences."""
    partition = judge.partition(run)
    chosen, step = judge.selector(run)
    path = judge.path(run)
    columns = read_columns(path, ["sentence", "kl"])
    before = read_columns(judge.path(other), ["kl"])["kl"]
    difficulty = read_columns(chosen.records(judge.options.subset, step), ["kl"])["kl"]
    texts = {
        name: _texts(*read_pieces(path, name)) for name in ("piece", "p_top1_piece", "q_top1_piece")
    }
    wanted = np.flatnonzero(np.isin(columns["sentence"], list(sentences)))
    shown: dict[int, list[dict[str, Any]]] = {}
    for i in wanted.tolist():
        gain = float(before[i] - columns["kl"][i])
        shown.setdefault(int(columns["sentence"][i]), []).append(
            {
                "piece": texts["piece"][i],
                "teacher": texts["p_top1_piece"][i],
                "student": texts["q_top1_piece"][i],
                "hard": bool(difficulty[i] > partition.gamma),
                "shade": round(min(float(difficulty[i]) / DEEPEST, 1.0) * 0.6, 3),
                "line": "transparent" if abs(gain) < 0.05 else BETTER if gain > 0 else WORSE,
                "difficulty": f"{difficulty[i]:.2f}",
                "before": f"{before[i]:.2f}",
                "after": f"{columns['kl'][i]:.2f}",
            }
        )
    return shown


def _texts(pieces: Sequence[str], index: NDArray[np.int64]) -> NDArray[np.object_]:
    return np.array([piece.replace("▁", " ") for piece in pieces], dtype=object)[index]
