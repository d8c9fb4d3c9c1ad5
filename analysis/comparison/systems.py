"""The texts of a comparison: systems, references, sources, documents; all are checked when loaded."""

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.special
from numpy.typing import NDArray

from analysis.runs.errors import UserError
from analysis.runs.languages import Tokenizer, bleu_tokenizer, installed_tokenizer
from analysis.runs.texts import read_lines
from analysis.stats import LEVEL, Floats, interval
from analysis.terminal import warn

#: A language whose tokenizer fits a script, by the first word of its letters' Unicode names.
_SCRIPTS = {
    "CJK": "zh",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "THAI": "th",
    "LAO": "lo",
    "KHMER": "km",
    "MYANMAR": "my",
    "TIBETAN": "bo",
}
#: Share of kana among the letters above which a text is Japanese; most of the others may be Han.
_KANA = 0.1
#: Documents of which fewer make a bootstrap rough.
FEW_DOCUMENTS = 20
#: Lines that are looked at to find the script.
_LOOKED_AT = 1000


@dataclass(frozen=True)
class Corpus:
    """Translations of the same S sentences.

    Attributes
    ----------
    systems : name to translations; the first is the baseline
    references : one or more lists, as sacreBLEU takes them
    sources : None where they are not known
    unit : (S,) what is resampled as a whole: the number of a sentence's document, or of the sentence
    documents : whether units are documents
    tokenizer : sacreBLEU's, which also cuts the words of every table
    segment_scores : the user's own scores by system, (S,) each, higher is better; or nothing
    """

    systems: Mapping[str, list[str]]
    references: list[list[str]]
    sources: list[str] | None
    unit: NDArray[np.int64]
    documents: bool
    tokenizer: Tokenizer
    segment_scores: Mapping[str, Floats]

    @property
    def baseline(self) -> str:
        """The first system."""
        return next(iter(self.systems))

    @property
    def others(self) -> list[str]:
        """Every system but the baseline."""
        return list(self.systems)[1:]

    @property
    def sentences(self) -> int:
        """How many sentences there are, S."""
        return len(self.unit)

    @property
    def units(self) -> int:
        """How many units are resampled, U."""
        return int(self.unit.max()) + 1

    def interval(self, resampled: Floats) -> tuple[Floats, Floats]:
        """The percentile interval of what was resampled, (B, ...). Few documents make a bootstrap too
        narrow: it is widened about its middle as much as the t-interval of a mean of so many is wider than
        the normal one without n / (n - 1)."""
        low, high = interval(resampled)
        if self.documents:
            n, quantile = self.units, 0.5 + LEVEL / 2
            wider = np.sqrt(n / (n - 1)) * scipy.special.stdtrit(n - 1, quantile)
            wider /= scipy.special.ndtri(quantile)
            middle, half = (low + high) / 2, wider * (high - low) / 2
            low, high = middle - half, middle + half
        return low, high

    def by_unit(self, values: Floats) -> Floats:
        """Sums over the sentences of each unit, of (S, ...) values (U, ...)."""
        sums = np.zeros((self.units, *values.shape[1:]))
        np.add.at(sums, self.unit, values)
        return sums


