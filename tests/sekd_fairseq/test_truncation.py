"""Cutting distributions, against NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sekd_fairseq.errors import UserError
from sekd_fairseq.teacher_cache.format import decode_logprob, encode_logprob
from sekd_fairseq.teachers.truncation import (
    Truncation,
    best_columns,
    best_tokens,
    options_of,
    truncate,
    truncation_of,
    uniforms,
)

TOKENS, VOCAB = 40, 300


def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    # Flat rows and peaked ones.
    z = torch.randn(TOKENS, VOCAB, generator=generator) * torch.linspace(0.5, 8, TOKENS)[:, None]
    return z, torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def rows_of(columns: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and log-probabilities of each token."""
    ends = np.cumsum(columns["support_size"])[:-1]
    return list(
        zip(np.split(columns["token_id"], ends), np.split(columns["logprob"], ends), strict=True)
    )


def check_against_numpy(columns: dict[str, np.ndarray], z: Tensor, target: Tensor) -> None:
    """Everything but the choice of the support."""
    log_p = z.double().log_softmax(-1).numpy()
    for i, (ids, logprob) in enumerate(rows_of(columns)):
        assert ids[0] == target[i] and len(set(ids.tolist())) == len(ids)
        np.testing.assert_allclose(logprob, log_p[i, ids], rtol=1e-5, atol=1e-5)
        outside = np.exp(np.delete(log_p[i], ids)).sum()
        assert columns["outside_mass"][i] == pytest.approx(outside, rel=1e-4, abs=1e-12)
        assert columns["gold_logprob"][i] == pytest.approx(log_p[i, ids[0]], rel=1e-5, abs=1e-5)
        entropy = -(np.exp(log_p[i]) * log_p[i]).sum()
        assert columns["entropy"][i] == pytest.approx(entropy, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("k", [1, 2, 7, 300])
def test_top_k(k: int) -> None:
    z, target = logits()
    columns = truncate(z.clone(), target, Truncation(rule="top_k", k=k))
    check_against_numpy(columns, z, target)
    for i, (ids, _) in enumerate(rows_of(columns)):
        order = [int(v) for v in np.argsort(-z[i].numpy(), kind="stable") if v != target[i]]
        assert ids[1:].tolist() == order[: k - 1]


@pytest.mark.parametrize(("p", "floor", "k"), [(0.9, 1, 300), (0.9, 3, 12), (1.0, 1, 50)])
def test_top_p(p: float, floor: int, k: int) -> None:
    z, target = logits()
    columns = truncate(z.clone(), target, Truncation(rule="top_p", p=p, floor=floor, k=k))
    check_against_numpy(columns, z, target)
    sizes = set()
    for i, (ids, _) in enumerate(rows_of(columns)):
        order = np.argsort(-z[i].numpy(), kind="stable")
        mass = np.cumsum(z[i].double().softmax(-1).numpy()[order])
        needed = int((mass < p).sum()) + 1
        kept = order[: min(max(needed, floor), k)].tolist()
        assert ids[1:].tolist() == [token for token in kept if token != target[i]]
        sizes.add(len(kept))
    assert len(sizes) > 3 or p == 1.0  # few where the teacher is sure, many where it is not


def test_best_tokens_of_any_width() -> None:
    generator = torch.Generator().manual_seed(1)
    for width in (1, 5, 64, 257, 1000, 4099):
        z = torch.randn(6, width, generator=generator)
        for k in {0, 1, min(3, width), min(40, width), width}:
            expected = z.sort(dim=1, descending=True).indices[:, :k]
            assert (best_tokens(z, k) == expected).all()


def test_forbidden_tokens_are_not_kept() -> None:
    z, target = logits()
    z[:, 100:] = -torch.inf
    target = target % 100
    for rule in (Truncation(k=150), Truncation(rule="top_p", p=1.0, k=150)):
        columns = truncate(z.clone(), target, rule)
        check_against_numpy(columns, z.clamp_min(-1e4), target)
        assert np.isfinite(columns["logprob"]).all() and (columns["support_size"] <= 100).all()
    # Nor is the reference twice, where nothing else is left to fill a support with.
    z, target = logits()
    z[:, 1:4] = -torch.inf
    target = torch.where((target > 0) & (target < 4), 0, target)
    columns = truncate(z.clone(), target, Truncation(k=z.size(1)))
    for ids, _ in rows_of(columns):
        assert len(set(ids.tolist())) == len(ids) == z.size(1) - 3


def test_sampling_counts_and_does_not_depend_on_how_the_work_is_split() -> None:
    z, target = logits()
    rule = Truncation(rule="sample", samples=50)
    lengths = [10, 30]
    draws = uniforms(rule.seed, [3, 8], lengths, rule.samples)
    columns = truncate(z.clone(), target, rule, draws)
    check_against_numpy(columns, z, target)
    ends = np.cumsum(columns["support_size"])[:-1]
    counts = [part.sum() for part in np.split(columns["draws"], ends)]
    assert counts == [50] * TOKENS  # the reference's own draws stand in its slot
    alone = truncate(z[10:].clone(), target[10:], rule, uniforms(rule.seed, [8], [30], 50))
    for name, values in alone.items():
        np.testing.assert_array_equal(values, columns[name][-len(values) :])
    # Frequencies follow the teacher.
    many = truncate(z[:1].clone(), target[:1], rule, torch.rand(1, 20_000, dtype=torch.float64))
    expected = z[0].softmax(-1).numpy()[many["token_id"]]
    found = many["draws"] / 20_000
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / 20_000)


