"""From parallel text to the data directories of language models: prompts, tokens, dictionary, files."""

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary

from analysis.runs.errors import UserError
from analysis.runs.files import hash_file
from analysis.runs.texts import read_lines
from analysis.terminal import progress
from sekd_fairseq.llm.prompts import Prompts, PromptSettings, read_template
from sekd_fairseq.llm.tokenizer import Tokenizer, load_tokenizer
from sekd_fairseq.llm.vocabulary import (
    EOS,
    NEW_ROW,
    TOKENIZER,
    UNK,
    Vocabulary,
    build_vocabulary,
    with_end,
)
from sekd_fairseq.parallel_text import Pair, read_aligned, repeated, without_leaks
from sekd_fairseq.splits import write_indexed
from sekd_fairseq.teacher_cache.format import hash_symbols

#: Of each sentence, 4 bytes a token.
Tokens = list["array[int]"]
SUBSETS = ("train", "valid", "test")
#: The data directories: of the student's prompts, and of the teacher's.
PROMPTS = ("bin", "teacher")


@dataclass(frozen=True)
class PromptChoice:
    """What is asked of the prompts of one data directory."""

    template: Path | None
    shots: int
    chat: bool
    end: str


@dataclass(frozen=True)
class Settings:
    """What the data are made of; ``text`` has the prefixes of each split's files."""

    tokenizer: str
    gguf_file: str | None
    languages: tuple[str, str]
    text: dict[str, list[str]]
    limits: dict[str, int]
    prune_vocab: bool
    prompts: dict[str, PromptChoice]

    def templates(self) -> dict[str, PromptSettings]:
        """What the prompts of each data directory are made of, but for the examples; a teacher without a
        template of its own has the student's."""
        text = read_template(self.prompts["bin"].template)
        return {
            name: PromptSettings(
                *self.languages,
                read_template(choice.template) if choice.template else text,
                choice.chat,
            )
            for name, choice in self.prompts.items()
        }

    def place(self, subset: str, pair: Pair, side: int) -> str:
        """File and line of one side of a pair."""
        for prefix in self.text[subset]:
            pairs = read_subset([prefix], self.languages)
            if pair in pairs:
                return f"{prefix}.{self.languages[side]}, line {pairs.index(pair) + 1}"
        raise AssertionError("every pair comes from a file")


@dataclass(frozen=True)
class MonolingualSettings:
    """Text of the source language for data directories that are there: those of ``vocabulary``, which an
    earlier call made."""

    text: Path
    vocabulary: Path
    languages: tuple[str, str]

    def vocabularies(self, dictionary: Dictionary) -> dict[str, Vocabulary]:
        """Those of the student's prompts, and of the teacher's where they are others."""
        names = [name for name in PROMPTS if name == "bin" or (self.vocabulary / name).is_dir()]
        found = {
            name: Vocabulary.load(self.vocabulary / name, dictionary.symbols) for name in names
        }
        for name, one in found.items():
            settings = one.prompt
            languages = settings and (settings.source_lang, settings.target_lang)
            if languages != self.languages:
                raise UserError(
                    f"--vocabulary {self.vocabulary}: expected prompts from {self.languages[0]} to "
                    f"{self.languages[1]}, found {languages or 'none'} in {name}"
                )
        return found

    def read(self) -> tuple[list[Pair], dict[str, int]]:
        """The sentences, each once and on both sides, as they are; and counts of lines left out."""
        lines = read_lines(self.text)
        pairs = [(line, line) for line in lines if line.strip()]
        if not pairs:
            raise UserError(
                f"--mono {self.text}: expected sentences, found {len(lines)} empty lines"
            )
        counts = {"empty": len(lines) - len(pairs), "repeated": repeated(pairs)}
        return list(dict.fromkeys(pairs)), counts

    def place(self, subset: str, pair: Pair, side: int) -> str:
        """File and line of a sentence."""
        return f"{self.text}, line {read_lines(self.text).index(pair[side]) + 1}"


