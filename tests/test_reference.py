"""The reference against numbers worked by hand, identities of DESIGN.md, and SciPy and fairseq.

One file of more than 400 lines: it mirrors ``tests/reference.py``, definition by definition.
"""

import itertools
import math
from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from numpy.typing import ArrayLike
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr

from tests import reference as ref
from tests.reference import Settings, Token, log_of

# The example of all hand-worked numbers. It is not symmetric, so a swapped direction shows.
P = log_of([1 / 2, 1 / 4, 1 / 4])
Q = log_of([1 / 8, 1 / 8, 3 / 4])
DENSE = (0, 1, 2)
ALL_DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "adaptive_kl",
)


def close(value: ArrayLike) -> Any:
    return pytest.approx(value, rel=1e-13, abs=1e-15)


def random_token(seed: int, vocabulary: int = 7, spread: float = 2.0) -> Token:
    """A token with teacher and student at random and a support that holds gold."""
    rng = np.random.default_rng(seed)
    logits, teacher = rng.normal(0.0, spread, (2, vocabulary))
    order = rng.permutation(vocabulary)
    size = int(rng.integers(1, vocabulary + 1))
    gold = int(rng.choice(order[:size]))
    return Token(logits, ref.student_log_probs(teacher), tuple(order[:size].tolist()), gold)


# Distributions


def test_student_log_probs_by_hand() -> None:
    # exp of (log 1, log 1, log 6) is (1, 1, 6), of sum 8.
    assert ref.student_log_probs([0.0, 0.0, log(6)]) == close(Q)


def test_student_log_probs_allow_forbidden_tokens_and_large_logits() -> None:
    # Of (1e4, -1e4, -inf): exp(-2e4) is 0 in float64, its log is not.
    log_q = ref.student_log_probs([1e4, -1e4, -math.inf])
    assert log_q.tolist() == [0.0, -2e4, -math.inf]
    assert ref.forward_kl(log_of([0.5, 0.5, 0.0]), log_q) == close(0.5 * 2e4 - log(2))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_mixture_is_of_probabilities_not_of_logs(weight: float) -> None:
    assert np.exp(ref.mix(P, Q, weight)) == close((1 - weight) * np.exp(P) + weight * np.exp(Q))


def test_bucket_by_hand() -> None:
    # S = {0}: p = (1/2, 1/2), q = (1/8, 7/8), so KL = 1/2 log 4 + 1/2 log(4/7).
    e = ref.events(P, Q, [0], gold=0)
    assert (np.exp(e.log_p), np.exp(e.log_q), e.gold) == (
        close([0.5, 0.5]),
        close([1 / 8, 7 / 8]),
        0,
    )
    assert ref.forward_kl(e.log_p, e.log_q) == close(0.5 * log(4) + 0.5 * log(4 / 7))


def test_bucket_keeps_the_order_of_the_support() -> None:
    e = ref.events(P, Q, [2, 0], gold=0)
    assert np.exp(e.log_q) == close([3 / 4, 1 / 8, 1 / 8])
    assert e.gold == 1


def test_renormalize_by_hand() -> None:
    # S = {0, 1}: p = (2/3, 1/3), q = (1/2, 1/2).
    e = ref.events(P, Q, [0, 1], gold=1, missing_mass="renormalize")
    assert (np.exp(e.log_p), np.exp(e.log_q), e.gold) == (
        close([2 / 3, 1 / 3]),
        close([0.5, 0.5]),
        1,
    )


def test_uniform_by_hand() -> None:
    # S = {1}: the other 3/4 is halved; if token 0 is forbidden, all of it goes to token 2.
    even = ref.events(P, Q, [1], gold=1, missing_mass="uniform")
    assert np.exp(even.log_p) == close([3 / 8, 1 / 4, 3 / 8])
    assert even.log_q is Q
    one_forbidden = log_of([0.0, 1 / 4, 3 / 4])
    e = ref.events(P, one_forbidden, [1], gold=1, missing_mass="uniform")
    assert np.exp(e.log_p) == close([0.0, 1 / 4, 3 / 4])
    assert ref.forward_kl(e.log_p, e.log_q) == close(0.0)


