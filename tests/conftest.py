"""Options of the whole suite."""

import contextlib
import os

# Before torch is there: the tests fork, and a fork of a process with OpenMP threads hangs in them.
os.environ["OMP_NUM_THREADS"] = "1"
# To ask whether there is a GPU must not start CUDA, after which a process cannot fork.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import pytest
import torch

with contextlib.suppress(ImportError):  # a machine that is there for its GPU may lack it
    from hypothesis import settings

    # The same examples in every run: the gate is no matter of luck. scripts/benchmarks/robustness.py searches on.
    settings.register_profile("gate", derandomize=True, deadline=None)
    settings.load_profile("gate")

if not torch.cuda.is_available():
    # The kernels run in Triton's interpreter, which has to be chosen before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption(
        "--gpu",
        action="store_true",
        help="run the tests that have a GPU side and no others; without CUDA they fail",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = config.getoption("--gpu")
    if on_gpu:
        config.hook.pytest_deselected(items=[i for i in items if not i.get_closest_marker("gpu")])
        items[:] = [item for item in items if item.get_closest_marker("gpu")]
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="long; run with --slow"))
        gpu = item.get_closest_marker("gpu")
        if gpu and not (gpu.kwargs.get("optional") or on_gpu or torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.getoption("--gpu") and not torch.cuda.is_available():
        pytest.fail("--gpu: expected CUDA, found none", pytrace=False)
