"""Sequence-level distillation: a data directory whose targets are the teacher's translations.

    fairseq-generate DATA --user-dir sekd_fairseq --task self_evolution_kd --path teacher.pt \\
        --gen-subset train --beam 4 > train.out            (without --remove-bpe)
    python -m sekd_fairseq.distilled_data DATA --generated train.out --output DISTILLED

Students train on DISTILLED with any criterion (Kim and Rush, 2016, with cross entropy); a cache for
its targets (build_cache DISTILLED) brings word-level KD or SE-KD to them too.

A teacher with other pieces is run on its own data, with ``--remove-bpe sentencepiece``; its text is cut
into the students' pieces with ``--sentencepiece-model``.

Of N-best lists (``fairseq-generate --beam N --nbest N``) one translation per sentence is chosen with
``--choose``.  More text: with ``--sources MONO``, data whose split is monolingual text, what was generated
from it becomes the split; sentences of the validation and test sets are left out, and translations that
repeat themselves without end, and the pairs of DATA are mixed in with ``--gold-share``.
"""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from fairseq.data import Dictionary

from analysis.runs.files import atomic_directory
from analysis.runs.texts import read_lines
from analysis.terminal import warn
from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.generated import check_sentences, read_generated, read_nbest
from sekd_fairseq.llm.vocabulary import FILE, Vocabulary, check_same_rows
from sekd_fairseq.splits import (
    check_splits,
    dictionary_of,
    languages,
    link_others,
    sentences_of,
    side_of,
    stored_as,
    write_indexed,
)
from sekd_fairseq.teacher_cache.format import parts_of
from sekd_fairseq.translations import (
    SLACK,
    against_reference,
    encode,
    joined_chrf,
    mean_chrf,
    readers,
    repeats,
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.distilled_data",
        description="Make a fairseq data directory with one split's targets replaced by a teacher's "
        "translations, as sequence-level distillation wants it; the other files are links to DATA's.",
    )
    out.add_argument("data", type=Path, metavar="DATA", help="fairseq data directory")
    out.add_argument(
        "--generated",
        required=True,
        type=Path,
        metavar="FILE",
        help="output of fairseq-generate on the split, made without --remove-bpe",
    )
    out.add_argument(
        "--sentencepiece-model",
        type=Path,
        metavar="MODEL",
        help="for a teacher with other pieces: FILE was made with --remove-bpe sentencepiece (or --bpe), on the "
        "teacher's data of the same sentences; its text is cut into pieces by this model, that of DATA",
    )
    out.add_argument("--output", required=True, type=Path, metavar="DIR", help="new data directory")
    out.add_argument("--subset", default="train", help="the split (default: %(default)s)")
    for side in ("source", "target"):
        out.add_argument(
            f"--{side}-lang",
            metavar="CODE",
            help="both, where the model translates in the other direction than the split's files are named",
        )
    out.add_argument(
        "--nbest",
        type=int,
        default=1,
        metavar="N",
        help="translations per sentence to choose from, at most as many as fairseq-generate --nbest "
        "printed (default: %(default)s, the model's best)",
    )
    out.add_argument(
        "--choose",
        choices=("reference", "mbr", "round-trip", "scores"),
        help="with --nbest: nearest to the reference by chrF; nearest to the other translations by chrF "
        "(minimum Bayes risk), which needs no reference; the one whose translation back (--back) is nearest "
        "to the source by chrF; best by --scores",
    )
    out.add_argument(
        "--back",
        type=Path,
        metavar="FILE",
        help="with --choose round-trip: output of fairseq-interactive, made without --remove-bpe by a model "
        "of the other direction with the same pieces, on the text of the H- lines in their order",
    )
    out.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="with --choose scores: a number per translation, larger is better, one per line in the order of "
        "the H- lines of FILE (a quality estimate)",
    )
    out.add_argument(
        "--sources",
        type=Path,
        metavar="MONO",
        help="data directory whose split FILE was generated from (same dictionaries; targets, if any, are "
        "not read); its sentences that are in a validation or test set of DATA are left out",
    )
    out.add_argument(
        "--gold-share",
        type=float,
        metavar="SHARE",
        help="with --sources: the share of pairs of DATA in the result, above 0 and below 1, drawn anew "
        "as often as needed (default: 0, translations alone)",
    )
    return out


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Write the directory, complete or not at all."""
    args = parser().parse_args(argv)
    check_options(args)
    check_splits(str(args.data), [args.subset])
    language_pair = languages_of(args)
    target = language_pair[1]
    stored = stored_as(args.data, args.subset, *language_pair, target)
    assert stored is not None  # languages_of() has seen it
    name, kind = Path(stored[0]).name, stored[1]
    dictionary = dictionary_of(args.data, target)
    if kind == "huffman":
        raise UserError(
            f"{args.data}: expected data of --dataset-impl mmap, lazy, cached or raw, found huffman, "
            "which is not written here; binarise the text again without it"
        )
    original = sentences_of(*stored, dictionary)
    if args.sources:
        write_more_text(args, language_pair, kind, dictionary)
        return
    texts = sentence_texts(args.data, args.subset, language_pair)
    lines = chosen_translations(args, dictionary, texts, len(original))
    targets = [encode(line, dictionary, args.generated, i) for i, line in enumerate(lines)]
    with atomic_directory(args.output) as folder:
        link_others(args.data, folder, [name])
        if kind == "raw":  # as the source beside it is
            text = "".join(f"{' '.join(line.split())}\n" for line in lines)
            (folder / name).write_bytes(text.encode())
        else:
            write_indexed(folder / name, kind, targets, len(dictionary))
    if stored_as(args.data, f"{args.subset}1", *language_pair, target):
        warn(
            f"{args.output}: holds {args.subset}1 as it is, which fairseq-train adds to "
            f"{args.subset}; distil it with --subset {args.subset}1, or delete its files"
        )
    if endless := sum(map(repeats, targets, original)):
        warn(
            f"{endless} of {len(targets)} translations are longer than twice the reference and {SLACK} "
            "tokens: most such repeat themselves without end; fairseq-generate --max-len-a and "
            "--no-repeat-ngram-size keep them short, --nbest and --choose take others"
        )
    tokens = sum(map(len, targets))
    print(f"{args.output}: {len(targets)} targets of {args.subset}, {tokens} tokens")


def languages_of(args: argparse.Namespace) -> tuple[str, str]:
    """Source and target language, from the names of the split's files or as they are given."""
    if args.source_lang is None:
        return languages(args.data, args.subset)
    given = args.source_lang, args.target_lang
    if stored_as(args.data, args.subset, *given, args.target_lang) is None:
        raise UserError(
            f"--source-lang {args.source_lang} --target-lang {args.target_lang}: expected the languages of "
            f"{args.subset} in {args.data}, found {' and '.join(languages(args.data, args.subset))}"
        )
    return given


