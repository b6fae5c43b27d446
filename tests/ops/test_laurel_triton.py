"""The Triton kernels of the residual, every option and path, in the interpreter (or on a GPU) against float64.

D = 37 in chunks of 16: three steps, the last mostly masked. N = 7 in tiles of 4 rows: the second tile is not full.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from effkern.ops.laurel import laurel_residual
from effkern.ops.laurel.api import choose
from effkern.ops.laurel.scalars import SCALAR_MAPS
from tests.numerics import assert_as_good_as_eager

pytest.importorskip("triton")

from effkern.ops.laurel import triton as launcher
from effkern.ops.laurel.triton_launch import Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What "auto" takes instead.
OTHERS = ("reference",) if DEVICE == "cuda" else ("cpp", "reference")
# Leave the default run: seconds in the interpreter, and on a GPU minutes of compilation.
BULK = pytest.mark.slow
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Tiles of 4 x 16, for one row 2 x 16 (a GPU multiplies 16 rows at least)."""
    if DEVICE == "cpu":
        from tests.interpreter import exact_bfloat16

        exact_bfloat16(monkeypatch)
    rows = {"forward": 4, "backward": 4, "decode": 2}

    def small(direction: str, wide: bool, width: int) -> Launch:
        return Launch(width, 16 if DEVICE == "cuda" else rows[direction], 16, 4, 2)

    monkeypatch.setattr(launcher, "launch_of", small)
    monkeypatch.setattr(launcher, "DECODE_ROWS", 1)
    monkeypatch.setattr(launcher, "FINISH_BLOCK", 2)


class Case(NamedTuple):
    """What a call gets: `weights` and `coefficients` have 0 (none), 1 (a number each) or 2 (per channel) dimensions."""

    weights: int = 1
    scalar_map: str = "softmax2"
    own: int = 0
    past: int = 0
    ahead: int = 0
    inner: bool = False
    addends: int = 0
    coefficients: int = 0
    norm: bool = True
    save_branch: bool | None = None
    scale: float = 1.0
    rows: int = 7
    dim: int = 37


FAMILIES = {
    "plain": Case(weights=0),
    "plain_no_norm": Case(weights=0, norm=False),
    "weights": Case(scale=0.7),
    "per_channel": Case(weights=2),
    "low_rank": Case(weights=0, own=5),
    "weights_low_rank": Case(own=5),
    "no_norm": Case(own=5, norm=False),
    "scale": Case(weights=0, own=5, scale=0.7),
    "per_channel_low_rank": Case(weights=2, own=5),
    "branch_kept": Case(own=5, save_branch=True),
    "branch_kept_per_channel": Case(weights=2, own=5, save_branch=True),
    "raw_scalars": Case(scalar_map="none", own=5),
    "rank_1": Case(own=1),
    "rank_17": Case(own=17),
    "ahead": Case(own=3, ahead=4),
    "ahead_only": Case(ahead=4),
    "past": Case(own=3, past=4),
    "past_only": Case(past=4),
    "past_only_ahead": Case(past=4, ahead=3),
    "past_and_ahead": Case(own=3, past=4, ahead=5, scale=0.7),
    "per_channel_past": Case(weights=2, own=3, past=4, ahead=2),
    "inner_norm": Case(own=5, inner=True),
    "inner_norm_past": Case(own=3, past=4, ahead=2, inner=True, scale=0.7),
    "inner_norm_past_only": Case(past=4, inner=True),
    "inner_norm_per_channel": Case(weights=2, own=5, inner=True),
    "inner_norm_branch_kept": Case(own=5, inner=True, save_branch=True),
    "gemma": Case(weights=0, own=5, inner=True, addends=1, scale=2**-0.5),
    "scale_0": Case(weights=0, own=5, inner=True, scale=0.0, norm=False),
    "addends": Case(addends=2),
    "four_addends_with_coefficients": Case(addends=4, coefficients=1, own=5, scale=0.7),
    "coefficients_alone": Case(weights=0, addends=3, coefficients=1),
    "per_channel_coefficients": Case(addends=2, coefficients=2, own=5),
    "per_channel_coefficients_alone": Case(weights=0, addends=1, coefficients=2, norm=False),
    "per_channel_both": Case(weights=2, addends=2, coefficients=2, own=3, past=2),
    "per_channel_weights_alone": Case(weights=2, addends=2, coefficients=1),
    **{f"map_{name}": Case(scalar_map=name, own=2) for name in SCALAR_MAPS},
    **{f"map_{name}_per_channel": Case(weights=2, scalar_map=name) for name in SCALAR_MAPS},
}
MOST_MAPS = [f"map_{name}_per_channel" for name in SCALAR_MAPS if name != "sigmoid1"]
# In the interpreter one D chunk, no mask; and sizes below a tile.
SIZES = {
    "one_row": Case(own=3, rows=1),
    "few_channels": Case(own=3, dim=7),
    "one_chunk": Case(own=16, rows=8, dim=16),
    "one_channel": Case(own=1, dim=1),
    "one_row_inner_norm": Case(own=3, inner=True, rows=1),
    "one_row_plain": Case(weights=0, rows=1),
}


