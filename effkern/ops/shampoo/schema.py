"""Operators of Shampoo: three by effkern._C, the same three by Triton."""

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from effkern import native
from effkern.ops import registry

_library = torch.library.Library("effkern", "FRAGMENT")

# What they mean stands in gram.py, root.py and apply.py. `pseudo_inverse`, `norm`: -1 and 0 for none. `fresh`: out is
# new memory. An absent momentum is an empty list.
_SCHEMAS = {
    "gram_ema_": (
        "(Tensor(a!) factor, Tensor[] grads, bool left, float decay, float weight, Tensor(b!)? failures) -> ()"
    ),
    "inverse_root_": (
        "(Tensor(a!) out, Tensor factor, int method, float exponent, float ridge, float scale, float pseudo_inverse, "
        "float[] poles, float[] weights, float residual_bound, bool fresh, Tensor(b!)? failures) "
        "-> (Tensor residual, Tensor status)"
    ),
    "apply_": (
        "(Tensor(a!)[] weights, Tensor(b!)[] momenta, Tensor[] grads, Tensor? left, Tensor? right, "
        "float momentum_decay, float momentum_weight, bool nesterov, float lr, Tensor? lr_tensor, float weight_decay, "
        "float norm, Tensor? norms, Tensor(c!)? failures) -> Tensor"
    ),
}

# Whether the CPU kernels use their own AVX-512 tiles (False: the library's products); returns what was before.
_library.define("shampoo_tiles(bool wanted) -> bool")
# Whether this libtorch brings the LAPACK and BLAS routines that the CPU kernels call.
_library.define("shampoo_lapack() -> bool")


def _fake_gram_ema_(factor, grads, left, decay, weight, failures) -> None:
    return None


def _fake_inverse_root_(
    out, factor, method, exponent, ridge, scale, pseudo_inverse, poles, weights, residual_bound, fresh, failures,
    precision="",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch = factor.shape[0]
    return factor.new_empty(batch, dtype=torch.float32), factor.new_empty(batch, dtype=torch.int32)


def _fake_apply_(
    weights, momenta, grads, left, right, momentum_decay, momentum_weight, nesterov, lr, lr_tensor, weight_decay, norm,
    norms, failures,
) -> Tensor:  # fmt: skip
    return weights[0].new_empty(len(weights), dtype=torch.float32)


def _triton(name: str):
    def run(*arguments):
        from effkern.ops.shampoo import triton

        return getattr(triton, name)(*arguments)

    return run


for _name, _fake in (
    ("gram_ema_", _fake_gram_ema_),
    ("inverse_root_", _fake_inverse_root_),
    ("apply_", _fake_apply_),
):
    _library.define(f"shampoo_{_name}{_SCHEMAS[_name]}")
    _triton_schema = _SCHEMAS[_name]
    if _name == "inverse_root_":
        _triton_schema = _triton_schema.replace("? failures)", "? failures, str precision)")
    _library.define(f"shampoo_triton_{_name}{_triton_schema}")
    _library.impl(f"shampoo_triton_{_name}", _triton(_name), "CompositeExplicitAutograd")
    for _op in (f"effkern::shampoo_{_name}", f"effkern::shampoo_triton_{_name}"):
        torch.library.register_fake(_op, _fake, lib=_library)


def _has_lapack() -> bool:
    # A question to this process: torch.export would write it into the program.
    with no_dispatch():
        return torch.ops.effkern.shampoo_lapack()


def _cpp() -> registry.Implementation:
    compiled = registry.cpp()

    def unavailable(device: torch.device) -> str | None:
        reason = compiled.unavailable(device)
        return reason if reason is not None or _has_lapack() else "this libtorch has no LAPACK"

    return registry.Implementation(compiled.name, unavailable)


native.load_on_first_call(_library, *(f"shampoo_{name}" for name in _SCHEMAS))
for _name in ("shampoo_gram_ema_", "shampoo_inverse_root", "shampoo_apply_"):
    registry.register(_name, _cpp(), registry.triton(), registry.reference())
