"""Does the gain come from better transfer? Reads run directories and writes the report.

python -m analysis.transfer RUNS [--output DIR]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from analysis.figures import add_style
from analysis.neural import add_comet_option
from analysis.report.document import terminal_summary, write_report
from analysis.report.folder import MARK, check_output, replace_report
from analysis.results import analyse
from analysis.runs.errors import UserError, one_line_errors
from analysis.runs.texts import read_lines
from analysis.style import own_style
from analysis.sums.buckets import Threshold
from analysis.sums.direction import Options


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m analysis.transfer",
        description="Compare runs token by token with their teacher, and write a report that says "
        "whether a gain in quality comes from better transfer.",
    )
    add = out.add_argument
    add("runs", type=Path, metavar="RUNS", help="directory of runs, found by their run.json")
    add("--output", type=Path, metavar="DIR", help="where the report goes (default: RUNS/report)")
    add("--subset", default="test", help="split that was scored (default: %(default)s)")
    add(
        "--reference",
        nargs="+",
        default=["finetune"],
        metavar="WHAT",
        help="whose difficulty defines easy and hard tokens: a method (its runs of other seeds than those "
        "compared), or a run's path below RUNS; of several the mean (default: finetune); with a method that is "
        "itself compared, claims 1 to 3 stay inconclusive",
    )
    add(
        "--gamma",
        type=float,
        default=0.75,
        help="tokens with a difficulty above Γ are hard; a quantile in [0, 1], or nats "
        "(default: %(default)s)",
    )
    add(
        "--gamma-type",
        choices=("quantile", "absolute"),
        default="quantile",
        help="whether --gamma is a quantile of the reference's difficulty or nats (default: %(default)s)",
    )
    add(
        "--baseline",
        default="word_kd",
        metavar="METHOD",
        help="claims compare with this method (default: %(default)s); the tables of BLEU and of "
        "gains have it beside finetune and word_kd",
    )
    add(
        "--margin",
        type=float,
        default=0.02,
        help="smallest relative effect that matters, for the verdicts (default: %(default)s)",
    )
    add_comet_option(out)
    add(
        "--documents",
        type=Path,
        metavar="FILE",
        help="a line for each sentence of the test set with the name of its document: resamples then draw "
        "whole documents, whose sentences are alike",
    )
    add_style(out)
    add("--resamples", type=int, default=1000, help="bootstrap resamples (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the resamples (default: %(default)s)")
    return out


def read_options(args: argparse.Namespace) -> Options:
    """Check the numbers of the command line."""
    if args.gamma < 0 or (args.gamma_type == "quantile" and args.gamma > 1):
        allowed = "in [0, 1] as a quantile" if args.gamma_type == "quantile" else "at least 0"
        raise UserError(f"--gamma: expected a number {allowed}, found {args.gamma}")
    if args.resamples < 100:
        raise UserError(f"--resamples: expected at least 100, found {args.resamples}")
    if not 0 <= args.margin < 1:
        raise UserError(f"--margin: expected a share in [0, 1), found {args.margin}")
    return Options(
        subset=args.subset,
        threshold=Threshold(args.gamma, args.gamma_type),
        references=tuple(args.reference),
        baseline=args.baseline,
        margin=args.margin,
        resamples=args.resamples,
        seed=args.seed,
        documents=tuple(read_lines(args.documents)) if args.documents else (),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report and print its verdicts."""
    args = parser().parse_args(argv)
    with one_line_errors():
        options = read_options(args)
        output = args.output or args.runs / "report"
        check_output(output)
        with own_style(args.style):  # read before the work, if it cannot be
            pass
        results = analyse(args.runs, options, args.comet)
        replace_report(output, lambda folder: write_report(results, folder, args.style))
        print(terminal_summary(results))
        print(f"report: {output / MARK}")


if __name__ == "__main__":
    main()
