"""Choose the length penalty of a run on the validation set.

    fairseq-generate DATA --user-dir sekd_fairseq --task self_evolution_kd --path student.pt \\
        --gen-subset valid --beam 4 --nbest 4 --lenpen 0 --remove-bpe sentencepiece > valid.nbest.out
    python -m sekd_fairseq.tune_lenpen valid.nbest.out --run runs/NAME --reference valid.de \\
        --target-lang de --values 0.4 0.7 1.0 1.3 1.6 2.0

writes ``length_penalty.json``: BLEU and length ratio for each value, and the best one, which the test
set is then translated with (``--lenpen``).

fairseq's beam search does not look at the length penalty before its hypotheses are complete; it only
orders them by ``sum of log-probabilities / length ** penalty``. So one translation that keeps all of
them gives, for every value, exactly what ``fairseq-generate --lenpen VALUE`` would.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU

from analysis.runs.files import atomic_write, sealed_json
from analysis.runs.languages import bleu_tokenizer
from analysis.runs.texts import read_lines, read_references
from analysis.terminal import warn
from sekd_fairseq.errors import UserError, one_line_errors

#: What a run's penalty is kept in.
FILE = "length_penalty.json"


@dataclass(frozen=True)
class Hypothesis:
    """One complete hypothesis of a beam."""

    log_probability: float
    length: int  # in tokens, the end of the sentence among them
    text: str

    def score(self, penalty: float) -> float:
        """What fairseq orders by."""
        return self.log_probability / self.length**penalty


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.tune_lenpen",
        description="Choose the length penalty with the best BLEU from one translation of the "
        "validation set.",
    )
    out.add_argument(
        "generated",
        type=Path,
        metavar="GENERATED",
        help="output of fairseq-generate with --nbest as large as --beam, and --lenpen 0",
    )
    out.add_argument("--run", required=True, type=Path, metavar="DIR", help="run directory")
    out.add_argument("--reference", required=True, type=Path, metavar="FILE", help="references")
    out.add_argument("--target-lang", required=True, help="chooses sacreBLEU's tokenizer")
    out.add_argument(
        "--values",
        type=float,
        nargs="+",
        required=True,
        metavar="X",
        help="length penalties to try; above 1 favours long translations",
    )
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Read, score each value, write."""
    args = parser().parse_args(argv)
    with one_line_errors():
        if not all(map(math.isfinite, args.values)):
            raise UserError(f"--values: expected numbers, found {' '.join(map(str, args.values))}")
        references = read_references(args.reference)
        beams = read_beams(args.generated, len(references))
        grid, signature = scores(beams, references, args.target_lang, args.values)
        best = max(grid, key=lambda row: row["bleu"])
        args.run.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.run / FILE) as stream:
            found = {"best": best["lenpen"], "grid": grid, "signature": signature}
            stream.write(sealed_json(found))
        if len(grid) > 1 and best["lenpen"] in (min(args.values), max(args.values)):
            warn(
                f"{args.run.name}: the best length penalty, {best['lenpen']:g}, is at the end of "
                "--values; a wider range may hold a better one"
            )
        print(
            f"{args.run.name}: length penalty {best['lenpen']:g}, BLEU {best['bleu']:.2f}, "
            f"length ratio {best['length_ratio']:.3f}"
        )


def read_beams(path: Path, expected: int) -> list[list[Hypothesis]]:
    """All hypotheses of each sentence, by its number.

    Raises
    ------
    UserError
        A sentence is missing, or the output was not made with ``--lenpen 0`` and ``--nbest``.
    """
    found: dict[int, list[Hypothesis]] = defaultdict(list)
    score, text = 0.0, ""
    for number, line in enumerate(read_lines(path), 1):
        label, *rest = line.split("\t", 2)
        if label.startswith("D-") and len(rest) == 2:
            score, text = float(rest[0]), rest[1]
        elif label.startswith("P-") and len(rest) == 1:  # after its D- line
            parts = [float(word) for word in rest[0].split()]
            if abs(score - sum(parts)) > 1e-4 * (len(parts) + abs(score)):
                raise UserError(
                    f"{path} line {number}: expected hypotheses whose score is the sum of their "
                    f"tokens' ({sum(parts):.3f}), found {score:.3f}; translate with --lenpen 0"
                )
            found[int(label[2:])].append(Hypothesis(score, len(parts), text))
    if sorted(found) != list(range(expected)):
        raise UserError(
            f"{path}: expected translations of {expected} sentences, one per reference line, found "
            f"{len(found)}; fairseq-generate must run to its end on the data of the references"
        )
    if max(map(len, found.values()), default=2) < 2:
        raise UserError(
            f"{path}: expected several hypotheses per sentence, found one; translate with --nbest as "
            "large as --beam"
        )
    return [found[sentence] for sentence in range(expected)]


def scores(
    beams: Sequence[Sequence[Hypothesis]],
    references: list[str],
    target_lang: str,
    values: Sequence[float],
) -> tuple[list[dict[str, Any]], str]:
    """BLEU and length ratio for each penalty, and sacreBLEU's signature."""
    tokenizer = bleu_tokenizer(target_lang)
    if tokenizer.remark:
        warn(tokenizer.remark)
    metric = BLEU(tokenize=tokenizer.name)
    grid = []
    for value in values:
        texts = [max(beam, key=methodcaller("score", value)).text for beam in beams]
        bleu = metric.corpus_score(texts, [references])
        ratio = bleu.sys_len / bleu.ref_len
        grid.append({"lenpen": value, "bleu": bleu.score, "length_ratio": ratio})
    return grid, str(metric.get_signature())


if __name__ == "__main__":
    main()
