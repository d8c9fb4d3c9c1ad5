"""Every command on a GPU, in every precision, for a Transformer and a language model.

The commands run in forks, which can use CUDA as long as this process has not (conftest.py).
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sekd_fairseq.teacher_cache import TeacherCache

from .conftest import ROOT, command, prepare, sentence_pairs, train_arguments, write_text

pytestmark = pytest.mark.gpu

PRECISIONS = ("--fp16", "--bf16", "--amp", "--memory-efficient-fp16", "--memory-efficient-bf16")
PLUGIN = ("--user-dir", ROOT / "sekd_fairseq", "--task", "self_evolution_kd")
UPDATES = 40


@dataclass(frozen=True)
class Student:
    """What a kind of model trains on, and the function that makes a training of it."""

    data: Path
    cache: Path
    teacher: Path
    training: Callable[..., list[object]]

    def arguments(self, save: Path, *more: object) -> list[object]:
        """A training of SE-KD."""
        return on_gpu(
            self.training(
                self.data, save, "--criterion", "self_evolution_kd", "--teacher-cache", self.cache,
                "--max-update", UPDATES, "--validate-after-updates", UPDATES, *more,
            )
        )  # fmt: skip


def on_gpu(words: list[object]) -> list[object]:
    """A command's words, without what would keep it on the CPU where there is a GPU."""
    return [word for word in words if word != "--cpu" or not torch.cuda.is_available()]


def records(log: str, key: str) -> list[dict[str, Any]]:
    """The JSON records of a log that have ``key``."""
    lines = (line for line in log.splitlines() if "{" in line and f'"{key}"' in line)
    return [json.loads(line[line.index("{") :]) for line in lines]


@pytest.fixture(scope="module")
def transformer(data: Path, cache: Path, teacher: Path) -> Student:
    return Student(data, cache, teacher, train_arguments)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Student:
    pytest.importorskip("transformers")
    from .language_models import FAMILIES, train_llm_arguments

    folder = tmp_path_factory.mktemp("lm")
    for seed, (split, count) in enumerate({"train": 200, "valid": 20, "test": 13}.items()):
        write_text(folder, split, sentence_pairs(count, seed))
    prepare(tokenizer, folder, folder / "data")
    data = folder / "data" / "bin"
    (folder / "config.json").write_text(json.dumps(FAMILIES["llama"]))

    def training(data: Path, save: Path, *more: object) -> list[object]:
        # In chunks: the other path through the criterion.
        model = ("--hf-config", folder / "config.json", "--max-tokens", 1200)
        return train_llm_arguments(data, save, *model, "--sekd-chunk-tokens", 64, *more)

    words = train_llm_arguments(
        data, folder, "--criterion", "cross_entropy", "--hf-config", folder / "config.json",
        "--max-tokens", 1200, "--max-update", 60, "--disable-validation",
    )  # fmt: skip
    command(*on_gpu(words))
    command(
        "sekd_fairseq.build_cache", data, "--path", folder / "checkpoint_last.pt", "--output",
        folder / "cache", "--top-k", 8, "--subset", "train,valid,test", "--allow-implausible",
    )  # fmt: skip
    return Student(data, folder / "cache", folder / "checkpoint_last.pt", training)


