"""Trainings by fairseq's own command, as a user runs it."""

import json
import math
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from analysis.runs.errors import UserError, stop_workers
from sekd_fairseq.tasks.configuration import SelfEvolutionKDTaskConfig, check_options

from .conftest import binarise, command, error_line, parameters, train, train_arguments
from .training import LOGGED, SE_KD, logged, records


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
    # The two sum in another order, and how a processor sums in single precision is its own.
    torch.testing.assert_close(a, b, rtol=0, atol=3e-6)


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
        data, tmp_path / "save", *SE_KD, "--teacher-cache", cache, *options, "--max-update", "4"
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
    shorter = train(data, tmp_path / "resumed", *base, "--max-update", "13", check=False)
    assert "expected at most --max-update 13 updates, found 14" in error_line(shorter)
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
    # A training that begins from its weights has a patience of its own.
    log = train(
        data, tmp_path / "next", *base, "--finetune-from-model", whole / "checkpoint_last.pt"
    )
    assert "hasn't improved for last 4 runs" in log
    begun = torch.load(tmp_path / "next" / "checkpoint_last.pt", weights_only=True)
    assert begun["extra_state"]["early_stopping"]["best"] != count["best"]


def test_the_average_of_weights_counts_each_update_once(data: Path, tmp_path: Path) -> None:
    """--store-ema, of embeddings that encoder, decoder and output share."""
    base = (
        "--criterion", "cross_entropy", "--disable-validation", "--no-last-checkpoints",
        "--save-interval-updates", "1", "--max-update", "3",
    )  # fmt: skip
    for precision in ((), ("--ema-fp32",)):
        save = tmp_path / f"save{len(precision)}"
        train(data, save, *base, "--store-ema", "--ema-decay", "0.5", *precision)
        states = [
            torch.load(save / f"checkpoint_1_{update}.pt", map_location="cpu")
            for update in (1, 2, 3)
        ]
        for name, weight in states[0]["model"].items():
            # The average begins as the first weights, before the first update.
            expected = states[0]["extra_state"]["ema"][name]
            assert weight.shape == expected.shape
            for state in states[1:]:
                expected = (expected + state["model"][name]) / 2
            torch.testing.assert_close(states[2]["extra_state"]["ema"][name], expected)


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
    # What is trained on in the second epoch is looked at before the first.
    line = error_line(
        train(
            f"{data}:{second}", tmp_path / "save2", *SE_KD, "--teacher-cache", f"{cache}:{cache}",
            check=False,
        )
    )  # fmt: skip
    assert "expected 203 sentences (split 'train'), found 60 in de side of train" in line
    config = SelfEvolutionKDTaskConfig(data=f"{data}:{second}", train_sentences=5)
    with pytest.raises(UserError, match="--train-sentences 5: expected one data directory"):
        check_options(config)


def test_of_several_data_directories_no_loader_worker_outlives_its_epoch(data: Path) -> None:
    """torch would wait 5 s for each of them, once the next part is there."""
    for place, alive in ((str(data), 1), (f"{data}:{data}", 0)):
        words = list(map(str, train_arguments(place, Path("save"))))[1:]
        arguments = options.parse_args_and_arch(options.get_training_parser(), words)
        task = tasks.setup_task(convert_namespace_to_omegaconf(arguments).task)
        task.load_dataset("train")
        iterator = task.get_batch_iterator(
            task.dataset("train"), 300, num_workers=1, data_buffer_size=10
        )
        assert len(list(iterator.next_epoch_itr())) == len(iterator)
        end = time.monotonic() + (30 if alive == 0 else 1)  # a thread reads ahead, and ends it
        while len(multiprocessing.active_children()) != 0 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(multiprocessing.active_children()) == alive
        del task, iterator
        stop_workers()


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


def test_eval_bleu_checkpoint_resumes(data: Path, cache: Path, tmp_path: Path) -> None:
    base = (*SE_KD, "--teacher-cache", cache, "--eval-bleu", "--eval-bleu-args", '{"beam": 1}')
    train(data, tmp_path / "save", *base, "--max-update", "6")
    log = train(data, tmp_path / "save", *base, "--max-update", "12")
    assert "Loaded checkpoint" in log and "valid_bleu" in log


def test_a_part_of_the_training_set(data: Path, cache: Path, tmp_path: Path) -> None:
    """--train-sentences: always the same sentences, and the cache of all of them."""
    base = (*SE_KD, "--teacher-cache", cache, "--batch-size", "10", "--max-epoch", "1")
    options = (*base, "--max-update", "1000", "--no-epoch-checkpoints")
    updates = {}
    for name, words in {
        "all": (),
        "part": ("--train-sentences", "60"),
        "again": ("--train-sentences", "60"),
    }.items():
        log = train(data, tmp_path / name, *options, *words)
        updates[name] = int(records(log, "train_")[-1]["train_num_updates"])
    assert updates == {"all": 21, "part": 6, "again": 6}
    ends = [parameters(tmp_path / name / "checkpoint_last.pt") for name in ("part", "again")]
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    too_many = train(data, tmp_path / "more", *base, "--train-sentences", "204", check=False)
    assert "expected at most the 203 sentences" in error_line(too_many)
    other = train(data, tmp_path / "part", *base, "--train-sentences", "70", check=False)
    assert "--train-sentences 60 is now 70" in error_line(other)
    command(
        "sekd_fairseq.score", data, "--path", tmp_path / "part" / "checkpoint_last.pt", "--cpu",
        "--run", tmp_path / "run",
    )  # fmt: skip
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["hyperparameters"]["train_sentences"] == record["data"]["sentences"] == 60