def read_subset(prefixes: list[str], languages: tuple[str, str]) -> list[Pair]:
    """Aligned lines of one or several pairs of files, as they are."""
    pairs: list[Pair] = []
    for prefix in prefixes:
        source, target = read_aligned(*(Path(f"{prefix}.{language}") for language in languages))
        for number, pair in enumerate(zip(source, target, strict=True), start=1):
            if not all(side.strip() for side in pair):
                raise UserError(
                    f"{prefix}, line {number}: expected text on both sides, found an empty line; "
                    "take the pair out"
                )
            pairs.append(pair)
    return pairs


def choose_shots(subsets: dict[str, list[Pair]], count: int) -> list[Pair]:
    """Examples for prompts, taken out of the training text."""
    if count > len(subsets["train"]):
        raise UserError(
            f"--shots: expected at most the training pairs ({len(subsets['train'])}), found {count}"
        )
    shots = random.Random(1).sample(subsets["train"], count)
    subsets["train"] = [pair for pair in subsets["train"] if pair not in shots]
    return shots


def encode(
    prompts: dict[str, Prompts], pairs: list[Pair], subset: str
) -> tuple[dict[str, Tokens], Tokens, int]:
    """Token ids of all prompts, by data directory, and of the translations; and how many of these the
    tokenizer joins with the student's prompt, so that they are encoded alone."""
    sources: dict[str, Tokens] = {name: [] for name in prompts}
    targets: Tokens = []
    joined = 0
    student = prompts["bin"]
    for source, target in progress(pairs, desc=subset, unit="pair"):
        found = {name: maker.tokens(source) for name, maker in prompts.items()}
        for name, tokens in found.items():
            sources[name].append(array("i", tokens))
        translation = student.continuation(source, target, found["bin"])
        joined += not translation
        targets.append(array("i", translation or student.tokenizer.encode(target)))
    return sources, targets, joined


class Kept:
    """What of the text could not be kept exactly, and where first."""

    def __init__(self, place: Callable[[str, Pair, int], str]) -> None:
        self.place = place
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []
        self._first: dict[str, str] = {}

    def add(self, what: str, count: int, subset: str, pair: Pair, side: int) -> None:
        """Count something of one side of a pair."""
        self.counts[what] += count
        if count and what not in self._first:
            self._first[what] = self.place(subset, pair, side)

    def lines(self) -> list[str]:
        """What people should know, a line each."""
        return self.notes + [
            f"{self.counts[what]:,} {what.replace('_', ' ')}, the first in {place}"
            for what, place in self._first.items()
        ]


def make_dictionary(
    tokenizer: Tokenizer, end: int | None, keep: set[int] | None
) -> tuple[Dictionary, list[int]]:
    """The dictionary of all data directories, and the model's row of each symbol."""
    bos, pad, _, unk = tokenizer.specials
    symbols, rows = build_vocabulary(tokenizer.pieces, (bos, pad, end, unk), keep)
    dictionary = Dictionary()
    for symbol in symbols[len(dictionary) :]:
        dictionary.add_symbol(symbol)
    if dictionary.symbols != symbols:
        raise UserError("--tokenizer: expected one id for each token, found two with one id")
    return dictionary, rows


def write_directory(
    folder: Path,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    dictionary: Dictionary,
    subsets: dict[str, list[Pair]],
    encoded: dict[str, tuple[Tokens, Tokens]],
    kept: Kept,
) -> None:
    """Write one data directory for fairseq."""
    assert vocabulary.prompt is not None  # data made here say what their prompts are
    languages = (vocabulary.prompt.source_lang, vocabulary.prompt.target_lang)
    for language in languages:
        dictionary.save(str(folder / f"dict.{language}.txt"))
    vocabulary.save(folder, tokenizer)
    for subset, pairs in subsets.items():
        for side, sentences in enumerate(encoded[subset]):
            ids = [vocabulary.symbols(tokens, tokenizer) for tokens in sentences]
            path = folder / f"{subset}.{'-'.join(languages)}.{languages[side]}"
            rows = (torch.tensor([*sentence, EOS], dtype=torch.int32) for sentence in ids)
            write_indexed(path, "mmap", rows, len(dictionary))
            for pair, sentence in zip(pairs, ids, strict=True):
                kept.add("unknown_tokens", sentence.count(UNK), subset, pair, side)
                if side and EOS in sentence:
                    end = tokenizer.pieces[vocabulary.rows[EOS]]
                    raise UserError(
                        f"{kept.place(subset, pair, side)}: expected a translation without the "
                        f"token that ends one, found {end!r} in it; give another --end"
                    )