def test_events_refuse_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="1 is not in"):
        ref.events(P, Q, [0], gold=1)
    with pytest.raises(ValueError, match="allows no token"):
        ref.events(P, log_of([0.0, 1.0, 0.0]), [1], gold=1, missing_mass="uniform")
    with pytest.raises(ValueError, match="unknown"):
        ref.events(P, Q, [0], gold=0, missing_mass="clamp")


@pytest.mark.parametrize("missing_mass", ["bucket", "renormalize", "uniform"])
@pytest.mark.parametrize("name", ALL_DIVERGENCES)
def test_full_support_is_the_dense_teacher(name: str, missing_mass: str) -> None:
    s = Settings(divergence=name)
    e = ref.events(P, Q, DENSE, gold=2, missing_mass=missing_mass)
    assert ref.divergence(e.log_p, e.log_q, s) == close(ref.divergence(P, Q, s))


@pytest.mark.parametrize("seed", range(20))
def test_bucket_is_a_lower_bound_and_grows_with_the_support(seed: int) -> None:
    token = random_token(seed)
    log_q = ref.student_log_probs(token.logits)
    order = [token.gold, *(v for v in range(7) if v != token.gold)]
    for divergence in (ref.forward_kl, ref.reverse_kl, ref.tvd):
        values = []
        for size in range(1, 8):
            e = ref.events(token.log_p, log_q, order[:size], token.gold)
            values.append(divergence(e.log_p, e.log_q))
        assert values[0] >= 0.0
        assert all(small <= large + 1e-14 for small, large in itertools.pairwise(values))
        assert values[-1] == close(divergence(token.log_p, log_q))


def test_renormalize_is_blind_to_the_mass_outside() -> None:
    # p and q agree on the ratio of tokens 0 and 1 and on nothing else: the bucket sees it.
    log_q = log_of([0.1, 0.05, 0.85])
    blind = ref.events(P, log_q, [0, 1], gold=0, missing_mass="renormalize")
    assert ref.forward_kl(blind.log_p, blind.log_q) == close(0.0)
    seen = ref.events(P, log_q, [0, 1], gold=0)
    assert ref.forward_kl(seen.log_p, seen.log_q) > 0.5


# Divergences


def test_kl_both_ways_by_hand() -> None:
    # p/q = (4, 2, 1/3).
    assert ref.forward_kl(P, Q) == close(0.5 * log(4) + 0.25 * log(2) - 0.25 * log(3))
    assert ref.reverse_kl(P, Q) == close(-log(4) / 8 - log(2) / 8 + 0.75 * log(3))


def test_jsd_by_hand() -> None:
    # m = p/4 + 3q/4 = (7, 5, 20)/32, p/m = (16/7, 8/5, 2/5), q/m = (4/7, 4/5, 6/5).
    kl_pm = 0.5 * log(16 / 7) + 0.25 * log(8 / 5) + 0.25 * log(2 / 5)
    kl_qm = log(4 / 7) / 8 + log(4 / 5) / 8 + 0.75 * log(6 / 5)
    assert ref.jsd(P, Q, 0.25) == close(0.25 * kl_pm + 0.75 * kl_qm)


def test_skew_kl_by_hand() -> None:
    # Forward at s = 1/4: 3q/4 + p/4 = (7, 5, 20)/32. Reverse: 3p/4 + q/4 = (13, 7, 12)/32.
    forward = 0.5 * log(16 / 7) + 0.25 * log(8 / 5) + 0.25 * log(2 / 5)
    assert ref.skew_forward_kl(P, Q, 0.25) == close(forward)
    reverse = log(4 / 13) / 8 + log(4 / 7) / 8 + 0.75 * log(2)
    assert ref.skew_reverse_kl(P, Q, 0.25) == close(reverse)


