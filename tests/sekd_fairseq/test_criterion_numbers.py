"""Numbers of the criterions at their limits: gradients that are logged, half precision, temperature."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sekd_fairseq.criterions import distillation
from sekd_fairseq.criterions.cached_kd import CachedKDConfig, CachedKDCriterion
from sekd_fairseq.criterions.self_evolution_kd import (
    SelfEvolutionKDConfig,
    SelfEvolutionKDCriterion,
)
from sekd_fairseq.datasets import teacher_tokens
from sekd_fairseq.losses import (
    TeacherTokens,
    build_events,
    chunked_loss,
    support,
    support_log_probs,
    support_torch,
)
from sekd_fairseq.losses.divergences import DIVERGENCES
from sekd_fairseq.losses.support_torch import SCRATCH_ELEMENTS
from sekd_fairseq.teachers.online import OnlineTeacher, TeacherLogits

TOKENS, VOCABULARY = 9, 31


def task(vocabulary: int = VOCABULARY) -> Any:
    """What the criterions ask of a task."""
    dictionary = type("Dictionary", (), {"pad": lambda _: 1, "__len__": lambda _: vocabulary})
    return SimpleNamespace(
        target_dictionary=dictionary(),
        cfg=SimpleNamespace(teacher_cache="here", stored_difficulty=None),
        teacher_at=lambda sample, positions: teacher_tokens(sample["teacher"]),
        tail_law=lambda device: torch.linspace(0.1, 4.0, vocabulary),
    )


class Logits(nn.Module):
    """A model that gives these logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.decoder = SimpleNamespace()

    def forward(self) -> tuple[Tensor, None]:
        return self.logits, None


def batch(
    slots: int = 4,
    sampled: bool = False,
    temperature: float = 1.0,
    vocabulary: int = VOCABULARY,
) -> dict[str, Any]:
    """A batch of one sentence with a teacher's entry."""
    generator = torch.Generator().manual_seed(2)
    log_p = (torch.randn(TOKENS, vocabulary, generator=generator) * 2).log_softmax(-1)
    target = torch.randint(4, vocabulary, (TOKENS,), generator=generator)
    rest = log_p.scatter(1, target.unsqueeze(1), -torch.inf).topk(slots - 1, dim=1)
    ids = torch.cat([target.unsqueeze(1), rest.indices], dim=1)
    kept = log_p.gather(1, ids)
    entry = {
        "ids": ids,
        "size": torch.full_like(target, slots),
        "log_p": kept.half(),
        "gold_log_p": kept[:, 0].double(),
        "outside_mass": 1 - kept.double().exp().sum(dim=1),
        "temperature": temperature,
    }
    if sampled:
        entry["draws"] = torch.randint(1, 4, ids.shape, generator=generator, dtype=torch.int32)
        entry["samples"] = torch.full_like(target, 8)
    return {
        "target": target.view(1, -1),
        "ntokens": TOKENS,
        "net_input": {},
        "teacher": entry,
    }


def self_evolution(**options: Any) -> SelfEvolutionKDCriterion:
    config = SelfEvolutionKDConfig(sentence_avg=False, gamma=0.5, gamma_type="absolute", **options)
    config._name = "self_evolution_kd"
    return SelfEvolutionKDCriterion(config, task())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("missing_mass", ["bucket", "uniform", "tail", "renormalize", "sampled"])
