"""laurel_residual: every path against the formula in float64, its place in PyTorch, its errors and what it keeps."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from effkern import laurel_residual
from effkern.ops.laurel import chunks
from effkern.ops.laurel.scalars import SCALAR_MAPS, coefficients, gradient
from tests.numerics import assert_as_good_as_eager, rel_err
from tests.ops import laurel_cases as cases

IMPL = pytest.mark.parametrize("impl", cases.implementations())


def check(kw: cases.Keywords, impl: str, factor: float = 2.0) -> None:
    wide = cases.to(kw, torch.float64)
    truth_outputs = cases.formula(**wide)
    grads = [torch.randn_like(o).to(kw["x"].dtype) for o in truth_outputs]
    truth = cases.run(wide, truth_outputs, grads)
    eager_kw = cases.to(kw, kw["x"].dtype) if kw["x"].dtype == torch.float64 else kw
    eager = cases.run(eager_kw, cases.formula(**eager_kw), grads)
    fast = cases.run(kw, cases.ours(kw, impl), grads)
    assert fast.keys() == truth.keys()
    for name, value in fast.items():
        try:
            if name == "weights":
                eps = torch.finfo(value.dtype).eps
                kept = kw.get("scalar_map") == "none" and kw.get("save_branch") is None
                noise = 0.0 if kept else rounding_noise(wide, truth, kw["x"].dtype)
                worst = max((eager[name] - truth[name]).norm() * factor, noise, 8 * eps * truth[name].norm())
                assert (value - truth[name]).norm() <= worst
            else:
                assert_as_good_as_eager(value, eager[name], truth[name], factor, ulps=8)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def rounding_noise(kw: cases.Keywords, truth: dict[str, torch.Tensor], dtype: torch.dtype) -> float:
    """What rounding y does to the raw scalars' gradients: alpha's comes from sum(g y), without the branch.

    A rounding of y or g leaves each product off by up to eps/2 at random, 0.29 eps in the mean square. There are about
    three (y, and in g those of the norm's backward), of both scalars; the bound is five standard deviations.
    """
    alpha = coefficients(kw["weights"].detach(), kw.get("scalar_map", "softmax2"))[0]
    of_product = truth["branch"] / alpha * truth["output 0"] / alpha
    return 5.0 * torch.finfo(dtype).eps * of_product.norm().item()


@pytest.mark.parametrize("name", cases.CASES)
@IMPL
def test_float64_of_the_formula(impl, name):
    """Hand-written gradients against autograd's, in float64 where the implementation takes it."""
    if impl != "reference":
        return check(cases.make(name), impl)
    kw = cases.to(cases.make(name), torch.float64)
    outputs = cases.formula(**kw)
    grads = [torch.randn_like(o) for o in outputs]
    truth = cases.run(kw, outputs, grads)
    for key, value in cases.run(kw, cases.ours(kw, impl), grads).items():
        assert rel_err(value, truth[key]) < 1e-12, key


@pytest.mark.parametrize("name", cases.CASES)
@IMPL
def test_bfloat16(impl, name):
    check(cases.make(name, rows=(37,), dim=24, dtype=torch.bfloat16), impl)


def test_float16():
    check(cases.make("everything", dtype=torch.float16), "reference")


# One row; below, at and over one lane group; a real width; several chunks of rows.
@pytest.mark.parametrize(("rows", "dim"), [(1, 13), (3, 31), (3, 32), (3, 33), (5, 768), (600, 515)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@IMPL
def test_sizes(impl, dtype, rows, dim):
    check(cases.make("everything", rows=(rows,), dim=dim, dtype=dtype), impl)


@IMPL
def test_several_chunks(impl, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 40 * 13 * 4)
    for name in ("everything", "rw+lr", "past"):
        check(cases.make(name, rows=(3, 70)), impl)


@IMPL
def test_no_rows(impl):
    kw = cases.make("everything", rows=(0,))
    out = cases.run(kw, cases.ours(kw, impl), [torch.empty(0, 13), torch.empty(0, 13), torch.empty(0, 2)])
    for name, value in cases.leaves(kw).items():
        assert torch.equal(out[name], torch.zeros_like(value)), name


@IMPL
def test_one_output_used(impl):
    """Gradients that never come are zeros, not NaN."""
    for used in (0, 1, 2):
        kw = cases.make("look ahead")
        wide = cases.to(kw, torch.float64)
        truth = cases.run(wide, [cases.formula(**wide)[used]], [torch.ones(1, dtype=torch.float64).expand_as(
            cases.formula(**wide)[used])])  # fmt: skip
        out = cases.ours(kw, impl)[used]
        fast = cases.run(kw, [out], [torch.ones(1).expand_as(out)])
        for key, value in fast.items():
            torch.testing.assert_close(value.double(), truth[key], rtol=1e-4, atol=1e-5, msg=key)


@IMPL
def test_layouts(impl):
    """Strided inputs and gradients give what their copies give, bit for bit."""
    kw = cases.make("rw+lr", rows=(9,))
    grads = [torch.randn(9, 13), torch.randn(9, 13)]
    truth = cases.run(kw, cases.ours(kw, impl), grads)

    def strided(t):
        return torch.stack([t.detach(), t.detach()], -1)[..., 0].requires_grad_()

    other = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
    got = cases.run(other, cases.ours(other, impl), [strided(g).detach() for g in grads])
    for key, value in got.items():
        assert torch.equal(value, truth[key]), key


@IMPL
def test_plain_residual_at_the_start(impl):
    """softmax2 at 0 with B = 0 is x + f(x), bit for bit."""
    f, x = torch.randn(5, 64), torch.randn(5, 64)
    down, up = torch.randn(64, 8), torch.zeros(8, 64)
    assert torch.equal(laurel_residual(f, x, weights=torch.zeros(2), down=down, up=up, impl=impl).y, f + x)


@IMPL
def test_nan_stays_in_its_row(impl):
    kw = cases.make("rw+lr")
    with torch.no_grad():
        kw["x"][3, 2] = float("nan")
        kw["branch"][5, 1] = float("inf")
    outputs, truth = cases.ours(kw, impl), cases.formula(**kw)
    for out, t in zip(outputs, truth):
        assert torch.equal(out.isnan(), t.isnan())
        assert torch.equal(out.isinf(), t.isinf())
        assert torch.isfinite(out[[0, 1, 2, 4, 6]]).all()


@IMPL
def test_large_values(impl):
    """1e4 and a row of zeros: nothing overflows, and the norm of zeros is zero."""
    kw = cases.make("rw+lr", rows=(6,))
    with torch.no_grad():
        kw["x"].mul_(1e4)
        kw["branch"].mul_(1e4)
        kw["x"][2], kw["branch"][2] = 0.0, 0.0
    check(kw, impl, factor=4.0)


@IMPL
def test_same_bits_every_time(impl):
    kw = cases.make("everything", rows=(300,), dim=96)
    grads = [torch.randn(300, 96), torch.randn(300, 96), torch.randn(300, 2)]
    first = cases.run(kw, cases.ours(kw, impl), grads)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            # The skinny products are the library's, whose bits may depend on its threads; ours may not.
            again = cases.run(kw, cases.ours(kw, impl), grads)
            if count == threads:
                for key, value in again.items():
                    assert torch.equal(value, first[key]), key
    finally:
        torch.set_num_threads(threads)


@IMPL
def test_what_backward_keeps(impl):
    """x, y, x A and one number per token; the branch only where alpha may reach 0."""
    for name, branch in (("rw+lr", False), ("rw none", True), ("rw none, branch not kept", False)):
        kw = cases.make(name)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = laurel_residual(**kw, impl=impl).y
        wide = [t for t in kept if t.shape == y.shape]
        assert any(t.data_ptr() == kw["branch"].data_ptr() for t in wide) == branch
        assert {t.data_ptr() for t in wide} <= {kw[n].data_ptr() for n in ("x", "branch")} | {y.data_ptr()}
        rest = sum(t.numel() for t in kept if t.shape[:1] == (11,) and t.shape != y.shape)
        assert rest <= 11 * (kw["down"].shape[1] + 1 if "down" in kw else 1)


@pytest.mark.parametrize("scalar_map", SCALAR_MAPS)
@pytest.mark.parametrize("shape", [(), (5,)])
def test_scalar_maps(scalar_map, shape):
    w = torch.randn(SCALAR_MAPS[scalar_map], *shape, dtype=torch.float64, requires_grad=True)
    alpha, beta = coefficients(w, scalar_map)
    grads = torch.randn_like(alpha), torch.randn_like(beta)
    (truth,) = torch.autograd.grad([alpha, beta], w, grads)
    torch.testing.assert_close(gradient(w.detach(), scalar_map, *grads), truth)


@pytest.mark.parametrize("scalar_map", ["softmax2", "softmax", "sigmoid1", "sigmoid"])
def test_far_scalars(scalar_map):
    """Bounded maps stay finite and keep their digits at the ends: beta of sigmoid1 is s(-w), not 1 - s(w)."""
    w = torch.full((SCALAR_MAPS[scalar_map],), 30.0)
    w[-1] = -30.0 if len(w) > 1 else 30.0
    alpha, beta = coefficients(w, scalar_map)
    assert 0 < beta.item() < 1e-10
    assert torch.isfinite(alpha).all()


@IMPL
def test_compile(impl):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(kw):
        return cases.ours(kw, impl)

    for name in ("rw+lr", "everything", "look ahead", "rw none"):
        kw = cases.make(name)
        outputs = cases.ours(kw, impl)
        grads = [torch.randn_like(o) for o in outputs]
        truth = cases.run(kw, outputs, grads)
        for key, value in cases.run(kw, step(kw), grads).items():
            torch.testing.assert_close(value, truth[key], msg=f"{name}: {key}")


def test_operators():
    """Schemas, shape functions and aliasing rules of the two operators, by torch's own checker."""
    for name in ("everything", "lr", "plain", "look ahead only"):
        kw = cases.make(name)
        names = ("x", "weights", "down", "up", "past", "low_rank_norm", "addends", "addend_weights", "norm_weight")
        problem = [kw.get(n, [] if n == "addends" else None) for n in names]
        problem = [t.detach() if isinstance(t, torch.Tensor) else [e.detach() for e in t] if t else t for t in problem]
        options = (kw.get("scalar_map", "softmax2"), kw.get("scale", 1.0), 1e-6, 1e-6, "reference")
        forward = (kw["branch"].detach(), *problem, *options)
        torch.library.opcheck(torch.ops.effkern.laurel_fwd, forward)
        y, normed, own, rstd = torch.ops.effkern.laurel_fwd(*forward)
        grads = (torch.randn_like(y), torch.randn_like(y) if normed.numel() else None,
                 torch.randn_like(own) if own.numel() else None)  # fmt: skip
        kept = (y, own if own.numel() else None, rstd if rstd.numel() else None)
        torch.library.opcheck(torch.ops.effkern.laurel_bwd, (None, *problem, *options, *kept, *grads))


@IMPL
def test_checkpoint_and_second_backward(impl):
    kw = cases.make("rw+lr")
    truth = cases.run(kw, [cases.ours(kw, impl)[0]], [torch.ones(11, 13)])
    y = checkpoint(lambda: laurel_residual(**kw, impl=impl).y, use_reentrant=False)
    twice = laurel_residual(**kw, impl=impl).y
    for out in (y, twice, twice):
        got = torch.autograd.grad(out, list(cases.leaves(kw).values()), torch.ones(11, 13), retain_graph=True,
                                  allow_unused=True)  # fmt: skip
        for (key, value), g in zip(cases.leaves(kw).items(), got):
            torch.testing.assert_close(torch.zeros_like(value) if g is None else g, truth[key])
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="create_graph=True is not covered"):
        torch.autograd.grad(laurel_residual(x, x, impl=impl).y.sum(), x, create_graph=True)


@IMPL
def test_frozen_parts_get_no_gradient(impl):
    kw = cases.make("everything")
    for name in ("down", "weights", "branch"):
        kw[name] = kw[name].detach()
    sum(o.sum() for o in cases.ours(kw, impl)).backward()
    assert all((v.grad is None) == (n in ("down", "weights", "branch")) for n, v in cases.leaves(kw).items())


@IMPL
def test_threads_of_the_caller(impl):
    kw = cases.make("everything", rows=(50,))
    truth = [o.detach() for o in cases.ours(kw, impl)]
    results: list[list[torch.Tensor]] = []
    workers = [threading.Thread(target=lambda: results.append(cases.ours(kw, impl))) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(results) == 4
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, truth))


def test_autocast_leaves_the_stream_alone():
    kw = cases.make("rw+lr")
    truth = cases.ours(kw, "auto")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(cases.ours(kw, "auto"), truth):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)
    mixed = kw | {"branch": kw["branch"].detach().bfloat16()}
    assert laurel_residual(**mixed).y.dtype == torch.float32


