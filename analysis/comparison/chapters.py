"""The chapters of a comparison's report: each owns its tables, its figure and its words.

Where systems are columns, the other columns have names of several words, which no file gives a system.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.comparison import drawings
from analysis.comparison.metrics import Comparison, Measure
from analysis.comparison.systems import Corpus
from analysis.comparison.words import (
    SCORES,
    SURPLUS,
    CutTexts,
    accuracy_table,
    bucket_table,
    histogram_table,
    length_ratio,
    length_table,
    ngram_table,
)
from analysis.markup import interval, number, p_value, percent
from analysis.stats import ALPHA, Floats

#: Sentences shown of each kind, for each system.
EXAMPLES = 25
#: The metric that examples and the distribution of sentences go by.
SENTENCE_METRIC = "chrF"


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes
    ----------
    name : of its files
    caption : stands alone in a paper
    data : the numbers, for the CSV
    shown : the cells as text
    best : (rows, columns) of ``shown``, True where a cell is the best of its column
    """

    name: str
    caption: str
    data: pd.DataFrame
    shown: pd.DataFrame
    best: np.ndarray[Any, np.dtype[np.bool_]] | None = None


@dataclass(frozen=True)
class Figure:
    """A figure: the name of its files, its caption, and what draws it to a path."""

    name: str
    caption: str
    draw: Callable[[Path], None]


@dataclass(frozen=True)
class Example:
    """A sentence with the translations of the baseline and a system, by name, and their scores."""

    number: int
    source: str | None
    reference: str
    translations: Mapping[str, str]
    scores: tuple[float, float]


@dataclass(frozen=True)
class Chapter:
    """A heading with its text, tables, figure, and examples by title."""

    heading: str
    text: str = ""
    tables: Sequence[Table] = ()
    figure: Figure | None = None
    examples: Mapping[str, Sequence[Example]] | None = None


@dataclass(frozen=True)
class Results:
    """What is known of the systems: texts, words, scores with their tests, and the frequency of
    words in the training data (None: not given)."""

    corpus: Corpus
    texts: CutTexts
    measures: Sequence[Measure]
    comparison: Comparison
    frequency: Mapping[str, int] | None
    resamples: int
    trials: int
    seed: int

    def best(self, measure: Measure) -> str:
        """The system with the best score."""
        return max(self.corpus.systems, key=lambda system: measure.gain(measure.score(system)))

    def sentence_scores(self, system: str) -> Floats:
        """:data:`SENTENCE_METRIC` of each sentence alone, (S,)."""
        measure = next(item for item in self.measures if item.name == SENTENCE_METRIC)
        return measure.scores(measure.statistics[system])

    def p(self, measure: Measure, one: str, other: str) -> float:
        """The corrected p-value of two systems' difference; NaN for a system and itself."""
        pairs = self.comparison.pairs
        both = pairs["system"].isin([one, other]) & pairs["against"].isin([one, other])
        found = pairs.loc[both & (pairs["metric"] == measure.name), "p_holm"]
        return float("nan") if one == other else float(found.iloc[0])


def chapters(results: Results) -> list[Chapter]:
    """The report, chapter by chapter."""
    several = bool(results.corpus.others)
    found = [
        _scores(results),
        _differences(results) if several else None,
        _length(results),
        _sentences(results),
        _words(results, results.frequency) if results.frequency is not None else None,
        _ngrams(results) if several else None,
        _examples(results) if several else None,
        _method(results),
    ]
    return [chapter for chapter in found if chapter is not None]


def findings(results: Results) -> str:
    """One paragraph: the best system by each metric, and those it is not significantly better than."""
    corpus = results.corpus
    if not corpus.others:
        return f"One system, {corpus.baseline}; with a second one they are compared."
    sentences = []
    for measure in results.measures:
        best = results.best(measure)
        tied = [other for other in corpus.systems if results.p(measure, best, other) > ALPHA]
        rest = f"not significantly better than {_joined(tied)}" if tied else "significantly so"
        sentences.append(
            f"By {measure.name}, {best} is the best ({measure.score(best):.2f}), {rest}."
        )
    return " ".join([*sentences, f"Significant: a corrected p of at most {ALPHA}."])


