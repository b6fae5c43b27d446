"""Shared test set-up: quiet thread pools, seeds from test ids, NaN in fresh memory, a choice of native module."""

import os

# Spinning OpenMP workers on shared cores slow everything down; must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util
import sys
import zlib
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton kernels run in its interpreter; it is chosen when triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native-dir", metavar="DIR", help="take effkern._C from DIR (one clone, sanitizers)")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--native-dir")
    if folder is None:
        return
    (path,) = Path(folder).glob("_C.*so")
    import effkern

    spec = importlib.util.spec_from_file_location("effkern._C", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["effkern._C"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    effkern._C = module  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _reproducible(request: pytest.FixtureRequest):
    """Seed from the test's id; torch.empty gives NaN, so that a value never written is seen."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    fill, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
