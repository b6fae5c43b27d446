"""The Triton backward kernel: one program per tile of rows.

1. the mean of h yh, with h = g_z w and yh = y rstd
2. g = g_y + rstd (h - yh mean), and per element what follows: df = alpha g, c_j g, beta g (into the memory of dx), sums
   over the tile for the scalars and for w, and q = (beta g) B^T
3. dx = beta g + dU A^T, where dU is q's own part plus what later layers sent

Sums leave as one row per program, which a fixed order of additions joins: no atomics, the same bits every time.
What a pass takes back from memory (dU, beta g) other threads of the program wrote: hence the barrier.
"""

import triton
import triton.language as tl

from effkern.ops.laurel.triton_common import (
    alpha_beta,
    coefficient,
    load_raw,
    matrix_tile,
    narrow,
    row_of,
    wide,
)


@triton.jit
def _store_sum(sums_ptr, j: tl.constexpr, g, other, cols, dim, SLOTS: tl.constexpr, BY_COLUMN: tl.constexpr):
    """Sums of g other: by column over the tile, which go to memory at once; otherwise by row, which are returned."""
    product = g * other
    if BY_COLUMN:
        at = sums_ptr + (tl.program_id(0).to(tl.int64) * SLOTS + j) * dim + cols
        tl.store(at, tl.sum(product, 0), mask=cols < dim)
        of_rows = tl.zeros([g.shape[0]], tl.float32)
    else:
        of_rows = tl.sum(product, 1)
    return of_rows


