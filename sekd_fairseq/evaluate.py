"""Collect translations into a run directory and score them.

    fairseq-generate DATA --user-dir sekd_fairseq --task self_evolution_kd --path student.pt \\
        --gen-subset test --beam 4 --remove-bpe sentencepiece > test.out
    python -m sekd_fairseq.evaluate test.out --run runs/NAME --source test.en --reference test.de \\
        --target-lang de

writes ``hyps/<subset>.txt`` (with ``.ref.txt`` and ``.src.txt`` beside it) and ``scores.json``. Instead of
fairseq-generate's output it takes a plain text file, one translation a line, of any system; of one that
was not trained and scored here, ``--method``, ``--source-lang`` and ``--seed`` say in ``run.json`` what
it is, so that the analysis compares it.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from analysis.runs.languages import bleu_tokenizer
from analysis.runs.run_record import LINES, RunRecord, read_run, write_run, write_scores
from analysis.runs.texts import Texts, read_lines, read_references, write_texts
from analysis.terminal import warn
from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.generated import LABEL, alike, letters, printed, read_generated


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.evaluate",
        description="Collect translations into a run directory and score them with sacreBLEU. Every "
        "reference must have its translation.",
    )
    out.add_argument(
        "generated",
        type=Path,
        metavar="GENERATED",
        help="fairseq-generate's output, or one translation a line",
    )
    out.add_argument("--run", required=True, type=Path, metavar="DIR", help="run directory")
    out.add_argument("--subset", default="test", help="name of the split (default: %(default)s)")
    out.add_argument("--source", required=True, type=Path, metavar="FILE", help="source text")
    out.add_argument("--reference", required=True, type=Path, metavar="FILE", help="references")
    out.add_argument("--target-lang", required=True, help="chooses sacreBLEU's tokenizer")
    out.add_argument(
        "--lenpen",
        type=float,
        metavar="X",
        help="the length penalty that GENERATED was made with, for the record",
    )
    out.add_argument(
        "--method",
        help="what the run is called in the analysis; only for runs that are not scored against a "
        "teacher, which have a run.json already",
    )
    out.add_argument("--source-lang", metavar="CODE", help="goes with --method")
    out.add_argument(
        "--seed", type=int, default=1, help="of its training, with --method (default: %(default)s)"
    )
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Collect, count, score, write."""
    args = parser().parse_args(argv)
    with one_line_errors():
        if (args.method is None) != (args.source_lang is None):
            raise UserError("expected --method and --source-lang together, found one of them")
        if args.lenpen is not None and not math.isfinite(args.lenpen):
            raise UserError(f"--lenpen: expected a number, found {args.lenpen}")
        sources, references = read_lines(args.source), read_references(args.reference)
        if len(sources) != len(references):
            raise UserError(
                f"{args.source} has {len(sources)} lines, {args.reference} {len(references)}; "
                "expected as many"
            )
        hypotheses = read_translations(args.generated, len(references))
        check_texts(args.generated, args.source, args.reference)
        scores = score(hypotheses, references, args.target_lang)
        if args.lenpen is not None:
            scores["lenpen"] = args.lenpen
        if args.method is not None:
            direction = f"{args.source_lang}-{args.target_lang}"
            name_run(args.run, args.method, args.seed, direction)
        checksums = write_texts(args.run, args.subset, Texts(hypotheses, references, sources))
        write_scores(args.run, args.subset, scores | {LINES: checksums})
        print(
            f"{args.run.name} {args.subset}: {len(hypotheses)} sentences, "
            f"BLEU {scores['bleu']['score']:.2f}, chrF {scores['chrf']['score']:.2f}"
        )