@dataclass(frozen=True)
class Encoded:
    """The text as token ids.

    Attributes
    ----------
    subsets
        The pairs of each split.
    prompts
        What makes the prompts of each data directory.
    tokens
        By split: the prompts by data directory, and the translations.
    ends
        The token that ends a translation in each data directory, if any.
    joined
        How many translations the tokenizer would join with their prompts.
    """

    subsets: dict[str, list[Pair]]
    prompts: dict[str, Prompts]
    tokens: dict[str, tuple[dict[str, Tokens], Tokens]]
    ends: dict[str, int | None]
    joined: int

    def notes(self) -> list[str]:
        """What people should know of the prompts."""
        if not self.joined:
            return []
        return [
            f"{self.joined:,} translations begin otherwise than the model would write them, because its "
            "tokenizer joins the end of the prompt with them; let the template end in a line end, and "
            "not in a space"
        ]

    def used(self, tokenizer: Tokenizer) -> set[int]:
        """The tokens that this text and single bytes need."""
        used = tokenizer.single_bytes() | {end for end in self.ends.values() if end is not None}
        for sources, targets in self.tokens.values():
            for sentences in (*sources.values(), targets):
                used.update(token for tokens in sentences for token in tokens)
        return used


def encode_text(
    templates: dict[str, PromptSettings],
    settings: Settings,
    tokenizer: Tokenizer,
    subsets: dict[str, list[Pair]],
    shots: list[Pair],
) -> Encoded:
    """Make the prompts and encode all text."""
    prompts = {
        name: Prompts(replace(one, shots=shots[: settings.prompts[name].shots]), tokenizer)
        for name, one in templates.items()
    }
    tokens, joined = {}, 0
    for subset, pairs in subsets.items():
        sources, targets, here = encode(prompts, pairs, subset)
        tokens[subset] = (sources, targets)
        joined += here
    ends = {
        name: maker.end(settings.prompts[name].end.replace("\\n", "\n"))
        for name, maker in prompts.items()
    }
    return Encoded(subsets, prompts, tokens, ends, joined)


def write_directories(
    building: Path,
    vocabularies: dict[str, Vocabulary],
    tokenizer: Tokenizer,
    dictionary: Dictionary,
    text: Encoded,
    kept: Kept,
) -> None:
    """Write the data directories, which share a dictionary."""
    for name, vocabulary in vocabularies.items():
        lacking = vocabulary.symbols(text.prompts[name].tokens(""), tokenizer).count(UNK)
        if lacking:
            kept.notes.append(
                f"{lacking} unknown tokens in the template and the examples of every prompt in "
                f"{name}: the tokenizer lacks what they are written in"
            )
        folder = building / name
        folder.mkdir()
        sides = {
            subset: (sources[name], targets) for subset, (sources, targets) in text.tokens.items()
        }
        write_directory(folder, vocabulary, tokenizer, dictionary, text.subsets, sides, kept)


def make_vocabularies(
    settings: Settings, tokenizer: Tokenizer, text: Encoded
) -> tuple[Dictionary, dict[str, Vocabulary]]:
    """The dictionary, and what each data directory says of its symbols."""
    keep = text.used(tokenizer) if settings.prune_vocab else None
    dictionary, rows = make_dictionary(tokenizer, text.ends["bin"], keep)
    dictionary_hash = hash_symbols(dictionary.symbols)
    found = {}
    for name, maker in text.prompts.items():
        end = text.ends[name]
        used = rows if end in (None, rows[EOS]) else with_end(rows, end)
        found[name] = Vocabulary(
            used, settings.tokenizer, maker.settings, dictionary_hash, settings.gguf_file
        )
    return dictionary, found


