"""loop_step: the reference against the formula, the fused form against the reference in float64, and its contract."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from effkern import loop_step, native
from effkern.ops.loop_step import checks
from tests.numerics import rel_err
from tests.ops import loop_step_cases as cases

IMPL = pytest.mark.parametrize("impl", cases.implementations())
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.mark.parametrize("name", cases.CASES)
def test_the_reference_is_the_formula(name):
    kw = cases.to(cases.make(name, rows=(2, 3)), torch.float64)
    outputs = cases.formula(**kw)
    grads = cases.random_like(outputs)
    truth = cases.run(kw, outputs, grads)
    found = cases.run(kw, cases.ours(kw, "reference"), grads)
    assert found.keys() == truth.keys()
    for key, value in found.items():
        assert value.shape == truth[key].shape, key
        assert rel_err(value, truth[key]) < 1e-13, key


def test_gradcheck():
    kw = cases.to(cases.make("everything", rows=(3,), dim=4), torch.float64)
    names = list(cases.leaves(kw))

    def call(*tensors):
        given = dict(zip(names, tensors))
        given["low_rank"] = (given.pop("A"), given.pop("B"))
        return loop_step(**(kw | given), impl="reference")[:2]

    torch.autograd.gradcheck(call, tuple(cases.leaves(kw).values()))


@pytest.mark.parametrize("name", cases.CASES)
@DTYPE
@IMPL
def test_every_case(impl, dtype, name):
    cases.check(cases.make(name, rows=(37,), dim=24, dtype=dtype), impl)


@IMPL
def test_one_channel(impl):
    for name in ("per channel", "norm weight", "learned numbers"):
        cases.check(cases.make(name, dim=1), impl)


def test_float16():
    cases.check(cases.make("everything", dtype=torch.float16), "auto")


@IMPL
def test_shapes(impl):
    """[B, T, D], a single row, and what each comes back as."""
    for rows in ((2, 3), (), (2, 1, 3)):
        kw = cases.make("everything", rows=rows)
        out = loop_step(**kw, impl=impl)
        assert out.state.shape == out.core_input.shape == (*rows, 13)
        assert out.change.shape == rows
        cases.check(kw, impl)


@IMPL
def test_no_rows(impl):
    for name in ("everything", "learned numbers, norm", "low rank", "per channel"):
        kw = cases.make(name, rows=(2, 0))
        outputs = cases.ours(kw, impl)
        found = cases.run(kw, outputs, cases.random_like(outputs))
        for key, value in cases.leaves(kw).items():
            assert torch.equal(found[f"grad of {key}"], torch.zeros_like(value)), key


@pytest.mark.parametrize("used", [0, 1])
@IMPL
def test_one_output_used(impl, used):
    """s or x alone has a gradient: the other one counts as zeros."""
    for name in ("everything", "everything, branch kept", "learned numbers", "scaled"):
        kw = cases.make(name)
        wide = cases.to(kw, torch.float64)
        g = torch.randn(11, 13)
        truth = cases.run(wide, [cases.ours(wide, "reference")[used]], [g])
        for key, value in cases.run(kw, [cases.ours(kw, impl)[used]], [g]).items():
            torch.testing.assert_close(value.double(), truth[key], rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")


@IMPL
def test_layouts(impl):
    """Strided inputs and gradients give what their copies give; matrices may be transposes."""
    kw = cases.make("everything", rows=(3, 5))
    outputs = cases.ours(kw, impl)
    grads = cases.random_like(outputs)
    truth = cases.run(kw, outputs, grads)

    def strided(t):
        return torch.stack([t.detach(), t.detach()], -1)[..., 0].requires_grad_()

    other = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
    found = cases.run(other, cases.ours(other, impl), [strided(g).detach() for g in grads])
    for key, value in found.items():
        if impl == "cpp":
            assert torch.equal(value, truth[key]), key
        # PyTorch's own sums depend on the strides.
        torch.testing.assert_close(value, truth[key], msg=key)
    turned = kw | {"low_rank": tuple(m.detach().t().contiguous().t().requires_grad_() for m in kw["low_rank"])}
    for key, value in cases.run(turned, cases.ours(turned, impl), grads).items():
        torch.testing.assert_close(value, truth[key], rtol=1e-5, atol=1e-5, msg=key)


@DTYPE
@IMPL
def test_what_is_not_finite_stays_in_its_row(impl, dtype):
    # An even rank and row count: the library's bfloat16 product may let a NaN into the row beside it at odd ones.
    kw = cases.make("norm weight", rows=(8,), dtype=dtype)
    kw["low_rank"] = (torch.randn(13, 2), torch.randn(2, 13))
    with torch.no_grad():
        kw["h"][3, 2], kw["f"][5, 1], kw["e"][6, 0] = float("nan"), float("inf"), float("nan")
    outputs, truth = cases.ours(kw, impl), cases.ours(kw, "reference")
    for i, (out, t) in enumerate(zip(outputs, truth)):
        assert torch.equal(out.isnan(), t.isnan()), i
        assert torch.isfinite(out[[0, 1, 2, 4, 7]]).all(), i
    (grad,) = torch.autograd.grad(outputs[1].sum(), kw["f"])
    assert torch.isfinite(grad[[0, 1, 2, 4, 6, 7]]).all()
    assert grad[3].isnan().all()


@IMPL
def test_large_values_and_rows_of_zeros(impl):
    kw = cases.make("learned numbers, norm", rows=(6,))
    with torch.no_grad():
        for name in ("f", "h", "e"):
            kw[name].mul_(1e4)
            kw[name][2] = 0.0
    cases.check(cases.to(kw, None) | {"return_change": False}, impl)


@IMPL
def test_change(impl):
    h = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    s = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
    change = loop_step(s, h, return_change=True, impl=impl).change
    assert torch.equal(change, torch.tensor([0.0, 0.0, float("inf"), 0.75]))
    assert loop_step(s, h, impl=impl).change is None
    half = loop_step(s.bfloat16(), h.bfloat16().requires_grad_(), beta=1.0, return_change=True, impl=impl).change
    assert half.dtype == torch.float32
    assert not half.requires_grad


@IMPL
def test_damped(impl):
    """h + (F(h) - h) / K, and x is s itself."""
    f, h = torch.randn(2, 5, 64)
    out = loop_step(f, h, alpha=1 / 4, beta=3 / 4, impl=impl)
    torch.testing.assert_close(out.state, h + (f - h) / 4)
    assert out.core_input is out.state


@IMPL
def test_the_state_may_be_f_itself(impl):
    """Where no term changes it; gradients of both results come together, and go on without a copy where they may."""
    kw = cases.make("injection")
    out = loop_step(**kw, impl=impl)
    assert out.state is kw["f"]
    g = torch.randn(11, 13)
    of_f, of_e = torch.autograd.grad([out.core_input, 2.0 * out.state], [kw["f"], kw["e"]], [g, g])
    torch.testing.assert_close(of_f, 3.0 * g)
    assert torch.equal(of_e, g)
    alone = loop_step(kw["f"], kw["h"], impl=impl)
    assert alone.state is alone.core_input is kw["f"]
    cast = loop_step(kw["f"].detach().bfloat16(), kw["h"], impl=impl).state
    assert torch.equal(cast, kw["f"].detach().bfloat16().float())


@IMPL
def test_beta_of_0_does_not_read_h(impl):
    """As a number it is no term; as a tensor it is one."""
    f, h = torch.ones(2, 8), torch.full((2, 8), float("nan"))
    assert torch.equal(loop_step(f, h, beta=0.0, impl=impl).state, f)
    assert loop_step(f, h, beta=torch.zeros(()), impl=impl).state.isnan().all()


def test_whether_the_branch_is_kept():
    ones = torch.ones(4)
    h = torch.zeros(1, 4)
    assert not checks.keeps_branch(None, True, ones, h)
    assert not checks.keeps_branch(None, True, None, h)
    assert not checks.keeps_branch(True, False, None, h)
    assert checks.keeps_branch(None, True, torch.tensor([1.0, 0.0, 1.0, 1.0]), h)
    assert checks.keeps_branch(None, True, torch.tensor([1.0, float("nan"), 1.0, 1.0]), h)
    assert checks.keeps_branch(None, True, ones, h.half())
    assert checks.keeps_branch(None, True, ones.to("meta"), h.to("meta"))
    assert not checks.keeps_branch(False, True, ones.to("meta"), h.to("meta"))


@IMPL
def test_parameters_in_half_precision(impl):
    """Gradients come in the dtype and shape of each parameter, 0-d too."""
    kw = cases.make("everything", dtype=torch.bfloat16)
    for name in ("norm_weight", "embedding", "alpha"):
        kw[name] = kw[name].detach().bfloat16().requires_grad_()
    kw["low_rank"] = tuple(m.detach().bfloat16().requires_grad_() for m in kw["low_rank"])
    kw["beta"] = torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)
    outputs = cases.ours(kw, impl)
    for key, value in cases.run(kw, outputs, cases.random_like(outputs)).items():
        if key.startswith("grad of "):
            given = cases.leaves(kw)[key.removeprefix("grad of ")]
            assert (value.dtype, value.shape) == (given.dtype, given.shape), key
    cases.check(kw, impl)


@IMPL
def test_compile(impl):
    # Both implementations' cases together would be too many for one function.
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(kw):
        return cases.ours(kw, impl)

    for name in ("everything", "damped", "norm weight", "learned numbers", "injection", "learned entrance"):
        kw = cases.make(name, rows=(2, 5))
        outputs = cases.ours(kw, impl)
        grads = cases.random_like(outputs)
        truth = cases.run(kw, outputs, grads)
        for key, value in cases.run(kw, step(kw), grads).items():
            torch.testing.assert_close(value, truth[key], rtol=1e-5, atol=1e-5, msg=f"{name}: {key}")


@IMPL
def test_checkpoint_and_second_backward(impl):
    kw = cases.make("everything")
    g = torch.randn(11, 13)
    truth = cases.run(kw, [cases.ours(kw, impl)[1]], [g])
    again = checkpoint(lambda: loop_step(**kw, impl=impl).core_input, use_reentrant=False)
    twice = loop_step(**kw, impl=impl).core_input
    for out in (again, twice, twice):
        got = torch.autograd.grad(out, list(cases.leaves(kw).values()), g, retain_graph=True)
        for (key, value), found in zip(cases.leaves(kw).items(), got):
            assert value.shape == found.shape
            torch.testing.assert_close(found, truth[f"grad of {key}"], msg=key)


def test_second_derivative():
    x = torch.randn(3, 4, requires_grad=True)
    if native.load("_C") is None:
        with pytest.raises(NotImplementedError, match="create_graph=True is covered by impl='reference' alone"):
            torch.autograd.grad(loop_step(x, x, norm=True).state.sum(), x, create_graph=True)
    wide = x.detach().double().requires_grad_()
    torch.autograd.gradgradcheck(lambda f: loop_step(f, f, norm=True, impl="reference").state, wide)


@IMPL
def test_frozen_parts_get_no_gradient(impl):
    for frozen in (("f", "alpha", "norm_weight"), ("h", "beta", "e"), ("f", "h", "e"), ("embedding", "state_scale")):
        kw = cases.make("everything")
        wide = cases.to(kw, torch.float64)
        for given in (kw, wide):
            for name in frozen:
                given[name] = given[name].detach()
            cases.ours(given, impl if given is kw else "reference")[1].square().sum().backward()
        for name, value in cases.leaves(kw).items():
            assert (value.grad is None) == (name in frozen), name
            if value.grad is not None:
                torch.testing.assert_close(
                    value.grad.double(), cases.leaves(wide)[name].grad, rtol=1e-4, atol=1e-4, msg=name
                )


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


@IMPL
def test_autocast_leaves_the_state_alone(impl):
    kw = cases.make("everything")
    truth = cases.ours(kw, impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(cases.ours(kw, impl), truth):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)
    mixed = kw | {"f": kw["f"].detach().bfloat16().requires_grad_()}
    out = loop_step(**mixed, impl=impl)
    assert out.state.dtype == torch.float32
    out.core_input.sum().backward()
    assert mixed["f"].grad.dtype == torch.bfloat16


D = 13


def _error_cases():
    pair = (torch.zeros(D, 3), torch.zeros(3, D))
    zeros = torch.zeros(11, D)
    yield "shape", {"f": torch.zeros(11, 5)}, ValueError, r"f must have the shape of h, \(11, 13\), got \(11, 5\)"
    yield "e", {"e": torch.zeros(11, 5)}, ValueError, r"e must have the shape of h, \(11, 13\), got \(11, 5\)"
    yield "integer", {"h": zeros.int()}, TypeError, "h must be float32, .*got torch.int32"
    yield "integer f", {"f": zeros.int()}, TypeError, "f must be of a floating dtype, got torch.int32"
    yield "no channels", {"h": torch.zeros(3, 0)}, ValueError, r"h must have shape \(..., D\) with D >= 1, got \(3, 0\)"
    yield "no tensor", {"f": [1.0]}, TypeError, "f must be a tensor, got list"
    yield "no h", {"h": None}, TypeError, "h must be a tensor, got None"
    yield "alpha", {"alpha": torch.zeros(3)}, ValueError, r"alpha must be a number or have shape .*\(13,\), got \(3,\)"
    yield "alpha type", {"alpha": "1"}, TypeError, "alpha must be a number or a tensor, got str"
    yield "alpha bool", {"alpha": True}, TypeError, "alpha must be a number or a tensor, got bool"
    yield "beta", {"beta": float("nan")}, ValueError, "beta must be finite, got nan"
    yield "scale", {"state_scale": float("inf")}, ValueError, "state_scale must be finite, got inf"
    yield "int scale", {"state_scale": torch.ones(1).int()}, TypeError, "state_scale must be of a floating dtype"
    yield "input_scale", {"input_scale": 1.0}, ValueError, "input_scale must come with e, got e=None"
    yield "pair", {"low_rank": pair[0]}, TypeError, r"low_rank must be a pair of tensors \(A, B\), got Tensor"
    yield "pair of", {"low_rank": (pair[0], None)}, TypeError, r"low_rank must be a pair of tensors .*, got tuple"
    yield (
        "A",
        {"low_rank": (torch.zeros(5, 3), pair[1])},
        ValueError,
        r"low_rank\[0\] must have shape \(13, r\).*\(5, 3\)",
    )
    yield (
        "B",
        {"low_rank": (pair[0], torch.zeros(4, D))},
        ValueError,
        r"low_rank\[1\] must have shape \(3, 13\).*\(4, 13\)",
    )
    yield "rank", {"low_rank": (torch.zeros(D, 20), torch.zeros(20, D))}, ValueError, "1 <= r <= 13, got"
    yield "norm", {"norm_weight": torch.zeros(5)}, ValueError, r"norm_weight must have shape \(13,\), got \(5,\)"
    yield "norm type", {"norm_weight": 1.0}, TypeError, "norm_weight must be a tensor, got float"
    yield (
        "embedding",
        {"embedding": torch.zeros(11, D)},
        ValueError,
        r"embedding must have shape \(13,\), got \(11, 13\)",
    )
    yield "eps", {"eps": -1.0}, ValueError, "eps must be at least 0 and finite, got -1.0"
    yield "eps type", {"eps": None}, TypeError, "eps must be a number, got None"
    yield "device", {"f": torch.zeros(11, D, device="meta")}, ValueError, "f must be on cpu, got meta"
    yield "impl", {"impl": "fast"}, ValueError, "impl must be one of"
    yield "float64", {"h": zeros.double(), "impl": "cpp"}, NotImplementedError, "impl='cpp' (takes|cannot run)"


@pytest.mark.parametrize(("change", "kind", "message"), [pytest.param(*c[1:], id=c[0]) for c in _error_cases()])
def test_errors(change, kind, message):
    arguments = {"f": torch.zeros(11, D), "h": torch.zeros(11, D)} | change
    with pytest.raises(kind, match="loop_step: .*" + message):
        loop_step(**arguments)
