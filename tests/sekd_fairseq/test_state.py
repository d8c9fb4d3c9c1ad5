"""What a criterion learns over updates: kept by checkpoints, and learnt from whole updates alone."""

import json
import math
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from fairseq import checkpoint_utils

from sekd_fairseq.criterions.cached_kd import CachedKDConfig, CachedKDCriterion, of_all_processes
from sekd_fairseq.criterions.self_evolution_kd import (
    SelfEvolutionKDConfig,
    SelfEvolutionKDCriterion,
)
from sekd_fairseq.losses import Events
from sekd_fairseq.tasks.self_evolution_kd import SelfEvolutionKDTask

from .conftest import ROOT, command, train

TASK = SimpleNamespace(
    cfg=SimpleNamespace(teacher_cache="cache", teacher_path=None, stored_difficulty=None),
    target_dictionary=SimpleNamespace(pad=lambda: 1),
)


def validation(checkpoint: Path) -> tuple[float, dict[str, float]]:
    """Loss a token, nats, and the log of a checkpoint on its validation set, unrounded."""
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    criterion = task.build_criterion(cfg.criterion).eval()
    task.load_dataset("valid")
    batches = task.get_batch_iterator(task.dataset("valid"), max_tokens=300).next_epoch_itr(False)
    sums: dict[str, float] = {}
    for sample in batches:
        for key, value in task.valid_step(sample, model.eval(), criterion)[2].items():
            sums[key] = sums.get(key, 0.0) + float(value)
    return sums["loss"] / sums["sample_size"], sums