def load_corpus(
    systems: Mapping[str, Path],
    references: Sequence[Path],
    source: Path | None = None,
    documents: Path | None = None,
    segment_scores: Sequence[Path] = (),
    target_lang: str | None = None,
    tokenize: str | None = None,
) -> Corpus:
    """Read and check every file.

    Raises
    ------
    UserError
        A file is missing, empty, or has not one line for each of the first reference.
    """
    first = read_lines(references[0])
    if not first:
        raise UserError(f"{references[0]}: expected a sentence a line, found an empty file")

    def aligned(path: Path) -> list[str]:
        lines = read_lines(path)
        if len(lines) != len(first):
            raise UserError(
                f"{path}: expected {len(first)} lines, as {references[0]} has, found {len(lines)}; "
                "all files must have one line for each sentence"
            )
        return lines

    if segment_scores and len(segment_scores) != len(systems):
        raise UserError(
            f"--segment-scores: expected a file for each of {len(systems)} systems, in their order, "
            f"found {len(segment_scores)}"
        )
    unit = np.arange(len(first))
    if documents is not None:
        unit = np.unique(aligned(documents), return_inverse=True)[1]
        if unit.max() == 0:
            raise UserError(
                f"{documents}: expected the document of each sentence, a name a line, found one "
                "document; leave --documents out, or name at least two"
            )
        if unit.max() + 1 < FEW_DOCUMENTS:
            warn(
                f"{documents}: {unit.max() + 1} documents; the bootstrap of fewer than {FEW_DOCUMENTS} is "
                "rough, and the intervals are widened"
            )
    texts = [first, *(aligned(path) for path in references[1:])]
    return Corpus(
        systems={name: aligned(path) for name, path in systems.items()},
        references=texts,
        sources=None if source is None else aligned(source),
        unit=unit.astype(np.int64),
        documents=documents is not None,
        tokenizer=choose_tokenizer(first, target_lang, tokenize),
        segment_scores={
            name: _numbers(path, aligned(path))
            for name, path in zip(systems, segment_scores, strict=False)
        },
    )


def _numbers(path: Path, lines: Iterable[str]) -> Floats:
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(float(line))
        except ValueError:
            values.append(np.nan)
        if not np.isfinite(values[-1]):
            raise UserError(f"{path}, line {number}: expected a number, found {line!r}")
    return np.array(values)


def named_paths(arguments: Sequence[str]) -> dict[str, Path]:
    """Systems by name, from ``FILE`` or ``NAME=FILE``.

    Files without a name are called by the part of their paths that tells them apart:
    ``out/de-en.A.en.gz`` and ``out/de-en.B.en.gz`` are ``A`` and ``B``.

    Raises
    ------
    UserError
        Two systems have one name.
    """
    split = [argument.partition("=") for argument in arguments]
    named = [
        (name, Path(path))
        if equals and name and not Path(argument).exists()
        else ("", Path(argument))
        for argument, (name, equals, path) in zip(arguments, split, strict=True)
    ]
    short = iter(_short_names([path for name, path in named if not name]))
    found: dict[str, Path] = {}
    for given, path in named:
        name = given or next(short)
        if name in found:
            raise UserError(
                f"{path}: expected a system of its own, found the name {name!r} twice; name the "
                "systems, as in A=FILE B=FILE"
            )
        found[name] = path
    return found


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Paths without ``.gz`` and what all have in common at their beginning and end, cut at slashes
    and dots; the name of a single file."""
    parts = [re.split(r"([/.])", str(path).removesuffix(".gz")) for path in paths]
    start = _shared(parts)
    rest = [own[start:] for own in parts]
    end = _shared([own[::-1] for own in rest])
    names = ["".join(own[: len(own) - end]) for own in rest]
    whole = [path.name.removesuffix(".gz") for path in paths]
    return names if all(name.strip("./") for name in names) else whole


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many items all sequences begin with."""
    same = (len(set(items)) == 1 for items in zip(*parts, strict=False))
    return sum(itertools.takewhile(bool, same))


def choose_tokenizer(
    references: Sequence[str], target_lang: str | None, tokenize: str | None
) -> Tokenizer:
    """sacreBLEU's tokenizer: the one that is named, else that of the language, else that of the
    script which most letters of the references are of."""
    if tokenize is not None:
        return Tokenizer(tokenize, None)
    if target_lang is not None:
        return bleu_tokenizer(target_lang)
    language = _language_of_script(references[:_LOOKED_AT])
    if not language:
        return installed_tokenizer("13a")
    chosen = bleu_tokenizer(language)
    remark = chosen.remark or (
        f"the references look like {language}, so BLEU is taken with tok:{chosen.name}; give "
        "--target-lang if they are not"
    )
    return Tokenizer(chosen.name, remark)


def _language_of_script(lines: Iterable[str]) -> str | None:
    counts: Counter[str] = Counter()
    for letter, count in Counter("".join(lines)).items():
        if letter.isalpha():
            script = unicodedata.name(letter, "").split(" ", 1)[0]
            counts[_SCRIPTS.get(script, "")] += count
    if counts["ja"] > _KANA * counts.total():
        return "ja"
    language, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return language if 2 * count > counts.total() else None
