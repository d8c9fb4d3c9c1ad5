"""Prompt log-probabilities from a server, over HTTP (how it is asked: :mod:`~sekd_fairseq.teachers.protocols`).

A request that fails for a reason that may pass (a busy server, a cut answer) is sent again, with growing
pauses; answers are kept in a file until they are no longer needed, so that nothing is asked twice.
"""

import hashlib
import json
import math
import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from sekd_fairseq.errors import UserError
from sekd_fairseq.teachers.answers import Answers
from sekd_fairseq.teachers.protocols import (
    PROTOCOLS,
    TOKENIZERS,
    BadAnswer,
    Echo,
    Positions,
    Request,
    TextOf,
    Way,
    expect,
    first_difference,
)

#: Seconds before a request is sent again, doubled each time up to :data:`LONGEST_PAUSE`.
PAUSE = 0.5
LONGEST_PAUSE = 30.0
#: Statuses of a server that may be well again: timeouts, too many requests, its own failures.
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
#: Failures of its own (500) after which a server does not know a way to ask.
REFUSALS = 3


class Server:
    """A teacher behind an address.

    Parameters
    ----------
    url
        Of the server, with or without ``/v1``.
    tokenizer
        The tokenizer of the data, which must be the teacher's.
    best
        Tokens to ask for at each position.
    model
        What the server calls the teacher; needed where it serves several.
    parallel
        Requests at a time.
    timeout
        Seconds to wait for an answer.
    retries
        How often a request is sent again.

    Attributes
    ----------
    answers
        Where answers are kept, if anywhere.
    probe
        Log-probabilities of a known text, by which the teacher is known again.

    Raises
    ------
    UserError
        There is no server, it has another model or tokenizer, or does not give what is asked for.
    """

    def __init__(
        self,
        url: str,
        tokenizer: TextOf,
        best: int,
        model: str | None = None,
        parallel: int = 16,
        timeout: float = 120.0,
        retries: int = 6,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise UserError(
                f"--engine http: expected httpx, found none that imports ({error}); pip install httpx"
            ) from error
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"--url: expected http://HOST:PORT or https://..., found {url!r}")
        self._httpx = httpx
        limits = httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel)
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(timeout=timeout, limits=limits, headers=headers)
        self.tokenizer, self.best, self.parallel = tokenizer, best, parallel
        self.timeout, self.retries = timeout, retries
        self.answers: Answers | None = None
        self._stopped = threading.Event()
        #: What answers call the model, once one has said it.
        self._says: str | None = None
        self.model, self.positions = self._choose_model(model)
        self.protocol: Way = self._choose_protocol()
        self._tokenize = self._choose_tokenizer()
        self.probe = self._check()

    def ask(self, prompts: Sequence[tuple[Sequence[int], int]]) -> list[list[dict[int, float]]]:
        """Known log-probabilities at the last tokens of some texts, many at a time.

        Parameters
        ----------
        prompts
            The tokens of each, and how many of the last are wanted.
        """
        self._stopped.clear()
        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                return list(pool.map(lambda one: self._ask(*one), prompts))
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, tokens: Sequence[int], wanted: int) -> list[dict[int, float]]:
        request = self.protocol.request(tokens, self.best, self.model)
        key = hashlib.sha256(
            json.dumps([request.path, request.body, list(tokens), wanted]).encode()
        ).hexdigest()
        if self.answers is not None and (known := self.answers.get(key)) is not None:
            return [{int(token): value for token, value in one.items()} for one in known]
        self._check_tokens(tokens)
        positions, _ = self._known(request, tokens)
        found = positions[len(tokens) - wanted :]
        if self.answers is not None:
            self.answers.put(key, found)
        return found  # type: ignore[return-value]  # those of the prompt's first token are not wanted

    def _known(self, request: Request, tokens: Sequence[int]) -> tuple[Positions, dict[str, Any]]:
        """The positions of an answer, once it is one that can be believed."""

        def read(answer: dict[str, Any]) -> tuple[Positions, dict[str, Any]]:
            positions = self.protocol.positions(answer, tokens)
            expect(len(positions) == len(tokens), f"{len(tokens)} positions", len(positions))
            for place, (token, entry) in enumerate(zip(tokens, positions, strict=True)):
                if entry is None and place <= len(self.tokenizer.begin):
                    continue  # nothing comes before it
                expect(bool(entry), f"log-probabilities at place {place}", "none")
                assert entry is not None
                expect(token in entry, f"the log-probability of token {token}", "none")
                values = entry.values()
                expect(all(map(math.isfinite, values)), "finite log-probabilities", list(values))
                total = math.fsum(map(math.exp, values))
                expect(total < 1.01, "probabilities of sum 1 at most", f"{total:.3f}")
            return positions, answer

        return self._send("POST", request.path, request.body, read)

    def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[dict[str, Any]], Any],
        known: bool = True,
    ) -> Any:
        """What ``read`` makes of the answer, asked for until there is a good one. To a way to ask that may
        not be ``known``, llama-cpp-python's server answers with status 500."""
        trouble, broken = "", 0
        for attempt in range(self.retries + 1):
            pause = min(LONGEST_PAUSE, PAUSE * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            if attempt and self._stopped.wait(pause):
                break  # another request has failed for good
            try:
                response = self._client.request(method, f"{self.url}{path}", json=body)
            except self._httpx.TimeoutException:
                trouble = f"no answer within {self.timeout:g} s (--timeout)"
                continue
            except self._httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}".rstrip(": ")
                continue
            broken += response.status_code == 500
            if not known and broken == REFUSALS:
                raise Refused(self._refusal(path, response))
            if response.status_code in PASSING:
                trouble = f"status {response.status_code}: {_short(response.text)}"
                self._stopped.wait(_wanted_pause(response.headers.get("retry-after", "")))
                continue
            if response.status_code != 200:
                raise Refused(self._refusal(path, response))
            try:
                answer = response.json()
                self._check_model(answer)
                return read(answer)
            except UserError:
                raise
            except BadAnswer as error:
                trouble = f"a wrong one ({error})"
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                trouble = f"an answer that cannot be read ({type(error).__name__}: {error})"
        raise UserError(
            f"{self.url}{path}: expected an answer, found {trouble or 'none'}, {self.retries + 1} times; "
            "what was answered is kept: once the server is well, run the command again"
        )

    def _check_model(self, answer: Any) -> None:
        said = answer.get("model") if isinstance(answer, dict) else None
        if not isinstance(said, str):
            return
        if self._says is None:
            self._says = said
        if said != self._says:
            raise UserError(
                f"{self.url}: expected answers of {self._says}, found one of {said}: another model is "
                "behind the address now; start the first again, or build another cache (--output)"
            )

    def _refusal(self, path: str, response: Any) -> str:
        text = _short(response.text)
        hint = ""
        if "logprob" in text:
            hint = (
                f" (it must give {self.best} log-probabilities at each position of a prompt: start vLLM "
                f"with --max-logprobs {self.best}, llama-cpp-python with --logits_all true, or ask for "
                "fewer with --top-k)"
            )
        if response.status_code in (401, 403):
            hint = " (set the environment variable OPENAI_API_KEY)"
        return f"{self.url}{path}: refused with status {response.status_code}: {text}{hint}"

    def _choose_model(self, wanted: str | None) -> tuple[str, float]:
        """The teacher's name, and how many tokens it reads."""

        def read(answer: dict[str, Any]) -> list[dict[str, Any]]:
            return [{"id": entry["id"], **entry} for entry in answer["data"]]

        served = self._send("GET", "/v1/models", None, read)
        names = [entry["id"] for entry in served]
        if (wanted is None and len(names) != 1) or (wanted is not None and wanted not in names):
            raise UserError(
                f"{self.url}: expected {'one model' if wanted is None else wanted}, found "
                f"{', '.join(names) or 'none'}; name one with --served-model"
            )
        chosen = served[0] if wanted is None else served[names.index(wanted)]
        return chosen["id"], float(chosen.get("max_model_len") or math.inf)

    def _choose_protocol(self) -> Way:
        """The first way to ask that the server knows."""
        tokens = self._probe_tokens("a")
        refusals = []
        for kind in PROTOCOLS:
            way = kind(self.tokenizer)
            request = way.request(tokens, self.best, self.model)
            try:
                read = partial(_tried, way=way, tokens=tokens)
                self._send("POST", request.path, request.body, read, known=False)
            except UserError as error:
                refusals.append(f"{kind.name}: {error}")
                continue
            return way
        raise UserError(
            f"{self.url}: expected a server that gives log-probabilities of prompts (vLLM, SGLang, "
            f"llama-cpp-python with --logits_all true), found none of them: {'; '.join(refusals)}"
        )

    def _choose_tokenizer(self) -> tuple[str, str] | None:
        """Where the server tokenizes a text, if it does."""
        for path, field in TOKENIZERS:
            try:
                self._server_tokens((path, field), "a")
            except Refused:
                continue
            return path, field
        return None

    def _server_tokens(self, place: tuple[str, str], text: str) -> list[int]:
        path, field = place
        body = {"model": self.model, field: text, "add_special_tokens": False}
        found: list[int] = self._send("POST", path, body, lambda answer: list(answer["tokens"]))
        begin = self.tokenizer.begin
        return found[len(begin) :] if begin and found[: len(begin)] == begin else found

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """Refuse a text that the server cuts otherwise, where text is what it reads."""
        if not isinstance(self.protocol, Echo):
            return
        own, text = self.protocol.own(tokens), self.protocol.text(tokens)
        if self._tokenize is None:
            return
        found = self._server_tokens(self._tokenize, text)
        if found != own:
            raise UserError(
                f"{self.url}: reads {text[:60]!r} as other tokens than the data have "
                f"({first_difference(own, found)}): expected a teacher with the data's tokenizer; make the "
                "data with the teacher's, or serve it where token ids can be sent (vLLM, SGLang)"
            )

    def _probe_tokens(self, text: str) -> list[int]:
        return [*self.tokenizer.begin, *self.tokenizer.encode(text)]

    def _check(self) -> list[float]:
        """Compare the server's tokens with the tokenizer's, and see that no answer is off by a place.

        Returns log-probabilities of a known text, by which the teacher is known again.
        """
        for text in PROBES:
            tokens = self._probe_tokens(text)
            if self._tokenize is not None:
                own = self.tokenizer.encode(text)
                found = self._server_tokens(self._tokenize, text)
                if found != own:
                    raise UserError(self._other_tokenizer(text, first_difference(own, found)))
            request = self.protocol.request(tokens, self.best, self.model)
            positions, answer = self._known(request, tokens)
            self._check_count(self.protocol.count(answer))
            said = self.protocol.texts(answer, tokens)
            for token, theirs in zip(tokens, said, strict=True):
                ours = self.tokenizer.decode([token])
                if theirs and differ(ours, theirs):
                    raise UserError(
                        self._other_tokenizer(text, f"{theirs!r} for {ours!r}, token {token}")
                    )
            self._check_shift(positions, tokens)
        return [
            round(entry[token], 3)
            for token, entry in zip(tokens, positions, strict=True)
            if entry is not None
        ]

    def _check_count(self, found: int) -> None:
        """Refuse a server that gives fewer tokens than it is asked for, and says nothing."""
        asked = min(self.best, len(self.tokenizer.pieces))
        if found < (asked / 2 if isinstance(self.protocol, Echo) else asked):
            raise UserError(
                f"{self.url}: expected {self.best} log-probabilities at each position of a prompt, found "
                f"{found} at most; let the server give more, or ask for fewer with --top-k"
            )

    def _check_shift(self, positions: Positions, tokens: Sequence[int]) -> None:
        """Refuse answers whose best tokens are those of the places beside."""
        best = [max(entry, key=entry.__getitem__) if entry else None for entry in positions]
        last = len(tokens)
        hits = {
            shift: sum(best[i] == tokens[i + shift] for i in range(last) if 0 <= i + shift < last)
            for shift in (-1, 0, 1)
        }
        other = max((-1, 1), key=hits.__getitem__)
        if hits[other] > 2 * hits[0] + 4:
            raise UserError(
                f"{self.url}: its log-probabilities are off by a place ({hits[other]} of {last} best "
                f"tokens are the token {'after' if other > 0 else 'before'}, {hits[0]} the token itself); "
                "update the server, or serve the teacher with vLLM or SGLang"
            )

    def _other_tokenizer(self, text: str, difference: str) -> str:
        return (
            f"{self.url}: {self.model} has another tokenizer than the data: of {text[:40]!r} it has "
            f"{difference}; expected the teacher whose tokenizer the data were made with"
        )


