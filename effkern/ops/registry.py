"""Which implementations each op has, and which one a call gets.

Every op registers its implementations in order of preference. An implementation says for a device why it
cannot run there (`None`: it can). The explicit `impl=` of a call never falls back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from effkern import native


@dataclass(frozen=True)
class Implementation:
    name: str
    unavailable: Callable[[torch.device], str | None]


_REGISTRY: dict[str, tuple[Implementation, ...]] = {}


def register(op: str, *implementations: Implementation) -> None:
    """Declare the implementations of `op`, best first; the last one runs anywhere."""
    _REGISTRY[op] = implementations


def registered() -> dict[str, tuple[Implementation, ...]]:
    """All ops known so far, by name."""
    return dict(_REGISTRY)


def choose(op: str, impl: str, device: torch.device) -> str:
    """Name of the implementation that `impl` means for `op` on `device`.

    Raises:
        ValueError: `impl` is no implementation of `op`.
        NotImplementedError: it is one, but cannot run on `device`; the message says why.
    """
    implementations = _REGISTRY[op]
    if impl == "auto":
        return next(i.name for i in implementations if i.unavailable(device) is None)
    for i in implementations:
        if i.name == impl:
            reason = i.unavailable(device)
            if reason is not None:
                raise NotImplementedError(f"{op}: impl={impl!r} cannot run on {device}: {reason}")
            return impl
    names = ", ".join(repr(n) for n in ("auto", *(i.name for i in implementations)))
    raise ValueError(f"{op}: impl must be one of {names}, got {impl!r}")


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes longer than all of
# effkern: a traced call takes the choice as it stands.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reference() -> Implementation:
    """Plain PyTorch: every device, every floating dtype."""
    return Implementation("reference", lambda device: None)


def cpp() -> Implementation:
    """The C++ CPU kernels of effkern._C."""
    return Implementation(
        "cpp", lambda device: "C++ kernels need a CPU tensor" if device.type != "cpu" else native.load("_C")
    )


def cuda() -> Implementation:
    """The CUDA C++ kernels of effkern._C_cuda."""
    return Implementation(
        "cuda", lambda device: "CUDA kernels need a CUDA tensor" if device.type != "cuda" else native.load("_C_cuda")
    )


def triton() -> Implementation:
    """Triton kernels: on CUDA, and on CPU tensors under TRITON_INTERPRET=1."""

    def unavailable(device: torch.device) -> str | None:
        if (reason := native.triton_missing()) is not None:
            return reason
        if device.type == "cuda" or native.triton_interprets():
            return None
        return "Triton kernels need a CUDA tensor (or TRITON_INTERPRET=1)"

    return Implementation("triton", unavailable)
