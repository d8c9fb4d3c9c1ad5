"""The chunked path equals the plain one in value and gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sekd_fairseq.losses import (
    SelfEvolution,
    TeacherTokens,
    blockwise_loss,
    build_events,
    chunked_loss,
    self_evolution_kd,
    support_log_probs,
)
from sekd_fairseq.losses.chunked import _add_product, tokens_per_chunk
from sekd_fairseq.losses.divergences import forward_kl

# Steps, because gradcheck would see the ratio move with the student, which is no gradient.
SETTINGS = SelfEvolution(gamma=2.0, gamma_type="absolute", lambda_max=0.6, schedule="step")
TOKENS, WIDTH, VOCAB = 11, 6, 17


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, TeacherTokens]:
    """Features, weight, bias, and the teacher at their tokens."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    teacher = TeacherTokens.from_top_k(
        (random(TOKENS, VOCAB).double() * 2).log_softmax(-1),
        torch.randint(0, VOCAB, (TOKENS,), generator=generator),
        5,
    )
    return random(TOKENS, WIDTH), random(VOCAB, WIDTH), random(VOCAB), teacher


def token_loss(logits: Tensor, teacher: TeacherTokens) -> tuple[Tensor, dict[str, Tensor]]:
    """SE-KD plus label-smoothed cross entropy, and a sum to log."""
    rows = torch.arange(len(logits))
    student = support_log_probs(logits, rows, teacher.ids, teacher.valid, with_sum=True)
    output = self_evolution_kd(build_events(teacher, student, "bucket"), SETTINGS)
    smooth = -0.9 * student.log_q[:, 0].sum() - 0.1 / VOCAB * student.sum_log_q.sum()
    return output.divergence.sum() + smooth, {"hard": output.hard.sum()}


def plain(
    features: Tensor, weight: Tensor, bias: Tensor | None, teacher: TeacherTokens
) -> tuple[Tensor, dict[str, Tensor]]:
    return token_loss(nn.functional.linear(features, weight, bias), teacher)


def chunked(
    features: Tensor, weight: Tensor, bias: Tensor | None, teacher: TeacherTokens, chunk: int
) -> tuple[Tensor, dict[str, Tensor]]:
    return chunked_loss(
        features, weight, bias, lambda logits, part: token_loss(logits, teacher[part]), chunk
    )


