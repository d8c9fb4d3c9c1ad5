"""Every reading of SE-KD: its optimum, its gradient, what it equals, on every path of the losses."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sekd_fairseq.losses import (
    DIVERGENCES,
    SelfEvolution,
    TeacherTokens,
    build_events,
    chunked_loss,
    self_evolution_kd,
    support_log_probs,
)
from sekd_fairseq.losses.divergences import forward_kl, relative_entropy
from sekd_fairseq.losses.integration import READINGS
from sekd_fairseq.losses.self_evolution import PARTNERS, prior, token_difficulty

VOCAB = 6
Path = Callable[[Tensor, TeacherTokens, SelfEvolution, Tensor], Tensor]


def plain(
    logits: Tensor, teacher: TeacherTokens, settings: SelfEvolution, difficulty: Tensor
) -> Tensor:
    """The summed loss at these logits, difficulty given."""
    rows = torch.arange(len(logits))
    student = support_log_probs(
        logits, rows, teacher.ids, teacher.valid, with_sum=True, weights=teacher.tail
    )
    events = build_events(teacher, student, settings.missing_mass)
    return self_evolution_kd(events, settings, difficulty=difficulty).divergence.sum()


def chunked(
    logits: Tensor, teacher: TeacherTokens, settings: SelfEvolution, difficulty: Tensor
) -> Tensor:
    """The same in chunks of two tokens, the logits being features of a projection."""
    identity = torch.eye(logits.size(1), dtype=logits.dtype)

    def part_loss(part_logits: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return plain(part_logits, teacher[part], settings, difficulty[part]), {}

    return chunked_loss(logits, identity, None, part_loss, 2)[0]


#: Ways through the losses; each must do the same.
PATHS: dict[str, Path] = {"plain": plain, "chunked": chunked}


def case(
    seed: int = 0, tokens: int = 5, vocab: int = VOCAB
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student logits, teacher log-probabilities, references, and a difficulty of which the first is
    easy and the others hard with ratios from 0.1 to 0.6 (:func:`settings_of`); float64."""
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(2, tokens, vocab, generator=generator, dtype=torch.float64)
    # The reference is likely, so that the optimum of student, below p there, is a distribution.
    target = teacher.argmax(dim=1)
    teacher = teacher.scatter(1, target.unsqueeze(1), 3.0)
    difficulty = torch.linspace(0.0, 1.0, tokens, dtype=torch.float64)
    return 2 * logits, teacher.log_softmax(-1), target, difficulty


def settings_of(integration: str, **options: object) -> SelfEvolution:
    return SelfEvolution(
        **{
            "integration": integration,
            "gamma": 0.0,
            "gamma_type": "absolute",
            "lambda_max": 0.6,
            "beta": 0.3,
            **options,
        }  # type: ignore[arg-type]
    )


