"""Forward and backward of the residual in Triton: what driver.forward and driver.backward do, in as few launches.

Bytes that must move, in units of N D elements of x's type (a move), with a norm, and without the N r of u:
forward 4 (read f, x, write y, z), 8 N D bytes in half precision, as much as a plain fused add + RMSNorm; x A by
torch.mm makes it 5. Backward 6 (read g_y, g_z, x, y, write df, dx), and 2 for the products dA = x^T dU and dB ~ v^T df;
without weights 5 and 2. What a pass reads again comes from the L2 cache.

At 3.35 TB/s, N = 16384, D = 2048 that is 80 us forward and 160 us backward. At r = 64 the L2 cache, which also gives A
and B to every tile of rows, may be the limit before memory is. These are estimates: no GPU has run any of it yet.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from effkern.ops.distill import gemm
from effkern.ops.laurel import chunks, driver, low_rank
from effkern.ops.laurel.driver import Grads, Problem, Result
from effkern.ops.laurel.triton_backward import laurel_bwd_kernel
from effkern.ops.laurel.triton_cases import COMPILE_CASES
from effkern.ops.laurel.triton_forward import laurel_fwd_kernel
from effkern.ops.laurel.triton_launch import (
    DECODE_ROWS,
    ONE_KERNEL,
    launch_of,
    padded,
)
from effkern.ops.laurel.triton_scalars import laurel_scalar_grads_kernel

__all__ = ["COMPILE_CASES", "backward", "forward"]

# Rows of sums that laurel_scalar_grads_kernel reads at a time.
FINISH_BLOCK = 128


def _sizes(p: Problem) -> tuple[int, int, int]:
    """Columns of A, rows of B, columns of `past`."""
    return (
        0 if p.down_DS is None else p.down_DS.shape[1],
        0 if p.up_RD is None else p.up_RD.shape[0],
        0 if p.past_NP is None else p.past_NP.shape[1],
    )


def _flags(p: Problem) -> dict[str, Any]:
    """Constants of both kernels."""
    _, num_up, num_past = _sizes(p)
    return {
        "MAP": "unit" if p.weights is None else p.scalar_map,
        "PER_CHANNEL": p.weights is not None and p.weights.dim() == 2,
        "UP": padded(num_up), "HAS_OWN": num_up > num_past, "HAS_PAST": num_past > 0,
        "INNER": p.low_rank_weight_D is not None, "ADDENDS": len(p.addends),
        "COEFFICIENTS": 0 if p.coefficients is None else p.coefficients.dim(), "enable_fp_fusion": True,
    }  # fmt: skip


def _given(x: Tensor, *optional: Tensor | None) -> list[Tensor]:
    """Any pointer where a kernel reads none."""
    return [x if t is None else t for t in optional]


def _strides(down: Tensor | None, up: Tensor | None) -> list[int]:
    """A and B may have any, so that the transpose of a Linear's weight needs no copy."""
    return [s for matrix in (down, up) for s in ((0, 1) if matrix is None else matrix.stride())]


def _laid_out(p: Problem, *others: Tensor | None) -> Problem:
    """`p` with the matrices in the type of x and its vectors contiguous. What has N rows comes contiguous, but for rows
    of x and of the branch that lie further apart."""
    for t in (p.x_ND, p.branch_ND):
        assert t is None or t.stride(1) == 1 or t.shape[1] == 1
    assert all(t is None or t.is_contiguous() for t in (*p.addends, p.past_NP, *others))
    return p._replace(
        **{name: t.contiguous() for name in ("weights", "coefficients", "low_rank_weight_D", "norm_weight_D")
           if (t := getattr(p, name)) is not None},
        **{name: t.to(p.x_ND.dtype) for name in ("down_DS", "up_RD") if (t := getattr(p, name)) is not None},
    )  # fmt: skip


