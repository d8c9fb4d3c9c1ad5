"""fairseq-train, which does not go on with a run under other settings than it was begun with, nor with
one that another process trains.

    python scripts/pipeline/train.py RUN INPUT... -- ARGUMENTS OF FAIRSEQ-TRAIN

fairseq goes on from ``RUN/checkpoints/checkpoint_last.pt`` whatever the options and the data are now. A
run that has ended would then pass for one of the new settings, and one that was killed would be a
mixture. The settings of a run's start are kept in ``RUN/settings.json``: its arguments, and a hash of each
INPUT, a small file that changes with what it stands for: ``data.json``, the marks of the teacher's cache
or of a student to start from. Without a checkpoint they are written anew.
"""

import argparse
import difflib
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.runs.files import DamagedFile, read_json, sealed_json
from sekd_fairseq.errors import one_line_errors
from sekd_fairseq.run_lock import held


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "inputs", type=Path, nargs="+", metavar="INPUT", help="what it is made from"
    )
    # By hand: argparse would give words after -- to INPUT.
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:end])
    arguments = sys.argv[end + 1 :]
    with one_line_errors(), held(args.run):
        check_settings(args.run, args.inputs, arguments)
        os.execv(sys.executable, [sys.executable, "-m", "fairseq_cli.train", *arguments])


def check_settings(run: Path, inputs: Sequence[Path], arguments: Sequence[str]) -> None:
    """Write the settings of a run that begins; exit where one that is under way had others."""
    hashes = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs}
    # Where it runs is no setting: what a CPU began a GPU may end.
    settings = {"inputs": hashes, "arguments": [word for word in arguments if word != "--cpu"]}
    path = run / "settings.json"
    if path.exists() and (run / "checkpoints" / "checkpoint_last.pt").exists():
        try:
            before, _ = read_json(path)
        except DamagedFile as error:
            sys.exit(f"error: {error}; delete the folder to train it anew")
        if before != settings:
            sys.exit(
                f"error: {run}: begun with other settings ({difference(before, settings)}); "
                "delete the folder to train it anew, or give the configuration another name"
            )
        return
    path.write_bytes(sealed_json(settings))


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What is other now, in a few words."""
    known = before.get("inputs", {})  # an earlier version kept them otherwise
    parts = [
        f"{path} has changed" for path, value in after["inputs"].items() if known.get(path) != value
    ]
    words = [side["arguments"] for side in (before, after)]
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind != "equal":
            # An option's name is the same where only its value differs.
            start = 1 if a and words[0][a - 1].startswith("--") and kind == "replace" else 0
            old, new = words[0][a - start : b], words[1][c - start : d]
            parts.append(f"{' '.join(old) or 'without'} is now {' '.join(new) or 'left out'}")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
