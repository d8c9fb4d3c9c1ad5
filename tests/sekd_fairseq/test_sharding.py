"""A student whose weights are sharded over two processes is that of one process."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from sekd_fairseq.llm.tokenizer import load_tokenizer

from .conftest import (
    command,
    error_line,
    parameters,
    prepare,
    train,
    train_arguments,
    train_in_two_processes,
    write_text,
)
from .training import SE_KD, records

SHARDED = ("--shard-weights", "--batch-size", "8")
WHOLE = ("--batch-size", "8", "--update-freq", "2")
#: Adam turns the rounding of gradients near zero into whole steps, but for a large epsilon.
ADAM = ("--optimizer", "adam", "--lr", "0.02", "--adam-eps", "0.01")
SGD = ("--optimizer", "sgd", "--lr", "0.5")


def options(cache: Path, updates: int) -> tuple[object, ...]:
    return (
        *SE_KD, "--teacher-cache", cache, "--max-update", updates, "--clip-norm", "0.5", "--max-tokens",
        "100000", "--validate-interval-updates", "2", "--save-interval-updates", "2",
    )  # fmt: skip


def norms(log: str) -> list[float]:
    return [float(record["gnorm"]) for record in records(log, "")]


@pytest.mark.parametrize(
    "more",
    [pytest.param(SGD, marks=pytest.mark.slow), (*ADAM, "--sekd-chunk-tokens", "7")],
    ids=["sgd", "adam-chunks"],
)
def test_two_processes_end_as_one(
    data: Path, cache: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    words = (*options(cache, 5), *more)
    alone = train(data, tmp_path / "one", *words, *WHOLE)
    log = tmp_path / "log"
    train_in_two_processes(train_arguments(data, tmp_path / "two", *words, *SHARDED), log)
    spread = log.read_text()
    here, of_all = map(int, re.findall(r"sharded: (\d+) of (\d+)", spread)[0])
    assert 0.4 * of_all < here < 0.6 * of_all
    # The norm is that of all weights, and gradients are clipped by it.
    assert norms(alone) == pytest.approx(norms(spread), abs=2e-3) and norms(alone)[0] > 0.5
    for key in ("valid_loss", "valid_kl_hard"):
        one, two = (float(records(text, "valid_")[-1][key]) for text in (alone, spread))
        assert one == pytest.approx(two, abs=2e-3)
    first, second = (tmp_path / name / "checkpoint_last.pt" for name in ("one", "two"))
    torch.testing.assert_close(parameters(second), parameters(first), rtol=0, atol=2e-5)
    score = ("sekd_fairseq.score", data, "--teacher-cache", cache, "--run", tmp_path / "run")
    command(*score, "--path", second, "--cpu")


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_any_number_of_processes(
    data: Path, cache: Path, tmp_path: Path
) -> None:
    """What a checkpoint holds is the same: weights, and the optimiser's state."""
    words = (*options(cache, 2), *ADAM)
    train(data, tmp_path / "one", *words, *WHOLE)
    train_in_two_processes(train_arguments(data, tmp_path / "two", *words, *SHARDED))
    one, two = (torch.load(tmp_path / n / "checkpoint_last.pt") for n in ("one", "two"))
    for held in ("model", "last_optimizer_state"):
        assert one[held].keys() == two[held].keys()
    states = [held["last_optimizer_state"]["state"] for held in (one, two)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[key], states[1][number][key], rtol=0, atol=1e-5)
    # Each goes on as the other began, from the first batch: fairseq's place in an epoch is of as
    # many processes.
    words = (*options(cache, 4), *ADAM, "--reset-dataloader")
    train(data, tmp_path / "two", *words, *WHOLE)
    train_in_two_processes(train_arguments(data, tmp_path / "one", *words, *SHARDED))
    ends = [parameters(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two")]
    torch.testing.assert_close(*ends, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_sharded_training_resumes(data: Path, cache: Path, tmp_path: Path) -> None:
    for name, stops in (("straight", (4,)), ("stopped", (2, 4))):
        for updates in stops:
            words = (*options(cache, updates), *ADAM, *SHARDED)
            train_in_two_processes(train_arguments(data, tmp_path / name, *words))
    ends = [parameters(tmp_path / n / "checkpoint_last.pt") for n in ("straight", "stopped")]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_half_precision_follows(data: Path, cache: Path, tmp_path: Path) -> None:
    words = (*options(cache, 4), *ADAM, "--bf16", "--disable-validation")
    alone, log = train(data, tmp_path / "one", *words, *WHOLE), tmp_path / "log"
    train_in_two_processes(train_arguments(data, tmp_path / "two", *words, *SHARDED), log)
    assert norms(alone) == pytest.approx(norms(log.read_text()), rel=0.02)
    ends = [parameters(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two")]
    torch.testing.assert_close(*ends, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    "more",
    [
        ("--hf-gradient-checkpointing",),
        pytest.param(("--lora-r", "2"), marks=pytest.mark.slow),
    ],
    ids=["all weights", "adapters"],
)
def test_a_language_model_is_sharded_and_exported(
    llm_data: Path, tokenizer: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    from . import language_models

    tokens = len(load_tokenizer(str(tokenizer)).pieces)
    source = language_models.pretrained(tmp_path / "model", "llama-tied", tokens)
    words = (
        "--criterion", "cross_entropy", "--hf-model", source, "--max-tokens", "100000", "--optimizer", "sgd",
        "--lr", "0.1", *more,
    )  # fmt: skip
    train = language_models.train_llm_arguments
    command(*train(llm_data, tmp_path / "one", *words, *WHOLE))
    train_in_two_processes(train(llm_data, tmp_path / "two", *words, *SHARDED))
    one, two = (tmp_path / name / "checkpoint_last.pt" for name in ("one", "two"))
    torch.testing.assert_close(parameters(two), parameters(one), rtol=0, atol=1e-5)
    command("sekd_fairseq.export_hf", two, "--data", llm_data, "--output", tmp_path / "hf")
    assert list((tmp_path / "hf").glob("*.safetensors"))


def test_validation_does_not_wait_for_a_shared_beginning(
    llm_text: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """At each step one process has a prompt of a few tokens, the other a long one."""
    from . import language_models

    shutil.copytree(llm_text, tmp_path / "text")
    write_text(tmp_path / "text", "valid", [("one", "eins"), ("two " * 20, "zwei " * 20)])
    (tmp_path / "template.txt").write_text("{src} =")
    template = ("--template", tmp_path / "template.txt")
    prepare(tokenizer, tmp_path / "text", tmp_path / "data", *template)
    (tmp_path / "config.json").write_text(json.dumps(language_models.FAMILIES["llama"]))
    arguments = language_models.train_llm_arguments(
        tmp_path / "data" / "bin", tmp_path / "save", "--criterion", "cross_entropy", "--hf-config",
        tmp_path / "config.json", "--max-update", "1", "--batch-size-valid", "1", "--optimizer",
        "sgd", *SHARDED,
    )  # fmt: skip
    train_in_two_processes(arguments, tmp_path / "log")
    assert '"valid_ppl"' in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(("--eval-bleu",), marks=pytest.mark.slow),
        ("--optimizer", "adafactor", "--lr", "1e-3"),
        ("--lr", "1e30"),
    ],
    ids=["bleu", "adafactor", "not a number"],
)
def test_an_error_ends_all_processes(
    data: Path, cache: Path, tmp_path: Path, given: tuple[str, ...]
) -> None:
    words = (*options(cache, 4), *SGD, *SHARDED, *given)
    log = tmp_path / "log"
    train_in_two_processes(train_arguments(data, tmp_path / "save", *words), log, check=False)
    if given[0] == "--lr":
        assert "gradients are Nan/Inf" in log.read_text()
    else:
        assert f"expected no {given[0]}" in error_line(log.read_text())
