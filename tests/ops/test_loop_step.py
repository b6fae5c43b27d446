"""loop_step: the reference against the formula, the fused form against the reference in float64, and its contract."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from effkern import loop_step, native
from effkern.ops.loop_step import checks
from tests.numerics import assert_as_good_as_eager, rel_err
from tests.ops import loop_step_cases as cases

IMPL = pytest.mark.parametrize("impl", cases.implementations())
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
COMPILED = pytest.mark.skipif(native.load("_C") is not None, reason=str(native.load("_C")))
SUMS = tuple(f"grad of {name}" for name in cases.FACTORS)


def random_like(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.randn_like(o) for o in outputs if o.requires_grad]


def check(kw: cases.Keywords, impl: str, factor: float = 2.0) -> None:
    wide = cases.to(kw, torch.float64)
    truth_outputs = cases.ours(wide, "reference")
    grads = [g.to(kw["h"].dtype) for g in random_like(truth_outputs)]
    truth = cases.run(wide, truth_outputs, grads)
    plain = cases.to(kw, None)
    eager = cases.run(plain, cases.ours(plain, "reference"), grads)
    fast = cases.run(kw, cases.ours(kw, impl), grads)
    assert fast.keys() == truth.keys()
    unit, noise = torch.finfo(kw["h"].dtype).eps, noise_of_sums(wide, truth, grads)
    for name, value in fast.items():
        if value.numel() == 0:
            continue
        # With a norm y hat comes from s, which is rounded to the streams' precision: half a unit in each term.
        ulps = max(4.0, 0.5 * unit / torch.finfo(value.dtype).eps)
        if name in SUMS and value.numel() == 1:
            bound = max(factor * (eager[name] - truth[name]).norm(), 4 * unit * noise[name], unit * truth[name].norm())
            assert (value - truth[name]).norm() <= bound, name
            continue
        try:
            assert_as_good_as_eager(value, eager[name], truth[name], factor, ulps)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def noise_of_sums(kw: cases.Keywords, truth: dict[str, torch.Tensor], grads: list[torch.Tensor]) -> dict[str, float]:
    """For the gradients of single numbers: the root of the squares of all terms of the sum, which cancel.

    Roundings of the terms are independent, so that their sum's is this, times some units.
    """
    gx, s = grads[-1].double(), truth["output 0"]
    terms = {"alpha": truth["grad of f"] * kw["f"], "beta": truth["grad of h"] * kw["h"], "state_scale": gx * s}
    terms["input_scale"] = gx * kw.get("e", s)
    return {f"grad of {name}": product.norm().item() for name, product in terms.items()}


@pytest.mark.parametrize("name", cases.CASES)
def test_the_reference_is_the_formula(name):
    kw = cases.to(cases.make(name, rows=(2, 3)), torch.float64)
    outputs = cases.formula(**kw)
    grads = random_like(outputs)
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
    check(cases.make(name, rows=(37,), dim=24, dtype=dtype), impl)


# One row; below, at and over a group of lanes, over a block of 512; several chunks and groups of rows.
@pytest.mark.parametrize(("rows", "dim"), [(1, 7), (1, 768), (3, 31), (3, 32), (17, 33), (16, 513), (700, 515)])
@pytest.mark.parametrize("name", ["everything", "everything, branch kept", "learned numbers, norm", "low rank"])
@DTYPE
@COMPILED
def test_cpp_sizes(dtype, name, rows, dim):
    check(cases.make(name, rows=(rows,), dim=dim, dtype=dtype), "cpp")


@IMPL
def test_one_channel(impl):
    for name in ("per channel", "norm weight", "learned numbers"):
        check(cases.make(name, dim=1), impl)


def test_float16():
    check(cases.make("everything", dtype=torch.float16), "auto")


@IMPL
def test_shapes(impl):
    """[B, T, D], a single row, and what each comes back as."""
    for rows in ((2, 3), (), (2, 1, 3)):
        kw = cases.make("everything", rows=rows)
        out = loop_step(**kw, impl=impl)
        assert out.state.shape == out.core_input.shape == (*rows, 13)
        assert out.change.shape == rows
        check(kw, impl)


@IMPL
def test_no_rows(impl):
    for name in ("everything", "learned numbers, norm", "low rank", "per channel"):
        kw = cases.make(name, rows=(2, 0))
        outputs = cases.ours(kw, impl)
        found = cases.run(kw, outputs, random_like(outputs))
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
    grads = random_like(outputs)
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
    check(cases.to(kw, None) | {"return_change": False}, impl)


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


@COMPILED
@DTYPE
def test_cpp_bits_do_not_depend_on_threads(dtype):
    threads = torch.get_num_threads()
    # The products of a low-rank map are the library's, whose bits may depend on its threads.
    for name in ("learned numbers, norm", "per channel", "norm weight"):
        kw = cases.make(name, rows=(900,), dim=530, dtype=dtype)
        grads = random_like(cases.ours(kw, "cpp"))
        try:
            torch.set_num_threads(1)
            truth = cases.run(kw, cases.ours(kw, "cpp"), grads)
            for count in (2, 3, 5):
                torch.set_num_threads(count)
                for key, value in cases.run(kw, cases.ours(kw, "cpp"), grads).items():
                    assert torch.equal(value, truth[key]), (key, count)
        finally:
            torch.set_num_threads(threads)


@COMPILED
def test_cpp_sums_keep_their_digits():
    """Sums over 20000 tokens, one number and per channel, against float64: no worse than a few roundings of a term."""
    g = torch.rand(20000, 8) + 0.5
    f = torch.rand(20000, 8) + 0.5
    for shape in ((), (8,)):
        alpha = torch.ones(shape, requires_grad=True)
        loop_step(f, f, alpha=alpha, impl="cpp").state.backward(g)
        truth = (g.double() * f.double()).sum(0) if shape else (g.double() * f.double()).sum()
        assert rel_err(alpha.grad, truth) < 2e-7


@COMPILED
def test_cpp_keeps_little():
    """What backward holds that is as wide as a stream."""
    expected = {
        "damped": set(), "injection": set(), "embedding": set(), "learned entrance": {"f", "e"},
        "norm weight": {"s"}, "norm": {"s"},
        "learned beta, norm": {"s", "h"}, "learned alpha, norm": {"s", "f"}, "learned alpha alone, norm": {"f"},
        "per channel": {"f", "h", "e", "s"}, "low rank": {"h"}, "branch kept": {"f", "h"},
        "branch kept, no beta": {"f"},
    }  # fmt: skip
    for name, want in expected.items():
        kw = cases.make(name)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            out = loop_step(**kw, impl="cpp")
        names = {out.state.data_ptr(): "s"} | {kw[n].data_ptr(): n for n in ("f", "h", "e") if n in kw}
        assert {names[t.data_ptr()] for t in kept if t.shape == (11, 13)} == want, name
        rest = sum(t.numel() for t in kept if t.shape[:1] == (11,) and t.shape != (11, 13))
        assert rest <= 11 * (kw["low_rank"][0].shape[1] + 1 if "low_rank" in kw else 1), name


@COMPILED
def test_cpp_norm_weight_of_0_still_learns():
    """s says nothing about a channel of weight 0: f and h are kept then, and the weight gets its gradient."""
    for weight in (torch.zeros(13), torch.cat([torch.zeros(5), torch.ones(8)])):
        kw = cases.make("norm weight") | {"return_change": False}
        kw["norm_weight"] = weight.requires_grad_()
        check(kw, "cpp")
        found = cases.run(kw, cases.ours(kw, "cpp"), [torch.randn(11, 13)] * 2)
        assert found["grad of norm_weight"].abs().min() > 0
        message = r"norm_weight must be at least 8.7e-19 in size with save_branch=False, got 0"
        with pytest.raises(ValueError, match=message):
            loop_step(**(kw | {"save_branch": False}), impl="cpp")


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
    for key, value in cases.run(kw, outputs, random_like(outputs)).items():
        if key.startswith("grad of "):
            given = cases.leaves(kw)[key.removeprefix("grad of ")]
            assert (value.dtype, value.shape) == (given.dtype, given.shape), key
    check(kw, impl)


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
        grads = random_like(outputs)
        truth = cases.run(kw, outputs, grads)
        for key, value in cases.run(kw, step(kw), grads).items():
            torch.testing.assert_close(value, truth[key], rtol=1e-5, atol=1e-5, msg=f"{name}: {key}")


@COMPILED
def test_cpp_operators():
    """Schemas, shape functions and aliasing rules of the two operators, by torch's own checker."""
    f, h, e, g = torch.randn(4, 2, 3, 8)
    one, vector, down, up = torch.ones(1), torch.randn(8), torch.randn(8, 2), torch.randn(2, 8)
    full = (f, h, e, one, vector, one, vector, [1.0, 1.0, 1.0, 1.0], down, up, vector, vector, True, 1e-6, True)
    few = (f, h, None, None, None, None, None, [0.5, 0.5, 1.0, 1.0], None, None, None, None, False, 1e-6, False)
    # Its state is f.
    f_itself = (f, h, e, None, None, None, None, [1.0, 0.0, 1.0, 1.0], None, None, None, vector, False, 1e-6, True)
    torch.library.opcheck(torch.ops.effkern.loop_step_fwd, f_itself)
    assert torch.ops.effkern.loop_step_fwd(*f_itself)[0].numel() == 0
    for arguments in (full, few):
        torch.library.opcheck(torch.ops.effkern.loop_step_fwd, arguments)
        state, core_input, _, rstd, own = torch.ops.effkern.loop_step_fwd(*arguments)
        shared = arguments is few
        kept = (None,) * 6 if shared else (f, h, e, state, rstd, own)
        wanted = 0b11 if shared else (1 << 11) - 1
        torch.library.opcheck(
            torch.ops.effkern.loop_step_bwd,
            (g, None if shared else g, *kept, *arguments[3:11], arguments[12], False, wanted),
        )
        assert core_input.numel() == (0 if shared else h.numel())