def forward(p: Problem) -> Result:
    """See driver.forward."""
    p = _laid_out(p)
    assert p.branch_ND is not None
    x, (num_rows, dim) = p.x_ND, p.x_ND.shape
    num_down, num_up, num_past = _sizes(p)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = None if p.norm_weight_D is None else torch.empty_like(y)
    rstd = None if normed is None else x.new_empty(num_rows, dtype=torch.float32)
    own = None if p.down_DS is None else x.new_empty((num_rows, num_down))
    down, up = p.down_DS, p.up_RD
    in_kernel = padded(num_down)
    if down is not None and own is not None and in_kernel > ONE_KERNEL:
        torch.mm(x, down, out=own)
        in_kernel = 0
    if num_rows == 0:
        return Result(y, normed, own, rstd)
    direction = "decode" if num_rows <= DECODE_ROWS else "forward"
    launch = launch_of(direction, x.dtype == torch.float32, max(in_kernel, padded(num_up)))
    addends = [*p.addends, *(4 - len(p.addends)) * [x]]
    with torch.cuda.device_of(x):
        laurel_fwd_kernel[(triton.cdiv(num_rows, launch.rows),)](
            p.branch_ND, x, *_given(x, p.weights, down, up, p.past_NP, p.low_rank_weight_D), *addends,
            *_given(x, p.coefficients, p.norm_weight_D), y, *_given(y, normed, own, rstd),
            num_rows, dim, num_down, num_up, num_past, *_strides(down, up), p.branch_ND.stride(0), x.stride(0), p.scale,
            p.low_rank_eps, p.norm_eps,
            **_flags(p), DOWN=in_kernel, NORM=normed is not None,
            ROWS=launch.rows, BLOCK=launch.block, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    return Result(y, normed, own, rstd)


def _keeps_g(p: Problem) -> bool:
    """Whether dB needs g itself. Elsewhere it is df over alpha, which is then not near 0 (nor small in float16)."""
    if p.up_RD is None:
        return False
    if p.weights is None:
        return p.low_rank_weight_D is not None and p.scale == 0.0
    return p.branch_ND is not None or p.scalar_map == "none" or p.x_ND.dtype == torch.float16


def backward(
    p: Problem, r: Result, grad_y: Tensor | None, grad_normed: Tensor | None, grad_own: Tensor | None
) -> Grads:
    """See driver.backward."""
    p = _laid_out(p, r.y_ND, r.own_NS, r.rstd_N, grad_y, grad_normed, grad_own)
    x, (num_rows, dim) = p.x_ND, p.x_ND.shape
    num_down, num_up, num_past = _sizes(p)
    flags = _flags(p)
    down, up = p.down_DS, p.up_RD
    split = p.low_rank_weight_D is not None or padded(num_down) > ONE_KERNEL
    by_column = flags["PER_CHANNEL"] or flags["COEFFICIENTS"] == 2
    simple = not by_column and p.low_rank_weight_D is None
    slots = 0 if p.weights is None and p.coefficients is None else 2 + len(p.addends)

    grad_branch, grad_x = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    grad_addends = tuple(torch.empty_like(e) for e in p.addends)
    g = torch.empty_like(grad_x) if _keeps_g(p) else None
    grad_past = None if p.past_NP is None else torch.empty_like(p.past_NP)
    grad_raw = x.new_empty((num_rows, num_up), dtype=torch.float32) if split and num_up else None
    # What reaches u: nothing, what later layers sent, or that and this layer's own part.
    grad_u = grad_own if down is not None else None
    if down is not None and flags["HAS_OWN"] and not split:
        grad_u = x.new_empty((num_rows, num_down))
    in_kernel = padded(num_down) if grad_u is not None and not split else 0

    launch = launch_of("backward", x.dtype == torch.float32, max(in_kernel, padded(num_up)))
    programs = triton.cdiv(num_rows, launch.rows)
    # Rows that the kernel leaves out are 0.
    sums = x.new_zeros((programs, slots, dim if by_column else 1), dtype=torch.float32) if slots else None
    normed = grad_normed is not None
    norm_sums = x.new_empty((programs if normed else 0, dim), dtype=torch.float32)
    kept = r.y_ND if p.branch_ND is None else p.branch_ND
    padding = (4 - len(p.addends)) * (x,)
    if num_rows:
        with torch.cuda.device_of(x):
            laurel_bwd_kernel[(programs,)](
                *_given(x, grad_y, grad_normed, kept), x, *_given(x, r.y_ND, r.rstd_N), *p.addends, *padding,
                *_given(x, p.weights, p.coefficients, p.norm_weight_D, down, up, p.low_rank_weight_D, r.own_NS,
                        p.past_NP, grad_own),
                grad_branch, grad_x, *_given(x, g), *grad_addends, *padding,
                *_given(x, grad_raw, grad_u, grad_past, sums, norm_sums),
                num_rows, dim, num_down, num_up, num_past, *_strides(down, up), 0 if kept is None else kept.stride(0),
                x.stride(0), p.scale,
                **flags, HAS_GRAD_Y=grad_y is not None, NORM=normed, SLOTS=slots, BY_COLUMN=by_column,
                OF_WEIGHTS=p.weights is not None, OF_LOW_RANK=simple and p.weights is not None,
                STORE_G=g is not None, DOWN=in_kernel, HAS_GRAD_OWN=grad_own is not None, SPLIT=split,
                ROWS=launch.rows, BLOCK=launch.block, num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
    raw = None if up is None else low_rank.join(r.own_NS, p.past_NP, num_up).to(x.dtype)
    w = None if simple else driver._widen(p)
    v, grad_gram = raw, None
    if grad_raw is not None:
        if w is not None and w.gram_RR is not None:
            assert raw is not None
            v = (raw * low_rank.inverse_rms(raw, w.gram_RR, dim, p.low_rank_eps)).to(x.dtype)
            grad_gram = torch.zeros_like(w.gram_RR)
            grad_raw = low_rank.scale_grad(grad_raw, raw, w.gram_RR, dim, p.low_rank_eps, grad_gram)
        if grad_past is not None:
            grad_past.copy_(grad_raw[:, num_up - num_past :])
        if down is not None:
            grad_u = chunks.own_grad(grad_raw[:, : num_up - num_past], grad_own, num_down)
            grad_u = None if grad_u is None else grad_u.to(x.dtype)
    if split and down is not None and grad_u is not None:
        grad_x.addmm_(grad_u, down.t())
    grad_down = grad_scaled = None
    if down is not None:
        grad_down = x.new_zeros(down.shape, dtype=torch.float32) if grad_u is None else _product(x, grad_u)
    if v is not None:
        grad_scaled = _product(v, grad_branch if g is None else g)
    if w is None:
        grad_up, grad_inner = grad_scaled, None
        grad_weights, grad_coefficients, factor = _scalar_grads(p, sums, g is None)
        if grad_up is not None and factor is not None:
            grad_up.mul_(factor)
    else:
        if grad_scaled is not None and g is None:
            grad_scaled /= w.alpha
        grad_up, grad_inner, of_scaled = driver._up_grads(w, grad_scaled, grad_gram)
        total = None if sums is None else sums.sum(0, dtype=torch.float64)
        grad_weights, grad_coefficients = driver._scalar_grads(p, w, total, of_scaled)
    return Grads(
        grad_branch, grad_x, grad_weights, grad_down, grad_up, grad_past, grad_inner, grad_addends, grad_coefficients,
        None if p.norm_weight_D is None else norm_sums.sum(0),
    )  # fmt: skip


def _product(a_NK: Tensor, b_NL: Tensor) -> Tensor:
    """a^T b, [K, L] in float32."""
    shape = (a_NK.shape[1], b_NL.shape[1])
    if a_NK.shape[0] == 0:
        return a_NK.new_zeros(shape, dtype=torch.float32)
    total_KL = a_NK.new_empty(shape, dtype=torch.float32)
    gemm.add_weight_grad(total_KL, a_NK, b_NL, True)
    return total_KL


def _scalar_grads(
    p: Problem, sums: Tensor | None, over_alpha: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of weights and coefficients of one number each; and beta, `over_alpha` or not, where there are weights."""
    if sums is None:
        return None, None, None
    grad_weights, grad_coefficients = (
        None if t is None else torch.empty_like(t, dtype=torch.float32) for t in (p.weights, p.coefficients)
    )
    factor = None if p.weights is None else sums.new_empty(())
    with torch.cuda.device_of(sums):
        laurel_scalar_grads_kernel[(1,)](
            sums, *_given(sums, p.weights, p.coefficients, grad_weights, grad_coefficients, factor),
            sums.shape[0], p.scale, MAP="unit" if p.weights is None else p.scalar_map, ADDENDS=len(p.addends),
            COEFFICIENTS=0 if p.coefficients is None else 1, KEPT_BRANCH=p.branch_ND is not None,
            OVER_ALPHA=over_alpha, WIDTH=triton.next_power_of_2(2 + len(p.addends)), BLOCK=FINISH_BLOCK, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return grad_weights, grad_coefficients, factor
