"""The scripts are run, or imported, from their folders."""

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path[:0] = [str(SCRIPTS / folder) for folder in ("pipeline", "benchmarks", "data")]
