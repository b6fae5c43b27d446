"""Which method computes which root, and where."""

# In the order of the numbers in csrc/cpu/shampoo_root.cpp.
METHODS = ("eigh", "rational", "polar_express", "gram_ns", "coupled_newton")
# Methods of each implementation.
POWERS = {
    "cpp": ("eigh", "rational"),
    "triton": ("polar_express", "gram_ns", "coupled_newton"),
    "reference": METHODS,
}
# Below it float32 Cholesky factors of the smallest shift are no more certain to exist.
LEAST_RATIONAL_RIDGE = 1e-7
# Below it the polynomials' first steps do not reach the smallest eigenvalues.
LEAST_POLYNOMIAL_RIDGE = 1e-7
LARGEST_ROOT = 8
# One tf32 product loses the small eigenvalues: it is not offered. In the Gram form 16 bits do, too, below this ridge.
PRECISIONS = ("ieee", "tf32x3", "bf16x3")
LEAST_SPLIT_GRAM_RIDGE = 1e-5


def root_of(exponent: float) -> int:
    """p if exponent = -1/p with p <= LARGEST_ROOT, else 0."""
    p = round(-1.0 / exponent)
    return p if 1 <= p <= LARGEST_ROOT and abs(exponent * p + 1.0) < 1e-12 else 0


def covers(method: str, exponent: float, ridge: float, pseudo_inverse: float | None) -> str | None:
    """What `method` asks for and these arguments lack; None: nothing."""
    if method == "eigh":
        return None
    if pseudo_inverse is not None:
        return "pseudo_inverse=None (eigh has it)"
    if method == "rational":
        if not -1.0 < exponent < 0.0:
            return f"-1 < exponent < 0, got {exponent!r}"
        return None if ridge >= LEAST_RATIONAL_RIDGE else f"ridge >= {LEAST_RATIONAL_RIDGE}, got {ridge!r}"
    if ridge < LEAST_POLYNOMIAL_RIDGE:
        return f"ridge >= {LEAST_POLYNOMIAL_RIDGE}, got {ridge!r}"
    allowed = {"polar_express": (2, 4), "gram_ns": (2,), "coupled_newton": tuple(range(1, LARGEST_ROOT + 1))}[method]
    if root_of(exponent) in allowed:
        return None
    return f"an exponent of {', '.join(f'-1/{p}' for p in allowed)}, got {exponent!r}"


def resolve(method: str, exponent: float, ridge: float, pseudo_inverse: float | None, impl: str) -> str:
    """What "auto" means for an implementation."""
    if method != "auto":
        return method
    order = ("polar_express", "coupled_newton", "eigh") if impl == "triton" else ("rational", "eigh")
    return next(m for m in order if covers(m, exponent, ridge, pseudo_inverse) is None)
