"""A stand-in for servers of language models, which can fail in every way they do."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from sekd_fairseq.llm.tokenizer import Tokenizer

#: Log-probabilities of the token after some tokens: (V,).
NextToken = Callable[[Sequence[int]], Any]


class Characters:
    """A tokenizer of characters, words and bytes."""

    def __init__(self, words: Sequence[str] = ("▁the", "▁cat", "▁moon", "▁mat")) -> None:
        letters = [chr(code) for code in range(33, 127)] + ["▁"]
        self.bytes = [f"<0x{byte:02X}>" for byte in range(256)]
        self.pieces = ["<s>", "</s>", *self.bytes, *letters, *words]
        self.begin = [0]
        self.controls = {"<s>": 0, "</s>": 1}
        self._ids = {piece: i for i, piece in enumerate(self.pieces)}
        self._longest = max(map(len, self.pieces))

    def encode(self, text: str) -> list[int]:
        text, found, place = text.replace(" ", "▁"), [], 0
        while place < len(text):
            for size in range(self._longest, 0, -1):
                piece = text[place : place + size]
                if piece in self._ids and piece not in self.controls:
                    found.append(self._ids[piece])
                    place += len(piece)
                    break
            else:
                found += [self._ids[self.bytes[byte]] for byte in text[place].encode()]
                place += 1
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        content = b""
        for piece in (self.pieces[token] for token in tokens):
            is_byte = piece in self.bytes
            content += bytes([int(piece[3:5], 16)]) if is_byte else piece.encode()
        return content.decode(errors="replace").replace("▁", " ")

    def server_tokens(self, text: str) -> list[int]:
        """As a server tokenizes a text: names of control tokens are control tokens."""
        found: list[int] = []
        for place, part in enumerate(text.split("</s>")):
            found += [1] * (place > 0) + self.encode(part)
        return found


class Served:
    """A data directory's tokenizer, as a server has it."""

    def __init__(self, own: Tokenizer) -> None:
        self.begin, self.pieces, self.decode, self.server_tokens = (
            own.begin,
            own.pieces,
            own.decode,
            own.encode,
        )


def copying(tokenizer: Characters) -> NextToken:
    """A language model that expects what followed the last two tokens before, and hardly a byte."""
    vocab = len(tokenizer.pieces)

    def log_p(tokens: Sequence[int]) -> Any:
        logits = np.random.default_rng(list(tokens[-2:])).normal(size=vocab)
        logits[2 : 2 + len(tokenizer.bytes)] -= 40.0
        for place in range(2, len(tokens)):
            if list(tokens[place - 2 : place]) == list(tokens[-2:]):
                logits[tokens[place]] += 8.0
        return logits - np.log(np.exp(logits).sum())

    return log_p


