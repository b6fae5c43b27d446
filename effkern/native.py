"""The compiled modules: what was built, whether it loads, and what this CPU will run of it.

`effkern._C` and `effkern._C_cuda` only add kernels to operators that Python defines, so a missing module
costs speed and never a feature (`EFFKERN_PURE=1` installs without them).
"""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

# Requirements are not checked where torch was put in later, or `pip install --no-deps` used.
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    raise ImportError(f"effkern needs torch >= 2.11, got {torch.__version__}: pip install --upgrade torch")

# In the order of the numbers that csrc/cpu/clones.cpp reports.
CPU_CLONES = ("x86-64-v4", "x86-64-v3", "default")
CUDA_ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")

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
