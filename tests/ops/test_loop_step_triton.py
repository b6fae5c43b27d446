"""The Triton kernels of the loop step, every option and path, in the interpreter (or on a GPU) against float64.

D = 37 in blocks of 16: three steps, the last mostly masked. N = 7 in tiles of 4 rows: the second tile is not full.
"""

import pytest
import torch

from effkern import loop_step
from effkern.ops.loop_step.api import choose
from tests.ops import loop_step_cases as cases

pytest.importorskip("triton")

from effkern.ops.loop_step import triton as launcher

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BULK = pytest.mark.slow
# In the default run those that round most differently, or take another way.
ROUNDED = ("everything", "everything, branch kept", "learned numbers, norm", "norm weight", "low rank alone, norm")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    if DEVICE == "cpu":
        from tests.interpreter import exact_bfloat16

        exact_bfloat16(monkeypatch)
    small = {"forward": 4, "decode": 1, "backward": 4}
    monkeypatch.setattr(launcher, "LAUNCHES", {k: launcher.Launch(rows, 16, 4) for k, rows in small.items()})
    monkeypatch.setattr(launcher, "DECODE_ROWS", 1)


def make(name: str, rows: tuple[int, ...] = (7,), dim: int = 37, dtype: torch.dtype = torch.float32) -> cases.Keywords:
    def move(v):
        if isinstance(v, tuple):
            return tuple(move(m) for m in v)
        return v.detach().to(DEVICE).requires_grad_() if isinstance(v, torch.Tensor) else v

    return {k: move(v) for k, v in cases.make(name, rows, dim, dtype).items()}


@pytest.mark.parametrize("name", cases.CASES)
def test_every_case(name):
    cases.check(make(name), "triton")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ROUNDED else BULK) for n in cases.CASES])
def test_every_case_in_bfloat16(name):
    cases.check(make(name, dtype=torch.bfloat16), "triton")


# One row takes the table for decoding; few channels; one block, no mask; one channel.
@pytest.mark.parametrize(("rows", "dim"), [((1,), 37), ((7,), 7), ((2, 4), 16), ((3,), 1)])
@pytest.mark.parametrize("name", ["norm weight", "per channel", "learned numbers, norm"])
def test_sizes(name, rows, dim):
    cases.check(make(name, rows, dim), "triton")


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used(used):
    for name in ("everything", "learned numbers"):
        cases.check(make(name), "triton", (used,))


def test_half():
    cases.check(make("everything", dtype=torch.float16), "triton")


def test_no_rows():
    for name in ("everything", "learned numbers, norm", "low rank"):
        kw = make(name, rows=(2, 0))
        outputs = cases.ours(kw, "triton")
        found = cases.run(kw, outputs, [torch.randn_like(o) for o in outputs if o.requires_grad])
        for key, value in cases.leaves(kw).items():
            assert torch.equal(found[f"grad of {key}"], torch.zeros_like(value)), (name, key)


def test_parameters_in_half_precision_and_layouts():
    """They are widened in the kernel; strided streams are copied, matrices taken as they lie."""
    kw = make("everything")
    for name in ("norm_weight", "embedding", "alpha", "state_scale"):
        kw[name] = kw[name].detach().bfloat16().requires_grad_()
    kw["low_rank"] = tuple(m.detach().t().contiguous().t().requires_grad_() for m in kw["low_rank"])
    kw["f"] = torch.stack([kw["f"].detach()] * 2, -1)[..., 0].requires_grad_()
    cases.check(kw, "triton")


def test_change_of_rows_that_stay():
    h = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [3.0, 4.0]], device=DEVICE)
    s = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [0.0, 4.0]], device=DEVICE)
    change = loop_step(s, h, return_change=True, impl="triton").change
    assert torch.equal(change.cpu(), torch.tensor([0.0, 0.0, float("inf"), 0.75]))


def test_what_is_not_finite_stays_in_its_row():
    kw = make("norm weight")
    with torch.no_grad():
        kw["h"][3, 2], kw["f"][5, 1] = float("nan"), float("inf")
    for out, truth in zip(cases.ours(kw, "triton"), cases.ours(kw, "reference")):
        assert torch.equal(out.isnan(), truth.isnan())
        assert torch.isfinite(out[[0, 1, 2, 4, 6]]).all()


def test_same_bits_every_time():
    kw = make("everything")
    grads = [torch.randn(7, 37, device=DEVICE) for _ in range(2)]
    first, second = (cases.run(kw, cases.ours(kw, "triton"), grads) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_norm_weight_of_0_with_the_branch_kept():
    kw = make("branch kept")
    with torch.no_grad():
        kw["norm_weight"][::2] = 0.0
    cases.check(kw, "triton")


def test_compile():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(kw):
        return cases.ours(kw, "triton")

    kw = make("learned numbers, norm")
    grads = [torch.randn(7, 37, device=DEVICE) for _ in range(2)]
    truth = cases.run(kw, cases.ours(kw, "triton"), grads)
    for key, value in cases.run(kw, step(kw), grads).items():
        torch.testing.assert_close(value, truth[key], rtol=1e-5, atol=1e-5, msg=key)


def test_operators():
    """Schemas, shape functions and aliasing rules of the two operators, by torch's own checker."""
    f, h, e, g = torch.randn(4, 2, 3, 8, device=DEVICE)
    one, vector = torch.ones(1, device=DEVICE), torch.randn(8, device=DEVICE)
    down, up = torch.randn(8, 2, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    arguments = (f, h, e, one, vector, one, vector, [1.0] * 4, down, up, vector, vector, True, 1e-6, True)
    torch.library.opcheck(torch.ops.effkern.loop_step_triton_fwd, arguments)
    state, _, _, rstd, own = torch.ops.effkern.loop_step_triton_fwd(*arguments)
    kept = (f, h, e, state, rstd, own)
    for wanted in ((1 << 11) - 1, 0b100_0000_1010):
        torch.library.opcheck(
            torch.ops.effkern.loop_step_triton_bwd,
            (g, g, *kept, *arguments[3:11], True, False, wanted),
        )


def test_what_is_not_covered():
    x = torch.zeros(2, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"takes float32, bfloat16 and float16, got torch.float64"):
        loop_step(x, x, impl="triton")
    assert choose("auto", x) == "reference"


def test_auto_interprets_nothing():
    """On a CPU the interpreter is for those who ask for it."""
    assert choose("auto", torch.zeros(1, 1)) in ("cpp", "reference")
    assert choose("triton", torch.zeros(1, 1, device=DEVICE)) == "triton"
