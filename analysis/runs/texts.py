"""Text of one sentence per line, for everything in this project that reads any, and a run's translations."""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from analysis.runs.errors import UserError
from analysis.runs.files import atomic_write, hash_lines
from analysis.runs.run_record import LINES, read_scores

BYTE_ORDER_MARK = "\ufeff"


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, as they are, without their ends: :func:`each_line`, all at once."""
    return list(each_line(path))


def each_line(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, as they are, without their ends, one after the other.

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
    zipped = packed == path or (packed.exists() and not path.exists())
    try:
        with gzip.open(packed) if zipped else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield _decode(line.removesuffix(b"\n"), path, number)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: expected a text file, found none that can be read ({error}); check the path"
        ) from error


def read_references(path: Path) -> list[str]:
    """The lines of a file of references.

    Raises
    ------
    UserError
        As :func:`read_lines`; or there is nothing in any line that a translation could be compared with.
    """
    lines = read_lines(path)
    if not any(map(str.strip, lines)):
        raise UserError(f"{path}: expected references, one a line, found {len(lines)} empty lines")
    return lines


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.removesuffix(b"\r").decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}: expected UTF-8, found the byte 0x{line[error.start]:02x} at "
            f"column {error.start + 1}; convert the file, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error


@dataclass(frozen=True)
class Texts:
    """Translations with their references and sources, line by line, each of equal length.

    Attributes
    ----------
    sealed : whether ``scores.json`` holds their checksums
    lenpen : the length penalty of the search, where ``scores.json`` says it
    """

    hypotheses: list[str]
    references: list[str]
    sources: list[str] | None
    sealed: bool = False
    lenpen: float | None = None

    @property
    def digest(self) -> str:
        """Identifies the references."""
        return hashlib.sha256("\n".join(self.references).encode()).hexdigest()


def read_texts(run: Path, subset: str) -> Texts | None:
    """Translations, references and (where there are any) sources in a run
    directory; None without translations.

    Raises
    ------
    UserError
        References are missing, the files have different numbers of lines or none, or they are not those
        that were scored: ``scores.json`` holds a checksum of each.
    """
    folder = run / "hyps"
    path = folder / f"{subset}.txt"
    if not path.exists():
        return None
    scores, sealed = read_scores(run)
    own = scores.get(subset, {})
    checksums = own.get(LINES, {}) if sealed else {}
    lenpen = float(own["lenpen"]) if isinstance(own.get("lenpen"), (int, float)) else None
    lines: dict[str, list[str]] = {}
    for suffix in ("", ".ref", ".src"):
        file = folder / f"{subset}{suffix}.txt"
        if suffix == ".src" and not file.exists():
            continue
        lines[suffix] = read_lines(file)
        if not lines[suffix]:
            raise UserError(f"{file}: expected a sentence a line, found an empty file")
        if len(lines[suffix]) != len(lines[""]):
            raise UserError(
                f"{file}: expected {len(lines[''])} lines as in {path.name}, found "
                f"{len(lines[suffix])}; evaluate the run again"
            )
        if checksums and hash_lines(lines[suffix]) != checksums.get(file.name):
            raise UserError(
                f"{file}: the lines do not match their checksum in scores.json, so they were edited "
                "or damaged; evaluate the run again"
            )
    return Texts(lines[""], lines[".ref"], lines.get(".src"), bool(checksums), lenpen)


def write_texts(run: Path, subset: str, texts: Texts) -> dict[str, str]:
    """Write translations, references and sources into a run directory.

    Returns the checksums for ``scores.json``, by file name.
    """
    folder = run / "hyps"
    folder.mkdir(parents=True, exist_ok=True)
    checksums = {}
    for suffix, lines in (
        ("", texts.hypotheses),
        (".ref", texts.references),
        (".src", texts.sources),
    ):
        if lines is not None:
            path = folder / f"{subset}{suffix}.txt"
            with atomic_write(path) as stream:
                stream.write("".join(f"{line}\n" for line in lines).encode())
            checksums[path.name] = hash_lines(read_lines(path))
    return checksums
