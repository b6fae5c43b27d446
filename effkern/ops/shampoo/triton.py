"""Shampoo's operations in Triton: fixed sequences of one batched product kernel; no value comes to the host.

FLOPs of a product of n x n matrices: 2 n^3, with one triangle computed and mirrored about half. Which may be mirrored
is a matter of precision: in the Gram form all, in the (Y, Z) form the two updates, in bf16x3 none.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkern.ops import addresses
from effkern.ops.shampoo import iterations
from effkern.ops.shampoo.common import count, guard, lambda_max, probe_residual
from effkern.ops.shampoo.methods import METHODS, PRECISIONS, root_of
from effkern.ops.shampoo.triton_kernels import direction_kernel, product_kernel, update_kernel

# As in root.py.
COMPUTED, ZERO, FAILED = 0, 2, 3


class Launch(NamedTuple):
    block: int
    depth: int
    warps: int
    stages: int


# By the side of the output up to which it holds. Not yet measured on a GPU: chosen so that nothing spills and the
# stages of float32 operands fit the shared memory of every architecture (python -m tests.native.triton_codegen). Of
# the largest a depth of 32 spills on sm_80.
LAUNCHES = [(32, Launch(32, 32, 4, 2)), (256, Launch(64, 32, 4, 3)), (1 << 30, Launch(128, 16, 8, 3))]
ELEMENTS = 1024
TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def launch_for(side: int) -> Launch:
    return next(launch for limit, launch in LAUNCHES if side <= limit)


def product(
    x: Tensor,
    y: Tensor,
    *,
    beta: float = 1.0,
    alpha: float = 0.0,
    c: Tensor | None = None,
    out: Tensor | None = None,
    keep: Tensor | None = None,
    mirror: bool = False,
    precision: str = "tf32x3",
) -> Tensor:
    """alpha C + beta X Y; X [B, m, k], Y [B, k, n], any strides; C and out packed along their rows."""
    batch, rows, depth = x.shape
    columns = y.shape[2]
    assert not mirror or rows == columns
    if out is None:
        out = torch.empty((batch, rows, columns), dtype=torch.float32, device=x.device)
    launch = launch_for(max(rows, columns))
    down, across = triton.cdiv(rows, launch.block), triton.cdiv(columns, launch.block)
    tiles = down * (down + 1) // 2 if mirror else down * across
    c_or_out = out if c is None else c
    assert c_or_out.stride(2) == out.stride(2) == 1 or columns == 1
    with torch.cuda.device_of(out):
        product_kernel[(tiles, batch)](
            x, y, c_or_out, out, out if keep is None else keep, rows, columns, depth, *x.stride(), *y.stride(),
            *c_or_out.stride()[:2], *out.stride()[:2], alpha, beta, HAS_C=c is not None, HAS_KEEP=keep is not None,
            MIRROR=mirror, PRECISION=precision, BLOCK=launch.block, DEPTH=launch.depth, num_warps=launch.warps,
            num_stages=launch.stages,
        )  # fmt: skip
    return out


class Products(iterations.Products):
    """Those of the iterations, by `product`."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        # With 16 bits a mirrored triangle costs a factor of 2 (Y, Z) to 3 (Gram form) in precision: it is not done.
        self.mirrors = precision != "bf16x3"

    def fused(self, X: Tensor, Y: Tensor, beta: float, alpha: float, C: Tensor | None, mirror: bool) -> Tensor:
        return product(X, Y, beta=beta, alpha=alpha, c=C, mirror=mirror and self.mirrors, precision=self.precision)


def gram_ema_(
    factor: Tensor, grads: list[Tensor], left: bool, decay: float, weight: float, failures: Tensor | None
) -> None:
    G = torch.stack(grads)
    # The diagonal of the Gram matrix says whether it is finite, before it is made.
    diagonal = G.float().square().sum(2 if left else 1)
    ok = torch.isfinite(diagonal).all(1)
    X = G if left else G.mT
    product(X, X.mT, beta=weight, alpha=decay, c=factor, out=factor, keep=ok.to(torch.int32), mirror=True)
    count(failures, ok)


