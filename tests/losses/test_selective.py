"""Selective distillation: which tokens are chosen."""

import torch

from sekd_fairseq.losses.selective import TokenQueue, hardest


def test_hardest_by_hand() -> None:
    nll = torch.tensor([0.5, 3.0, 1.0, 2.0])
    assert hardest(nll, 0.5).tolist() == [False, True, False, True]
    assert hardest(nll, 0.25).tolist() == [False, True, False, False]
    assert hardest(torch.ones(4), 0.5).tolist() == [True, True, False, False]  # ties: the first
    assert hardest(torch.zeros(0), 0.5).tolist() == []


def test_queue_by_hand() -> None:
    queue = TokenQueue(size=4, share=0.5)
    nll = torch.tensor([1.0, 2.0])
    assert queue.select(nll).tolist() == [True, True]  # empty: all, however an update is cut
    queue.push(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert queue.select(torch.tensor([9.0, 0.5])).tolist() == [True, True]  # not committed yet
    queue.commit(queue.take_pending())
    # Half of 1, 2, 3, 4 lies above 2.
    assert queue.select(torch.tensor([2.0, 2.5, 9.0])).tolist() == [False, True, True]
    queue.push(torch.tensor([10.0, 20.0]))
    queue.push(torch.tensor([30.0]))
    queue.commit(queue.take_pending())
    assert queue.values.tolist() == [4.0, 10.0, 20.0, 30.0]  # first in, first out
    assert queue.select(torch.tensor([10.0, 11.0])).tolist() == [False, True]
    other = TokenQueue(size=4, share=0.5)
    other.load(queue.values)
    assert other.select(torch.tensor([10.0, 11.0])).tolist() == [False, True]


def test_a_long_queue_selects_its_share() -> None:
    generator = torch.Generator().manual_seed(0)
    queue = TokenQueue(size=10_000, share=0.3)
    queue.commit(torch.randn(20_000, generator=generator).exp())
    fresh = torch.randn(20_000, generator=generator).exp()
    assert abs(queue.select(fresh).float().mean().item() - 0.3) < 0.02
