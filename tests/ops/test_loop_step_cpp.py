"""The C++ kernels of the loop step: sizes, threads, what they keep, and the rules of their operators."""

import pytest
import torch

from effkern import loop_step, native
from tests.numerics import rel_err
from tests.ops import loop_step_cases as cases

pytestmark = pytest.mark.skipif(native.load("_C") is not None, reason=str(native.load("_C")))
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


# One row; below, at and over a group of lanes, over a block of 512; several chunks and groups of rows.
@pytest.mark.parametrize(("rows", "dim"), [(1, 7), (1, 768), (3, 31), (3, 32), (17, 33), (16, 513), (700, 515)])
@pytest.mark.parametrize("name", ["everything", "everything, branch kept", "learned numbers, norm", "low rank"])
@DTYPE
def test_cpp_sizes(dtype, name, rows, dim):
    cases.check(cases.make(name, rows=(rows,), dim=dim, dtype=dtype), "cpp")


@DTYPE
def test_cpp_bits_do_not_depend_on_threads(dtype):
    threads = torch.get_num_threads()
    # The products of a low-rank map are the library's, whose bits may depend on its threads.
    for name in ("learned numbers, norm", "per channel", "norm weight"):
        kw = cases.make(name, rows=(900,), dim=530, dtype=dtype)
        grads = cases.random_like(cases.ours(kw, "cpp"))
        try:
            torch.set_num_threads(1)
            truth = cases.run(kw, cases.ours(kw, "cpp"), grads)
            for count in (2, 3, 5):
                torch.set_num_threads(count)
                for key, value in cases.run(kw, cases.ours(kw, "cpp"), grads).items():
                    assert torch.equal(value, truth[key]), (key, count)
        finally:
            torch.set_num_threads(threads)


def test_cpp_sums_keep_their_digits():
    """Sums over 20000 tokens, one number and per channel, against float64: no worse than a few roundings of a term."""
    g = torch.rand(20000, 8) + 0.5
    f = torch.rand(20000, 8) + 0.5
    for shape in ((), (8,)):
        alpha = torch.ones(shape, requires_grad=True)
        loop_step(f, f, alpha=alpha, impl="cpp").state.backward(g)
        truth = (g.double() * f.double()).sum(0) if shape else (g.double() * f.double()).sum()
        assert rel_err(alpha.grad, truth) < 2e-7


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


def test_cpp_norm_weight_of_0_still_learns():
    """s says nothing about a channel of weight 0: f and h are kept then, and the weight gets its gradient."""
    for weight in (torch.zeros(13), torch.cat([torch.zeros(5), torch.ones(8)])):
        kw = cases.make("norm weight") | {"return_change": False}
        kw["norm_weight"] = weight.requires_grad_()
        cases.check(kw, "cpp")
        found = cases.run(kw, cases.ours(kw, "cpp"), [torch.randn(11, 13)] * 2)
        assert found["grad of norm_weight"].abs().min() > 0
        message = r"norm_weight must be at least 8.7e-19 in size with save_branch=False, got 0"
        with pytest.raises(ValueError, match=message):
            loop_step(**(kw | {"save_branch": False}), impl="cpp")


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