class Refused(UserError):
    """A status that says that the request itself is wrong."""


def _tried(answer: dict[str, Any], way: Way, tokens: Sequence[int]) -> bool:
    try:
        way.positions(answer, tokens)
    except (BadAnswer, KeyError, IndexError, TypeError) as error:
        raise UserError(f"an answer without log-probabilities of the prompt ({error})") from error
    return True


def differ(ours: str, theirs: str) -> bool:
    """Whether two texts of a token differ in more than spaces and halves of characters."""
    one, other = (text.replace("▁", " ").replace("Ġ", " ").strip() for text in (ours, theirs))
    return bool(one and other and one != other and "\ufffd" not in one + other)


def _short(text: str) -> str:
    return " ".join(text.split())[:200]


def _wanted_pause(seconds: str) -> float:
    """What a server asks to wait, within reason."""
    try:
        return min(LONGEST_PAUSE, max(0.0, float(seconds)))
    except ValueError:
        return 0.0


#: Texts by which tokenizers are told apart, the last of which also shows an answer that is off by a
#: place: its second half is easy to predict.
PROBES = (
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich – naïve, 1234.5 €",
    "Příliš žluťoučký kůň úpěl ďábelské ódy; 快速的棕色狐狸跳过懒狗。",
    "The red cat sat on the old mat and looked at the moon. " * 3,
)