def sentence_texts(
    data: Path, split: str, language_pair: tuple[str, str], monolingual: bool = False
) -> dict[str, Callable[[int], str]]:
    """A split's sentences in pieces, by the prefix that fairseq-generate prints them with.

    A language model's sources are prompts, which are not printed whole; of monolingual text it has the
    sentence on the target side.
    """
    source, target = language_pair
    if (data / FILE).is_file():
        return {"T-": pieces_of(data, split, language_pair, target)}
    sources = pieces_of(data, split, language_pair, source)
    return {
        "S-": sources,
        "T-": sources if monolingual else pieces_of(data, split, language_pair, target),
    }


def pieces_of(
    data: Path, split: str, language_pair: tuple[str, str], side: str
) -> Callable[[int], str]:
    """One side of a split: a sentence's pieces by its number."""
    stored = stored_as(data, split, *language_pair, side)
    if stored is None:
        raise UserError(f"{data}: expected the {side} side of {split}, found none")
    dictionary = dictionary_of(data, side)
    sentences = sentences_of(*stored, dictionary)

    def pieces(sentence: int) -> str:
        text: str = dictionary.string(sentences[sentence])
        return text

    return pieces


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not belong together."""
    if args.nbest < 1:
        raise UserError(f"--nbest: expected 1 or more, found {args.nbest}")
    if (args.nbest > 1) != (args.choose is not None):
        raise UserError("--nbest N and --choose expect each other, found one of them alone")
    if (args.choose == "scores") != (args.scores is not None):
        raise UserError(
            "--choose scores and --scores FILE expect each other, found one of them alone"
        )
    if (args.choose == "round-trip") != (args.back is not None):
        raise UserError(
            "--choose round-trip and --back FILE expect each other, found one of them alone"
        )
    if args.back and args.sentencepiece_model:
        raise UserError(
            "--choose round-trip expects a teacher with the pieces of DATA, found --sentencepiece-model; "
            "take --choose mbr or scores"
        )
    if args.choose == "reference" and args.sources:
        raise UserError(
            "--choose reference: --sources has none; expected --choose mbr, round-trip or scores"
        )
    if (args.source_lang is None) != (args.target_lang is None):
        raise UserError(
            "--source-lang and --target-lang expect each other, found one of them alone"
        )
    if args.gold_share is not None and not (args.sources and 0 < args.gold_share < 1):
        raise UserError(
            f"--gold-share: expected above 0 and below 1, with --sources, found {args.gold_share}"
        )


def chosen_translations(
    args: argparse.Namespace,
    dictionary: Dictionary,
    texts: Mapping[str, Callable[[int], str]],
    count: int,
) -> list[str]:
    """One translation per sentence, in pieces, of those of ``texts`` (:func:`sentence_texts`)."""
    prefix = "H-"
    read, cut = readers(args.data, dictionary)
    if args.sentencepiece_model:
        prefix, cut = "D-", cutter(args.sentencepiece_model, dictionary)

    def text_of(side: str, sentence: int) -> str:
        return read(texts[side](sentence))

    own = {side: functools.partial(text_of, side) for side in texts}
    found = read_nbest(args.generated, prefix, count)
    check_sentences(args.generated, own, count)
    if args.choose is None:
        return [cut(found[sentence][0]) for sentence in range(count)]
    fewest = min(found, key=lambda sentence: len(found[sentence]))
    if len(found[fewest]) < args.nbest:
        raise UserError(
            f"--nbest {args.nbest}: {args.generated} has {len(found[fewest])} translations of sentence "
            f"{fewest}; expected as many, from fairseq-generate --nbest {args.nbest}"
        )
    scores = read_scores(args.scores, found) if args.scores else None
    if args.back:
        if "S-" not in texts:
            raise UserError(
                f"--choose round-trip: the sources of {args.sources or args.data} are a language model's "
                "prompts; expected sentences, so take --choose mbr or scores"
            )
        scores = round_trip(args.back, found, texts["S-"])
    chosen = []
    for sentence in range(count):
        options = [cut(text) for text in found[sentence][: args.nbest]]
        if scores is not None:
            values = scores[sentence][: args.nbest]
        elif args.choose == "mbr":
            values = mean_chrf([read(text) for text in options])
        else:
            values = against_reference([read(text) for text in options], own["T-"](sentence))
        chosen.append(options[int(np.argmax(values))])  # of equals the model's best
    return chosen


def cutter(model: Path, dictionary: Dictionary) -> Callable[[str], str]:
    """What cuts text as ``prepare_data`` does: a piece that is no symbol of the dictionary is unknown."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--sentencepiece-model {model}: expected the sentencepiece.model that prepare_data wrote beside "
            f"the data, found none ({error})"
        ) from error

    def cut(text: str) -> str:
        pieces = processor.encode(text, out_type=str)
        known = dictionary.indices
        return " ".join(piece if piece in known else dictionary.unk_word for piece in pieces)

    return cut


