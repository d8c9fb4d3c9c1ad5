"""Words of the systems: accuracy by training frequency, n-grams, lengths, repetition."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sacrebleu.metrics.bleu import BLEU

from analysis.comparison.metrics import Measure
from analysis.comparison.systems import Corpus
from analysis.stats import Floats, Resamples, ratio

Words = list[str]

#: Lower edges of the buckets of training frequency.
FREQUENCIES = (0, 1, 2, 5, 10, 100, 1000)
#: Lower edges of the buckets of reference length in words.
LENGTHS = (0, 10, 20, 30, 40, 50, 60)
#: Lower edges of the buckets of a translation's words less its reference's.
SURPLUS = (-(10**9), -20, -10, -5, -2, 0, 1, 3, 6, 11, 21)
#: Lower edges of the buckets of sentence chrF.
SCORES = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90)
#: Words of the longest n-grams that are compared, and how many n-grams are shown of each kind.
ORDER, SHOWN = 4, 10
#: How often words stand in a row in a repetition.
REPEATED = 3


def bucket_names(edges: Sequence[int]) -> list[str]:
    """``0``, ``1``, ``2-4``, ..., ``1000+`` for whole numbers from each edge to the next."""
    names = []
    for low, after in zip(edges, [*edges[1:], None], strict=True):
        if after is None:
            names.append(f"{low}+")
        elif low < -(10**8):
            names.append(f"< {after}")
        else:
            names.append(str(low) if after == low + 1 else f"{low} to {after - 1}")
    return names


def buckets_of(values: Iterable[float], edges: Sequence[int]) -> np.ndarray[Any, np.dtype[np.intp]]:
    """The index of the bucket that each value is in."""
    return np.searchsorted(edges, np.asarray(list(values), dtype=np.float64), side="right") - 1


@dataclass(frozen=True)
class CutTexts:
    """Words of the first reference and of every system, by sentence."""

    reference: list[Words]
    systems: dict[str, list[Words]]


def cut(corpus: Corpus) -> CutTexts:
    """Cut with sacreBLEU's tokenizer; what has no spaces becomes characters or MeCab's words."""
    split = splitter(corpus.tokenizer.name)
    return CutTexts(
        [split(line) for line in corpus.references[0]],
        {name: [split(line) for line in lines] for name, lines in corpus.systems.items()},
    )


def splitter(tokenizer: str) -> Callable[[str], Words]:
    """A function from a line to its words."""
    tokenize = BLEU(tokenize=tokenizer).tokenizer
    return lambda line: tokenize(line.rstrip()).split()


def length_table(corpus: Corpus, bleu: Measure, texts: CutTexts) -> pd.DataFrame:
    """One row a system, and one for the first reference: words, their ratio to the reference's (the
    closest one, as in BLEU), brevity penalty, empty translations, share with a repetition
    (:func:`repeats`)."""
    rows: list[dict[str, Any]] = []
    for system, lines in corpus.systems.items():
        words, reference = bleu.statistics[system].sum(axis=0)[:2]
        rows.append(
            {
                "system": system,
                "sentences": corpus.sentences,
                "words": int(words),
                "reference_words": int(reference),
                "length_ratio": length_ratio(bleu, system),
                "brevity_penalty": brevity_penalty(words, reference),
                "empty": sum(not line.strip() for line in lines),
                "repetition": float(np.mean([repeats(own) for own in texts.systems[system]])),
            }
        )
    rows.append(
        {
            "system": "reference",
            "sentences": corpus.sentences,
            "words": sum(map(len, texts.reference)),
            "empty": sum(not line.strip() for line in corpus.references[0]),
            "repetition": float(np.mean([repeats(own) for own in texts.reference])),
        }
    )
    return pd.DataFrame(rows)


def length_ratio(bleu: Measure, system: str) -> float:
    """Words of a system by those of the closest references; NaN without any."""
    words, reference = bleu.statistics[system].sum(axis=0)[:2]
    return float(words / reference) if reference else float("nan")


def brevity_penalty(words: float, reference: float) -> float:
    """BLEU's factor for translations that are too short; 0 where there are no words at all."""
    if words >= reference:
        return 1.0
    return float(np.exp(1 - reference / words)) if words else 0.0