def make(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of laurel_residual but impl."""
    c = case

    def random(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape).to(DEVICE, of)

    given: dict[str, Any] = {"scalar_map": c.scalar_map, "scale": c.scale, "save_branch": c.save_branch}
    given["branch"], given["x"] = random(c.rows, c.dim), random(c.rows, c.dim)
    if c.weights:
        count = SCALAR_MAPS[c.scalar_map]
        given["weights"] = random(count, *(c.weights - 1) * (c.dim,), of=torch.float32)
    if c.own + c.ahead:
        given["down"] = random(c.dim, c.own + c.ahead) / c.dim**0.5
    if c.own + c.past:
        given["up"] = random(c.own + c.past, c.dim)
    if c.past:
        given["past"] = random(c.rows, c.past)
    if c.inner:
        given["low_rank_norm"] = random(c.dim)
    if c.addends:
        given["addends"] = [random(c.rows, c.dim) for _ in range(c.addends)]
    if c.coefficients:
        given["addend_weights"] = random(c.addends, *(c.coefficients - 1) * (c.dim,), of=torch.float32)
    if c.norm:
        given["norm_weight"] = random(c.dim)
    return given


def run(impl: str, given: dict[str, Any], dtype: torch.dtype | None, **grads: Tensor) -> dict[str, Tensor]:
    """Results and gradients by name, from copies of the inputs in `dtype` (None: as they are)."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(dtype or t.dtype, copy=True).requires_grad_()

    copies = {k: leaf(v) if isinstance(v, Tensor) else v for k, v in given.items()}
    if "addends" in copies:
        copies["addends"] = [leaf(e) for e in copies["addends"]]
    branch, x = copies.pop("branch"), copies.pop("x")
    results = {k: v for k, v in laurel_residual(branch, x, impl=impl, **copies)._asdict().items() if v is not None}
    inputs = {"branch": branch, "x": x, **{k: v for k, v in copies.items() if isinstance(v, Tensor)}}
    inputs |= {f"addends[{j}]": e for j, e in enumerate(copies.get("addends", []))}
    used = [name for name in results if name in grads]
    found = torch.autograd.grad(
        [results[name] for name in used], list(inputs.values()), [grads[name].to(results[name].dtype) for name in used],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return {**results, **{f"grad of {name}": g for name, g in zip(inputs, found)}}


def check(case: Case, dtype: torch.dtype, without: tuple[str, ...] = ()) -> None:
    given = make(case, dtype)
    ahead = case.ahead if case.own + case.past else case.own + case.ahead
    sizes = {"y": case.dim, "normed": case.dim if case.norm else 0, "ahead": ahead}
    grads = {k: torch.randn(case.rows, n, device=DEVICE).to(dtype) for k, n in sizes.items() if n and k not in without}
    ours, eager = (run(impl, given, None, **grads) for impl in ("triton", "reference"))
    truth = run("reference", given, torch.float64, **grads)
    assert ours.keys() == eager.keys() == truth.keys()
    # Gradients of scalars are sums over tokens that cancel: held to one unit of what is summed, |g| |f| + |g| |x|.
    summed = sum(truth[f"grad of {t}"].norm() * given[t].double().norm() for t in ("branch", "x")).item()
    for name, exact in truth.items():
        # beta g is rounded before dU A^T joins: measured up to 2.2 units in float32.
        ulps = 4.0
        if name in ("grad of weights", "grad of addend_weights"):
            units = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
            ulps = max(ulps, units * summed / max(exact.norm().item(), 1e-30))
        try:
            assert_as_good_as_eager(ours[name], eager[name], exact, ulps=ulps)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("name", [pytest.param(n, marks=BULK if n in MOST_MAPS else ()) for n in FAMILIES])
def test_every_family(name):
    check(FAMILIES[name], torch.float32)


# In the default run those that round most differently.
ROUNDED = ("weights_low_rank", "per_channel_both", "past_and_ahead", "gemma", "raw_scalars")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ROUNDED else BULK) for n in FAMILIES])
def test_every_family_in_bfloat16(name):
    check(FAMILIES[name], torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name, dtype):
    """One row takes the table for decoding."""
    check(SIZES[name], dtype)


@pytest.mark.parametrize("without", [("y",), ("normed",), ("y", "normed"), ("ahead",)], ids="-".join)
def test_results_without_a_gradient(without):
    check(Case(own=3, past=4, ahead=2), torch.float32, without)


