"""From parallel text to a fairseq data directory for language models.

    python scripts/prepare_llm_data.py --tokenizer FOLDER_OR_MODEL --train text/train \\
        --valid text/val --test text/test --source-lang de --target-lang en --output data/llm-de-en

``--train text/train`` is the pair of files ``text/train.de`` and ``text/train.en`` (or ``.gz``).
The source side becomes the whole prompt, the target side the translation, both in the tokenizer's
tokens under fairseq ids (sekd_fairseq/llm/vocabulary.py). Text is taken as it is, not normalised;
training pairs that share a sentence with valid or test are left out.
The output holds ``bin/`` (the data directory), the text of each split, and ``data.json``.

A teacher may read other prompts than the student, few-shot ones (``--teacher-shots 4``) say: they go
to ``teacher/``, a data directory of the same sentences and dictionary. A cache that is built on it
serves students that train on ``bin/``. Where prompts hold examples, the end of sentence is what ends
an example: a base model goes on with the next one and does not end the text.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary, indexed_dataset
from parallel_text import DataError, Pair, read_aligned, without_leaks

from analysis.terminal import progress
from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.prompts import DEFAULT, SEPARATOR, Template, read_template
from sekd_fairseq.llm.tokenizer import Tokenizer, load_tokenizer
from sekd_fairseq.llm.vocabulary import NEW_ROW, Vocabulary, build_vocabulary, with_end
from sekd_fairseq.teacher_cache.format import atomic_directory, hash_file, hash_symbols

SUBSETS = ("train", "valid", "test")
BOS, EOS, UNK = 0, 2, 3


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Parallel text to a fairseq data directory whose ids are the rows of a "
        "language model."
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="folder (or hub id) of a Hugging Face tokenizer, or a SentencePiece model file",
    )
    parser.add_argument("--gguf-file", help="take the tokenizer of this GGUF file in --tokenizer")
    for subset in SUBSETS:
        parser.add_argument(
            f"--{subset}", required=True, metavar="PREFIX", help="prefixes, joined with ','"
        )
    parser.add_argument("--source-lang", required=True)
    parser.add_argument("--target-lang", required=True)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--template",
        type=Path,
        metavar="FILE",
        help=f"prompt with the fields {{src}}, {{src_lang}}, {{tgt_lang}} (default: {DEFAULT!r})",
    )
    parser.add_argument(
        "--shots", type=int, default=0, help="examples from the training text in every prompt"
    )
    parser.add_argument(
        "--teacher-template",
        type=Path,
        metavar="FILE",
        help="prompt of the teacher, in OUTPUT/teacher (default: the student's)",
    )
    parser.add_argument(
        "--teacher-shots", type=int, default=0, help="examples in the teacher's prompts"
    )
    for subset in SUBSETS:
        parser.add_argument(
            f"--{subset}-limit",
            type=int,
            default=0,
            metavar="N",
            help=f"use the first N pairs of {subset} (0: all)",
        )
    parser.add_argument(
        "--prune-vocab",
        action="store_true",
        help="keep only the tokens that this text and single bytes need; export restores the rest",
    )
    return parser.parse_args(arguments)


def read_subset(prefixes: str, languages: tuple[str, str]) -> list[Pair]:
    """Aligned lines of one or several pairs of files, as they are."""
    pairs: list[Pair] = []
    for prefix in prefixes.split(","):
        source, target = read_aligned(*(Path(f"{prefix}.{language}") for language in languages))
        for number, pair in enumerate(zip(source, target, strict=True), start=1):
            if not all(side.strip() for side in pair):
                raise DataError(
                    f"{prefix}, line {number}: expected text on both sides, found an empty line; "
                    "take the pair out"
                )
            pairs.append(pair)
    return pairs


def choose_shots(subsets: dict[str, list[Pair]], count: int) -> list[Pair]:
    """Examples for prompts, taken out of the training text."""
    if count > len(subsets["train"]):
        raise DataError(
            f"--shots: expected at most the training pairs ({len(subsets['train'])}), found {count}"
        )
    shots = random.Random(1).sample(subsets["train"], count)
    subsets["train"] = [pair for pair in subsets["train"] if pair not in shots]
    return shots


def end_of_example(tokenizer: Tokenizer, translation: str) -> int:
    """The token that ends a translation in a few-shot prompt."""
    alone, ended = tokenizer.encode(translation), tokenizer.encode(translation + SEPARATOR)
    return (ended[len(alone) :] if ended[: len(alone)] == alone else tokenizer.encode(SEPARATOR))[0]


def tokenize(sentences: Sequence[str], tokenizer: Tokenizer, what: str) -> list[list[int]]:
    """The tokenizer's ids of each sentence."""
    return [tokenizer.encode(text) for text in progress(sentences, desc=what, unit="line")]


