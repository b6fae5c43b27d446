"""The Triton kernels of looped linear attention, every form and path, in the interpreter or on a GPU."""

import pytest
import torch

from effkern import looped_linear_attention
from effkern.ops.looped_linear_attention.api import _choose
from tests.numerics import assert_as_good_as_eager
from tests.ops import looped_attention_cases as cases
from tests.ops.looped_attention_cases import Case

pytest.importorskip("triton")

from effkern.ops.looped_linear_attention import triton as launcher

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SMALL = Case(batch=3, examples=5, dim=3, loops=5)
CASES = {
    "factors": SMALL._replace(form="factors"),
    "factors, steps, every loop": SMALL._replace(form="factors", steps=True, every_loop=True, queries=2),
    "free, steps, every loop": SMALL._replace(free=True, steps=True, every_loop=True, queries=2),
    "primal": SMALL._replace(form="primal"),
    "primal, steps, every loop": SMALL._replace(form="primal", steps=True, every_loop=True, queries=2),
    "dual": SMALL._replace(form="dual", examples=2),
    "dual, steps, every loop": SMALL._replace(form="dual", steps=True, every_loop=True, queries=2),
    "one of everything": Case(batch=1, examples=1, dim=1, loops=1, steps=True, every_loop=True),
    # Two blocks of rows, tiles of 32, more queries than features.
    "wide": Case(batch=2, examples=35, dim=17, loops=3, queries=18, form="primal"),
    "wide, free": Case(batch=2, examples=35, dim=17, loops=3, free=True),
    "wide, dual": Case(batch=2, examples=11, dim=17, loops=3, queries=3, form="dual"),
    # More examples than the kernel takes in this form.
    "dual, as factors": Case(batch=2, examples=19, dim=3, loops=3, form="dual"),
}


@pytest.fixture(autouse=True)
def _fewer_programs(monkeypatch):
    """Two programs of a backward pass, so that one takes several problems; segments of 4 loops."""
    monkeypatch.setattr(launcher, "PROGRAMS", 2)
    monkeypatch.setattr(launcher, "SEGMENT", 4)


def on_device(given: cases.Given) -> cases.Given:
    return {k: v.detach().to(DEVICE).requires_grad_() for k, v in given.items()}


def check(c: Case, dtype: torch.dtype = torch.float32) -> None:
    given = on_device(cases.make(c, dtype))
    wide = cases.to(given, torch.float64)
    truth_output = cases.formula(wide, c)
    grad = torch.randn_like(truth_output).float().double()
    truth = cases.run(wide, truth_output, grad)
    eager = cases.run(given, cases.ours(given, c, "reference"), grad)
    for name, value in cases.run(given, cases.ours(given, c, "triton"), grad).items():
        try:
            assert_as_good_as_eager(value, eager[name], truth[name], ulps=8.0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("name", CASES)
def test_every_form(name):
    check(CASES[name])


@pytest.mark.parametrize("form", ["factors", "primal", "dual", "free"])
def test_segments(form):
    """States are run again from the start of a segment: one segment to the brim, one over, several."""
    c = SMALL._replace(batch=2, steps=True, every_loop=True)
    c = c._replace(free=True) if form == "free" else c._replace(form=form)
    for loops in (4, 11):
        check(c._replace(loops=loops))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(CASES["primal, steps, every loop"], dtype)


@pytest.mark.parametrize("name", ["factors, steps, every loop", "free, steps, every loop", "primal, steps, every loop",
                                  "dual, steps, every loop"])  # fmt: skip
def test_gradients_left_out(name):
    c = CASES[name]
    given = on_device(cases.make(c))
    output = cases.ours(given, c, "triton")
    truth = cases.run(given, output, torch.ones_like(output))
    for wanted in (("preconditioner",), ("step_sizes",), ("x", "y", "query")):
        some = {k: v if k in wanted else v.detach() for k, v in given.items()}
        found = torch.autograd.grad(cases.ours(some, c, "triton").sum(), [some[k] for k in wanted])
        for key, g in zip(wanted, found):
            assert torch.equal(g, truth[key]), (wanted, key)


def test_no_problems():
    c = SMALL._replace(batch=0, form="primal", steps=True)
    given = on_device(cases.make(c))
    out = cases.run(given, cases.ours(given, c, "triton"), torch.empty(1, 0, 1, device=DEVICE))
    for name, t in given.items():
        assert torch.equal(out[name], torch.zeros_like(t)), name


def test_nan_stays_in_its_problem():
    for form in ("factors", "primal", "dual"):
        c = SMALL._replace(batch=4, form=form, queries=2)
        given = on_device(cases.make(c))
        grad = torch.ones(1, 4, 2, device=DEVICE)
        clean = cases.run(given, cases.ours(given, c, "triton"), grad)
        with torch.no_grad():
            given["x"][2, 0, 0] = float("nan")
        out = cases.run(given, cases.ours(given, c, "triton"), grad)
        assert out["predictions"][0, 2].isnan().all()
        for key in ("x", "y", "query"):
            assert torch.equal(out[key][[0, 1, 3]], clean[key][[0, 1, 3]]), (form, key)


def test_what_is_not_covered():
    """Named, it is said; under "auto" the interpreter is for those who ask for it."""
    given = on_device(cases.make(SMALL, torch.float64))
    with pytest.raises(NotImplementedError, match=r"impl='triton' takes float32, .*got torch.float64"):
        cases.ours(given, SMALL, "triton")
    wide = SMALL._replace(dim=33, form="factors")
    with pytest.raises(NotImplementedError, match="at most 32 features and queries, got 33"):
        cases.ours(on_device(cases.make(wide)), wide, "triton")
    x, y, query = torch.zeros(1, 2, 1), torch.zeros(1, 2), torch.zeros(1, 1)
    with pytest.raises(NotImplementedError, match="at most 1024 loops, got 1025"):
        looped_linear_attention(x, y, query, torch.eye(1), 1025, impl="triton")
    assert _choose("auto", 3, 3, 1, 5, torch.zeros(1)) in ("cpp", "reference")
    assert _choose("triton", 3, 3, 1, 5, torch.zeros(1, device=DEVICE)) == "triton"


def test_tables_serve_every_size():
    assert [launcher.padded(n) for n in (1, 16, 17, 32)] == [16, 16, 32, 32]
    for table in (launcher.FORWARD, launcher.BACKWARD):
        limits = [launch.limit for launch in table]
        assert limits == sorted(limits)
        assert limits[-1] == 32
