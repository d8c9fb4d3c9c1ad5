"""build_cache --engine http: the cache that the model itself gives, whatever the server does."""

import copy
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sekd_fairseq import build_cache
from sekd_fairseq.llm.tokenizer import load_tokenizer
from sekd_fairseq.llm.vocabulary import TOKENIZER
from sekd_fairseq.teacher_cache import TeacherCache
from sekd_fairseq.teachers import served

from .conftest import command, error_line
from .language_models import pretrained
from .standin import Served, StandIn
from .test_build_cache import bytes_of
from .test_vllm_engine import fake_vllm

transformers = pytest.importorskip("transformers")
pytest.importorskip("httpx")


class Model(StandIn):
    """A stand-in that serves a model of transformers."""

    def __init__(self, folder: Path, data: Path) -> None:
        super().__init__(Served(load_tokenizer(str(data / TOKENIZER))), lambda tokens: None)
        self.load(folder)

    def load(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def rows(self, tokens: Sequence[int]) -> Any:
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()


def test_a_served_teacher_is_cached(
    llm_data: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served, "PAUSE", 0.001)  # in the forks, too
    rows = len(load_tokenizer(str(tokenizer)).pieces)
    source = pretrained(tmp_path / "model", "llama", rows)
    options = ["--subset", "valid", "--top-k", 6, "--shard-sentences", 5, "--allow-implausible"]
    # The engine that runs a model itself, with the interface of vLLM on transformers.
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(source))
    words = [llm_data, "--path", source, "--engine", "vllm", "--output", tmp_path / "own", *options]
    build_cache.main([str(word) for word in words])
    own = TeacherCache.open(tmp_path / "own" / "valid")
    standin = Model(source, llm_data)
    with standin.running() as url:

        def build(output: Path, *more: object, check: bool = True) -> str:
            return command(
                "sekd_fairseq.build_cache", llm_data, "--engine", "http", "--url", url, "--retries", 3,
                "--output", output, *options, *more, check=check,
            )  # fmt: skip

        standin.failures = [500, 429, "cut"]  # passes
        build(tmp_path / "served")
        assert not list((tmp_path / "served").glob("answers*"))
        found = TeacherCache.open(tmp_path / "served" / "valid")
        assert found.manifest.dataset_hash == own.manifest.dataset_hash
        for one, other in zip(found, own, strict=True):
            np.testing.assert_allclose(one.gold_logprob, other.gold_logprob, atol=1e-5)
            np.testing.assert_allclose(one.outside_mass, other.outside_mass, atol=1e-5)
            mine = np.split(one.token_id, np.cumsum(one.support_size)[:-1])
            theirs = np.split(other.token_id, np.cumsum(other.support_size)[:-1])
            for ours, exact in zip(mine, theirs, strict=True):
                assert ours[0] == exact[0] and set(ours) == set(exact)
        # Dead in the middle: one line, what was answered is kept, and the end is the same.
        asked = len(standin.asked)
        standin.failures = ["fine"] * 8 + [500] * 100
        line = error_line(build(tmp_path / "stopped", "--parallel-requests", 1, check=False))
        assert "status 500" in line and "run the command again" in line
        standin.failures = []
        # Another model of the same name behind the address.
        for parameter in standin.model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        line = error_line(build(tmp_path / "stopped", check=False))
        assert "another teacher" in line
        seconds = copy.deepcopy(standin.model)
        standin.load(source)
        answered = len(standin.asked) - asked
        build(tmp_path / "stopped")
        assert bytes_of(tmp_path / "stopped" / "valid") == bytes_of(tmp_path / "served" / "valid")
        # The server is looked at with 4 requests; of 8 good answers 4 were of sentences.
        assert len(standin.asked) - asked - answered == 4 + len(own) - 4
        # The second one's cache, where the first one's stopped, has none of its answers.
        standin.failures = ["fine"] * 8 + [500] * 100
        build(tmp_path / "twice", "--parallel-requests", 1, check=False)
        standin.failures = []
        standin.model = seconds
        assert "another teacher" in error_line(build(tmp_path / "twice", check=False))
        shutil.rmtree(tmp_path / "twice" / "valid")
        build(tmp_path / "twice")
        build(tmp_path / "seconds")
        assert bytes_of(tmp_path / "twice" / "valid") == bytes_of(tmp_path / "seconds" / "valid")
        assert not list((tmp_path / "twice").glob("answers*"))
    line = error_line(build(tmp_path / "dead", check=False))
    assert "ConnectError" in line and not (tmp_path / "dead").exists()
    both = command(
        "sekd_fairseq.build_cache", llm_data, "--path", source, "--url", url, "--output", "x",
        check=False,
    )  # fmt: skip
    assert "--engine http" in error_line(both)


@pytest.mark.skipif(
    "LLAMA_SERVER_PYTHON" not in os.environ,
    reason="needs LLAMA_SERVER_PYTHON, a Python with llama-cpp-python[server], and LLAMA_GGUF, a file",
)
def test_a_real_server_says_what_transformers_says(tmp_path: Path) -> None:
    """llama-cpp-python's server on a CPU, with a real model in a GGUF file."""
    gguf = Path(os.environ["LLAMA_GGUF"])
    own = load_tokenizer(str(gguf.parent), gguf.name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            os.environ["LLAMA_SERVER_PYTHON"], "-m", "llama_cpp.server", "--model", gguf, "--port",
            str(port), "--logits_all", "true", "--n_ctx", "512", "--n_threads", "1", "--verbose", "false",
        ],
        stdout=sys.stderr,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                server = served.Server(f"http://127.0.0.1:{port}", own, 20, parallel=2, retries=2)
                break
            except served.UserError as error:
                if time.monotonic() > deadline or "ConnectError" not in str(error):
                    raise
                time.sleep(2)
        assert server.protocol.name == "echo"
        texts = [
            "Translate from German to English.\nGerman: Ein Hund läuft.\nEnglish:\nA dog runs.",
            "The capital of France is Paris, and the capital of Italy is Rome.",
        ]
        prompts = [[*own.begin, *own.encode(text)] for text in texts]
        found = server.ask([(tokens, 8) for tokens in prompts])
    finally:
        process.terminate()
        process.wait(30)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    for tokens, positions in zip(prompts, found, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([tokens])).logits[0].log_softmax(-1)[-9:-1]
        golds = log_p.gather(1, torch.tensor(tokens[-8:]).unsqueeze(1)).squeeze(1)
        ours = torch.tensor([one[token] for one, token in zip(positions, tokens[-8:], strict=True)])
        # llama.cpp multiplies quantised matrices, transformers their float32 values.
        assert (golds - ours).abs().mean() < 0.15, (golds, ours)
        best = [max(one, key=one.__getitem__) for one in positions]
        assert sum(a == b for a, b in zip(best, log_p.argmax(-1).tolist(), strict=True)) >= 6
