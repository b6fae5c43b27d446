"""The Triton backward kernel: a program takes every P-th problem and sums the parameters' gradients over them.

States are run again from the inputs. Those before each of SEGMENT loops are the rows of a tile of registers, and so are
the states that start the segments, so that neither is ever in memory. Rows of a tile are chosen by masks, which costs
as much as a row of the product that the loop needs anyway.
"""

import triton
import triton.language as tl

from effkern.ops.looped_linear_attention.triton_common import (
    advance,
    dot,
    layer_matrix,
    matrix,
    prepare,
    put_matrix,
    step_of,
)


@triton.jit
def row_of(tile, index, ROWS: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, ROWS) == index)[:, None], tile, 0.0), 0)


@triton.jit
def with_row(tile, index, row, ROWS: tl.constexpr):
    return tl.where((tl.arange(0, ROWS) == index)[:, None], row[None, :], tile)


@triton.jit
def data_grads(
    x_ptr, y_ptr, grad_x_ptr, grad_y_ptr, grad_gram, grad_moment, n, d, DP: tl.constexpr, ROWS: tl.constexpr
):
    """dX = (X (dS + dS^T) + y db^T) / n and dy = X db / n."""
    features = tl.arange(0, DP)
    both = (grad_gram + tl.trans(grad_gram)) / n
    grad_moment /= n
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        x = matrix(x_ptr, rows, features, n, d)
        y = tl.load(y_ptr + rows, mask=rows < n, other=0.0)
        put_matrix(grad_x_ptr, dot(x, both) + y[:, None] * grad_moment[None, :], rows, features, n, d)
        tl.store(grad_y_ptr + rows, tl.sum(x * grad_moment[None, :], 1), mask=rows < n)