def name_run(path: Path, method: str, seed: int, direction: str) -> None:
    """Write a ``run.json`` that only says what the translations are of.

    Raises
    ------
    UserError
        There is one that says something else.
    """
    if (path / "run.json").exists():
        found = read_run(path, path.name)
        if (found.method, found.seed, found.direction) != (method, seed, direction):
            raise UserError(
                f"{path}: expected a run of {method}, seed {seed}, {direction}, found run.json of "
                f"{found.method}, seed {found.seed}, {found.direction}; choose another --run, or leave "
                "--method out"
            )
        return
    path.mkdir(parents=True, exist_ok=True)
    record = RunRecord(name=path.name, method=method, seed=seed, direction=direction, updates=0)
    write_run(path, record)


def read_translations(path: Path, expected: int) -> list[str]:
    """Translations in the order of the references: the ``D-`` lines of fairseq-generate's output, or
    every line of a file that has none of its labels.

    Raises
    ------
    UserError
        There is not one translation for each reference.
    """
    lines = read_lines(path)
    if any(LABEL.match(line) for line in lines):
        return read_generated(path, "D-", expected)
    if len(lines) != expected:
        raise UserError(
            f"{path}: expected {expected} translations, one a reference line, found {len(lines)} lines "
            "without fairseq-generate's labels; give its output, or one translation a line"
        )
    return lines


def check_texts(generated: Path, source: Path, reference: Path) -> None:
    """Compare the source and reference files with the sentences that fairseq-generate printed.

    Its ``S-`` and ``T-`` lines are the data's sentences (of a language model the prompt around them),
    perhaps tokenised or in lower case, so letters and digits alone are compared. Files in another
    order, exchanged, or of another text are refused; of references that are only worded differently,
    as of a second translator, the user is told.

    Raises
    ------
    UserError
        Names the first line that is another sentence's.
    """
    texts_of: dict[str, dict[int, str]] = {"S-": {}, "T-": {}}
    for prefix, sentence, text in printed(generated, *texts_of):
        texts_of[prefix].setdefault(sentence, text)
    owners = {
        letters(text): f"{prefix}{sentence}"
        for prefix, texts in texts_of.items()
        for sentence, text in texts.items()
    }
    for path, prefix in ((source, "S-"), (reference, "T-")):
        lines, own = read_lines(path), texts_of[prefix]
        if prefix == "S-" and len(own) > 1 and len(set(own.values())) == 1:
            continue  # the first line of a language model's prompt, which is all that is printed of it
        other = [i for i in own if i < len(lines) and not alike(lines[i], own[i])]
        strays = {i: owners[letters(lines[i])] for i in other if letters(lines[i]) in owners}
        if not other:
            continue
        if 2 * len(strays) >= len(other):
            first = min(strays)
            raise UserError(
                f"{path} line {first + 1}: expected the text of {prefix}{first} in {generated}, found "
                f"that of {strays[first]} ({len(other)} of {len(lines)} lines are not their own); "
                "give --source and --reference in the order of the data that were translated"
            )
        told = (
            f"{path}: {len(other)} of {len(lines)} lines differ from what {generated} was "
            f"translated from, first line {min(other) + 1}"
        )
        if prefix == "S-" and 2 * len(other) > len(lines):
            raise UserError(f"{told}; expected the text of the data that were translated")
        warn(f"{told}; scored as they are (another translator's references?)")


def score(hypotheses: list[str], references: list[str], target_lang: str) -> dict[str, Any]:
    """sacreBLEU's BLEU and chrF with their signatures, and the length of the translations over that
    of the references, in sacreBLEU's tokens."""
    result: dict[str, Any] = {"sentences": len(hypotheses)}
    tokenizer = bleu_tokenizer(target_lang)
    if tokenizer.remark:
        warn(tokenizer.remark)
    for name, metric in (("bleu", BLEU(tokenize=tokenizer.name)), ("chrf", CHRF())):
        value = metric.corpus_score(hypotheses, [references])
        result[name] = {"score": value.score, "signature": str(metric.get_signature())}
        if name == "bleu":
            result["length_ratio"] = value.sys_len / value.ref_len
    return result


if __name__ == "__main__":
    main()