class StandIn:
    """A served model.

    Attributes
    ----------
    failures
        What happens to the next requests for log-probabilities, one each: a status, or ``cut``,
        ``garbage``, ``short``, ``slow``, ``other``.
    always
        What happens to all of them, if anything.
    asked
        Requests for log-probabilities so far.
    most, tells
        Tokens at a position beyond which a request is refused, or answered with so many.
    """

    def __init__(self, tokenizer: Any, log_p: NextToken, protocol: str = "vllm") -> None:
        self.tokenizer, self.log_p, self.protocol = tokenizer, log_p, protocol
        self.models = ["teacher"]
        self.failures: list[int | str] = []
        self.always: int | str | None = None
        self.asked: list[Any] = []
        self.shift = 0
        self.most = 10**9
        self.tells = 10**9
        self.tokenizes = True
        self._lock = threading.Lock()

    def rows(self, tokens: Sequence[int]) -> Any:
        """Log-probabilities at each token but the first."""
        return [self.log_p(tokens[:place]) for place in range(1, len(tokens))]

    def positions(self, tokens: Sequence[int], best: int) -> list[dict[int, float] | None]:
        found: list[dict[int, float] | None] = [None]
        rows = self.rows(tokens)
        for place in range(1, len(tokens)):
            row = rows[min(max(1, place + self.shift), len(tokens) - 1) - 1]
            chosen = [*np.argsort(-row)[:best].tolist(), tokens[len(found)]]
            found.append({token: float(row[token]) for token in chosen})
        return found

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        tokenizer = self.tokenizer
        if path == "/v1/models":
            return 200, {"data": [{"id": name, "max_model_len": 4000} for name in self.models]}
        if path in ("/tokenize", "/extras/tokenize"):
            mine = "/extras/tokenize" if self.protocol == "echo" else "/tokenize"
            if path != mine or not self.tokenizes:
                return 404, {"detail": "Not Found"}
            text = body["prompt" if path == "/tokenize" else "input"]
            begin = tokenizer.begin if self.protocol == "echo" else []
            return 200, {"tokens": [*begin, *tokenizer.server_tokens(text)]}
        wanted = {"vllm": "/v1/completions", "sglang": "/generate", "echo": "/v1/completions"}
        if path != wanted[self.protocol]:
            return 404, {"detail": "Not Found"}
        best = body.get("prompt_logprobs", body.get("top_logprobs_num", body.get("logprobs", 0)))
        if best > self.most:
            return 400, {"message": f"requested prompt logprobs of {best}, more than {self.most}"}
        best = min(best, self.tells)
        if self.protocol == "vllm":
            tokens = body["prompt"]
            known = [
                one
                and {
                    str(i): {"logprob": p, "decoded_token": tokenizer.decode([i])}
                    for i, p in one.items()
                }
                for one in self.positions(tokens, best)
            ]
            return 200, {"model": self.models[0], "choices": [{"prompt_logprobs": known}]}
        if self.protocol == "sglang":
            tokens = body["input_ids"]
            known = self.positions(tokens, best)
            chosen = [
                [one and one[token], token, tokenizer.decode([token])]
                for token, one in zip(tokens, known, strict=True)
            ]
            top = [one and [[p, i, tokenizer.decode([i])] for i, p in one.items()] for one in known]
            meta = {"input_token_logprobs": chosen, "input_top_logprobs": top}
            return 200, {"text": "x", "meta_info": meta}
        if not isinstance(body["prompt"], str):
            return 500, {"message": "Input should be a valid string"}  # as llama-cpp-python's
        tokens = [*tokenizer.begin, *tokenizer.server_tokens(body["prompt"])]
        known = self.positions(tokens, best)[1:] + [{5: -1.0}]  # and a token that it generates
        tokens = [*tokens[1:], 5]

        def text(token: int) -> str:
            return "" if token < 2 else tokenizer.decode([token])

        logprobs = {
            "tokens": [text(token) for token in tokens],
            "token_logprobs": [one[token] for token, one in zip(tokens[:-1], known, strict=False)]
            + [-1.0],
            "top_logprobs": [{text(i): p for i, p in one.items()} for one in known],
        }
        logprobs["token_logprobs"][0] = logprobs["top_logprobs"][0] = None
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 1}
        return 200, {"model": self.models[0], "choices": [{"logprobs": logprobs}], "usage": usage}

    def respond(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        path, trouble = handler.path, None
        if path in ("/v1/completions", "/generate"):
            with self._lock:
                self.asked.append(body)
                trouble = self.failures.pop(0) if self.failures else self.always
        if isinstance(trouble, int):
            status, content = trouble, {"message": "trouble"}
        else:
            status, content = self.answer(path, body)
        if trouble == "short":
            content["choices"][0]["prompt_logprobs"].pop()
        if trouble == "other":
            content["model"] = "another"
        if trouble == "slow":
            time.sleep(1.0)
        text = b"<html>" if trouble == "garbage" else json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text) + (100 if trouble == "cut" else 0)))
        if trouble == 429:
            handler.send_header("Retry-After", "0.01")
        handler.end_headers()
        with suppress(ConnectionError):  # who waits no longer
            handler.wfile.write(text)
        if trouble == "cut":
            handler.close_connection = True

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve on a free port; gives the address."""
        standin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                standin.respond(self, {})

            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                standin.respond(self, json.loads(self.rfile.read(size)))

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
