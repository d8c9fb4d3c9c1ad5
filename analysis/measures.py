"""What decides, or accompanies, each claim: measured by seed, observed and resampled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.aggregate import METRICS
from analysis.buckets import EASY, HARD
from analysis.evolution import History, easy_times
from analysis.judge import Judge
from analysis.quality import Quality
from analysis.runs.run_record import Run
from analysis.stats import Floats, partial_spearman, ratio

#: A rank correlation below this is too weak to matter.
CORRELATION_MARGIN = 0.1


@dataclass(frozen=True)
class Sample:
    """One measure in one direction: its value by seed, observed and resampled.

    Attributes
    ----------
    effect : (S,) by seed; above 0 is in favour of the claim
    drawn : (S, B) in every resample
    base : (S,) the baseline's own value, which margins are relative to
    base_drawn : (S, B)
    tokens, sentences : that the measure is made of
    biased : the tokens were chosen by the difficulty of one of the compared runs
    """

    effect: Floats
    drawn: Floats
    base: Floats
    base_drawn: Floats
    tokens: int
    sentences: int
    biased: bool = False


@dataclass(frozen=True)
class Measure:
    """What decides, or accompanies, a claim.

    ``margin`` is the smallest effect that matters, as a share of the baseline's value; a
    ``non_inferior`` measure claims an effect above ``-margin``, the others one above 0.
    """

    claim: int
    name: str
    sample: Callable[["Evidence", Sequence[tuple[Run, Run]]], Sample | None]
    missing: str
    decides: bool = True
    non_inferior: bool = False
    margin: float | None = None


@dataclass
class Evidence:
    """What the claims of one direction are computed from."""

    judge: Judge
    quality: Quality | None
    history: History


def _bucket(metric: str, bucket: int, sign: float = 1.0) -> Callable[..., Sample | None]:
    """Baseline minus treatment (times ``sign``) of a mean over easy or hard tokens."""

    def sample(evidence: Evidence, couples: Sequence[tuple[Run, Run]]) -> Sample | None:
        judge, column = evidence.judge, METRICS.index(metric)
        effect, drawn, base, base_drawn = [], [], [], []
        tokens, sentences = [], []
        biased = False
        for run, other in couples:
            partition = judge.partition(run)
            biased |= partition.selector in (run.label, other.label)
            counts = partition.by_sentence[:, partition.columns("difficulty")][:, [bucket]]
            own, reference = (
                judge.sums(item, partition).difficulty[:, bucket, [column]] for item in (run, other)
            )
            sums = np.concatenate([counts, own, reference], axis=1)  # (S, 3)
            total, resampled = sums.sum(axis=0), judge.resamples.sums(sums)
            if total[0] == 0:
                return None
            effect.append(sign * (total[2] - total[1]) / total[0])
            drawn.append(sign * ratio(resampled[:, 2] - resampled[:, 1], resampled[:, 0]))
            base.append(total[2] / total[0])
            base_drawn.append(ratio(resampled[:, 2], resampled[:, 0]))
            tokens.append(int(total[0]))
            sentences.append(int((counts > 0).sum()))
        return Sample(
            *(np.array(effect), np.stack(drawn), np.array(base), np.stack(base_drawn)),
            *(min(tokens), min(sentences), biased),
        )

    return sample


def _quality_correlation(given_others: bool) -> Callable[..., Sample | None]:
    """Spearman's correlation over sentences of the gain in KL and the gain in chrF."""

    def sample(evidence: Evidence, couples: Sequence[tuple[Run, Run]]) -> Sample | None:
        judge, quality = evidence.judge, evidence.quality
        labels = {run.label for run in quality.runs()} if quality else set()
        effect, drawn = [], []
        for run, other in couples:
            if quality is None or run.label not in labels or other.label not in labels:
                return None
            gain, better, length, score = sentence_gains(judge, quality, run, other)
            given = [length, score] if given_others else []
            effect.append(partial_spearman(gain, better, given)[0])
            drawn.append(
                np.concatenate(
                    [
                        partial_spearman(gain, better, given, block)
                        for block in judge.resamples.blocks()
                    ]
                )
            )
        if not np.isfinite(effect).all():
            return None
        ones = np.ones(len(effect))
        tokens = len(judge.tokens.token)
        sentences = len(judge.tokens.sentences)
        return Sample(
            np.array(effect),
            np.stack(drawn),
            ones,
            np.ones_like(np.stack(drawn)),
            tokens,
            sentences,
        )

    return sample


def sentence_gains(
    judge: Judge, quality: Quality, run: Run, other: Run
) -> tuple[Floats, Floats, Floats, Floats]:
    """Of each sentence: gain in mean KL (nats), gain in sentence chrF, tokens, baseline's chrF."""
    partition = judge.partition(run)
    column = partition.columns("all")
    own, base = (judge.sums(item, partition).kl[:, column].sum(axis=1) for item in (run, other))
    length = partition.by_sentence[:, column].sum(axis=1)
    lines = judge.tokens.sentences
    scores, reference = (quality.sentence_scores(item, "chrF")[lines] for item in (run, other))
    return (base - own) / length, scores - reference, length, reference


def _easy_time(evidence: Evidence, couples: Sequence[tuple[Run, Run]]) -> Sample | None:
    """How much sooner tokens that are hard for both turn easy, as a share of the observed span."""
    judge = evidence.judge
    effect, drawn, base, base_drawn = [], [], [], []
    tokens, sentences = [], []
    for run, other in couples:
        times = easy_times(judge, evidence.history, run, other, judge.partition(run))
        if times is None or times.tokens.sum() == 0:
            return None
        sums = np.stack([times.tokens, times.own, times.baseline], axis=1)
        total, resampled = sums.sum(axis=0), judge.resamples.sums(sums)
        effect.append((total[2] - total[1]) / total[0])
        drawn.append(ratio(resampled[:, 2] - resampled[:, 1], resampled[:, 0]))
        base.append(total[2] / total[0])
        base_drawn.append(ratio(resampled[:, 2], resampled[:, 0]))
        tokens.append(int(total[0]))
        sentences.append(int((times.tokens > 0).sum()))
    return Sample(
        *(np.array(effect), np.stack(drawn), np.array(base), np.stack(base_drawn)),
        *(min(tokens), min(sentences)),
    )


_EMPTY = "no token in the bucket"
_TEXTS = "no translations of both runs, or scores that do not vary"
MEASURES = (
    Measure(1, "KL on hard tokens (nats)", _bucket("kl", HARD), _EMPTY),
    Measure(1, "agreement on hard tokens", _bucket("agreement", HARD, -1.0), _EMPTY),
    Measure(2, "KL on easy tokens (nats)", _bucket("kl", EASY), _EMPTY, non_inferior=True),
    Measure(3, "non-target KL on hard tokens (nats)", _bucket("kl_nontarget", HARD), _EMPTY),
    Measure(
        3, "target KL on hard tokens (nats)", _bucket("kl_target", HARD), _EMPTY, decides=False
    ),
    Measure(
        *(4, "partial rank correlation, given length and baseline's chrF"),
        *(_quality_correlation(True), _TEXTS),
        margin=CORRELATION_MARGIN,
    ),
    Measure(
        *(4, "rank correlation of KL gain and chrF gain", _quality_correlation(False), _TEXTS),
        decides=False,
        margin=CORRELATION_MARGIN,
    ),
    Measure(
        *(5, "time until hard tokens turn easy (share of training)", _easy_time),
        "fewer than two common steps with records, or no token hard for both at the first",
    ),
)
