"""looped_linear_attention: every form against the paper's in float64, its place in PyTorch, errors, what it keeps."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from effkern import looped_linear_attention
from effkern.ops.looped_linear_attention.problem import FORMS, cheapest, products
from tests.numerics import assert_as_good_as_eager, rel_err
from tests.ops import looped_attention_cases as cases
from tests.ops.looped_attention_cases import CASES, Case

IMPL = pytest.mark.parametrize("impl", cases.implementations())


def check(c: Case, impl: str, dtype: torch.dtype) -> None:
    given = cases.make(c, dtype)
    wide = cases.to(given, torch.float64)
    truth_output = cases.formula(wide, c)
    grad = torch.randn_like(truth_output).float().double()
    truth = cases.run(wide, truth_output, grad)
    fast = cases.run(given, cases.ours(given, c, impl), grad)
    eager_given = cases.to(given, torch.float32) if dtype != torch.float64 else wide
    eager = cases.run(eager_given, cases.formula(eager_given, c), grad)
    noise = rounding_noise(wide, c, grad)
    for name, value in fast.items():
        assert value.dtype == (dtype if name != "predictions" else torch.promote_types(dtype, torch.float32)), name
        if (value - truth[name]).norm() <= noise.get(name, 0.0):
            continue
        try:
            # The moments S and b are rounded once, and every loop meets the rounded ones. Where S has no inverse, a
            # rounding of each loop stays: measured up to 68 units after 40 loops.
            ulps = 8.0 if c.examples >= c.dim else max(8.0, 2.0 * c.loops)
            assert_as_good_as_eager(value, eager[name].to(value.dtype), truth[name], factor=4.0, ulps=ulps)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def rounding_noise(given: cases.Given, c: Case, grad: torch.Tensor) -> dict[str, float]:
    """What a rounding of b = X^T y / n in each loop, of the size of what it is summed from, makes of a result.

    The paper's form rounds y - X w, which gets small; b - S w is not as exact. The gradient of A is a sum of residuals
    times costates, |lambda| <= |q| |grad|, of which little is left once the loops have converged.
    """
    with torch.no_grad():
        moment = torch.linalg.matrix_norm(given["x"], 2) * given["y"].norm(dim=1) / c.examples
        query = given["query"].reshape(c.batch, -1, c.dim).norm(dim=2)
        size = torch.linalg.matrix_norm(given["preconditioner"], 2).max()
        steps = given["step_sizes"].sum() if c.steps else c.loops
        of_costate = (query * grad.abs().sum(0)).sum(1)
        eps = torch.finfo(torch.float32).eps
        return {
            "predictions": (eps * steps * size * (moment[:, None] * query).norm()).item(),
            "preconditioner": (eps * steps * (moment * of_costate).norm()).item(),
        }


@pytest.mark.parametrize("name", CASES)
@IMPL
def test_float64_of_the_papers_form(impl, name):
    """Hand-written gradients against autograd's of the whole prompt."""
    c = CASES[name]
    given = cases.make(c, torch.float64)
    output = cases.formula(given, c)
    grad = torch.randn_like(output)
    truth = cases.run(given, output, grad)
    for key, value in cases.run(given, cases.ours(given, c, impl), grad).items():
        assert rel_err(value, truth[key]) < 1e-12, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
@IMPL
def test_every_dtype(impl, name, dtype):
    check(CASES[name], impl, dtype)


# Problems: below, at and over a group of lanes and of a task. Features and examples: odd, one and two tiles, whole
# vectors for the transposition, more rows than are turned at a time.
SIZES = {
    "16 problems": Case(batch=16, examples=16, dim=16),
    "17 problems": Case(batch=17, examples=17, dim=17),
    "three tasks": Case(batch=3 * 16 * 64 - 5, examples=3, dim=2, loops=2),
    "a typical one": Case(batch=33, examples=64, dim=20, loops=32),
    "queries": Case(batch=3, examples=40, dim=6, queries=35, every_loop=True),
    "few examples": Case(batch=18, examples=5, dim=33, loops=40, queries=17),
    "wide free": Case(batch=4, examples=21, dim=35, loops=3, free=True),
}


@pytest.mark.parametrize("form", [*FORMS, "free"])
@pytest.mark.parametrize("name", SIZES)
@IMPL
def test_sizes(impl, name, form):
    c = SIZES[name]
    check(c._replace(free=True) if form == "free" or c.free else c._replace(form=form), impl, torch.float32)