def test_tvd_by_hand() -> None:
    # |p - q| = (3/8, 1/8, 1/2).
    assert ref.tvd(P, Q) == close(0.5)


def test_adaptive_kl_by_hand() -> None:
    # The head is token 0, whose 1/2 just reaches the half: gaps 3/8 and 5/8, of sum 1.
    assert ref.adaptive_weights(P, Q) == (close(3 / 8), close(5 / 8))
    expected = 3 / 8 * ref.forward_kl(P, Q) + 5 / 8 * ref.reverse_kl(P, Q)
    assert ref.divergence(P, Q, Settings(divergence="adaptive_kl")) == close(expected)


def test_adaptive_head_holds_the_event_that_reaches_its_mass() -> None:
    # p = (0.2, 0.4, 0.4): the head is tokens 1 and 2, gaps 0.3 and 0.1; tail 0.2.
    log_p, log_q = log_of([0.2, 0.4, 0.4]), log_of([0.4, 0.1, 0.5])
    assert ref.adaptive_weights(log_p, log_q) == (close(2 / 3), close(1 / 3))
    # Of the equals 1 and 2 the first alone reaches 0.3.
    assert ref.adaptive_weights(log_p, log_q, 0.3) == (close(1 / 2), close(1 / 2))


def test_adaptive_kl_drops_a_term_of_share_zero() -> None:
    assert ref.adaptive_weights(P, P) == (0.0, 0.0)
    assert ref.divergence(P, P, Settings(divergence="adaptive_kl")) == 0.0
    # All of the difference is in the tail: only KL(q||p) = 1/2 log 2 counts, not KL(p||q) = inf.
    log_q = log_of([1 / 2, 0.0, 1 / 2])
    assert ref.adaptive_weights(P, log_q) == (0.0, 1.0)
    assert ref.divergence(P, log_q, Settings(divergence="adaptive_kl")) == close(0.5 * log(2))


def test_zeros() -> None:
    one, other, half = log_of([1.0, 0.0]), log_of([0.0, 1.0]), log_of([0.5, 0.5])
    assert ref.forward_kl(one, half) == close(log(2))
    assert ref.forward_kl(half, one) == math.inf
    assert ref.jsd(one, other, 0.5) == close(log(2))
    assert ref.jsd(one, other, 0.0) == 0.0
    assert ref.tvd(one, other) == 1.0
    assert ref.skew_forward_kl(one, other, 0.5) == close(log(2))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", ALL_DIVERGENCES)
def test_divergence_is_zero_at_equality_and_positive_elsewhere(name: str, seed: int) -> None:
    token, s = random_token(seed), Settings(divergence=name)
    assert ref.divergence(token.log_p, token.log_p, s) == pytest.approx(0.0, abs=1e-15)
    assert ref.divergence(token.log_p, ref.student_log_probs(token.logits), s) > 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_divergences_agree_with_scipy(seed: int) -> None:
    token = random_token(seed)
    log_p, log_q = token.log_p, log_softmax(token.logits)
    p, q = np.exp(log_p), np.exp(log_q)
    assert ref.student_log_probs(token.logits) == close(log_q)
    assert ref.forward_kl(log_p, log_q) == pytest.approx(rel_entr(p, q).sum(), rel=1e-12)
    assert ref.reverse_kl(log_p, log_q) == pytest.approx(rel_entr(q, p).sum(), rel=1e-12)
    assert ref.jsd(log_p, log_q, 0.5) == pytest.approx(jensenshannon(p, q) ** 2, rel=1e-12)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_jsd_vanishes_at_both_ends_and_its_slope_there_is_a_kl(weight: float) -> None:
    assert ref.jsd(P, Q, weight) == 0.0
    near = ref.jsd(P, Q, abs(weight - 1e-6)) / 1e-6
    kl = ref.forward_kl(P, Q) if weight == 0.0 else ref.reverse_kl(P, Q)
    assert near == pytest.approx(kl, rel=1e-4)


