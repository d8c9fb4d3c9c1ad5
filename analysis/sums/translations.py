"""Translations with sacreBLEU's sufficient statistics, so that scores are sums of sentences."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from analysis.runs.languages import Tokenizer, bleu_tokenizer, installed_tokenizer, languages_of
from analysis.runs.run_record import Run, read_scores
from analysis.runs.texts import Texts
from analysis.stats import Floats, Resamples
from analysis.terminal import warn


@dataclass(frozen=True)
class Translations:
    """A run's translations.

    Attributes
    ----------
    texts : with references and sources
    statistics : sufficient statistics of each sentence by metric, (S, C)
    chrf : of each sentence alone, (S,)
    """

    texts: Texts
    statistics: Mapping[str, Floats]
    chrf: Floats

    @property
    def lengths(self) -> tuple[float, float]:
        """Words of the translations, and of the references, as BLEU counts them."""
        words, reference = self.statistics["BLEU"].sum(axis=0)[:2]
        return float(words), float(reference)

    @property
    def length_ratio(self) -> float:
        """Words of the translations by words of the references; NaN without any."""
        words, reference = self.lengths
        return words / reference if reference else float("nan")


@dataclass(frozen=True)
class Corpus:
    """What the translations of a direction are scored with.

    Attributes
    ----------
    metrics : by name, each with the references
    resamples : of the sentences
    """

    metrics: Mapping[str, Any]
    resamples: Resamples

    @property
    def sentences(self) -> int:
        """How many there are."""
        return self.resamples.sentences

    def translations(self, texts: Texts) -> Translations:
        """A run's translations with their statistics."""
        found = {
            name: np.asarray(
                metric._extract_corpus_statistics(texts.hypotheses, references=None), np.float64
            )
            for name, metric in self.metrics.items()
        }
        return Translations(
            texts, found, np.array([self.score("chrF", row) for row in found["chrF"]])
        )

    def score(self, metric: str, sums: Floats) -> float:
        """A corpus score from summed statistics, (C,)."""
        return float(self.metrics[metric]._compute_score_from_stats(sums.tolist()).score)

    def corpus_score(self, translations: Translations, metric: str) -> float:
        """A run's score."""
        return self.score(metric, translations.statistics[metric].sum(axis=0))

    def resampled_scores(self, translations: Translations, metric: str) -> Floats:
        """Corpus scores of every resample, (B,)."""
        sums = self.resamples.sums(translations.statistics[metric])
        return np.array([self.score(metric, row) for row in sums])


def make_corpus(run: Run, references: list[str], subset: str, resamples: Resamples) -> Corpus:
    """References and metrics of a direction; ``run`` is one of its runs with translations."""
    tokenizer = _tokenizer(run, subset)
    if tokenizer.remark:
        warn(f"{run.direction}: {tokenizer.remark}")
    metrics = {
        "BLEU": BLEU(tokenize=tokenizer.name, references=[references]),
        "chrF": CHRF(references=[references]),
    }
    return Corpus(metrics, resamples)


def _tokenizer(run: Run, subset: str) -> Tokenizer:
    """The tokenizer that scores.json was made with, else the target language's."""
    try:
        signature = read_scores(run.path)[0][subset]["bleu"]["signature"]
        # MeCab's versions stand behind its tokenizers' names: tok:ja-mecab-0.996-IPA.
        if found := re.search(rf"tok:({'|'.join(BLEU.TOKENIZERS)})[-|]", signature):
            return installed_tokenizer(found[1])
    except (KeyError, TypeError):
        pass  # the scores are not needed: everything is scored again from the translations
    return bleu_tokenizer(languages_of(run.direction)[1])
