"""Half precision: fairseq's options where there is no GPU (test_cuda.py has those where there is)."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.optim import AMPOptimizer, FP16Optimizer
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

from sekd_fairseq.checkpoints import load_models
from sekd_fairseq.datasets import LEAST_REST, TeacherDataset, teacher_tokens
from sekd_fairseq.losses import build_events, support_log_probs
from sekd_fairseq.losses.divergences import DIVERGENCES
from sekd_fairseq.patches import WEIGHT, apply_all, attend_without_plans, check_precision
from sekd_fairseq.splits import load_split
from sekd_fairseq.teacher_cache import TeacherCache
from sekd_fairseq.teachers.torch import TorchEngine

from .conftest import ROOT, command, error_line, train, train_arguments

SE_KD = ("--criterion", "self_evolution_kd")


def last_record(log: str, key: str) -> dict[str, Any]:
    """The last JSON record of a log that has ``key``."""
    line = [line for line in log.splitlines() if "{" in line and f'"{key}"' in line][-1]
    return dict(json.loads(line[line.index("{") :]))


@pytest.mark.parametrize(
    ("parser", "words"),
    [
        (options.get_training_parser, ["--arch", "transformer_tiny", "--optimizer", "adam"]),
        (options.get_validation_parser, ["--task", "translation"]),
        (options.get_generation_parser, []),
        (options.get_interactive_generation_parser, []),
    ],
    ids=["train", "validate", "generate", "interactive"],
)
@pytest.mark.parametrize("option", ["--bf16", "--memory-efficient-bf16"])
def test_bf16_is_no_tpu(
    parser: Callable[[], Any], words: list[str], option: str, data: Path
) -> None:
    def parse(*more: str) -> Any:
        return options.parse_args_and_arch(parser(), [str(data), *words, *more])

    assert parse(option).bf16 and not parse(option).tpu
    assert parse(option, "--tpu").tpu
    explicit = options.parse_args_and_arch(
        parser(), [str(data), *words, option], suppress_defaults=True
    )
    assert not getattr(explicit, "tpu", False)


def test_bf16_resumes_with_the_weights_that_were_not_rounded(data: Path, tmp_path: Path) -> None:
    base = ("--criterion", "cross_entropy", "--bf16", "--lr", "1e-4", "--disable-validation")
    train(data, tmp_path / "whole", *base, "--max-update", "6", "--save-interval-updates", "3")
    (tmp_path / "resumed").mkdir()
    shutil.copy(next(tmp_path.glob("whole/*_3.pt")), tmp_path / "resumed/checkpoint_last.pt")
    train(data, tmp_path / "resumed", *base, "--max-update", "6")
    ends = [
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=True)
        for name in ("whole", "resumed")
    ]
    whole, resumed = (end["last_optimizer_state"]["state"] for end in ends)
    assert whole[0][WEIGHT].dtype == torch.float32
    for number, of_weight in whole.items():
        for name in (WEIGHT, "exp_avg"):
            torch.testing.assert_close(of_weight[name], resumed[number][name], rtol=0, atol=0)
    for name, weight in ends[0]["model"].items():
        torch.testing.assert_close(weight, ends[1]["model"][name], rtol=0, atol=0)


def test_weights_of_another_model_do_not_come_with_the_optimizer() -> None:
    """As where a training goes on from an average of checkpoints, whose optimiser is the last one's."""
    apply_all()
    parser = options.get_training_parser()
    words = [
        "data",
        "--task",
        "translation",
        "--arch",
        "transformer",
        "--optimizer",
        "adam",
        "--bf16",
    ]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, words))

    def optimizer(values: list[float]) -> FP16Optimizer:
        weight = torch.nn.Parameter(torch.tensor(values, dtype=torch.bfloat16))
        return FP16Optimizer.build_optimizer(cfg, [weight])

    trained = optimizer([1.0, 2.0])
    trained.fp32_params[0].data += 0.001  # less than half of the last digit
    state = copy.deepcopy(trained.state_dict())
    again, other = optimizer([1.0, 2.0]), optimizer([1.0, 2.5])
    for one in (again, other):
        one.load_state_dict(state)
    torch.testing.assert_close(again.fp32_params[0].tolist(), [1.001, 2.001])
    assert other.fp32_params[0].tolist() == [1.0, 2.5]
    # Of weights that the model has in single precision, as some of its experts' routers.
    mixed = [
        torch.nn.Parameter(w.clone()) for w in (torch.ones(2).bfloat16(), torch.ones(2) * 1.001)
    ]
    once, twice = (FP16Optimizer.build_optimizer(cfg, mixed) for _ in range(2))
    once.fp32_params[0].data += 0.001
    twice.load_state_dict(copy.deepcopy(once.state_dict()))
    torch.testing.assert_close(twice.fp32_params[0].tolist(), [1.001, 1.001])
    assert WEIGHT in state["state"][0] and not again.fp32_optimizer.state_dict()["state"]


