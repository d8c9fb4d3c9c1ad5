"""The plugin through fairseq's own commands, as a user runs them."""

import json
import math
import multiprocessing
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sacrebleu.metrics import BLEU

from sekd_fairseq.evaluate import read_generated

from .conftest import ROOT, binarise, command, error_line, parameters, train, train_arguments

PLUGIN = ("--user-dir", ROOT / "sekd_fairseq", "--task", "self_evolution_kd")
SE_KD = ("--criterion", "self_evolution_kd")
CACHED_KD = ("--criterion", "cached_kd", "--teacher-cache", "CACHE")
GRADIENTS = {"easy_gradient", "hard_gradient"}  # in training only
LOGGED = {
    "loss", "nll_loss", "ppl", "difficulty", "gamma", "hard_share", "hard_lambda", "kl_easy",
    "kl_hard", "easy_gradient", "hard_gradient", "agreement",
}  # fmt: skip


def logged(prefix: str) -> set[str]:
    """What is logged in training ("", "train_") or in validation ("valid_")."""
    return LOGGED - GRADIENTS if prefix == "valid_" else LOGGED


def records(output: str, prefix: str) -> list[dict[str, str]]:
    """The JSON log records that have ``{prefix}num_updates``."""
    found = []
    for line in output.splitlines():
        if "{" in line and f'"{prefix}num_updates"' in line:
            found.append(json.loads(line[line.index("{") :]))
    return found


