"""fairseq-train, which does not go on with a run that was begun with other data, another teacher or another
student to start from, nor with one that another process trains.

    python scripts/pipeline/train.py RUN INPUT... -- ARGUMENTS OF FAIRSEQ-TRAIN

fairseq goes on from ``RUN/checkpoints/checkpoint_last.pt`` whatever these are now. A run that has ended
would then pass for one of the new ones, and one that was killed would be a mixture. (Other options the
plugin refuses, :mod:`sekd_fairseq.settings`.) What a run was begun with is kept in ``RUN/settings.json``: a
hash of each INPUT, a small file that changes with what it stands for: ``data.json``, the marks of the
teacher's cache or of a student to start from. Without a checkpoint it is written anew.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

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
        check_inputs(args.run, args.inputs)
        os.execv(sys.executable, [sys.executable, "-m", "fairseq_cli.train", *arguments])


def check_inputs(run: Path, inputs: Sequence[Path]) -> None:
    """Write what a run that begins is made from; exit where one that is under way was made from other."""
    hashes = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs}
    path = run / "settings.json"
    if path.exists() and (run / "checkpoints" / "checkpoint_last.pt").exists():
        try:
            settings, _ = read_json(path)
        except DamagedFile as error:
            sys.exit(f"error: {error}; delete the folder to train it anew")
        before = settings.get("inputs", {})
        other = [name for name in {**before, **hashes} if before.get(name) != hashes.get(name)]
        if other:
            sys.exit(
                f"error: {run}: begun with other inputs (other now: {', '.join(other)}); delete the folder "
                "to train it anew, or give the configuration another name"
            )
        return
    path.write_bytes(sealed_json({"inputs": hashes}))


if __name__ == "__main__":
    main()
