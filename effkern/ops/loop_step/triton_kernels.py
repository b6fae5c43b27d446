"""The Triton kernels of the loop step: one program per tile of rows, walked in blocks of channels.

Forward: s~ and its sum of squares; then s, x and the change. Backward: G = g_s + c g_x and the mean of G w yh; then g
and what follows from it. Without a norm the first walk is left out. What the second walk reads again comes from the
first-level cache (forward) or the L2 cache; nothing is read that the same kernel wrote.
Sums over tokens leave as one row per program, which a fixed order of additions joins: no atomics, the same bits.

A factor's kind: 0 a number, 1 a tensor of one number, 2 one per channel; beta's -1: no term.
A sum's kind: 0 nobody asks, 1 one number, 2 one per channel.
"""

import triton
import triton.language as tl


@triton.jit
def _wide(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _narrow(x, ptr):
    return x.to(ptr.dtype.element_ty)


@triton.jit
def _row_of(ptr, cols, dim):
    """A vector of D numbers at `cols`, [1, BLOCK] in float32."""
    return tl.load(ptr + cols, mask=cols < dim, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _factor(ptr, number, cols, dim, KIND: tl.constexpr):
    if KIND == 2:
        factor = _row_of(ptr, cols, dim)
    elif KIND == 1:
        factor = tl.load(ptr).to(tl.float32)
    else:
        factor = number
    return factor


@triton.jit
def _combined(
    f_ptr, h_ptr, low_ptr, alpha_ptr, beta_ptr, alpha, beta, at, mask, cols, dim,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """s~ of a tile."""
    s = _factor(alpha_ptr, alpha, cols, dim, ALPHA) * _wide(f_ptr + at, mask)
    if BETA >= 0:
        s += _factor(beta_ptr, beta, cols, dim, BETA) * _wide(h_ptr + at, mask)
    if LOW:
        s += _wide(low_ptr + at, mask)
    return s


@triton.jit
def loop_step_fwd_kernel(
    f_ptr, h_ptr, e_ptr, low_ptr, alpha_ptr, beta_ptr, state_scale_ptr, input_scale_ptr, weight_ptr, embedding_ptr,
    state_ptr, core_input_ptr, change_ptr, rstd_ptr,
    num_rows, dim, alpha, beta, state_scale, input_scale, eps,
    ALPHA: tl.constexpr, BETA: tl.constexpr, STATE_SCALE: tl.constexpr, INPUT_SCALE: tl.constexpr,
    INPUT: tl.constexpr, LOW: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, EMBEDDING: tl.constexpr,
    CORE_INPUT: tl.constexpr, CHANGE: tl.constexpr, STATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Without STATE s is f itself and not written."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    lanes = tl.arange(0, BLOCK)
    rows = row[:, None] * dim
    if NORM:
        squares = tl.zeros([ROWS], tl.float32)
        for start in range(0, dim, BLOCK):
            cols = start + lanes
            mask = inside[:, None] & (cols < dim)[None, :]
            s = _combined(
                f_ptr, h_ptr, low_ptr, alpha_ptr, beta_ptr, alpha, beta, rows + cols[None, :], mask, cols, dim,
                ALPHA, BETA, LOW,
            )  # fmt: skip
            squares += tl.sum(s * s, 1)
        rstd = tl.rsqrt(squares / dim + eps)
        tl.store(rstd_ptr + row, rstd, mask=inside)
    moved = tl.zeros([ROWS], tl.float32)
    size = tl.zeros([ROWS], tl.float32)
    for start in range(0, dim, BLOCK):
        cols = start + lanes
        mask = inside[:, None] & (cols < dim)[None, :]
        at = rows + cols[None, :]
        s = _combined(
            f_ptr, h_ptr, low_ptr, alpha_ptr, beta_ptr, alpha, beta, at, mask, cols, dim, ALPHA, BETA, LOW
        )  # fmt: skip
        if NORM:
            s *= rstd[:, None]
            if WEIGHT:
                s *= _row_of(weight_ptr, cols, dim)
        if STATE:
            rounded = _narrow(s, state_ptr)
            tl.store(state_ptr + at, rounded, mask=mask)
            s = rounded.to(tl.float32)
        if CHANGE:
            step = s - _wide(h_ptr + at, mask)
            # Beyond the row's end s is 0 by its operands, unless they are numbers that 0 does not stop.
            moved += tl.sum(tl.where(mask, step * step, 0.0), 1)
            size += tl.sum(tl.where(mask, s * s, 0.0), 1)
        if CORE_INPUT:
            x = _factor(state_scale_ptr, state_scale, cols, dim, STATE_SCALE) * s
            if INPUT:
                x += _factor(input_scale_ptr, input_scale, cols, dim, INPUT_SCALE) * _wide(e_ptr + at, mask)
            if EMBEDDING:
                x += _row_of(embedding_ptr, cols, dim)
            tl.store(core_input_ptr + at, _narrow(x, core_input_ptr), mask=mask)
    if CHANGE:
        change = tl.where(moved == 0.0, 0.0, tl.sqrt(moved) / tl.sqrt(tl.where(moved == 0.0, 1.0, size)))
        tl.store(change_ptr + row, change, mask=inside)


@triton.jit
def _gathered(
    grad_state_ptr, grad_core_input_ptr, state_scale_ptr, state_scale, at, mask, cols, dim,
    HAS_STATE: tl.constexpr, HAS_CORE_INPUT: tl.constexpr, STATE_SCALE: tl.constexpr,
):  # fmt: skip
    """G of a tile, and g_x (G itself without it, where nobody reads it)."""
    if HAS_CORE_INPUT:
        gx = _wide(grad_core_input_ptr + at, mask)
        g = _factor(state_scale_ptr, state_scale, cols, dim, STATE_SCALE) * gx
        if HAS_STATE:
            g += _wide(grad_state_ptr + at, mask)
    else:
        g = _wide(grad_state_ptr + at, mask)
        gx = g
    return g, gx


@triton.jit
def _y_hat(
    f_ptr, h_ptr, low_ptr, state_ptr, alpha_ptr, beta_ptr, alpha, beta, rstd, weight, at, mask, cols, dim,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LOW: tl.constexpr, WEIGHT: tl.constexpr, FROM_STATE: tl.constexpr,
):  # fmt: skip
    if FROM_STATE:
        yh = _wide(state_ptr + at, mask)
        if WEIGHT:
            yh /= tl.where((cols < dim)[None, :], weight, 1.0)
    else:
        s = _combined(
            f_ptr, h_ptr, low_ptr, alpha_ptr, beta_ptr, alpha, beta, at, mask, cols, dim, ALPHA, BETA, LOW
        )  # fmt: skip
        yh = s * rstd
    return yh


@triton.jit
def _summed(total, product, sums_ptr, cols, dim, KIND: tl.constexpr):
    """Of one number: `total` per row goes on. Per channel: the tile's columns go to memory at once."""
    if KIND == 2:
        tl.store(sums_ptr + cols, tl.sum(product, 0), mask=cols < dim)
    if KIND == 1:
        total += tl.sum(product, 1)
    return total


@triton.jit
def _left(total, sums_ptr, KIND: tl.constexpr):
    if KIND == 1:
        tl.store(sums_ptr, tl.sum(total, 0))


@triton.jit
def loop_step_bwd_kernel(
    grad_state_ptr, grad_core_input_ptr, f_ptr, h_ptr, e_ptr, state_ptr, low_ptr, rstd_ptr,
    alpha_ptr, beta_ptr, state_scale_ptr, input_scale_ptr, weight_ptr,
    g_ptr, grad_f_ptr, grad_h_ptr, grad_e_ptr, sums_ptr,
    num_rows, dim, sums_width, of_alpha, of_beta, of_state_scale, of_input_scale, of_weight, of_embedding,
    alpha, beta, state_scale, input_scale,
    ALPHA: tl.constexpr, BETA: tl.constexpr, STATE_SCALE: tl.constexpr, INPUT_SCALE: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_CORE_INPUT: tl.constexpr, LOW: tl.constexpr, NORM: tl.constexpr,
    WEIGHT: tl.constexpr, FROM_STATE: tl.constexpr, STORE_G: tl.constexpr, OF_F: tl.constexpr, OF_H: tl.constexpr,
    OF_E: tl.constexpr, OF_ALPHA: tl.constexpr, OF_BETA: tl.constexpr, OF_STATE_SCALE: tl.constexpr,
    OF_INPUT_SCALE: tl.constexpr, OF_WEIGHT: tl.constexpr, OF_EMBEDDING: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """of_alpha ...: where the sums of a slot begin in the program's row of `sums`."""
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    lanes = tl.arange(0, BLOCK)
    rows = row[:, None] * dim
    sums_ptr += program * sums_width
    rstd = tl.zeros([ROWS, 1], tl.float32)
    if NORM:
        rstd = tl.load(rstd_ptr + row, mask=inside, other=0.0)[:, None]
        along = tl.zeros([ROWS], tl.float32)
        for start in range(0, dim, BLOCK):
            cols = start + lanes
            mask = inside[:, None] & (cols < dim)[None, :]
            at = rows + cols[None, :]
            g, _ = _gathered(grad_state_ptr, grad_core_input_ptr, state_scale_ptr, state_scale, at, mask, cols, dim,
                             HAS_STATE, HAS_CORE_INPUT, STATE_SCALE)  # fmt: skip
            weight = _row_of(weight_ptr, cols, dim) if WEIGHT else 1.0
            if FROM_STATE:
                # w yh is s.
                along += tl.sum(g * _wide(state_ptr + at, mask), 1)
            else:
                yh = _y_hat(f_ptr, h_ptr, low_ptr, state_ptr, alpha_ptr, beta_ptr, alpha, beta, rstd, weight, at, mask,
                            cols, dim, ALPHA, BETA, LOW, WEIGHT, FROM_STATE)  # fmt: skip
                along += tl.sum(g * weight * yh, 1)
        mean = (along / dim)[:, None]

    none = tl.zeros([ROWS], tl.float32)
    alphas, betas, state_scales, input_scales = none, none, none, none
    for start in range(0, dim, BLOCK):
        cols = start + lanes
        mask = inside[:, None] & (cols < dim)[None, :]
        at = rows + cols[None, :]
        g, gx = _gathered(grad_state_ptr, grad_core_input_ptr, state_scale_ptr, state_scale, at, mask, cols, dim,
                          HAS_STATE, HAS_CORE_INPUT, STATE_SCALE)  # fmt: skip
        if OF_STATE_SCALE > 0:
            product = gx * _wide(state_ptr + at, mask)
            state_scales = _summed(state_scales, product, sums_ptr + of_state_scale, cols, dim, OF_STATE_SCALE)
        if OF_INPUT_SCALE > 0:
            product = gx * _wide(e_ptr + at, mask)
            input_scales = _summed(input_scales, product, sums_ptr + of_input_scale, cols, dim, OF_INPUT_SCALE)
        if OF_EMBEDDING > 0:
            _summed(none, gx, sums_ptr + of_embedding, cols, dim, OF_EMBEDDING)
        if OF_E:
            grad_e = _factor(input_scale_ptr, input_scale, cols, dim, INPUT_SCALE) * gx
            tl.store(grad_e_ptr + at, _narrow(grad_e, grad_e_ptr), mask=mask)
        if NORM:
            weight = _row_of(weight_ptr, cols, dim) if WEIGHT else 1.0
            yh = _y_hat(f_ptr, h_ptr, low_ptr, state_ptr, alpha_ptr, beta_ptr, alpha, beta, rstd, weight, at, mask,
                        cols, dim, ALPHA, BETA, LOW, WEIGHT, FROM_STATE)  # fmt: skip
            if OF_WEIGHT > 0:
                _summed(none, g * yh, sums_ptr + of_weight, cols, dim, OF_WEIGHT)
            g = rstd * (g * weight - yh * mean)
        if STORE_G:
            tl.store(g_ptr + at, _narrow(g, g_ptr), mask=mask)
        if OF_F:
            grad_f = _factor(alpha_ptr, alpha, cols, dim, ALPHA) * g
            tl.store(grad_f_ptr + at, _narrow(grad_f, grad_f_ptr), mask=mask)
        if OF_H:
            grad_h = _factor(beta_ptr, beta, cols, dim, BETA) * g
            tl.store(grad_h_ptr + at, _narrow(grad_h, grad_h_ptr), mask=mask)
        if OF_ALPHA > 0:
            alphas = _summed(alphas, g * _wide(f_ptr + at, mask), sums_ptr + of_alpha, cols, dim, OF_ALPHA)
        if OF_BETA > 0:
            betas = _summed(betas, g * _wide(h_ptr + at, mask), sums_ptr + of_beta, cols, dim, OF_BETA)
    _left(alphas, sums_ptr + of_alpha, OF_ALPHA)
    _left(betas, sums_ptr + of_beta, OF_BETA)
    _left(state_scales, sums_ptr + of_state_scale, OF_STATE_SCALE)
    _left(input_scales, sums_ptr + of_input_scale, OF_INPUT_SCALE)