@pytest.mark.parametrize("name", ["free, steps, every loop", "primal, steps, every loop", "dual, steps, every loop"])
def test_gradcheck(name):
    c = CASES[name]._replace(batch=2, examples=3, dim=2, loops=3)
    given = cases.make(c, torch.float64)
    names = list(given)
    assert torch.autograd.gradcheck(
        lambda *tensors: cases.ours(dict(zip(names, tensors)), c, "reference"), list(given.values())
    )


@pytest.mark.parametrize("form", FORMS)
@IMPL
def test_no_problems(impl, form):
    c = Case(batch=0, form=form, steps=True, every_loop=True)
    given = cases.make(c)
    out = cases.run(given, cases.ours(given, c, impl), torch.empty(7, 0, 1))
    assert out["predictions"].shape == (7, 0, 1)
    for name, t in given.items():
        assert torch.equal(out[name], torch.zeros_like(t)), name


@pytest.mark.parametrize("name", CASES)
@IMPL
def test_nan_stays_in_its_problem(impl, name):
    """Also an infinity, which the recurrence makes NaN; both reach the shared parameters' gradients alone."""
    c = CASES[name]._replace(batch=20)
    given = cases.make(c)
    grad = torch.ones(c.loops if c.every_loop else 1, 20, max(1, c.queries))
    clean = cases.run(given, cases.ours(given, c, impl), grad)
    with torch.no_grad():
        given["x"][3, 0, 0] = float("nan")
        given["y"][11, 0] = float("inf")
    out = cases.run(given, cases.ours(given, c, impl), grad)
    others = [i for i in range(20) if i not in (3, 11)]
    for key in ("x", "y", "query"):
        assert torch.equal(out[key][others], clean[key][others]), key
        assert out[key][3].isnan().any(), key
    assert torch.equal(out["predictions"][:, others], clean["predictions"][:, others])
    assert out["predictions"][:, 3].isnan().all()
    assert not out["predictions"][:, 11].isfinite().any()
    assert out["preconditioner"].isnan().any()


@IMPL
def test_layouts(impl):
    """Any leading dimensions; strided inputs and gradients give what their copies give, bit for bit."""
    c = CASES["primal, steps, every loop"]._replace(batch=12)
    given = cases.make(c)
    grad = torch.randn(7, 12, 3)
    truth = cases.run(given, cases.ours(given, c, impl), grad)

    def strided(t):
        return torch.stack([t.detach(), t.detach()], -1)[..., 0].requires_grad_()

    other = {k: strided(v) for k, v in given.items()}
    got = cases.run(other, cases.ours(other, c, impl), strided(grad).detach())
    assert all(torch.equal(got[k], truth[k]) for k in truth)
    shaped = {k: v.detach().reshape(3, 4, *v.shape[1:]) for k, v in given.items() if k in ("x", "y", "query")}
    out = looped_linear_attention(
        **shaped, preconditioner=given["preconditioner"], loops=7, step_sizes=given["step_sizes"], every_loop=True,
        form="primal", impl=impl,
    )  # fmt: skip
    assert torch.equal(out.per_loop, truth["predictions"].reshape(7, 3, 4, 3))
    assert torch.equal(out.prediction, out.per_loop[-1])
    single = looped_linear_attention(
        given["x"][0], given["y"][0], given["query"][0, 0], given["preconditioner"], 7,
        step_sizes=given["step_sizes"], form="primal", impl=impl,
    )  # fmt: skip
    assert single.prediction.shape == ()
    assert single.per_loop is None
    torch.testing.assert_close(single.prediction, truth["predictions"][-1, 0, 0])


@IMPL
def test_it_regresses(impl):
    """No noise and enough examples: many loops find the weights that made the targets."""
    torch.manual_seed(0)
    x, w, query = torch.randn(30, 40, 5), torch.randn(30, 5, 1), torch.randn(30, 5)
    target = (query[:, None] @ w)[:, 0, 0]
    per_loop = looped_linear_attention(
        x, (x @ w)[..., 0], query, torch.eye(5) * 0.5, 200, every_loop=True, impl=impl
    ).per_loop
    errors = (per_loop - target).square().mean(1)
    assert errors[-1] < 1e-10
    assert (errors[:8].diff() < 0).all()


@IMPL
def test_same_bits_for_any_number_of_threads(impl):
    if impl == "reference":
        pytest.skip("the products are the library's")
    threads = torch.get_num_threads()
    for form in FORMS:
        c = Case(batch=300, examples=20, dim=11, form=form, steps=True)
        given = cases.make(c)
        grad = torch.randn(1, 300, 1)
        first = cases.run(given, cases.ours(given, c, impl), grad)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                again = cases.run(given, cases.ours(given, c, impl), grad)
                assert all(torch.equal(again[k], first[k]) for k in first)
        finally:
            torch.set_num_threads(threads)


