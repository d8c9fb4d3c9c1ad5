"""What decides, or accompanies, each claim: measured by seed, observed and resampled."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.stats import Floats, partial_spearman, ratio
from analysis.sums.bucket_sums import METRICS
from analysis.sums.buckets import EASY, HARD
from analysis.sums.direction import Direction, ScoredRun
from analysis.sums.pairing import couples, of_method, peers, placebo_couples
from analysis.sums.selection import bias

#: A rank correlation below this is too weak to matter.
CORRELATION_MARGIN = 0.1
Couple = tuple[ScoredRun, ScoredRun]
#: What claims compare on easy and hard tokens.
ON_BUCKETS = ("kl", "kl_target", "kl_nontarget", "agreement")
#: Of each couple the correlation and, (B,), that of every resample; None where there is none.
Correlations = list[tuple[float, Floats]] | None


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
    units : sentences or documents that resamples draw
    bias : why the runs, or the tokens, do not suit the comparison; "" where they do
    """

    effect: Floats
    drawn: Floats
    base: Floats
    base_drawn: Floats
    tokens: int
    sentences: int
    units: int
    bias: str = ""


@dataclass(frozen=True)
class ResampledSums:
    """Sums over the sentences of a direction, tokens first.

    Attributes
    ----------
    totals : (C,)
    drawn : (B, C) in every resample
    sentences : with any token
    """

    totals: Floats
    drawn: Floats
    sentences: int

    def columns(self, *columns: int) -> "ResampledSums":
        """The tokens and some other columns."""
        chosen = [0, *columns]
        return ResampledSums(self.totals[chosen], self.drawn[:, chosen], self.sentences)


def resampled_sums(direction: Direction, sums: Floats) -> list[ResampledSums]:
    """Of groups of tokens, from their sums by sentence (S, groups, C): resampled together, because
    unpacking the counts of the resamples costs more than multiplying with them."""
    assert direction.resamples is not None
    drawn = direction.resamples.sums(sums.reshape(len(sums), -1))
    groups = drawn.reshape(len(drawn), *sums.shape[1:]).swapaxes(0, 1)
    counts = (sums[:, :, 0] > 0).sum(axis=0)
    return [
        ResampledSums(totals, part, int(count))
        for totals, part, count in zip(sums.sum(axis=0), groups, counts, strict=True)
    ]


@dataclass(frozen=True)
class Evidence:
    """What the claims of one direction are computed from: runs of a method, or of the baseline as if
    it were one (the placebo), each with the baseline's run that it is compared with.

    Attributes
    ----------
    couples : (run, baseline's run), by seed
    chance : that of the baseline's runs, each with another of its own; None where this is it
    """

    direction: Direction
    couples: Sequence[Couple]
    chance: "Evidence | None" = None

    @classmethod
    def of(
        cls, direction: Direction, treatment: str, baseline: str, chance: "Evidence | None" = None
    ) -> "Evidence":
        """Of a method; methods of one direction share the placebo ``chance``, unless it is of other runs than
        those that they are compared with."""
        own = [run for run in direction.scored if str(run.method) == treatment]
        found = couples(own, direction.scored, baseline)
        known = {other.label for _, other in chance.couples} if chance else set()
        if own and not {other.label for _, other in found} <= known:
            chance = cls(direction, placebo_couples(peers(own[0], direction.scored, baseline)))
        return cls(direction, found, chance)

    @classmethod
    def placebo(cls, direction: Direction, baseline: str) -> "Evidence":
        """Of the baseline against itself."""
        return cls(direction, placebo_couples(of_method(direction.scored, baseline)))

    @functools.cached_property
    def bucket_sums(self) -> list[list[ResampledSums]]:
        """Of each couple the sums on easy and on hard tokens: tokens, :data:`ON_BUCKETS` of the run, the
        same of the baseline."""
        metrics = [METRICS.index(name) for name in ON_BUCKETS]
        found = []
        for run, other in self.couples:
            partition = self.direction.cut(run, other)
            tokens = partition.by_sentence[:, partition.columns("difficulty"), None]
            both = (item.under(partition).difficulty[:, :, metrics] for item in (run, other))
            found.append(resampled_sums(self.direction, np.concatenate([tokens, *both], axis=2)))
        return found

    @functools.cached_property
    def correlations(self) -> Correlations:
        """Of the gain in KL and the gain in chrF, given length and the baseline's chrF."""
        return _correlations(self.direction, self.couples, given_others=True)


@dataclass(frozen=True)
class Measure:
    """What decides, or accompanies, a claim.

    ``margin`` is the smallest effect that matters, as a share of the baseline's value; a
    ``non_inferior`` measure claims an effect above ``-margin``, the others one above 0. One
    ``beyond_placebo`` is what the baseline's runs do not show among themselves too.
    """

    claim: int
    name: str
    sample: Callable[[Evidence], Sample | None]
    missing: str
    decides: bool = True
    non_inferior: bool = False
    beyond_placebo: bool = False
    margin: float | None = None