def test_bf16_from_the_command_line(data: Path, cache: Path, tmp_path: Path) -> None:
    """On the CPU, in an interpreter of its own: fairseq imports the plugin before it parses."""
    log = command(
        *train_arguments(
            data, tmp_path, *SE_KD, "--teacher-cache", cache, "--bf16", "--max-update", "20",
            "--validate-after-updates", "20",
        ),
        fresh=True,
    )  # fmt: skip
    first = next(line for line in log.splitlines() if '"num_updates": "1"' in line)
    start = float(json.loads(first[first.index("{") :])["loss"])
    told = last_record(log, "valid_loss")
    assert float(told["valid_loss"]) < 0.7 * start
    best = tmp_path / "checkpoint_best.pt"
    plugin = ("--user-dir", ROOT / "sekd_fairseq", "--task", "self_evolution_kd")
    out = command(
        "fairseq_cli.validate", data, *plugin, "--path", best, "--cpu", "--log-format", "json",
        "--max-tokens", "300",
    )  # fmt: skip
    found = last_record(out, "valid_loss")  # in bfloat16, as in training
    assert {key: found[key] for key in ("valid_loss", "valid_kl_hard")} == {
        key: told[key] for key in ("valid_loss", "valid_kl_hard")
    }
    generate = (
        "fairseq_cli.generate", data, *plugin, "--path", best, "--cpu", "--gen-subset", "test",
        "--max-len-b", "12",
    )  # fmt: skip
    single, half = (
        [line.split("\t")[1] for line in command(*generate, *more).splitlines() if line[:2] == "H-"]
        for more in ((), ("--bf16",))
    )
    assert len(single) == len(half) == 13 and single != half  # rounded: --bf16 is not ignored
    score = ("sekd_fairseq.score", data, "--path", best, "--teacher-cache", cache, "--cpu")
    means = []
    for precision in ("--bf16", "--fp16"):
        out = command(*score, "--run", tmp_path / precision, precision)
        means.append(float(out.rsplit("teacher ")[-1].split()[0]))
    assert means[0] == pytest.approx(means[1], rel=0.02)


@pytest.mark.parametrize("option", ["--fp16", "--amp"])
def test_float16_on_a_cpu_is_refused(option: str, data: Path, cache: Path, tmp_path: Path) -> None:
    line = error_line(train(data, tmp_path, *SE_KD, "--teacher-cache", cache, option, check=False))
    assert f"{option}: expected a GPU, found --cpu" in line and "--bf16" in line


def test_amp_scales_gradients_back_once() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    cfg = OmegaConf.create(
        {
            "common": {"fp16_init_scale": 128, "min_loss_scale": 1e-4},
            "optimizer": {"_name": "sgd", "lr": [1.0], "momentum": 0.0, "weight_decay": 0.0},
        }
    )
    optimizer = AMPOptimizer.build_optimizer(cfg, [parameter])
    optimizer._grad_scaler = torch.amp.GradScaler("cpu", init_scale=128.0)  # fairseq's is for CUDA
    optimizer.zero_grad()
    optimizer.backward((parameter * torch.tensor([1.0, 2.0, 3.0])).sum())
    optimizer.clip_grad_norm(0.0)
    optimizer.step()
    assert parameter.tolist() == [0.0, -1.0, -2.0]  # fairseq: 0.992, 0.984, 0.977