def test_jsd_swaps_its_arguments_with_its_weight() -> None:
    assert ref.jsd(P, Q, 0.3) == close(ref.jsd(Q, P, 0.7))
    assert ref.jsd(P, Q, 0.3) != pytest.approx(ref.jsd(P, Q, 0.7), rel=1e-3)


def test_decoupled_kl_by_hand() -> None:
    # (1/2, 1/2) to (1/8, 7/8), then half of the KL of (1/2, 1/2) to (1/7, 6/7).
    target, rest = ref.decoupled_kl(P, Q, gold=0)
    assert target == close(0.5 * log(4) + 0.5 * log(4 / 7))
    assert rest == close(0.5 * (0.5 * log(7 / 2) + 0.5 * log(7 / 12)))


@pytest.mark.parametrize("seed", range(20))
def test_decoupled_parts_sum_to_the_kl(seed: int) -> None:
    token = random_token(seed)
    e = token.events(Settings())
    target, rest = ref.decoupled_kl(e.log_p, e.log_q, e.gold)
    assert target + rest == pytest.approx(ref.forward_kl(e.log_p, e.log_q), rel=1e-12, abs=1e-15)
    assert target >= -1e-15
    assert rest >= -1e-15


def test_decoupled_kl_of_certain_sides() -> None:
    assert ref.decoupled_kl(log_of([1.0, 0.0]), log_of([0.25, 0.75]), 0) == (close(log(4)), 0.0)
    certain_student = ref.decoupled_kl(log_of([0.5, 0.5]), log_of([1.0, 0.0]), 0)
    assert certain_student == (math.inf, math.inf)


# Self-evolution


def example(log_p: ref.Vector = P, gold: int = 0) -> Token:
    """A token with student Q and the full support."""
    return Token(np.array([0.0, 0.0, log(6)]), log_p, DENSE, gold)


def test_prior_by_hand() -> None:
    e = example().events(Settings())
    assert np.exp(ref.prior(e, 0.5)) == close([3 / 4, 1 / 8, 1 / 8, 0.0])
    # For gold 1 the confidence is 1/4: r = p/4 + 3/4 of token 1.
    e = example(gold=1).events(Settings())
    assert np.exp(ref.prior(e, "confidence")) == close([1 / 8, 13 / 16, 1 / 16, 0.0])


def test_difficulty_by_hand() -> None:
    # r = (3/4, 1/8, 1/8), r/q = (6, 1, 1/6).
    e = example().events(Settings())
    assert ref.difficulty(e, Settings()) == close(ref.forward_kl(P, Q))
    assert ref.difficulty(e, Settings(difficulty="prior")) == close(log(6) * (3 / 4 - 1 / 8))


@pytest.mark.parametrize(
    ("schedule", "d", "share"),
    [
        ("step", 1.0, 0.0),  # the threshold itself is easy
        ("step", 1.0 + 1e-9, 1.0),
        ("linear", 0.9, 0.0),
        ("linear", 1.5, 0.25),  # (1.5 - 1)/2
        ("linear", 4.0, 1.0),
        ("exp", 0.5, 0.0),
        ("exp", 1.0 + 2.0 * log(4), 0.75),  # 1 - exp(-log 4)
        ("exp", math.inf, 1.0),
    ],
)
def test_ratio_by_hand(schedule: str, d: float, share: float) -> None:
    s = Settings(lambda_max=0.8, schedule=schedule, scale=2.0)
    assert ref.ratio(d, gamma=1.0, s=s) == close(0.8 * share)