def write_text(
    building: Path, languages: tuple[str, str], tokenizer: Tokenizer, text: Encoded, kept: Kept
) -> None:
    """Write the text of each split; count what its tokens do not give back."""
    for subset, pairs in text.subsets.items():
        for pair, tokens in zip(pairs, text.tokens[subset][1], strict=True):
            inexact = tokenizer.decode(tokens) != pair[1]
            kept.add("translations_not_given_back_exactly", inexact, subset, pair, 1)
        for side, language in enumerate(languages):
            lines = "".join(f"{pair[side]}\n" for pair in pairs)
            (building / f"{subset}.{language}").write_bytes(lines.encode("utf-8"))


def prepare(settings: Settings, building: Path) -> tuple[dict[str, Any], list[str]]:
    """Write everything below ``building``; returns the content of data.json, and what people should
    know."""
    templates = settings.templates()  # read first, so that a bad one is named before the work
    subsets = {
        subset: read_subset(prefixes, settings.languages)
        for subset, prefixes in settings.text.items()
    }
    subsets["train"], leaked = without_leaks(subsets["train"], [subsets["valid"], subsets["test"]])
    tokenizer = load_tokenizer(settings.tokenizer, settings.gguf_file)
    shots = choose_shots(subsets, max(choice.shots for choice in settings.prompts.values()))
    for subset, limit in settings.limits.items():
        subsets[subset] = subsets[subset][: limit or None]
    text = encode_text(templates, settings, tokenizer, subsets, shots)
    kept = Kept(settings.place)
    kept.notes += text.notes()
    dictionary, vocabularies = make_vocabularies(settings, tokenizer, text)
    write_directories(building, vocabularies, tokenizer, dictionary, text, kept)
    write_text(building, settings.languages, tokenizer, text, kept)
    counts = {"in_held_out_text": leaked}
    summary = summarise(building, tokenizer, dictionary, text, kept, counts)
    return {**summary, "shots": shots}, kept.lines()


def prepare_monolingual(
    settings: MonolingualSettings, building: Path
) -> tuple[dict[str, Any], list[str]]:
    """Write everything below ``building``, a split ``train`` alone; returns as :func:`prepare` does."""
    source, target = settings.languages
    path = settings.vocabulary / "bin" / f"dict.{source}.txt"
    if not path.is_file():
        raise UserError(
            f"--vocabulary {settings.vocabulary}: expected a folder that prepare_llm_data made for "
            f"{source}-{target}, found no {path.relative_to(settings.vocabulary)} in it"
        )
    dictionary = Dictionary.load(str(path))
    vocabularies = settings.vocabularies(dictionary)
    pairs, counts = settings.read()
    tokenizer = load_tokenizer(str(settings.vocabulary / "bin" / TOKENIZER))
    prompts = {
        name: Prompts(one.prompt, tokenizer) for name, one in vocabularies.items() if one.prompt
    }
    ends = {
        name: None if one.rows[EOS] == NEW_ROW else one.rows[EOS]
        for name, one in vocabularies.items()
    }
    sources, targets, joined = encode(prompts, pairs, "train")
    text = Encoded({"train": pairs}, prompts, {"train": (sources, targets)}, ends, joined)
    kept = Kept(settings.place)
    write_directories(building, vocabularies, tokenizer, dictionary, text, kept)
    write_text(building, settings.languages, tokenizer, text, kept)
    return summarise(building, tokenizer, dictionary, text, kept, counts), kept.lines()


def summarise(
    building: Path,
    tokenizer: Tokenizer,
    dictionary: Dictionary,
    text: Encoded,
    kept: Kept,
    left_out: dict[str, int],
) -> dict[str, Any]:
    """The content of data.json."""
    return {
        "sentences": {subset: len(pairs) for subset, pairs in text.subsets.items()},
        **left_out,
        "target_tokens": {
            subset: sum(len(tokens) + 1 for tokens in targets)
            for subset, (_, targets) in text.tokens.items()
        },
        "vocabulary": len(dictionary),
        "tokenizer_tokens": len(tokenizer.pieces),
        **kept.counts,
        "ends_of_translation": {
            name: None if end is None else tokenizer.pieces[end] for name, end in text.ends.items()
        },
        "fingerprint": fingerprint(building),
    }


def fingerprint(building: Path) -> str:
    """SHA-256 of all that a training depends on: names and content of the files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in building.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(building)}\0{hash_file(path)}\0".encode())
    return digest.hexdigest()
