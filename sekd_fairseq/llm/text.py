"""Text to a language model's symbols and back, for fairseq's commands, as its data have them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.llm.prompts import Prompts
from sekd_fairseq.llm.tokenizer import load_tokenizer
from sekd_fairseq.llm.vocabulary import NEW_ROW, TOKENIZER, UNK, Vocabulary

#: What fairseq writes for the unknown symbol: of a translation, a target, and both where BLEU is computed.
UNKNOWN = {"<unk>", "<<unk>>", "UNKNOWNTOKENINHYP", "UNKNOWNTOKENINREF"}


class LanguageModelText:
    """Sentences to the prompts of a data directory, and its symbols to text.

    Parameters
    ----------
    directory
        A data directory of ``prepare_llm_data``.
    dictionary
        Its dictionary.
    """

    def __init__(self, directory: Path, dictionary: Any) -> None:
        self._dictionary = dictionary
        self._vocabulary = Vocabulary.load(directory, dictionary.symbols)
        if self._vocabulary.prompt is None:
            raise UserError(f"{directory}: expected data made of text, found none that says how")
        folder = directory / TOKENIZER
        if not folder.is_dir():
            raise UserError(
                f"{folder}: expected the tokenizer that the data were made with, found none; restore it, or "
                "make the data again with python -m sekd_fairseq.prepare_llm_data"
            )
        self._tokenizer = load_tokenizer(str(folder))
        self._prompts = Prompts(self._vocabulary.prompt, self._tokenizer)

    def source(self, sentence: str) -> Tensor:
        """A sentence as the data have sources: its prompt, and the end that closes it; int64."""
        tokens = self._prompts.tokens(sentence)
        symbols = self._vocabulary.symbols(tokens, self._tokenizer)
        return torch.tensor([*symbols, self._dictionary.eos()])

    def encode(self, text: str) -> str:
        """A piece of a translation to symbols, separated by spaces."""
        symbols = self._vocabulary.symbols(self._tokenizer.encode(text), self._tokenizer)
        return " ".join(self._dictionary[symbol] for symbol in symbols)

    @one_line_errors()  # fairseq's commands call it
    def decode(self, symbols: str) -> str:
        """A translation's symbols to its text, which is one line."""
        return one_line(self._tokenizer.decode(self._until_end(self._tokens(symbols))))

    def translation(self, symbols: str) -> str:
        """The symbols of the translation alone in what a model wrote: those of :meth:`decode`'s text."""
        every = self._tokens(symbols)
        tokens = self._until_end(every)
        text = self._tokenizer.decode(tokens)
        line = one_line(text)
        if line == text and tokens == every:
            return symbols
        if line != text:
            tokens = self._line(tokens, line)
        found = self._vocabulary.symbols(tokens, self._tokenizer)
        return " ".join(self._dictionary[symbol] for symbol in found)

    def _line(self, tokens: list[int], line: str) -> list[int]:
        """Of tokens those of their first line that is not empty, whose text is ``line`` (but for a space
        at its start, which some tokenizers leave out where a text begins)."""

        def text(some: list[int]) -> str:
            return self._tokenizer.decode(some).lstrip(" ")

        line = line.lstrip(" ")
        start = next((i for i in range(len(tokens)) if text(tokens[: i + 1]).strip("\n")), 0)
        kept = tokens[start:]
        while kept and "\n" in text(kept):
            kept = kept[:-1]
        rest = line[len(text(kept)) :]  # of a token that has more than the line end, ".\n" say
        kept = kept + (self._tokenizer.encode(rest) if rest else [])
        return kept if text(kept) == line else self._tokenizer.encode(line)

    def _tokens(self, symbols: str) -> list[int]:
        rows = self._vocabulary.rows
        found = []
        for symbol in symbols.split():
            place = self._dictionary.index(symbol)
            # fairseq adds the symbols that --remove-bpe makes to its dictionary.
            if place >= len(rows) or (place == UNK and symbol not in UNKNOWN):
                raise UserError(
                    f"expected the data's symbols, found {symbol!r}; leave out --remove-bpe "
                    "(--eval-bleu-remove-bpe): a language model's data know their text"
                )
            if place >= self._dictionary.nspecial and rows[place] != NEW_ROW:
                found.append(rows[place])
        return found

    def _until_end(self, tokens: list[int]) -> list[int]:
        """Tokens before the tokenizer's own end: a model may end as it is used to."""
        ends = self._tokenizer.specials[2]
        return tokens[: tokens.index(ends)] if ends in tokens else tokens


def one_line(text: str) -> str:
    """A translation out of what a model wrote: what a base model goes on to write after a few-shot
    prompt's translation (the next example) does not belong to it."""
    return text.lstrip("\n").split("\n", 1)[0]