def bucket_sample(evidence: Evidence, metric: str, bucket: int, sign: float = 1.0) -> Sample | None:
    """Baseline minus treatment (times ``sign``) of a mean over easy or hard tokens; None where the
    bucket is empty."""
    own = 1 + ON_BUCKETS.index(metric)
    parts = [couple[bucket].columns(own, own + len(ON_BUCKETS)) for couple in evidence.bucket_sums]
    reasons = (
        bias(evidence.direction, run, other) or unlike(run, other)
        for run, other in evidence.couples
    )
    return _mean_difference(evidence.direction, parts, sign, next(filter(None, reasons), ""))


def unlike(run: ScoredRun, other: ScoredRun) -> str:
    """Why a difference between two runs need not come from the loss: they saw different numbers of
    sentences, or are models of different sizes; "" where these are equal, or not known."""
    if found := other_data(run, other):
        return (
            f"trained on {found[0]:,} sentences, the baseline on {found[1]:,}: data and loss are not told "
            "apart; choose a baseline of the same data with --baseline NAME"
        )
    if found := other_model(run, other):
        return (
            f"a model of {found[0]:,} parameters, the baseline one of {found[1]:,}: model and loss are not "
            "told apart; train the baseline with the same model"
        )
    return ""


def other_data(run: ScoredRun, other: ScoredRun) -> tuple[int, int] | None:
    """On how many sentences two runs were trained; None where these are equal, or not known."""
    return _different(run.run.sentences, other.run.sentences)


def other_model(run: ScoredRun, other: ScoredRun) -> tuple[int, int] | None:
    """How many parameters two runs' models have; None where these are equal, or not known."""
    return _different(run.parameters, other.parameters)


def _different(own: int | None, base: int | None) -> tuple[int, int] | None:
    return None if own is None or base is None or own == base else (own, base)


def easy_time_sample(evidence: Evidence) -> Sample | None:
    """How much sooner tokens that are hard for both turn easy, as a share of the observed span; None
    with fewer than two common steps or without such tokens."""
    parts: list[ResampledSums] = []
    for run, other in evidence.couples:
        sums = easy_times(evidence.direction, run, other)
        if sums is None:
            return None
        parts.extend(resampled_sums(evidence.direction, sums[:, None]))
    reasons = (unlike(run, other) for run, other in evidence.couples)
    return _mean_difference(evidence.direction, parts, reason=next(filter(None, reasons), ""))


def _mean_difference(
    direction: Direction, parts: Sequence[ResampledSums], sign: float = 1.0, reason: str = ""
) -> Sample | None:
    """Mean of the baseline less mean of the run (times ``sign``), from sums for each couple: tokens,
    the run's values, the baseline's; ``reason`` is the sample's bias."""
    assert direction.resamples is not None
    totals = np.array([part.totals for part in parts])
    if (totals[:, 0] == 0).any():
        return None
    drawn = np.array([part.drawn for part in parts])  # (couples, B, 3)
    return Sample(
        effect=sign * (totals[:, 2] - totals[:, 1]) / totals[:, 0],
        drawn=sign * ratio(drawn[:, :, 2] - drawn[:, :, 1], drawn[:, :, 0]),
        base=totals[:, 2] / totals[:, 0],
        base_drawn=ratio(drawn[:, :, 2], drawn[:, :, 0]),
        tokens=int(totals[:, 0].min()),
        sentences=min(part.sentences for part in parts),
        units=direction.resamples.units,
        bias=reason,
    )


def easy_times(direction: Direction, run: ScoredRun, other: ScoredRun) -> Floats | None:
    """Time until a token that is hard for both runs at their first common step turns easy, summed by
    sentence: tokens, times of the run, times of the other, (S, 3); None with fewer than two common
    steps.

    A token that is hard at one step and easy at the next (KL at most Γ) turned easy between them, and
    counts with the middle; one that stays hard counts with the whole span (a restricted mean, so that
    censored tokens are not dropped). The times are counted from the first common step and divided by
    the span.
    """
    steps = sorted(set(run.history) & set(other.history))
    if len(steps) < 2:
        return None
    assert direction.tokens is not None
    gamma = direction.cut(run, other).gamma
    chosen = (run.history[steps[0]] > gamma) & (other.history[steps[0]] > gamma)
    count = len(direction.tokens.sentences)
    sentence = direction.tokens.sentence[chosen]
    columns = [np.bincount(sentence, minlength=count).astype(np.float64)]
    for item in (run, other):
        times = np.ones(len(sentence))
        waiting = np.ones(len(sentence), dtype=np.bool_)
        for before, step in itertools.pairwise(steps):
            easy = waiting & (item.history[step][chosen] <= gamma)
            times[easy] = ((before + step) / 2 - steps[0]) / (steps[-1] - steps[0])
            waiting &= ~easy
        columns.append(np.bincount(sentence, times, count).astype(np.float64))
    return np.stack(columns, axis=1)


