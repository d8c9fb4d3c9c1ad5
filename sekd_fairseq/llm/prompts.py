"""Prompts: what the language model reads before the translation, as text and as tokens.

:class:`Prompts` makes the tokens, for training data, caches, generation and interactive use alike.
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from analysis.runs.languages import language_name
from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.tokenizer import Mark, Tokenizer

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

    def fill(self, source: str) -> str:
        """The template with its fields."""
        return self.text.format(src=source, **self._languages)


@dataclass(frozen=True)
class PromptSettings:
    """What makes the prompts of a data directory; kept with the data.

    Attributes
    ----------
    source_lang, target_lang
        Codes of the languages.
    template
        Text of the prompt (with ``chat``, of the user's turn) with the fields of :class:`Template`.
    chat
        Whether the tokenizer's own chat template goes around it.
    shots
        Examples before it, (source, translation) each; with ``chat`` as earlier turns.
    """

    source_lang: str
    target_lang: str
    template: str = DEFAULT
    chat: bool = False
    shots: Sequence[Sequence[str]] = ()


class Prompts:
    """Tokens of prompts and translations: those that the tokenizer gives for their text.

    What the tokenizer puts before a text (a beginning token) comes first, unless the template has
    it or a chat template decides on it.

    An example shows the end of a translation as a translation ends: where the tokenizer would join its
    last characters with what follows (``.`` and a line end, in Llama 3's and Qwen's) the text is cut there.
    """

    def __init__(self, settings: PromptSettings, tokenizer: Tokenizer) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self._template = Template(settings.template, settings.source_lang, settings.target_lang)

    def tokens(self, source: str) -> list[int]:
        """What the model reads before it translates ``source``."""
        return self._encode(source)

    def translation(self, source: str, target: str) -> list[int]:
        """The tokens of a translation after the prompt of its source, without the end.

        They are those that the tokenizer gives for both together; where it joins the prompt's last
        characters and the translation's first to one token, which cannot be generated, those of
        the translation alone.
        """
        return self.continuation(source, target) or self.tokenizer.encode(target)

    def continuation(self, source: str, target: str, prompt: list[int] | None = None) -> list[int]:
        """The tokens of a translation as the tokenizer goes on after the prompt (its :meth:`tokens`, if
        they are known); none where it joins both."""
        return self._after(source, lambda mark: mark(target), prompt)

    def end(self, text: str = "") -> int | None:
        """The token that ends a translation: ``text``, if that is given.

        Otherwise the end of the assistant's turn in a chat, what follows the translation of an
        example (a line end), or the tokenizer's end, which may be missing.
        """
        if text:
            tokens = self._after_translation(text)
            if len(tokens) != 1:
                pieces = [self.tokenizer.pieces[token] for token in tokens]
                raise UserError(f"--end: expected one token, found {pieces} for {text!r}")
            return tokens[0]
        if self.settings.chat:
            turns = [*self._turns(str, "a"), {"role": "assistant", "content": "b"}]
            rest = self.tokenizer.chat(turns, answer=False).rpartition("b")[2]
            controls = set(self.tokenizer.controls.values())
            ends = [t for t in self.tokenizer.encode_filled(lambda _: rest) if t in controls]
            return ends[0] if ends else self.tokenizer.specials[2]
        if self.settings.shots:
            return self._after_translation(SEPARATOR + self._template.fill("a"))[0]
        return self.tokenizer.specials[2]

    def _encode(self, source: str, text: Callable[[Mark], str] = lambda _: "") -> list[int]:
        """Tokens of a prompt and of a text after it."""
        tokens = self._cut_off + self.tokenizer.encode_filled(
            lambda mark: self._parts(mark, source)[-1] + text(mark)
        )
        begin = self.tokenizer.begin
        has_begin = self.settings.chat or tokens[: len(begin)] == begin
        return tokens if has_begin else begin + tokens

    @cached_property
    def _cut_off(self) -> list[int]:
        """Tokens of all parts of a prompt but the last, which alone has the source."""

        def part(mark: Mark, number: int) -> str:
            return self._parts(mark, "")[number]

        fills = (partial(part, number=number) for number in range(sum(self._joined)))
        return [token for fill in fills for token in self.tokenizer.encode_filled(fill)]

    def _parts(self, mark: Mark, source: str) -> list[str]:
        """The text of a prompt, users' strings passed through ``mark``, cut where that is needed."""
        if self.settings.chat:
            return [self.tokenizer.chat(self._turns(mark, source))]
        parts = [""]
        for (src, tgt), joined in zip(self.settings.shots, self._joined, strict=True):
            parts[-1] += self._template.fill(mark(src)) + mark(tgt)
            parts += [""] * joined
            parts[-1] += SEPARATOR
        parts[-1] += self._template.fill(mark(source))
        return parts

    @cached_property
    def _joined(self) -> list[bool]:
        """Of each example, whether the tokenizer joins its translation with what follows.

        Raises
        ------
        UserError
            It does, and a text cut there would not be the same text.
        """
        if self.settings.chat:
            return []
        encode, decode = self.tokenizer.encode_filled, self.tokenizer.decode
        after = SEPARATOR + self._template.fill("a")

        def example(mark: Mark, src: str, tgt: str, rest: str) -> str:
            return self._template.fill(mark(src)) + mark(tgt) + rest

        found = []
        for src, tgt in self.settings.shots:
            alone, both = (
                encode(partial(example, src=src, tgt=tgt, rest=rest)) for rest in ("", after)
            )
            found.append(both[: len(alone)] != alone)
            if found[-1] and decode(alone + encode(lambda _: after)) != decode(both):
                raise UserError(
                    "--shots, --teacher-shots: expected a tokenizer that tells an example's translation from "
                    f"what follows it, found one that joins {tgt!r} with the next line; give --chat "
                    "(--teacher-chat), or no examples"
                )
        return found

    def _turns(self, mark: Mark, source: str) -> list[dict[str, str]]:
        """A conversation that ends with the user's request."""
        turns = []
        for src, tgt in self.settings.shots:
            turns.append({"role": "user", "content": self._template.fill(mark(src))})
            turns.append({"role": "assistant", "content": mark(tgt)})
        return [*turns, {"role": "user", "content": self._template.fill(mark(source))}]

    def _after(
        self, source: str, text: Callable[[Mark], str], prompt: list[int] | None = None
    ) -> list[int]:
        """Tokens of what follows a prompt; none where its first is joined with the prompt's last."""
        prompt = prompt or self.tokens(source)
        both = self._encode(source, text)
        return both[len(prompt) :] if both[: len(prompt)] == prompt else []

    def _after_translation(self, text: str) -> list[int]:
        """Tokens of what follows a translation, as after the first example where it is apart."""
        for source, target in [*self.settings.shots, ("a", "b")]:
            alone = self.translation(source, target)
            ended = self._after(source, lambda mark, tgt=target: mark(tgt) + text)  # type: ignore[misc]
            if ended[: len(alone)] == alone and len(ended) > len(alone):
                return ended[len(alone) :]
        return self.tokenizer.encode_filled(lambda _: text)


def read_template(path: Path | None) -> str:
    """A template file's text without its last line end, or the default template."""
    if path is None:
        return DEFAULT
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a prompt template, found none ({error})") from error
