"""gram_ema_ and apply_: C++ and reference against float64, what is left alone, layouts, errors and contracts."""

import pytest
import torch
from torch import Tensor

from effkern.ops.shampoo import apply_, gram_ema_, inverse_root
from tests.numerics import assert_as_good_as_eager, rel_err
from tests.ops.shampoo_cases import CPP

needs_cpp = pytest.mark.skipif(not CPP, reason="effkern._C was not built")
CPP_OR_REFERENCE = [pytest.param("cpp", marks=needs_cpp), "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["tiles", "library"])
def _products(request):
    """Both ways to multiply."""
    try:
        before = torch.ops.effkern.shampoo_tiles(request.param)
    except RuntimeError:
        pytest.skip("this CPU has no AVX-512 with bfloat16")
    yield
    torch.ops.effkern.shampoo_tiles(before)


def make_factor(batch: int, p: int) -> Tensor:
    G = torch.randn(batch, p, p + 3)
    A = G @ G.mT
    return A.tril() + A.tril(-1).mT


def gram_truth(factor: Tensor, grads: list[Tensor], side: str, decay: float, weight: float) -> Tensor:
    G = torch.stack([g.double() for g in grads])
    return decay * factor.double() + weight * (G @ G.mT if side == "left" else G.mT @ G)


# One number; below, at and above a vector and a block; a depth over one chunk, and a side over one.
SHAPES = [(1, 1), (7, 3), (16, 48), (17, 65), (100, 50), (33, 1100), (130, 20)]


@needs_cpp
@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_sizes_cpp(shape, side):
    p = shape[0] if side == "left" else shape[1]
    for dtype in DTYPES:
        factor, G = make_factor(2, p), torch.randn(2, *shape).to(dtype)
        truth = gram_truth(factor, list(G), side, 0.9, 0.1)
        fast, eager = factor.clone(), factor.clone()
        gram_ema_(fast, G, side=side, decay=0.9, weight=0.1, impl="cpp")
        gram_ema_(eager, G, side=side, decay=0.9, weight=0.1, impl="reference")
        assert_as_good_as_eager(fast, eager, truth)
        assert torch.equal(fast, fast.mT)
        wide = factor.double()
        gram_ema_(wide, G.double(), side=side, decay=0.9, weight=0.1, impl="cpp")
        assert rel_err(wide, truth) < 1e-14


@pytest.mark.parametrize("impl", CPP_OR_REFERENCE)
@pytest.mark.parametrize("side", ["left", "right"])
def test_gram_layouts_cpp(impl, side):
    """A list of views into larger tensors, transposed, strided and broadcast gradients; none is written."""
    big = torch.randn(3, 40, 60)
    base = torch.randn(60, 40)
    layouts = {
        "rows of a larger one": [big[b, 5:25, 10:40] for b in range(3)],
        "transposed": [base.t()[10:30, 5 * b : 5 * b + 30] for b in range(3)],
        "every second": [big[b, :40:2, :60:2] for b in range(3)],
        "one row for all": [big[b, :1, :30].expand(20, 30) for b in range(3)],
        "one tensor": big[:, :20, :30],
    }
    for name, grads in layouts.items():
        blocks = list(grads)
        before = [g.clone() for g in blocks]
        factor = make_factor(3, 20 if side == "left" else 30)
        truth = gram_truth(factor, blocks, side, 0.5, 2.0)
        gram_ema_(factor, grads, side=side, decay=0.5, weight=2.0, impl=impl)
        assert rel_err(factor, truth) < 3e-7, name
        assert all(torch.equal(a, b) for a, b in zip(before, blocks))


@pytest.mark.parametrize("impl", CPP_OR_REFERENCE)
@pytest.mark.parametrize("side", ["left", "right"])
def test_gram_leaves_what_is_not_finite_cpp(impl, side):
    """NaN, Inf and squares that overflow, anywhere; a zero gradient is sound."""
    G = torch.randn(5, 20, 20)
    G[0, 3, 19], G[1, 19, 0], G[2, 7, 7], G[3] = float("nan"), -float("inf"), 1e30, 0.0
    factor, failures = make_factor(5, 20), torch.tensor([0, 2, 0, 5, 1], dtype=torch.int32)
    before, truth = factor.clone(), gram_truth(factor, list(G), side, 0.9, 0.1)
    gram_ema_(factor, G, side=side, decay=0.9, weight=0.1, failures=failures, impl=impl)
    assert failures.tolist() == [1, 3, 1, 0, 0]
    assert torch.equal(factor[:3], before[:3])
    assert rel_err(factor[3:], truth[3:]) < 2e-7


def test_gram_stays_symmetric():
    """Over many steps: one triangle is the mirror of the other, whatever the upper one held before."""
    factor = torch.zeros(2, 19, 19)
    truth = factor.double()
    for _ in range(50):
        G = torch.randn(2, 19, 30)
        factor.add_(torch.ones(19, 19).triu(1))
        gram_ema_(factor, G, decay=0.9, weight=0.1)
        truth = gram_truth(truth, list(G), "left", 0.9, 0.1)
    assert torch.equal(factor, factor.mT)
    assert rel_err(factor, truth) < 1e-6


@pytest.mark.parametrize("impl", CPP_OR_REFERENCE)
def test_empty_cpp(impl):
    gram_ema_(torch.zeros(0, 4, 4), [], decay=1.0, weight=1.0, impl=impl)
    factor = torch.ones(2, 3, 3)
    gram_ema_(factor, torch.zeros(2, 3, 0), decay=0.5, weight=1.0, impl=impl)
    assert torch.equal(factor, torch.full((2, 3, 3), 0.5))
    assert apply_([], [], lr=1.0, impl=impl).shape == (0,)


def update_truth(W, G, M=None, L=None, R=None, *, lr, decay=0.0, weight=1.0, nesterov=False, wd=0.0, norm=None):
    W, G = W.double(), G.double()
    D = new = G
    if M is not None:
        new = decay * M.double() + weight * G
        D = decay * new + weight * G if nesterov else new
    U = D if L is None else L.double() @ D
    U = U if R is None else U @ R.double()
    size = U.norm(dim=(1, 2))
    s = torch.ones_like(size) if norm is None else torch.as_tensor(norm).double() / size
    return (1 - lr * wd) * W - lr * s[:, None, None] * U, new, size


OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum_decay": 0.9, "momentum_weight": 0.1, "weight_decay": 0.2},
    {"lr": 0.1, "momentum_decay": 0.9, "momentum_weight": 0.5, "nesterov": True, "norm": 3.0},
    {"lr": torch.tensor(0.1), "momentum_decay": 0.5, "norm": torch.tensor([1.0, 2.0, 0.5])},
]