@COMPILED
def test_cpp_errors_of_the_operators():
    f, h = torch.zeros(2, 3, 8)

    def forward(**change):
        given = dict.fromkeys(("e", "alpha", "beta", "state_scale", "input_scale", "down", "up", "w", "m"))
        given |= {"f": f, "h": h, "numbers": [1.0] * 4, **change}
        g = given
        return torch.ops.effkern.loop_step_fwd(
            g["f"], g["h"], g["e"], g["alpha"], g["beta"], g["state_scale"], g["input_scale"], g["numbers"], g["down"],
            g["up"], g["w"], g["m"], True, 1e-6, False,
        )  # fmt: skip

    down = torch.zeros(8, 2)
    for change, message in (
        ({"f": torch.zeros(3, 7)}, "streams must be contiguous, of one shape"),
        ({"f": f.bfloat16()}, "streams must be contiguous, of one shape"),
        ({"f": torch.zeros(8, 3).t()}, "streams must be contiguous, of one shape"),
        ({"h": h.double()}, "float32 or bfloat16"),
        ({"alpha": torch.zeros(3)}, "factors must be packed float32 of 1 or D numbers"),
        ({"numbers": [1.0]}, "numbers must be the four factors"),
        ({"down": down}, "down and up come together"),
        ({"down": down, "up": torch.zeros(3, 8)}, r"down must be \[D, R\] and up \[R, D\]"),
        ({"w": torch.zeros(7)}, r"must be packed float32 \[N\] and \[D\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(**change)

    def backward(wanted, **change):
        given = dict.fromkeys(("g", "gx", "f", "h", "e", "state", "rstd", "down"))
        given |= change
        g = given
        up = None if g["down"] is None else torch.zeros(2, 8)
        return torch.ops.effkern.loop_step_bwd(
            g["g"], g["gx"], g["f"], g["h"], g["e"], g["state"], g["rstd"], None, None, None, None, None, [1.0] * 4,
            g["down"], up, None, "rstd" in change, False, wanted,
        )  # fmt: skip

    for wanted, change, message in (
        (1, {"f": f}, "grad_state or grad_core_input must be there"),
        (1, {"g": f, "rstd": torch.zeros(3)}, "a norm needs state, or f and h"),
        (1 << 3, {"g": f}, "alpha's gradient needs f"),
        (1 << 4, {"g": f}, "beta's gradient needs h"),
        (1 << 7, {"g": f, "down": down}, "down's gradient needs h"),
        (1 << 8, {"g": f, "down": down}, "up's gradient and a norm need own"),
        (1 << 2, {"g": f}, "gets its gradient from grad_core_input"),
        (1 << 5, {"gx": f}, "state_scale's gradient needs state"),
        (1 << 6, {"gx": f}, "input_scale's gradient needs e"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(wanted, **change)


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


@COMPILED
def test_cpp_gradients_of_the_matrices_alone():
    """Each of what the products serve may be frozen: h, A or B."""
    for frozen in (("h",), ("h", "A"), ("A", "B"), ("h", "B"), ("f", "h", "A")):
        for beta in (0.0, 0.5):
            kw = cases.make("low rank") | {"beta": beta}
            wide = cases.to(kw, torch.float64)
            for given in (kw, wide):
                for name in frozen:
                    cases.leaves(given)[name].requires_grad_(False)
                cases.ours(given, "cpp" if given is kw else "reference")[0].square().sum().backward()
            for name, value in cases.leaves(kw).items():
                assert (value.grad is None) == (name in frozen), name
                if value.grad is not None:
                    truth = cases.leaves(wide)[name].grad
                    torch.testing.assert_close(value.grad.double(), truth, rtol=1e-4, atol=1e-4, msg=name)


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