def test_eight_bits() -> None:
    logprob = -np.linspace(0, 20, 2001)
    stored = encode_logprob(logprob, np.dtype(np.uint8))
    restored = decode_logprob(stored).astype(float)
    inside = logprob > -15.9
    assert np.abs(restored - logprob)[inside].max() <= 1 / 32 + 1e-3  # and float16's own rounding
    assert (restored[~inside] >= -15.95).all() and (np.diff(restored) <= 0).all()
    # The error that it adds, against the 1.6e-4 nats that the format's documentation claims.
    p = np.random.default_rng(0).dirichlet(np.full(16, 0.3), size=5000).clip(1e-6)
    p /= p.sum(axis=1, keepdims=True)
    q = np.exp(decode_logprob(encode_logprob(np.log(p), np.dtype(np.uint8))).astype(float))
    q /= q.sum(axis=1, keepdims=True)
    assert (p * np.log(p / q)).sum(axis=1).mean() < 1.7e-4


def test_many_draws_need_no_more_memory_than_they_are() -> None:
    """Each draw compared with each other one would be 48 GB here."""
    rule = Truncation(rule="sample", samples=4000)
    draws = uniforms(rule.seed, [0], [3000], rule.samples)
    columns = truncate(torch.zeros(3000, 4), torch.zeros(3000, dtype=torch.long), rule, draws)
    assert columns["support_size"].tolist() == [4] * 3000
    counts = columns["draws"].reshape(3000, 4)
    expected = [np.bincount(row, minlength=4) for row in (draws.numpy() * 4).astype(int)]
    assert (counts == np.stack(expected)).all()


def test_what_is_known_but_not_kept_is_outside() -> None:
    """Summed, where what the kept ones lack of 1 is a rounding error."""
    log_p = {5: 0.0, 7: -25.0, 9: -30.0}  # of a teacher that is sure
    (outside,) = best_columns([log_p], [5], Truncation(k=2))["outside_mass"]
    assert outside == pytest.approx(math.exp(-30), rel=1e-6)
    (outside,) = best_columns([{5: math.log(0.5), 7: math.log(0.2)}], [5], Truncation(k=1))[
        "outside_mass"
    ]
    assert outside == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-1, None, 2, 0), "--top-k"),
        ((8, 1.5, 2, 0), "--top-p"),
        ((8, 0.9, 9, 0), "at most --top-k"),
        ((8, 0.9, 0, 0), "--top-p-floor"),
        ((8, 0.9, 2, 5), "found both"),
        ((8, None, 2, -5), "--sample"),
    ],
)
def test_rules_without_meaning(arguments: tuple[int, float | None, int, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        truncation_of(*arguments, vocab_size=100)


@pytest.mark.parametrize("arguments", [(0, None, 2, 0), (2**16, None, 2, 0), (8, None, 2, 2**16)])
def test_no_more_than_the_format_can_count(
    arguments: tuple[int, float | None, int, int],
) -> None:
    """Sizes of 16 bits once wrapped in silence with vocabularies of more than 65,535."""
    with pytest.raises(UserError, match=r"up to 6553[34] tokens"):
        truncation_of(*arguments, vocab_size=70_000)
    assert truncation_of(2**16 - 2, None, 2, 0, vocab_size=70_000).k == 2**16 - 2


@pytest.mark.parametrize(
    ("k", "p", "floor", "samples"), [(7, None, 2, 0), (9, 0.5, 3, 0), (32, None, 2, 4)]
)
def test_the_options_of_a_manifest_make_its_truncation(
    k: int, p: float | None, floor: int, samples: int
) -> None:
    rule = truncation_of(k, p, floor, samples, vocab_size=50)
    words = options_of(rule.record())
    given = dict(zip(words[::2], map(float, words[1::2]), strict=True))
    again = truncation_of(
        int(given.get("--top-k", 32)), given.get("--top-p"), int(given.get("--top-p-floor", 2)),
        int(given.get("--sample", 0)), vocab_size=50,
    )  # fmt: skip
    assert again == rule
