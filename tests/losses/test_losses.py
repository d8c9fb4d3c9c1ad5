"""The torch losses against the independent float64 version, and at their limits.

One file of more than 400 lines: every loss goes through the same comparison and the same limits.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sekd_fairseq.losses import (
    DIVERGENCES,
    RunningQuantile,
    SelfEvolution,
    TeacherTokens,
    build_events,
    self_evolution_kd,
    support_log_probs,
)
from sekd_fairseq.losses.divergences import WEIGHTED, forward_kl, jsd, log_mix, tvd
from sekd_fairseq.losses.events import SPREAD
from sekd_fairseq.losses.self_evolution import INTEGRATIONS, ratio, token_difficulty
from tests import reference

INF = float("inf")
MODES = ("bucket", "uniform", "tail", "renormalize")


def random_case(
    seed: int, tokens: int = 5, vocab: int = 12, k: int = 4, sharp: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits (tokens, vocab), teacher log-probabilities, references; float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * sharp
    teacher = torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * sharp
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    return logits, teacher.log_softmax(-1), target


def tail_law(vocab: int) -> Tensor:
    """Weights of tokens outside a support, a hundred apart; (vocab,)."""
    return torch.linspace(0.0, 4.6, vocab, dtype=torch.float64).exp()


def token_losses(
    logits: Tensor, teacher: TeacherTokens, config: SelfEvolution, **options: Any
) -> Tensor:
    rows = torch.arange(logits.size(0))
    if config.missing_mass == "tail":
        teacher = replace(teacher, tail=tail_law(logits.size(1)))
    student = support_log_probs(
        logits, rows, teacher.ids, teacher.valid, with_sum=True, weights=teacher.tail
    )
    events = build_events(teacher, student, config.missing_mass)
    return self_evolution_kd(events, config, **options).divergence


def as_reference(config: SelfEvolution) -> reference.Settings:
    return reference.Settings(
        alpha=1.0,
        beta="confidence" if config.beta is None else config.beta,
        lambda_max=config.lambda_max,
        schedule=config.schedule,
        scale=config.scale,
        integration=config.integration,
        difficulty=config.difficulty,
        divergence=config.divergence,
        missing_mass=config.missing_mass,
        weight=config.divergence_weight,
        skew=config.divergence_weight,
    )


def reference_token(
    logits: Tensor, log_p: Tensor, teacher: TeacherTokens, index: int
) -> reference.Token:
    support = teacher.ids[index][teacher.valid[index]].tolist()
    tail = tail_law(logits.size(1)).numpy()
    return reference.Token(logits[index].numpy(), log_p[index].numpy(), support, support[0], tail)


def meaningful(config: dict[str, Any]) -> bool:
    try:
        SelfEvolution(**config)
    except ValueError:
        return False
    return True


GRID = [
    config
    for divergence in DIVERGENCES
    for integration in INTEGRATIONS
    for schedule, difficulty, beta in (
        ("step", "teacher", 0.5),
        ("linear", "prior", 0.3),
        ("exp", "nll", None),
    )
    for missing_mass in MODES
    if meaningful(
        config := {
            "divergence": divergence,
            "integration": integration,
            "schedule": schedule,
            "difficulty": difficulty,
            "beta": beta,
            "missing_mass": missing_mass,
        }
    )
]


@pytest.mark.parametrize("config", GRID, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_value_and_gradient_equal_the_reference(config: dict[str, Any]) -> None:
    # A divergence's weight other than a half, at which its two sides are exchangeable.
    options = SelfEvolution(
        gamma=0.4,
        gamma_type="absolute",
        lambda_max=0.7,
        scale=1.5,
        divergence_weight=0.2,
        **config,
    )
    logits, log_p, target = random_case(seed=3)
    teacher = TeacherTokens.from_top_k(log_p, target, 4)
    logits.requires_grad_()
    found = token_losses(logits, teacher, options)
    upstream = torch.linspace(0.5, -2.0, len(found), dtype=torch.float64)
    found.backward(upstream)
    expected = as_reference(options)
    for i in range(len(target)):
        token = reference_token(logits.detach(), log_p, teacher, i)
        events = token.events(expected)
        weight = reference.ratio(reference.difficulty(events, expected), 0.4, expected)
        assert found[i].item() == pytest.approx(
            reference.token_loss(token, expected, weight), abs=1e-12
        )
        gradient = float(upstream[i]) * reference.token_gradient(token, expected, weight)
        np.testing.assert_allclose(logits.grad[i].numpy(), gradient, atol=2e-8)


@pytest.mark.parametrize("divergence", sorted(set(DIVERGENCES) - {"adaptive_kl"}))
@pytest.mark.parametrize("schedule", ["step", "linear", "exp"])
@pytest.mark.parametrize("integration", ["blend", "student", "target"])
def test_gradcheck(divergence: str, schedule: str, integration: str) -> None:
    # adaptive_kl holds its weights fixed and evolved its target, so gradcheck cannot judge them; the
    # test above does.
    options = SelfEvolution(
        gamma=0.3,
        gamma_type="absolute",
        schedule=schedule,
        integration=integration,
        divergence=divergence,
    )
    logits, log_p, target = random_case(seed=1, tokens=3, vocab=7)
    teacher = TeacherTokens.from_top_k(log_p, target, 3)
    # No gradient flows through the difficulty, so it is held fixed.
    difficulty = torch.tensor([0.1, 0.9, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: token_losses(z, teacher, options, difficulty=difficulty),
        logits.requires_grad_(),
    )


def test_gradcheck_of_the_primitive_with_padding_and_forbidden_tokens() -> None:
    logits, log_p, target = random_case(seed=2, tokens=4, vocab=9)
    logits[1, 8] = -INF if target[1] != 8 else 0.0
    teacher = TeacherTokens.from_top_k(log_p, target, 3)
    rows = torch.tensor([0, 1, 3])
    ids, valid = teacher.ids[rows], torch.ones(3, 3, dtype=torch.bool)
    ids[2, 2], valid[2, 2] = ids[2, 0], False  # an unused slot repeats the reference

    def scalars(finite: Tensor) -> Tensor:
        z = logits.masked_fill(logits.isfinite(), 0.0) + finite
        out = support_log_probs(z, rows, ids, valid, with_sum=True)
        weighted = support_log_probs(z, rows, ids, valid, with_sum=True, weights=tail_law(9))
        kept = out.log_q.masked_fill(~torch.isfinite(out.log_q), 0.0)
        return torch.cat([kept.flatten(), out.log_outside, out.sum_log_q, weighted.sum_log_q])

    assert torch.autograd.gradcheck(scalars, torch.nan_to_num(logits, neginf=0.0).requires_grad_())


@pytest.mark.parametrize("mode", MODES)
def test_dense_teacher_is_a_support_of_the_whole_vocabulary(mode: str) -> None:
    logits, log_p, target = random_case(seed=5)
    options = SelfEvolution(
        gamma=0.4, gamma_type="absolute", integration="target", missing_mass=mode
    )
    dense = token_losses(logits, TeacherTokens.from_dense(log_p, target), options)
    full = token_losses(logits, TeacherTokens.from_top_k(log_p, target, 12), options)
    torch.testing.assert_close(dense, full)
    full_kl = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)
    plain = replace(options, lambda_max=0.0)
    torch.testing.assert_close(
        token_losses(logits, TeacherTokens.from_dense(log_p, target), plain), full_kl
    )


def test_no_ratio_is_word_level_kd_and_constant_ratio_is_skew_kl() -> None:
    logits, log_p, target = random_case(seed=6)
    teacher = TeacherTokens.from_top_k(log_p, target, 5)
    plain = token_losses(logits, teacher, SelfEvolution(lambda_max=0.0), gamma=0.0)
    student = support_log_probs(logits, torch.arange(5), teacher.ids, teacher.valid)
    events = build_events(teacher, student, "bucket")
    torch.testing.assert_close(plain, forward_kl(events.log_p, events.log_q))
    skew = SelfEvolution(
        gamma=0.0, gamma_type="absolute", lambda_max=0.3, schedule="step", beta=1.0,
        integration="student",
    )  # fmt: skip
    torch.testing.assert_close(
        token_losses(logits, teacher, skew),
        forward_kl(events.log_p, log_mix(events.log_q, events.log_p, 0.3)),
    )


@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(2, 30),
    k=st.integers(1, 30),
    sharp=st.sampled_from([0.1, 2.0, 30.0, 1e4]),
    divergence=st.sampled_from(sorted(DIVERGENCES)),
    integration=st.sampled_from(INTEGRATIONS),
    schedule=st.sampled_from(["step", "linear", "exp"]),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=300, deadline=None)
def test_never_nan_never_negative(
    seed: int,
    vocab: int,
    k: int,
    sharp: float,
    divergence: str,
    integration: str,
    schedule: str,
    mode: str,
    dtype: torch.dtype,
) -> None:
    if mode in SPREAD:
        divergence, integration = "forward_kl", "target"
    if integration == "evolved" and divergence == "tvd":
        return  # refused
    logits, log_p, target = random_case(seed, tokens=6, vocab=vocab, sharp=sharp)
    logits = logits.to(dtype).requires_grad_()
    teacher = TeacherTokens.from_top_k(log_p.float(), target, k)
    options = SelfEvolution(
        gamma=0.2,
        gamma_type="absolute",
        schedule=schedule,
        integration=integration,
        divergence=divergence,
        missing_mass=mode,
    )
    loss = token_losses(logits, teacher, options)
    assert not loss.isnan().any()
    # What spreads the mass leaves its rounding as it is, which grows with the size of the logits.
    assert (loss >= (-1e-6 * max(1.0, sharp) if mode in SPREAD else 0.0)).all()
    if torch.isfinite(loss).all():
        loss.sum().backward()
        assert not logits.grad.isnan().any()


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("mode", ["bucket", "renormalize"])
@pytest.mark.parametrize("k", [1, 3, 12])
def test_zero_where_teacher_and_student_agree(divergence: str, mode: str, k: int) -> None:
    _, log_p, target = random_case(seed=8)
    logits = (log_p + 3.0).float()  # softmax undoes the shift
    teacher = TeacherTokens.from_top_k(log_p.float(), target, k)
    plain = SelfEvolution(lambda_max=0.0, divergence=divergence, missing_mass=mode)
    loss = token_losses(logits, teacher, plain, gamma=1.0)
    assert loss.abs().max() < 1e-6


@pytest.mark.parametrize("k", [1, 4])
def test_a_tail_that_follows_the_law_is_restored(k: int) -> None:
    """Then nothing is missing: the loss is that of the whole distribution, with its gradient, also
    where the student forbids a token of the tail."""
    law = tail_law(12)
    logits, _, target = random_case(seed=9)
    ids = TeacherTokens.from_top_k(logits.log_softmax(-1), target, k).ids  # any support
    log_p = law.log().repeat(5, 1).scatter_add(1, ids, torch.ones(5, k, dtype=torch.float64))
    log_p = log_p.log_softmax(-1)
    outside = log_p.exp().scatter(1, ids, 0.0).sum(dim=1)
    teacher = TeacherTokens(ids, torch.ones_like(ids).bool(), log_p.gather(1, ids), outside.log())
    options = SelfEvolution(lambda_max=0.0, missing_mass="tail")
    leaf = logits.clone().requires_grad_()
    loss = token_losses(leaf, teacher, options, gamma=1.0)
    torch.testing.assert_close(loss, forward_kl(log_p, logits.log_softmax(-1)))
    (found,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(found, logits.softmax(-1) - log_p.exp())
    free = torch.ones(12).index_fill(0, ids.unique(), 0.0).nonzero()[0]
    forbidden = logits.index_fill(1, free, -INF)
    loss = token_losses(forbidden, teacher, options, gamma=1.0)
    spread = log_p.index_fill(1, free, -INF)
    outside_left = spread.exp().scatter(1, ids, 0.0).sum(dim=1)
    spread = spread + (outside / outside_left).log().unsqueeze(1)
    spread = spread.scatter(1, ids, log_p.gather(1, ids))
    torch.testing.assert_close(loss, forward_kl(spread, forbidden.log_softmax(-1)))


def test_a_tail_needs_a_law() -> None:
    logits, log_p, target = random_case(seed=5)
    teacher = TeacherTokens.from_top_k(log_p, target, 3)
    student = support_log_probs(logits, torch.arange(5), teacher.ids, teacher.valid, True)
    with pytest.raises(ValueError, match="tail law"):
        build_events(teacher, student, "tail")


@given(seed=st.integers(0, 1000), k=st.integers(1, 11))
@settings(max_examples=10, deadline=None)
def test_bucket_is_a_lower_bound_that_grows_with_the_support(seed: int, k: int) -> None:
    logits, log_p, target = random_case(seed, tokens=50)
    plain = SelfEvolution(lambda_max=0.0)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd"):
        plain = replace(plain, divergence=divergence)
        small, large, full = (
            token_losses(logits, TeacherTokens.from_top_k(log_p, target, size), plain, gamma=1.0)
            for size in (k, k + 1, 12)
        )
        assert (small <= large + 1e-12).all()
        assert (large <= full + 1e-12).all()


def test_hand_worked_mixture_of_probabilities_not_of_logs() -> None:
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), y = token 0, lambda = beta = 1/2:
    # r = (3/4, 1/8, 1/8), q~ = (1/2, 5/16, 3/16), p~ = (5/8, 3/16, 3/16).
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    base = SelfEvolution(
        gamma=0.0, gamma_type="absolute", schedule="step", lambda_max=0.5, integration="student"
    )
    teacher = TeacherTokens.from_dense(p.log(), torch.tensor([0]))
    by_hand = 0.25 * np.log(0.25 / (5 / 16)) + 0.25 * np.log(0.25 / (3 / 16))
    assert token_losses(q.log(), teacher, base).item() == pytest.approx(by_hand, abs=1e-6)
    by_hand = 5 / 8 * np.log(2.5) + 3 / 16 * np.log(3 / 8) + 3 / 16 * np.log(3 / 4)
    target = replace(base, integration="target")
    assert token_losses(q.log(), teacher, target).item() == pytest.approx(by_hand, abs=1e-6)
    # JSD with weight 1/4 on the teacher: m = p/4 + 3q/4, not the other way round.
    m = 0.25 * p + 0.75 * q
    by_hand = 0.25 * (p * (p / m).log()).sum() + 0.75 * (q * (q / m).log()).sum()
    assert jsd(p.log(), q.log(), 0.25).item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert tvd(p.log(), q.log()).item() == pytest.approx(0.25)


def test_student_mode_gradient_starves_what_the_student_does_not_know() -> None:
    logits, log_p, target = random_case(seed=9, tokens=1)
    teacher = TeacherTokens.from_dense(log_p, target)
    options = SelfEvolution(
        gamma=0.0, gamma_type="absolute", schedule="step", beta=0.4, integration="student"
    )
    logits.requires_grad_()
    token_losses(logits, teacher, options).sum().backward()
    p, q = log_p.exp(), logits.detach().softmax(-1)
    y = torch.nn.functional.one_hot(target, 12)
    mixed = 0.5 * q + 0.5 * (0.4 * p + 0.6 * y)
    w = p / mixed
    expected = -0.5 * q * (w - (w * q).sum())
    torch.testing.assert_close(logits.grad, expected)


def test_extreme_logits_peaked_teacher_and_exact_outside_mass() -> None:
    # The student's outside mass is e^-30, far below float32's resolution of 1: 1 - sum would be 0.
    logits = torch.tensor([[0.0, -30.0, -1e4, -INF]], requires_grad=True)
    teacher = TeacherTokens(
        ids=torch.tensor([[0]]),
        valid=torch.tensor([[True]]),
        log_p=torch.tensor([[0.0]]),
        log_outside=torch.tensor([-20.0]),
    )
    student = support_log_probs(logits, torch.tensor([0]), teacher.ids, teacher.valid)
    assert student.log_outside.item() == pytest.approx(-30.0, rel=1e-6)
    loss = token_losses(logits, teacher, SelfEvolution(lambda_max=0.0), gamma=1.0)
    # e^-20 (log(e^-20 / e^-30) - 1); the -1 comes from the other event and is below float32's 1.
    assert loss.item() == pytest.approx(np.exp(-20.0) * 9.0, rel=0.15)
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_no_outside_mass_on_either_side() -> None:
    logits = torch.tensor([[1.0, 0.0, -INF]], requires_grad=True)
    teacher = TeacherTokens(
        ids=torch.tensor([[0, 1]]),
        valid=torch.ones(1, 2, dtype=torch.bool),
        log_p=torch.tensor([[0.75, 0.25]]).log(),
        log_outside=torch.tensor([-INF]),
    )
    for mode in MODES:
        options = SelfEvolution(lambda_max=0.5, integration="target", missing_mass=mode)
        loss = token_losses(logits, teacher, options, gamma=0.0)
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(logits.grad).all()


def test_the_best_tokens_log_probability_is_exact() -> None:
    # So that agreement can be counted by comparing the two.
    logits = torch.randn(2000, 30, generator=torch.Generator().manual_seed(3)) * 5 + 40
    best = logits.argmax(dim=1, keepdim=True)
    student = support_log_probs(logits, torch.arange(2000), best, torch.ones_like(best).bool())
    assert (student.log_q[:, 0] == student.max_log_q).all()


def test_a_batch_of_padding_only() -> None:
    logits = torch.randn(4, 9, requires_grad=True)
    none = torch.zeros(0, 3, dtype=torch.long)
    student = support_log_probs(logits, none[:, 0], none, none.bool(), with_sum=True)
    teacher = TeacherTokens(none, none.bool(), none.float(), none[:, 0].float())
    for kind in ("absolute", "quantile"):
        options = SelfEvolution(gamma=0.5, gamma_type=kind)
        output = self_evolution_kd(build_events(teacher, student, "bucket"), options)
        assert output.divergence.sum().item() == 0.0
    output.divergence.sum().backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_half_precision_logits(dtype: torch.dtype, tolerance: float) -> None:
    # The logits are rounded (that is the tolerance); arithmetic on them is float32.
    logits, log_p, target = random_case(seed=12, tokens=20, vocab=50)
    teacher = TeacherTokens.from_top_k(log_p.float(), target, 8)
    options = SelfEvolution(gamma=0.5, gamma_type="absolute")
    exact = token_losses(logits.float(), teacher, options)
    rounded = token_losses(logits.to(dtype), teacher, options)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=tolerance, atol=tolerance)
    same = token_losses(logits.to(dtype).float(), teacher, options)
    torch.testing.assert_close(rounded, same, rtol=1e-6, atol=1e-6)


def test_accumulation_and_order_do_not_matter() -> None:
    logits, log_p, target = random_case(seed=13, tokens=16)
    teacher = TeacherTokens.from_top_k(log_p, target, 4)
    options = SelfEvolution(gamma=0.5, gamma_type="absolute")
    whole = token_losses(logits, teacher, options)
    order = torch.randperm(16)

    parts = [token_losses(logits[i], teacher[i], options) for i in (order[:5], order[5:])]
    torch.testing.assert_close(torch.cat(parts), whole[order])


def test_sampled_support_estimates_the_forward_kl_without_bias() -> None:
    logits, log_p, target = random_case(seed=14, tokens=1, vocab=8)
    generator = torch.Generator().manual_seed(0)
    trials, draws = 4000, 3
    sampled = torch.multinomial(
        log_p.exp().expand(trials, -1), draws, replacement=True, generator=generator
    )
    counts = torch.zeros(trials, 8, dtype=torch.float64).scatter_add_(
        1, sampled, torch.ones(trials, draws, dtype=torch.float64)
    )
    dense = TeacherTokens.from_dense(log_p.expand(trials, -1), target.expand(trials))
    teacher = replace(dense, log_weight=(counts / draws).log().gather(1, dense.ids))
    wide = logits.expand(trials, -1).clone().requires_grad_()
    options = SelfEvolution(lambda_max=0.0, missing_mass="sampled")
    loss = token_losses(wide, teacher, options, gamma=1.0)
    loss.mean().backward()
    exact = logits.clone().requires_grad_()
    truth = (log_p.exp() * (log_p - exact.log_softmax(-1))).sum()
    truth.backward()
    error = loss.std() / trials**0.5
    assert abs(loss.mean() - truth) < 4 * error
    student = support_log_probs(wide, torch.arange(trials), teacher.ids, teacher.valid)
    events = build_events(teacher, student, "sampled")
    difficulty = token_difficulty(events, events.log_p, "teacher")
    assert difficulty.min() < 0  # a clamp would raise the mean
    assert abs(difficulty.mean() - truth) < 4 * error
    per_draw = wide.grad * trials  # (trials, V)
    error = per_draw.std(dim=0) / trials**0.5
    assert ((per_draw.mean(dim=0) - exact.grad[0]).abs() < 4.5 * error).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lambda_max": 1.0}, "below 1"),
        ({"lambda_max": 1 - 1e-8}, "float32"),  # 1 there, and the loss of a hard token infinite
        ({"lambda_max": -0.1}, "0 or more"),
        ({"gamma": -0.1, "gamma_type": "absolute"}, "0 or more"),
        ({"gamma": 1.5}, "quantile"),
        ({"scale": 0.0}, "above 0"),
        ({"scale": 1e-46}, "above 0"),  # 0 in float32
        ({"scale": 1e39}, "finite"),
        ({"beta": 1.2}, "from 0 to 1"),
        ({"divergence": "kl"}, "forward_kl"),
        ({"divergence_weight": 1.0, "divergence": "jsd"}, "below 1"),
        ({"divergence_weight": 1 - 1e-8, "divergence": "skew_forward_kl"}, "float32"),
        ({"divergence_weight": 1e-46, "divergence": "jsd"}, "float32"),
        ({"missing_mass": "uniform", "integration": "student"}, "linear"),
        ({"missing_mass": "tail", "integration": "student"}, "linear"),
        ({"missing_mass": "tail", "divergence": "jsd"}, "linear"),
        ({"missing_mass": "tail", "integration": "evolved"}, "bucket"),
        ({"missing_mass": "uniform", "integration": "blend"}, "linear"),
        ({"missing_mass": "uniform", "integration": "evolved"}, "bucket"),
        ({"missing_mass": "sampled", "integration": "evolved"}, "top-k"),
        ({"divergence": "tvd", "integration": "evolved"}, "ratio"),
        ({"integration": "teacher"}, "blend, evolved, student, target"),
        ({"difficulty": "loss"}, "nll, prior, teacher"),
        ({"missing_mass": "uniform", "divergence": "reverse_kl", "lambda_max": 0.0}, "linear"),
        ({"missing_mass": "sampled", "divergence": "tvd"}, "not sampled"),
        ({"missing_mass": "drop"}, "bucket"),
    ],
)
def test_settings_without_meaning_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SelfEvolution(**options)


def test_the_largest_ratio_that_is_taken_gives_a_finite_loss() -> None:
    """Near a ratio of 1 the mixture is the reference, and the rest of the student still counts."""
    largest = 1 - 2.0**-24  # the last float32 below 1
    options = SelfEvolution(
        lambda_max=largest, beta=0.0, integration="student", schedule="step", gamma=0.0,
        gamma_type="absolute",
    )  # fmt: skip
    logits = torch.tensor([[30.0, 0.0, -30.0]], requires_grad=True)
    log_p = torch.tensor([[0.2, 0.3, 0.5]]).log()
    loss = token_losses(logits, TeacherTokens.from_dense(log_p, torch.tensor([0])), options)
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()
    assert (logits.grad != 0).any()


@given(
    schedule=st.sampled_from(["step", "linear", "exp"]),
    gamma=st.floats(0, 5),
    scale=st.floats(0.01, 10),
)
def test_ratio_never_decreases_and_is_zero_on_easy_tokens(
    schedule: str, gamma: float, scale: float
) -> None:
    options = SelfEvolution(schedule=schedule, scale=scale, lambda_max=0.8)
    difficulty = torch.linspace(0, 20, 401, dtype=torch.float64)
    weight = ratio(difficulty, gamma, options)
    assert (weight[difficulty <= gamma] == 0).all()
    assert (weight.diff() >= 0).all() and (weight <= 0.8).all()
    if schedule != "step":
        just_above = ratio(torch.tensor([gamma + 1e-9], dtype=torch.float64), gamma, options)
        assert just_above.item() < 1e-6


def test_running_quantile_finds_the_quantile() -> None:
    generator = torch.Generator().manual_seed(1)
    difficulty = torch.randn(200_000, generator=generator).exp()
    tracker = RunningQuantile(0.7)
    for part in difficulty.split(500):
        tracker.update(float((part > tracker.value).sum()), len(part))
    assert tracker.value == pytest.approx(difficulty.quantile(0.7).item(), rel=0.1)
    before = tracker.value
    tracker.update(0.0, 0.0)
    assert tracker.value == before
    tracker.update(3.0, 4.0)  # by hand: 0.75 of the tokens were hard, 0.3 should be
    assert tracker.value == pytest.approx(before * math.exp(0.5 * 0.45), rel=1e-12)


def test_batch_quantile_is_numpys() -> None:
    logits, log_p, target = random_case(seed=15, tokens=11)
    teacher = TeacherTokens.from_top_k(log_p, target, 4)
    student = support_log_probs(logits, torch.arange(11), teacher.ids, teacher.valid)
    options = SelfEvolution(gamma=0.35, gamma_type="quantile")
    output = self_evolution_kd(build_events(teacher, student, "bucket"), options)
    assert output.gamma.item() == pytest.approx(np.quantile(output.difficulty.numpy(), 0.35))


def test_weighted_divergences_take_their_weight() -> None:
    logits, log_p, target = random_case(seed=16)
    teacher = TeacherTokens.from_top_k(log_p, target, 4)
    for name in WEIGHTED:
        one, other = (
            token_losses(
                logits,
                teacher,
                SelfEvolution(lambda_max=0.0, divergence=name, divergence_weight=weight),
                gamma=1.0,
            )
            for weight in (0.1, 0.4)
        )
        assert not torch.allclose(one, other)