@pytest.mark.parametrize(
    "options",
    [
        ("--criterion", "self_evolution_kd", "--lambda-warmup-updates", "20"),
        ("--criterion", "cached_kd", "--select", "queue", "--queue-size", "300"),
    ],
    ids=["threshold", "queue"],
)
def test_validation_of_a_checkpoint_is_that_of_its_training(
    data: Path, cache: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    only_last = ("--validate-after-updates", "12")  # fairseq keeps the sums of all validations
    log = train(data, tmp_path, *options, "--teacher-cache", cache, *only_last)
    (line,) = (line for line in log.splitlines() if '"valid_num_updates": "12"' in line)
    told = json.loads(line[line.index("{") :])
    # Through fairseq's command, to the digits that it prints.
    printed = command(
        "fairseq_cli.validate", data, "--user-dir", ROOT / "sekd_fairseq", "--path",
        tmp_path / "checkpoint_last.pt", "--cpu", "--log-format", "json", "--max-tokens", "300",
        "--task", "self_evolution_kd",
    )  # fmt: skip
    line = next(line for line in printed.splitlines() if '"valid_loss"' in line)
    found = json.loads(line[line.index("{") :])
    keys = set(found) - {"epoch", "valid_wall"}
    assert {"valid_loss", "valid_agreement"} <= keys
    assert {key: found[key] for key in keys} == {key: told[key] for key in keys}
    # And unrounded, from the sums that fairseq keeps in the checkpoint.
    state = torch.load(tmp_path / "checkpoint_last.pt", map_location="cpu")
    meters = {meter[1]: meter[3] for meter in state["extra_state"]["metrics"]["valid"]}
    loss, sums = validation(tmp_path / "checkpoint_last.pt")
    bits = float(meters["loss"]["sum"] / meters["loss"]["count"])
    assert loss / math.log(2) == pytest.approx(bits, abs=1e-6)
    if "self_evolution_kd" in options:
        gamma = state["task_state"]["criterion"]["running_gamma"]
        assert sums["gamma"] / sums["ntokens"] == pytest.approx(gamma, rel=1e-6) != 1.0
        assert 0 < sums["hard_lambda"] / sums["hard"] < 0.5 * 12 / 20
        # The records that score writes are split by it as the validation was.
        command(
            "sekd_fairseq.score", data, "--path", tmp_path / "checkpoint_last.pt", "--cpu",
            "--teacher-cache", cache, "--run", tmp_path / "run", "--subset", "valid",
        )  # fmt: skip
        kl = pq.read_table(tmp_path / "run" / "tokens" / "valid" / "12.parquet")["kl"].to_numpy()
        assert kl.mean() == pytest.approx(sums["difficulty"] / sums["ntokens"], rel=1e-5)
        assert (kl > gamma).sum() == pytest.approx(sums["hard"], abs=1)
    else:
        assert state["task_state"]["criterion"]["queue"].numel() == 300
        assert 0 < sums["selected"] < sums["ntokens"]


def queue_criterion(size: int = 100) -> CachedKDCriterion:
    """Selective KD of half of the tokens, that has seen nothing."""
    cfg = CachedKDConfig(select="queue", queue_size=size, sentence_avg=False)  # type: ignore[call-arg]
    return CachedKDCriterion(cfg, TASK)


def learn(criterion: CachedKDCriterion, *parts: list[float]) -> float:
    """Give a criterion the parts of an update, of tokens with that cross entropy; their loss."""
    total = 0.0
    for part in parts:
        log_p = torch.tensor([[0.7, 0.3]]).log().repeat(len(part), 1)
        log_q = torch.tensor([[0.2, 0.8]]).log().repeat(len(part), 1)
        total += float(
            criterion.distill(Events(log_p, log_q, None), torch.tensor(part), {})[0].sum()
        )
    return total


def test_an_update_does_not_depend_on_how_it_is_cut_while_the_queue_is_empty() -> None:
    whole, cut = queue_criterion().train(), queue_criterion().train()
    assert learn(whole, [1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(
        learn(cut, [1.0], [2.0, 3.0], [4.0, 5.0])
    )
    for criterion in (whole, cut):
        criterion.end_update([])
    assert whole.queue is not None and cut.queue is not None
    assert whole.queue.values.tolist() == cut.queue.values.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_nothing_is_learnt_from_a_skipped_update_or_a_batch_that_fills_one_up() -> None:
    criterion = queue_criterion()
    criterion.train()  # as Trainer.train_step begins
    learn(criterion, [1.0], [float("nan"), 7.0])  # overflows: fairseq does not reduce its log
    criterion.train()
    learn(criterion, [2.0, 3.0])
    criterion.counted = False
    learn(criterion, [9.0])
    criterion.counted = True
    criterion.end_update([])
    # A process that has nothing else gives nothing, from the device that the others gather on.
    criterion.train()
    criterion.counted = False
    learn(criterion, [9.0])
    assert criterion.queue is not None
    assert [values.numel() for values in criterion.queue._pending] == [0]
    criterion.counted = True
    criterion.eval()
    learn(criterion, [8.0])
    assert criterion.running_state()["queue"].tolist() == [2.0, 3.0]


def test_a_skipped_update_does_not_count_for_the_threshold_and_the_warm_up() -> None:
    """fairseq reduces the log of an update that it made, and of no other."""
    cfg = SelfEvolutionKDConfig(lambda_warmup_updates=4, sentence_avg=False)  # type: ignore[call-arg]
    criterion = SelfEvolutionKDCriterion(cfg, TASK)
    criterion.train()  # skipped
    criterion.train()
    criterion.end_update([{"hard": 3.0, "ntokens": 4}])
    state = criterion.running_state()
    assert state == {"updates": 1, "running_gamma": pytest.approx(1.1331484530668263)}  # e^(1/8)
    again = SelfEvolutionKDCriterion(cfg, TASK)
    again.load_running_state(state)
    assert again.running_state() == state and again.settings_now().lambda_max == 0.125


def test_the_task_tells_which_batches_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "fairseq.tasks.translation.TranslationTask.train_step",
        lambda self, sample, model, criterion, *rest: (seen.append(criterion.counted), 0, {}),
    )
    task, criterion = object.__new__(SelfEvolutionKDTask), queue_criterion()
    for ignore_grad in (True, False):
        SelfEvolutionKDTask.train_step(task, {}, None, criterion, None, 0, ignore_grad=ignore_grad)
    assert seen == [False, True]


def gather(rank: int, store: str, results: Any) -> None:
    """In a process of two: what :func:`of_all_processes` gives."""
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    values = torch.tensor([[1.0], [2.0, 3.0, 4.0]][rank])
    results.put(of_all_processes(values).tolist())


def test_the_queue_takes_the_tokens_of_all_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=gather, args=(rank, f"file://{tmp_path / 'store'}", results))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [[1.0, 2.0, 3.0, 4.0]] * 2
    for worker in workers:
        worker.join()
    assert of_all_processes(torch.tensor([5.0])).tolist() == [5.0]  # one process