def test_integration_by_hand() -> None:
    # r = (6, 1, 1)/8, q̃ = q/2 + r/2 = (7, 2, 7)/16, p̃ = p/2 + r/2 = (10, 3, 3)/16.
    student = ref.token_loss(example(), Settings(alpha=1.0), lam=0.5)
    assert student == close(0.5 * log(8 / 7) + 0.25 * log(2) + 0.25 * log(4 / 7))
    target = ref.token_loss(example(), Settings(alpha=1.0, integration="target"), lam=0.5)
    assert target == close(5 / 8 * log(5) + 3 / 16 * log(3 / 2) + 3 / 16 * log(1 / 4))
    blend = ref.token_loss(example(), Settings(alpha=1.0, integration="blend"), lam=0.5)
    assert blend == close(3 / 4 * log(12 / 7) + 1 / 8 * log(1) + 1 / 8 * log(2 / 7))
    evolved = ref.token_loss(example(), Settings(alpha=1.0, integration="evolved"), lam=0.5)
    base = 1 / 2 * log(4) + 1 / 4 * log(2) + 1 / 4 * log(1 / 3)
    assert evolved == close(base + 7 / 16 * log(7 / 2) + 1 / 8 * log(1) + 7 / 16 * log(7 / 12))


def test_cross_entropy_by_hand_and_with_forbidden_tokens() -> None:
    # ε = 0.2, V = 3: ε_i = 0.1 and gold has weight 1 - 0.2 - 0.1, to which the sum adds 0.1.
    expected = 0.7 * log(8) + 0.1 * (log(8) + log(8) + log(4 / 3))
    assert ref.cross_entropy(Q, 0, 0.2) == close(expected)
    assert ref.cross_entropy(log_of([0.5, 0.5, 0.0]), 0) == close(log(2))


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_no_kd_weight_is_the_cross_entropy_of_fairseq(epsilon: float) -> None:
    tokens = [replace(random_token(seed), gold=seed % 7) for seed in range(6)]
    tokens = [replace(token, support=range(7)) for token in tokens]
    lprobs = torch.log_softmax(torch.tensor(np.array([t.logits for t in tokens])), dim=-1)
    golds = torch.tensor([t.gold for t in tokens])
    theirs, _ = label_smoothed_nll_loss(lprobs, golds, epsilon, ignore_index=1)
    s = Settings(alpha=0.0, label_smoothing=epsilon, lambda_max=0.5)
    ours = ref.se_kd_loss(tokens, s, gamma=0.0, pad=1)
    assert ours == pytest.approx(theirs.item(), rel=1e-13)


def test_total_by_hand() -> None:
    # Token 1 is easy (p = q = (1/8, 1/8, 3/4), gold 2): KL 0, CE log(4/3). Token 2 is P, Q with
    # gold 0: hard, λ = 1/2 as in test_integration_by_hand, CE log 8. Token 3 is padding.
    tokens = [example(log_p=Q, gold=2), example(), example(gold=1)]
    s = Settings(alpha=0.75, lambda_max=0.5)
    hard = 0.5 * log(8 / 7) + 0.25 * log(2) + 0.25 * log(4 / 7)
    expected = 0.25 * log(4 / 3) + 0.75 * hard + 0.25 * log(8)
    assert ref.se_kd_loss(tokens, s, gamma=0.1, pad=1) == close(expected)


@pytest.mark.parametrize("integration", ["student", "target"])
@pytest.mark.parametrize("name", ALL_DIVERGENCES)
def test_lambda_zero_is_word_level_kd(name: str, integration: str) -> None:
    token = random_token(3)
    s = Settings(alpha=1.0, divergence=name, integration=integration, lambda_max=0.0)
    e = token.events(s)
    assert ref.se_kd_loss([token], s, 0.0, pad=-1) == close(ref.divergence(e.log_p, e.log_q, s))


@pytest.mark.parametrize("seed", range(5))
def test_student_integration_of_the_teacher_alone_is_skew_kl(seed: int) -> None:
    token, s = random_token(seed), Settings(alpha=1.0, beta=1.0)
    e = token.events(s)
    assert ref.token_loss(token, s, 0.3) == close(ref.skew_forward_kl(e.log_p, e.log_q, 0.3))


