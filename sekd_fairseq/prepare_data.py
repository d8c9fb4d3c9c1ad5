"""From parallel text to what ``fairseq-train`` reads.

    python -m sekd_fairseq.prepare_data --src text.en --tgt text.de \\
        --source-lang en --target-lang de --output data/en-de

splits the text into train, valid and test; or ``--train``, ``--valid`` and ``--test`` name the
prefixes of three given pairs of files (``--train multi30k/train`` is ``train.en`` and
``train.de``). Monolingual text that a teacher is to translate is cut into the pieces of data that are there:

    python -m sekd_fairseq.prepare_data --mono mono.en --vocabulary data/en-de \\
        --source-lang en --target-lang de --output mono

has a split ``train`` alone, whose target side repeats the source, because fairseq wants one.

The output directory holds

    train.en train.de valid.en ...   normalised text, the references of all scores
    sentencepiece.model .vocab       joint model, trained on the training text only
    pieces/train.en ...              the same text in pieces
    bin/                             the data directory for fairseq, with a joined dictionary
    data.json                        counts, what was dropped and why, settings, fingerprint

It is built under another name beside it and renamed when complete, so it is either whole or not
there. One that an earlier call made is replaced, unless something else, as a cache, was put there. The
same input gives the same output, byte for byte, but for fairseq's own log.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from analysis.runs.errors import UserError, one_line_errors
from analysis.runs.files import atomic_directory
from analysis.terminal import split_list, warn
from sekd_fairseq.parallel_text import Pair, read_pairs, repeated, split, without_leaks

SUBSETS = ("train", "valid", "test")
#: SentencePiece's mark for a space, in pieces.
SPACE = "\u2581"
#: fairseq's symbol for padding.
PAD = "<pad>"
#: What an output holds, by path.
WRITTEN = re.compile(
    r"data\.json|sentencepiece\.(model|vocab)|pieces|bin"
    r"|(pieces/)?(train|valid|test)\.[^./]+"
    r"|bin/((train|valid|test)\.[^./]+\.[^./]+\.(bin|idx)|dict\.[^./]+\.txt|preprocess\.log)"
)


@dataclass(frozen=True)
class Settings:
    """What the prepared data depend on besides the text."""

    source_lang: str
    target_lang: str
    vocab_size: int
    character_coverage: float
    max_pieces: int
    vocabulary: Path | None = None

    @property
    def languages(self) -> tuple[str, str]:
        """Source and target language."""
        return self.source_lang, self.target_lang


@dataclass(frozen=True)
class WholeText:
    """One parallel text, to be split; sizes that are None follow from its length."""

    source: Path
    target: Path
    valid_size: int | None
    test_size: int | None
    seed: int

    def load(self) -> tuple[dict[str, list[Pair]], dict[str, Any]]:
        """The subsets, and counts of dropped pairs."""
        pairs, empty = read_pairs(self.source, self.target)
        dropped = {"empty": empty, "repeated": repeated(pairs)}
        sizes = split_sizes(len(set(pairs)), self.valid_size, self.test_size)
        return split(pairs, *sizes, self.seed), dropped


@dataclass(frozen=True)
class GivenSplits:
    """Three parallel texts; ``prefixes`` has those of each subset's files, joined with ``,``."""

    prefixes: dict[str, str]
    languages: tuple[str, str]

    def load(self) -> tuple[dict[str, list[Pair]], dict[str, Any]]:
        """The subsets, and counts of dropped pairs."""
        subsets: dict[str, list[Pair]] = {}
        empties: dict[str, int] = {}
        for subset, prefixes in self.prefixes.items():
            subsets[subset], empties[subset] = [], 0
            for prefix in split_list(prefixes, f"--{subset}"):
                pairs, empty = read_pairs(*(Path(f"{prefix}.{one}") for one in self.languages))
                subsets[subset] += pairs
                empties[subset] += empty
        held_out = [subsets["valid"], subsets["test"]]
        subsets["train"], leaked = without_leaks(subsets["train"], held_out)
        if not subsets["train"]:
            raise UserError(
                f"{self.prefixes['train']}: every training pair shares a sentence with valid or test; "
                "expected held-out text that is not in the training text"
            )
        return subsets, {"empty": empties, "in_held_out_text": leaked}


