"""Parallel text from the user interface translations of Home Assistant.

The ``homeassistant`` wheel carries one JSON file a component and language
(``homeassistant/components/*/translations/de.json``). Two languages are joined on the component
and the key path of each string. Labels of one to three words ("Battery level") are left out, which
leaves about 9,700 English-German pairs of nine words, half of them full sentences.
The text is under the Apache-2.0 licence of Home Assistant. It is read here as data: nothing of
the package is installed or run.

    python scripts/data/homeassistant_corpus.py --source-lang en --target-lang de --output corpus/text

writes ``corpus/text.en`` and ``corpus/text.de``, one string a line, aligned by line.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSION = "2026.2.3"
_TRANSLATION = re.compile(r"homeassistant/components/([^/]+)/translations/([^/]+)\.json")
_URL_ONLY = re.compile(r"(?:https?://|www\.)\S+")
_PLACEHOLDER = re.compile(r"[{}]")


class CorpusError(Exception):
    """Input that this script cannot use; the message is one line for the user."""


def flatten(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (key path, string) for every string below a JSON node."""
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from flatten(value, (*path, key))


def read_language(wheel: zipfile.ZipFile, language: str) -> dict[tuple[str, ...], str]:
    """Return all strings of one language, by component and key path, white space collapsed."""
    strings: dict[tuple[str, ...], str] = {}
    # Sorted, so that the corpus does not depend on the order of files in the archive.
    for name in sorted(wheel.namelist()):
        match = _TRANSLATION.fullmatch(name)
        if match and match[2] == language:
            for path, text in flatten(json.loads(wheel.read(name)), (match[1],)):
                strings[path] = " ".join(text.split())
    return strings


def is_usable(source: str, target: str, min_words: int = 1) -> bool:
    """Tell whether a pair teaches translation: text on both sides, translated, no placeholder.

    ``min_words`` is asked of the longer side, because Chinese has no spaces to count by.
    """
    if not source or not target or source == target:
        return False
    if max(len(source.split()), len(target.split())) < min_words:
        return False
    return not any(
        _PLACEHOLDER.search(text) or _URL_ONLY.fullmatch(text) or not re.search(r"\w", text)
        for text in (source, target)
    )


def parallel_strings(
    wheel: Path, source_lang: str, target_lang: str, min_words: int = 1
) -> list[tuple[str, str]]:
    """Return the usable pairs of a wheel without repetitions, in a fixed order.

    Raises
    ------
    CorpusError
        The file is no wheel of Home Assistant, or it has no text in one of the languages.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            sides = [read_language(archive, language) for language in (source_lang, target_lang)]
            known = {m[2] for m in map(_TRANSLATION.fullmatch, archive.namelist()) if m}
    except (OSError, zipfile.BadZipFile) as error:
        raise CorpusError(
            f"{wheel}: expected a homeassistant wheel, found a file that cannot be read as one "
            f"({error}); delete it and start again"
        ) from error
    for language, side in zip((source_lang, target_lang), sides, strict=True):
        if not side:
            raise CorpusError(
                f"{wheel}: no text in language '{language}'; choose from: "
                f"{' '.join(sorted(known)) or 'none (not a homeassistant wheel)'}"
            )
    source, target = sides
    joined = ((text, target[path]) for path, text in source.items() if path in target)
    return list(dict.fromkeys(pair for pair in joined if is_usable(*pair, min_words)))


def download_wheel(version: str, directory: Path) -> Path:
    """Fetch the wheel with pip into a directory, or return the one that lies there already.

    The wheel asks for a newer Python than this project; ``--python-version`` makes pip take it
    all the same, which is safe because it is never installed.
    """
    wheel = directory / f"homeassistant-{version}-py3-none-any.whl"
    if wheel.exists():
        return wheel
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as partial:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary=:all:"]
        command += ["--python-version", "3.14", "--dest", partial, f"homeassistant=={version}"]
        if subprocess.run(command).returncode:
            raise CorpusError(
                f"pip could not download homeassistant=={version} (its message is above); check "
                "the network, or pass a copy of the wheel with --wheel"
            )
        # Renamed when whole, so that a download that was cut off is never taken for a wheel.
        os.replace(Path(partial) / wheel.name, wheel)
    return wheel


def write_pairs(pairs: list[tuple[str, str]], output: Path, languages: tuple[str, str]) -> None:
    """Write OUTPUT.SOURCE and OUTPUT.TARGET, each renamed into place when complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for language, lines in zip(languages, zip(*pairs, strict=True), strict=True):
        path = Path(f"{output}.{language}")
        partial = Path(f"{path}.partial")
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(partial, path)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        description="Parallel text from the translations in the homeassistant wheel."
    )
    parser.add_argument("--source-lang", required=True, help="for example en")
    parser.add_argument("--target-lang", required=True, help="for example de, cs, zh-Hans")
    parser.add_argument(
        "--output", required=True, type=Path, help="prefix of the two files; .LANGUAGE is added"
    )
    parser.add_argument("--wheel", type=Path, help="a copy of the wheel (default: download it)")
    parser.add_argument("--version", default=VERSION, help="release to download (%(default)s)")
    parser.add_argument(
        "--min-words",
        type=int,
        default=4,
        help="leave out pairs with fewer words on both sides (%(default)s)",
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="write the first N pairs only; 0 is all (%(default)s)"
    )
    parser.add_argument(
        "--summary", type=Path, help="write version and number of pairs to this JSON file, last"
    )
    args = parser.parse_args(arguments)
    try:
        wheel = args.wheel or download_wheel(args.version, args.output.parent)
        pairs = parallel_strings(wheel, args.source_lang, args.target_lang, args.min_words)
        if not pairs:
            raise CorpusError(
                f"{wheel}: no string is translated between '{args.source_lang}' and "
                f"'{args.target_lang}'; choose two different languages"
            )
        pairs = pairs[: args.limit or None]
        write_pairs(pairs, args.output, (args.source_lang, args.target_lang))
        if args.summary:
            args.summary.write_text(json.dumps({"wheel": wheel.name, "pairs": len(pairs)}) + "\n")
    except CorpusError as error:
        sys.exit(f"error: {error}")
    print(f"{len(pairs)} pairs: {args.output}.{{{args.source_lang},{args.target_lang}}}")


if __name__ == "__main__":
    main()
