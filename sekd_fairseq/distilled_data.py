"""Sequence-level distillation: a data directory whose targets are the teacher's translations.

    fairseq-generate DATA --user-dir sekd_fairseq --task self_evolution_kd --path teacher.pt \\
        --gen-subset train --beam 4 > train.out            (without --remove-bpe)
    python -m sekd_fairseq.distilled_data DATA --generated train.out --output DISTILLED

Students train on DISTILLED with any criterion (Kim and Rush, 2016, with cross entropy); a cache for
its targets (build_cache DISTILLED) brings word-level KD or SE-KD to them too.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary, indexed_dataset

from analysis.runs.files import atomic_directory
from analysis.terminal import warn
from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.evaluate import read_generated
from sekd_fairseq.splits import check_splits, languages, stored_as


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.distilled_data",
        description="Copy a fairseq data directory with one split's targets replaced by a "
        "teacher's translations, as sequence-level distillation wants it.",
    )
    out.add_argument("data", type=Path, metavar="DATA", help="fairseq data directory")
    out.add_argument(
        "--generated",
        required=True,
        type=Path,
        metavar="FILE",
        help="output of fairseq-generate on the split, made without --remove-bpe",
    )
    out.add_argument("--output", required=True, type=Path, metavar="DIR", help="new data directory")
    out.add_argument("--subset", default="train", help="the split (default: %(default)s)")
    return out


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Write the directory, complete or not at all."""
    args = parser().parse_args(argv)
    check_splits(str(args.data), [args.subset])
    source, target = languages(args.data, args.subset)
    stored = stored_as(args.data, args.subset, source, target, target)
    assert stored is not None  # languages() has seen it
    name, kind = Path(stored[0]).name, stored[1]
    dictionary = Dictionary.load(str(args.data / f"dict.{target}.txt"))
    if kind == "huffman":
        raise UserError(
            f"{args.data}: expected data of --dataset-impl mmap, lazy, cached or raw, found huffman, "
            "which is not written here; binarise the text again without it"
        )
    original = indexed_dataset.make_dataset(stored[0], kind, dictionary=dictionary)
    lines = read_generated(args.generated, "H-", len(original))
    targets = [encode(line, dictionary, args.generated, i) for i, line in enumerate(lines)]
    with atomic_directory(args.output) as folder:
        for path in args.data.iterdir():
            if path.is_dir():  # a language model's tokenizer
                shutil.copytree(path, folder / path.name)
            elif name not in (path.name, path.stem):
                shutil.copy(path, folder)
        if kind == "raw":  # as the source beside it is
            text = "".join(f"{' '.join(line.split())}\n" for line in lines)
            (folder / name).write_bytes(text.encode())
        else:
            write_indexed(folder / name, kind, targets, len(dictionary))
    if stored_as(args.data, f"{args.subset}1", source, target, target):
        warn(
            f"{args.output}: holds {args.subset}1 as it is, which fairseq-train adds to "
            f"{args.subset}; distil it with --subset {args.subset}1, or delete its files"
        )
    tokens = sum(map(len, targets))
    print(f"{args.output}: {len(targets)} targets of {args.subset}, {tokens} tokens")


def write_indexed(path: Path, kind: str, sentences: list[torch.Tensor], vocab_size: int) -> None:
    """Write PATH.bin and PATH.idx in one of fairseq's formats."""
    builder: Any = indexed_dataset.make_builder(f"{path}.bin", kind, vocab_size=vocab_size)
    for sentence in sentences:
        builder.add_item(sentence)
    builder.finalize(f"{path}.idx")


def encode(line: str, dictionary: Dictionary, path: Path, sentence: int) -> torch.Tensor:
    """Token ids of a translation's pieces, end of sentence included; int32."""
    pieces = line.split()
    unknown = [piece for piece in pieces if piece not in dictionary.indices]
    if unknown:
        raise UserError(
            f"{path}: sentence {sentence} has {unknown[0]!r}, which is no symbol of the "
            "dictionary; expected pieces as the model makes them: run fairseq-generate without "
            "--remove-bpe and with this data directory"
        )
    return torch.tensor(
        [*(dictionary.index(piece) for piece in pieces), dictionary.eos()], dtype=torch.int32
    )


if __name__ == "__main__":
    main()
