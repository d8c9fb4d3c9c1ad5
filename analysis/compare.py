"""Which system translates better, and where? Compares plain text files, one translation a line.

    python -m analysis.compare --ref REF [--ref REF2] [--src SRC] SYSTEM [SYSTEM ...]

needs no training of this project's: any systems' translations of one test set, in the manner of
sacreBLEU and compare-mt. The first system is the baseline. Every file may be gzipped.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sacrebleu.metrics.bleu import BLEU

from analysis.comparison.chapters import Results, findings
from analysis.comparison.document import write_report
from analysis.comparison.metrics import compare_systems, measure_systems
from analysis.comparison.systems import Corpus, load_corpus, named_paths
from analysis.comparison.words import CutTexts, cut, splitter
from analysis.neural import add_comet_option, load_comet, sentence_scores
from analysis.report.folder import check_output, replace_report
from analysis.runs.errors import UserError, one_line_errors
from analysis.runs.texts import each_line
from analysis.stats import Floats
from analysis.terminal import progress


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m analysis.compare",
        description="Compare the translations of systems: scores with intervals and paired tests, "
        "length, words by training frequency, sentences by length and score, n-grams, examples.",
    )
    add = out.add_argument
    add(
        "systems",
        nargs="+",
        metavar="SYSTEM",
        help="translations, one a line: FILE or NAME=FILE; the first is the baseline",
    )
    add(
        "--ref",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="references; again for a second translator's",
    )
    add("--src", type=Path, metavar="FILE", help="source text, shown in examples; COMET needs it")
    add(
        "--output",
        type=Path,
        default=Path("comparison"),
        metavar="DIR",
        help="where the report goes (default: %(default)s)",
    )
    add(
        "--target-lang",
        metavar="CODE",
        help="chooses sacreBLEU's tokenizer (default: 13a, or what the references' script needs)",
    )
    add("--tokenize", choices=sorted(BLEU.TOKENIZERS), help="sacreBLEU's tokenizer, by its name")
    add(
        "--documents",
        type=Path,
        metavar="FILE",
        help="the document of each sentence, a name a line: tests draw documents as wholes",
    )
    add(
        "--train",
        type=Path,
        metavar="FILE",
        help="target side of the training data: accuracy of words by their frequency in it",
    )
    add(
        "--segment-scores",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="scores of one's own, a number a line, higher is better; once for each system, in order",
    )
    add_comet_option(out)
    add("--no-ter", dest="ter", action="store_false", help="leave out TER, which takes longest")
    add("--resamples", type=int, default=1000, help="of the bootstrap (default: %(default)s)")
    add(
        "--trials",
        type=int,
        default=10000,
        help="of the approximate randomisation (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of both (default: %(default)s)")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Read and check, compute, write."""
    args = parser().parse_args(argv)
    with one_line_errors():
        for option in ("resamples", "trials"):
            if getattr(args, option) < 100:
                raise UserError(f"--{option}: expected at least 100, found {getattr(args, option)}")
        if args.comet is not None and args.src is None:
            raise UserError("--comet: expected --src, which COMET reads too, found none")
        corpus = load_corpus(
            named_paths(args.systems),
            args.ref,
            source=args.src,
            documents=args.documents,
            segment_scores=args.segment_scores,
            target_lang=args.target_lang,
            tokenize=args.tokenize,
        )
        check_output(args.output)
        texts = cut(corpus)
        frequency = None
        if args.train is not None:
            frequency = word_frequency(each_line(args.train), corpus.tokenizer.name, texts)
        extra: dict[str, Mapping[str, Floats]] = {}
        if corpus.segment_scores:
            extra["segment score"] = corpus.segment_scores
        if args.comet is not None:
            extra["COMET"] = comet_scores(corpus, args.comet)
        measures = measure_systems(corpus, extra, args.ter)
        results = Results(
            corpus,
            texts,
            measures,
            compare_systems(corpus, measures, args.resamples, args.trials, args.seed),
            frequency,
            args.resamples,
            args.trials,
            args.seed,
        )
        replace_report(args.output, lambda folder: write_report(results, folder))
        print(findings(results))
        print(f"report: {args.output / 'report.html'}")


def comet_scores(corpus: Corpus, path: Path) -> dict[str, Floats]:
    """COMET of each sentence, in hundredths, by system."""
    model = load_comet(path)
    assert corpus.sources is not None
    return {
        system: sentence_scores(model, corpus.sources, lines, corpus.references[0])
        for system, lines in progress(corpus.systems.items(), desc="COMET")
    }


def word_frequency(lines: Iterable[str], tokenizer: str, texts: CutTexts) -> Counter[str]:
    """How often each word of the references and systems is in a text."""
    split = splitter(tokenizer)
    sides = (texts.reference, *texts.systems.values())
    wanted = {word for side in sides for sentence in side for word in sentence}
    counts: Counter[str] = Counter()
    for line in progress(lines, desc="count words", unit="line"):
        counts.update(filter(wanted.__contains__, split(line)))
    return counts


if __name__ == "__main__":
    main()
