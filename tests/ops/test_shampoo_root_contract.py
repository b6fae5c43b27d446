"""inverse_root and matrix_inverse_root as calls: operators, compilation, shapes and dtypes, errors."""

import pytest
import torch

import effkern
from effkern.ops.shampoo import inverse_root, matrix_inverse_root
from effkern.ops.shampoo.rational import terms
from tests.numerics import rel_err
from tests.ops.shampoo_cases import CPP, symmetric, truth

needs_cpp = pytest.mark.skipif(not CPP, reason="effkern._C was not built")


@needs_cpp
def test_operator_cpp():
    """Schema, shape function and aliasing by torch's own checker."""
    G = torch.randn(2, 6, 9)
    A = symmetric(G @ G.mT)
    poles, weights = terms(-0.5, 1e-3)
    arguments = (torch.zeros_like(A), A, 1, -0.5, 1e-3, 1.0, -1.0, list(poles), list(weights), 0.25, False)
    for failures in (None, torch.zeros(2, dtype=torch.int32)):
        torch.library.opcheck(torch.ops.effkern.shampoo_inverse_root_.default, (*arguments, failures))
    for change, message in (
        ({1: A.half()}, "contiguous float32 or float64"),
        ({0: torch.zeros(2, 6, 5)}, "contiguous float32 or float64"),
        ({2: 3}, "method must be eigh or rational"),
        ({7: []}, "one more than poles"),
        ({3: 0.5}, "exponent must be negative"),
    ):
        given = [change.get(i, a) for i, a in enumerate((*arguments, None))]
        with pytest.raises(RuntimeError, match=message):
            torch.ops.effkern.shampoo_inverse_root_(*given)


@pytest.mark.parametrize(("impl", "method"), [("cpp", "rational"), ("reference", "polar_express")])
def test_compile_cpp(impl, method):
    if impl == "cpp" and not CPP:
        pytest.skip("effkern._C was not built")
    G = torch.randn(2, 6, 9)
    A = symmetric(G @ G.mT)
    out, failures = torch.zeros_like(A), torch.ones(2, dtype=torch.int32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(A, out, failures):
        return inverse_root(A, ridge=1e-3, method=method, out=out, failures=failures, impl=impl).residual

    residual = step(A, out, failures)
    plain = inverse_root(A, ridge=1e-3, method=method, impl=impl)
    torch.testing.assert_close(out, plain.root)
    torch.testing.assert_close(residual, plain.residual)
    assert failures.tolist() == [0, 0]


def test_matrix_inverse_root():
    G = torch.randn(2, 3, 7, 12)
    A = G @ G.mT
    for p in (1, 2, 4, 2.5):
        assert rel_err(matrix_inverse_root(A, p), truth(A, -1 / p)) < 1e-4
    assert effkern.matrix_inverse_root is matrix_inverse_root
    half = matrix_inverse_root(A.bfloat16().mT)
    assert half.dtype == torch.bfloat16
    assert rel_err(half.float(), truth(A.bfloat16().float().tril() + A.bfloat16().float().mT.tril(-1).mT)) < 1e-2
    assert matrix_inverse_root(torch.zeros(0, 4, 4)).shape == (0, 4, 4)
    for bad, kind, message in (
        ([1.0], TypeError, "matrix must be a tensor, got list"),
        (torch.zeros(3, 4), ValueError, r"matrix must have shape \(..., n, n\), got \(3, 4\)"),
        (torch.zeros(3, 3, dtype=torch.complex64), TypeError, "matrix must be dense and float32"),
    ):
        with pytest.raises(kind, match=message):
            matrix_inverse_root(bad)
    with pytest.raises(ValueError, match=r"p must be finite and > 0, got 0"):
        matrix_inverse_root(A, 0)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"factor_Bpp": torch.zeros(3, 3)}, ValueError, r"factor_Bpp must have shape \(B, p, p\), got \(3, 3\)"),
        (
            {"factor_Bpp": torch.zeros(2, 3, 3).half()},
            TypeError,
            "factor_Bpp must be float32 or float64, got torch.float16",
        ),
        ({"factor_Bpp": torch.zeros(3, 3, 2).permute(2, 0, 1)}, ValueError, "factor_Bpp must be contiguous"),
        ({"factor_Bpp": None}, TypeError, "factor_Bpp must be a tensor, got NoneType"),
        ({"out": torch.zeros(2, 3, 3).double()}, TypeError, "out must be float32, got torch.float64"),
        (
            {"out": torch.zeros(1, 3, 3)},
            ValueError,
            r"out must have the shape of factor_Bpp, \(2, 3, 3\), got \(1, 3, 3\)",
        ),
        ({"exponent": 0.5}, ValueError, "-exponent must be finite and > 0, got -0.5"),
        ({"exponent": "half"}, TypeError, "-exponent must be a number, got str"),
        ({"ridge": -1.0}, ValueError, "ridge must be finite and >= 0, got -1.0"),
        ({"scale": 0.0}, ValueError, "scale must be finite and > 0, got 0.0"),
        ({"scale": float("nan")}, ValueError, "scale must be finite and > 0, got nan"),
        ({"residual_bound": 0}, ValueError, "residual_bound must be finite and > 0, got 0"),
        ({"method": "svd"}, ValueError, "method must be one of 'auto', 'eigh'.*, got 'svd'"),
        ({"method": "gram_ns", "exponent": -0.25}, ValueError, "'gram_ns' needs an exponent of -1/2, got -0.25"),
        ({"method": "rational", "exponent": -1.0}, ValueError, "'rational' needs -1 < exponent < 0, got -1.0"),
        ({"method": "rational", "ridge": 0.0}, ValueError, "'rational' needs ridge >= 1e-07, got 0.0"),
        ({"method": "rational", "pseudo_inverse": 1e-6}, ValueError, "needs pseudo_inverse=None"),
        ({"method": "polar_express", "ridge": 0.0}, ValueError, "'polar_express' needs ridge >= 1e-07"),
        ({"failures": torch.zeros(2)}, TypeError, "failures must be int32, got torch.float32"),
        ({"failures": torch.zeros(3, dtype=torch.int32)}, ValueError, r"failures must have shape \(2,\)"),
        ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'cpp', 'triton', 'reference', got 'cuda'"),
    ],
)
def test_errors(change, kind, message):
    with pytest.raises(kind, match=f"shampoo_inverse_root: .*{message}"):
        inverse_root(**({"factor_Bpp": torch.zeros(2, 3, 3)} | change))


@needs_cpp
def test_not_covered_cpp():
    with pytest.raises(NotImplementedError, match=r"impl='cpp' has eigh, rational, got method='gram_ns'"):
        inverse_root(torch.zeros(2, 3, 3), method="gram_ns", impl="cpp")
