"""op_name: every implementation against float64, and the contract."""

import pytest
import torch
from torch import Tensor

from effkern import native
from effkern.ops import registry
from effkern.ops.op_name import op_name
from effkern.ops.op_name.api import _choose
from tests.numerics import assert_as_good_as_eager

CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = [
    i.name for i in registry.registered()["op_name"] if i.unavailable(torch.device(DEVICE)) is None
    or i.unavailable(CPU) is None
]  # fmt: skip
IMPL = pytest.mark.parametrize("impl", IMPLS)
COMPILED = pytest.mark.skipif(native.load("_C") is not None, reason=str(native.load("_C")))
# No row; one column; below a vector of 32 lanes; one over; several tasks, and blocks of the tests' size in Triton.
SHAPES = [(0, 7), (3, 1), (5, 31), (2, 33), (1030, 64)]


def home(impl: str) -> str:
    return "cpu" if impl == "cpp" else DEVICE


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    if "triton" in IMPLS and DEVICE == "cpu":
        from effkern.ops.op_name import triton as launcher
        from tests.interpreter import exact_bfloat16

        # Several blocks a row.
        monkeypatch.setattr(launcher, "BLOCK", 16)
        exact_bfloat16(monkeypatch)


def make(shape: tuple[int, int], dtype: torch.dtype = torch.float32, device: str = DEVICE) -> list[Tensor]:
    """Gate, up, and the gradient of the result."""
    return [torch.randn(shape).to(device, dtype) for _ in range(3)]


def run(gate: Tensor, up: Tensor, grad: Tensor, impl: str) -> list[Tensor]:
    leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
    y = op_name(*leaves, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def formula(gate: Tensor, up: Tensor, grad: Tensor) -> list[Tensor]:
    """The docstring's three lines."""
    positive = gate.clamp_min(0.0)
    return [positive**2 * up, 2 * positive * up * grad, positive**2 * grad]


def check(given: list[Tensor], impl: str) -> None:
    truth = run(*(x.double() for x in given), "reference")
    eager = run(*given, "reference")
    for fast, plain, exact in zip(run(*given, impl), eager, truth):
        assert fast.is_contiguous()
        assert_as_good_as_eager(fast, plain, exact)


def test_the_reference_is_the_formula():
    given = [x.double() for x in make((9, 13))]
    for found, truth in zip(run(*given, "reference"), formula(*given)):
        torch.testing.assert_close(found, truth, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@IMPL
def test_against_float64(impl, dtype, shape):
    # The interpreter takes a millisecond a block.
    rows = min(shape[0], 20) if impl == "triton" and DEVICE == "cpu" else shape[0]
    check(make((rows, shape[1]), dtype, home(impl)), impl)


def test_half():
    """float16 is Triton's alone of the fused forms."""
    check(make((4, 21), torch.float16), "triton" if "triton" in IMPLS else "auto")


@IMPL
def test_strided_rows_and_gradients_that_are_not_contiguous(impl):
    gate, up, grad = make((5, 40), device=home(impl))
    narrow = [gate[::2, :17], up[:3, 3:20], grad[:3, :17]]
    for found, truth in zip(run(*narrow, impl), run(*(x.contiguous() for x in narrow), impl)):
        assert torch.equal(found, truth)
    leaf = gate.clone().requires_grad_()
    op_name(leaf, up, impl=impl).sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * gate.clamp_min(0) * up)


@IMPL
def test_extreme_values(impl):
    """Infinity, NaN, both zeros and what overflows behave as in plain torch."""
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([[inf, -inf, nan, 0.0, -0.0, 1e30, -1e4, 1e-30]], device=home(impl))
    up = torch.tensor([[1.0, 2.0, 3.0, inf, 5.0, -1.0, nan, 1.0]], device=home(impl))
    grad = torch.ones_like(up)
    for found, truth in zip(run(gate, up, grad, impl), run(gate, up, grad, "reference")):
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=0.0, equal_nan=True)


@IMPL
def test_frozen_inputs(impl):
    gate, up, grad = make((3, 9), device=home(impl))
    leaf = up.clone().requires_grad_()
    op_name(gate, leaf, impl=impl).backward(grad)
    torch.testing.assert_close(leaf.grad, gate.clamp_min(0) ** 2 * grad)
    assert not op_name(gate, up, impl=impl).requires_grad