def test_a_weight_of_zero_drops_an_infinite_term() -> None:
    # Token 2 is forbidden to the student and possible to the teacher; q = (1/2, 1/2, 0).
    token = Token(np.array([0.0, 0.0, -math.inf]), P, DENSE, 0)
    assert ref.token_loss(token, Settings(), lam=0.0) == math.inf
    assert ref.token_loss(token, Settings(alpha=0.0), lam=0.0) == close(log(2))
    smoothed = Settings(alpha=1.0, divergence="tvd", label_smoothing=0.1)
    assert ref.token_loss(token, smoothed, lam=0.0) == close(0.25)


# Gradients


def test_gradient_of_student_integration_by_hand() -> None:
    # w = p/q̃ = (8/7, 2, 4/7), Σ w q = 1/7 + 1/4 + 3/7 = 23/28, and -(1/2) q_j (w_j - 23/28) is
    # -(1/16)(9/28), -(1/16)(33/28), +(3/8)(7/28), that is (-9, -33, 42)/448.
    gradient = ref.token_gradient(example(), Settings(alpha=1.0), lam=0.5)
    assert gradient == pytest.approx(np.array([-9, -33, 42]) / 448, abs=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_gradient_fact_of_student_integration(seed: int, lam: float) -> None:
    # -(1-λ) q_j (w_j - Σ_v w_v q_v), w = p/q̃; a token outside the support has its bucket's w.
    token, s = random_token(seed), Settings(alpha=1.0)
    ((log_p, log_q_mixed),) = ref.integrate(token.events(s), s, lam)
    w_events = np.exp(log_p - np.where(log_p > -math.inf, log_q_mixed, 0.0))
    w = [w_events[token.support.index(v) if v in token.support else -1] for v in range(7)]
    q = np.exp(ref.student_log_probs(token.logits))
    expected = -(1 - lam) * q * (w - np.dot(w, q))
    assert ref.token_gradient(token, s, lam) == pytest.approx(expected, abs=1e-8)


def test_gradient_of_evolved_holds_its_target_fixed() -> None:
    # (q - p) + (q - q̃), by hand: p = (8, 4, 4)/16, q = (2, 2, 12)/16, q̃ = (7, 2, 7)/16.
    s = Settings(alpha=1.0, integration="evolved")
    gradient = ref.token_gradient(example(), s, lam=0.5)
    assert gradient == pytest.approx(np.array([-6 - 5, -2 + 0, 8 + 5]) / 16, abs=1e-9)


def test_gradient_of_word_level_kd_is_q_minus_p() -> None:
    token = replace(random_token(0), support=range(7), gold=2)
    s = Settings(alpha=1.0, lambda_max=0.0)
    expected = np.exp(ref.student_log_probs(token.logits)) - np.exp(token.log_p)
    assert ref.token_gradient(token, s, lam=0.0) == pytest.approx(expected, abs=1e-8)


def test_gradient_of_adaptive_kl_holds_the_shares_fixed() -> None:
    # Then it is that of both KLs with those shares: q - p, and q_j (log(q_j/p_j) - KL(q||p)).
    s = Settings(alpha=1.0, divergence="adaptive_kl")
    p, q = np.exp(P), np.exp(Q)
    reverse = q * (Q - P - ref.reverse_kl(P, Q))
    expected = 3 / 8 * (q - p) + 5 / 8 * reverse
    assert ref.token_gradient(example(), s, lam=0.0) == pytest.approx(expected, abs=1e-9)


def test_gradient_is_zero_at_forbidden_tokens_and_sums_to_zero() -> None:
    token = Token(np.array([0.3, -math.inf, -0.2]), log_of([0.7, 0.0, 0.3]), (0,), 0)
    gradient = ref.token_gradient(token, Settings(), lam=0.0)
    assert gradient[1] == 0.0
    assert gradient.sum() == pytest.approx(0.0, abs=1e-9)
    assert abs(gradient[0]) > 0.01
