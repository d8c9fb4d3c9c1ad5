"""Collect the translations of fairseq-generate into a run directory and score them.

    fairseq-generate DATA --user-dir sekd_fairseq --task self_evolution_kd --path student.pt \\
        --gen-subset test --beam 4 --remove-bpe sentencepiece > test.out
    python -m sekd_fairseq.evaluate test.out --run runs/NAME --source test.en --reference test.de \\
        --target-lang de

writes ``hyps/<subset>.txt`` (with ``.ref.txt`` and ``.src.txt`` beside it) and ``scores.json``.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.teacher_cache.format import atomic_write

#: sacreBLEU's tokenizer for languages that 13a does not fit.
TOKENIZERS = {"zh": "zh", "ja": "char", "ko": "char"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.evaluate",
        description="Collect fairseq-generate's translations into a run directory and score them "
        "with sacreBLEU. Every reference must have its translation.",
    )
    out.add_argument("generated", type=Path, metavar="GENERATED", help="fairseq-generate's output")
    out.add_argument("--run", required=True, type=Path, metavar="DIR", help="run directory")
    out.add_argument("--subset", default="test", help="name of the split (default: %(default)s)")
    out.add_argument("--source", required=True, type=Path, metavar="FILE", help="source text")
    out.add_argument("--reference", required=True, type=Path, metavar="FILE", help="references")
    out.add_argument("--target-lang", required=True, help="chooses sacreBLEU's tokenizer")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Collect, count, score, write."""
    args = parser().parse_args(argv)
    with one_line_errors():
        sources, references = read_lines(args.source), read_lines(args.reference)
        if len(sources) != len(references):
            raise UserError(
                f"{args.source} has {len(sources)} lines, {args.reference} {len(references)}; "
                "expected as many"
            )
        hypotheses = read_generated(args.generated, "D-", len(references))
        scores = score(hypotheses, references, args.target_lang)
        folder = args.run / "hyps"
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, lines in (("", hypotheses), (".ref", references), (".src", sources)):
            with atomic_write(folder / f"{args.subset}{suffix}.txt") as stream:
                stream.write("".join(f"{line}\n" for line in lines).encode())
        path = args.run / "scores.json"
        everything = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        everything[args.subset] = scores
        with atomic_write(path) as stream:
            stream.write((json.dumps(everything, indent=1) + "\n").encode())
        print(
            f"{args.run.name} {args.subset}: {len(hypotheses)} sentences, "
            f"BLEU {scores['bleu']['score']:.2f}, chrF {scores['chrf']['score']:.2f}"
        )


def read_lines(path: Path) -> list[str]:
    """A text file's lines, ended by a newline (or both characters of Windows) and by nothing else."""
    try:
        # Not read_text, for which a carriage return within a line would end it.
        lines = [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a UTF-8 text file ({error})") from error
    return lines[:-1] if lines[-1] == "" else lines


def read_generated(path: Path, prefix: str, expected: int) -> list[str]:
    """The best translation of each sentence, by its number, from fairseq-generate's output.

    ``prefix`` is ``D-`` for detokenised text or ``H-`` for the model's pieces.

    Raises
    ------
    UserError
        A sentence without a translation, or one too many: named by number.
    """
    best: dict[int, str] = {}
    for line in read_lines(path):
        if line.startswith(prefix):
            label, _, rest = line.partition("\t")
            _, _, text = rest.partition("\t")
            best.setdefault(int(label[2:]), text)
    missing = sorted(set(range(expected)) - set(best))
    if missing or len(best) != expected:
        which = f"sentence {missing[0]} has none" if missing else f"sentence {max(best)} is beyond"
        raise UserError(
            f"{path}: expected {expected} translations, one a reference line, found {len(best)} "
            f"({which}); fairseq-generate must run to its end with --task self_evolution_kd or "
            "--required-batch-size-multiple 1, on the data that the references belong to"
        )
    return [best[i] for i in range(expected)]


def score(hypotheses: list[str], references: list[str], target_lang: str) -> dict[str, Any]:
    """sacreBLEU's BLEU and chrF with their signatures."""
    result: dict[str, Any] = {"sentences": len(hypotheses)}
    tokenizer = TOKENIZERS.get(target_lang.split("_")[0].split("-")[0].lower(), "13a")
    for name, metric in (("bleu", BLEU(tokenize=tokenizer)), ("chrf", CHRF())):
        value = metric.corpus_score(hypotheses, [references])
        result[name] = {"score": value.score, "signature": str(metric.get_signature())}
    return result


if __name__ == "__main__":
    main()
