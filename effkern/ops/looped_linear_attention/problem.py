"""What the implementations take, and the three exact forms of the recurrence.

    B problems, N examples of D numbers each, M queries, L loops, K numbers of state

The last row of Z is y - X w for the examples and -w . q for a query, w_0 = 0: all of it follows from D numbers w, and
w = A^T X^T u from N numbers u. With S = X^T X / n and b = X^T y / n a layer is one of

    factors   w <- w + e_l A_l^T (b - S w)                    K = D
    primal    w <- w + e_l (A^T b - A^T S w)                  K = D, one A
    dual      u <- u + e_l (y / n - X A^T X^T u / n)          K = N, one A;  the prediction is q A^T X^T u

The two with one A read s <- s + e_l (h - G s), prediction C s, with their own G [K, K], h [K] and C [M, K].
"""

from typing import NamedTuple

from torch import Tensor

FORMS = ("factors", "primal", "dual")


class Problem(NamedTuple):
    """All in the type of the state, float32 or float64, and contiguous."""

    x_BND: Tensor
    y_BN: Tensor
    query_BMD: Tensor
    preconditioner: Tensor
    """[1, D, D], one for all loops, or [L, D, D]."""
    steps_L: Tensor | None
    loops: int
    every_loop: bool
    """Predictions after each loop, [L, B, M], or after the last one alone, [1, B, M]."""
    form: str


class Needs(NamedTuple):
    """What backward computes: the gradients of x, y and query; of the preconditioner; of the step sizes."""

    data: bool
    preconditioner: bool
    steps: bool


class Grads(NamedTuple):
    x_BND: Tensor | None
    y_BN: Tensor | None
    query_BMD: Tensor | None
    preconditioner: Tensor | None
    steps_L: Tensor | None


def products(form: str, examples: int, dim: int, queries: int, loops: int) -> int:
    """Multiply-adds of forward and backward for one problem, without what all forms have in common.

    Forward runs L products with G (factors: with S and A), backward runs them again, then with their transposes, and
    sums L outer products.
    """
    n, d, loops_d = examples, dim, loops * dim * dim
    if form == "factors":
        return 2 * n * d * d + 8 * loops_d
    if form == "primal":
        return 2 * n * d * d + 4 * d**3 + 4 * loops_d
    return 4 * n * d * d + 4 * n * n * d + 4 * queries * n * d + 4 * loops * n * n


def cheapest(examples: int, dim: int, queries: int, loops: int, shared: bool) -> str:
    """The form of fewest multiply-adds; with one A per loop there is only the first."""
    if not shared:
        return "factors"
    return min(FORMS, key=lambda form: products(form, examples, dim, queries, loops))