def distributions(
    logits: Tensor, log_p: Tensor, target: Tensor, settings: SelfEvolution, difficulty: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """p, q, y, r and lambda as probabilities, over the vocabulary in its own order."""
    p, q = log_p.exp(), logits.detach().softmax(-1)
    y = torch.nn.functional.one_hot(target, logits.size(1)).to(p)
    assert settings.beta is not None
    r = settings.beta * p + (1 - settings.beta) * y
    return p, q, y, r, settings.lambda_max * difficulty.clamp(0, 1).unsqueeze(1)


def gradient(path: Path, logits: Tensor, *rest: object) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(path(leaf, *rest), leaf)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("integration", READINGS)
def test_gradient_is_the_one_the_docstring_says(integration: str, path: Path) -> None:
    logits, log_p, target, difficulty = case()
    settings = settings_of(integration)
    teacher = TeacherTokens.from_dense(log_p, target)
    p, q, _, r, lam = distributions(logits, log_p, target, settings, difficulty)
    mixed = (1 - lam) * q + lam * r

    def through_student(a: Tensor) -> Tensor:
        w = a / mixed
        return -(1 - lam) * q * (w - (w * q).sum(dim=1, keepdim=True))

    expected = {
        "blend": through_student(r),
        "evolved": (q - p) + lam * (q - r),
        "student": through_student(p),
        "target": q - (1 - lam) * p - lam * r,
    }[integration]
    found = gradient(path, logits, teacher, settings, difficulty)
    torch.testing.assert_close(found, expected)
    assert lam[0] == 0  # an easy token: word-level KD, from the prior for blend
    torch.testing.assert_close(found[0], (q - (r if integration == "blend" else p))[0])


def optimum(integration: str, p: Tensor, y: Tensor, r: Tensor, lam: Tensor, beta: float) -> Tensor:
    return {
        "blend": r,
        "evolved": (p + lam * r) / (1 + lam),
        "student": p + lam / (1 - lam) * (1 - beta) * (p - y),
        "target": (1 - lam) * p + lam * r,
    }[integration]


@pytest.mark.parametrize("integration", READINGS)
def test_descent_ends_at_the_optimum_the_docstring_says(integration: str) -> None:
    logits, log_p, target, difficulty = case()
    settings = settings_of(integration)
    teacher = TeacherTokens.from_dense(log_p, target)
    p, _, y, r, lam = distributions(logits, log_p, target, settings, difficulty)
    logits = (logits / 2).requires_grad_()
    options = {"tolerance_grad": 1e-9, "tolerance_change": 1e-15, "max_iter": 300}
    if integration == "evolved":  # its target moves with it: no value to search along a line
        optimiser = torch.optim.LBFGS([logits], lr=0.5, **options)
    else:
        optimiser = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **options)

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = plain(logits, teacher, settings, difficulty)
        loss.backward()
        return loss

    optimiser.step(step)
    logits = logits.detach()
    expected = optimum(integration, p, y, r, lam, 0.3)
    assert (expected >= 0).all()
    torch.testing.assert_close(logits.softmax(-1), expected, rtol=0, atol=1e-6)
    if integration == "student":  # biased: below the teacher on the reference
        assert (logits.softmax(-1) < p)[1:].gather(1, target[1:].unsqueeze(1)).all()


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_blend_is_least_where_the_student_is_the_prior(divergence: str) -> None:
    _, log_p, target, difficulty = case(seed=1)
    settings = settings_of("blend", divergence=divergence)
    r = distributions(log_p, log_p, target, settings, difficulty)[3]
    teacher = TeacherTokens.from_dense(log_p, target)
    least = plain(r.log(), teacher, settings, difficulty)
    assert 0 <= least < 1e-12
    for seed in range(20):
        noise = case(seed)[0]
        assert plain(r.log() + 0.3 * noise, teacher, settings, difficulty) > least


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, None])
def test_target_is_word_level_kd_with_a_weight_a_token(beta: float | None, path: Path) -> None:
    """alpha_i = alpha (1 - lambda_i (1 - beta_i)): equal gradients, values apart by a constant."""
    alpha = 0.7
    logits, log_p, target, difficulty = case(seed=2)
    teacher = TeacherTokens.from_top_k(log_p, target, 4)
    settings = settings_of("target", beta=beta)
    share = log_p.exp().gather(1, target.unsqueeze(1)).squeeze(1) if beta is None else beta
    alpha_i = alpha * (1 - 0.6 * difficulty * (1 - share))

    def nll(z: Tensor) -> Tensor:
        return -z.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)

    def reading(z: Tensor) -> Tensor:
        return alpha * path(z, teacher, settings, difficulty) + (1 - alpha) * nll(z).sum()

    def weighted(z: Tensor) -> Tensor:
        rows = torch.arange(len(z))
        student = support_log_probs(z, rows, teacher.ids, teacher.valid)
        log_p, log_q, _ = build_events(teacher, student, "bucket")
        return (alpha_i * forward_kl(log_p, log_q) + (1 - alpha_i) * nll(z)).sum()

    torch.testing.assert_close(gradient(reading, logits), gradient(weighted, logits))  # type: ignore[arg-type]
    other = case(seed=3)[0]
    apart = [reading(z) - weighted(z) for z in (logits, other)]
    torch.testing.assert_close(apart[0], apart[1])
    # The constant: what the targets' entropies differ by.
    rows = torch.arange(len(logits))
    student = support_log_probs(logits, rows, teacher.ids, teacher.valid)
    p = build_events(teacher, student, "bucket").log_p
    mixed = prior(p, beta).exp() * (0.6 * difficulty).unsqueeze(1)
    mixed = mixed + p.exp() * (1 - 0.6 * difficulty).unsqueeze(1)

    def entropy(x: Tensor) -> Tensor:
        return -torch.xlogy(x, x).sum(dim=1)

    constant = (alpha_i * entropy(p.exp()) - alpha * entropy(mixed)).sum()
    torch.testing.assert_close(apart[0], constant)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_evolved_is_target_with_another_ratio_and_heavier_hard_tokens(path: Path) -> None:
    logits, log_p, target, _ = case(seed=4)
    teacher = TeacherTokens.from_top_k(log_p, target, 4)
    hard = torch.ones(5, dtype=torch.float64)
    evolved = gradient(path, logits, teacher, settings_of("evolved"), hard)
    same = settings_of("target", lambda_max=0.6 / 1.6)
    torch.testing.assert_close(evolved, 1.6 * gradient(path, logits, teacher, same, hard))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("integration", READINGS)
