"""Decoupled KD's parts and the loss of adaptive teaching."""

import numpy as np
import pytest
import torch

from sekd_fairseq.losses import TeacherTokens, build_events, support_log_probs
from sekd_fairseq.losses.decoupled import adaptive_teaching, decoupled_kl
from sekd_fairseq.losses.divergences import forward_kl
from tests import reference


@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("tokens", [1, 5, 6])
def test_adaptive_teaching_is_the_reference(tokens: int, k: int) -> None:
    generator = torch.Generator().manual_seed(11)
    logits, log_p = 2 * torch.randn(2, tokens, 9, generator=generator, dtype=torch.float64)
    log_p, target = log_p.log_softmax(-1), torch.arange(tokens)
    teacher = TeacherTokens.from_top_k(log_p, target, k)
    student = support_log_probs(logits, torch.arange(tokens), teacher.ids, teacher.valid)
    events = build_events(teacher, student, "bucket")
    found = adaptive_teaching(events.log_p, events.log_q)
    expected = reference.adaptive_teaching(
        [
            reference.Token(z.numpy(), p.numpy(), ids.tolist(), int(ids[0])).events(
                reference.Settings()
            )
            for z, p, ids in zip(logits, log_p, teacher.ids, strict=True)
        ]
    )
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    target_part, others = decoupled_kl(events.log_p, events.log_q)
    whole = target_part + (1 - events.log_p[:, 0].exp()) * others
    torch.testing.assert_close(whole, forward_kl(events.log_p, events.log_q))


def test_adaptive_teaching_by_hand() -> None:
    # p = (3/4, 1/8, 1/8) sure, (1/4, 1/2, 1/4) unsure; q = (1/2, 1/4, 1/4), so the others are even.
    p = torch.tensor([[0.75, 0.125, 0.125], [0.25, 0.5, 0.25]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).expand(2, -1)
    others = 2 / 3 * np.log(4 / 3) + 1 / 3 * np.log(2 / 3)
    gold = 1 / 4 * np.log(1 / 2) + 3 / 4 * np.log(3 / 2)
    found = adaptive_teaching(p.log(), q.log())
    np.testing.assert_allclose(found.numpy(), [0.0, 0.8 * (gold + others)], atol=1e-12)


def test_adaptive_teaching_of_no_tokens_and_of_a_sure_teacher() -> None:
    assert adaptive_teaching(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)
    log_p = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    log_q = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    loss = adaptive_teaching(log_p, log_q).sum()
    assert loss.item() == pytest.approx(0.8 * np.log(2))
    (slope,) = torch.autograd.grad(loss, log_q)
    assert slope.isfinite().all()
