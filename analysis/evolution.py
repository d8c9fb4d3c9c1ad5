"""How difficulty changes while a run trains: from records of several steps, and from the log.

A token is hard at a step if its KL to the teacher is above Γ then, with one Γ (in nats) for all
steps and runs, so that "hard" means the same everywhere.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.aggregate import Partition
from analysis.judge import Judge
from analysis.runs.errors import RecordError
from analysis.runs.run_record import LeftOut, Run
from analysis.runs.token_records import read_columns, read_token_set
from analysis.stats import Floats, ratio

STATES = ("easy", "hard")


class History:
    """Each run's difficulty at every step that has records, read once.

    Attributes
    ----------
    left_out : records of steps that could not be used
    """

    def __init__(self, judges: Sequence[Judge]) -> None:
        self.left_out: list[LeftOut] = []
        self._difficulty: dict[str, dict[int, NDArray[np.float32]]] = {}
        for judge in judges:
            for run in judge.runs:
                self._difficulty[run.label] = self._read(judge, run)

    def _read(self, judge: Judge, run: Run) -> dict[int, NDArray[np.float32]]:
        found: dict[int, NDArray[np.float32]] = {}
        steps = run.steps(judge.options.subset)
        for step in steps if len(steps) > 1 else []:
            path = run.records(judge.options.subset, step)
            try:
                if read_token_set(path).digest != judge.tokens.digest:
                    raise RecordError(f"{path}: other tokens or another teacher than the last step")
                found[step] = read_columns(path, ["kl"])["kl"].astype(np.float32)
            except RecordError as error:
                self.left_out.append(LeftOut(f"{run.label} step {step}", str(error)))
        return found

    def steps(self, run: Run) -> list[int]:
        """Steps with records, ascending; empty where there is only one."""
        return sorted(self._difficulty[run.label])

    def difficulty(self, run: Run, step: int) -> NDArray[np.float32]:
        """KL of each token at a step, (N,)."""
        return self._difficulty[run.label][step]


def training_table(judges: Sequence[Judge], history: History) -> pd.DataFrame:
    """One row a run, step, source and bucket: mean KL of easy and hard tokens, and the hard share.

    Source ``records``: the tokens are those of the reference run's buckets, the same at every step.
    Source ``log``: what fairseq logged in validation, where each step's own difficulty cuts.
    ``hard_share`` is the share of all tokens that are hard at that step.
    """
    rows: list[dict[str, Any]] = []
    for judge in judges:
        for run in judge.direction.runs:
            columns = {
                "direction": judge.direction.name,
                "method": run.method,
                "seed": run.seed,
                "run": run.label,
            }
            if run.label in judge.direction.scored:
                rows.extend(columns | row for row in _record_rows(judge, run, history))
            rows.extend(columns | row for row in _log_rows(run))
    names = ["direction", "method", "seed", "run", "step", "source", "bucket", "tokens", "kl"]
    return pd.DataFrame(rows, columns=[*names, "hard_share"])


def _record_rows(judge: Judge, run: Run, history: History) -> list[dict[str, Any]]:
    partition = judge.partition(run)
    codes = partition.codes("difficulty")
    rows = []
    for step in history.steps(run):
        difficulty = history.difficulty(run, step)
        tokens = np.bincount(codes, minlength=2).astype(np.float64)
        means = ratio(np.bincount(codes, difficulty, 2).astype(np.float64), tokens)
        share = float((difficulty > partition.gamma).mean())
        for state, name in enumerate(STATES):
            rows.append(
                {
                    "step": step,
                    "source": "records",
                    "bucket": name,
                    "tokens": int(tokens[state]),
                    "kl": means[state],
                    "hard_share": share,
                }
            )
    return rows


def _log_rows(run: Run) -> list[dict[str, Any]]:
    rows = []
    for step, line in sorted(read_log(run).items()):
        for name in STATES:
            value = line.get(f"valid_kl_{name}")
            if value is not None:
                rows.append(
                    {
                        "step": step,
                        "source": "log",
                        "bucket": name,
                        "kl": value,
                        "hard_share": line.get("valid_hard_share", np.nan),
                    }
                )
    return rows


def read_log(run: Run) -> dict[int, dict[str, float]]:
    """The numbers of the validation lines of ``train.jsonl``, by update; a later line of the same
    update counts (a resumed run repeats some). Lines that are no JSON object are passed over: the
    last one may be half-written, and fairseq logs other text too."""
    try:
        text = (run.path / "train.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found: dict[int, dict[str, float]] = {}
    for line in text.splitlines():
        try:
            content = json.loads(line)
            step = int(content["valid_num_updates"])
        except (ValueError, KeyError, TypeError):
            continue
        numbers = {}
        for key, value in content.items():
            try:
                numbers[key] = float(value)
            except (ValueError, TypeError):
                continue
        found[step] = numbers
    return found


def transition_table(judges: Sequence[Judge], history: History) -> pd.DataFrame:
    """One row a run, pair of neighbouring steps (and first to last), and pair of states: tokens, and
    the share of the tokens of the first state that went to the second."""
    rows: list[dict[str, Any]] = []
    for judge in judges:
        for run in judge.runs:
            steps = history.steps(run)
            spans = list(itertools.pairwise(steps))
            if len(steps) > 2:
                spans.append((steps[0], steps[-1]))
            gamma = judge.partition(run).gamma
            for first, second in spans:
                matrix = transitions(
                    history.difficulty(run, first), history.difficulty(run, second), gamma
                )
                for before in range(2):
                    total = matrix[before].sum()
                    for after in range(2):
                        rows.append(
                            {
                                "direction": judge.direction.name,
                                "method": run.method,
                                "seed": run.seed,
                                "run": run.label,
                                "from_step": first,
                                "to_step": second,
                                "from": STATES[before],
                                "to": STATES[after],
                                "tokens": int(matrix[before, after]),
                                "share": matrix[before, after] / total if total else np.nan,
                            }
                        )
    names = ["direction", "method", "seed", "run", "from_step", "to_step", "from", "to"]
    return pd.DataFrame(rows, columns=[*names, "tokens", "share"])


def transitions(
    before: NDArray[np.floating], after: NDArray[np.floating], gamma: float
) -> NDArray[np.int64]:
    """Tokens by state before (row) and after (column), easy first, (2, 2)."""
    codes = (before > gamma).astype(np.int64) * 2 + (after > gamma)
    return np.bincount(codes, minlength=4).reshape(2, 2)


@dataclass(frozen=True)
class EasyTimes:
    """Time until a token that is hard for both runs of a pair turns easy, summed by sentence.

    Attributes
    ----------
    tokens : (S,) tokens that are hard in both runs at the first common step
    own, baseline : (S,) their summed times, as a share of the observed span
    """

    tokens: Floats
    own: Floats
    baseline: Floats


def easy_times(
    judge: Judge, history: History, run: Run, other: Run, partition: Partition
) -> EasyTimes | None:
    """Compare how fast the same hard tokens turn easy; None with fewer than two common steps.

    The time of a token is the first common step at which its KL is at most Γ, counted from the first
    common step; a token that stays hard counts with the whole span (a restricted mean, so that
    censored tokens are not dropped). The times are divided by the span.
    """
    steps = sorted(set(history.steps(run)) & set(history.steps(other)))
    if len(steps) < 2:
        return None
    gamma = partition.gamma
    chosen = (history.difficulty(run, steps[0]) > gamma) & (
        history.difficulty(other, steps[0]) > gamma
    )
    count = len(judge.tokens.sentences)
    sentence = judge.tokens.sentence[chosen]
    summed = []
    for item in (run, other):
        times = np.ones(len(sentence))
        waiting = np.ones(len(sentence), dtype=np.bool_)
        for step in steps[1:]:
            easy = waiting & (history.difficulty(item, step)[chosen] <= gamma)
            times[easy] = (step - steps[0]) / (steps[-1] - steps[0])
            waiting &= ~easy
        summed.append(np.bincount(sentence, times, count).astype(np.float64))
    tokens = np.bincount(sentence, minlength=count).astype(np.float64)
    return EasyTimes(tokens, summed[0], summed[1])