@triton.jit
def looped_attention_bwd_kernel(
    grad_ptr, x_ptr, y_ptr, query_ptr, a_ptr, steps_ptr, grad_x_ptr, grad_y_ptr, grad_query_ptr, grad_a_ptr,
    grad_steps_ptr, batch, n, d, m, loops,
    FORM: tl.constexpr, FREE: tl.constexpr, HAS_STEPS: tl.constexpr, EVERY: tl.constexpr, OF_DATA: tl.constexpr,
    OF_A: tl.constexpr, OF_STEPS: tl.constexpr, DP: tl.constexpr, MP: tl.constexpr, KP: tl.constexpr,
    ROWS: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, LP: tl.constexpr,
):  # fmt: skip
    """grad: of the predictions after the last loop, those before it lie before; grad_a [P, D, D] or, with a matrix per
    loop, [P, L, D, D], which starts as zeros; grad_steps [P, L]."""
    features, states_K = tl.arange(0, DP), tl.arange(0, KP)
    queries, layers = tl.arange(0, MP), tl.arange(0, LP)
    program = tl.program_id(0).to(tl.int64)
    if FREE:
        grad_a_ptr += program * loops * d * d
    else:
        grad_a_ptr += program * d * d
    total_a = tl.zeros([DP, DP], tl.float32)
    total_steps = tl.zeros([LP], tl.float32)
    for turn in range(tl.cdiv(batch - tl.program_id(0), tl.num_programs(0))):
        problem = program + turn * tl.num_programs(0)
        x_here, y_here, query_here = x_ptr + problem * n * d, y_ptr + problem * n, query_ptr + problem * m * d
        g, h, c = prepare(x_here, y_here, query_here, a_ptr, n, d, m, FORM, DP, MP, KP, ROWS)
        state, residual = tl.zeros([KP], tl.float32), h
        starts = tl.zeros([SEGMENTS, KP], tl.float32)
        starting_residuals = with_row(starts, 0, residual, SEGMENTS)
        for segment in range(1, tl.cdiv(loops, SEGMENT)):
            for i in range(SEGMENT):
                loop = (segment - 1) * SEGMENT + i
                state, residual = advance(g, state, residual, a_ptr, steps_ptr, loop, d, FORM, FREE, HAS_STEPS, DP)
            starts = with_row(starts, segment, state, SEGMENTS)
            starting_residuals = with_row(starting_residuals, segment, residual, SEGMENTS)

        grad_ptrs = grad_ptr + problem * m + queries
        costate = tl.zeros([KP], tl.float32)
        grad_g = tl.zeros([KP, KP], tl.float32)
        grad_h = tl.zeros([KP], tl.float32)
        grad_c = tl.zeros([MP, KP], tl.float32)
        for from_end in range(tl.cdiv(loops, SEGMENT)):
            segment = tl.cdiv(loops, SEGMENT) - 1 - from_end
            first = segment * SEGMENT
            count = tl.minimum(SEGMENT, loops - first)
            state = row_of(starts, segment, SEGMENTS)
            residual = row_of(starting_residuals, segment, SEGMENTS)
            befores = tl.zeros([SEGMENT, KP], tl.float32)
            residuals = tl.zeros([SEGMENT, KP], tl.float32)
            for i in range(count):
                befores = with_row(befores, i, state, SEGMENT)
                residuals = with_row(residuals, i, residual, SEGMENT)
                state, residual = advance(g, state, residual, a_ptr, steps_ptr, first + i, d, FORM, FREE, HAS_STEPS, DP)
            for j in range(count):
                i = count - 1 - j
                loop = first + i
                before = row_of(befores, i, SEGMENT)
                if EVERY or loop == loops - 1:
                    grad = tl.load(grad_ptrs, mask=queries < m, other=0.0)
                    grad_ptrs -= batch * m
                    costate += tl.sum(c * grad[:, None], 0)
                    if OF_DATA or FORM == "dual":
                        grad_c += grad[:, None] * state[None, :]
                state = before
                step = step_of(steps_ptr, loop, HAS_STEPS)
                residual = row_of(residuals, i, SEGMENT)
                sent = costate
                if FORM == "factors":
                    sent = tl.sum(layer_matrix(a_ptr, loop, d, FREE, DP) * costate[None, :], 1)
                    if OF_A:
                        outer = step * residual[:, None] * costate[None, :]
                        if FREE:
                            # The barrier: another thread may hold the element next time.
                            of_layer = grad_a_ptr + loop * d * d
                            outer += matrix(of_layer, features, features, d, d)
                            put_matrix(of_layer, outer, features, features, d, d)
                            tl.debug_barrier()
                        else:
                            total_a += outer
                if OF_STEPS:
                    total_steps += tl.where(layers == loop, tl.sum(residual * sent, 0), 0.0)
                sent = step * sent
                grad_g -= sent[:, None] * before[None, :]
                grad_h += sent
                costate -= tl.sum(g * sent[:, None], 0)

        if FORM == "dual":
            x = matrix(x_here, states_K, features, n, d)
            a = matrix(a_ptr, features, features, d, d)
            grad_mapped = dot(tl.trans(grad_g), x) / n
            grad_mapped += dot(tl.trans(grad_c), matrix(query_here, queries, features, m, d))
            if OF_A:
                total_a += dot(tl.trans(x), grad_mapped)
            if OF_DATA:
                mapped = dot(x, a)
                grad_x = dot(grad_g, mapped) / n + dot(grad_mapped, tl.trans(a))
                put_matrix(grad_x_ptr + problem * n * d, grad_x, states_K, features, n, d)
                tl.store(grad_y_ptr + problem * n + states_K, grad_h / n, mask=states_K < n)
                put_matrix(grad_query_ptr + problem * m * d, dot(grad_c, mapped), queries, features, m, d)
        elif OF_DATA:
            data_grads(x_here, y_here, grad_x_ptr + problem * n * d, grad_y_ptr + problem * n, grad_g, grad_h, n, d,
                       DP, ROWS)  # fmt: skip
            put_matrix(grad_query_ptr + problem * m * d, grad_c, queries, features, m, d)
    if OF_A and not FREE:
        put_matrix(grad_a_ptr, total_a, features, features, d, d)
    if OF_STEPS:
        tl.store(grad_steps_ptr + program * loops + layers, total_steps, mask=layers < loops)
