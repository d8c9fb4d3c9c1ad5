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

from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.evaluate import read_generated
from sekd_fairseq.teacher_cache.format import atomic_directory


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


def main(argv: Sequence[str] | None = None) -> None:
    """Write the directory, complete or not at all."""
    args = parser().parse_args(argv)
    with one_line_errors():
        source, target = languages(args.data, args.subset)
        name = f"{args.subset}.{source}-{target}.{target}"
        dictionary = Dictionary.load(str(args.data / f"dict.{target}.txt"))
        original = indexed_dataset.make_dataset(str(args.data / name), "mmap")
        lines = read_generated(args.generated, "H-", len(original))
        targets = [encode(line, dictionary, args.generated, i) for i, line in enumerate(lines)]
        with atomic_directory(args.output) as folder:
            for path in args.data.iterdir():
                if path.is_dir():  # a language model's tokenizer
                    shutil.copytree(path, folder / path.name)
                elif path.stem != name:
                    shutil.copy(path, folder)
            builder: Any = indexed_dataset.make_builder(
                str(folder / f"{name}.bin"), "mmap", vocab_size=len(dictionary)
            )
            for item in targets:
                builder.add_item(item)
            builder.finalize(str(folder / f"{name}.idx"))
        tokens = sum(map(len, targets))
        print(f"{args.output}: {len(targets)} targets of {args.subset}, {tokens} tokens")


def languages(data: Path, subset: str) -> tuple[str, str]:
    """Source and target language of a binarised split, from its file names."""
    for path in sorted(data.glob(f"{subset}.*-*.*.idx")):
        pair = path.name[len(subset) + 1 :].split(".")[0]
        source, _, target = pair.partition("-")
        if (data / f"{subset}.{pair}.{target}.idx").exists():
            return source, target
    raise UserError(f"{data}: expected a binarised split {subset!r} with targets, found none")


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
