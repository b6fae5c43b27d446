"""The Triton forward kernel: one program per tile of rows, which stay in the L2 cache between its passes.

1. u = x A, unless torch.mm has computed it (DOWN = 0)
2. y, and the sum of squares of the rounded y; with an inner norm that of v B before it, from the product itself
3. z = y rstd w

What one pass leaves in memory for the next one (u, y) other threads of the program wrote: hence the barriers. Taking u
back from memory rounds it as the reference does, and puts the columns of earlier layers beside it at no cost.
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
def laurel_fwd_kernel(
    branch_ptr, x_ptr, weights_ptr, down_ptr, up_ptr, past_ptr, inner_ptr, e0_ptr, e1_ptr, e2_ptr, e3_ptr,
    coefficients_ptr, norm_weight_ptr, y_ptr, normed_ptr, own_ptr, rstd_ptr,
    num_rows, dim, num_down, num_up, num_past, down_row, down_column, up_row, up_column,
    branch_stride, x_stride, scale, low_rank_eps, norm_eps,
    MAP: tl.constexpr, PER_CHANNEL: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr, HAS_OWN: tl.constexpr,
    HAS_PAST: tl.constexpr, INNER: tl.constexpr, ADDENDS: tl.constexpr, COEFFICIENTS: tl.constexpr,
    NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """DOWN and UP: columns of A and rows of B as tiles, powers of 2; 0 where there are none."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    lanes = tl.arange(0, BLOCK)
    x_rows, branch_rows = x_ptr + row[:, None] * x_stride, branch_ptr + row[:, None] * branch_stride
    y_rows = y_ptr + row[:, None] * dim

    if DOWN > 0:
        slots = tl.arange(0, DOWN)
        u = tl.zeros([ROWS, DOWN], tl.float32)
        for start in range(0, dim, BLOCK):
            cols = start + lanes
            x = tl.load(x_rows + cols[None, :], mask=inside[:, None] & (cols < dim)[None, :], other=0.0)
            tile = matrix_tile(down_ptr, cols, slots, dim, num_down, down_row, down_column)
            u = tl.dot(x, tile, u, input_precision="ieee")
        filled = inside[:, None] & (slots < num_down)[None, :]
        tl.store(own_ptr + row[:, None] * num_down + slots[None, :], narrow(u, own_ptr), mask=filled)
        tl.debug_barrier()

    if UP > 0:
        ranks = tl.arange(0, UP)
        raw = load_raw(
            own_ptr, past_ptr, x_ptr, row, inside, num_down, num_up, num_past, HAS_OWN, HAS_PAST, UP
        )  # fmt: skip
        if INNER:
            # Another read of B from the cache; B B^T would need a launch of its own.
            of_low = tl.zeros([ROWS], tl.float32)
            for start in range(0, dim, BLOCK):
                tile = matrix_tile(up_ptr, ranks, start + lanes, num_up, dim, up_row, up_column)
                low = tl.dot(raw, tile, input_precision="ieee")
                of_low += tl.sum(low * low, 1)
            s = tl.rsqrt(of_low / dim + low_rank_eps)[:, None]

    if not PER_CHANNEL:
        alpha, beta = alpha_beta(weights_ptr, lanes, dim, scale, MAP, False)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, dim, BLOCK):
        cols = start + lanes
        mask = inside[:, None] & (cols < dim)[None, :]
        if PER_CHANNEL:
            alpha, beta = alpha_beta(weights_ptr, cols, dim, scale, MAP, True)
        y = wide(x_rows + cols[None, :], mask)
        if UP > 0:
            tile = matrix_tile(up_ptr, ranks, cols, num_up, dim, up_row, up_column)
            low = tl.dot(raw, tile, input_precision="ieee")
            if INNER:
                low *= s * row_of(inner_ptr, cols, dim)
            y += low
        y = beta * y + alpha * wide(branch_rows + cols[None, :], mask)
        at = row[:, None] * dim + cols[None, :]
        if ADDENDS > 0:
            y += coefficient(coefficients_ptr, 0, cols, dim, scale, COEFFICIENTS) * wide(e0_ptr + at, mask)
        if ADDENDS > 1:
            y += coefficient(coefficients_ptr, 1, cols, dim, scale, COEFFICIENTS) * wide(e1_ptr + at, mask)
        if ADDENDS > 2:
            y += coefficient(coefficients_ptr, 2, cols, dim, scale, COEFFICIENTS) * wide(e2_ptr + at, mask)
        if ADDENDS > 3:
            y += coefficient(coefficients_ptr, 3, cols, dim, scale, COEFFICIENTS) * wide(e3_ptr + at, mask)
        rounded = narrow(y, y_ptr)
        tl.store(y_rows + cols[None, :], rounded, mask=mask)
        if NORM:
            y = rounded.to(tl.float32)
            squares += tl.sum(y * y, 1)

    if NORM:
        rstd = tl.rsqrt(squares / dim + norm_eps)
        tl.store(rstd_ptr + row, rstd, mask=inside)
        tl.debug_barrier()
        for start in range(0, dim, BLOCK):
            cols = start + lanes
            mask = inside[:, None] & (cols < dim)[None, :]
            z = wide(y_rows + cols[None, :], mask) * rstd[:, None] * row_of(norm_weight_ptr, cols, dim)
            tl.store(normed_ptr + row[:, None] * dim + cols[None, :], narrow(z, normed_ptr), mask=mask)
