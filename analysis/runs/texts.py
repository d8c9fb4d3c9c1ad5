"""Reading text, one sentence a line, for everything in this project that reads any."""

import gzip
import zlib
from pathlib import Path

from analysis.runs.errors import UserError

BYTE_ORDER_MARK = "\ufeff"


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, as they are, without their ends.

    A line feed ends a line, with or without the carriage return of Windows before it, and nothing else
    does: ``str.splitlines`` and Python's text mode also cut at a carriage return, U+0085, U+2028 and the
    like, which stand within sentences of crawled text, and files aligned by line would no longer be. A
    byte order mark is no part of the text; it begins the file, or a later line where files with one were
    joined. ``FILE.gz`` is read where it is named, or where there is no ``FILE``.

    Raises
    ------
    UserError
        The file cannot be read, or a line is not UTF-8.
    """
    packed = path if path.suffix == ".gz" else path.with_name(f"{path.name}.gz")
    try:
        if packed == path or (packed.exists() and not path.exists()):
            content = gzip.decompress(packed.read_bytes())
        else:
            content = path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: expected a text file, found none that can be read ({error}); check the path"
        ) from error
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [_decode(line, path, number) for number, line in enumerate(lines, start=1)]


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.removesuffix(b"\r").decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}: expected UTF-8, found the byte 0x{line[error.start]:02x} at "
            f"column {error.start + 1}; convert the file, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error
