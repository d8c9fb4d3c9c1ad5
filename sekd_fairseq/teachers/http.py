"""The teacher behind a server, asked over HTTP (:mod:`sekd_fairseq.teachers.served`)."""

from collections.abc import Sequence
from pathlib import Path

from sekd_fairseq.llm.tokenizer import load_tokenizer
from sekd_fairseq.llm.vocabulary import TOKENIZER
from sekd_fairseq.teachers.answers import Answers
from sekd_fairseq.teachers.best_tokens import BestTokensEngine
from sekd_fairseq.teachers.served import Server


class HTTPEngine(BestTokensEngine):
    """A language model that a server runs: the model of the data's tokenizer.

    Parameters
    ----------
    url, best, model, parallel, timeout, retries
        As of :class:`~sekd_fairseq.teachers.served.Server`.
    data
        The data directory, made for a language model.
    answers
        The file that keeps answers until their shards are written.
    """

    def __init__(
        self,
        url: str,
        data: str,
        best: int,
        answers: Path,
        model: str | None,
        parallel: int,
        timeout: float,
        retries: int,
    ) -> None:
        super().__init__(data, "http")
        tokenizer = load_tokenizer(str(self.folder / TOKENIZER))
        self._server = Server(url, tokenizer, best, model, parallel, timeout, retries)
        self._answers = self._server.answers = Answers(answers, self._server.probe)
        self.batch_tokens = 2**11 * parallel
        self.identity = {
            "files": [self._server.model],
            "sha256": [],
            "arch": f"server, {self._server.protocol.name}",
            "probe": self._server.probe,
        }

    def positions(self) -> float:
        """Tokens that the model reads, prompt and translation together."""
        return self._server.positions

    def best(self, texts: Sequence[tuple[list[int], int]]) -> list[Sequence[dict[int, float]]]:
        """Known log-probabilities by token at the last positions of some texts."""
        return list(self._server.ask(texts))

    def written(self) -> None:
        """Delete the shard's answers: they are some 30 kB a sentence."""
        self._answers.forget_used()

    def forget(self) -> None:
        """Delete the answers: the caches have them now."""
        self._answers.forget()