@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_without_a_ratio_it_is_the_plain_divergence(
    divergence: str, integration: str, path: Path
) -> None:
    """From the teacher, or for blend from the prior; by ``lambda_max`` and by easy tokens alone."""
    logits, log_p, target, difficulty = case(seed=5)
    teacher = TeacherTokens.from_top_k(log_p, target, 4)
    rows = torch.arange(len(logits))

    def divergence_of(z: Tensor) -> Tensor:
        student = support_log_probs(z, rows, teacher.ids, teacher.valid)
        events = build_events(teacher, student, "bucket")
        log_a = prior(events.log_p, 0.3) if integration == "blend" else events.log_p
        options = {"weight": 0.5} if divergence in ("jsd",) or "skew" in divergence else {}
        return DIVERGENCES[divergence](log_a, events.log_q, **options).sum()

    expected, slope = divergence_of(logits), gradient(divergence_of, logits)  # type: ignore[arg-type]
    off = settings_of(integration, divergence=divergence, lambda_max=0.0)
    cases = [(off, difficulty)]
    if (integration, divergence) != ("evolved", "tvd"):
        cases.append((replace(off, lambda_max=0.6), torch.zeros_like(difficulty)))
    for settings, d in cases:
        torch.testing.assert_close(path(logits, teacher, settings, d), expected)
        torch.testing.assert_close(gradient(path, logits, teacher, settings, d), slope)


def test_blend_without_a_ratio_is_word_level_kd_with_alpha_beta() -> None:
    logits, log_p, target, difficulty = case(seed=6)
    _, q, y, _, _ = distributions(logits, log_p, target, settings_of("blend"), difficulty)
    found = gradient(
        plain,
        logits,
        TeacherTokens.from_dense(log_p, target),
        settings_of("blend", lambda_max=0.0),
        difficulty,
    )
    torch.testing.assert_close(found, 0.3 * (q - log_p.exp()) + 0.7 * (q - y))


@pytest.mark.parametrize("missing_mass", ["bucket", "renormalize", "uniform", "tail", "sampled"])
@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("integration", READINGS)
def test_paths_are_alike(integration: str, divergence: str, missing_mass: str) -> None:
    try:
        settings = settings_of(integration, divergence=divergence, missing_mass=missing_mass)
    except ValueError:
        return  # has no meaning; test_losses names which do
    logits, log_p, target, difficulty = case(seed=7, vocab=9)
    teacher = TeacherTokens.from_top_k(log_p, target, 4)
    teacher = replace(teacher, log_weight=teacher.log_p + 0.1)
    if missing_mass == "tail":
        teacher = replace(teacher, tail=torch.linspace(0.1, 5.0, 9, dtype=torch.float64))
    expected = plain(logits, teacher, settings, difficulty)
    slope = gradient(plain, logits, teacher, settings, difficulty)
    for path in PATHS.values():
        torch.testing.assert_close(path(logits, teacher, settings, difficulty), expected)
        torch.testing.assert_close(gradient(path, logits, teacher, settings, difficulty), slope)