@COMPILED
def test_cpp_bits_do_not_depend_on_threads():
    given, threads, found = make((700, 70), device="cpu"), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(*given, "cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@IMPL
def test_compile(impl):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(gate, up):
        return op_name(gate, up, impl=impl) * 2.0

    for rows in (4, 6, 7):
        gate, up, grad = make((rows, 33), device=home(impl))
        leaves = [gate.requires_grad_(), up.requires_grad_()]
        y = step(*leaves)
        found = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
        for a, b in zip(found, run(gate, up, 2.0 * grad, impl)):
            torch.testing.assert_close(a, b * (2.0 if a is found[0] else 1.0))


def test_operators():
    ops = torch.ops.effkern
    for name in [n for n in IMPLS if n != "reference"]:
        suffix = "" if name == "cpp" else "_triton"
        gate, up, grad = make((3, 10), device=home(name))
        torch.library.opcheck(getattr(ops, f"op_name{suffix}_fwd"), (gate[:, :7], up[:, :7]))
        torch.library.opcheck(getattr(ops, f"op_name{suffix}_bwd"), (gate, up, grad))


@COMPILED
def test_cpp_errors_of_the_operators():
    forward, backward = torch.ops.effkern.op_name_fwd, torch.ops.effkern.op_name_bwd
    x = torch.randn(3, 4)
    for gate, up, message in (
        (x, x[:, :3], "tensors must be .* of one shape and dtype"),
        (x.t(), x.t(), "stride 1 along D"),
        (x, x.bfloat16(), "of one shape and dtype"),
        (x.double(), x.double(), "tensors must be float32 or bfloat16"),
        (x[0], x[0], "tensors must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(gate, up)
        with pytest.raises(RuntimeError, match=message):
            backward(gate, up, x)


def test_second_derivative():
    x = [torch.rand(2, 3, dtype=torch.float64).add(0.5).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: op_name(a, b, impl="reference"), x)
    assert torch.autograd.gradgradcheck(lambda a, b: op_name(a, b, impl="reference"), x)
    if native.load("_C") is None:
        y = [t.detach().float().requires_grad_() for t in x]
        with pytest.raises(NotImplementedError, match="create_graph=True is covered by impl='reference' alone"):
            torch.autograd.grad(op_name(*y).sum(), y, create_graph=True)


def test_choice():
    assert _choose("auto", torch.zeros(1, 1)) == ("cpp" if native.load("_C") is None else "reference")
    assert _choose("auto", torch.zeros(1, 1, dtype=torch.float64)) == "reference"
    for name in [n for n in IMPLS if n != "reference"]:
        with pytest.raises(NotImplementedError, match=rf"op_name: impl='{name}' takes float32, .*got torch\.float64"):
            _choose(name, torch.zeros(1, 1, dtype=torch.float64, device=home(name)))


X = torch.zeros(2, 3)
ERRORS = {
    "no_tensor": ([0.0], X, {}, TypeError, "gate must be a tensor, got list"),
    "dtype": (X.int(), X, {}, TypeError, "gate must be float32, bfloat16, float16 or float64, got torch.int32"),
    "dtypes": (X, X.double(), {}, TypeError, "up must have the dtype of gate, torch.float32, got torch.float64"),
    "dimensions": (X[0], X, {}, ValueError, "gate must be [N, D], got shape [3]"),
    "layout": (X, X.t().contiguous().t(), {}, ValueError, "up must have stride 1 along D, got 2"),
    "shape": (X, X[:1], {}, ValueError, "up must have the shape of gate, [2, 3], got [1, 3]"),
    "device": (X, X.to("meta"), {}, ValueError, "up must be on cpu, got meta"),
    "impl": (X, X, {"impl": "fast"}, ValueError, "impl must be one of"),
}


@pytest.mark.parametrize(("gate", "up", "options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(gate, up, options, kind, message):
    with pytest.raises(kind) as caught:
        op_name(gate, up, **options)
    assert str(caught.value).startswith("op_name: ")
    assert message in str(caught.value)
