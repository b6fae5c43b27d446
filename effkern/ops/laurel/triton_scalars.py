"""The gradients of scalars, in one small launch where plain PyTorch takes a dozen that each outlast their work."""

import triton
import triton.language as tl

from effkern.ops.laurel.triton_common import alpha_beta


@triton.jit
def _pick(sums, j: tl.constexpr, WIDTH: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, WIDTH) == j, sums, 0.0), 0)


@triton.jit
def laurel_scalar_grads_kernel(
    sums_ptr, weights_ptr, coefficients_ptr, grad_weights_ptr, grad_coefficients_ptr, factor_ptr, num_programs, scale,
    MAP: tl.constexpr, ADDENDS: tl.constexpr, COEFFICIENTS: tl.constexpr, KEPT_BRANCH: tl.constexpr,
    OVER_ALPHA: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scalars of one number each; the formulas are driver._scalar_grads', in float64 from the programs' sums on.

    WIDTH: a power of 2 from 2 + ADDENDS on. `factor` takes beta, over alpha with OVER_ALPHA.
    """
    slots = tl.arange(0, WIDTH)
    sums = tl.zeros([WIDTH], tl.float64)
    for start in range(0, num_programs, BLOCK):
        program = start + tl.arange(0, BLOCK)
        mask = (program < num_programs)[:, None] & (slots < 2 + ADDENDS)[None, :]
        at = program[:, None] * (2 + ADDENDS) + slots[None, :]
        sums += tl.sum(tl.load(sums_ptr + at, mask=mask, other=0.0).to(tl.float64), 0)
    if COEFFICIENTS == 1:
        mask = (slots >= 2) & (slots < 2 + ADDENDS)
        tl.store(grad_coefficients_ptr + slots - 2, (scale * sums).to(tl.float32), mask=mask)
        c = tl.load(coefficients_ptr + slots - 2, mask=mask, other=0.0).to(tl.float32)
    else:
        c = tl.where(slots >= 2, 1.0, 0.0)
    if MAP != "unit":
        alpha, beta = alpha_beta(weights_ptr, slots, 1, scale, MAP, False)
        of_branch, of_x = _pick(sums, 0, WIDTH), _pick(sums, 1, WIDTH)
        if not KEPT_BRANCH:
            of_addends = tl.sum(tl.where(slots >= 2, (scale * c).to(tl.float64) * sums, 0.0), 0)
            of_branch = (of_branch - beta.to(tl.float64) * of_x - of_addends) / alpha.to(tl.float64)
        of_branch = (of_branch * scale).to(tl.float32)
        of_x = (of_x * scale).to(tl.float32)
        tl.store(factor_ptr, beta / alpha if OVER_ALPHA else beta)

        first = tl.load(weights_ptr).to(tl.float32)
        slope = tl.sigmoid(first) * tl.sigmoid(-first)
        if MAP == "sigmoid1":
            tl.store(grad_weights_ptr, (of_branch - of_x) * slope)
        else:
            second = tl.load(weights_ptr + 1).to(tl.float32)
            if MAP == "none":
                grad, other = of_branch, of_x
            elif MAP == "sigmoid":
                grad = 2.0 * of_branch * slope
                other = 2.0 * of_x * (tl.sigmoid(second) * tl.sigmoid(-second))
            else:
                grad = tl.sigmoid(first - second) * tl.sigmoid(second - first) * (of_branch - of_x)
                if MAP == "softmax2":
                    grad *= 2.0
                other = -grad
            tl.store(grad_weights_ptr, grad)
            tl.store(grad_weights_ptr + 1, other)