@IMPL
def test_only_the_inputs_are_kept(impl):
    c = Case(batch=6, loops=100, every_loop=True)
    given = cases.make(c)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = cases.ours(given, c, impl)
    sizes = sorted(t.numel() for t in kept)
    assert sizes == sorted(t.numel() for t in given.values())
    assert out.numel() == 600


@IMPL
def test_frozen_parts_get_no_gradient(impl):
    """Each subset of the gradients that kernels leave out, against all of them."""
    for form in FORMS:
        c = Case(form=form, steps=True)
        given = cases.make(c)
        truth = cases.run(given, cases.ours(given, c, impl), torch.ones(1, 5, 1))
        for wanted in (("preconditioner",), ("step_sizes",), ("x", "query"), ("y", "step_sizes")):
            some = {k: v if k in wanted else v.detach() for k, v in given.items()}
            found = torch.autograd.grad(cases.ours(some, c, impl).sum(), [some[k] for k in wanted])
            for name, g in zip(wanted, found):
                torch.testing.assert_close(g, truth[name], msg=f"{form}, {wanted}: {name}")


@pytest.mark.parametrize("name", ["primal, steps, every loop", "dual", "free"])
@IMPL
def test_compile(impl, name):
    c = CASES[name]
    given = cases.make(c)
    compiled = torch.compile(lambda g: cases.ours(g, c, impl), fullgraph=True, backend="aot_eager")
    output = cases.ours(given, c, impl)
    grad = torch.randn_like(output)
    truth = cases.run(given, output, grad)
    for key, value in cases.run(given, compiled(given), grad).items():
        torch.testing.assert_close(value, truth[key], msg=key)


def test_operators():
    """Schemas, shape functions and aliasing rules of the operators, by torch's own checker."""
    for name in ("primal, steps, every loop", "free", "dual"):
        c = CASES[name]
        given = {k: v.detach() for k, v in cases.make(c).items()}
        matrix = given["preconditioner"].reshape(-1, c.dim, c.dim)
        query = given["query"].reshape(c.batch, -1, c.dim)
        form = "factors" if c.free else c.form
        problem = (given["x"], given["y"], query, matrix, given.get("step_sizes"), c.loops, c.every_loop)
        for impl in cases.implementations():
            torch.library.opcheck(torch.ops.effkern.looped_attention_fwd, (*problem, form, impl))
            out = torch.ops.effkern.looped_attention_fwd(*problem, form, impl)
            for needs in ((True, True, True), (False, True, False)):
                arguments = (torch.randn_like(out), *problem, form, impl, *needs)
                torch.library.opcheck(torch.ops.effkern.looped_attention_bwd, arguments)
        if "cpp" not in cases.implementations():
            continue
        index = FORMS.index(form)
        torch.library.opcheck(torch.ops.effkern.looped_attention_forward_, (*problem, index, torch.empty_like(out)))
        grads = (torch.empty_like(t) for t in (given["x"], given["y"], query, matrix, torch.empty(c.loops)))
        torch.library.opcheck(
            torch.ops.effkern.looped_attention_backward_, (torch.randn_like(out), *problem, index, *grads)
        )


@IMPL
def test_checkpoint_and_second_derivative(impl):
    c = CASES["primal"]
    given = cases.make(c)
    truth = cases.run(given, cases.ours(given, c, impl), torch.ones(1, 5, 1))
    again = checkpoint(lambda: cases.ours(given, c, impl), use_reentrant=False)
    assert all(torch.equal(v, truth[k]) for k, v in cases.run(given, again, torch.ones(1, 5, 1)).items())
    with pytest.raises(NotImplementedError, match="create_graph=True is not covered"):
        torch.autograd.grad(cases.ours(given, c, impl).sum(), given["x"], create_graph=True)


def test_autocast_changes_nothing():
    c = CASES["primal"]
    given = cases.make(c)
    truth = cases.ours(given, c, "auto")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cases.ours(given, c, "auto"), truth)


def test_the_cheapest_form():
    """What the docstring promises of "auto"."""
    assert cheapest(64, 20, 1, 32, shared=True) == "primal"
    assert cheapest(64, 20, 1, 8, shared=True) == "factors"
    assert cheapest(8, 20, 1, 32, shared=True) == "dual"
    assert cheapest(8, 20, 1, 32, shared=False) == "factors"
    assert products("factors", 64, 20, 1, 20) == products("primal", 64, 20, 1, 20)