@pytest.mark.parametrize("inner", [False, True])
def test_two_kernels(inner, monkeypatch):
    """x A by torch.mm in forward, and dU A^T in backward: where the columns of A are too many for a tile."""
    monkeypatch.setattr(launcher, "ONE_KERNEL", 0)
    check(Case(own=3, past=4, ahead=2, inner=inner), torch.float32)
    check(Case(own=3, inner=inner, addends=1, coefficients=1), torch.float32)
    check(Case(ahead=4), torch.float32)


def test_half():
    """Its alpha g may be too small for the product that gives the gradient of B."""
    check(Case(own=3), torch.float16)


def test_no_rows():
    for name in ("per_channel_both", "gemma", "four_addends_with_coefficients", "past_and_ahead"):
        given = make(FAMILIES[name]._replace(rows=0), torch.float32)
        got = run("triton", given, None, y=torch.zeros(0, 37, device=DEVICE))
        for key, exact in run("reference", given, None, y=torch.zeros(0, 37, device=DEVICE)).items():
            assert torch.equal(got[key], exact), (name, key)


def test_layouts():
    """Transposed matrices of a Linear, wider rows of x and of the branch, scalars in float64, a strided norm weight."""
    given = make(Case(own=5, ahead=2, addends=1, coefficients=1), torch.float32)
    grads = {"y": torch.randn(7, 37, device=DEVICE), "normed": torch.randn(7, 37, device=DEVICE)}
    plain = run("triton", given, None, **grads)
    wide = torch.full((2, 7, 48), torch.nan, device=DEVICE)
    wide[:, :, :37] = torch.stack([given["branch"], given["x"]])
    problem = [
        wide[0, :, :37], wide[1, :, :37], given["weights"].double(), given["down"].t().contiguous().t(),
        given["up"].t().contiguous().t(), None, None, [e.contiguous() for e in given["addends"]],
        given["addend_weights"].double(), given["norm_weight"].repeat_interleave(2)[::2], "softmax2", 1.0, 1e-6, 1e-6,
        "triton",
    ]  # fmt: skip
    y, normed, own, rstd = torch.ops.effkern.laurel_fwd(*problem)
    found = torch.ops.effkern.laurel_bwd(None, *problem[1:], y, own, rstd, grads["y"], grads["normed"], None)
    assert torch.equal(y, plain["y"])
    assert torch.equal(normed, plain["normed"])
    names = {0: "branch", 1: "x", 2: "weights", 3: "down", 4: "up", 7: "addend_weights", 8: "norm_weight"}
    for i, name in names.items():
        torch.testing.assert_close(found[i].float(), plain[f"grad of {name}"], rtol=1e-5, atol=1e-5)


def test_same_bits_every_time():
    given = make(FAMILIES["per_channel_both"], torch.float32)
    grads = {"y": torch.randn(7, 37, device=DEVICE)}
    first, second = (run("triton", given, None, **grads) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tables_serve_every_width():
    from effkern.ops.laurel import triton_launch
    from effkern.ops.laurel.checks import TRITON_RANK

    assert [triton_launch.padded(n) for n in (0, 1, 16, 17, 192)] == [0, 16, 16, 32, 256]
    for table in triton_launch.TABLES.values():
        limits = [launch.limit for launch in table]
        assert limits == sorted(limits)
        assert limits[0] == 0
        assert limits[-1] >= TRITON_RANK


def test_what_is_not_covered():
    """Named, it is said; under "auto" it is the reference's."""
    case = Case(weights=0, addends=5, norm=False)
    given = make(case, torch.float32)
    message = r"laurel_residual: impl='triton' takes at most 4 addends, got 5"
    with pytest.raises(NotImplementedError, match=message):
        laurel_residual(**given, impl="triton")
    assert choose("auto", given["x"], None, given["addends"]) in OTHERS
    given = make(Case(), torch.float64)
    with pytest.raises(NotImplementedError, match=r"takes float32, bfloat16 and float16, got torch.float64"):
        laurel_residual(**given, impl="triton")
    assert choose("auto", given["x"], None, ()) == "reference"
    given = make(Case(past=257, norm=False), torch.float32)
    with pytest.raises(NotImplementedError, match=r"takes up with at most 256 rows, got 257"):
        laurel_residual(**given, impl="triton")
    assert choose("auto", given["x"], given["up"], ()) in OTHERS


def test_auto_interprets_nothing():
    """On a CPU the interpreter is for those who ask for it."""
    assert choose("auto", torch.zeros(1, 1), None, ()) in ("cpp", "reference")
    assert choose("triton", torch.zeros(1, 1, device=DEVICE), None, ()) == "triton"
