"""Both bodies of the passes over logits: Triton's kernels equal torch's blocks and float64."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from sekd_fairseq.losses import support, support_torch
from sekd_fairseq.losses.support import support_log_probs
from sekd_fairseq.losses.support_torch import Reduced

INF = float("inf")
#: Positions, of which rows are padding, vocabulary, slots.
SHAPES = [(3, 0, 7, 1), (7, 2, 37, 5), (5, 2, 130, 8), (3, 1, 4097, 33), (2, 0, 8200, 3)]


@pytest.fixture(scope="module")
def kernels() -> Any:
    """The kernels, on the GPU or else in Triton's interpreter."""
    pytest.importorskip("triton")
    return importlib.import_module("sekd_fairseq.losses.support_triton")


pytestmark = [
    pytest.mark.gpu(optional=True),
    # NumPy, in the interpreter, warns where a kernel selects between a number and none.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype, forbid: bool, scale: float = 5.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, rows, ids and valid slots."""
    positions, padding, vocabulary, slots = shape
    generator = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(positions, vocabulary, generator=generator) * scale
    if forbid:
        logits[0, 2] = logits[-1, vocabulary - 1] = -INF
    order = torch.randperm(positions, generator=generator)
    rows = order[: positions - padding].sort().values
    ids = torch.stack([torch.randperm(vocabulary, generator=generator)[:slots] for _ in rows])
    valid = torch.rand(ids.shape, generator=generator) > 0.3
    valid[:, 0] = True
    ids = torch.where(valid, ids, ids[:, :1])
    return logits.to(dtype).to(DEVICE), rows.to(DEVICE), ids.to(DEVICE), valid.to(DEVICE)


def upstream(reduced: Reduced, with_sum: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients to what the pass gives."""
    generator = torch.Generator(DEVICE).manual_seed(3)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=DEVICE, dtype=like.dtype)

    on_sum = random(reduced.sum_log_q) / 50 if with_sum else None
    return random(reduced.log_q), random(reduced.log_outside), on_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("with_sum", "temperature"), [(False, 1.0), (True, 1.0), (True, 2.5)])
@pytest.mark.parametrize("forbid", [False, True])
def test_kernels_equal_float64(
    kernels: Any, dtype: torch.dtype, with_sum: bool, temperature: float, forbid: bool
) -> None:
    for shape in SHAPES:
        logits, *where = problem(shape, dtype, forbid)
        before = logits.clone()
        found = kernels.reduce(logits, *where, with_sum, temperature)
        assert torch.equal(logits, before)  # the support is put back
        exact = support_torch.reduce(logits.double(), *where, with_sum, temperature)
        for name, one, other in zip(Reduced._fields, found, exact, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=1e-5, msg=name)
        on_log_q, on_outside, on_sum = upstream(found, with_sum)
        options = (temperature, False)
        gradient = kernels.gradient(
            logits, *where[:2], found, on_log_q, on_outside, on_sum, *options
        )
        assert gradient.dtype == dtype
        expected = support_torch.gradient(
            logits.double(),
            *where[:2],
            exact,
            on_log_q.double(),
            on_outside.double(),
            None if on_sum is None else on_sum.double(),
            *options,
        )
        # Half precision rounds the result once.
        tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=1e-5)
        padding = torch.ones(len(logits), dtype=torch.bool, device=DEVICE)
        padding[where[0]] = False
        assert not gradient[padding].any()
        over = kernels.gradient(
            logits, *where[:2], found, on_log_q, on_outside, on_sum, temperature, True
        )
        assert over.data_ptr() == logits.data_ptr()
        torch.testing.assert_close(over, gradient)


def test_no_positions(kernels: Any) -> None:
    logits, _, ids, valid = problem((3, 0, 7, 2), torch.float32, False)
    where = (torch.zeros(0, dtype=torch.long, device=DEVICE), ids[:0], valid[:0])
    found = kernels.reduce(logits, *where, True, 1.0)
    assert found.log_q.shape == (0, 2) and found.log_outside.shape == (0,)
    gradient = kernels.gradient(logits, *where[:2], found, *upstream(found, True), 1.0, False)
    assert gradient.shape == logits.shape and not gradient.any()


def bodies(kernels: Any) -> list[Any]:
    return [support_torch, kernels]


def test_large_logits_keep_their_digits(kernels: Any) -> None:
    """log q is (z - max) - log sum: max + log sum would be rounded to the digits of max."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randint(-40, 40, (4, 50), generator=generator) / 8.0  # exact in float32 at 1e4
    logits = (z + 1e4).to(DEVICE)
    rows = torch.arange(4, device=DEVICE)
    ids = torch.tensor([[3, 4]] * 4, device=DEVICE)
    exact = z.double().log_softmax(-1)
    outside = exact.clone().index_fill_(1, torch.tensor([3, 4]), -INF).logsumexp(-1)
    for body in bodies(kernels):
        found = body.reduce(logits, rows, ids, torch.ones_like(ids, dtype=torch.bool), True, 1.0)
        for one, other in (
            (found.log_q, exact[:, 3:5]),
            (found.log_outside, outside),
            (found.sum_log_q / 50, exact.mean(dim=1)),
        ):
            torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=1e-6)


def test_mass_outside_of_a_sure_student_does_not_underflow(kernels: Any) -> None:
    """30 nats at temperature 0.25 are 120: exp(-120) is zero in float32, its logarithm is not."""
    logits = torch.full((1, 6), -30.0, device=DEVICE)
    logits[0, 2] = 0.0
    ids = torch.tensor([[2]], device=DEVICE)
    rows, valid = torch.zeros(1, dtype=torch.long, device=DEVICE), torch.ones_like(ids).bool()
    for body in bodies(kernels):
        found = body.reduce(logits, rows, ids, valid, False, 0.25)
        assert found.log_outside.item() == pytest.approx(-120 + torch.tensor(5.0).log().item())
        one = torch.ones(1, device=DEVICE)
        gradient = body.gradient(logits, rows, ids, found, one[None], one, None, 0.25, False)
        # log Q rises with each token outside by its share of Q; log q of the sure one hardly moves.
        expected = torch.tensor([0.8, 0.8, -4.0, 0.8, 0.8, 0.8])
        torch.testing.assert_close(gradient[0].cpu(), expected)


def test_overwriting_gives_the_same_gradient() -> None:
    logits, rows, ids, valid = problem((9, 2, 37, 5), torch.float32, False)
    results = []
    for overwrite in (False, True):
        leaf = logits.clone().requires_grad_()
        found = support_log_probs(leaf, rows, ids, valid, True, 1.0, overwrite)
        value = found.log_q.masked_fill(~valid, 0.0).sum() + 2.0 * found.log_outside.sum()
        (gradient,) = torch.autograd.grad(value + 0.1 * found.sum_log_q.sum(), leaf)
        results.append(gradient)
        assert (gradient.data_ptr() == leaf.data_ptr()) == overwrite
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("forbid", [False, True])
def test_sums_by_weights_are_the_same_under_autocast(forbid: bool) -> None:
    """In float16 those of 8,000 tokens are infinite."""
    logits, *where = problem((3, 0, 8000, 5), torch.float32, forbid)
    weights = torch.linspace(0.1, 1.9, 8000, device=DEVICE)
    found = []
    for amp in (False, True):
        with torch.autocast(DEVICE.type, torch.float16, enabled=amp):
            found.append(support_log_probs(logits, *where, with_sum=True, weights=weights))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert found[0].sum_log_q.abs().min() > 65504


def test_kernels_run_where_the_logits_are_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = object()
    monkeypatch.setattr(support, "triton_module", lambda name: chosen)

    class OnGPU:
        is_cuda, dtype = True, torch.bfloat16

    ids, vocabulary = torch.zeros(2, 1024), torch.zeros(2, 32_000)
    assert support.body_for(OnGPU(), ids) is chosen  # type: ignore[arg-type]
    assert support.kernels_for(OnGPU(), vocabulary, "") is None  # type: ignore[arg-type]
    assert support.body_for(OnGPU(), vocabulary) is support_torch  # type: ignore[arg-type]
    OnGPU.dtype = torch.float64
    assert support.body_for(OnGPU(), ids) is support_torch  # type: ignore[arg-type]
    assert support.body_for(torch.zeros(1), ids) is support_torch


def test_without_a_compiler_losses_run_in_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every training with a cache ended in Triton's traceback."""
    triton = pytest.importorskip("triton")

    def broken(_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.")

    class OnGPU:
        is_cuda, dtype = True, torch.bfloat16

    logits: Any = OnGPU()
    ids = torch.zeros(2, 4)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(broken))
    caches = (support.triton_module, support.triton_runs)
    for one in caches:
        one.cache_clear()
    try:
        for name in ("token_loss_triton", "support_triton"):
            assert support.kernels_for(logits, ids, name) is None
        assert support.body_for(logits, ids) is support_torch
    finally:
        for one in caches:
            one.cache_clear()
    (line,) = caplog.messages
    assert "Failed to find C compiler." in line and "python3-dev" in line