@pytest.mark.parametrize("impl", CPP_OR_REFERENCE)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("roots", ["none", "left", "right", "both"])
def test_apply_cpp(impl, options, roots):
    m, n = 17, 33
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        W, G, M = (torch.randn(3, m, n).to(dtype) for _ in range(3))
        L = torch.randn(3, m, m, dtype=wide) if roots in ("left", "both") else None
        R = torch.randn(3, n, n, dtype=wide) if roots in ("right", "both") else None
        L, R = (None if x is None else x + x.mT for x in (L, R))
        momentum = M.clone() if "momentum_decay" in options else None
        want, moved, size = update_truth(
            W, G, momentum, L, R, lr=0.1, decay=options.get("momentum_decay", 0.0),
            weight=options.get("momentum_weight", 1.0), nesterov=options.get("nesterov", False),
            wd=options.get("weight_decay", 0.0), norm=options.get("norm"),
        )  # fmt: skip
        failures = torch.ones(3, dtype=torch.int32)
        norms = apply_(W, G, L, R, momenta=momentum, failures=failures, impl=impl, **options)
        # Storage rounds once; 4 covers the sums of 33 terms in float32.
        eps = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-8
        assert rel_err(W, want) < 4 * eps, dtype
        assert rel_err(norms, size) < 1e-5
        if momentum is not None:
            assert rel_err(momentum, moved) < 2 * eps
        assert failures.tolist() == [0, 0, 0]