@dataclass(frozen=True)
class MonolingualText:
    """Text of the source language; each sentence stands on both sides."""

    source: Path

    def load(self) -> tuple[dict[str, list[Pair]], dict[str, Any]]:
        """The split ``train``, each sentence once, and counts of dropped lines."""
        pairs, empty = read_pairs(self.source, self.source)
        return {"train": list(dict.fromkeys(pairs))}, {"empty": empty, "repeated": repeated(pairs)}


def split_sizes(pairs: int, valid: int | None, test: int | None) -> tuple[int, int]:
    """How many of some pairs to hold out; where that was left open, never much of a small text."""
    chosen = valid or max(1, min(400, pairs // 12)), test or max(1, min(600, pairs // 8))
    if pairs - sum(chosen) < sum(chosen):
        warn(
            f"{chosen[0]} validation and {chosen[1]} test pairs leave fewer than as many of {pairs} "
            "to train on; lower --valid-size and --test-size"
        )
    return chosen


def train_sentencepiece(lines: Iterable[str], prefix: Path, settings: Settings) -> None:
    """Train a joint unigram model; writes PREFIX.model and PREFIX.vocab.

    The text was normalised already, so the model's own normalisation is off: decoding the pieces
    gives back exactly the text. One thread, because several would make the result depend on
    their number.
    """
    model = io.BytesIO()
    lines = list(lines)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=settings.vocab_size,
            # A small corpus may not hold as many pieces as asked for; it then gets fewer.
            hard_vocab_limit=False,
            character_coverage=settings.character_coverage,
            normalization_rule_name="identity",
            # A piece of this name would be padding to fairseq.
            control_symbols=[PAD] if any(PAD in line for line in lines) else [],
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"SentencePiece found no vocabulary of {settings.vocab_size} pieces: "
            f"{' '.join(str(error).split())}; raise --vocab-size, or lower --character-coverage "
            "(0.9995 is usual for Chinese)"
        ) from error
    prefix.with_suffix(".model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = (
        f"{processor.id_to_piece(i)}\t{processor.get_score(i):.6g}\n"
        for i in range(processor.get_piece_size())
    )
    prefix.with_suffix(".vocab").write_text("".join(pieces), encoding="utf-8")
    if (found := processor.get_piece_size()) < settings.vocab_size:
        warn(
            f"{found} pieces, fewer than --vocab-size {settings.vocab_size}: the training text holds no more"
        )


def encode(
    subsets: dict[str, list[Pair]], model: Path, settings: Settings, given_splits: bool
) -> tuple[dict[str, list[Pair]], dict[str, list[Pair]], dict[str, int], dict[str, int]]:
    """Cut all text into pieces and leave out pairs that are too long for the models.

    Given valid and test sets are not shortened in silence: there a long pair is an error.

    Returns
    -------
    The kept pairs, the same in pieces, how many were left out, and how many sentences the pieces do
    not give back exactly (those that hold SentencePiece's own mark), each by subset.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts: dict[str, list[Pair]] = {}
    pieces: dict[str, list[Pair]] = {}
    too_long, inexact = {}, {}
    for subset, pairs in subsets.items():
        sides = [processor.encode(list(side), out_type=str) for side in zip(*pairs, strict=True)]
        lengths = [max(map(len, both)) for both in zip(*sides, strict=True)]
        kept = [i for i, length in enumerate(lengths) if length <= settings.max_pieces]
        too_long[subset] = len(pairs) - len(kept)
        if (given_splits and subset != "train" and too_long[subset]) or not kept:
            index = next(i for i, length in enumerate(lengths) if length > settings.max_pieces)
            raise UserError(
                f"{subset}: expected pairs of at most {settings.max_pieces} pieces, found "
                f"{lengths[index]} in pair {index + 1} ({pairs[index][0][:40]!r}...); shorten it "
                "or raise --max-pieces"
            )
        texts[subset] = [pairs[i] for i in kept]
        pieces[subset] = [(" ".join(sides[0][i]), " ".join(sides[1][i])) for i in kept]
        changed = [
            f"{subset}.{language} line {line}"
            for language, side in zip(
                settings.languages, zip(*texts[subset], strict=True), strict=True
            )
            for line, sentence in enumerate(side, start=1)
            if SPACE in sentence
        ]
        inexact[subset] = len(changed)
        if changed:
            warn(
                f"{len(changed)} sentences hold {SPACE!r} (U+2581), SentencePiece's mark for a space, and "
                f"are translated with a space in its place, first {changed[0]}; is the text in pieces already?"
            )
    return texts, pieces, too_long, inexact


def write_subset(pairs: list[Pair], prefix: Path, languages: tuple[str, str]) -> None:
    """Write PREFIX.SOURCE and PREFIX.TARGET, one sentence a line."""
    prefix.parent.mkdir(exist_ok=True)
    for language, lines in zip(languages, zip(*pairs, strict=True), strict=True):
        text = "".join(f"{line}\n" for line in lines)
        Path(f"{prefix}.{language}").write_bytes(text.encode("utf-8"))


def binarise(pieces: Path, destination: Path, settings: Settings, subsets: Iterable[str]) -> None:
    """Run ``fairseq-preprocess`` with a joined dictionary; its output goes to its own log."""
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--joined-dictionary"]
    command += ["--source-lang", settings.source_lang, "--target-lang", settings.target_lang]
    if settings.vocabulary:
        command += ["--srcdict", str(dictionary_file(settings.vocabulary))]
    for subset in subsets:
        command += [f"--{subset}pref", str(pieces / subset)]
    command += ["--destdir", str(destination), "--workers", "1"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        last = (result.stdout.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"fairseq-preprocess failed: {last}; see that fairseq is installed")


def fingerprint(directory: Path, languages: tuple[str, str], subsets: Iterable[str]) -> str:
    """Return the SHA-256 of everything that a training depends on: dictionary, pieces, order."""
    digest = hashlib.sha256()
    for name in [f"{subset}.{language}" for subset in subsets for language in languages]:
        digest.update((directory / "pieces" / name).read_bytes() + b"\0")
    digest.update((directory / "bin" / f"dict.{languages[0]}.txt").read_bytes())
    return digest.hexdigest()


def dictionary_file(vocabulary: Path) -> Path:
    """The dictionary of a directory that an earlier call made; ``UserError`` where there is none."""
    found = sorted((vocabulary / "bin").glob("dict.*.txt"))
    if not found or not (vocabulary / "sentencepiece.model").is_file():
        raise UserError(
            f"--vocabulary {vocabulary}: expected a directory that this script made, with "
            "sentencepiece.model and bin/, found none"
        )
    return found[0]


def check_output(output: Path) -> None:
    """Refuse to replace anything but what an earlier call made."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not ((output / "sentencepiece.model").is_file() and (output / "bin").is_dir()):
        raise UserError(
            f"--output {output}: expected a new directory or one that this script made, found "
            "something else; choose another"
        )
    folders = (folder for folder in (output, output / "pieces", output / "bin") if folder.is_dir())
    found = (path for folder in folders for path in sorted(folder.iterdir()))
    others = [path for path in found if not WRITTEN.fullmatch(str(path.relative_to(output)))]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"--output {output}: expected nothing but what an earlier call wrote, which is replaced, "
            f"found {others[0]}{more}; move or delete that, or choose another"
        )


