"""What both Triton kernels do to a problem before and in the loops. One program takes one problem at a time.

    N examples of D numbers, M queries, K = D (factors) or N (dual) numbers of state; tiles DP, MP, KP are powers of 2,
    at least 16 for the products, and 0 beyond the edges, which therefore never reach a sum

"primal" runs as "factors": its product A^T S before the loops and the two behind them cost registers that spill, and
save one short reduction per loop. So does "dual" with more than 16 examples or queries.

Products of float32 tiles are sums of three of the tensor core's (tf32x3), as exact as float32 ones; the recurrence
itself is multiply-adds of registers.
"""

import triton
import triton.language as tl


@triton.jit
def matrix(ptr, rows, columns, num_rows, num_columns):
    """[rows, columns] of a packed matrix."""
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(ptr + rows[:, None] * num_columns + columns[None, :], mask=mask, other=0.0)


@triton.jit
def put_matrix(ptr, value, rows, columns, num_rows, num_columns):
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(ptr + rows[:, None] * num_columns + columns[None, :], value, mask=mask)


@triton.jit
def dot(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def moments(x_ptr, y_ptr, n, d, DP: tl.constexpr, ROWS: tl.constexpr):
    """S = X^T X / n and b = X^T y / n."""
    features = tl.arange(0, DP)
    gram = tl.zeros([DP, DP], tl.float32)
    moment = tl.zeros([DP], tl.float32)
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        x = matrix(x_ptr, rows, features, n, d)
        y = tl.load(y_ptr + rows, mask=rows < n, other=0.0)
        gram += dot(tl.trans(x), x)
        moment += tl.sum(x * y[:, None], 0)
    return gram / n, moment / n


@triton.jit
def prepare(
    x_ptr, y_ptr, query_ptr, a_ptr, n, d, m,
    FORM: tl.constexpr, DP: tl.constexpr, MP: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """G [KP, KP], h [KP] and C [MP, KP] of s <- s + e T (h - G s)."""
    features, queries = tl.arange(0, DP), tl.arange(0, MP)
    c = matrix(query_ptr, queries, features, m, d)
    if FORM == "dual":
        examples = tl.arange(0, KP)
        x = matrix(x_ptr, examples, features, n, d)
        mapped = tl.trans(dot(x, matrix(a_ptr, features, features, d, d)))
        g = dot(x, mapped) / n
        h = tl.load(y_ptr + examples, mask=examples < n, other=0.0) / n
        c = dot(c, mapped)
    else:
        g, h = moments(x_ptr, y_ptr, n, d, DP, ROWS)
    return g, h, c


@triton.jit
def step_of(steps_ptr, loop, HAS_STEPS: tl.constexpr):
    if HAS_STEPS:
        step = tl.load(steps_ptr + loop)
    else:
        step = 1.0
    return step


@triton.jit
def advance(
    g, state, residual, a_ptr, steps_ptr, loop, d, FORM: tl.constexpr, FREE: tl.constexpr, HAS_STEPS: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """s and r = h - G s after `loop`; r has a recurrence of its own, see plain.py."""
    change = residual
    if FORM == "factors":
        change = tl.sum(layer_matrix(a_ptr, loop, d, FREE, DP) * change[:, None], 0)
    change = step_of(steps_ptr, loop, HAS_STEPS) * change
    return state + change, residual - tl.sum(g * change[None, :], 1)


@triton.jit
def layer_matrix(a_ptr, loop, d, FREE: tl.constexpr, DP: tl.constexpr):
    features = tl.arange(0, DP)
    if FREE:
        a_ptr += loop * d * d
    return matrix(a_ptr, features, features, d, d)
