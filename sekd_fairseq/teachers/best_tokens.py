"""Teachers that tell the best tokens at each position of a text, and no more."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq import tasks

from sekd_fairseq.checkpoints import language_model_config
from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.prompt_encoder import prompt_mask
from sekd_fairseq.llm.vocabulary import NEW_ROW, Vocabulary
from sekd_fairseq.teacher_cache.writer import SentenceColumns
from sekd_fairseq.teachers.truncation import Truncation, best_columns


class BestTokensEngine(ABC):
    """A language model that reads the data's own tokens, prompt and translation together.

    The entropy takes what is not told as one event, a lower bound, and tokens outside the dictionary
    belong to the outside mass.
    """

    identity: dict[str, Any]
    batch_tokens: int
    outside = None

    def __init__(self, data: str, engine: str) -> None:
        self.task = tasks.setup_task(language_model_config(data).task)
        self.folder = Path(data.split(":")[0])
        symbols = self.task.target_dictionary.symbols
        self.rows = Vocabulary.load(self.folder, symbols).rows
        self._symbol = {row: i for i, row in enumerate(self.rows) if row != NEW_ROW}
        if self.rows[self.task.target_dictionary.eos()] == NEW_ROW:
            raise UserError(
                f"--engine {engine}: expected data whose translations end with a token of the model, "
                f"found a tokenizer without an end ({data}); give python -m "
                "sekd_fairseq.prepare_llm_data --end"
            )

    @abstractmethod
    def positions(self) -> float:
        """Tokens that the model reads, prompt and translation together."""

    @abstractmethod
    def best(self, texts: Sequence[tuple[list[int], int]]) -> list[Sequence[dict[int, float]]]:
        """Known log-probabilities by token at the last positions of some texts.

        Parameters
        ----------
        texts
            The tokens of each, as the model's tokenizer numbers them, and how many of the last are
            wanted.
        """

    def limits(self) -> list[tuple[float, ...]]:
        """The longest source, target, and both together that it reads."""
        # Both together without the end of the source, and a server generates one token after them.
        positions = self.positions()
        return [(positions, positions, positions)]

    def sentences(
        self, sample: dict[str, Any], truncation: Truncation, temperature: float
    ) -> dict[int, SentenceColumns]:
        """Truncated distributions of a batch, by sentence id."""
        pad, eos = self.task.target_dictionary.pad(), self.task.target_dictionary.eos()
        targets = [row[row.ne(pad)].tolist() for row in sample["target"]]
        sources = sample["net_input"]["src_tokens"]
        masks = prompt_mask(sources, pad, eos)
        texts = []
        for source, mask, target in zip(sources, masks, targets, strict=True):
            read = source[mask].tolist() + target
            texts.append(([self.rows[symbol] for symbol in read], len(target)))
        found = zip(sample["id"].tolist(), self.best(texts), targets, strict=True)
        return {
            sentence: best_columns(self._by_symbol(known), target, truncation)
            for sentence, known, target in found
        }

    @abstractmethod
    def written(self) -> None:
        """Called when all that :meth:`sentences` has given is in a shard."""

    def _by_symbol(self, known: Sequence[dict[int, float]]) -> list[dict[int, float]]:
        """The same by symbol of the dictionary, without tokens that have none."""
        return [
            {self._symbol[row]: value for row, value in one.items() if row in self._symbol}
            for one in known
        ]
