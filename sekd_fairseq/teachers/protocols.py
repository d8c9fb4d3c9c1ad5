"""The ways in which servers give log-probabilities of a prompt.

Three ways to ask for them are known (:data:`PROTOCOLS`), and the first that a server answers is used:

``vllm``
    ``prompt_logprobs`` of vLLM's OpenAI-compatible completions.  Token ids go in and come out.
``sglang``
    SGLang's own ``/generate`` with ``return_logprob``.  Token ids go in and come out.
``echo``
    OpenAI's legacy completions with ``echo`` and ``logprobs``, as of llama-cpp-python's server.  Text
    goes in and the text of tokens comes out, so every text is first tokenized by the server and its
    ids compared; of two tokens with one text neither can be told, and both count as unknown (a byte's
    own piece gives way to the character's).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

#: Log-probabilities of known tokens by id, of each position; none where nothing was predicted.
Positions = list[dict[int, float] | None]


class BadAnswer(ValueError):
    """An answer that is not what was asked for; says what was expected and found."""


class TextOf(Protocol):
    """What is needed of a tokenizer (:class:`~sekd_fairseq.llm.tokenizer.Tokenizer`)."""

    pieces: list[str]
    begin: list[int]
    controls: dict[str, int]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""


@dataclass(frozen=True)
class Request:
    """What is sent: a path, and the body as JSON."""

    path: str
    body: dict[str, Any]


class VLLM:
    """vLLM's ``prompt_logprobs``."""

    name = "vllm"

    def __init__(self, tokenizer: TextOf) -> None:
        pass

    def request(self, tokens: Sequence[int], best: int, model: str) -> Request:
        """Ask for the ``best`` tokens at each position of ``tokens``."""
        body = {"prompt": list(tokens), "prompt_logprobs": best, "max_tokens": 1, "temperature": 0}
        return Request("/v1/completions", {"model": model, **body})

    def positions(self, answer: dict[str, Any], tokens: Sequence[int]) -> Positions:
        """What an answer says of each position."""
        found = answer["choices"][0]["prompt_logprobs"]
        expect(found is not None, "prompt_logprobs", "none")
        return [
            None
            if entry is None
            else {int(token): value["logprob"] for token, value in entry.items()}
            for entry in found
        ]

    def texts(self, answer: dict[str, Any], tokens: Sequence[int]) -> list[str | None]:
        """The text that the server has for each of ``tokens``; None where it says none."""
        found = answer["choices"][0]["prompt_logprobs"]
        entries = zip(tokens, found, strict=True)
        return [entry and entry[str(token)].get("decoded_token") for token, entry in entries]

    def count(self, answer: dict[str, Any]) -> int:
        """The most tokens that an answer has at a position."""
        return max(len(entry or ()) for entry in answer["choices"][0]["prompt_logprobs"])


