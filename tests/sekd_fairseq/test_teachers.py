"""Where a training has its teacher from: stored difficulty, a cache, a model beside it, translations."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from .conftest import command, error_line, parameters, train
from .training import PLUGIN, SE_KD, logged, records


def test_stored_difficulty_decides_in_training(
    data: Path, teacher: Path, cache: Path, student: tuple[Path, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    score = (
        "sekd_fairseq.score", data, "--path", student[0] / "checkpoint_best.pt",
        "--teacher-cache", cache, "--run", run, "--cpu", "--subset",
    )  # fmt: skip
    command(*score, "train")
    (stored,) = (run / "tokens" / "train").iterdir()
    kl = pq.read_table(stored)["kl"].to_numpy()
    base = (
        *SE_KD, "--teacher-cache", cache, "--gamma-type", "absolute", "--gamma",
        float(np.quantile(kl, 0.7)), "--max-epoch", "2", "--max-update", "1000",
    )  # fmt: skip
    log = train(data, tmp_path / "save", *base, "--stored-difficulty", stored)
    for record in records(log, "train_"):  # whole epochs: the stored values, whatever the student
        assert float(record["train_difficulty"]) == pytest.approx(kl.mean(), abs=1e-4)
        assert float(record["train_hard_share"]) == pytest.approx(0.3, abs=0.01)
    assert float(records(log, "valid_")[0]["valid_difficulty"]) > 2 * kl.mean()  # as it is now
    command(
        "sekd_fairseq.score", data, "--path", tmp_path / "save" / "checkpoint_last.pt", "--cpu",
        "--teacher-cache", cache, "--run", tmp_path / "own", "--subset", "valid",
    )  # fmt: skip
    settings = json.loads((tmp_path / "own" / "run.json").read_text())["hyperparameters"]
    assert settings["criterion"]["difficulty"] == "stored"  # neither teacher nor prior, for reports

    def refused(*options: object) -> str:
        return error_line(train(data, tmp_path / "no", *base, *options, check=False))

    command(*score, "valid")
    (other,) = (run / "tokens" / "valid").iterdir()
    line = refused("--stored-difficulty", other)
    assert "21 sentences" in line and "203 of" in line
    assert "no file at" in refused("--stored-difficulty", tmp_path / "nothing")
    assert "no token records" in refused("--stored-difficulty", data / "dict.de.txt")
    command(
        "sekd_fairseq.build_cache", data, "--path", teacher, "--output", tmp_path / "fewer",
        "--subset", "train,valid", "--top-k", "3", "--cpu",
    )  # fmt: skip
    line = refused("--stored-difficulty", stored, "--teacher-cache", tmp_path / "fewer")
    assert "was scored with the teacher cache" in line
    assert "1 teacher caches" in refused("--stored-difficulty", f"{stored}:{stored}")
    assert "KL(teacher || student)" in refused(
        "--stored-difficulty", stored, "--difficulty", "prior"
    )


def test_whole_vocabulary_cache_equals_the_online_teacher(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    command(
        "sekd_fairseq.build_cache", data, "--path", teacher, "--output", tmp_path / "cache", "--cpu",
        "--subset", "train,valid", "--top-k", "0",
    )  # fmt: skip
    sgd = (*SE_KD, "--optimizer", "sgd", "--lr", "0.1", "--max-update", "8")
    cached = train(data, tmp_path / "a", *sgd, "--teacher-cache", tmp_path / "cache")
    online = train(data, tmp_path / "b", *sgd, "--teacher-path", teacher)
    for prefix in ("", "valid_"):
        for one, other in zip(records(cached, prefix), records(online, prefix), strict=True):
            for key in logged(prefix):
                a, b = float(one[prefix + key]), float(other[prefix + key])
                # Float16 in the cache moves single tokens across the threshold.
                limit = 0.08 if "hard" in key else 5e-3
                assert a == pytest.approx(b, rel=limit, abs=5e-3), (prefix, key, one, other)
    a, b = (parameters(tmp_path / name / "checkpoint_last.pt") for name in "ab")
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)  # float16 in the cache
    half = train(data, tmp_path / "half", *sgd, "--teacher-path", teacher, "--teacher-bf16")
    for one, other in zip(records(online, ""), records(half, ""), strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=0.02)
    state = torch.load(tmp_path / "b" / "checkpoint_last.pt", map_location="cpu")
    assert not any("teacher" in key for key in state["model"])
    plain = torch.load(tmp_path / "a" / "checkpoint_last.pt", map_location="cpu")
    assert state["model"].keys() == plain["model"].keys()
    assert len(state["last_optimizer_state"]["param_groups"][0]["params"]) == len(
        plain["last_optimizer_state"]["param_groups"][0]["params"]
    )
    line = error_line(
        train(
            data, tmp_path / "c", *SE_KD, "--teacher-path", teacher, "--teacher-cache",
            tmp_path / "cache", check=False,
        )
    )  # fmt: skip
    assert "found both" in line
    line = error_line(train(data, tmp_path / "c", *SE_KD, "--teacher-path", "no.pt", check=False))
    assert "no.pt" in line


def test_the_student_takes_the_caches_temperature(
    data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    warm = tmp_path / "warm"
    command(
        "sekd_fairseq.build_cache", data, "--path", teacher, "--output", warm, "--cpu", "--subset",
        "train,valid", "--top-k", "0", "--temperature", "2",
    )  # fmt: skip
    base = (*SE_KD, "--lambda-max", "0", "--alpha", "0.6", "--max-update", "1", "--lr", "1e-9")
    log = train(data, tmp_path / "save", *base, "--teacher-cache", warm)
    from sekd_fairseq.checkpoints import load_models
    from sekd_fairseq.logits import token_logits
    from sekd_fairseq.splits import load_split, token_batches

    # By hand, from the models themselves: 0.6 * 4 * KL at temperature 2, 0.4 * CE at 1.
    total = kl_sum = tokens = 0.0
    paths = (tmp_path / "save" / "checkpoint_last.pt", teacher)
    student, teach = (load_models([str(p)], str(data), torch.device("cpu")) for p in paths)
    dataset = load_split(student[2], "valid", str(data))
    for batch in token_batches(dataset, range(len(dataset)), 300):
        sample = dataset.collater([dataset[i] for i in batch])
        ((target, z),) = token_logits(student[0], sample, 1)
        ((_, t),) = token_logits(teach[0], sample, 1)
        log_q, log_p = (z / 2).log_softmax(-1), (t / 2).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        nll = -z.log_softmax(-1).gather(1, target.unsqueeze(1))
        total += float(0.6 * 4 * kl.sum() + 0.4 * nll.sum())
        kl_sum += float(kl.sum())
        tokens += len(target)
    valid = records(log, "valid_")[-1]
    assert float(valid["valid_loss"]) == pytest.approx(total / tokens / math.log(2), rel=2e-3)
    assert float(valid["valid_difficulty"]) == pytest.approx(kl_sum / tokens, rel=2e-3)
    shutil.copytree(cache / "valid", tmp_path / "mixed" / "valid")
    shutil.copytree(warm / "train", tmp_path / "mixed" / "train")
    line = error_line(
        train(data, tmp_path / "no", *base, "--teacher-cache", tmp_path / "mixed", check=False)
    )
    assert "temperature" in line


def test_sequence_level_distillation(data: Path, teacher: Path, tmp_path: Path) -> None:
    generated = tmp_path / "train.out"
    generate = (
        "fairseq_cli.generate", data, *PLUGIN, "--path", teacher, "--gen-subset", "train", "--cpu",
        "--beam", "2", "--max-len-b", "12",
    )  # fmt: skip
    generated.write_text(command(*generate))
    distilled = tmp_path / "distilled"
    out = command(
        "sekd_fairseq.distilled_data", data, "--generated", generated, "--output", distilled
    )
    assert "203 targets" in out
    from fairseq.data import Dictionary, indexed_dataset

    dictionary = Dictionary.load(str(data / "dict.de.txt"))
    written = indexed_dataset.make_dataset(str(distilled / "train.en-de.de"), "mmap")
    texts = {
        int(line[2:].split("\t")[0]): line.split("\t")[2]
        for line in generated.read_text().splitlines()
        if line.startswith("D-")
    }
    assert len(written) == 203
    assert all(dictionary.string(written[i]) == texts[i] for i in range(203))
    # SE-KD on the distilled targets, with a cache of their own.
    command(
        "sekd_fairseq.build_cache", distilled, "--path", teacher, "--output", tmp_path / "cache",
        "--cpu", "--top-k", "6",
    )  # fmt: skip
    train(distilled, tmp_path / "save", *SE_KD, "--teacher-cache", tmp_path / "cache")
    # The cache of the original targets is refused, and so is what is no list of pieces.
    again = ("--generated", generated, "--output", distilled)
    line = error_line(command("sekd_fairseq.distilled_data", data, *again, check=False))
    assert "expected a new directory, found one with files" in line
    generated.write_text(generated.read_text().replace("H-7\t", "H-7\t0.1\tno▁symbol "))
    line = error_line(
        command(
            "sekd_fairseq.distilled_data", data, "--generated", generated, "--output",
            tmp_path / "no", check=False,
        )
    )  # fmt: skip
    assert "sentence 7" in line and not list(tmp_path.glob("no*")) + list(tmp_path.glob(".no*"))
