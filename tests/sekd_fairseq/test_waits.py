"""A step asks the device for numbers as rarely as it can: each time, a GPU would be waited for."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq import tasks
from fairseq.logging import metrics
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from sekd_fairseq.criterions.self_evolution_kd import (
    SelfEvolutionKDConfig,
    SelfEvolutionKDCriterion,
)
from sekd_fairseq.tasks.self_evolution_kd import SelfEvolutionKDTask, on_host

from .language_models import FAMILIES

READS = {
    f"aten::{name}" for name in (
        "_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim",
        "unique_consecutive", "bincount", "repeat_interleave.Tensor",
    )
}  # fmt: skip


class Reads(TorchDispatchMode):
    """Counts the operations that read a tensor's value into Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name
        if name == "aten::index" and any(
            one.dtype == torch.bool for one in args[1] if one is not None
        ):
            name = "aten::nonzero"  # of the mask
        self.count[name] += 1
        return function(*args, **(kwargs or {}))

    @property
    def reads(self) -> dict[str, int]:
        """How often each was called of those that a GPU is waited for."""
        return {name: count for name, count in self.count.items() if name in READS}


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
    log |= {"hard": torch.tensor(1.0), "ntokens": 4, "nsentences": 1, "sample_size": 4}
    log |= {"positions": 10, "padding": 1}
    metrics.reset()
    with Reads() as mode, metrics.aggregate("test"):
        task.reduce_metrics([log], criterion)
    values = metrics.get_smoothed_values("test")
    metrics.reset()
    assert mode.reads == {}
    assert values["loss"] == pytest.approx(0.5 / math.log(2), abs=1e-3)
    assert values["hard_share"] == 0.25 and values["padding"] == 0.1
    # By the number of tokens of their kind: one is hard, three are easy.
    assert values["kl_hard"] == values["hard_gradient"] == values["hard_lambda"] == 2.0
    assert values["kl_easy"] == values["easy_gradient"] == pytest.approx(2 / 3, abs=1e-3)


def language_model_task(cfg: Any, criterion: str) -> tuple[Any, Any, Any, Any]:
    """The task of a configuration, its model, a criterion of this name, and the training set."""
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    built = task.build_criterion(OmegaConf.create({"_name": criterion, "sentence_avg": False}))
    task.load_dataset("train")
    return task, model, built, task.dataset("train")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_step_of_a_language_model_beside_its_teacher_reads_no_tensor(
    llm_data: Path, tmp_path: Path, family: str
) -> None:
    from sekd_fairseq.checkpoints import language_model_config
    from sekd_fairseq.import_hf import import_model

    from .language_models import pretrained

    rows = len((llm_data / "dict.en.txt").read_text().splitlines()) + 4
    folder = pretrained(tmp_path / "model", family, rows)
    teacher = tmp_path / "teacher.pt"
    import_model(str(folder), None, str(llm_data), teacher)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FAMILIES[family]))
    cfg = language_model_config(
        str(llm_data), "--hf-config", str(config), "--teacher-path", str(teacher)
    )
    task, model, criterion, dataset = language_model_task(cfg, "self_evolution_kd")
    optimizer = SimpleNamespace(backward=lambda loss: loss.backward())
    batches = [dataset.collater([dataset[i] for i in one]) for one in (range(4), range(7, 12))]
    with Reads() as mode:
        for batch in batches:
            task.train_step(batch, model, criterion, optimizer, 1)
        task.valid_step(batch, model, criterion)
    assert mode.reads == {}
    # The teacher had the prompts' common beginning computed once.
    (lm,) = task.online_teacher.models
    assert len(lm.decoder._prefix[0]) >= lm.decoder.shared_prefix


def test_a_step_of_fine_tuning_a_language_model_reads_no_tensor(
    llm_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sekd_fairseq.checkpoints import language_model_config
    from sekd_fairseq.losses import chunked

    config = tmp_path / "config.json"
    config.write_text(json.dumps(FAMILIES["llama-tied"]))
    cfg = language_model_config(str(llm_data), "--hf-config", str(config))
    task, model, criterion, dataset = language_model_task(cfg, "cross_entropy")
    batch = dataset.collater([dataset[i] for i in range(5)])
    optimizer = SimpleNamespace(backward=lambda loss: loss.backward())
    for size in (chunked.CHUNK_BYTES, 7 * 4 * len(task.target_dictionary)):  # at once, in chunks
        monkeypatch.setattr(chunked, "CHUNK_BYTES", size)
        with Reads() as mode:
            task.train_step(batch, model, criterion, optimizer, 1)
            task.valid_step(batch, model, criterion)
        assert mode.reads == {}