@pytest.fixture(scope="module")
def student(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A trained SE-KD student and the log of its training."""
    folder = tmp_path_factory.mktemp("student")
    log = train(data, folder, *SE_KD, "--teacher-cache", cache, "--max-update", "40")
    return folder, log


def test_log_has_every_figure_in_training_and_validation(student: tuple[Path, str]) -> None:
    for prefix in ("", "valid_", "train_"):
        record = records(student[1], prefix)[-1]
        assert {key for key in LOGGED if f"{prefix}{key}" in record} == logged(prefix)
        for key in logged(prefix):
            assert math.isfinite(float(record[f"{prefix}{key}"])), (prefix, key)
        assert 0 <= float(record[f"{prefix}hard_share"]) <= 1
        hard, easy = float(record[f"{prefix}kl_hard"]), float(record[f"{prefix}kl_easy"])
        assert easy < float(record[f"{prefix}gamma"]) + 0.1 and hard > easy
    losses = [float(record["loss"]) for record in records(student[1], "")]
    assert losses[-1] < 0.7 * losses[0]


def test_alpha_zero_is_fairseqs_label_smoothed_cross_entropy(
    data: Path, cache: Path, tmp_path: Path
) -> None:
    # SGD, because Adam turns rounding of a gradient near zero into a step of full size.
    smooth = ("--label-smoothing", "0.1", "--optimizer", "sgd", "--lr", "0.5")
    stock = train(data, tmp_path / "a", "--criterion", "label_smoothed_cross_entropy", *smooth)
    ours = train(
        data, tmp_path / "b", *SE_KD, "--teacher-cache", cache, "--alpha", "0", *smooth
    )  # fmt: skip
    for prefix in ("", "valid_"):
        pairs = list(zip(records(stock, prefix), records(ours, prefix), strict=True))
        assert pairs
        for one, other in pairs:
            assert one[f"{prefix}loss"] == other[f"{prefix}loss"]
            assert one[f"{prefix}nll_loss"] == other[f"{prefix}nll_loss"]
    a, b = (parameters(tmp_path / name / "checkpoint_last.pt") for name in "ab")
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_no_ratio_is_word_level_kd_whatever_the_other_options(
    data: Path, cache: Path, tmp_path: Path
) -> None:
    base = (*SE_KD, "--teacher-cache", cache, "--lambda-max", "0", "--max-update", "6")
    train(data, tmp_path / "a", *base)
    train(
        data, tmp_path / "b", *base, "--integration", "target", "--beta", "confidence",
        "--schedule", "exp",
    )  # fmt: skip
    a, b = (parameters(tmp_path / name / "checkpoint_last.pt") for name in "ab")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    # And so is the baselines' criterion with its defaults.
    log = train(
        data, tmp_path / "c", "--criterion", "cached_kd", "--teacher-cache", cache,
        "--max-update", "6",
    )  # fmt: skip
    c = parameters(tmp_path / "c" / "checkpoint_last.pt")
    torch.testing.assert_close(a, c, rtol=0, atol=0)
    for prefix in ("", "valid_"):
        record = records(log, prefix)[-1]
        assert float(record[f"{prefix}selected"]) == 1.0
        assert 0 < float(record[f"{prefix}kl"]) < 10 and f"{prefix}agreement" in record


@pytest.mark.parametrize(
    "divergence", ["reverse_kl", "jsd", "skew_forward_kl", "adaptive_kl", "atkd"]
)
def test_baselines_learn(data: Path, cache: Path, tmp_path: Path, divergence: str) -> None:
    weighted = divergence in ("jsd", "skew_forward_kl")
    weight = ("--divergence-weight", "0.3") if weighted else ()
    log = train(
        data, tmp_path, "--criterion", "cached_kd", "--teacher-cache", cache, "--divergence",
        divergence, *weight, "--max-update", "30", "--disable-validation",
    )  # fmt: skip
    kl = [float(record["kl"]) for record in records(log, "")]
    assert kl[-1] < 0.8 * kl[0]


@pytest.mark.parametrize(
    ("options", "alpha", "beta", "difficulty"),
    [
        (("--integration", "blend"), 1.0, "0.7", "prior"),
        (("--integration", "blend", "--beta", "0.6", "--alpha", "0.9"), 0.9, "0.6", "prior"),
        (("--integration", "evolved", "--difficulty", "nll"), 0.7, "0.5", "nll"),
        ((), 0.7, "0.5", "teacher"),
    ],
)
def test_a_reading_brings_its_partners(
    data: Path,
    cache: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    alpha: float,
    beta: str,
    difficulty: str,
) -> None:
    log = train(
        data, tmp_path / "save", *SE_KD, "--teacher-cache", cache, *options, "--max-update", "20"
    )
    assert f"alpha {alpha}, beta {beta}, difficulty {difficulty}" in log
    first, *_, last = (float(record["nll_loss"]) for record in records(log, ""))
    assert last < first
    command(
        "sekd_fairseq.score", data, "--path", tmp_path / "save" / "checkpoint_last.pt", "--cpu",
        "--run", tmp_path / "run",
    )  # fmt: skip
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["method"] == f"se_kd_{options[1] if options else 'target'}"
    criterion = record["hyperparameters"]["criterion"]
    found = tuple(criterion[key] for key in ("alpha", "beta", "difficulty"))
    assert found == (alpha, beta, difficulty)


@pytest.mark.parametrize("select", ["batch", "queue"])
def test_selective_kd_distils_its_share_and_resumes(
    data: Path, cache: Path, tmp_path: Path, select: str
) -> None:
    base = (
        "--criterion", "cached_kd", "--teacher-cache", cache, "--select", select,
        "--select-share", "0.4", "--disable-validation",
        *(("--queue-size", "500") if select == "queue" else ()),
    )  # fmt: skip
    train(data, tmp_path / "whole", *base, "--max-update", "14")
    train(data, tmp_path / "resumed", *base, "--max-update", "9")
    log = train(data, tmp_path / "resumed", *base, "--max-update", "14")
    shares = [float(record["selected"]) for record in records(log, "")]
    # A batch rounds its share; a queue of past tokens lags behind a student that learns.
    assert all(abs(share - 0.4) < (0.02 if select == "batch" else 0.3) for share in shares)
    a, b = (parameters(tmp_path / name / "checkpoint_last.pt") for name in ("whole", "resumed"))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_chunked_training_equals_plain_training(data: Path, cache: Path, tmp_path: Path) -> None:
    # SGD, because Adam turns rounding of a gradient near zero into a step of full size.
    base = (
        *SE_KD, "--teacher-cache", cache, "--label-smoothing", "0.1", "--optimizer", "sgd", "--lr",
        "0.5",
    )  # fmt: skip
    plain = train(data, tmp_path / "a", *base)
    chunked = train(data, tmp_path / "b", *base, "--sekd-chunk-tokens", "7")
    for prefix in ("", "valid_"):
        for one, other in zip(records(plain, prefix), records(chunked, prefix), strict=True):
            for key in logged(prefix):
                a, b = float(one[prefix + key]), float(other[prefix + key])
                assert a == pytest.approx(b, rel=2e-3, abs=2e-4), (prefix, key, one, other)
    a, b = (parameters(tmp_path / name / "checkpoint_last.pt") for name in "ab")
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_a_model_without_plain_projection_trains_unchunked(
    data: Path, cache: Path, tmp_path: Path
) -> None:
    base = train_arguments(
        data, tmp_path, *SE_KD, "--teacher-cache", cache, "--sekd-chunk-tokens", "7", "--arch",
        "fconv", "--encoder-layers", "[(16, 3)]", "--decoder-layers", "[(16, 3)]",
        "--encoder-embed-dim", "16", "--decoder-embed-dim", "16", "--decoder-out-embed-dim", "16",
        "--max-update", "4",
    )  # fmt: skip
    log = command(*(word for word in base if word != "--share-all-embeddings"))
    assert log.count("--sekd-chunk-tokens has no effect") == 1
    assert len(records(log, "")) == 4


def test_adaptive_softmax_is_refused(data: Path, cache: Path, tmp_path: Path) -> None:
    base = train_arguments(
        data, tmp_path, *SE_KD, "--teacher-cache", cache, "--adaptive-softmax-cutoff", "8",
    )  # fmt: skip
    out = command(*(word for word in base if word != "--share-all-embeddings"), check=False)
    assert "adaptive softmax" in error_line(out)


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
        "--beam", "2",
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
    assert "exists" in line
    generated.write_text(generated.read_text().replace("H-7\t", "H-7\t0.1\tno▁symbol "))
    line = error_line(
        command(
            "sekd_fairseq.distilled_data", data, "--generated", generated, "--output",
            tmp_path / "no", check=False,
        )
    )  # fmt: skip
    assert "sentence 7" in line and not list(tmp_path.glob("no*")) + list(tmp_path.glob(".no*"))


def test_split_batches_and_workers_do_not_change_the_training(
    data: Path, cache: Path, tmp_path: Path
) -> None:
    base = (
        *SE_KD, "--teacher-cache", cache, "--max-update", "8", "--max-epoch", "1",
        "--disable-validation", "--no-epoch-checkpoints", "--log-interval", "1",
    )  # fmt: skip
    one = train(data, tmp_path / "a", *base, "--batch-size", "8", "--max-tokens", "100000")
    again = train(
        data, tmp_path / "b", *base, "--batch-size", "8", "--max-tokens", "100000",
        "--num-workers", "2",
    )  # fmt: skip
    assert [r["loss"] for r in records(one, "")] == [r["loss"] for r in records(again, "")]
    a, b = (parameters(tmp_path / name / "checkpoint_last.pt") for name in "ab")
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_resumed_training_ends_as_one_that_was_never_stopped(
    data: Path, cache: Path, tmp_path: Path
) -> None:
    base = (
        *SE_KD, "--teacher-cache", cache, "--gamma-type", "running_quantile", "--lr", "1e-3",
        "--lambda-warmup-updates", "12",
    )  # fmt: skip
    train(data, tmp_path / "whole", *base, "--max-update", "14", "--save-interval-updates", "9")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    halfway = tmp_path / "resumed" / "checkpoint_last.pt"
    shutil.copy(next((tmp_path / "resumed").glob("checkpoint_*_9.pt")), halfway)
    state = torch.load(halfway, map_location="cpu", weights_only=True)
    running = state["extra_state"]["SelfEvolutionKDTask"]
    assert 0 < running["running_gamma"] != 1.0 and running["updates"] == 9
    log = train(data, tmp_path / "resumed", *base, "--max-update", "14")
    assert "Loaded checkpoint" in log
    whole, resumed = (
        parameters(tmp_path / name / "checkpoint_last.pt") for name in ("whole", "resumed")
    )
    torch.testing.assert_close(whole, resumed, rtol=0, atol=0)
    # On other data it goes on with the threshold and the ratio too, not with those of a start.
    shutil.copytree(tmp_path / "whole", tmp_path / "other")
    shutil.copy(
        halfway.with_name(next(tmp_path.glob("other/*_9.pt")).name),
        tmp_path / "other" / halfway.name,
    )
    train(data, tmp_path / "other", *base, "--max-update", "10", "--reset-dataloader")
    state = torch.load(tmp_path / "other" / halfway.name, map_location="cpu", weights_only=True)
    again = state["extra_state"]["SelfEvolutionKDTask"]
    assert again["updates"] == 10 and again["running_gamma"] == pytest.approx(
        running["running_gamma"], rel=0.5
    )
    # Started once more, it ends where it ended; fairseq would make another update each time.
    log = train(data, tmp_path / "resumed", *base, "--max-update", "14")
    assert "done training before: 14 updates" in log and '"num_updates": "15"' not in log
    assert parameters(tmp_path / "resumed" / "checkpoint_last.pt").equal(whole)


def test_patience_counts_on_after_a_resume(data: Path, tmp_path: Path) -> None:
    """fairseq forgets the count: killed and resumed, a run would train for longer than one that was not."""
    # The loss falls and the largest is asked for: no validation is better than the first.
    base = (
        "--criterion", "cross_entropy", "--max-update", "50", "--save-interval-updates", "2",
        "--patience", "4", "--maximize-best-checkpoint-metric",
    )  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    log = train(data, whole, *base)
    assert "hasn't improved for last 4 runs" in log
    last = torch.load(whole / "checkpoint_last.pt", weights_only=True)
    count = last["extra_state"]["early_stopping"]
    assert count["num_runs"] == 4 and count["best"] == last["extra_state"]["best"]
    shutil.copytree(whole, resumed)
    updates = last["optimizer_history"][-1]["num_updates"]
    (halfway,) = resumed.glob(f"checkpoint_*_{updates - 4}.pt")
    shutil.copy(halfway, resumed / "checkpoint_last.pt")
    log = train(data, resumed, *base)
    assert "hasn't improved for last 4 runs" in log
    assert parameters(resumed / "checkpoint_last.pt").equal(
        parameters(whole / "checkpoint_last.pt")
    )
    # Out of patience it has ended: started once more, it trains no further.
    log = train(data, resumed, *base)
    assert "done training before: no gain in 4 validations" in log and "num_updates" not in log


def test_the_length_penalty_is_chosen_as_fairseq_would_translate(
    data: Path, student: tuple[Path, str], text: Path, tmp_path: Path
) -> None:
    words = (
        "fairseq_cli.generate", data, *PLUGIN, "--path", student[0] / "checkpoint_best.pt",
        "--gen-subset", "valid", "--cpu", "--beam", "4",
    )  # fmt: skip
    values, references = (0.0, 1.1, 3.0), (text / "valid.de").read_text().splitlines()
    expected = {}
    for value in values:
        (tmp_path / "one.out").write_text(command(*words, "--lenpen", value))
        lines = read_generated(tmp_path / "one.out", "D-", len(references))
        bleu = BLEU().corpus_score(lines, [references])
        expected[value] = (bleu.score, bleu.sys_len / bleu.ref_len)
    assert len(set(expected.values())) > 1
    generated = tmp_path / "valid.out"
    tune = (
        "sekd_fairseq.tune_lenpen", generated, "--run", tmp_path / "run", "--reference", text / "valid.de",
        "--target-lang", "de", "--values", *values,
    )  # fmt: skip
    for wrong, told in (("--lenpen=1 --nbest=4", "translate with --lenpen 0"),
                        ("--lenpen=0", "with --nbest as large as --beam")):  # fmt: skip
        generated.write_text(command(*words, *wrong.split()))
        assert told in error_line(command(*tune, check=False))
    generated.write_text(command(*words, "--lenpen", "0", "--nbest", "4"))
    printed = command(*tune)
    chosen = json.loads((tmp_path / "run" / "length_penalty.json").read_text())
    found = {row["lenpen"]: (row["bleu"], row["length_ratio"]) for row in chosen["grid"]}
    assert found == expected
    best = max(values, key=lambda value: expected[value][0])
    assert chosen["best"] == best and f"length penalty {best:g}, BLEU" in printed
    (generated.with_name("cut.out")).write_text(generated.read_text().partition("D-7")[0])
    line = error_line(command(*tune[:1], generated.with_name("cut.out"), *tune[2:], check=False))
    assert "expected translations of 21 sentences" in line


def test_prior_knowledge_can_come_in_slowly(data: Path, cache: Path, tmp_path: Path) -> None:
    base = (
        "--teacher-cache", cache, "--criterion", "self_evolution_kd", "--gamma-type", "absolute",
        "--gamma", "0", "--schedule", "step", "--log-interval", "1", "--max-update", "6",
        "--disable-validation",
    )  # fmt: skip
    log = train(data, tmp_path / "a", *base, "--lambda-warmup-updates", "4")
    ratios = [float(record["hard_lambda"]) for record in records(log, "")]
    assert ratios == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    line = error_line(
        train(data, tmp_path / "b", *base, "--lambda-warmup-updates", "-1", check=False)
    )
    assert "--lambda-warmup-updates: expected 0 or more, found -1" in line


def test_generate_interactive_and_validate(
    data: Path, student: tuple[Path, str], text: Path, tmp_path: Path
) -> None:
    best = student[0] / "checkpoint_best.pt"
    out = command(
        "fairseq_cli.generate", data, *PLUGIN, "--path", best, "--gen-subset", "test", "--cpu",
        "--beam", "2",
    )  # fmt: skip
    # 13 sentences are no multiple of 8: fairseq's default would drop 5 of them in silence.
    assert sum(line.startswith("D-") for line in out.splitlines()) == 13
    (tmp_path / "test.out").write_text(out)
    scores = command(
        "sekd_fairseq.evaluate", tmp_path / "test.out", "--run", tmp_path / "run", "--source",
        text / "test.en", "--reference", text / "test.de", "--target-lang", "de", "--lenpen", "1",
    )  # fmt: skip
    assert "13 sentences" in scores
    written = json.loads((tmp_path / "run" / "scores.json").read_text())["test"]
    assert written["bleu"]["signature"].startswith("nrefs:1") and written["sentences"] == 13
    assert written["lenpen"] == 1.0 and written["length_ratio"] > 0
    lines = (tmp_path / "run" / "hyps" / "test.ref.txt").read_text()
    assert lines == (text / "test.de").read_text()
    out = command(
        "fairseq_cli.interactive", data, *PLUGIN, "--path", best, "--cpu", "--input",
        text / "valid.en",
    )  # fmt: skip
    assert sum(line.startswith("D-") for line in out.splitlines()) == 21
    out = command(
        "fairseq_cli.validate", data, "--user-dir", ROOT / "sekd_fairseq", "--path", best, "--cpu",
        "--log-format", "json", "--task", "self_evolution_kd", "--max-tokens", "300",
    )  # fmt: skip
    assert "kl_hard" in out
    # Fewer translations than references: counted and refused.
    (tmp_path / "cut.out").write_text(
        "".join((tmp_path / "test.out").read_text().partition("D-7")[0])
    )
    line = error_line(
        command(
            "sekd_fairseq.evaluate",
            tmp_path / "cut.out",
            "--run",
            tmp_path / "run2",
            "--source",
            text / "test.en",
            "--reference",
            text / "test.de",
            "--target-lang",
            "de",
            check=False,
        )
    )
    assert "expected 13 translations" in line and not (tmp_path / "run2").exists()


def test_validation_sees_every_sentence(student: tuple[Path, str]) -> None:
    # 21 sentences in batches that are no multiple of 8.
    record = records(student[1], "valid_")[-1]
    batches = 21 / float(record["valid_bsz"])
    assert batches == pytest.approx(round(batches), abs=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((*SE_KD,), "--teacher-cache DIR"),
        ((*SE_KD, "--task", "translation"), "--task self_evolution_kd"),
        ((*SE_KD, "--teacher-cache", "nowhere"), "nowhere"),
        ((*SE_KD, "--teacher-cache", "CACHE", "--lambda-max", "1"), "below 1"),
        (
            (*SE_KD, "--teacher-cache", "CACHE", "--gamma", "-1", "--gamma-type", "absolute"),
            "0 or more",
        ),
        ((*SE_KD, "--teacher-cache", "CACHE", "--beta", "high"), "confidence"),
        ((*SE_KD, "--teacher-cache", "CACHE", "--alpha", "2"), "--alpha"),
        (
            (
                *(*SE_KD, "--teacher-cache", "CACHE", "--missing-mass", "uniform"),
                *("--integration", "student"),
            ),
            "linear",
        ),
        ((*SE_KD, "--teacher-cache", "CACHE:CACHE"), "1 data"),
        ((*SE_KD, "--teacher-cache", "CACHE", "--sekd-chunk-tokens", "-1"), "0 or more"),
        (
            (
                *SE_KD,
                "--teacher-cache",
                "CACHE",
                "--sekd-chunk-tokens",
                "8",
                "--gamma-type",
                "quantile",
            ),
            "--gamma-type quantile",
        ),
        ((*CACHED_KD, "--select", "batch", "--sekd-chunk-tokens", "8"), "--select batch"),
        ((*CACHED_KD, "--divergence", "atkd", "--sekd-chunk-tokens", "8"), "--divergence atkd"),
        ((*CACHED_KD, "--divergence", "atkd", "--select", "queue"), "--select all"),
        (
            (
                *(*SE_KD, "--teacher-cache", "CACHE", "--integration", "evolved"),
                *("--divergence", "tvd"),
            ),
            "grows with the ratio",
        ),
        ((*CACHED_KD, "--select", "batch", "--select-share", "1"), "--select-share"),
        ((*CACHED_KD, "--select", "queue", "--queue-size", "0"), "--queue-size"),
        # What would have no effect is not taken in silence.
        ((*CACHED_KD, "--select-share", "0.5"), "--select-share: has an effect with --select"),
        ((*CACHED_KD, "--select", "batch", "--queue-size", "9"), "--queue-size: has an effect"),
        ((*CACHED_KD, "--divergence-weight", "0.3"), "--divergence-weight 0.3: has no effect"),
        (
            (*SE_KD, "--teacher-cache", "CACHE", "--schedule", "step", "--schedule-scale", "2"),
            "--schedule-scale 2.0: has no effect with --schedule step",
        ),
        (
            (*CACHED_KD, "--alpha", "1", "--label-smoothing", "0.1"),
            "--label-smoothing 0.1: has no effect",
        ),
        (
            ("--criterion", "cross_entropy", "--teacher-cache", "CACHE"),
            "has no effect with --criterion cross_entropy",
        ),
        ((*CACHED_KD, "--teacher-bf16"), "expect --teacher-path"),
        ((*CACHED_KD, "--divergence", "jsd", "--divergence-weight", "0"), "--divergence-weight"),
        ((*CACHED_KD, "--divergence", "skew_forward_kl", "--missing-mass", "uniform"), "linear"),
        ((*CACHED_KD, "--divergence", "reverse_kl", "--missing-mass", "sampled"), "not sampled"),
    ],
)
def test_wrong_use_ends_with_one_line(
    data: Path, cache: Path, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    given = [str(option).replace("CACHE", str(cache)) for option in options]
    line = error_line(train(data, tmp_path / "save", *given, check=False))
    assert words in line
    assert not list((tmp_path / "save").glob("*.pt"))


def test_sharded_combined_and_upsampled_data(
    data: Path, teacher: Path, cache: Path, text: Path, tmp_path: Path
) -> None:
    # A second data directory whose training set is in two parts, train and train1.
    other = tmp_path / "other"
    other.mkdir()
    for language in ("en", "de"):
        lines = (text / f"train.{language}").read_text().splitlines(keepends=True)
        (other / f"train.{language}").write_text("".join(lines[:60]))
        (other / f"valid.{language}").write_text("".join(lines[60:100]))
    second = binarise(other, tmp_path / "bin", dictionary=data)
    for path in list(second.glob("valid.*")):
        path.rename(second / path.name.replace("valid.", "train1."))
    second_cache = tmp_path / "cache"
    command(
        "sekd_fairseq.build_cache", second, "--path", teacher, "--output", second_cache, "--cpu",
        "--subset", "train,train1", "--top-k", "9",
    )  # fmt: skip
    log = train(
        f"{data}:{second}", tmp_path / "save", *SE_KD, "--teacher-cache",
        f"{cache}:{second_cache}", "--max-epoch", "4", "--max-update", "1000",
        "--upsample-primary", "3",
    )  # fmt: skip
    epochs = [float(record["train_loss"]) for record in records(log, "train_")]
    assert len(epochs) == 4 and epochs[-1] < epochs[0]
    # Only one cache for two directories: one clear line.
    line = error_line(
        train(f"{data}:{second}", tmp_path / "save2", *SE_KD, "--teacher-cache", cache, check=False)
    )
    assert "2 data directories" in line


def test_truncated_sources_several_valid_sets_and_dummy_batches(
    data: Path, cache: Path, text: Path, tmp_path: Path
) -> None:
    log = train(
        data, tmp_path, *SE_KD, "--teacher-cache", cache, "--truncate-source",
        "--max-source-positions", "6", "--valid-subset", "valid,test", "--max-update", "6",
        "--required-batch-size-multiple", "8", "--update-freq", "3", "--batch-size", "37",
    )  # fmt: skip
    assert 'num_updates": "6' in log
    assert "valid_loss" in log and "test_loss" in log


def test_hydra_configuration(data: Path, cache: Path, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.mkdir()
    (config / "train.yaml").write_text(
        f"""
common: {{user_dir: {ROOT / "sekd_fairseq"}, cpu: true, log_format: json, log_interval: 1}}
task: {{_name: self_evolution_kd, data: {data}, teacher_cache: {cache}}}
criterion: {{_name: self_evolution_kd, lambda_max: 0.4, gamma_type: absolute, gamma: 0.5}}
model: {{_name: transformer, share_all_embeddings: true,
        encoder: {{embed_dim: 32, ffn_embed_dim: 32, layers: 1, attention_heads: 2}},
        decoder: {{embed_dim: 32, ffn_embed_dim: 32, layers: 1, attention_heads: 2}}}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
dataset: {{max_tokens: 300}}
optimization: {{max_update: 5, lr: [0.005]}}
checkpoint: {{save_dir: {tmp_path / "save"}, no_epoch_checkpoints: true}}
"""
    )
    out = command(
        "fairseq_cli.hydra_train",
        "--config-dir",
        config,
        "--config-name",
        "train",
        cwd=tmp_path,
        fresh=True,
    )
    assert (tmp_path / "save" / "checkpoint_last.pt").exists(), out
    command(
        "fairseq_cli.generate", data, *PLUGIN, "--path", tmp_path / "save" / "checkpoint_last.pt",
        "--gen-subset", "test", "--cpu",
    )  # fmt: skip


def readme_block(after: str, language: str) -> str:
    """The first block of a language after some words of the README."""
    rest = (ROOT / "README.md").read_text(encoding="utf-8").split(after, 1)[1]
    return rest.split(f"```{language}\n", 1)[1].split("```", 1)[0]


def test_the_readmes_hydra_configuration_trains(data: Path, cache: Path, tmp_path: Path) -> None:
    """As it stands, from a directory with a space, where its relative paths lie."""
    here = tmp_path / "a b"
    (here / "conf").mkdir(parents=True)
    text = readme_block("fairseq-hydra-train", "yaml")
    for name, place in (("DATA", data), ("CACHE", cache), ("sekd_fairseq", ROOT / "sekd_fairseq")):
        (here / name).symlink_to(place)
        assert f": {name}" in text
    (here / "conf" / "sekd.yaml").write_text(text)
    out = command(
        "fairseq_cli.hydra_train", "--config-dir", "conf", "--config-name", "sekd",
        "optimization.max_update=3", "common.cpu=true", cwd=here, fresh=True,
    )  # fmt: skip
    assert (here / "runs/mine/se_kd/checkpoints/checkpoint_best.pt").exists(), out


def test_every_option_is_listed() -> None:
    out = command("sekd_fairseq.options")
    for option in ("--teacher-cache", "--lambda-max", "--hf-model", "--select-share", "--alpha"):
        assert f"  {option} " in out


def test_what_cannot_work_ends_with_one_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = error_line(
        train(data, tmp_path / "file" / "save", "--criterion", "cross_entropy", check=False)
    )
    assert str(tmp_path / "file") in line


def test_eval_lm_is_refused_in_one_line(data: Path, teacher: Path) -> None:
    out = command(
        "fairseq_cli.eval_lm", data, *PLUGIN, "--path", teacher, "--gen-subset", "test", "--cpu",
        check=False,
    )  # fmt: skip
    assert "fairseq-validate" in error_line(out)


def test_eval_bleu_checkpoint_resumes(data: Path, cache: Path, tmp_path: Path) -> None:
    base = (*SE_KD, "--teacher-cache", cache, "--eval-bleu", "--eval-bleu-args", '{"beam": 1}')
    train(data, tmp_path / "save", *base, "--max-update", "6")
    log = train(data, tmp_path / "save", *base, "--max-update", "12")
    assert "Loaded checkpoint" in log and "valid_bleu" in log


def test_a_malicious_checkpoint_is_refused(data: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, (f"open({str(tmp_path / 'owned')!r}, 'w')",))

    torch.save({"args": Evil()}, tmp_path / "evil.pt")
    out = command(
        "sekd_fairseq.build_cache", data, "--path", tmp_path / "evil.pt", "--output",
        tmp_path / "out", "--cpu", check=False,
    )  # fmt: skip
    assert "evil.pt" in error_line(out)
    assert not (tmp_path / "owned").exists()


def test_an_error_leaves_no_worker_behind_that_could_print(tmp_path: Path) -> None:
    """Loader workers once printed a traceback after the message, while the program ended."""
    from sekd_fairseq.errors import UserError, one_line_errors

    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    with pytest.raises(SystemExit, match="error: wrong"), one_line_errors():
        raise UserError("wrong")
    assert worker.exitcode == -signal.SIGKILL