@pytest.mark.parametrize("impl", CPP_OR_REFERENCE)
def test_apply_layouts_cpp(impl):
    """Blocks of one parameter, transposed and strided: only they are written."""
    parameter, L = torch.randn(40, 60), torch.randn(2, 20, 20)
    L = L + L.mT
    kept = parameter.clone()
    weights = [parameter[:20, :30], parameter[20:, 30:]]
    grads = [torch.randn(30, 20).t(), torch.randn(40, 60)[::2, ::2]]
    momenta = [torch.randn(30, 20).bfloat16().t() for _ in range(2)]
    want, moved, _ = update_truth(torch.stack(weights), torch.stack(grads), torch.stack(momenta), L, lr=0.5, decay=0.5)
    apply_(weights, grads, L, lr=0.5, momenta=momenta, momentum_decay=0.5, impl=impl)
    assert rel_err(torch.stack(weights), want) < 1e-6
    assert rel_err(torch.stack(momenta), moved) < 4e-3
    assert torch.equal(parameter[:20, 30:], kept[:20, 30:])
    assert torch.equal(parameter[20:, :30], kept[20:, :30])


@pytest.mark.parametrize("impl", CPP_OR_REFERENCE)
@pytest.mark.parametrize("roots", ["left", "both"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_apply_leaves_what_is_not_finite_cpp(impl, roots, nesterov):
    W, G, M = (torch.randn(5, 8, 9) for _ in range(3))
    L, R = torch.eye(8).repeat(5, 1, 1), torch.eye(9).repeat(5, 1, 1)
    G[0, 2, 3], G[1, 0, 0], L[2, 1, 1], G[3] = float("nan"), float("inf"), float("nan"), 0.0
    M[3] = 0.0
    before, moved = W.clone(), M.clone()
    failures = torch.tensor([7, 0, 0, 3, 3], dtype=torch.int32)
    norms = apply_(
        W, G, L, R if roots == "both" else None, lr=0.1, momenta=M, momentum_decay=0.9, nesterov=nesterov, norm=1.0,
        weight_decay=0.1, failures=failures, impl=impl,
    )  # fmt: skip
    assert failures.tolist() == [8, 1, 1, 0, 0]
    assert norms.isnan().tolist() == [True, True, True, False, False]
    assert torch.equal(W[:3], before[:3])
    assert torch.equal(M[:3], moved[:3])
    # Nothing to do but the decay.
    assert rel_err(W[3], 0.99 * before[3].double()) < 1e-6
    assert not torch.equal(W[4], before[4])


@pytest.mark.parametrize("impl", CPP_OR_REFERENCE)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rotated_weights_get_the_rotated_update_cpp(impl, side):
    """W -> Q W with G -> Q G (on the right W Q), over some steps; and a permutation of the rows."""
    m, n = 12, 20
    p = m if side == "left" else n
    W, gradients = torch.randn(1, m, n), torch.randn(4, 1, m, n)

    def train(T: Tensor | None) -> Tensor:
        def turn(x: Tensor) -> Tensor:
            if T is None:
                return x.clone()
            return T @ x if side == "left" else x @ T

        weights, momenta, factor = turn(W), torch.zeros(1, m, n), torch.zeros(1, p, p)
        for G in gradients:
            gram_ema_(factor, turn(G), side=side, decay=0.9, weight=0.1, impl=impl)
            root = inverse_root(factor, ridge=1e-3, impl=impl).root
            roots = (root, None) if side == "left" else (None, root)
            apply_(weights, turn(G), *roots, lr=0.1, momenta=momenta, momentum_decay=0.9, norm=2.0, impl=impl)
        return weights

    plain = train(None).double()
    for T in (torch.linalg.qr(torch.randn(p, p)).Q, torch.eye(p)[torch.randperm(p)]):
        want = T.double() @ plain if side == "left" else plain @ T.double()
        assert rel_err(train(T), want) < 1e-4


@needs_cpp
def test_threads_do_not_matter_cpp():
    threads = torch.get_num_threads()
    G, L = torch.randn(5, 40, 70), make_factor(5, 40)
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            factor, W = L.clone(), torch.ones(5, 40, 70)
            gram_ema_(factor, G, decay=0.9, weight=0.1, impl="cpp")
            apply_(W, G, L, lr=0.1, norm=1.0, impl="cpp")
            found.append((factor, W))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other))
    finally:
        torch.set_num_threads(threads)


@needs_cpp
def test_threads_do_not_matter_for_a_single_float64_block_cpp():
    """Alone it is not in a parallel region, where the library would take threads of its own."""
    G, W = (torch.randn(128, 300, dtype=torch.float64) for _ in range(2))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            L, moved = torch.zeros(1, 128, 128, dtype=torch.float64), W.clone()
            gram_ema_(L, [G], decay=0.9, weight=0.1, impl="cpp")
            roots = [inverse_root(L, method=method, impl="cpp").root for method in ("eigh", "rational")]
            apply_([moved], [G], roots[0], lr=0.1, norm=1.0, impl="cpp")
            found.append([L, *roots, moved])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found))