def gradients(loss: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    copies = [leaf.clone().requires_grad_() for leaf in leaves]
    # A non-unit upstream gradient, as of a loss scaler.
    return torch.autograd.grad(-2.5 * loss(*copies), copies)


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_sums_and_gradient_equal_the_plain_path(chunk: int, with_bias: bool) -> None:
    features, weight, bias, teacher = problem(torch.float64)
    leaves = [features, weight] + ([bias] if with_bias else [])

    def arguments(leaves: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
        return leaves[0], leaves[1], leaves[2] if with_bias else None

    loss, sums = chunked(*arguments(tuple(leaves)), teacher, chunk)
    expected, expected_sums = plain(*arguments(tuple(leaves)), teacher)
    torch.testing.assert_close(loss, expected)
    assert 0 < int(sums["hard"]) < TOKENS and sums == expected_sums
    found = gradients(lambda *x: chunked(*arguments(x), teacher, chunk)[0], *leaves)
    torch.testing.assert_close(
        found, gradients(lambda *x: plain(*arguments(x), teacher)[0], *leaves)
    )


@pytest.mark.gpu(optional=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_added_in_single_precision(dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(2, 5, 7, generator=generator).to(device, dtype)  # (chunk, n, V)
    features = torch.randn(2, 5, 4, generator=generator).to(device, dtype)
    total = torch.full((7, 4), torch.nan, device=device)  # memory that nothing was written to
    _add_product(total, gradient[0].t(), features[0], first=True)
    _add_product(total, gradient[1].t(), features[1], first=False)
    expected = (gradient.double().mT @ features.double()).sum(dim=0)
    # What half precision would round away is there: 1e-3 of these sums at most.
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-5)


def weight_of(symbols: int, width: int, dtype: torch.dtype, trained: bool = False) -> Tensor:
    """A weight of any size that takes no memory."""
    return torch.zeros(1, 1, dtype=dtype).expand(symbols, width).requires_grad_(trained)


def test_chunks_are_as_large_as_is_worth_it() -> None:
    half, single = torch.bfloat16, torch.float32
    frozen = weight_of(131072, 4096, half)
    assert tokens_per_chunk(8192, frozen) == 1024  # 256 MiB of logits in half precision
    assert tokens_per_chunk(1025, frozen) == 513  # two alike, and not a large and a tiny one
    assert tokens_per_chunk(100, weight_of(1000, 512, single)) == 100
    assert tokens_per_chunk(5, weight_of(2**30, 1, single)) == 1
    assert tokens_per_chunk(0, weight_of(1000, 512, single)) == 1
    # A gradient's sum of 2 GiB in single precision is held for all chunks: 512 MiB of logits.
    trained = weight_of(131072, 4096, half, trained=True)
    assert tokens_per_chunk(8192, trained) == 2048
    assert tokens_per_chunk(8192, weight_of(131072, 1024, half, trained=True)) == 1024
    with torch.no_grad():
        assert tokens_per_chunk(8192, trained) == 1024
    with torch.autocast("cpu", half):
        assert tokens_per_chunk(8192, weight_of(131072, 4096, single, trained=True)) == 2048
    features, weight, bias, teacher = problem(torch.float64)
    loss, _ = chunked_loss(
        features, weight, bias, lambda logits, part: token_loss(logits, teacher[part])
    )
    torch.testing.assert_close(loss, plain(features, weight, bias, teacher)[0])


def test_gradcheck() -> None:
    features, weight, bias, teacher = problem(torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (features, weight, bias)]
    torch.autograd.gradcheck(lambda *x: chunked(*x, teacher, 4)[0], leaves)


@pytest.mark.parametrize("chunk", [4, TOKENS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 4e-2)])
def test_half_precision_equals_the_plain_path(
    dtype: torch.dtype, tolerance: float, chunk: int
) -> None:
    features, weight, bias, teacher = problem(dtype)
    loss = chunked(features, weight, bias, teacher, chunk)[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(features, weight, bias, teacher)[0])
    found = gradients(lambda *x: chunked(*x, teacher, chunk)[0], features, weight, bias)
    expected = gradients(lambda *x: plain(*x, teacher)[0], features, weight, bias)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_float16_keeps_gradients_that_the_loss_scale_will_lift() -> None:
    """Of a student that is sure, and a teacher that gives every token (--teacher-path)."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(8, 500, generator=generator)
    z[:, 0] += 18
    logits = z.half()
    log_p = (logits.float() + 0.5 * torch.randn(z.shape, generator=generator)).log_softmax(-1)

    def loss_of(block: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return forward_kl(log_p[part], block.log_softmax(-1)).sum(), {}

    exact, found = logits.float().requires_grad_(), logits.clone().requires_grad_()
    for leaf, scale in ((exact, 1.0), (found, 1024.0)):
        (scale * blockwise_loss(leaf, torch.arange(8), loss_of)[0]).backward()
    assert exact.grad is not None and found.grad is not None
    assert (exact.grad.abs() < 3e-8).float().mean() > 0.8  # zero in float16
    torch.testing.assert_close(found.grad.float() / 1024, exact.grad, rtol=2e-3, atol=6e-11)


@pytest.mark.parametrize("chunk", [16, 64])
def test_float16_sums_do_not_overflow(chunk: int) -> None:
    """Gradients are kept times 1,024, which their sum over tokens would be too large for."""
    features, weight = torch.full((64, 4), 8.0).half(), torch.zeros(16, 4).half().requires_grad_()

    def loss_of(logits: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return -logits.float().log_softmax(-1)[:, 0].sum(), {}

    chunked_loss(features, weight, None, loss_of, chunk)[0].backward()
    expected = torch.full((16, 4), 64 * 8 / 16)  # 64 tokens, features of 8, a probability of 1/16
    expected[0] -= 64 * 8
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.float(), expected)


def test_automatic_mixed_precision_equals_the_plain_path() -> None:
    """Under --amp the weights are single precision and the logits half."""
    features, weight, bias, teacher = problem(torch.float32)
    results = []
    for run in (plain, lambda *inputs: chunked(*inputs, chunk=3)):
        inputs = [tensor.clone().requires_grad_() for tensor in (features, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = run(*inputs, teacher)
        results.append([loss.float(), *torch.autograd.grad(loss, inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.05)


def test_tied_embeddings() -> None:
    # The weight is also what made the features.
    _, weight, _, teacher = problem(torch.float64)
    inputs = torch.arange(TOKENS) % VOCAB

    def tied(path: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        leaf = weight.clone().requires_grad_()
        path(leaf[inputs].tanh(), leaf).backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(
        tied(lambda h, w: chunked(h, w, None, teacher, 3)[0]),
        tied(lambda h, w: plain(h, w, None, teacher)[0]),
    )


def test_without_gradient_and_without_tokens() -> None:
    features, weight, bias, teacher = problem(torch.float32)
    weight.requires_grad_()
    with torch.no_grad():
        loss, _ = chunked(features, weight, bias, teacher, 4)
    assert not loss.requires_grad
    loss, sums = chunked(features[:0], weight, bias, teacher[:0], 4)
    assert loss.item() == 0.0 and int(sums["hard"]) == 0
    loss.backward()
    assert weight.grad is not None and (weight.grad == 0).all()


def test_only_the_needed_gradients() -> None:
    features, weight, bias, teacher = problem(torch.float64)
    features.requires_grad_()  # a frozen projection
    loss, _ = chunked(features, weight, bias, teacher, 4)
    loss.backward()
    assert features.grad is not None and weight.grad is None
