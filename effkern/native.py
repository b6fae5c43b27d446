"""The compiled modules: what was built, whether it loads, and what this CPU will run of it.

`effkern._C` and `effkern._C_cuda` only add kernels to operators that Python defines, so a missing module
costs speed and never a feature (`EFFKERN_PURE=1` installs without them).
"""

import os
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

# Requirements are not checked where torch was put in later, or `pip install --no-deps` used.
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    raise ImportError(f"effkern needs torch >= 2.11, got {torch.__version__}: pip install --upgrade torch")

# In the order of the numbers that csrc/cpu/clones.cpp reports.
CPU_CLONES = ("x86-64-v4", "x86-64-v3", "default")
CUDA_ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")

# Operators without a kernel in Python.
COMPILED: set[str] = set()

_library = torch.library.Library("effkern", "FRAGMENT")
_library.define("cpu_clone() -> int")


@cache
def load(module: str) -> str | None:
    """Import `effkern.<module>`; None if that works, else the reason why it does not, as one sentence."""
    if find_spec(f"effkern.{module}") is None:
        # _data is of one version of Python each.
        others = sorted(path.name for path in Path(__file__).parent.glob(f"{module}.*so"))
        return f"effkern.{module} was not built" + (f" for this Python, only as {', '.join(others)}" if others else "")
    if module == "_C_cuda" and torch.version.cuda is None:
        return "this torch has no CUDA"
    try:
        import_module(f"effkern.{module}")
    except (ImportError, OSError) as error:
        return f"effkern.{module} does not load: {error}"
    return None


def load_on_first_call(library: torch.library.Library, *names: str) -> None:
    """Let operators that compiled modules implement load theirs: a program of torch.export calls nothing else of us."""
    for name in names:
        library.impl(name, partial(_first_call, name), "CompositeExplicitAutograd")
        COMPILED.add(name)


def _first_call(name: str, *arguments: Any) -> Any:
    """A kernel of the module, once that is there, comes before this one."""
    devices = {x.device for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)}
    # As the dispatcher has it: a tensor on another device counts for more than one on the CPU.
    device = max(devices, key=lambda d: d.type != "cpu", default=torch.device("cpu"))
    module, key = ("_C_cuda", "CUDA") if device.type == "cuda" else ("_C", "CPU")
    reason = load(module) if device.type in ("cpu", "cuda") else "it has kernels for CPU and CUDA"
    if reason is None and not torch._C._dispatch_has_kernel_for_dispatch_key(f"effkern::{name}", key):
        reason = f"effkern.{module} has no kernel for it"
    if not devices:
        reason = "it got no tensor, which would say which kernel to take"
    if reason is not None:
        raise NotImplementedError(f"effkern::{name} cannot run on {device}: {reason}")
    return getattr(torch.ops.effkern, name)(*arguments)


@cache
def triton_missing() -> str | None:
    """None if Triton can be imported, else the reason."""
    return None if find_spec("triton") else "triton is not installed"


def cpu_clone() -> str:
    """The clone of the CPU kernels that runs on this machine, as the compiled module reports it; "none" without it."""
    return "none" if load("_C") else CPU_CLONES[torch.ops.effkern.cpu_clone()]


def triton_interprets() -> bool:
    """True where Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