def inverse_root_(
    out: Tensor,
    factor: Tensor,
    method: int,
    exponent: float,
    ridge: float,
    scale: float,
    pseudo_inverse: float,
    poles: list[float],
    weights: list[float],
    residual_bound: float,
    fresh: bool,
    failures: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    A, ok, zero = guard(factor)
    top = lambda_max(A)
    p = root_of(exponent)
    X = iterations.root(A, top, METHODS[method], p, ridge, Products(precision))
    X = (X + X.mT) / 2
    eye = torch.eye(A.shape[1], device=A.device)
    residual = probe_residual(A + (ridge * top)[:, None, None] * eye, X, p)
    good = ok & (residual <= residual_bound) & torch.isfinite(X).all(2).all(1)
    status = torch.where(good, COMPUTED, FAILED)
    status = torch.where(ok & zero, ZERO, status).to(torch.int32)
    kept = torch.where((status == FAILED)[:, None, None], float("nan"), torch.zeros_like(out)) if fresh else out
    out.copy_(torch.where((status == COMPUTED)[:, None, None], scale**exponent * X, kept))
    count(failures, status != FAILED)
    return torch.where(status == COMPUTED, residual, 0.0), status


def apply_(
    weights: list[Tensor],
    momenta: list[Tensor],
    grads: list[Tensor],
    left: Tensor | None,
    right: Tensor | None,
    momentum_decay: float,
    momentum_weight: float,
    nesterov: bool,
    lr: float,
    lr_tensor: Tensor | None,
    weight_decay: float,
    norm: float,
    norms: Tensor | None,
    failures: Tensor | None,
) -> Tensor:
    rows, columns = weights[0].shape
    batch, tiles = len(weights), triton.cdiv(rows * columns, ELEMENTS)
    U = torch.empty((batch, rows, columns), dtype=torch.float32, device=weights[0].device)
    if U.numel() == 0:
        count(failures, torch.ones(batch, dtype=torch.bool, device=U.device))
        return torch.zeros(batch, dtype=torch.float32, device=U.device)
    blocks, types = (
        _table(grads, momenta or grads, weights),
        [TYPES[t[0].dtype] for t in (grads, momenta or grads, weights)],
    )
    with torch.cuda.device_of(U):
        direction_kernel[(tiles, batch)](
            blocks, U, rows, columns, momentum_decay, momentum_weight, GRAD=types[0], MOMENTUM=types[1],
            HAS_MOMENTUM=bool(momenta), NESTEROV=nesterov, BLOCK=ELEMENTS,
        )  # fmt: skip
    lengths = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32))
    if left is not None:
        U = product(left, U)
    if right is not None:
        U = product(U, right)
    size = torch.linalg.vector_norm(U, dim=(1, 2))
    ok = torch.isfinite(lengths) & torch.isfinite(size)
    step = torch.ones_like(size)
    if norms is not None or norm > 0.0:
        step = torch.where(size > 0.0, (norm if norms is None else norms) / size, 0.0)
    keep = ok.to(torch.int32)
    with torch.cuda.device_of(U):
        update_kernel[(tiles, batch)](
            blocks, U, keep, step, step if lr_tensor is None else lr_tensor, rows, columns, momentum_decay,
            momentum_weight, lr, weight_decay, GRAD=types[0], MOMENTUM=types[1], WEIGHT=types[2],
            HAS_MOMENTUM=bool(momenta), HAS_LR=lr_tensor is not None, BLOCK=ELEMENTS,
        )  # fmt: skip
    count(failures, ok)
    return torch.where(ok, size, float("nan"))


def _table(*lists: list[Tensor]) -> Tensor:
    """A row for each block: of each list's tensor the address and the two strides."""
    numbers = [n for tensors in zip(*lists) for t in tensors for n in (t.data_ptr(), *t.stride())]
    return addresses.table(numbers, lists[0][0].device)


def _product_case(launch: Launch, precision: str, mirror: bool, dtype: str = "fp32", keep: bool = False) -> tuple:
    signature = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "c_ptr": "*fp32", "out_ptr": "*fp32", "keep_ptr": "*i32"}
    signature |= dict.fromkeys(("rows", "columns", "depth"), "i32:16")
    names = ("x_batch", "x_row", "y_batch", "y_depth", "c_batch", "c_row", "out_batch", "out_row")
    signature |= dict.fromkeys(names, "i32:16") | {"alpha": "fp32", "beta": "fp32"}
    # Strides of 1 are constants for the launcher, too.
    constants: dict[str, Any] = {"x_depth": 1, "y_column": 1, "HAS_C": True, "HAS_KEEP": keep, "MIRROR": mirror}
    constants |= {"PRECISION": precision, "BLOCK": launch.block, "DEPTH": launch.depth}
    return product_kernel, signature, constants, {"num_warps": launch.warps, "num_stages": launch.stages}


def _element_case(kernel: Any, **flags: Any) -> tuple:
    kinds = {"table_ptr": "*i64", "keep_ptr": "*i32", "lr_ptr": "*fp64", "rows": "i32", "columns": "i32"}

    def kind(name: str) -> str:
        return kinds.get(name, "*fp32" if name.endswith("_ptr") else "fp32")

    constants = {**flags, "HAS_MOMENTUM": True, "GRAD": tl.bfloat16, "MOMENTUM": tl.float32, "BLOCK": ELEMENTS}
    return kernel, {n: kind(n) for n in kernel.arg_names if n not in constants}, constants, 4


COMPILE_CASES = {
    f"product_{launch.block}_{precision}{'_mirrored' * mirror}": _product_case(launch, precision, mirror)
    for _, launch in LAUNCHES
    for precision in (PRECISIONS if launch.block > 32 else ("tf32x3",))
    for mirror in (False, True)
    if not (mirror and precision == "bf16x3")
} | {
    "gram_bf16": _product_case(LAUNCHES[-1][1], "tf32x3", True, "bf16", True),
    "direction": _element_case(direction_kernel, NESTEROV=True),
    "update": _element_case(update_kernel, WEIGHT=tl.bfloat16, HAS_LR=True),
}
