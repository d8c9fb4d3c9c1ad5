"""From parallel text to a fairseq data directory for language models.

    python -m sekd_fairseq.prepare_llm_data --tokenizer FOLDER_OR_MODEL --train text/train \\
        --valid text/valid --test text/test --source-lang de --target-lang en --output data/llm-de-en

``--train text/train`` is the pair of files ``text/train.de`` and ``text/train.en`` (or ``.gz``).
The source side becomes the whole prompt, the target side the translation, in the tokens that the
tokenizer gives for their text (sekd_fairseq/llm/prompts.py), under fairseq ids
(sekd_fairseq/llm/vocabulary.py). Text is taken as it is, not normalised, and never becomes a control
token; training pairs that share a sentence with valid or test are left out.
The output holds ``bin/`` (the data directory, with a copy of the tokenizer and all that makes prompts,
``llm.json``), the text of each split, and ``data.json``.

A teacher may read other prompts than the student, few-shot ones (``--teacher-shots 4``) say: they go
to ``teacher/``, a data directory of the same sentences and dictionary. A cache that is built on it
serves students that train on ``bin/``. What ends a translation may differ too: a base model goes on
with the next example and does not end the text.

    python -m sekd_fairseq.prepare_llm_data --mono mono.de --vocabulary data/llm-de-en \\
        --source-lang de --target-lang en --output mono

makes the same prompts of monolingual text that a teacher is to translate: a split ``train`` alone, whose
target side repeats the source, because fairseq wants one.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from analysis.runs.errors import one_line_errors
from analysis.runs.files import atomic_directory
from sekd_fairseq.llm.preparing import (
    SUBSETS,
    MonolingualSettings,
    PromptChoice,
    Settings,
    prepare,
    prepare_monolingual,
)
from sekd_fairseq.llm.prompts import DEFAULT


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        description="Parallel text to a fairseq data directory whose ids are the rows of a "
        "language model."
    )
    out.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="folder (or hub id) of a Hugging Face tokenizer, or a SentencePiece model file",
    )
    out.add_argument("--gguf-file", help="take the tokenizer of this GGUF file in --tokenizer")
    for subset in SUBSETS:
        out.add_argument(f"--{subset}", metavar="PREFIX", help="prefixes, joined with ','")
    out.add_argument(
        "--mono",
        type=Path,
        metavar="FILE",
        help="instead of these text of the source language that a teacher is to translate (distilled_data "
        "--sources), one sentence per line; with --vocabulary",
    )
    out.add_argument(
        "--vocabulary",
        type=Path,
        metavar="DIR",
        help="with --mono: the output of an earlier call, whose tokenizer, dictionary and prompts are taken",
    )
    out.add_argument("--source-lang", required=True)
    out.add_argument("--target-lang", required=True)
    out.add_argument("--output", required=True, type=Path, metavar="DIR")
    add_prompts(out, "the student's", "in OUTPUT/bin", "")
    add_prompts(
        out, "the teacher's", "in OUTPUT/teacher; made where one of these is given", "teacher-"
    )
    for subset in SUBSETS:
        out.add_argument(
            f"--{subset}-limit",
            type=int,
            default=0,
            metavar="N",
            help=f"use the first N pairs of {subset} (0: all)",
        )
    out.add_argument(
        "--prune-vocab",
        action="store_true",
        help="keep only the tokens that this text and single bytes need; export restores the rest",
    )
    return out


def add_prompts(parser: argparse.ArgumentParser, whose: str, where: str, prefix: str) -> None:
    """The options of a :class:`PromptChoice`."""
    group = parser.add_argument_group(f"prompts, {whose}", where)
    group.add_argument(
        f"--{prefix}template",
        type=Path,
        metavar="FILE",
        help="prompt with the fields {src}, {src_lang}, {tgt_lang} (default: "
        + ("the student's)" if prefix else f"{DEFAULT!r})"),
    )
    group.add_argument(
        f"--{prefix}shots",
        type=int,
        default=0,
        metavar="N",
        help="examples from the training text in every prompt",
    )
    group.add_argument(
        f"--{prefix}chat",
        action="store_true",
        help="the prompt is a user's turn in the tokenizer's own chat template, examples are "
        "earlier turns",
    )
    group.add_argument(
        f"--{prefix}end",
        default="",
        metavar="TEXT",
        help="the token that ends a translation, '\\n' for a line end (default: with --chat "
        "the end of the turn, with --shots what follows an example, else the tokenizer's end)",
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and refuse what does not belong together."""
    command = parser()
    args = command.parse_args(argv)
    given = {
        f"--{name.replace('_', '-')}"
        for name, value in vars(args).items()
        if value != command.get_default(name)
    }
    mono = {"--mono", "--vocabulary"}
    splits = {"--tokenizer", *(f"--{subset}" for subset in SUBSETS)}
    if given & mono:
        others = given - mono - {"--source-lang", "--target-lang", "--output"}
        if others or not mono <= given:
            command.error(
                "--mono FILE and --vocabulary DIR expect each other and, because tokenizer and prompts "
                f"are those of DIR, no other options; found {', '.join(sorted(given & mono | others))}"
            )
    elif not splits <= given:
        missing = ", ".join(sorted(splits - given))
        command.error(f"expected --mono, or all of {', '.join(sorted(splits))}; missing: {missing}")
    return args


def choice_of(args: argparse.Namespace, prefix: str) -> PromptChoice:
    """The prompts that the options ask for whose names begin with ``prefix``."""
    return PromptChoice(
        **{field.name: getattr(args, prefix + field.name) for field in fields(PromptChoice)}
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """What the command line asks for."""
    prompts = {"bin": choice_of(args, ""), "teacher": choice_of(args, "teacher_")}
    if not any(getattr(prompts["teacher"], field.name) for field in fields(PromptChoice)):
        del prompts["teacher"]
    return Settings(
        tokenizer=args.tokenizer,
        gguf_file=args.gguf_file,
        languages=(args.source_lang, args.target_lang),
        text={subset: getattr(args, subset).split(",") for subset in SUBSETS},
        limits={subset: getattr(args, f"{subset}_limit") for subset in SUBSETS},
        prune_vocab=args.prune_vocab,
        prompts=prompts,
    )


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the data; the output appears when it is complete."""
    args = parse(argv)
    with atomic_directory(args.output) as building:
        if args.mono:
            languages = (args.source_lang, args.target_lang)
            mono = MonolingualSettings(args.mono, args.vocabulary, languages)
            summary, notes = prepare_monolingual(mono, building)
        else:
            summary, notes = prepare(settings_of(args), building)
        (building / "data.json").write_text(json.dumps(summary, indent=1) + "\n")
    for note in notes:
        print(f"{args.output}: {note}")
    print(f"{args.output}: {json.dumps({k: v for k, v in summary.items() if k != 'shots'})}")


if __name__ == "__main__":
    main()