def test_logged_gradient_is_the_norm_that_the_logits_receive(
    temperature: float, missing_mass: str
) -> None:
    """Of the distillation loss, T^2 D(z / T), by autograd over all of the vocabulary."""
    sample = batch(sampled=missing_mass == "sampled", temperature=temperature)
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(1, TOKENS, VOCABULARY, generator=generator)
    if missing_mass == "sampled":
        config = CachedKDConfig(sentence_avg=False, missing_mass="sampled", alpha=1.0)
        config._name = "cached_kd"
        criterion: Any = CachedKDCriterion(config, task())
        distill = criterion.distill
        # Selective KD does not log the gradient; every token counts as hard here.
        criterion.distill = lambda events, nll, teacher: distill(events, nll, teacher)._replace(
            hard=torch.ones(TOKENS, dtype=torch.bool)
        )
    else:
        criterion = self_evolution(missing_mass=missing_mass, alpha=1.0)
    model = Logits(logits.clone())
    loss, _, log = criterion(model, sample)
    loss.backward()  # alpha is 1: the distillation loss alone
    expected = model.logits.grad.abs().sum()
    found = (log["easy_gradient"] + log["hard_gradient"]).item()
    assert found == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("alpha", "passes"), [(0.0, 1), (0.5, 2), (1.0, 1)])
