"""Prompt templates: what the language model reads before the translation."""

import string
from collections.abc import Sequence
from pathlib import Path

from analysis.languages import language_name
from sekd_fairseq.errors import UserError

DEFAULT = "Translate from {src_lang} to {tgt_lang}.\n{src_lang}: {src}\n{tgt_lang}:\n"
#: What follows the translation of an example in a few-shot prompt.
SEPARATOR = "\n\n"
FIELDS = {"src", "src_lang", "tgt_lang"}


class Template:
    """A prompt with the fields ``{src}``, ``{src_lang}``, ``{tgt_lang}``.

    With k-shot examples the prompt begins with one filled template and its translation for each,
    so it should end where a translation may begin.

    Raises
    ------
    UserError
        A template without ``{src}``, or with another field.
    """

    def __init__(self, text: str, source_lang: str, target_lang: str) -> None:
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
        except ValueError as error:
            raise UserError(f"prompt template: {error}; write '{{{{' for a brace") from error
        if "src" not in fields or not fields <= FIELDS:
            raise UserError(
                "prompt template: expected the fields {src} and, if wanted, {src_lang} and "
                f"{{tgt_lang}}, found {sorted(fields) or 'none'}"
            )
        self.text = text
        names = [language_name(language) for language in (source_lang, target_lang)]
        self._languages = dict(zip(("src_lang", "tgt_lang"), names, strict=True))

    def prompt(self, source: str, examples: Sequence[tuple[str, str]] = ()) -> str:
        """What the model reads before it translates ``source``."""
        shots = "".join(f"{self._fill(src)}{tgt}{SEPARATOR}" for src, tgt in examples)
        return shots + self._fill(source)

    def _fill(self, source: str) -> str:
        return self.text.format(src=source, **self._languages)


def read_template(path: Path | None) -> str:
    """A template file's text without its last line end, or the default template."""
    if path is None:
        return DEFAULT
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a prompt template, found none ({error})") from error