def _joined(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _scores(results: Results) -> Chapter:
    corpus, scores = results.corpus, results.comparison.scores
    shown = pd.DataFrame({"system": list(corpus.systems)})
    best = np.zeros((len(shown), 2 + len(results.measures)), dtype=bool)
    for column, measure in enumerate(results.measures, start=1):
        own = scores[scores["metric"] == measure.name].to_dict("records")
        shown[_heading(measure)] = [
            interval(row["score"], row["low"], row["high"], 2)
            + (" †" if results.p(measure, row["system"], corpus.baseline) <= ALPHA else "")
            for row in own
        ]
        best[:, column] = [row["system"] == results.best(measure) for row in own]
    shown["length ratio"] = [
        number(length_ratio(results.measures[0], system), 3) for system in corpus.systems
    ]
    caption = (
        f"Scores on {_size(corpus)} with 95 % bootstrap intervals, and length by the references'."
    )
    if corpus.others:
        caption += f" The best is bold; † differs from {corpus.baseline} (corrected p ≤ {ALPHA})."
    if any(measure.lower_is_better for measure in results.measures):
        caption += " ↓ lower is better."
    signatures = ", ".join(f"`{measure.signature}`" for measure in results.measures)
    return Chapter(
        "Scores",
        f"Signatures: {signatures}",
        [Table("scores", caption, scores, shown, best if corpus.others else None)],
        Figure(
            "scores",
            "Scores with 95 % bootstrap intervals.",
            lambda path: drawings.draw_scores(scores, path),
        ),
    )


def _heading(measure: Measure) -> str:
    return f"{measure.name} ↓" if measure.lower_is_better else measure.name


def _size(corpus: Corpus) -> str:
    sentences = f"{corpus.sentences:,} sentences"
    return f"{sentences} of {corpus.units} documents" if corpus.documents else sentences


def _differences(results: Results) -> Chapter:
    gains = {measure.name: measure.gain for measure in results.measures}
    rows = []
    for row in results.comparison.pairs.to_dict("records"):
        better = row["system"] if gains[row["metric"]](row["difference"]) > 0 else row["against"]
        rows.append(
            {
                "metric": row["metric"],
                "system": row["system"],
                "against": row["against"],
                "difference": interval(row["difference"], row["low"], row["high"], 2),
                "p": p_value(row["p"]),
                "p (Holm)": p_value(row["p_holm"]),
                "better": better if row["p_holm"] <= ALPHA else "not significant",
            }
        )
    caption = (
        "Differences of two systems' scores with paired 95 % bootstrap intervals, p-values of "
        "approximate randomisation, and their correction over the pairs of a metric (Holm)."
    )
    return Chapter(
        "Differences",
        tables=[Table("pairs", caption, results.comparison.pairs, pd.DataFrame(rows))],
    )


def _length(results: Results) -> Chapter:
    texts = results.texts
    lengths = length_table(results.corpus, results.measures[0], texts)
    shown = pd.DataFrame(
        {
            "system": row["system"],
            "words": f"{row['words']:,}",
            "length ratio": number(row["length_ratio"], 3),
            "brevity penalty": number(row["brevity_penalty"], 3),
            "empty": str(row["empty"]),
            "with a repetition": percent(row["repetition"]),
        }
        for row in lengths.to_dict("records")
    )
    reference = np.array([len(words) for words in texts.reference])
    surplus = {
        system: np.array([len(words) for words in own]) - reference
        for system, own in texts.systems.items()
    }
    table = histogram_table(surplus, SURPLUS, "words more than the reference")
    return Chapter(
        "Length and repetition",
        "The length ratio is BLEU's: words of the translations by words of the references, of "
        "several references the one nearest in length. A repetition is the same words three times in "
        "a row.",
        [
            Table("length", "Length and repetition of the translations.", lengths, shown),
            Table(
                "length_difference",
                "Sentences by how many words their translation has more than their reference.",
                table,
                table.astype(str),
            ),
        ],
    )


def _sentences(results: Results) -> Chapter:
    corpus, measure = results.corpus, results.measures[0]
    table = bucket_table(corpus, results.measures, results.texts)
    scores = table.pivot(index="words", columns="system", values=measure.name)
    sizes = table.drop_duplicates("words")
    shown = pd.DataFrame(
        {
            "words of the reference": sizes["words"],
            "how many sentences": sizes["sentences"].astype(str),
        }
    )
    for system in corpus.systems:
        shown[system] = [
            number(scores.loc[bucket, system], 2) or "no sentences" for bucket in sizes["words"]
        ]
    own = {system: results.sentence_scores(system) for system in corpus.systems}
    distribution = histogram_table(own, SCORES, f"{SENTENCE_METRIC} of the translation")
    return Chapter(
        "Sentences by length and by score",
        tables=[
            Table(
                "by_length",
                f"{measure.name} by words of the (first) reference; the other metrics are in the CSV.",
                table,
                shown,
            ),
            Table(
                "by_score",
                f"Sentences by the {SENTENCE_METRIC} of their translations.",
                distribution,
                distribution.astype(str),
            ),
        ],
        figure=Figure(
            "by_length",
            f"{measure.name} by words of the reference.",
            lambda path: drawings.draw_buckets(table, "words", measure.name, path),
        ),
    )


def _words(results: Results, frequency: Mapping[str, int]) -> Chapter:
    table = accuracy_table(
        results.corpus, results.texts, frequency, results.resamples, results.seed
    )
    sizes = table.drop_duplicates("frequency")
    shown = pd.DataFrame(
        {
            "training frequency": sizes["frequency"],
            "words of the reference": sizes["reference_words"].astype(str),
        }
    )
    for system, own in table.groupby("system", sort=False):
        shown[str(system)] = [
            interval(100 * row["f"], 100 * row["low"], 100 * row["high"], 1) or "no words"
            for row in own.to_dict("records")
        ]
    caption = (
        "F-measure of the words (per cent) by how often they are in the training data, with 95 % "
        "bootstrap intervals."
    )
    return Chapter(
        "Words by training frequency",
        "A word is right as often as the sentence's (first) reference has it too. Precision, recall "
        "and gains over the baseline are in the CSV.",
        [Table("words", caption, table, shown)],
        Figure(
            "words",
            "F-measure of words by their frequency in the training data, with 95 % intervals.",
            lambda path: drawings.draw_buckets(table, "frequency", "f", path),
        ),
    )


def _ngrams(results: Results) -> Chapter:
    baseline = results.corpus.baseline
    table = ngram_table(results.corpus, results.texts)
    tables = []
    for place, (system, own) in enumerate(table.groupby("system", sort=False), start=1):
        shown = pd.DataFrame(
            {
                "the n-gram": own["ngram"],
                "right more often in": np.where(own["better"], str(system), baseline),
                str(system): own["system_right"].astype(str),
                baseline: own["baseline_right"].astype(str),
                "in the reference": own["in_reference"].astype(str),
            }
        )
        caption = f"n-grams that {system} gets right more often, or less, than {baseline}."
        tables.append(Table(f"ngrams_{place}", caption, own, shown))
    return Chapter(
        "n-grams that differ most",
        "How often each system has an n-gram that the reference of the sentence has too. First those "
        "which the system gets right and the baseline does not, then the reverse.",
        tables,
    )


def _examples(results: Results) -> Chapter:
    corpus = results.corpus
    before = results.sentence_scores(corpus.baseline)
    found: dict[str, list[Example]] = {}
    for system in corpus.others:
        after = results.sentence_scores(system)
        order = np.argsort(before - after, kind="stable").tolist()
        gained = [i for i in order if after[i] > before[i]]
        lost = [i for i in reversed(order) if after[i] < before[i]]
        for title, chosen in (
            (f"{system} gains most over {corpus.baseline}", gained),
            (f"{system} loses most to {corpus.baseline}", lost),
        ):
            examples = [
                Example(
                    number=i + 1,
                    source=corpus.sources[i] if corpus.sources else None,
                    reference=corpus.references[0][i],
                    translations={
                        name: corpus.systems[name][i] for name in (corpus.baseline, system)
                    },
                    scores=(float(before[i]), float(after[i])),
                )
                for i in chosen[:EXAMPLES]
            ]
            if examples:
                found[title] = examples
    return Chapter(
        "Examples",
        f"The sentences whose {SENTENCE_METRIC} differs most; all are in `tables/sentences.csv`.",
        examples=found,
    )


def _method(results: Results) -> Chapter:
    corpus = results.corpus
    unit = "documents, whose sentences are drawn together" if corpus.documents else "sentences"
    words = f"Words are cut by sacreBLEU's `{corpus.tokenizer.name}`"
    return Chapter(
        "How this was computed",
        f"{words}, with {len(corpus.references)} reference"
        f"{'s' if len(corpus.references) > 1 else ''}. Scores come from sacreBLEU's own statistics of "
        f"each sentence. {results.resamples:,} resamples and {results.trials:,} trials of {unit}, random "
        f"seed {results.seed}. Tests know of these {_size(corpus)} and nothing of other test sets, or of "
        "how the systems would turn out if they were trained again.",
    )
