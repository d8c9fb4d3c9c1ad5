"""The loss in one kernel equals the losses in torch, in float64: value, gradient and what is logged."""

import importlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sekd_fairseq.losses import (
    SelfEvolution,
    TeacherTokens,
    build_events,
    self_evolution_kd,
    support_log_probs,
)
from sekd_fairseq.losses.divergences import relative_entropy
from sekd_fairseq.losses.self_evolution import DIFFICULTIES, INTEGRATIONS, SCHEDULES

pytestmark = [
    pytest.mark.gpu(optional=True),
    # NumPy, in the interpreter, warns where a kernel selects between a number and none.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POSITIONS, TOKENS, VOCABULARY, SLOTS = 6, 5, 23, 4
GAMMA = 0.6


@pytest.fixture(scope="module")
def kernel() -> Any:
    """The kernel, on the GPU or else in Triton's interpreter."""
    pytest.importorskip("triton")
    return importlib.import_module("sekd_fairseq.losses.token_loss_triton").token_loss


def problem(
    dtype: torch.dtype = torch.float32, slots: int = SLOTS, sharp: float = 2.0
) -> tuple[Tensor, Tensor, TeacherTokens]:
    """Logits, rows of which one is padding, and a teacher of supports of different sizes."""
    generator = torch.Generator().manual_seed(11)
    logits = (torch.randn(POSITIONS, VOCABULARY, generator=generator) * sharp).to(dtype)
    rows = torch.tensor([0, 1, 2, 4, 5])
    log_p = (torch.randn(TOKENS, VOCABULARY, generator=generator) * 2).log_softmax(-1)
    ids = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:slots] for _ in rows])
    size = torch.tensor([slots, 1, max(1, slots - 1), slots, max(1, slots - 2)])
    valid = torch.arange(slots) < size.unsqueeze(1)
    ids = torch.where(valid, ids, ids[:, :1])
    kept = log_p.gather(1, ids).masked_fill(~valid, -torch.inf)
    stored = torch.cat([kept[:, :1], kept[:, 1:].half().float()], dim=1)
    outside = 1 - kept.double().exp().sum(dim=1)
    outside[3] = 0.0  # of a teacher that is sure
    columns = (ids, valid, stored, outside.log().float())
    teacher = TeacherTokens(*(column.to(DEVICE) for column in columns))
    return logits.to(DEVICE), rows.to(DEVICE), teacher


def expected(
    logits: Tensor,
    rows: Tensor,
    teacher: TeacherTokens,
    settings: SelfEvolution,
    alpha: float,
    smoothing: float,
    gamma: float = GAMMA,
) -> tuple[Tensor, dict[str, float], Tensor]:
    """Loss, sums, and the gradient to the logits for an upstream gradient of -2.5."""
    leaf = logits.double().requires_grad_()
    student = support_log_probs(leaf, rows, teacher.ids, teacher.valid, with_sum=True)
    events = build_events(teacher, student, "bucket")
    output = self_evolution_kd(events, settings, gamma, teacher.difficulty)
    nll = -student.log_q[:, 0]
    epsilon = smoothing / (VOCABULARY - 1)
    entropy = (1 - smoothing - epsilon) * nll - epsilon * student.sum_log_q
    loss = (1 - alpha) * entropy.sum()
    if alpha:
        loss = loss + alpha * output.divergence.sum()
    (size,) = torch.autograd.grad(output.divergence.sum(), leaf, retain_graph=True)
    size = size[rows].abs().sum(dim=1)
    kl = relative_entropy(*events)
    hard = output.hard
    best = teacher.log_p.masked_fill(~teacher.valid, -torch.inf).argmax(dim=1, keepdim=True)
    sums = {
        "nll_loss": nll.sum(),
        "agree": (student.log_q.gather(1, best).squeeze(1) >= student.max_log_q).sum(),
        "hard": hard.sum(),
        "difficulty": output.difficulty.sum(),
        "hard_lambda": output.ratio[hard].sum(),
        "kl_easy": kl[~hard].sum(),
        "kl_hard": kl[hard].sum(),
        "easy_gradient": size[~hard].sum(),
        "hard_gradient": size[hard].sum(),
    }
    (gradient,) = torch.autograd.grad(-2.5 * loss, leaf)
    return loss.detach(), {key: value.item() for key, value in sums.items()}, gradient