def read_scores(path: Path, found: dict[int, list[str]]) -> dict[int, list[float]]:
    """A file's scores by sentence, in the order of its translations; ``found`` is in the order of the
    generated file."""
    lines = read_lines(path)
    expected = sum(map(len, found.values()))
    try:
        values = [float(line) for line in lines]
    except ValueError as error:
        raise UserError(
            f"--scores {path}: expected a number a line, found another ({error})"
        ) from error
    if len(values) != expected or not np.isfinite(values).all():
        raise UserError(
            f"--scores {path}: expected {expected} finite numbers, one per translation, found "
            f"{len(values)} lines"
        )
    following = iter(values)
    return {sentence: [next(following) for _ in texts] for sentence, texts in found.items()}


def round_trip(
    path: Path, found: dict[int, list[str]], source: Callable[[int], str]
) -> dict[int, list[float]]:
    """chrF of each translation's translation back against the source, by sentence; ``found`` is in the
    order of the generated file, which is that of the sentences in ``path``."""
    expected = sum(map(len, found.values()))
    following = iter(read_generated(path, "H-", expected))
    return {
        sentence: [joined_chrf(next(following), source(sentence)) for _ in texts]
        for sentence, texts in found.items()
    }


def write_more_text(
    args: argparse.Namespace, language_pair: tuple[str, str], kind: str, dictionary: Dictionary
) -> None:
    """The data directory whose split is translated monolingual text, with gold pairs at a share."""
    source = language_pair[0]
    further = f"{args.subset}1"
    if stored_as(args.data, further, *language_pair, language_pair[1]):
        raise UserError(
            f"{args.data}: with --sources expected a split of one part, found {further} too, which "
            f"fairseq-train would add to the result; name a data directory without {further}"
        )
    dictionaries = [dictionary_of(args.data, side) for side in language_pair]
    theirs = dictionary_of(args.sources, source)
    if theirs.symbols != dictionaries[0].symbols:
        raise UserError(
            f"--sources {args.sources}: expected the dictionary of {args.data} for {source}, found "
            "another; binarise the text with fairseq-preprocess --srcdict"
        )
    if (args.data / FILE).is_file() and (args.sources / FILE).is_file():
        folders = (args.sources, args.data)
        rows, found = (Vocabulary.load(one, theirs.symbols).rows for one in folders)
        check_same_rows(args.sources, rows, found, str(args.data))
    mono = side_of(args.sources, args.subset, language_pair, source, theirs)
    # A language model's source is a prompt; the sentence itself is repeated on the target side.
    sentence_side = language_pair[1] if (args.sources / FILE).is_file() else source
    sentences = side_of(args.sources, args.subset, language_pair, sentence_side, theirs)
    texts = sentence_texts(args.sources, args.subset, language_pair, monolingual=True)
    lines = chosen_translations(args, dictionary, texts, len(mono))
    held_out = held_out_sentences(args, language_pair, dictionaries)
    pairs = []
    known = endless = 0
    for i, line in enumerate(lines):
        pair = (mono[i].int(), encode(line, dictionary, args.generated, i))
        if any(key(side) in seen for side, seen in zip(pair, held_out, strict=True)):
            known += 1
        elif repeats(pair[1], sentences[i]):
            endless += 1
        else:
            pairs.append(pair)
    kept = len(pairs)
    sides = [
        side_of(args.data, args.subset, language_pair, side, symbols)
        for side, symbols in zip(language_pair, dictionaries, strict=True)
    ]
    gold = 0
    if args.gold_share is not None:
        gold = round(kept * args.gold_share / (1 - args.gold_share))
        generator = np.random.default_rng(1)
        rounds = -(-gold // len(sides[0]))
        order = [i for _ in range(rounds) for i in generator.permutation(len(sides[0])).tolist()]
        pairs += [(sides[0][i].int(), sides[1][i].int()) for i in order[:gold]]
    if not pairs:
        raise UserError(
            f"--sources {args.sources}: expected translations of sentences that are in no held-out set, found "
            f"none ({known} are in one, {endless} repeat themselves without end)"
        )
    stored = [stored_as(args.data, args.subset, *language_pair, side) for side in language_pair]
    written = [Path(one[0]).name for one in stored if one is not None]
    with atomic_directory(args.output) as folder:
        link_others(args.data, folder, written)
        for side, name in enumerate(written):
            of_side = [pair[side] for pair in pairs]
            write_indexed(folder / name, kind, of_side, len(dictionaries[side]))
    print(
        f"{args.output}: {kept} pairs of {args.sources} (without {known} that are in a held-out set and "
        f"{endless} that repeat themselves without end), {gold} gold pairs of {args.data}"
    )


def held_out_sentences(
    args: argparse.Namespace, language_pair: tuple[str, str], dictionaries: Sequence[Dictionary]
) -> list[set[bytes]]:
    """The sentences of all validation and test sets, of either side."""
    found: list[set[bytes]] = []
    for side, dictionary in zip(language_pair, dictionaries, strict=True):
        seen: set[bytes] = set()
        for name in ("valid", "test"):
            for split in parts_of(name):
                if stored_as(args.data, split, *language_pair, side) is None:
                    break
                sentences = side_of(args.data, split, language_pair, side, dictionary)
                seen.update(key(sentences[i]) for i in range(len(sentences)))
        found.append(seen)
    return found


def key(sentence: torch.Tensor) -> bytes:
    """A sentence's tokens, to be found again."""
    return sentence.to(torch.int32).numpy().tobytes()


if __name__ == "__main__":
    main()
