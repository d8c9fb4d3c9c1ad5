"""Asking a teacher behind a server: the same numbers by every way, and every way to fail."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sekd_fairseq.errors import UserError
from sekd_fairseq.teachers import served
from sekd_fairseq.teachers.answers import Answers
from sekd_fairseq.teachers.served import Server

from .standin import Characters, StandIn, copying

pytest.importorskip("httpx")
TOKENIZER = Characters()
LOG_P = copying(TOKENIZER)
TEXTS = ["The cat", "sat on the moon", "a mat", "the cat looked at the mat", "ü", "x y z"]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "PAUSE", 0.001)


def prompts() -> list[tuple[list[int], int]]:
    """Texts that end with the end token, of which the last tokens are wanted."""
    encoded = [[0, *TOKENIZER.encode(text), 1] for text in TEXTS]
    return [(tokens, min(len(tokens) - 2, 3)) for tokens in encoded]


def check(found: Sequence[Sequence[dict[int, float]]], best: int, told: Any = None) -> None:
    """Against the model itself; ``told`` marks the tokens that the way can tell."""
    for (tokens, wanted), positions in zip(prompts(), found, strict=True):
        assert len(positions) == wanted
        for place, known in zip(range(len(tokens) - wanted, len(tokens)), positions, strict=True):
            exact = LOG_P(tokens[:place])
            expected = {*np.argsort(-exact)[:best].tolist(), tokens[place]}
            if told is not None:
                expected = {i for i in expected if told[i] or i == tokens[place]}
            assert set(known) == expected
            for token, value in known.items():
                assert value == pytest.approx(exact[token], abs=1e-12)


@pytest.mark.parametrize("protocol", ["vllm", "sglang", "echo"])
@pytest.mark.parametrize("tokenizes", [True, False])
def test_every_way_gives_the_models_numbers(protocol: str, tokenizes: bool) -> None:
    standin = StandIn(TOKENIZER, LOG_P, protocol)
    standin.tokenizes = tokenizes
    told = None
    if protocol == "echo":  # neither control tokens nor bytes have a text of their own
        told = [len(piece) != 6 and piece not in TOKENIZER.controls for piece in TOKENIZER.pieces]
    with standin.running() as url:
        server = Server(url, TOKENIZER, 7, parallel=4)
        assert server.protocol.name == protocol
        check(server.ask(prompts()), 7, told)


@pytest.mark.parametrize("failure", [429, 500, 503, "cut", "garbage", "short"])
def test_what_passes_is_asked_again(failure: int | str) -> None:
    standin = StandIn(TOKENIZER, LOG_P)
    with standin.running() as url:
        server = Server(url, TOKENIZER, 7, parallel=2)
        before = len(standin.asked)
        standin.failures = [failure, failure, failure]
        check(server.ask(prompts()), 7)
        assert len(standin.asked) == before + len(TEXTS) + 3


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (500, "status 500"),
        (429, "status 429"),
        ("cut", "RemoteProtocolError"),
        ("garbage", "cannot be read"),
        ("short", r"a wrong one \(expected 6 positions, found 5\)"),
        ("slow", "no answer within 0.2 s"),
        ("other", "another model is behind the address"),
        (400, "refused with status 400"),
    ],
)
def test_what_stays_ends_with_one_line_and_loses_nothing(
    failure: int | str, words: str, tmp_path: Path
) -> None:
    standin = StandIn(TOKENIZER, LOG_P)
    with standin.running() as url:
        server = Server(url, TOKENIZER, 7, parallel=1, retries=2)
        server.answers = Answers(tmp_path / "answers.sqlite", server.probe)
        server.ask(prompts()[1:])
        standin.always = failure
        if failure == "slow":
            server._client.timeout = server.timeout = 0.2
        before = len(standin.asked)
        with pytest.raises(UserError, match=words) as raised:
            server.ask(prompts())
        assert "\n" not in str(raised.value)
        assert len(standin.asked) - before <= 3
        standin.always = None
        before = len(standin.asked)
        again = Server(url, TOKENIZER, 7, parallel=3)
        checked = len(standin.asked)
        again.answers = Answers(tmp_path / "answers.sqlite", again.probe)
        check(again.ask(prompts()), 7)
        assert len(standin.asked) == checked + 1  # the one that failed
        again.answers.forget_used()  # a shard has them
        again.ask(prompts()[:1])
        assert len(standin.asked) == checked + 2
        again.answers.forget()
    assert not list(tmp_path.iterdir())


def test_no_server_ends_with_one_line() -> None:
    with StandIn(TOKENIZER, LOG_P).running() as url:
        pass
    with pytest.raises(UserError, match=r"ConnectError.*run the command again"):
        Server(url, TOKENIZER, 7, retries=1)
    with pytest.raises(UserError, match="--url"):
        Server("teacher.example", TOKENIZER, 7)


def test_damaged_answers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").write_bytes(b"no answers" * 1000)
    with pytest.raises(UserError, match="delete it"):
        Answers(tmp_path / "answers.sqlite", [])


def test_a_server_that_does_not_fit_is_refused() -> None:
    standin = StandIn(TOKENIZER, LOG_P)
    with standin.running() as url:
        standin.most = 5
        with pytest.raises(UserError, match="--max-logprobs 7"):
            Server(url, TOKENIZER, 7)
        standin.most = 100
        standin.models = ["one", "two"]
        with pytest.raises(UserError, match="expected one model, found one, two"):
            Server(url, TOKENIZER, 7)
        with pytest.raises(UserError, match="expected three"):
            Server(url, TOKENIZER, 7, model="three")
        assert Server(url, TOKENIZER, 7, model="one").positions == 4000
        standin.protocol = "none"
        standin.answer = lambda path, body: (  # type: ignore[method-assign]
            (200, {"data": [{"id": "one"}]}) if path == "/v1/models" else (404, {})
        )
        with pytest.raises(UserError, match=r"vllm: .* sglang: .* echo: "):
            Server(url, TOKENIZER, 7)


@pytest.mark.parametrize("protocol", ["vllm", "sglang", "echo"])
@pytest.mark.parametrize("tokenizes", [True, False])
def test_another_tokenizer_is_refused(protocol: str, tokenizes: bool) -> None:
    swapped = Characters(("▁moon", "▁the", "▁cat", "▁mat"))  # the same pieces under other ids
    standin = StandIn(swapped, copying(swapped), protocol)
    standin.tokenizes = tokenizes
    if protocol == "echo" and not tokenizes:
        return  # text goes in and text comes out: the server's own ids are not seen, and not needed
    with standin.running() as url, pytest.raises(UserError, match="another tokenizer"):
        Server(url, TOKENIZER, 7)


@pytest.mark.parametrize("protocol", ["vllm", "sglang", "echo"])
def test_answers_off_by_a_place_are_refused(protocol: str) -> None:
    for shift in (-1, 1):
        standin = StandIn(TOKENIZER, LOG_P, protocol)
        standin.shift = shift
        with standin.running() as url, pytest.raises(UserError, match="off by a place"):
            Server(url, TOKENIZER, 7)


@pytest.mark.parametrize("protocol", ["vllm", "sglang", "echo"])
def test_fewer_tokens_than_asked_for_are_refused(protocol: str) -> None:
    """Some servers give 5 or 20 at most, whatever they are asked for, and do not say so."""
    standin = StandIn(TOKENIZER, LOG_P, protocol)
    standin.tells = 5
    with standin.running() as url:
        with pytest.raises(UserError, match=r"expected 32 log-probabilities .* found [56] at most"):
            Server(url, TOKENIZER, 32)
        Server(url, TOKENIZER, 5)


def test_text_that_the_server_reads_otherwise_is_refused() -> None:
    """Where text is sent, a control token's name in it would become the token."""
    standin = StandIn(TOKENIZER, LOG_P, "echo")
    with standin.running() as url:
        server = Server(url, TOKENIZER, 7)
        tokens = [0, *[i for char in "a</s>b" for i in TOKENIZER.encode(char)]]
        with pytest.raises(UserError, match=r"reads .* as other tokens"):
            server.ask([(tokens, 2)])