def check(
    kernel: Any,
    case: tuple[Tensor, Tensor, TeacherTokens],
    settings: SelfEvolution,
    alpha: float = 0.7,
    smoothing: float = 0.0,
    overwrite: bool = False,
    tolerance: float = 2e-5,
    gamma: float = GAMMA,
) -> dict[str, float]:
    logits, rows, teacher = case
    loss, sums, gradient = expected(logits, rows, teacher, settings, alpha, smoothing, gamma)
    leaf = logits.clone().requires_grad_()
    value, found = kernel(leaf, rows, teacher, settings, gamma, alpha, smoothing, overwrite)
    assert value.item() == pytest.approx(loss.item(), rel=1e-5)
    assert {key: float(one) for key, one in found.items()} == pytest.approx(
        sums, rel=1e-4, abs=1e-5
    )
    (one,) = torch.autograd.grad(value, leaf, torch.full_like(value, -2.5))
    assert one.dtype == logits.dtype and (one.data_ptr() == leaf.data_ptr()) == overwrite
    torch.testing.assert_close(one.double(), gradient, rtol=tolerance, atol=tolerance)
    return sums


@pytest.mark.parametrize("integration", INTEGRATIONS)
@pytest.mark.parametrize(
    ("difficulty", "schedule", "beta"),
    [*zip(DIFFICULTIES, SCHEDULES, (0.5, None, 0.3), strict=True), ("teacher", "linear", None)],
)
def test_every_reading(
    kernel: Any, integration: str, difficulty: str, schedule: str, beta: float | None
) -> None:
    settings = SelfEvolution(
        gamma=GAMMA,
        gamma_type="absolute",
        integration=integration,
        difficulty=difficulty,
        schedule=schedule,
        scale=1.5,
        beta=beta,
        lambda_max=0.8,
    )
    hard = [check(kernel, problem(), settings, gamma=gamma)["hard"] for gamma in (0.6, 2.5)]
    assert 0 < hard[1] < hard[0]


@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_limits(kernel: Any, integration: str) -> None:
    """No ratio, a prior of one side alone, no distillation, label smoothing, logits overwritten."""
    for options in (
        {"lambda_max": 0.0},
        {"beta": 0.0},
        {"beta": 1.0},
    ):
        check(kernel, problem(), SelfEvolution(integration=integration, **options))
    settings = SelfEvolution(integration=integration)
    check(kernel, problem(), settings, alpha=0.0, smoothing=0.1)
    check(kernel, problem(), settings, alpha=1.0)
    check(kernel, problem(), settings, smoothing=0.1, overwrite=True)
    check(kernel, problem(slots=1), settings)
    check(kernel, problem(), settings, gamma=math.inf)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision(kernel: Any, dtype: torch.dtype, tolerance: float) -> None:
    for integration in INTEGRATIONS:
        settings = SelfEvolution(integration=integration)
        check(kernel, problem(dtype), settings, smoothing=0.1, tolerance=tolerance)


def test_stored_difficulty(kernel: Any) -> None:
    logits, rows, teacher = problem()
    stored = torch.tensor([0.1, 3.0, 0.2, 1.0, 0.7], device=DEVICE).double()
    teacher = replace(teacher, difficulty=stored)
    sums = check(kernel, (logits, rows, teacher), SelfEvolution())
    assert sums["hard"] == 3 and sums["difficulty"] == pytest.approx(5.0)


def test_forbidden_tokens_and_a_sure_student(kernel: Any) -> None:
    logits, rows, teacher = problem(sharp=30.0)
    outside = [v for v in range(VOCABULARY) if v not in teacher.ids[0].tolist()]
    logits[0, outside[0]] = -torch.inf
    for integration in INTEGRATIONS:
        check(kernel, (logits, rows, teacher), SelfEvolution(integration=integration))


def test_no_tokens(kernel: Any) -> None:
    logits, rows, teacher = problem()
    leaf = logits.clone().requires_grad_()
    value, sums = kernel(leaf, rows[:0], teacher[:0], SelfEvolution(), GAMMA, 0.7, 0.1)
    assert value.item() == 0 and all(float(one) == 0 for one in sums.values())
    (gradient,) = torch.autograd.grad(value, leaf)
    assert not gradient.any()


def test_rows_are_as_the_blocks_give_them(kernel: Any) -> None:
    """The row of padding has no gradient, and the logits are as before."""
    logits, rows, teacher = problem()
    before = logits.clone()
    leaf = logits.requires_grad_()
    value, _ = kernel(leaf, rows, teacher, SelfEvolution(), GAMMA, 0.7, 0.0)
    value.backward()
    assert torch.equal(leaf.detach(), before)
    assert not leaf.grad[3].any() and leaf.grad[rows].any(dim=1).all()
