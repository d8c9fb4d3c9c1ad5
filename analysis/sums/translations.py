"""Translations with sacreBLEU's sufficient statistics, so that scores are sums of sentences."""

import re
from collections.abc import Mapping, Sequence
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


class RememberedBLEU(BLEU):
    """BLEU that computes the sufficient statistics of a list of translations once."""

    def _extract_corpus_statistics(self, hypotheses: Sequence[str], references: Any) -> Any:
        return _remember(self, super()._extract_corpus_statistics, hypotheses, references)


class RememberedCHRF(CHRF):
    """chrF that computes the sufficient statistics of a list of translations once."""

    def _extract_corpus_statistics(self, hypotheses: Sequence[str], references: Any) -> Any:
        return _remember(self, super()._extract_corpus_statistics, hypotheses, references)


def _remember(metric: Any, extract: Any, hypotheses: Sequence[str], references: Any) -> Any:
    # Keyed by identity; the lists are kept beside the result, so an identity is never reused.
    store = metric.__dict__.setdefault("_remembered", {})
    key = (id(hypotheses), id(references))
    if key not in store:
        store[key] = (hypotheses, references, extract(hypotheses, references))
    return store[key][2]


@dataclass(frozen=True)
class Translations:
    """A run's translations.

    Attributes
    ----------
    texts : with references and sources
    statistics : sufficient statistics of each sentence by metric, (S, C)
    """

    texts: Texts
    statistics: Mapping[str, Floats]


@dataclass(frozen=True)
class Corpus:
    """What the translations of a direction are scored with.

    Attributes
    ----------
    references : as sacreBLEU takes them
    metrics : by name
    resamples : of the sentences
    """

    references: list[list[str]]
    metrics: Mapping[str, Any]
    resamples: Resamples

    @property
    def sentences(self) -> int:
        """How many there are."""
        return len(self.references[0])

    def translations(self, texts: Texts) -> Translations:
        """A run's translations with their statistics."""
        found = {
            name: np.asarray(
                metric._extract_corpus_statistics(texts.hypotheses, self.references), np.float64
            )
            for name, metric in self.metrics.items()
        }
        return Translations(texts, found)

    def score(self, metric: str, sums: Floats) -> float:
        """A corpus score from summed statistics, (C,)."""
        return float(self.metrics[metric]._compute_score_from_stats(sums.tolist()).score)

    def corpus_score(self, translations: Translations, metric: str) -> float:
        """A run's score."""
        return self.score(metric, translations.statistics[metric].sum(axis=0))

    def sentence_scores(self, translations: Translations, metric: str) -> Floats:
        """The score of each sentence alone, (S,)."""
        return np.array([self.score(metric, row) for row in translations.statistics[metric]])

    def resampled_scores(self, translations: Translations, metric: str) -> Floats:
        """Corpus scores of every resample, (B,)."""
        sums = self.resamples.sums(translations.statistics[metric])
        return np.array([self.score(metric, row) for row in sums])


def make_corpus(run: Run, references: list[str], subset: str, resamples: Resamples) -> Corpus:
    """References and metrics of a direction; ``run`` is one of its runs with translations."""
    tokenizer = _tokenizer(run, subset)
    if tokenizer.remark:
        warn(f"{run.direction}: {tokenizer.remark}")
    metrics = {"BLEU": RememberedBLEU(tokenize=tokenizer.name), "chrF": RememberedCHRF()}
    return Corpus([references], metrics, resamples)


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