def repeats(words: Words) -> bool:
    """Whether some words stand three times in a row, as degenerate decoding has it ("of the house of
    the house of the house"); punctuation alone does not count."""
    for size in range(1, len(words) // REPEATED + 1):
        same = 0
        for end, (left, right) in enumerate(zip(words, words[size:], strict=False)):
            same = same + 1 if left == right else 0
            if same >= (REPEATED - 1) * size and any(map(_is_word, words[end : end + size])):
                return True
    return False


def _is_word(text: str) -> bool:
    return any(map(str.isalnum, text))


def accuracy_table(
    corpus: Corpus, texts: CutTexts, frequency: Mapping[str, int], resamples: int, seed: int
) -> pd.DataFrame:
    """One row a system and bucket of training frequency: precision, recall and F of its words.

    A word of a sentence is right as often as it is in the (first) reference too, as in compare-mt.
    ``f`` has a 95 % bootstrap interval, ``gain`` one over the baseline. Without words in a bucket,
    neither in the references nor in the translations, there are counts of 0 and no values.

    References
    ----------
    Neubig et al. (2019). compare-mt: a tool for holistic comparison of language generation systems.
    NAACL demonstrations. https://doi.org/10.18653/v1/N19-4007
    """
    names = bucket_names(FREQUENCIES)
    draws = Resamples(corpus.units, resamples, np.random.default_rng([seed, corpus.units]))
    bucket = _Buckets(frequency)
    rows: list[dict[str, Any]] = []
    base = base_drawn = np.zeros(0)
    for system, sentences in texts.systems.items():
        counts = np.stack(
            [
                _word_counts(own, reference, bucket, len(names))
                for own, reference in zip(sentences, texts.reference, strict=True)
            ]
        )  # (S, buckets, 3)
        sums = counts.sum(axis=0)
        drawn = draws.sums(corpus.by_unit(counts).reshape(corpus.units, -1))
        f, f_drawn = _f(sums), _f(drawn.reshape(resamples, len(names), 3))
        if system == corpus.baseline:
            base, base_drawn = f, f_drawn
        low, high = corpus.interval(f_drawn)
        gain_low, gain_high = corpus.interval(f_drawn - base_drawn)
        for i, name in enumerate(names):
            right, own_words, reference_words = sums[i]
            row = {
                "frequency": name,
                "system": system,
                "reference_words": int(reference_words),
                "words": int(own_words),
                "right": int(right),
                "precision": right / own_words if own_words else np.nan,
                "recall": right / reference_words if reference_words else np.nan,
                "f": f[i],
                "low": low[i],
                "high": high[i],
            }
            if system != corpus.baseline:
                row |= {"gain": f[i] - base[i], "gain_low": gain_low[i], "gain_high": gain_high[i]}
            rows.append(row)
    return pd.DataFrame(rows)


class _Buckets(dict[str, int]):
    """The frequency bucket of each word."""

    def __init__(self, frequency: Mapping[str, int]) -> None:
        super().__init__()
        self._frequency = frequency

    def __missing__(self, word: str) -> int:
        self[word] = int(buckets_of([self._frequency.get(word, 0)], FREQUENCIES)[0])
        return self[word]


def _word_counts(own: Words, reference: Words, bucket: Mapping[str, int], buckets: int) -> Floats:
    """Right words, the translation's and the reference's by bucket, (buckets, 3)."""
    counts = np.zeros((buckets, 3))
    ours, theirs = Counter(own), Counter(reference)
    for column, counter in enumerate((ours & theirs, ours, theirs)):
        for word, count in counter.items():
            counts[bucket[word], column] += count
    return counts


def _f(counts: Floats) -> Floats:
    """F1 of (..., 3) counts of right, own and reference words."""
    return ratio(2 * counts[..., 0], counts[..., 1] + counts[..., 2])


def ngram_table(corpus: Corpus, texts: CutTexts) -> pd.DataFrame:
    """The n-grams, up to :data:`ORDER` words, that each system gets right more often, or less, than
    the baseline: those whose share of right ones, ``(a + 1) / (a + b + 2)``, is the most uneven.

    ``system_right`` (a) and ``baseline_right`` (b) count as BLEU does: a sentence's n-gram as often
    as it is in the reference too.
    """
    references = [_ngrams(words) for words in texts.reference]
    total = Counter[str]()
    for counter in references:
        total.update(counter)
    right: dict[str, Counter[str]] = {}
    for system, sentences in texts.systems.items():
        right[system] = Counter()
        for words, reference in zip(sentences, references, strict=True):
            right[system].update(_ngrams(words) & reference)
    rows = []
    base = right[corpus.baseline]
    for system in corpus.others:
        own = right[system]
        share = {
            ngram: (own[ngram] + 1) / (own[ngram] + base[ngram] + 2)
            for ngram in own.keys() | base.keys()
            if own[ngram] != base[ngram]
        }
        order = sorted(share, key=lambda ngram: (-share[ngram], ngram))
        better = [ngram for ngram in order if share[ngram] > 0.5][:SHOWN]
        worse = [ngram for ngram in reversed(order) if share[ngram] < 0.5][:SHOWN]
        for ngram in better + worse:
            rows.append(
                {
                    "system": system,
                    "better": ngram in better,
                    "ngram": ngram,
                    "system_right": own[ngram],
                    "baseline_right": base[ngram],
                    "in_reference": total[ngram],
                    "share": share[ngram],
                }
            )
    columns = [
        "system",
        "better",
        "ngram",
        "system_right",
        "baseline_right",
        "in_reference",
        "share",
    ]
    return pd.DataFrame(rows, columns=columns)


def _ngrams(words: Words) -> Counter[str]:
    return Counter(
        " ".join(words[start : start + size])
        for size in range(1, ORDER + 1)
        for start in range(len(words) - size + 1)
    )


def bucket_table(corpus: Corpus, measures: Sequence[Measure], texts: CutTexts) -> pd.DataFrame:
    """One row a bucket of reference length and system: sentences and every score of them (none in
    an empty bucket)."""
    which = buckets_of(map(len, texts.reference), LENGTHS)
    rows = []
    for index, name in enumerate(bucket_names(LENGTHS)):
        inside = which == index
        for system in corpus.systems:
            row: dict[str, Any] = {"words": name, "system": system, "sentences": int(inside.sum())}
            for measure in measures:
                sums = measure.statistics[system][inside].sum(axis=0)
                row[measure.name] = measure.compute(sums) if inside.any() else np.nan
            rows.append(row)
    return pd.DataFrame(rows)


def histogram_table(
    values: Mapping[str, Floats], edges: Sequence[int], column: str
) -> pd.DataFrame:
    """One row a bucket of ``values``, by system: how many sentences each system has in it."""
    table = pd.DataFrame({column: bucket_names(edges)})
    for system, own in values.items():
        table[system] = np.bincount(buckets_of(own, edges), minlength=len(edges))
    return table


def sentence_table(corpus: Corpus, measures: Sequence[Measure], texts: CutTexts) -> pd.DataFrame:
    """One row a sentence and system: unit that is resampled, words, and every score of it alone."""
    parts = []
    for system, words in texts.systems.items():
        columns: dict[str, Any] = {
            "sentence": np.arange(1, corpus.sentences + 1),
            "unit": corpus.unit + 1,
            "system": system,
            "words": [len(own) for own in words],
            "reference_words": [len(own) for own in texts.reference],
        }
        columns |= {item.name: item.scores(item.statistics[system]) for item in measures}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)