@needs_cpp
def test_operators_cpp():
    """Schemas, shape functions and aliasing rules by torch's own checker."""
    W, M, G = ([torch.randn(4, 5) for _ in range(2)] for _ in range(3))
    L, failures = make_factor(2, 4), torch.zeros(2, dtype=torch.int32)
    ops = torch.ops.effkern
    torch.library.opcheck(ops.shampoo_gram_ema_.default, (L, G, True, 0.9, 0.1, failures))
    torch.library.opcheck(ops.shampoo_gram_ema_.default, (L, G, True, 0.9, 0.1, None))
    full = (W, M, G, L, None, 0.9, 0.1, False, 0.0, torch.tensor(0.1).double(), 0.1, 0.0, torch.ones(2), failures)
    few = (W, [], G, None, None, 0.0, 1.0, False, 0.1, None, 0.0, 0.0, None, None)
    for arguments in (full, few):
        torch.library.opcheck(ops.shampoo_apply_.default, arguments)


@needs_cpp
def test_errors_of_the_operators_cpp():
    W, G, L = [torch.zeros(4, 5)], [torch.zeros(4, 5)], torch.zeros(1, 4, 4)
    ops = torch.ops.effkern
    for arguments, message in (
        ((L.half(), G, True, 0.9, 0.1, None), "factor must be contiguous float32 or float64"),
        ((L, G * 2, True, 0.9, 0.1, None), "one matrix per gradient"),
        ((L, G, False, 0.9, 0.1, None), "grads must have the factor's side"),
        ((L, [torch.zeros(4)], True, 0.9, 0.1, None), r"grads must be floating \[m, n\]"),
        ((L, G, True, 0.9, 0.1, torch.zeros(1)), r"failures must be int32 \[B\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.shampoo_gram_ema_(*arguments)
    sound = (W, [], G, L, None, 0.9, 0.1, False, 0.1, None, 0.0, 0.0, None, None)
    for where, value, message in (
        (0, [], "as many blocks, one at least"),
        (1, W * 2, "as many blocks"),
        (2, [torch.zeros(5, 4)], "the shape of weights"),
        (3, L.double(), r"roots must be contiguous \[B, p, p\]"),
        (4, L, r"roots must be contiguous \[B, p, p\]"),
        (9, torch.tensor(0.1), "lr must be one float64 number"),
        (12, torch.ones(2), r"norms must be float32 \[B\]"),
        (13, torch.ones(1), r"failures must be int32 \[B\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.shampoo_apply_(*(value if i == where else a for i, a in enumerate(sound)))


@needs_cpp
def test_compile_cpp():
    W, G, L = torch.randn(2, 4, 5), torch.randn(2, 4, 5), torch.zeros(2, 4, 4)

    def step(W, G, L, lr):
        gram_ema_(L, [G[0], G[1]], decay=0.9, weight=0.1, impl="cpp")
        return apply_(W, G, L, lr=lr, norm=1.0, impl="cpp")

    plain = [t.clone() for t in (W, G, L)]
    norms = step(*plain, torch.tensor(0.1))
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(W, G, L, torch.tensor(0.1))
    torch.testing.assert_close(found, norms)
    torch.testing.assert_close(L, plain[2])
    torch.testing.assert_close(W, plain[0])


@needs_cpp
def test_without_lapack_the_reference_runs_cpp(monkeypatch):
    """A libtorch that lacks the routines: "auto" goes on, an explicit choice says why it cannot."""
    monkeypatch.setattr(torch.ops.effkern, "shampoo_lapack", lambda: False)
    factor = torch.zeros(1, 3, 3)
    gram_ema_(factor, torch.eye(3)[None], decay=1.0, weight=2.0)
    assert torch.equal(factor[0], 2 * torch.eye(3))
    with pytest.raises(NotImplementedError, match="this libtorch has no LAPACK"):
        gram_ema_(factor, torch.eye(3)[None], decay=1.0, weight=2.0, impl="cpp")


GRAM_ERRORS = [
    ({"side": "both"}, ValueError, "side must be 'left' or 'right', got 'both'"),
    ({"decay": -0.1}, ValueError, "decay must be finite and >= 0, got -0.1"),
    ({"weight": "x"}, TypeError, "weight must be a number, got str"),
    ({"grads": torch.zeros(3, 4, 5)}, ValueError, "grads must hold 2 blocks, as factor_Bpp does, got 3"),
    ({"grads": torch.zeros(4, 5)}, ValueError, r"grads must have shape \(B, m, n\), got \(4, 5\)"),
    ({"grads": torch.zeros(2, 5, 4)}, ValueError, r"grads must have 4 rows for side='left', got \(5, 4\)"),
    ({"grads": [torch.zeros(4, 5), torch.zeros(4, 6)]}, ValueError, r"grads\[1\] must have the shape of grads\[0\]"),
    ({"grads": [torch.zeros(4, 5), torch.zeros(4, 5).half()]}, TypeError, r"grads\[1\] must have the dtype"),
    ({"grads": [torch.zeros(4, 5), None]}, TypeError, r"grads\[1\] must be a tensor, got NoneType"),
    (
        {"grads": torch.zeros(2, 4, 5, dtype=torch.complex64)},
        TypeError,
        "grads must be float32, .* got torch.complex64",
    ),
    ({"grads": torch.zeros(2, 4, 5, dtype=torch.int64)}, TypeError, "grads must be float32, .* got torch.int64"),
    ({"grads": [torch.zeros(4, 5).to_sparse()] * 2}, TypeError, r"grads\[0\] must be dense, got torch.sparse_coo"),
    ({"grads": torch.zeros(2, 4, 5).double()}, TypeError, "grads must be float32 or narrower with a float32 factor"),
    ({"grads": 3}, TypeError, "grads must be a tensor or a list of tensors, got int"),
    ({"factor_Bpp": torch.zeros(2, 4, 4, device="meta")}, ValueError, "grads must be on meta, got cpu"),
    ({"factor_Bpp": torch.zeros(2, 4, 4).mT[:, ::2]}, ValueError, "factor_Bpp must have shape"),
]


@pytest.mark.parametrize(("change", "kind", "message"), GRAM_ERRORS)
def test_errors_of_gram(change, kind, message):
    given = {"factor_Bpp": torch.zeros(2, 4, 4), "grads": torch.zeros(2, 4, 5), "decay": 0.9, "weight": 0.1} | change
    with pytest.raises(kind, match=f"shampoo_gram_ema_: {message}"):
        gram_ema_(**given)


APPLY_ERRORS = [
    ({"grads": torch.zeros(1, 4, 5)}, ValueError, "grads must hold as many blocks as weights, 2, got 1"),
    ({"grads": torch.zeros(2, 5, 4)}, ValueError, r"grads must have blocks of the shape of weights, \(4, 5\)"),
    ({"momenta": torch.zeros(2, 4, 6)}, ValueError, "momenta must have blocks of the shape of weights"),
    ({"nesterov": True}, ValueError, "nesterov must come with momenta"),
    ({"left_Bmm": torch.zeros(2, 5, 5)}, ValueError, r"left_Bmm must have shape \(2, 4, 4\), got \(2, 5, 5\)"),
    ({"right_Bnn": torch.zeros(2, 5, 5).double()}, TypeError, "right_Bnn must be float32, got torch.float64"),
    ({"lr": -1.0}, ValueError, "lr must be finite and >= 0, got -1.0"),
    ({"lr": torch.ones(2)}, ValueError, "lr must hold one floating-point number"),
    ({"norm": 0.0}, ValueError, "norm must be finite and > 0, got 0.0"),
    ({"norm": torch.ones(3)}, ValueError, r"norm must be float32 of shape \(2,\)"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and >= 0"),
    ({"momentum_decay": float("nan")}, ValueError, "momentum_decay must be finite and >= 0, got nan"),
    ({"failures": torch.zeros(2)}, TypeError, "failures must be int32"),
]


@pytest.mark.parametrize(("change", "kind", "message"), APPLY_ERRORS)
def test_errors_of_apply(change, kind, message):
    given = {"weights": torch.zeros(2, 4, 5), "grads": torch.zeros(2, 4, 5), "lr": 0.1} | change
    with pytest.raises(kind, match=f"shampoo_apply_: {message}"):
        apply_(**given)
