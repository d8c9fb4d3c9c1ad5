"""Print the targets that benchmarks wrote, one a line, and how many were met.

python scripts/benchmarks/show_targets.py results/bench_*.json
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Print the files that the command line names."""
    met = total = 0
    for path in map(Path, sys.argv[1:]):
        if not path.is_file():
            continue  # nothing was measured in time
        print(path.stem)
        for entry in json.loads(path.read_text(encoding="utf-8")):
            value = "-" if entry["value"] is None else f"{entry['value']:.3f}"
            word = "ok" if entry["met"] else "MISSED"
            print(f"  {word:6} {value:>8} (limit {entry['limit']})  {entry['target']}")
            met, total = met + entry["met"], total + 1
    print(f"{met} of {total} targets met")


if __name__ == "__main__":
    main()