@triton.jit
def _addend(
    e_ptr, grad_ptr, coefficients_ptr, sums_ptr, j: tl.constexpr, g, at, mask, cols, dim, scale,
    COEFFICIENTS: tl.constexpr, SLOTS: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """Writes c_j g; returns what `_store_sum` does for e_j, 0 where nobody asks."""
    grad = coefficient(coefficients_ptr, j, cols, dim, scale, COEFFICIENTS) * g
    tl.store(grad_ptr + at, narrow(grad, grad_ptr), mask=mask)
    if SLOTS > 0:
        of_rows = _store_sum(sums_ptr, 2 + j, g, wide(e_ptr + at, mask), cols, dim, SLOTS, BY_COLUMN)
    else:
        of_rows = tl.zeros([g.shape[0]], tl.float32)
    return of_rows


@triton.jit
def laurel_bwd_kernel(
    grad_y_ptr, grad_normed_ptr, kept_ptr, x_ptr, y_ptr, rstd_ptr, e0_ptr, e1_ptr, e2_ptr, e3_ptr, weights_ptr,
    coefficients_ptr, norm_weight_ptr, down_ptr, up_ptr, inner_ptr, own_ptr, past_ptr, grad_own_ptr,
    grad_branch_ptr, grad_x_ptr, g_ptr, d0_ptr, d1_ptr, d2_ptr, d3_ptr, grad_raw_ptr, grad_u_ptr, grad_past_ptr,
    sums_ptr, norm_sums_ptr,
    num_rows, dim, num_down, num_up, num_past, down_row, down_column, up_row, up_column,
    kept_stride, x_stride, scale,
    HAS_GRAD_Y: tl.constexpr, NORM: tl.constexpr, MAP: tl.constexpr, PER_CHANNEL: tl.constexpr,
    ADDENDS: tl.constexpr, COEFFICIENTS: tl.constexpr, SLOTS: tl.constexpr, BY_COLUMN: tl.constexpr,
    OF_WEIGHTS: tl.constexpr, OF_LOW_RANK: tl.constexpr, STORE_G: tl.constexpr, UP: tl.constexpr,
    DOWN: tl.constexpr, HAS_OWN: tl.constexpr, HAS_PAST: tl.constexpr, HAS_GRAD_OWN: tl.constexpr,
    INNER: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the tile: SLOTS = 2 + M rows (kept, x, each addend), 0 for none; kept and x with OF_WEIGHTS alone.
    OF_LOW_RANK: x's row also takes sum g (v B). SPLIT: q goes to `grad_raw` in float32 and pass 3 is left out."""
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    lanes = tl.arange(0, BLOCK)
    rows = row[:, None] * dim

    if NORM:
        rstd = tl.load(rstd_ptr + row, mask=inside, other=0.0)[:, None]
        along = tl.zeros([ROWS], tl.float32)
        for start in range(0, dim, BLOCK):
            cols = start + lanes
            mask = inside[:, None] & (cols < dim)[None, :]
            h = wide(grad_normed_ptr + rows + cols[None, :], mask) * row_of(norm_weight_ptr, cols, dim)
            along += tl.sum(h * (wide(y_ptr + rows + cols[None, :], mask) * rstd), 1)
        mean = (along / dim)[:, None]

    if not PER_CHANNEL:
        alpha, beta = alpha_beta(weights_ptr, lanes, dim, scale, MAP, False)
    of_kept = tl.zeros([ROWS], tl.float32)
    of_x, of_e0, of_e1, of_e2, of_e3 = of_kept, of_kept, of_kept, of_kept, of_kept
    if UP > 0:
        ranks = tl.arange(0, UP)
        q = tl.zeros([ROWS, UP], tl.float32)
    for start in range(0, dim, BLOCK):
        cols = start + lanes
        mask = inside[:, None] & (cols < dim)[None, :]
        at = rows + cols[None, :]
        if HAS_GRAD_Y:
            g = wide(grad_y_ptr + at, mask)
        else:
            g = tl.zeros([ROWS, BLOCK], tl.float32)
        if NORM:
            yh = wide(y_ptr + at, mask) * rstd
            grad_normed = wide(grad_normed_ptr + at, mask)
            g += rstd * (grad_normed * row_of(norm_weight_ptr, cols, dim) - yh * mean)
            tl.store(norm_sums_ptr + program * dim + cols, tl.sum(grad_normed * yh, 0), mask=cols < dim)
        if PER_CHANNEL:
            alpha, beta = alpha_beta(weights_ptr, cols, dim, scale, MAP, True)
        tl.store(grad_branch_ptr + at, narrow(alpha * g, grad_branch_ptr), mask=mask)
        tl.store(grad_x_ptr + at, narrow(beta * g, grad_x_ptr), mask=mask)
        if STORE_G:
            tl.store(g_ptr + at, narrow(g, g_ptr), mask=mask)
        if ADDENDS > 0:
            of_e0 += _addend(e0_ptr, d0_ptr, coefficients_ptr, sums_ptr, 0, g, at, mask, cols, dim, scale,
                             COEFFICIENTS, SLOTS, BY_COLUMN)  # fmt: skip
        if ADDENDS > 1:
            of_e1 += _addend(e1_ptr, d1_ptr, coefficients_ptr, sums_ptr, 1, g, at, mask, cols, dim, scale,
                             COEFFICIENTS, SLOTS, BY_COLUMN)  # fmt: skip
        if ADDENDS > 2:
            of_e2 += _addend(e2_ptr, d2_ptr, coefficients_ptr, sums_ptr, 2, g, at, mask, cols, dim, scale,
                             COEFFICIENTS, SLOTS, BY_COLUMN)  # fmt: skip
        if ADDENDS > 3:
            of_e3 += _addend(e3_ptr, d3_ptr, coefficients_ptr, sums_ptr, 3, g, at, mask, cols, dim, scale,
                             COEFFICIENTS, SLOTS, BY_COLUMN)  # fmt: skip
        if OF_WEIGHTS:
            kept = wide(kept_ptr + row[:, None] * kept_stride + cols[None, :], mask)
            x = wide(x_ptr + row[:, None] * x_stride + cols[None, :], mask)
            of_kept += _store_sum(sums_ptr, 0, g, kept, cols, dim, SLOTS, BY_COLUMN)
            of_x += _store_sum(sums_ptr, 1, g, x, cols, dim, SLOTS, BY_COLUMN)
        if UP > 0:
            # One number beta joins after the product, so that sum g (v B) needs no division by it.
            operand = g
            if PER_CHANNEL:
                operand *= beta
            if INNER:
                operand *= row_of(inner_ptr, cols, dim)
            tile = matrix_tile(up_ptr, ranks, cols, num_up, dim, up_row, up_column)
            q = tl.dot(narrow(operand, x_ptr), tl.trans(tile), q, input_precision="ieee")

    if UP > 0:
        if OF_LOW_RANK:
            raw = load_raw(
                own_ptr, past_ptr, x_ptr, row, inside, num_down, num_up, num_past, HAS_OWN, HAS_PAST, UP
            )  # fmt: skip
            of_x += tl.sum(q * raw.to(tl.float32), 1)
        if not PER_CHANNEL:
            q *= beta
        num_own = num_up - num_past
        if SPLIT:
            filled = inside[:, None] & (ranks < num_up)[None, :]
            tl.store(grad_raw_ptr + row[:, None] * num_up + ranks[None, :], q, mask=filled)
        else:
            if HAS_PAST:
                filled = inside[:, None] & ((ranks >= num_own) & (ranks < num_up))[None, :]
                at = grad_past_ptr + row[:, None] * num_past + (ranks - num_own)[None, :]
                tl.store(at, narrow(q, grad_past_ptr), mask=filled)
            if HAS_OWN:
                filled = inside[:, None] & (ranks < num_own)[None, :]
                at = row[:, None] * num_down + ranks[None, :]
                if HAS_GRAD_OWN:
                    q += wide(grad_own_ptr + at, filled)
                tl.store(grad_u_ptr + at, narrow(q, grad_u_ptr), mask=filled)
    if (SLOTS > 0) and (not BY_COLUMN):
        sums_ptr += program * SLOTS
        tl.store(sums_ptr, tl.sum(of_kept, 0))
        tl.store(sums_ptr + 1, tl.sum(of_x, 0))
        if ADDENDS > 0:
            tl.store(sums_ptr + 2, tl.sum(of_e0, 0))
        if ADDENDS > 1:
            tl.store(sums_ptr + 3, tl.sum(of_e1, 0))
        if ADDENDS > 2:
            tl.store(sums_ptr + 4, tl.sum(of_e2, 0))
        if ADDENDS > 3:
            tl.store(sums_ptr + 5, tl.sum(of_e3, 0))

    if DOWN > 0:
        slots = tl.arange(0, DOWN)
        at = row[:, None] * num_down + slots[None, :]
        if HAS_OWN:
            # Columns for later layers. Without own ones `grad_u` is `grad_own` itself.
            ahead = inside[:, None] & ((slots >= num_up - num_past) & (slots < num_down))[None, :]
            if HAS_GRAD_OWN:
                sent = tl.load(grad_own_ptr + at, mask=ahead, other=0.0)
            else:
                sent = tl.zeros([ROWS, DOWN], grad_u_ptr.dtype.element_ty)
            tl.store(grad_u_ptr + at, sent, mask=ahead)
        tl.debug_barrier()
        grad_u = tl.load(grad_u_ptr + at, mask=inside[:, None] & (slots < num_down)[None, :], other=0.0)
        for start in range(0, dim, BLOCK):
            cols = start + lanes
            mask = inside[:, None] & (cols < dim)[None, :]
            grad = wide(grad_x_ptr + rows + cols[None, :], mask)
            tile = matrix_tile(down_ptr, cols, slots, dim, num_down, down_row, down_column)
            grad = tl.dot(grad_u, tl.trans(tile), grad, input_precision="ieee")
            tl.store(grad_x_ptr + rows + cols[None, :], narrow(grad, grad_x_ptr), mask=mask)
