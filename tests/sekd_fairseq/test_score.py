"""Token records equal what the two models themselves say."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from analysis.runs.texts import read_lines
from sekd_fairseq.comparison import top_overlap
from sekd_fairseq.losses import TeacherTokens

from .conftest import command, error_line, train


def full_log_probs(path: Path, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reference tokens of test and the model's full log-probabilities there, sentence by sentence."""
    from sekd_fairseq.checkpoints import load_models
    from sekd_fairseq.logits import token_logits
    from sekd_fairseq.splits import load_split

    models, _, task = load_models([str(path)], str(data), torch.device("cpu"))
    dataset = load_split(task, "test", str(data))
    parts = []
    for sentence in range(len(dataset)):
        sample = dataset.collater([dataset[sentence]])
        parts += list(token_logits(models, sample, task.target_dictionary.pad()))
    target, z = (torch.cat(column).double().numpy() for column in zip(*parts, strict=True))
    return target.astype(int), z - np.logaddexp.reduce(z, axis=1, keepdims=True)


def test_records_equal_the_models(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(
        data, tmp_path / "save", "--criterion", "label_smoothed_cross_entropy", "--seed", "3",
        "--label-smoothing", "0.1",
    )  # fmt: skip
    student = tmp_path / "save" / "checkpoint_last.pt"
    dense = tmp_path / "dense"
    command(
        "sekd_fairseq.build_cache", data, "--path", teacher, "--output", dense, "--cpu",
        "--subset", "test", "--top-k", "0",
    )  # fmt: skip
    run = tmp_path / "runs" / "plain"
    score = ("sekd_fairseq.score", data, "--path", student, "--cpu", "--run", run)
    command(*score, "--teacher-cache", dense)
    (path,) = (run / "tokens" / "test").iterdir()
    assert path.name == "12.parquet"
    table = pd.read_parquet(path)
    target, log_p = full_log_probs(teacher, data)
    _, log_q = full_log_probs(student, data)
    rows = np.arange(len(target))
    p, q = np.exp(log_p), np.exp(log_q)
    assert (table["token"] == target).all()

    def close(name: str, expected: np.ndarray) -> None:
        np.testing.assert_allclose(table[name], expected, rtol=3e-3, atol=2e-4, err_msg=name)

    close("p_gold", p[rows, target])
    close("q_gold", q[rows, target])
    close("kl", (p * (log_p - log_q)).sum(1))
    close("kl", (table["kl_target"] + table["kl_nontarget"]).to_numpy())
    p_y, q_y = p[rows, target], q[rows, target]
    close("kl_target", p_y * np.log(p_y / q_y) + (1 - p_y) * np.log((1 - p_y) / (1 - q_y)))
    close("p_entropy", -(p * log_p).sum(1))
    close("q_entropy", -(q * log_q).sum(1))
    close("q_max", q.max(1))
    close("p_max", p.max(1))
    assert (table["q_top1"] == q.argmax(1)).all()
    assert (table["p_top1"] == p.argmax(1)).mean() > 0.99  # float16 may tie
    close("p_of_q_top1", p[rows, q.argmax(1)])
    best_p, best_q = (np.argsort(-side, axis=1, kind="stable")[:, :5] for side in (p, q))
    overlap = [len(set(a) & set(b)) for a, b in zip(best_p, best_q, strict=True)]
    assert np.mean(np.abs(table["overlap_top5"] - overlap)) < 0.05
    # A token at a time, as of a wide vocabulary a part of a batch: no more is held in single precision.
    monkeypatch.setattr("sekd_fairseq.logits.BLOCK_ELEMENTS", 1)
    single = ("--teacher-cache", dense, "--run", tmp_path / "runs" / "single")
    command(*score[:-2], *single)
    again = pd.read_parquet(tmp_path / "runs" / "single" / "tokens" / "test" / path.name)
    pd.testing.assert_frame_equal(table, again, rtol=1e-4, atol=1e-5)
    starts = table.groupby("sentence")["position"].min()
    assert len(starts) == 13 and (starts == 0).all()
    assert table.loc[table["piece"] == "eins", "frequency"].nunique() == 1
    metadata = pq.read_metadata(path).metadata
    assert metadata[b"sekd.subset"] == b"test" and metadata[b"sekd.step"] == b"12"
    record = json.loads((run / "run.json").read_text())
    assert record["method"] == "finetune" and record["direction"] == "en-de"
    assert record["seed"] == 3 and record["updates"] == 12
    # The report reads what was written.
    out = command("analysis.transfer", tmp_path / "runs")
    assert "report.md" in out

    line = error_line(command(*score, "--teacher-cache", tmp_path / "none", check=False))
    assert "build_cache" in line
    # A teacher's own run: a record, no tokens.
    command(
        "sekd_fairseq.score", data, "--path", teacher, "--cpu", "--run", tmp_path / "runs" / "t"
    )
    assert json.loads((tmp_path / "runs" / "t" / "run.json").read_text())["method"] == "teacher"


def test_a_carriage_return_within_a_line_does_not_end_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\rstill one\r\ntwo\n\n")
    assert read_lines(tmp_path / "a") == ["one\rstill one", "two", ""]


def test_overlap_where_the_cache_holds_fewer_tokens() -> None:
    """A teacher compared with itself overlaps wholly, however few tokens a confident one keeps."""
    log_p = torch.tensor([[0.9, 0.06, 0.04], [0.5, 0.3, 0.2]]).log()
    teacher = TeacherTokens(
        ids=torch.tensor([[3, 1, 7], [2, 5, 2]]),
        valid=torch.tensor([[True, True, True], [True, True, False]]),
        log_p=log_p,
        log_outside=torch.full((2,), -10.0),
    )
    log_q = torch.log_softmax(torch.arange(10.0).repeat(2, 1), dim=1)  # best: 9, 8, 7, 6, 5
    assert top_overlap(teacher, log_q, 5).tolist() == [2, 2]  # 1 of 3, 1 of 2, as of 5
    log_q[0, [1, 3, 7]] += 20
    assert top_overlap(teacher, log_q, 5).tolist() == [5, 2]


def test_earlier_checkpoints_and_a_warm_start(
    data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    train(
        data, tmp_path / "save", "--criterion", "cross_entropy", "--save-interval-updates", "4",
        "--max-update", "10", "--finetune-from-model", teacher,
    )  # fmt: skip
    run = tmp_path / "runs" / "warm"
    command(
        "sekd_fairseq.score", data, "--path", tmp_path / "save" / "checkpoint_last.pt", "--cpu",
        "--run", run, "--teacher-cache", cache, "--subset", "valid", "--earlier",
    )  # fmt: skip
    steps = {int(path.stem): path for path in (run / "tokens" / "valid").iterdir()}
    assert sorted(steps) == [4, 8, 10]
    kl = {step: pd.read_parquet(path)["kl"].mean() for step, path in steps.items()}
    assert len(set(kl.values())) == 3
    for step, path in steps.items():
        assert pq.read_metadata(path).metadata[b"sekd.step"] == str(step).encode()
    record = json.loads((run / "run.json").read_text())
    assert record["updates"] == 10 and record["hyperparameters"]["warm_start"] is True