class SGLang:
    """SGLang's ``/generate``."""

    name = "sglang"

    def __init__(self, tokenizer: TextOf) -> None:
        pass

    def request(self, tokens: Sequence[int], best: int, model: str) -> Request:
        """Ask for the ``best`` tokens at each position of ``tokens``."""
        return Request(
            "/generate",
            {
                "input_ids": list(tokens),
                "sampling_params": {"max_new_tokens": 1, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": best,
                "return_text_in_logprobs": True,
            },
        )

    def positions(self, answer: dict[str, Any], tokens: Sequence[int]) -> Positions:
        """What an answer says of each position."""
        meta = answer["meta_info"]
        chosen, others = meta["input_token_logprobs"], meta["input_top_logprobs"]
        read = [token for _, token, *_ in chosen]
        expect(read == list(tokens), "the prompt's token ids", first_difference(tokens, read))
        found: Positions = []
        for (value, token, *_), top in zip(chosen, others, strict=True):
            known = {i: log_p for log_p, i, *_ in top or []}
            found.append(None if value is None else {**known, token: value})
        return found

    def texts(self, answer: dict[str, Any], tokens: Sequence[int]) -> list[str | None]:
        """The text that the server has for each of ``tokens``."""
        return [text for _, _, text in answer["meta_info"]["input_token_logprobs"]]

    def count(self, answer: dict[str, Any]) -> int:
        """The most tokens that an answer has at a position."""
        return max(len(top or ()) for top in answer["meta_info"]["input_top_logprobs"])


class Echo:
    """OpenAI's legacy completions, which echo the prompt."""

    name = "echo"

    def __init__(self, tokenizer: TextOf) -> None:
        self.tokenizer = tokenizer
        spelled = [shown(piece) for piece in tokenizer.pieces]
        controls = set(tokenizer.controls.values())
        plain = [i for i, text in enumerate(spelled) if text and i not in controls]
        # A byte's own piece and a character's: what is meant is the character.
        plain = [i for i in plain if not is_byte(tokenizer.pieces[i])]
        count = Counter(spelled[i] for i in plain)
        self._token_of = {spelled[i]: i for i in plain if count[spelled[i]] == 1}

    def request(self, tokens: Sequence[int], best: int, model: str) -> Request:
        """Ask for the ``best`` tokens at each position of the text of ``tokens``."""
        body = {"prompt": self.text(tokens), "echo": True, "logprobs": best, "max_tokens": 1}
        return Request("/v1/completions", {"model": model, **body, "temperature": 0})

    def text(self, tokens: Sequence[int]) -> str:
        """Their text without what the server puts before it."""
        return self.tokenizer.decode(self.own(tokens))

    def own(self, tokens: Sequence[int]) -> list[int]:
        """The tokens without those that the server puts before a text."""
        begin = self.tokenizer.begin
        return list(tokens[len(begin) :] if list(tokens[: len(begin)]) == begin else tokens)

    def positions(self, answer: dict[str, Any], tokens: Sequence[int]) -> Positions:
        """What an answer says of each position."""
        logprobs = answer["choices"][0]["logprobs"]
        expect(logprobs is not None, "logprobs", "none")
        own = self.own(tokens)
        generated = answer["usage"]["completion_tokens"]
        count = len(logprobs["tokens"]) - generated
        expect(count == len(own), f"{len(own)} tokens of the prompt", count)
        found: Positions = [None] * (len(tokens) - len(own))
        for token, gold, top in zip(
            own, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=False
        ):
            if gold is None:
                found.append(None)
                continue
            known = {
                self._token_of[text]: log_p for text, log_p in top.items() if text in self._token_of
            }
            found.append({**known, token: gold})
        return found

    def texts(self, answer: dict[str, Any], tokens: Sequence[int]) -> list[str | None]:
        """The text that the server has for each of ``tokens``."""
        own = self.own(tokens)
        said = answer["choices"][0]["logprobs"]["tokens"][: len(own)]
        return [None] * (len(tokens) - len(own)) + said

    def count(self, answer: dict[str, Any]) -> int:
        """The most tokens that an answer has at a position; those of one text, as halves of characters,
        count once."""
        return max(len(top or ()) for top in answer["choices"][0]["logprobs"]["top_logprobs"])


Way = VLLM | SGLang | Echo
PROTOCOLS: tuple[type[Way], ...] = (VLLM, SGLang, Echo)
#: Paths that tokenize a text, with the field that the text goes in.
TOKENIZERS = (("/tokenize", "prompt"), ("/extras/tokenize", "input"))


def shown(piece: str) -> str:
    """A piece as a server decodes it: SentencePiece's mark of a space is one."""
    return piece.replace("▁", " ")


def is_byte(piece: str) -> bool:
    """Whether a SentencePiece piece stands for a byte."""
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def expect(met: bool, expected: str, found: object) -> None:
    """Refuse an answer in which something is not as expected."""
    if not met:
        raise BadAnswer(f"expected {expected}, found {found}")


def first_difference(expected: Sequence[int], found: Sequence[int]) -> str:
    """Where two lists of tokens part, in words; empty where they are alike."""
    if len(expected) != len(found):
        return f"{len(found)} tokens for {len(expected)}"
    pairs = enumerate(zip(expected, found, strict=True))
    return next((f"{two} for {one} at place {i}" for i, (one, two) in pairs if one != two), "")