X, Y, Q, A = torch.zeros(4, 6, 3), torch.zeros(4, 6), torch.zeros(4, 3), torch.zeros(3, 3)


def _error_cases():
    def case(name, change, kind, message):
        return pytest.param(change, kind, message, id=name)

    yield case("list", {"x": [1.0]}, TypeError, "x must be a tensor, got list")
    yield case("integer", {"x": X.int()}, TypeError, "x must be float32, .* got torch.int32")
    yield case("mixed", {"y": Y.double()}, TypeError, "y must have the dtype of x, torch.float32, got torch.float64")
    yield case("device", {"query": Q.to("meta")}, ValueError, "query must be on cpu, got meta")
    yield case("flat", {"x": torch.zeros(3)}, ValueError, r"x must have shape \[..., n, d\] .* got \(3,\)")
    yield case("no examples", {"x": torch.zeros(4, 0, 3)}, ValueError, r"n, d >= 1, got \(4, 0, 3\)")
    yield case("y", {"y": torch.zeros(4, 5)}, ValueError, r"y must have shape \(4, 6\), got \(4, 5\)")
    yield case("query", {"query": torch.zeros(4, 2)}, ValueError, r"query must have shape \(4, 3\) or \[4, m, 3\], got")
    yield case("no query", {"query": torch.zeros(4, 0, 3)}, ValueError, "query must hold at least one query")
    yield case("matrix", {"preconditioner": torch.zeros(2, 3, 3)}, ValueError, r"\(3, 3\), or \(8, 3, 3\) for loops=8")
    yield case("steps", {"step_sizes": torch.zeros(7)}, ValueError, r"step_sizes must have shape \(8,\), .* got \(7,\)")
    yield case("loops", {"loops": 0}, ValueError, "loops must be at least 1, got 0")
    yield case("loops type", {"loops": 2.0}, TypeError, "loops must be an int, got 2.0")
    yield case("form", {"form": "fast"}, ValueError, "form must be one of 'auto', 'factors', .* got 'fast'")
    free = {"preconditioner": torch.zeros(8, 3, 3), "form": "dual"}
    yield case("free dual", free, ValueError, "form must be 'auto' or 'factors' with one preconditioner per loop")
    yield case("impl", {"impl": "fast"}, ValueError, "impl must be one of")


@pytest.mark.parametrize(("change", "kind", "message"), list(_error_cases()))
def test_errors(change, kind, message):
    with pytest.raises(kind, match="looped_linear_attention: .*" + message):
        looped_linear_attention(**{"x": X, "y": Y, "query": Q, "preconditioner": A, "loops": 8} | change)


def test_what_the_kernels_do_not_cover():
    """Named, it is said; under "auto" plain PyTorch takes it, with the same result."""
    if "cpp" not in cases.implementations():
        pytest.skip("effkern._C was not built")
    c = Case(batch=2, examples=3, dim=260, loops=2, form="factors")
    given = cases.make(c)
    with pytest.raises(NotImplementedError, match=r"impl='cpp' takes at most 256 numbers of state .* got 260"):
        cases.ours(given, c, "cpp")
    assert torch.equal(cases.ours(given, c, "auto"), cases.ours(given, c, "reference"))


def test_the_native_checks():
    """What a direct call of the C++ operators must not get past."""
    if "cpp" not in cases.implementations():
        pytest.skip("effkern._C was not built")
    out = torch.empty(1, 4, 1)
    good = [X, Y, Q[:, None], A[None], None, 8, False, 1, out]
    torch.ops.effkern.looped_attention_forward_(*good)
    wrong = {
        0: (X.transpose(1, 2), "must be packed"), 1: (Y.double(), "of one dtype"),
        3: (A[None].repeat(8, 1, 1), "needs"),
        4: (torch.zeros(7), r"steps \[L\]"), 5: (0, "must be packed"), 7: (3, "form must be 0"),
        8: (torch.empty(8, 4, 1), "results must be packed"),
    }  # fmt: skip
    for i, (value, message) in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            torch.ops.effkern.looped_attention_forward_(*good[:i], value, *good[i + 1 :])
    with pytest.raises(RuntimeError, match="come together"):
        torch.ops.effkern.looped_attention_backward_(out, *good[:-1], torch.empty_like(X), None, None, None, None)
