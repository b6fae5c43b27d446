"""A GPU that is not there: fake CUDA tensors, of which no value can be read, and a record of what is launched.

Shapes, dtypes and devices are torch's own (FakeTensorMode). A read of a value raises, a copy from the host and a Triton
launch are written down, and the current device is a number that the code under test has to set.
"""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from effkern import native
from effkern.ops import addresses
from effkern.ops.distill import ceilings, chunked, driver
from tests.ops.inside import InsideOps

# Where tensors are, and what the process happens to be at.
DEVICE, ELSEWHERE = "cuda:0", 3


class FakeCuda:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = ELSEWHERE
        self.capturing = False
        self.launches: list[tuple[str, int]] = []
        """Name of the kernel, and the device that was the current one."""
        self.copies: list[str] = []
        """Operators that took numbers of the host to the device."""
        self.stream = SimpleNamespace(cuda_stream=1, wait_event=lambda event: None)
        properties = SimpleNamespace(total_memory=80 << 30, multi_processor_count=132, name="NVIDIA H100 80GB HBM3")
        for name, value in {
            "_exchange_device": self._exchange,
            "_maybe_exchange_device": self._exchange,
            "current_device": lambda: self.current,
            "current_stream": lambda device=None: self.stream,
            "is_current_stream_capturing": lambda: self.capturing,
            "get_device_properties": lambda device=None: properties,
            "get_device_capability": lambda device=None: (9, 0),
            "Event": lambda *args: SimpleNamespace(record=lambda stream=None: None, query=lambda: True),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(native, "load", lambda module: None)
        # What is kept between calls is of this mode alone.
        monkeypatch.setattr(addresses, "_TABLES", {})
        monkeypatch.setattr(addresses, "_CAPTURED", {})
        monkeypatch.setattr(pytest.importorskip("effkern.ops.lora_rite.triton"), "_PLANS", {})
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        monkeypatch.setattr(
            interpreter.InterpretedFunction, "run", lambda *args, **kwargs: self._launch(*args, **kwargs)
        )
        # The same for the same tensor, and aligned as torch aligns them.
        monkeypatch.setattr(FakeTensor, "data_ptr", lambda x: id(x) // 16 * 256, raising=False)

    def _exchange(self, device: int) -> int:
        before = self.current
        if device >= 0:
            self.current = device
        return before

    def _launch(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        self.launches.append((kernel.fn.__name__, self.current))
        devices = {str(x.device) for x in args if isinstance(x, Tensor)}
        assert devices == {DEVICE}, f"{kernel.fn.__name__} gets tensors of {devices}"

    def _seen(self, op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> None:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # Numbers without a dimension are arguments of the kernel that takes them.
        from_host = any(x.device.type == "cpu" and x.dim() and x.numel() for x in tensors)
        to_device = kwargs.get("device") or next((x.device for x in tensors if x.device.type == "cuda"), None)
        if from_host and to_device is not None and torch.device(to_device).type == "cuda":
            self.copies.append(op.name())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Kernels of our operators run on fake tensors where they are Python's."""
        with InsideOps(self._seen, DispatchKey.CUDA):
            yield


GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


@cache
def _register_guard() -> None:
    """torch's own guard that does nothing, for indexing and the like: a torch without CUDA has none."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD)
        home = Path(torch.__file__).parent
        options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10"]
        compiler = shutil.which("c++") or pytest.skip("needs a C++ compiler")
        subprocess.run([compiler, str(source), "-o", str(library), *options], check=True)
        ctypes.CDLL(str(library))


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Without autograd, whose threads are one for each GPU that there was at its start."""
    if torch.version.cuda is not None:
        pytest.skip("is for a torch without CUDA")
    _register_guard()
    try:
        with FakeTensorMode(), torch.no_grad():
            yield FakeCuda(monkeypatch)
    finally:
        for known_of_the_device in (ceilings.of_device, chunked._cuda_chunk_bytes, driver._plan):
            known_of_the_device.cache_clear()