def correlation_sample(evidence: Evidence) -> Sample | None:
    """Spearman's correlation over sentences of the gain in KL and the gain in chrF, beyond the one that
    the baseline's runs show among themselves; None without translations or a second baseline run.

    Of two runs of one method, whichever is nearer to the teacher in a sentence by chance also
    translates it better by chance: that much says nothing of a method.
    """
    own, chance = evidence.correlations, evidence.chance
    if own is None or chance is None or not chance.correlations:
        return None
    placebo = {
        other.label: found
        for (_, other), found in zip(chance.couples, chance.correlations, strict=True)
    }
    if not all(other.label in placebo for _, other in evidence.couples):
        return None
    effect, drawn = [], []
    for (_, other), (value, values) in zip(evidence.couples, own, strict=True):
        without, without_drawn = placebo[other.label]
        effect.append(value - without)
        drawn.append(values - without_drawn)
    return _correlation_sample(evidence.direction, effect, drawn)


def plain_correlation_sample(evidence: Evidence) -> Sample | None:
    """Spearman's correlation over sentences of the gain in KL and the gain in chrF, chance included."""
    found = _correlations(evidence.direction, evidence.couples, given_others=False)
    if found is None:
        return None
    return _correlation_sample(evidence.direction, *zip(*found, strict=True))


def _correlation_sample(
    direction: Direction, effect: Sequence[float], drawn: Sequence[Floats]
) -> Sample:
    assert direction.tokens is not None and direction.resamples is not None
    draws = np.stack(drawn)
    return Sample(
        effect=np.array(effect),
        drawn=draws,
        base=np.ones(len(effect)),
        base_drawn=np.ones_like(draws),
        tokens=len(direction.tokens.token),
        sentences=len(direction.tokens.sentences),
        units=direction.resamples.units,
    )


def _correlations(
    direction: Direction, found: Sequence[Couple], given_others: bool
) -> Correlations:
    """None without translations of both runs or where their scores do not vary."""
    assert direction.resamples is not None
    values = []
    for run, other in found:
        if run.translations is None or other.translations is None:
            return None
        gain, better, length, score = sentence_gains(direction, run, other)
        given = [length, score] if given_others else []
        observed = float(partial_spearman(gain, better, given)[0])
        blocks = direction.resamples.blocks()
        drawn = [partial_spearman(gain, better, given, block) for block in blocks]
        values.append((observed, np.concatenate(drawn)))
    return values if np.isfinite([observed for observed, _ in values]).all() else None


def sentence_gains(
    direction: Direction, run: ScoredRun, other: ScoredRun
) -> tuple[Floats, Floats, Floats, Floats]:
    """Of each sentence: gain in mean KL (nats), gain in sentence chrF, tokens, baseline's chrF."""
    assert direction.tokens is not None
    assert run.translations is not None and other.translations is not None
    partition = direction.cut(run, other)
    column = partition.columns("all")
    own, base = (item.under(partition).kl[:, column].sum(axis=1) for item in (run, other))
    length = partition.by_sentence[:, column].sum(axis=1)
    lines = direction.tokens.sentences
    scores, reference = (
        translations.chrf[lines] for translations in (run.translations, other.translations)
    )
    return (base - own) / length, scores - reference, length, reference


_EMPTY = "no token in the bucket"
_TEXTS = (
    "no translations of both runs and of a second run of the baseline, or scores that do not vary"
)
MEASURES = (
    Measure(1, "KL on hard tokens (nats)", lambda e: bucket_sample(e, "kl", HARD), _EMPTY),
    Measure(
        1,
        "agreement on hard tokens",
        lambda e: bucket_sample(e, "agreement", HARD, -1.0),
        _EMPTY,
        decides=False,
    ),
    Measure(
        2,
        "KL on easy tokens (nats)",
        lambda e: bucket_sample(e, "kl", EASY),
        _EMPTY,
        non_inferior=True,
    ),
    Measure(
        3,
        "non-target KL on hard tokens (nats)",
        lambda e: bucket_sample(e, "kl_nontarget", HARD),
        _EMPTY,
    ),
    Measure(
        3,
        "target KL on hard tokens (nats)",
        lambda e: bucket_sample(e, "kl_target", HARD),
        _EMPTY,
        decides=False,
    ),
    Measure(
        4,
        "partial rank correlation beyond the placebo's, given length and baseline's chrF",
        correlation_sample,
        _TEXTS,
        beyond_placebo=True,
        margin=CORRELATION_MARGIN,
    ),
    Measure(
        4,
        "rank correlation of KL gain and chrF gain, chance included",
        plain_correlation_sample,
        _TEXTS,
        decides=False,
        margin=CORRELATION_MARGIN,
    ),
    Measure(
        5,
        "time until hard tokens turn easy (share of training)",
        easy_time_sample,
        "fewer than two common steps with records, or no token hard for both at the first",
    ),
)
