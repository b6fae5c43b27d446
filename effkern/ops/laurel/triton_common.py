"""What the Triton kernels of both directions share: the scalars of the residual, and tiles of rows.

Scalars are taken as they were given, [k] or [k, D], so that no launch comes before the kernel. Those of one number are
read once; per channel they come as [1, BLOCK] tiles.
"""

import triton
import triton.language as tl


@triton.jit
def alpha_beta(weights_ptr, cols, dim, scale, MAP: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """scale alpha and scale beta by the maps of scalars.py; MAP "unit" has no weights."""
    if MAP == "unit":
        alpha, beta = scale, scale
    else:
        if PER_CHANNEL:
            first = tl.load(weights_ptr + cols, mask=cols < dim, other=0.0).to(tl.float32)[None, :]
        else:
            first = tl.load(weights_ptr).to(tl.float32)
        if MAP == "sigmoid1":
            second = first
        elif PER_CHANNEL:
            second = tl.load(weights_ptr + dim + cols, mask=cols < dim, other=0.0).to(tl.float32)[None, :]
        else:
            second = tl.load(weights_ptr + 1).to(tl.float32)
        if MAP == "none":
            alpha, beta = scale * first, scale * second
        elif MAP == "sigmoid1":
            alpha, beta = scale * tl.sigmoid(first), scale * tl.sigmoid(-first)
        elif MAP == "sigmoid":
            alpha, beta = 2.0 * scale * tl.sigmoid(first), 2.0 * scale * tl.sigmoid(second)
        else:
            factor = 2.0 * scale if MAP == "softmax2" else scale
            alpha, beta = factor * tl.sigmoid(first - second), factor * tl.sigmoid(second - first)
    return alpha, beta


@triton.jit
def coefficient(coefficients_ptr, j: tl.constexpr, cols, dim, scale, COEFFICIENTS: tl.constexpr):
    """scale c_j. COEFFICIENTS: 0 none, 1 one number per addend, 2 one per channel."""
    if COEFFICIENTS == 0:
        c = scale
    elif COEFFICIENTS == 1:
        c = scale * tl.load(coefficients_ptr + j).to(tl.float32)
    else:
        c = scale * tl.load(coefficients_ptr + j * dim + cols, mask=cols < dim, other=0.0).to(tl.float32)[None, :]
    return c


@triton.jit
def wide(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_of(ptr, cols, dim):
    """A vector of D numbers at `cols`, [1, BLOCK] in float32."""
    return tl.load(ptr + cols, mask=cols < dim, other=0.0).to(tl.float32)[None, :]


@triton.jit
def narrow(x, ptr):
    """Rounded to the type behind `ptr`."""
    return x.to(ptr.dtype.element_ty)


@triton.jit
def matrix_tile(ptr, rows, cols, num_rows, num_cols, row_stride, col_stride):
    """[rows, cols] of a small matrix, 0 beyond its edges."""
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    return tl.load(ptr + rows[:, None] * row_stride + cols[None, :] * col_stride, mask=mask, other=0.0)


@triton.jit
def load_raw(
    own_ptr, past_ptr, x_ptr, row, inside, num_down, num_up, num_past, HAS_OWN: tl.constexpr, HAS_PAST: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """[own | past], the R columns that meet B, in the type of x."""
    ranks = tl.arange(0, UP)
    num_own = num_up - num_past
    first = inside[:, None] & (ranks < num_own)[None, :]
    rest = inside[:, None] & ((ranks >= num_own) & (ranks < num_up))[None, :]
    if HAS_OWN:
        raw = tl.load(own_ptr + row[:, None] * num_down + ranks[None, :], mask=first, other=0.0)
    if HAS_PAST:
        past = tl.load(past_ptr + row[:, None] * num_past + (ranks - num_own)[None, :], mask=rest, other=0.0)
        past = narrow(past, x_ptr)
        if HAS_OWN:
            raw = tl.where(first, raw, past)
        else:
            raw = past
    return raw
