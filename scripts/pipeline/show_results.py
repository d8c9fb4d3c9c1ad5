"""Print the result table of a report to the terminal, and where the report is.

python scripts/pipeline/show_results.py runs/demo/report
"""

import sys
from pathlib import Path

import pandas as pd


def main() -> None:
    """Print the table of the report directory that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/pipeline/show_results.py REPORT_DIRECTORY")
    report = Path(sys.argv[1])
    path = report / "tables" / "results.csv"
    if not path.is_file():
        sys.exit(f"error: {path}: expected a report's result table, found none")
    table = pd.read_csv(path)
    columns = ["direction", "method", "seed", "sentences", "BLEU", "BLEU_low", "BLEU_high", "chrF"]
    print(table[columns].round(2).to_string(index=False))
    for metric in ("BLEU", "chrF"):
        for signature in table[f"{metric}_signature"].dropna().unique():
            print(f"{metric}: {signature}")
    print(f"\nReport: {report / 'report.md'}")


if __name__ == "__main__":
    main()
