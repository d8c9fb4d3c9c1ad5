"""What cannot work ends in one line that says what would."""

import multiprocessing
import signal
import time
from pathlib import Path

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from .conftest import command, error_line, read_settings_once, train, train_arguments
from .training import PLUGIN, SE_KD

CACHED_KD = ("--criterion", "cached_kd", "--teacher-cache", "CACHE")

CACHED = (*SE_KD, "--teacher-cache", "CACHE")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((*SE_KD,), "--teacher-cache DIR"),
        ((*SE_KD, "--task", "translation"), "--task self_evolution_kd"),
        ((*SE_KD, "--teacher-cache", "nowhere"), "nowhere"),
        ((*SE_KD, "--teacher-cache", "CACHE:CACHE"), "1 data"),
        ((*CACHED, "--lambda-max", "1"), "below 1"),
    ],
)
def test_wrong_use_ends_with_one_line(
    data: Path, cache: Path, tmp_path: Path, given: tuple[object, ...], words: str
) -> None:
    line_given = [str(word).replace("CACHE", str(cache)) for word in given]
    line = error_line(train(data, tmp_path / "save", *line_given, check=False))
    assert words in line
    assert not list((tmp_path / "save").glob("*.pt"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((*CACHED, "--gamma", "-1", "--gamma-type", "absolute"), "0 or more"),
        ((*CACHED, "--beta", "high"), "confidence"),
        ((*CACHED, "--alpha", "2"), "--alpha"),
        ((*CACHED, "--missing-mass", "uniform", "--integration", "student"), "linear"),
        ((*CACHED, "--sekd-chunk-tokens", "-1"), "0 or more"),
        (
            (*CACHED, "--sekd-chunk-tokens", "8", "--gamma-type", "quantile"),
            "--gamma-type quantile",
        ),
        ((*CACHED_KD, "--select", "batch", "--sekd-chunk-tokens", "8"), "--select batch"),
        ((*CACHED_KD, "--divergence", "atkd", "--sekd-chunk-tokens", "8"), "--divergence atkd"),
        ((*CACHED_KD, "--divergence", "atkd", "--select", "queue"), "--select all"),
        (
            (*CACHED, "--integration", "evolved", "--divergence", "tvd"),
            "grows with the ratio",
        ),
        ((*CACHED_KD, "--select", "batch", "--select-share", "1"), "--select-share"),
        ((*CACHED_KD, "--select", "queue", "--queue-size", "0"), "--queue-size"),
        # What would have no effect is not taken in silence.
        ((*CACHED_KD, "--select-share", "0.5"), "--select-share: has an effect with --select"),
        ((*CACHED_KD, "--select", "batch", "--queue-size", "9"), "--queue-size: has an effect"),
        ((*CACHED_KD, "--divergence-weight", "0.3"), "--divergence-weight 0.3: has no effect"),
        (
            (*CACHED, "--schedule", "step", "--schedule-scale", "2"),
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
def test_options_that_do_not_fit_are_refused_before_the_data_are_read(
    data: Path, given: tuple[str, ...], words: str
) -> None:
    """By task or criterion, which fairseq-train makes first, with the message that it ends with (above)."""
    read_settings_once()
    line = [str(word) for word in train_arguments(data, Path("save"), *given)[1:]]
    cfg = convert_namespace_to_omegaconf(
        options.parse_args_and_arch(options.get_training_parser(), line)
    )
    with pytest.raises(SystemExit) as refused:
        tasks.setup_task(cfg.task).build_criterion(cfg.criterion)
    assert words in error_line(str(refused.value))


def test_what_cannot_work_ends_with_one_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = error_line(
        train(data, tmp_path / "file" / "save", "--criterion", "cross_entropy", check=False)
    )
    assert str(tmp_path / "file") in line


def test_a_beginning_that_does_not_fit_ends_with_one_line(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    ce = ("--criterion", "cross_entropy", "--finetune-from-model")
    for given, words in (
        ((teacher, "--encoder-embed-dim", "32"), "architectures match. (Error"),
        (("nowhere.pt",), "nowhere.pt does not exist"),
        ((teacher, "--reset-optimizer"), "can not be set together"),
        ((teacher, "--restore-file", teacher), "can not be specified together"),
    ):
        line = error_line(train(data, tmp_path, *ce, *given, check=False))
        assert words in line and len(line) < 600


def test_data_that_are_not_there_end_with_one_line(tmp_path: Path) -> None:
    line = error_line(
        train(tmp_path / "bin", tmp_path, "--criterion", "cross_entropy", check=False)
    )
    assert str(tmp_path / "bin") in line and "check the path" in line


def test_combined_validation_has_no_subsets(data: Path, tmp_path: Path) -> None:
    sets = (
        "--criterion",
        "cross_entropy",
        "--valid-subset",
        "valid,test",
        "--combine-valid-subsets",
    )
    line = error_line(train(data, tmp_path, *sets, check=False))
    assert "--combine-valid-subsets" in line and "valid,test" in line


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("bleu", "--best-checkpoint-metric bleu: expected --eval-bleu with it"),
        (
            "nll_loss",
            "--best-checkpoint-metric nll_loss: --criterion cross_entropy logs loss alone",
        ),
    ],
)
def test_the_best_checkpoint_is_chosen_by_what_is_logged(
    data: Path, tmp_path: Path, metric: str, told: str
) -> None:
    words = ("--criterion", "cross_entropy", "--best-checkpoint-metric", metric)
    out = train(data, tmp_path, *words, check=False)
    assert told in error_line(out) and "num_updates" not in out  # before the first update


def test_what_is_logged_may_choose_the_best_checkpoint(data: Path, tmp_path: Path) -> None:
    words = ("--max-update", 1, "--no-save", "--best-checkpoint-metric")
    smoothed = ("--criterion", "label_smoothed_cross_entropy")
    train(data, tmp_path, *words, "nll_loss", *smoothed)
    train(data, tmp_path, *words, "nll_loss", "--criterion", "cross_entropy", "--sentence-avg")
    train(data, tmp_path, *words, "bleu", "--disable-validation", *smoothed)


def test_eval_lm_is_refused_in_one_line(data: Path, teacher: Path) -> None:
    out = command(
        "fairseq_cli.eval_lm", data, *PLUGIN, "--path", teacher, "--gen-subset", "test", "--cpu",
        check=False,
    )  # fmt: skip
    assert "fairseq-validate" in error_line(out)


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