def test_a_part_without_weight_has_no_gradient_pass(
    alpha: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a temperature other than 1 each part of the loss has a pass over the logits of its own."""
    calls = []
    gradient = support_torch.gradient
    monkeypatch.setattr(
        support_torch, "gradient", lambda *given: calls.append(given) or gradient(*given)
    )
    model = Logits(torch.randn(1, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(8)))
    loss, _, _ = self_evolution(alpha=alpha)(model, batch(temperature=2.0))
    loss.backward()
    assert len(calls) == passes and model.logits.grad.any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equal_weights_are_the_uniform_tail(temperature: float, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(1, TOKENS, VOCABULARY, generator=generator)
    found = []
    for missing_mass in ("uniform", "tail"):
        criterion = self_evolution(missing_mass=missing_mass, label_smoothing=smoothing, alpha=0.6)
        criterion.task.tail_law = lambda device: torch.full((VOCABULARY,), 3.0)
        model = Logits(logits.clone())
        loss, _, log = criterion(model, batch(temperature=temperature))
        loss.backward()
        sizes = [log["easy_gradient"], log["hard_gradient"]]
        found.append([loss.detach(), model.logits.grad, *sizes])
    torch.testing.assert_close(*found)


def test_float16_chunks_keep_what_a_loss_scale_would_keep() -> None:
    """Near convergence the gradient to most logits is below what float16 holds. Scaled by 128, as
    fairseq begins, the plain path keeps it for every row of the projection; so do chunks."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(64, 8, generator=generator).half()
    weight = (torch.randn(400, 8, generator=generator) * 0.2).half()
    target = torch.randint(0, 400, (64,), generator=generator)
    bias = torch.zeros(400).half()

    def loss_of(logits: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        # A student that is nearly right: the rest of the softmax is scaled down.
        ids = target[part].unsqueeze(1)
        sure = logits + torch.zeros_like(logits).scatter(1, ids, 9.0)
        rows, valid = torch.arange(len(ids)), torch.ones_like(ids, dtype=torch.bool)
        return -support_log_probs(sure, rows, ids, valid).log_q.sum() * 1e-3, {}

    shares = []
    for chunked in (False, True):
        leaf = weight.clone().requires_grad_()
        if chunked:
            loss, _ = chunked_loss(features, leaf, bias, loss_of, 16)
        else:
            loss, _ = loss_of(nn.functional.linear(features, leaf, bias), slice(None))
        (loss * 128).backward()
        shares.append(float((leaf.grad == 0).all(dim=1).float().mean()))
    assert shares[1] <= shares[0] < 0.05


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_a_sure_student_at_low_temperature(divergence: str) -> None:
    """30 nats at temperature 0.25 are 120, whose exponential is zero in float32: values and
    gradients are those of float64, and finite."""
    entry = batch()["teacher"]
    entry["gold_log_p"] = entry["gold_log_p"].fill_(-math.log(31))
    entry["log_p"] = torch.full_like(entry["log_p"], -math.log(31))
    entry["outside_mass"] = entry["outside_mass"].fill_(27 / 31)
    teacher = teacher_tokens(entry)
    logits = torch.full((TOKENS, VOCABULARY), -30.0).scatter(1, entry["ids"][:, :1], 0.0)
    rows = torch.arange(TOKENS)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = logits.to(dtype).requires_grad_()
        student = support_log_probs(leaf, rows, teacher.ids, teacher.valid, temperature=0.25)
        events = build_events(teacher, student, "bucket")
        value = DIVERGENCES[divergence](events.log_p, events.log_q)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert value.isfinite().all() and gradient.isfinite().all()
        results.append((value.double(), gradient.double()))
    torch.testing.assert_close(*results, rtol=2e-3, atol=1e-5)
    if divergence == "forward_kl":  # one token at 0, thirty at -120, beside 1/31 for each
        by_hand = 30 / 31 * 120 - math.log(31)
        assert results[1][0][0].item() == pytest.approx(by_hand, rel=1e-3)  # stored in float16


@pytest.mark.parametrize(
    "options",
    [
        {"gamma_type": "quantile"},
        {"select": "batch"},
        {"divergence": "atkd"},
        {"divergence": "jsd"},
        {"label_smoothing": 0.1},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_a_teacher_beside_the_student_is_a_cache_of_every_token(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of the blocks in which its distributions are compared: also for losses that
    rank the tokens of a batch."""
    generator = torch.Generator().manual_seed(6)
    logits, teacher = (torch.randn(1, TOKENS, VOCABULARY, generator=generator) for _ in range(2))
    sample = batch()
    target = sample["target"].view(-1)
    whole = TeacherTokens.from_dense(teacher[0].log_softmax(-1), target)
    beside = TeacherLogits([teacher[0]], target)
    se_kd = "gamma_type" in options or "label_smoothing" in options
    kind, config = (
        (SelfEvolutionKDCriterion, SelfEvolutionKDConfig(sentence_avg=False, **options))
        if se_kd
        else (CachedKDCriterion, CachedKDConfig(sentence_avg=False, **options))
    )
    config._name = "self_evolution_kd" if se_kd else "cached_kd"
    monkeypatch.setitem(SCRATCH_ELEMENTS, "cpu", 2 * VOCABULARY)  # two tokens a block
    found = []
    for one in (whole, beside):
        criterion = kind(config, task())
        criterion.task.teacher_at = lambda sample, rows, one=one: one
        model = Logits(logits.clone())
        loss, _, log = criterion(model, {**sample, "teacher": {}})
        loss.backward()
        sums = {key: torch.as_tensor(value).double() for key, value in log.items()}
        found.append((loss.detach(), model.logits.grad, sums))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forbid", [False, True])  # a forbidden token: the branch that a GPU takes
@pytest.mark.parametrize("missing_mass", ["bucket", "uniform", "tail", "renormalize", "sampled"])
def test_losses_are_the_same_under_autocast(missing_mass: str, forbid: bool) -> None:
    """Sums over the vocabulary are beyond float16: with a tail law the KL was infinite."""
    vocabulary = 8000
    sampled = missing_mass == "sampled"
    sample = batch(17, sampled, vocabulary=vocabulary)
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(1, TOKENS, vocabulary, generator=generator) * 3
    if forbid:
        logits[0, :, 3] = -torch.inf  # no token of the batch
    if sampled:
        config: Any = CachedKDConfig(sentence_avg=False, missing_mass=missing_mass)
    else:
        config = SelfEvolutionKDConfig(sentence_avg=False, missing_mass=missing_mass)
    config._name = "cached_kd" if sampled else "self_evolution_kd"
    kind = CachedKDCriterion if sampled else SelfEvolutionKDCriterion
    law = torch.rand(vocabulary, generator=generator).exp()
    found = []
    for amp in (False, True):
        criterion = kind(config, task(vocabulary))
        criterion.task.tail_law = lambda device: law / law.mean()
        model = Logits(logits.clone())
        with torch.autocast("cpu", torch.float16, enabled=amp):
            loss, _, log = criterion(model, sample)
        loss.backward()
        assert loss.isfinite() and model.logits.grad.isfinite().all()
        sums = {key: torch.as_tensor(value) for key, value in log.items()}
        found.append((loss.detach(), model.logits.grad, sums))
    torch.testing.assert_close(*found, rtol=0, atol=0)


class Layers(nn.Module):
    """A decoder of a layer and an output projection, the input in it."""

    output_layer = None

    def __init__(self, plain_projection: bool) -> None:
        super().__init__()
        self.plain_projection = plain_projection
        self.input = nn.Parameter(torch.randn(1, TOKENS, 16))
        self.layer, self.output_projection = nn.Linear(16, 16), nn.Linear(16, VOCABULARY)

    @property
    def decoder(self) -> "Layers":
        return self

    def forward(self, features_only: bool = False) -> tuple[Tensor, None]:
        features = self.layer(self.input)
        return (features if features_only else self.output_projection(features)), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plain_projection", [True, False])
def test_a_teacher_beside_the_student_runs_in_its_own_type_under_autocast(
    plain_projection: bool, dtype: torch.dtype
) -> None:
    """With --amp it ran in float16 whatever was asked for; with chunks one in bfloat16 failed."""
    torch.manual_seed(3)
    online = object.__new__(OnlineTeacher)
    online.models = [Layers(plain_projection).to(dtype).requires_grad_(False)]
    sample = batch()
    logits = torch.randn(1, TOKENS, VOCABULARY)
    config = SelfEvolutionKDConfig(sentence_avg=False)
    config._name = "self_evolution_kd"
    found = []
    for amp in (False, True):
        criterion = SelfEvolutionKDCriterion(config, task())
        criterion.task.teacher_at = online.at
        with torch.autocast("cpu", torch.float16, enabled=amp):
            loss, _, log = criterion(Logits(logits.clone()), sample)
            teacher = online.at(sample, torch.arange(TOKENS))
            with torch.autocast("cpu", enabled=False):  # as in chunks
                part = teacher[2:5]
        assert part.logits[0].dtype == dtype  # type: ignore[union-attr]
        sums = {key: torch.as_tensor(value) for key, value in log.items()}
        found.append((loss.detach(), sums, part.tokens(slice(None)).log_p))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("name", ["self_evolution_kd", "cached_kd"])
def test_one_kernel_logs_what_the_plain_path_logs(
    name: str, with_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same keys in the same order, tensors where these are tensors: processes whose batches
    take different paths add up their sums by place, tensors apart from numbers."""
    pytest.importorskip("triton")
    config: Any = CachedKDConfig(sentence_avg=False)
    if name == "self_evolution_kd":
        config = SelfEvolutionKDConfig(sentence_avg=False, label_smoothing=0.1)
    config._name = name
    kind = CachedKDCriterion if name == "cached_kd" else SelfEvolutionKDCriterion
    logits = torch.randn(1, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(7))
    found, kinds = [], []
    for module in (lambda *_: None, lambda *given: support.triton_module(given[-1])):
        for user in (support, distillation):
            monkeypatch.setattr(user, "kernels_for", module)
        model = Logits(logits.clone())
        with torch.set_grad_enabled(with_gradient):
            loss, _, log = kind(config, task())(model, batch())
        if with_gradient:
            loss.backward()
        kinds.append([(key, torch.is_tensor(value)) for key, value in log.items()])
        sums = {key: torch.as_tensor(value).double() for key, value in log.items()}
        found.append((loss.detach(), model.logits.grad, sums))
    assert kinds[0] == kinds[1] == sorted(kinds[0])
    (loss, gradient, sums), (other_loss, other_gradient, other_sums) = found
    torch.testing.assert_close((loss, sums), (other_loss, other_sums), rtol=1e-4, atol=1e-5)
    if with_gradient:
        torch.testing.assert_close(gradient, other_gradient, rtol=1e-4, atol=1e-5)
