"""A teacher that vLLM runs, with vLLM itself replaced by transformers."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.tokenizer import load_tokenizer
from sekd_fairseq.teacher_cache import TeacherCache
from sekd_fairseq.teachers.vllm import VLLMEngine

from .conftest import (
    command,
    prepare,
)
from .language_models import load, pretrained

transformers = pytest.importorskip("transformers")


@dataclass
class FakeLogprob:
    """As vLLM's ``Logprob``: what ``prompt_logprobs`` holds for a token id."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def fake_vllm(folder: Path) -> ModuleType:
    """A module with vLLM's documented interface, on transformers: not vLLM itself."""

    class SamplingParams:
        def __init__(self, max_tokens: int, prompt_logprobs: int, detokenize: bool) -> None:
            assert max_tokens >= 1
            self.prompt_logprobs = prompt_logprobs

    class LLM:
        def __init__(self, model: str, dtype: str, max_logprobs: int) -> None:
            assert model == str(folder) and dtype == "auto"
            self.max_logprobs = max_logprobs
            self.model = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
            positions = self.model.config.max_position_embeddings
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=positions))

        def generate(self, prompts: Any, sampling_params: Any, use_tqdm: bool) -> list[Any]:
            best = sampling_params.prompt_logprobs
            assert best <= self.max_logprobs
            return [self.one(prompt["prompt_token_ids"], best) for prompt in prompts]

        def one(self, ids: list[int], best: int) -> Any:
            with torch.no_grad():
                log_p = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            found: list[Any] = [None]  # nothing predicts the first token
            for row, token in zip(log_p[:-1], ids[1:], strict=True):
                chosen = {*row.topk(best).indices.tolist(), token}
                found.append({i: FakeLogprob(row[i].item()) for i in chosen})
            return SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=found)

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("rank", "seen", "left"),
    [
        ("3", None, "3"),
        ("3", "7,5,GPU-2,1", "1"),
        ("0", "4", "4"),
        (None, "0,1", "0,1"),
        (None, None, None),
    ],
)
def test_each_process_of_torchrun_has_a_gpu_of_its_own(
    rank: str | None, seen: str | None, left: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM sees when it is imported."""
    found: list[str | None] = []

    class Finder:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "vllm":
                found.append(os.environ.get("CUDA_VISIBLE_DEVICES"))

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    for name, value in (("LOCAL_RANK", rank), ("CUDA_VISIBLE_DEVICES", seen)):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    with pytest.raises(UserError, match="expected vLLM"):
        VLLMEngine("folder", "data", None, 4)
    assert found == [left]


def test_more_processes_of_torchrun_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    for seen in ("0,1", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        with pytest.raises(UserError, match="expected a GPU for each process"):
            VLLMEngine("folder", "data", None, 4)


def test_vllm_engine(
    tokenizer: Path, llm_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sekd_fairseq import build_cache

    data = tmp_path / "data"
    # Few-shot prompts, which have the end of sentence within.
    prepare(tokenizer, llm_text, data, "--prune-vocab", "--shots", "2")
    pieces = load_tokenizer(str(tokenizer)).pieces
    source = pretrained(tmp_path / "model", "llama", len(pieces))
    command_line = [
        str(data / "bin"),
        "--path",
        str(source),
        "--engine",
        "vllm",
        "--subset",
        "test",
    ]
    command_line.append("--allow-implausible")
    with pytest.raises(SystemExit):
        build_cache.main([*command_line, "--output", str(tmp_path / "no")])  # no vLLM here
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(source))
    for wrong in (["--sample", "4"], ["--temperature", "2"], ["--top-k", "0"]):
        with pytest.raises(SystemExit):
            build_cache.main([*command_line, "--output", str(tmp_path / "no"), *wrong])
    assert not (tmp_path / "no").exists()
    build_cache.main([*command_line, "--output", str(tmp_path / "k"), "--top-k", "6"])
    build_cache.main(
        [*command_line, "--output", str(tmp_path / "p"), "--top-k", "6", "--top-p", "0.3"]
    )
    top_k, top_p = (TeacherCache.open(tmp_path / name / "test") for name in "kp")
    command(
        "sekd_fairseq.import_hf",
        source,
        "--data",
        data / "bin",
        "--output",
        tmp_path / "teacher.pt",
    )
    model, task = load(tmp_path / "teacher.pt", data / "bin")
    task.load_dataset("test")
    dataset = task.dataset("test")
    rows = model.vocabulary_rows
    original = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    known = rows[rows >= 0]
    for i in range(len(dataset)):
        item = dataset[i]
        ids = rows[torch.cat([item["source"][:-1], item["target"]])].unsqueeze(0)
        with torch.no_grad():
            log_p = original(ids).logits[0, len(item["source"]) - 2 : -1].log_softmax(-1)
        sentence, ends = top_k[i], top_k[i].support_size.cumsum()
        fewer = top_p[i]
        for place, gold in enumerate(item["target"].tolist()):
            entries = slice(ends[place] - sentence.support_size[place], ends[place])
            kept, values = sentence.token_id[entries], sentence.logprob[entries]
            exact = log_p[place, rows[kept.astype(int)]]
            assert kept[0] == gold
            np.testing.assert_allclose(values, exact, atol=2e-2)  # stored in 16 bits
            np.testing.assert_allclose(sentence.gold_logprob[place], exact[0], atol=1e-4)
            # Of the model's six best, those that have a symbol, and what they leave.
            best = [t for t in log_p[place].topk(6).indices.tolist() if t in known.tolist()]
            expected = {int(rows[gold]), *[t for t in best if t != rows[gold]][:5]}
            assert {int(rows[t]) for t in kept.astype(int)} == expected
            rest = 1 - exact.exp().sum()
            np.testing.assert_allclose(sentence.outside_mass[place], rest, atol=1e-3)
            assert sentence.entropy[place] <= -(log_p[place].exp() * log_p[place]).sum() + 1e-3
        assert (fewer.support_size <= sentence.support_size + 1).all()
    assert top_p.manifest.tokens == top_k.manifest.tokens
    assert top_k.manifest.teacher["arch"] == "vllm"
