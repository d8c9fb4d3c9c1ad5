"""From parallel text to a fairseq data directory for language models.

    python scripts/prepare_llm_data.py --tokenizer FOLDER_OR_MODEL --train text/train \\
        --valid text/val --test text/test --source-lang de --target-lang en --output data/llm-de-en

``--train text/train`` is the pair of files ``text/train.de`` and ``text/train.en`` (or ``.gz``).
The source side becomes the whole prompt, the target side the translation, both in the tokenizer's
tokens under fairseq ids (sekd_fairseq/llm/vocabulary.py). Text is taken as it is, not normalised.
The output holds ``bin/`` (the data directory), the text of each split, and ``data.json``.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary, indexed_dataset
from parallel_text import DataError, Pair, read_aligned
from tqdm import tqdm

from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.prompts import DEFAULT, Template, read_template
from sekd_fairseq.llm.tokenizer import Tokenizer, load_tokenizer
from sekd_fairseq.llm.vocabulary import NEW_ROW, Vocabulary, build_vocabulary
from sekd_fairseq.teacher_cache.format import atomic_directory, hash_symbols

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
    parser.add_argument("--limit", type=int, default=0, help="use the first so many training pairs")
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


def tokenize(
    subsets: dict[str, list[Pair]], tokenizer: Tokenizer, template: Template, shots: list[Pair]
) -> tuple[dict[str, list[tuple[list[int], list[int]]]], int]:
    """The tokenizer's ids of each prompt and translation; and how many translations are not given
    back exactly."""
    tokens: dict[str, list[tuple[list[int], list[int]]]] = {}
    inexact = 0
    for subset, pairs in subsets.items():
        tokens[subset] = []
        for source, target in tqdm(pairs, desc=f"tokenize {subset}", unit="pair"):
            translation = tokenizer.encode(target)
            inexact += tokenizer.decode(translation) != target
            tokens[subset].append((tokenizer.encode(template.prompt(source, shots)), translation))
    return tokens, inexact


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
    template = Template(text, *languages)
    subsets = {subset: read_subset(getattr(args, subset), languages) for subset in SUBSETS}
    tokenizer = load_tokenizer(args.tokenizer, args.gguf_file)
    shots: list[Pair] = []
    if args.shots:
        chosen = random.Random(1).sample(range(len(subsets["train"])), args.shots)
        shots = [subsets["train"][i] for i in chosen]
        subsets["train"] = [pair for pair in subsets["train"] if pair not in shots]
    if args.limit:
        subsets["train"] = subsets["train"][: args.limit]
    tokens, inexact = tokenize(subsets, tokenizer, template, shots)
    keep = None
    if args.prune_vocab:
        keep = {t for pairs in tokens.values() for pair in pairs for side in pair for t in side}
        keep |= tokenizer.single_bytes()
    symbols, rows = build_vocabulary(tokenizer.pieces, tokenizer.specials, keep)
    index = {row: i for i, row in enumerate(rows) if row != NEW_ROW}
    folder = building / "bin"
    folder.mkdir()
    dictionary = Dictionary()
    for symbol in symbols[len(dictionary) :]:
        dictionary.add_symbol(symbol)
    if dictionary.symbols != symbols:
        raise UserError(f"--tokenizer {args.tokenizer}: two tokens have one id")
    unknown = 0
    begin = [BOS] if rows[BOS] != NEW_ROW else []
    for side, language in enumerate(languages):
        dictionary.save(str(folder / f"dict.{language}.txt"))
        for subset, pairs in tokens.items():
            path = folder / f"{subset}.{'-'.join(languages)}.{language}"
            sentences = [pair[side] for pair in pairs]
            unknown += write_binary(
                path, sentences, index, begin if side == 0 else [], len(symbols)
            )
            lines = "".join(f"{pair[side]}\n" for pair in subsets[subset])
            (building / f"{subset}.{language}").write_bytes(lines.encode("utf-8"))
    Vocabulary(rows, args.tokenizer, text, hash_symbols(symbols)).save(folder)
    return {
        "sentences": {subset: len(pairs) for subset, pairs in subsets.items()},
        "target_tokens": {s: sum(len(p[1]) + 1 for p in pairs) for s, pairs in tokens.items()},
        "vocabulary": len(symbols),
        "tokenizer_tokens": len(tokenizer.pieces),
        "unknown_tokens": unknown,
        "translations_not_given_back_exactly": inexact,
        "shots": shots,
    }


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