def test_evolved_with_a_bucket_is_a_lower_bound_with_the_exact_gradient_on_the_support() -> None:
    logits, log_p, target, difficulty = case(seed=8, vocab=9)
    settings = settings_of("evolved")
    dense, cut = TeacherTokens.from_dense(log_p, target), TeacherTokens.from_top_k(log_p, target, 4)
    assert plain(logits, cut, settings, difficulty) < plain(logits, dense, settings, difficulty)
    full = gradient(plain, logits, dense, settings, difficulty)
    found = gradient(plain, logits, cut, settings, difficulty)
    torch.testing.assert_close(found.gather(1, cut.ids), full.gather(1, cut.ids))
    torch.testing.assert_close(found.sum(dim=1), full.sum(dim=1))
    outside = torch.ones_like(found).scatter(1, cut.ids, 0.0)
    shares = logits.softmax(-1) * outside
    shares = shares / shares.sum(dim=1, keepdim=True)
    expected = (full * outside).sum(dim=1, keepdim=True) * shares
    torch.testing.assert_close(found * outside, expected)


@pytest.mark.parametrize("integration", ["blend", "student", "target"])
def test_a_sampled_support_estimates_value_and_gradient_without_bias(integration: str) -> None:
    """Where difficulty is not measured on the sample itself."""
    logits, log_p, target, _ = case(seed=9, tokens=1, vocab=8)
    generator = torch.Generator().manual_seed(0)
    trials, draws = 8000, 3
    chosen = torch.multinomial(
        log_p.exp().expand(trials, -1), draws, replacement=True, generator=generator
    )
    counts = torch.zeros(trials, 8, dtype=torch.float64)
    counts.scatter_add_(1, chosen, torch.ones(trials, draws, dtype=torch.float64))
    dense = TeacherTokens.from_dense(log_p.expand(trials, -1), target.expand(trials))
    sampled = replace(dense, log_weight=(counts / draws).log().gather(1, dense.ids))
    settings = settings_of(integration, missing_mass="sampled")
    hard = torch.ones(trials, dtype=torch.float64)
    per_draw = gradient(plain, logits.expand(trials, -1), sampled, settings, hard)
    exact_settings = replace(settings, missing_mass="bucket")
    one = TeacherTokens.from_dense(log_p, target)
    exact = gradient(plain, logits, one, exact_settings, hard[:1])
    error = per_draw.std(dim=0) / trials**0.5
    assert ((per_draw.mean(dim=0) - exact[0]).abs() < 4.5 * error + 1e-12).all()


def test_difficulty_by_its_three_measures() -> None:
    logits, log_p, target, _ = case(seed=10)
    teacher = TeacherTokens.from_top_k(log_p, target, 4)
    student = support_log_probs(logits, torch.arange(5), teacher.ids, teacher.valid)
    events = build_events(teacher, student, "bucket")
    log_r = prior(events.log_p, 0.3)
    nll = -logits.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
    for kind, expected in (
        ("teacher", relative_entropy(events.log_p, events.log_q, None)),
        ("prior", relative_entropy(log_r, events.log_q, None)),
        ("nll", nll),
    ):
        torch.testing.assert_close(token_difficulty(events, log_r, kind), expected)


def test_partners_of_each_reading() -> None:
    assert PARTNERS["blend"] == (1.0, 0.7, "prior")
    assert {PARTNERS[name] for name in READINGS if name != "blend"} == {(0.7, 0.5, "teacher")}