def write_binary(
    path: Path, sentences: list[list[int]], index: dict[int, int], begin: list[int], size: int
) -> int:
    """One side of one split; returns how many tokens have no symbol."""
    unknown = 0
    builder: Any = indexed_dataset.make_builder(f"{path}.bin", "mmap", vocab_size=size)
    for sentence in sentences:
        ids = [index.get(token, UNK) for token in sentence]
        unknown += ids.count(UNK)
        builder.add_item(torch.tensor([*begin, *ids, EOS], dtype=torch.int32))
    builder.finalize(f"{path}.idx")
    return unknown


def prepare(args: argparse.Namespace, building: Path) -> dict[str, Any]:
    """Write everything below ``building``; returns the content of data.json."""
    languages = (args.source_lang, args.target_lang)
    text = read_template(args.template)
    prompts = {"bin": (text, args.shots)}
    if args.teacher_template or args.teacher_shots:
        teacher = read_template(args.teacher_template) if args.teacher_template else text
        prompts["teacher"] = (teacher, args.teacher_shots)
    templates = {name: Template(text, *languages) for name, (text, _) in prompts.items()}
    subsets = {subset: read_subset(getattr(args, subset), languages) for subset in SUBSETS}
    subsets["train"], leaked = without_leaks(subsets["train"], [subsets["valid"], subsets["test"]])
    tokenizer = load_tokenizer(args.tokenizer, args.gguf_file)
    shots = choose_shots(subsets, max(count for _, count in prompts.values()))
    for subset in SUBSETS:
        subsets[subset] = subsets[subset][: getattr(args, f"{subset}_limit") or None]
    sources = {
        (name, subset): tokenize(
            [templates[name].prompt(source, shots[:count]) for source, _ in pairs],
            tokenizer,
            f"{name} {subset}.{languages[0]}",
        )
        for name, (_, count) in prompts.items()
        for subset, pairs in subsets.items()
    }
    targets = {
        subset: tokenize([target for _, target in pairs], tokenizer, f"{subset}.{languages[1]}")
        for subset, pairs in subsets.items()
    }
    inexact = sum(
        tokenizer.decode(tokens) != target
        for subset, pairs in subsets.items()
        for tokens, (_, target) in zip(targets[subset], pairs, strict=True)
    )
    keep = None
    if args.prune_vocab:
        lists = [*sources.values(), *targets.values()]
        keep = {token for sentences in lists for tokens in sentences for token in tokens}
        keep |= tokenizer.single_bytes()
    symbols, rows = build_vocabulary(tokenizer.pieces, tokenizer.specials, keep)
    index = {row: i for i, row in enumerate(rows) if row != NEW_ROW}
    dictionary = Dictionary()
    for symbol in symbols[len(dictionary) :]:
        dictionary.add_symbol(symbol)
    if dictionary.symbols != symbols:
        raise UserError(f"--tokenizer {args.tokenizer}: two tokens have one id")
    unknown = 0
    begin = [BOS] if rows[BOS] != NEW_ROW else []
    for name, (template, count) in prompts.items():
        folder = building / name
        folder.mkdir()
        for language in languages:
            dictionary.save(str(folder / f"dict.{language}.txt"))
        for subset in SUBSETS:
            stem = folder / f"{subset}.{'-'.join(languages)}"
            for sentences, language, first in (
                (sources[name, subset], languages[0], begin),
                (targets[subset], languages[1], []),
            ):
                path = Path(f"{stem}.{language}")
                unknown += write_binary(path, sentences, index, first, len(symbols))
        used = with_end(rows, end_of_example(tokenizer, shots[0][1])) if count else rows
        found = Vocabulary(used, args.tokenizer, template, hash_symbols(symbols), args.gguf_file)
        found.save(folder)
    for subset, pairs in subsets.items():
        for side, language in enumerate(languages):
            lines = "".join(f"{pair[side]}\n" for pair in pairs)
            (building / f"{subset}.{language}").write_bytes(lines.encode("utf-8"))
    return {
        "sentences": {subset: len(pairs) for subset, pairs in subsets.items()},
        "in_held_out_text": leaked,
        "target_tokens": {s: sum(len(t) + 1 for t in tokens) for s, tokens in targets.items()},
        "vocabulary": len(symbols),
        "tokenizer_tokens": len(tokenizer.pieces),
        "unknown_tokens": unknown,
        "translations_not_given_back_exactly": inexact,
        "shots": shots,
        "fingerprint": fingerprint(building),
    }


def fingerprint(building: Path) -> str:
    """SHA-256 of all that a training depends on: names and content of the files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in building.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(building)}\0{hash_file(path)}\0".encode())
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the output appears when it is complete."""
    args = parse(arguments)
    try:
        with atomic_directory(args.output) as building:
            summary = prepare(args, building)
            (building / "data.json").write_text(json.dumps(summary, indent=1) + "\n")
    except (DataError, UserError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.output}: {json.dumps({k: v for k, v in summary.items() if k != 'shots'})}")


if __name__ == "__main__":
    main()
