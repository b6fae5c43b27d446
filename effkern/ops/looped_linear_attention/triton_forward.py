"""The Triton forward kernel: all loops of a problem with its state, and the matrix it meets, in registers."""

import triton
import triton.language as tl

from effkern.ops.looped_linear_attention.triton_common import advance, prepare


@triton.jit
def looped_attention_fwd_kernel(
    x_ptr, y_ptr, query_ptr, a_ptr, steps_ptr, predictions_ptr, batch, n, d, m, loops,
    FORM: tl.constexpr, FREE: tl.constexpr, HAS_STEPS: tl.constexpr, EVERY: tl.constexpr, DP: tl.constexpr,
    MP: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    g, residual, c = prepare(
        x_ptr + problem * n * d, y_ptr + problem * n, query_ptr + problem * m * d, a_ptr, n, d, m, FORM, DP, MP, KP,
        ROWS,
    )  # fmt: skip
    queries = tl.arange(0, MP)
    out_ptrs = predictions_ptr + problem * m + queries
    state = tl.zeros([KP], tl.float32)
    for loop in range(loops):
        state, residual = advance(g, state, residual, a_ptr, steps_ptr, loop, d, FORM, FREE, HAS_STEPS, DP)
        if EVERY:
            tl.store(out_ptrs, tl.sum(c * state[None, :], 1), mask=queries < m)
            out_ptrs += batch * m
    if not EVERY:
        tl.store(out_ptrs, tl.sum(c * state[None, :], 1), mask=queries < m)