@pytest.mark.parametrize(
    ("option", "rate", "model", "warned"),
    [
        ("memory_efficient_bf16", 2e-5, "folder", True),
        ("memory_efficient_bf16", 1e-3, "folder", False),
        ("memory_efficient_bf16", 2e-5, None, False),
        ("bf16", 2e-5, "folder", False),
    ],
)
def test_updates_that_bfloat16_loses_are_told(
    option: str, rate: float, model: str | None, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    given = dict.fromkeys(("fp16", "bf16", "amp", "memory_efficient_bf16"), False) | {option: True}
    cfg = OmegaConf.create(
        {"common": given, "optimization": {"lr": [rate]}, "model": {"hf_model": model}}
    )
    check_precision(SimpleNamespace(cfg=cfg, cuda=True))
    assert ("--memory-efficient-bf16" in caplog.text) == warned


class Zeros:
    """Stored difficulty of nothing."""

    def check_targets(self, hashes: Any, where: str) -> None:
        """Any targets will do."""

    def check_teacher(self, cache: TeacherCache) -> None:
        """Any teacher will do."""

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    def __getitem__(self, sentence: int) -> Any:
        return np.full(len(self.cache[sentence].entropy), 1 / 3, np.float32)


@pytest.mark.parametrize("option", ["fp16", "bf16"])
def test_fairseq_rounds_nothing_of_the_teacher(
    option: str, data: Path, teacher: Path, cache: Path
) -> None:
    """Its trainer casts every float32 tensor of a batch, and the criterion must not see that."""
    _, _, task = load_models([str(teacher)], str(data), torch.device("cpu"))
    opened = TeacherCache.open(cache / "valid")
    difficulty: Any = [Zeros(opened)]
    dataset = TeacherDataset(load_split(task, "valid", str(data)), [opened], "valid", difficulty)
    sample = dataset.collater([dataset[index] for index in range(5)])
    trainer = object.__new__(Trainer)
    trainer.cfg = SimpleNamespace(
        common=SimpleNamespace(**{"fp16": False, "bf16": False, option: True})
    )
    cast = trainer._fp_convert_sample(sample)
    assert sample["teacher"].keys() == cast["teacher"].keys() and "difficulty" in cast["teacher"]
    torch.testing.assert_close(cast["teacher"], sample["teacher"], rtol=0, atol=0)  # and of type


class Sure(TeacherCache):
    """A cache whose teacher has given all of its mass, as far as float32 tells."""

    def __getitem__(self, sentence: int) -> Any:
        row = super().__getitem__(sentence)
        return row._replace(outside_mass=np.zeros_like(row.outside_mass))


@pytest.mark.parametrize("told", [{"arch": "vllm"}, {"arch": "transformer", "aligned_from": "x"}])
def test_a_teacher_known_by_its_best_tokens_leaves_something(
    told: dict[str, Any], data: Path, teacher: Path, cache: Path
) -> None:
    """What they lack of 1 is 0 at sure tokens, by rounding, where KL(q || p) was infinite and its
    gradient NaN. A teacher whose mass outside is summed may well leave none."""
    _, _, task = load_models([str(teacher)], str(data), torch.device("cpu"))
    split = load_split(task, "valid", str(data))
    found = []
    for known in (told, {"arch": "transformer"}):
        opened = Sure.open(cache / "valid")
        opened.manifest = replace(opened.manifest, teacher=known)
        dataset = TeacherDataset(split, [opened], "valid")
        sample = dataset.collater([dataset[index] for index in range(3)])
        found.append(teacher_tokens(sample["teacher"]))
    rest, summed = found
    assert (summed.log_outside == -torch.inf).all()
    torch.testing.assert_close(rest.log_outside.exp(), torch.full([len(rest.ids)], LEAST_REST))
    logits = torch.randn(len(rest.ids), len(task.target_dictionary)).requires_grad_()
    student = support_log_probs(logits, torch.arange(len(rest.ids)), rest.ids, rest.valid)
    events = build_events(rest, student, "bucket")
    log_q = logits.detach().double().log_softmax(-1)
    log_q = log_q.gather(1, rest.ids)
    outside = 1 - log_q.exp().sum(dim=1)
    p = torch.cat([rest.log_p.double().exp(), torch.full((len(log_q), 1), LEAST_REST)], dim=1)
    log_p = (p / p.sum(dim=1, keepdim=True)).log()
    expected = (log_q.exp() * (log_q - log_p[:, :-1])).sum(dim=1)
    expected += outside * (outside.log() - log_p[:, -1])
    for name in ("reverse_kl", "adaptive_kl"):
        value = DIVERGENCES[name](events.log_p, events.log_q)
        (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        assert value.isfinite().all() and gradient.isfinite().all()
        if name == "reverse_kl":
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("asked", "kept"), [("0", False), ("1", True)])
def test_cudnn_does_not_compile_attention_for_every_shape(
    asked: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", asked)
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        attend_without_plans()
        assert torch.backends.cuda.cudnn_sdp_enabled() is kept
        # The kernels that take any shape are left.
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_model_is_cast_before_a_gpu_holds_it(
    data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In single precision a model of 7 billion weights takes 28 GB, which no GPU of 24 GB has."""
    moves: list[dict[str, Any]] = []
    move = torch.nn.Module.to

    def watched(self: Any, *places: Any, **options: Any) -> Any:
        assert not places
        moves.append(options)
        return move(self, **options)

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    device = torch.device("meta")  # stands in for a GPU
    engine = TorchEngine([str(teacher)], str(data), device, torch.bfloat16)
    assert moves == [{"device": device, "dtype": torch.bfloat16}]
    assert {parameter.dtype for parameter in engine.models[0].parameters()} == {torch.bfloat16}
