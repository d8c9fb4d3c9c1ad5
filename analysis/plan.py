"""How many seeds and sentences detect a given gain? Answered from the spread of runs that are there.

    python -m analysis.plan RUNS [--effect 0.5] [--power 0.8] [--alpha 0.05] [--hypotheses 5]

For BLEU, and for the fall of KL on hard tokens that claim 1 is about: the smallest gain over the
baseline that the runs as they are can detect, how many seeds a gain of a given size needs, and a table
over numbers of seeds and sentences. :mod:`analysis.power` has the model and its source.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.claims.evidence import Evidence, bucket_sample
from analysis.claims.verdicts import CLAIMS
from analysis.markup import markdown_table
from analysis.power import (
    MIN_SEEDS,
    POWER,
    Spread,
    corrected,
    seeds_needed,
    smallest_detectable,
)
from analysis.runs.errors import UserError, one_line_errors
from analysis.runs.methods import Method, label_of, ordered
from analysis.runs.run_record import warn_left_out
from analysis.stats import ALPHA, Floats
from analysis.sums.buckets import HARD
from analysis.sums.direction import Direction, Options
from analysis.sums.loading import load
from analysis.sums.pairing import couples

#: Numbers of seeds in the table.
SEEDS = (2, 3, 4, 5, 6, 8, 10, 15, 20)
#: Numbers of sentences in the table, as multiples of those that are there.
MULTIPLES = (1, 2, 4)
#: Seeds beyond which nobody trains.
MOST_SEEDS = 100


@dataclass(frozen=True)
class Gains:
    """A method's gains over the baseline in one direction.

    Attributes
    ----------
    observed : (S,) by seed
    resampled : (S, B) the same in every resample of the sentences
    base : the baseline's own value, mean over seeds
    sentences : how many
    """

    observed: Floats
    resampled: Floats
    base: float
    sentences: int


def bleu_gains(direction: Direction, method: str, baseline: str) -> Gains | None:
    """Gains in BLEU; None with fewer than two seeds."""
    runs = direction.translated
    found = couples([run for run in runs if str(run.method) == method], runs, baseline)
    if direction.corpus is None or len(found) < MIN_SEEDS:
        return None
    observed, resampled, base = [], [], []
    for run, other in found:
        assert run.translations is not None and other.translations is not None
        scores = [
            direction.corpus.corpus_score(item, "BLEU")
            for item in (run.translations, other.translations)
        ]
        drawn = [
            direction.corpus.resampled_scores(item, "BLEU")
            for item in (run.translations, other.translations)
        ]
        observed.append(scores[0] - scores[1])
        resampled.append(drawn[0] - drawn[1])
        base.append(scores[1])
    return Gains(
        np.array(observed), np.stack(resampled), float(np.mean(base)), direction.corpus.sentences
    )


def kl_gains(direction: Direction, method: str, baseline: str) -> Gains | None:
    """Falls of KL on hard tokens, in nats; None with fewer than two seeds or without hard tokens."""
    evidence = Evidence.of(direction, method, baseline)
    sample = bucket_sample(evidence, "kl", HARD) if evidence.couples else None
    if sample is None or len(sample.effect) < MIN_SEEDS:
        return None
    assert direction.tokens is not None
    sentences = len(direction.tokens.sentences)
    return Gains(sample.effect, sample.drawn, float(sample.base.mean()), sentences)


@dataclass(frozen=True)
class Pilot:
    """What the runs that are there say of one measure.

    Attributes
    ----------
    measure, unit : "BLEU", ""; "KL on hard tokens", "nats"
    spread : of the mean gain over the directions
    alone : of each direction
    seeds : the fewest that a method has
    methods : whose gains' spreads the spread is the mean of
    base : the baseline's value
    hypotheses : over how many a report of these runs would correct the p-values
    """

    measure: str
    unit: str
    spread: Spread
    alone: Mapping[str, Spread]
    seeds: int
    methods: Sequence[str]
    base: float
    hypotheses: int

    def smallest_detectable(self, power: float = POWER, alpha: float = ALPHA) -> float:
        """The smallest gain that the runs as they are detect, mean of the directions."""
        level = corrected(alpha, self.hypotheses)
        return smallest_detectable(self.spread, self.seeds, self.spread.sentences, power, level)


def bleu_pilot(directions: Sequence[Direction], baseline: str) -> Pilot | None:
    """The spread of gains in BLEU; None where no method has two seeds in each direction. Hypotheses are
    the gains over the baseline of all methods that have them."""

    def seeds(direction: Direction, method: str) -> int:
        runs = direction.translated
        return len(couples([run for run in runs if str(run.method) == method], runs, baseline))

    found = _pilot(directions, baseline, "BLEU", "", bleu_gains)
    tested = [
        method
        for method in _others(directions, baseline)
        if all(seeds(direction, method) >= MIN_SEEDS for direction in directions)
    ]
    return found and replace(found, hypotheses=len(tested))


def kl_pilot(directions: Sequence[Direction], baseline: str) -> Pilot | None:
    """The spread of falls of KL on hard tokens; None as in :func:`bleu_pilot`. Hypotheses are all claims
    about the methods under test."""
    found = _pilot(directions, baseline, "KL on hard tokens", "nats", kl_gains)
    return found and replace(found, hypotheses=len(CLAIMS) * len(found.methods))


def _others(directions: Sequence[Direction], baseline: str) -> list[str]:
    """The methods that are compared with the baseline."""
    methods = {run.method for direction in directions for run in direction.runs}
    return ordered(str(method) for method in methods if method.id not in ("teacher", baseline))


def _pilot(
    directions: Sequence[Direction],
    baseline: str,
    measure: str,
    unit: str,
    gains: Callable[[Direction, str, str], Gains | None],
) -> Pilot | None:
    """The mean spread of the methods under test (all others, where there are none) that are there in
    all directions."""
    others = _others(directions, baseline)
    treatments = [method for method in others if Method.of(method).is_treatment]
    found: dict[str, list[Gains]] = {}
    for method in treatments or others:
        own = [gains(direction, method, baseline) for direction in directions]
        whole = [item for item in own if item is not None]
        if whole and len(whole) == len(own):
            found[method] = whole
    if not found:
        return None
    alone = {
        direction.name: Spread.pooled([_spread([own[place]]) for own in found.values()])
        for place, direction in enumerate(directions)
    }
    every = [item for own in found.values() for item in own]
    return Pilot(
        measure,
        unit,
        Spread.pooled([_spread(own) for own in found.values()]),
        alone,
        min(len(item.observed) for item in every),
        list(found),
        float(np.mean([item.base for item in every])),
        hypotheses=1,
    )


def _spread(gains: Sequence[Gains]) -> Spread:
    return Spread.of(
        [item.observed for item in gains],
        [item.resampled for item in gains],
        [item.sentences for item in gains],
    )


def plan_table(found: Pilot, power: float, alpha: float) -> pd.DataFrame:
    """One row a number of seeds: the smallest detectable gain with each number of sentences, at the level
    ``alpha`` of one test."""
    sentences = [multiple * found.spread.sentences for multiple in MULTIPLES]
    table = pd.DataFrame({"seeds": SEEDS})
    for count in sentences:
        table[f"{count:,} sentences"] = [
            smallest_detectable(found.spread, seeds, count, power, alpha) for seeds in SEEDS
        ]
    return table


def describe(found: Pilot, effect: float, power: float, alpha: float) -> str:
    """What there is to say of a measure, as Markdown."""
    spread = found.spread
    unit = f" {found.unit}" if found.unit else ""
    digits = 2 if found.measure == "BLEU" else 3
    level = corrected(alpha, found.hypotheses)

    def smallest(own: Spread) -> str:
        value = smallest_detectable(own, found.seeds, own.sentences, power, level)
        return f"{value:.{digits}f}{unit}"

    def needed(own: Spread, sentences: int) -> str:
        seeds = seeds_needed(effect, own, sentences, power, level, MOST_SEEDS)
        return f"more than {MOST_SEEDS} seeds" if seeds is None else f"{seeds} seeds"

    directions = len(found.alone)
    parts = [
        f"## {found.measure}",
        (
            f"With the runs as they are ({found.seeds} seeds, {spread.sentences:,} sentences, "
            f"{directions} direction{'s' if directions > 1 else ''}) the smallest detectable gain is "
            f"**{smallest(spread)}** (power {power:.0%}, p at most {alpha:g}, two-sided, "
            f"{_correction(found.hypotheses)})."
        ),
        (
            f"A gain of {effect:.{digits}f}{unit} needs "
            + "; ".join(
                f"{needed(spread, count)} with {count:,} sentences"
                for count in (multiple * spread.sentences for multiple in MULTIPLES)
            )
            + "."
        ),
    ]
    if directions > 1:
        rows = [
            {
                "direction alone": name,
                "smallest detectable": smallest(own),
                f"for {effect:.{digits}f}{unit}": needed(own, own.sentences),
            }
            for name, own in found.alone.items()
        ]
        parts.append(markdown_table(pd.DataFrame(rows)))
    table = plan_table(found, power, level)
    parts += [
        f"Smallest detectable gain{', mean of the directions' if directions > 1 else ''}:",
        markdown_table(table.map(lambda v: f"{v:.{digits}f}" if isinstance(v, float) else v)),
        (
            f"From the gains of {', '.join(map(label_of, found.methods))}: {spread.freedom} degrees of freedom "
            f"over seeds{' at least' if len(found.methods) > 1 else ''}, so with few runs these are rough "
            "figures themselves. Standard deviations of one "
            f"run's gain: {np.sqrt(spread.seed.mean()):.{digits + 1}f} between seeds, "
            f"{np.sqrt(spread.interaction.mean()):.{digits + 1}f} of a seed on its sentences; of the "
            f"sentences, the same for all seeds: {np.sqrt(spread.sentence):.{digits + 1}f}."
        ),
    ]
    return "\n\n".join(parts)


def _correction(hypotheses: int) -> str:
    if hypotheses == 1:
        return "one test, not corrected"
    return f"with Holm's correction over {hypotheses} tests"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m analysis.plan",
        description="Say how many seeds and sentences detect a given gain over the baseline, from the "
        "spread of the runs below a directory.",
    )
    add = out.add_argument
    add("runs", type=Path, metavar="RUNS", help="directory of runs, found by their run.json")
    add("--effect", type=float, default=0.5, help="gain in BLEU (default: %(default)s)")
    add(
        "--kl-effect",
        type=float,
        metavar="NATS",
        help="fall of KL on hard tokens (default: 2 per cent of the baseline's)",
    )
    add(
        "--power",
        type=float,
        default=POWER,
        help="probability that the gain is found significant (default: %(default)s)",
    )
    add(
        "--alpha",
        type=float,
        default=ALPHA,
        help="level of the tests, corrected for all of them (default: %(default)s)",
    )
    add(
        "--hypotheses",
        type=int,
        metavar="N",
        help="tests over which Holm's correction will run (default: those of a report of these runs, one a "
        "method for BLEU and one a claim and SE-KD method for KL)",
    )
    add("--subset", default="test", help="split that was scored (default: %(default)s)")
    add("--baseline", default="word_kd", metavar="METHOD", help="(default: %(default)s)")
    add("--resamples", type=int, default=1000, help="bootstrap resamples (default: %(default)s)")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs and print the plan."""
    args = parser().parse_args(argv)
    with one_line_errors():
        for option in ("power", "alpha"):
            if not 0 < getattr(args, option) < 1:
                raise UserError(
                    f"--{option}: expected a number between 0 and 1, found {getattr(args, option)}"
                )
        if args.power <= args.alpha:
            raise UserError(
                f"--power: expected more than --alpha ({args.alpha}), found {args.power}"
            )
        for option in ("effect", "kl_effect"):
            if getattr(args, option) is not None and not getattr(args, option) > 0:
                name = option.replace("_", "-")
                raise UserError(
                    f"--{name}: expected a number above 0, found {getattr(args, option)}"
                )
        if args.hypotheses is not None and args.hypotheses < 1:
            raise UserError(f"--hypotheses: expected at least 1, found {args.hypotheses}")
        options = Options(subset=args.subset, baseline=args.baseline, resamples=args.resamples)
        directions, left_out = load(args.runs, options)
        warn_left_out(left_out)
        bleu = bleu_pilot(directions, args.baseline)
        kl = kl_pilot(directions, args.baseline)
        if bleu is None and kl is None:
            raise UserError(
                f"{args.runs}: expected a method with {MIN_SEEDS} seeds in every direction, and as many "
                f"of {args.baseline}, found none; one seed says nothing of the spread of training"
            )
        for found, effect in ((bleu, args.effect), (kl, args.kl_effect)):
            if found is not None:
                found = replace(found, hypotheses=args.hypotheses or found.hypotheses)
                smallest = effect or options.margin * found.base
                print(describe(found, smallest, args.power, args.alpha))


if __name__ == "__main__":
    main()