def prepare(
    subsets: dict[str, list[Pair]],
    dropped: dict[str, Any],
    output: Path,
    settings: Settings,
    given_splits: bool = False,
) -> dict[str, Any]:
    """Build the data directory ``output``, in place of one that is there already.

    Returns the content of ``data.json``.
    """
    with atomic_directory(output, replace=True) as building:
        prefix = building / "sentencepiece"
        if settings.vocabulary:
            for suffix in (".model", ".vocab"):
                shutil.copyfile(
                    (settings.vocabulary / "sentencepiece").with_suffix(suffix),
                    prefix.with_suffix(suffix),
                )
        else:
            train_text = (sentence for pair in subsets["train"] for sentence in pair)
            train_sentencepiece(train_text, prefix, settings)
        texts, pieces, too_long, inexact = encode(
            subsets, prefix.with_suffix(".model"), settings, given_splits
        )
        for subset in texts:
            write_subset(texts[subset], building / subset, settings.languages)
            write_subset(pieces[subset], building / "pieces" / subset, settings.languages)
        binarise(building / "pieces", building / "bin", settings, texts)
        # More than the model's pieces where the text has characters that it does not cover; a line
        # a symbol, and fairseq's own four.
        dictionary = building / "bin" / f"dict.{settings.source_lang}.txt"
        size = dictionary.read_bytes().count(b"\n") + 4
        summary = {
            "source_lang": settings.source_lang,
            "target_lang": settings.target_lang,
            "sentences": {subset: len(pairs) for subset, pairs in texts.items()},
            "dropped": {**dropped, "too_long": too_long},
            "inexact": inexact,
            "vocabulary": size,
            "max_pieces": settings.max_pieces,
            "fingerprint": fingerprint(building, settings.languages, texts),
            "versions": {
                "sentencepiece": sentencepiece.__version__,
                "python": sys.version.split()[0],
            },
        }
        (building / "data.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and refuse incomplete combinations."""
    parser = argparse.ArgumentParser(
        description="Parallel text to SentencePiece pieces and a fairseq data directory."
    )
    whole = parser.add_argument_group("one parallel text, to be split")
    whole.add_argument(
        "--src", type=Path, metavar="FILE", help="source side, one sentence per line"
    )
    whole.add_argument("--tgt", type=Path, metavar="FILE", help="target side, aligned by line")
    whole.add_argument("--valid-size", type=int, help="pairs (400, of a small text one in twelve)")
    whole.add_argument("--test-size", type=int, help="pairs (600, of a small text one in eight)")
    whole.add_argument("--seed", type=int, help="of the split (1)")
    given = parser.add_argument_group(
        "or three given ones (prefixes, .LANGUAGE or .LANGUAGE.gz is added; several joined with ',')"
    )
    for subset in SUBSETS:
        given.add_argument(f"--{subset}", metavar="PREFIX")
    parser.add_argument(
        "--mono",
        type=Path,
        metavar="FILE",
        help="or text of the source language that a teacher is to translate (distilled_data --sources), one "
        "sentence per line; with --vocabulary",
    )
    parser.add_argument("--source-lang", required=True)
    parser.add_argument("--target-lang", required=True)
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="new, or made by an earlier call, which is replaced; refused where something else was put there",
    )
    parser.add_argument(
        "--vocabulary",
        type=Path,
        metavar="DIR",
        help="take pieces and dictionary of what an earlier call made, instead of training them: for "
        "language pairs that share one, and for --mono",
    )
    parser.add_argument("--vocab-size", type=int, default=4000, help="pieces (%(default)s)")
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=1.0,
        help="share of characters that get a piece of their own (%(default)s); 0.9995 for Chinese",
    )
    parser.add_argument(
        "--max-pieces",
        type=int,
        default=250,
        help="leave out pairs with a longer side (%(default)s)",
    )
    args = parser.parse_args(argv)
    whole_text = (args.src, args.tgt)
    three = (args.train, args.valid, args.test)
    texts = (whole_text, three, (args.mono,))
    if sum(map(any, texts)) != 1 or not any(map(all, texts)):
        parser.error("expected --src and --tgt, or --train, --valid and --test, or --mono")
    if args.mono and not args.vocabulary:
        parser.error(
            "--mono expects --vocabulary DIR beside it, the data of the teacher's training"
        )
    if args.source_lang == args.target_lang:
        parser.error(f"expected two languages, found '{args.source_lang}' for both")
    for name in ("valid_size", "test_size", "seed"):
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is not None and not args.src:
            parser.error(f"{flag} is for --src and --tgt: given splits are not divided")
        if value is not None and value < 1 and name != "seed":
            parser.error(f"{flag} must be at least 1")
    return args


def text_of(args: argparse.Namespace) -> WholeText | GivenSplits | MonolingualText:
    """The text that the command line names."""
    if args.mono:
        return MonolingualText(args.mono)
    if args.src:
        seed = 1 if args.seed is None else args.seed
        return WholeText(args.src, args.tgt, args.valid_size, args.test_size, seed)
    prefixes = {subset: getattr(args, subset) for subset in SUBSETS}
    return GivenSplits(prefixes, (args.source_lang, args.target_lang))


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    args = parse(argv)
    settings = Settings(
        args.source_lang,
        args.target_lang,
        args.vocab_size,
        args.character_coverage,
        args.max_pieces,
        args.vocabulary,
    )
    check_output(args.output)
    if args.vocabulary:
        dictionary_file(args.vocabulary)  # before the work
    text = text_of(args)
    subsets, dropped = text.load()
    summary = prepare(
        subsets, dropped, args.output, settings, given_splits=isinstance(text, GivenSplits)
    )
    counts = ", ".join(f"{n} {subset}" for subset, n in summary["sentences"].items())
    print(f"{args.output}: {counts} pairs, {summary['vocabulary']} symbols")
    print(f"left out: {json.dumps(summary['dropped'])}")


if __name__ == "__main__":
    main()
