"""A step asks the device for numbers as rarely as it can: each time, a GPU would be waited for."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.logging import metrics
from torch.utils._python_dispatch import TorchDispatchMode

from sekd_fairseq.criterions.self_evolution_kd import (
    SelfEvolutionKDConfig,
    SelfEvolutionKDCriterion,
)
from sekd_fairseq.tasks.self_evolution_kd import SelfEvolutionKDTask, on_host


class Reads(TorchDispatchMode):
    """Counts the operations that read a tensor's value into Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count[function._schema.name] += 1
        return function(*args, **(kwargs or {}))

    @property
    def reads(self) -> int:
        return self.count["aten::_local_scalar_dense"] + self.count["aten::nonzero"]


def test_sums_are_fetched_at_once() -> None:
    logs = [
        {"loss": torch.tensor(2.5), "ntokens": 3, "hard": torch.tensor(2)},
        {"loss": torch.tensor([0.25], dtype=torch.float64), "ntokens": 1, "hard": torch.tensor(0)},
    ]
    assert on_host(logs) == [
        {"loss": 2.5, "ntokens": 3, "hard": 2.0},
        {"loss": 0.25, "ntokens": 1, "hard": 0.0},
    ]
    assert on_host([{"ntokens": 3}]) == [{"ntokens": 3}] and on_host([]) == []


def test_logging_an_update_reads_no_tensor_one_by_one() -> None:
    dictionary = SimpleNamespace(pad=lambda: 1)
    cfg = SimpleNamespace(
        teacher_cache="here", teacher_path=None, stored_difficulty=None, eval_bleu=False
    )
    task = object.__new__(SelfEvolutionKDTask)
    task.cfg, task.tgt_dict = cfg, dictionary
    config = SelfEvolutionKDConfig(sentence_avg=False)
    config._name = "self_evolution_kd"
    criterion = SelfEvolutionKDCriterion(
        config, SimpleNamespace(target_dictionary=dictionary, cfg=cfg)
    )
    keys = ("loss", "nll_loss", "agree", "gamma", "hard", "difficulty", "hard_lambda", "kl_easy")
    keys += ("kl_hard", "easy_gradient", "hard_gradient")
    log = {key: torch.tensor(2.0) for key in keys}
    log |= {"ntokens": 4, "nsentences": 1, "sample_size": 4, "positions": 10, "padding": 1}
    metrics.reset()
    with Reads() as mode, metrics.aggregate("test"):
        task.reduce_metrics([log], criterion)
    values = metrics.get_smoothed_values("test")
    metrics.reset()
    assert mode.reads == 0
    assert values["loss"] == pytest.approx(0.5 / math.log(2), abs=1e-3)
    assert values["hard_share"] == 0.5 and values["kl_hard"] == 1.0 and values["padding"] == 0.1
