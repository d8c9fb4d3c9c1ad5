"""What the commands of this project have in common: lists in options, progress, suggested commands."""

import shlex
import sys
from typing import Any

from tqdm import tqdm

from analysis.runs.errors import UserError

#: Seconds between two lines of progress in a log.
LOG_INTERVAL = 60.0


def split_list(value: str, option: str, separator: str = ",") -> list[str]:
    """The items of an option that takes several; blanks around them do not count.

    Raises
    ------
    UserError
        An empty item, or one given twice.
    """
    items = [item.strip() for item in value.split(separator)]
    repeated = next((item for item in items if items.count(item) > 1), None)
    if not all(items) or repeated:
        what = f"{repeated!r} twice" if repeated else f"an empty one in {value!r}"
        raise UserError(
            f"{option}: expected different items joined with {separator!r}, found {what}"
        )
    return items


def suggested(*words: object) -> str:
    """A command to copy into a shell: every word quoted where it must be."""
    return shlex.join(map(str, words))


class _LogStream:
    """Standard error with the progress of a bar as lines, for a log."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(iterable: Any = None, **options: Any) -> Any:
    """tqdm's bar on a terminal; elsewhere a line a minute, so that a log can be read.

    ``options`` are tqdm's: ``desc``, ``unit``, ``total`` and the like.
    """
    if not sys.stderr.isatty():
        interval = dict.fromkeys(("mininterval", "maxinterval", "delay"), LOG_INTERVAL)
        options = {"file": _LogStream(), "ncols": 0, **interval, **options}
    return tqdm(iterable, **options)


def warn(message: str) -> None:
    """Tell the user something in one line on standard error."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