D = 13


def _error_cases():
    half = {"weights": torch.zeros(2, dtype=torch.bfloat16)}
    low = {"down": torch.zeros(D, 3), "up": torch.zeros(3, D)}
    yield (
        "shape",
        {"branch": torch.zeros(11, 5)},
        ValueError,
        r"branch must have the shape of x, \(11, 13\), got \(11, 5\)",
    )
    yield "integer", {"x": torch.zeros(11, D, dtype=torch.int32)}, TypeError, "x must be float32, .*got torch.int32"
    yield "map", {"scalar_map": "softmax3"}, ValueError, "scalar_map must be one of .*got 'softmax3'"
    yield "half scalars", half, TypeError, "weights must be float32 .*got torch.bfloat16"
    yield "weights", {"weights": torch.zeros(3)}, ValueError, r"weights must have shape \(2,\) or \(2, 13\).*got \(3,\)"
    yield "down", {"down": torch.zeros(5, 3)}, ValueError, r"down must have shape \(13, columns >= 1\), got \(5, 3\)"
    yield "up", {**low, "up": torch.zeros(3, 5)}, ValueError, r"up must have shape \(rank >= 1, 13\), got \(3, 5\)"
    yield "no down", {"up": torch.zeros(3, D)}, ValueError, "down must have at least 3 columns.*got 0"
    yield "narrow", {**low, "down": torch.zeros(D, 2)}, ValueError, "down must have at least 3 columns.*got 2"
    wide = {"down": torch.zeros(D, 20), "up": torch.zeros(20, D)}
    yield "rank", wide, ValueError, "up must have a rank of at most D=13, got 20"
    yield "past alone", {"past": torch.zeros(11, 2)}, ValueError, "past must come with up, got up=None"
    yield (
        "batch",
        {**low, "past": torch.zeros(7, 2)},
        ValueError,
        r"past must have the leading shape of x, \(11,\).*got \(7,\)",
    )
    yield "much past", {**low, "past": torch.zeros(11, 4)}, ValueError, "past must have at most .* 3, got 4"
    yield "addend", {"addends": [torch.zeros(11, 5)]}, ValueError, r"addends\[0\] must have the shape of x"
    yield "addend type", {"addends": [torch.zeros(11, D).double()]}, TypeError, r"addends\[0\] must have the dtype of x"
    yield "c", {"addend_weights": torch.zeros(1)}, ValueError, r"addend_weights must have shape \(0,\)"
    yield "norm", {"norm_weight": torch.zeros(5)}, ValueError, r"norm_weight must have shape \(13,\), got \(5,\)"
    yield "eps", {"norm_eps": -1.0}, ValueError, "norm_eps must be at least 0 and finite, got -1.0"
    zero = {"weights": torch.tensor([0.0, 1.0], requires_grad=True), "scalar_map": "none", "save_branch": False}
    yield "alpha", zero, ValueError, "alpha must be at least 0.001 in size with save_branch=False, got 0"
    nan = zero | {"weights": torch.tensor([float("nan"), 1.0], requires_grad=True)}
    yield "alpha nan", nan, ValueError, "alpha must be at least 0.001 in size with save_branch=False, got nan"
    yield "impl", {"impl": "fast"}, ValueError, "impl must be one of"
    yield "device", {"branch": torch.zeros(11, D, device="meta")}, ValueError, "branch must be on cpu, got meta"


@pytest.mark.parametrize(("change", "kind", "message"), [pytest.param(*c[1:], id=c[0]) for c in _error_cases()])
def test_errors(change, kind, message):
    arguments = {"branch": torch.zeros(11, D), "x": torch.zeros(11, D)} | change
    with pytest.raises(kind, match="laurel_residual: .*" + message):
        laurel_residual(**arguments)


def test_alpha_zero_with_the_branch_kept():
    """The raw map learns through alpha = 0."""
    kw = cases.make("rw none")
    with torch.no_grad():
        kw["weights"][0] = 0.0
    check(kw, "auto")