@pytest.fixture(scope="module", params=["transformer", "language_model"])
def student(request: pytest.FixtureRequest) -> Student:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def single(
    student: Student, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A training in float32: its folder, and what its validation logged."""
    folder = tmp_path_factory.mktemp("single")
    return folder, records(command(*student.arguments(folder)), "valid_loss")[-1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_and_resuming(
    student: Student, single: tuple[Path, dict[str, Any]], precision: str, tmp_path: Path
) -> None:
    log = command(*student.arguments(tmp_path, precision))
    losses = [float(record["loss"]) for record in records(log, "gnorm") if "ups" in record]
    assert len(losses) == UPDATES and losses[-1] < 0.8 * losses[0]
    (valid,) = records(log, "valid_loss")
    for key, value in valid.items():
        assert math.isfinite(float(value)), (key, value)
    for key in ("valid_loss", "valid_nll_loss", "valid_difficulty"):
        assert float(valid[key]) == pytest.approx(float(single[1][key]), rel=0.1), key
    state = torch.load(tmp_path / "checkpoint_last.pt", map_location="cpu")
    learnt = state["task_state"]["criterion"]
    assert learnt["updates"] == UPDATES
    assert float(valid["valid_gamma"]) == pytest.approx(learnt["running_gamma"], abs=1e-3)
    again = command(*student.arguments(tmp_path, precision, "--max-update", UPDATES + 5))
    assert f"@ {UPDATES} updates" in again
    after = [float(record["loss"]) for record in records(again, "gnorm") if "ups" in record]
    assert len(after) == 5 and max(after) < 0.8 * losses[0]


@pytest.mark.parametrize(
    "precision",
    [
        # Without a GPU as well, so that what all of these tests stand on is run by every change.
        pytest.param((), id="float32", marks=pytest.mark.gpu(optional=True)),
        pytest.param(("--fp16",), id="fp16"),
        pytest.param(("--bf16",), id="bf16"),
    ],
)
def test_commands(
    student: Student,
    single: tuple[Path, dict[str, Any]],
    precision: tuple[str, ...],
    tmp_path: Path,
) -> None:
    best = single[0] / "checkpoint_best.pt"
    out = command(
        "fairseq_cli.validate", student.data, *PLUGIN, "--path", best, "--log-format", "json",
        "--max-tokens", 1200, *on_gpu(["--cpu"]), *precision,
    )  # fmt: skip
    (valid,) = records(out, "valid_loss")
    for key in ("valid_loss", "valid_hard_share", "valid_kl_hard"):
        limit = 0.05 if precision else 2e-3
        assert float(valid[key]) == pytest.approx(float(single[1][key]), rel=limit, abs=limit), key
    out = command(
        "fairseq_cli.generate", student.data, *PLUGIN, "--path", best, "--gen-subset", "test",
        "--beam", 3, "--max-len-b", 15, *on_gpu(["--cpu"]), *precision,
    )  # fmt: skip
    scores = [float(line.split("\t")[1]) for line in out.splitlines() if line.startswith("H-")]
    assert len(scores) == 13 and all(map(math.isfinite, scores))
    command(
        "sekd_fairseq.build_cache", student.data, "--path", student.teacher, "--output",
        tmp_path / "cache", "--subset", "valid", "--top-k", 6, "--allow-implausible", *precision,
    )  # fmt: skip
    one, other = (TeacherCache.open(c / "valid") for c in (student.cache, tmp_path / "cache"))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.gold_logprob, b.gold_logprob, atol=0.2 if precision else 2e-3)
    command(
        "sekd_fairseq.score", student.data, "--path", best, "--teacher-cache", student.cache,
        "--run", tmp_path / "run", "--subset", "valid", *precision,
    )  # fmt: skip
    (file,) = (tmp_path / "run" / "tokens" / "valid").iterdir()
    mean = pq.read_table(file)["kl"].to_numpy().mean()
    assert mean == pytest.approx(float(single[1]["valid_difficulty"]), rel=0.05, abs=5e-3)


@pytest.mark.parametrize("precision", ["--fp16", "--amp", "--memory-efficient-fp16"])
def test_nothing_is_learnt_from_an_overflow(
    transformer: Student, precision: str, tmp_path: Path
) -> None:
    log = command(
        *transformer.arguments(
            tmp_path, precision, "--criterion", "cached_kd", "--select", "queue", "--queue-size",
            100_000, "--fp16-init-scale", 2**30, "--max-update", 3, "--disable-validation",
        )
    )  # fmt: skip
    assert "overflow" in log
    done = [record for record in records(log, "gnorm") if "ups" in record]
    assert len(done) == 3 and float(done[0]["selected"]) == 1.0 > float(done[1]["selected"])
    state = torch.load(tmp_path / "checkpoint_last.pt", map_location="cpu")
    queue = state["task_state"]["criterion"]["queue"]
    assert queue.isfinite().all()
    # As many as the three updates had tokens, none twice.
    assert len(queue) == pytest.approx(sum(float(record["wpb"]) for record in done), abs=1)
