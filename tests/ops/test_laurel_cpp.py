"""The passes of effkern._C alone: each result against the plain passes in float64, on the same inputs.

What the public op makes of them is in test_laurel.py.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from effkern import native
from effkern.ops.distill import gemm_schema
from effkern.ops.laurel import chunks, driver, numbers, scalars
from effkern.ops.laurel import schema as schema
from effkern.ops.laurel.passes import BackwardPass, ForwardPass
from tests.numerics import assert_as_good_as_eager
from tests.ops import laurel_cases as cases

pytestmark = pytest.mark.skipif(native.load("_C") is not None, reason=str(native.load("_C")))

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
FORWARD = ("y_ND", "own_NS", "normed_ND", "rstd_N")
BACKWARD = ("grad_branch_ND", "grad_x_ND", "grad_addends", "sums", "grad_norm_weight", "grad_down_DS", "grad_up_RD",
            "grad_gram_RR", "grad_past_NP")  # fmt: skip
PRODUCTS = ("grad_down_DS[0]", "grad_up_RD[0]", "grad_gram_RR[0]")
Given = tuple[ForwardPass, BackwardPass]


def prepare(name: str, rows: int, dim: int, dtype: torch.dtype) -> Given:
    """What the driver hands to the passes for a case of laurel_cases."""
    kw = cases.to(cases.make(name, rows=(rows,), dim=dim, dtype=dtype), dtype)
    given: list[Any] = []

    def keep_forward(p: ForwardPass) -> None:
        given.append(p)
        chunks.forward(p)

    def keep_backward(p: BackwardPass) -> None:
        given.append(p)

    passes = chunks.PASSES._replace(forward=keep_forward, backward=keep_backward)
    plain = {k: v.detach() if isinstance(v, Tensor) else v for k, v in kw.items()}
    map_, scale = plain.get("scalar_map", "softmax2"), plain.get("scale", 1.0)
    wide = {k: v.float() if isinstance(v, Tensor) else v for k, v in plain.items() if "weight" in k}
    problem = driver.Problem(
        plain["branch"], plain["x"], wide.get("weights"), plain.get("down"), plain.get("up"), plain.get("past"),
        plain.get("low_rank_norm"), tuple(e.detach() for e in plain.get("addends", ())), wide.get("addend_weights"),
        wide.get("norm_weight"), map_, scale, plain.get("low_rank_eps", 1e-6), plain.get("norm_eps", 1e-6),
    )  # fmt: skip
    r = driver.forward(problem, passes)
    used = 0 if problem.up_RD is None else problem.up_RD.shape[0]
    later = problem.down_DS is not None and r.own_NS is not None and problem.down_DS.shape[1] > used
    driver.backward(
        problem if plain.get("save_branch") else problem._replace(branch_ND=None),
        r, torch.randn_like(r.y_ND), None if r.normed_ND is None else torch.randn_like(r.y_ND),
        torch.randn_like(r.own_NS) if later and r.own_NS is not None else None, passes,
    )  # fmt: skip
    forward, backward = given
    return forward, backward


def fresh(p: Any, outputs: tuple[str, ...], wide: bool = False) -> Any:
    """The same inputs, in float64 if `wide`, and results of their own, full of NaN."""

    def one(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(name, v) for v in value)
        if not isinstance(value, Tensor):
            return value
        if name in outputs:
            value = torch.full_like(value, float("nan"))
        return value.double() if wide else value.clone(memory_format=torch.preserve_format)

    return type(p)(*(one(n, v) for n, v in zip(p._fields, p)))


def results(p: Any, outputs: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    for name in outputs:
        value = getattr(p, name)
        for j, t in enumerate(value if isinstance(value, tuple) else (value,)):
            if t is not None:
                yield f"{name}[{j}]", t


def call(p: Any, implementation: str, wide: bool = False) -> Any:
    from effkern.ops.laurel import cpp

    forward = isinstance(p, ForwardPass)
    p = fresh(p, FORWARD if forward else BACKWARD, wide)
    module: Any = cpp if implementation == "cpp" else chunks
    (module.forward if forward else module.backward)(p)
    return p


def check(given: Given) -> None:
    for p, outputs in zip(given, (FORWARD, BACKWARD)):
        fast, eager, truth = call(p, "cpp"), call(p, "reference"), call(p, "reference", wide=True)
        named = dict(results(eager, outputs)), dict(results(truth, outputs))
        for name, value in results(fast, outputs):
            if value.numel() == 0:
                continue
            try:
                if name == "sums[0]":
                    sums_are_close(value, named[1][name], truth)
                else:
                    # Products of g, which is rounded to the type of x: with one row eager may be exact by luck.
                    operands = p.x_ND.dtype if name in PRODUCTS and p.x_ND.shape[0] == 1 else value.dtype
                    ulps = max(4.0, torch.finfo(operands).eps / torch.finfo(value.dtype).eps)
                    assert_as_good_as_eager(value, named[0][name], named[1][name], ulps=ulps)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


def sums_are_close(fast: Tensor, truth: Tensor, p: BackwardPass) -> None:
    """Terms of both signs may cancel, and so do those of g: the bound is some float32 roundings of their sizes."""
    g = p.grad_branch_ND / p.alpha
    size_of_g = g.square() + g.square().mean(1, keepdim=True)
    kept = p.y_ND if p.branch_ND is None else p.branch_ND
    for j, other in enumerate((kept, p.x_ND, *p.addends)):
        if other is None:
            continue
        columns = (size_of_g * other.square()).sum(0)
        size = (columns if truth.shape[1] > 1 else columns.sum(0, keepdim=True)).sqrt()
        assert ((fast[j] - truth[j]).abs() <= 8 * torch.finfo(torch.float32).eps * size).all(), j


@pytest.mark.parametrize("name", cases.CASES)
@DTYPE
def test_every_case(dtype, name):
    check(prepare(name, 45, 40, dtype))


# One row; widths below, at and over one group of lanes, over one block of 512, a real one; several chunks and groups.
@pytest.mark.parametrize(
    ("rows", "dim"), [(1, 7), (1, 768), (2, 32), (17, 33), (16, 513), (33, 2048), (700, 768), (520, 515)]
)
@pytest.mark.parametrize("name", ["everything", "rw+lr", "normed", "gemma"])
@DTYPE
def test_sizes(dtype, name, rows, dim):
    check(prepare(name, rows, dim, dtype))


@DTYPE
def test_one_channel(dtype):
    check(prepare("rw per channel", 19, 1, dtype))


@pytest.mark.parametrize("name", ["everything", "normed", "look ahead"])
def test_no_rows(name):
    for p, outputs in zip(prepare(name, 0, 24, torch.float32), (FORWARD, BACKWARD)):
        for key, value in results(call(p, "cpp"), outputs):
            assert value.numel() == 0 or not value.any(), key


@pytest.mark.parametrize("name", ["everything", "rw+lr", "normed"])
@DTYPE
def test_bits_do_not_depend_on_threads(dtype, name):
    """Large enough for several chunks, inside of which the library multiplies on one thread."""
    given = prepare(name, 900, 530, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        truth = [call(p, "cpp") for p in given]
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            for p, one, outputs in zip(given, truth, (FORWARD, BACKWARD)):
                named = dict(results(one, outputs))
                for key, value in results(call(p, "cpp"), outputs):
                    assert torch.equal(value, named[key]), (key, count)
    finally:
        torch.set_num_threads(threads)


def spread(x: Any, gap: int) -> Any:
    """The same values with rows that lie apart."""
    if not isinstance(x, Tensor) or x.dim() != 2:
        return x
    wide = torch.full((x.shape[0], x.shape[1] + gap), float("nan"), dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@DTYPE
def test_rows_apart(dtype):
    """Row strides of every [N, .] operand are honoured, and nothing beside the rows is written."""
    packed = ("gram_RR", "grad_down_DS", "grad_up_RD", "grad_gram_RR")
    for p, outputs in zip(prepare("everything", 70, 40, dtype), (FORWARD, BACKWARD)):
        truth = dict(results(call(p, "cpp"), outputs))

        def apart(name: str, value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(apart(name, v) for v in value)
            return value if name in packed else spread(value, 5)

        other = fresh(p, outputs)
        other = type(p)(*(apart(n, v) for n, v in zip(p._fields, other)))
        from effkern.ops.laurel import cpp

        (cpp.forward if isinstance(p, ForwardPass) else cpp.backward)(other)
        for key, value in results(other, outputs):
            assert torch.equal(value, truth[key]), key
            if value.dim() == 2 and value.stride(0) > value.shape[1]:
                beside = value.as_strided((value.shape[0] - 1, 5), (value.stride(0), 1), value.shape[1])
                assert beside.isnan().all(), key


@DTYPE
def test_transposed_matrices(dtype):
    """nn.Linear's weight is the transpose of ours; it is taken as it lies."""
    forward, backward = prepare("rw+lr", 60, 48, dtype)
    for p in (forward, backward):
        assert p.down_DS is not None
        assert p.up_RD is not None
    turned = [p._replace(down_DS=p.down_DS.t().contiguous().t(), up_RD=p.up_RD.t().contiguous().t())
              for p in (forward, backward)]  # fmt: skip
    assert turned[0].down_DS.stride(0) == 1
    check((turned[0], turned[1]))


@pytest.mark.parametrize("kernel", gemm_schema.KERNELS[:-1])
def test_bfloat16_kernels(kernel):
    before = gemm_schema.kernel()
    if before == "none" or gemm_schema.KERNELS.index(kernel) < gemm_schema.KERNELS.index(before):
        pytest.skip(f"this CPU cannot run {kernel}")
    gemm_schema.choose(kernel)
    try:
        check(prepare("everything", 520, 96, torch.bfloat16))
    finally:
        gemm_schema.choose(before)


@DTYPE
def test_what_is_not_finite_stays_in_its_row(dtype):
    # An even rank: torch.mm in bfloat16 on AMX lets a NaN into the row before it where the inner size is odd.
    forward, backward = prepare("gemma", 40, 64, dtype)
    forward.x_ND[3, 5], forward.branch_ND[7, 60] = float("nan"), float("inf")
    truth = dict(results(call(forward, "reference", wide=True), FORWARD))
    for key, value in results(call(forward, "cpp"), FORWARD):
        assert torch.equal(value.isnan(), truth[key].isnan()), key
        assert torch.equal(value.isinf(), truth[key].isinf()), key
    assert backward.grad_normed_ND is not None
    assert backward.grad_y_ND is not None
    backward.grad_y_ND[3, 5], backward.grad_normed_ND[7, 60] = float("inf"), float("nan")
    truth = dict(results(call(backward, "reference", wide=True), BACKWARD))
    for key, value in results(call(backward, "cpp"), BACKWARD):
        assert torch.equal(value.isfinite(), truth[key].isfinite()), key


def test_the_gradient_of_a_bfloat16_matrix_is_rounded_once():
    _, backward = prepare("everything", 300, 40, torch.bfloat16)
    wide = call(backward, "cpp").grad_down_DS
    rounded = call(backward._replace(grad_down_DS=wide.bfloat16()), "cpp").grad_down_DS
    assert wide.dtype == torch.float32
    assert torch.equal(rounded, wide.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [7, 96, 1300])  # below a group of lanes, whole groups, several blocks and a rest
def test_what_surrounds_the_passes(dtype, of, dim):
    from effkern.ops.laurel import cpp

    up, inner, beta = torch.randn(5, dim).to(of), torch.randn(dim), torch.randn(dim)
    grads = torch.randn(5, dim)
    for factor in (beta, beta[:1]):
        for weight in (None, inner):
            got = cpp.scaled_up(up, weight, factor, dtype)
            assert got.dtype == dtype
            assert torch.equal(got, chunks.scaled_up(up, weight, factor, dtype))
        for columns in (1, dim):
            grad_up, of_scaled = cpp.up_grads(up, grads, factor, columns)
            wide_sums = chunks.up_grads(up.double(), grads.double(), factor.double(), columns)[1]
            assert torch.equal(grad_up, (grads * factor).to(of))
            assert_as_good_as_eager(
                of_scaled.float(), chunks.up_grads(up, grads, factor, columns)[1].float(), wide_sums, ulps=4.0
            )


def test_a_strided_up_matrix_and_no_rows():
    from effkern.ops.laurel import cpp

    up, beta = torch.randn(64, 6).t(), torch.tensor([0.5])
    assert torch.equal(cpp.scaled_up(up, None, beta, torch.float32), up * 0.5)
    grad_up, of_scaled = cpp.up_grads(up[:0], torch.randn(0, 64), beta, 1)
    assert grad_up.shape == (0, 64)
    assert of_scaled.item() == 0.0
    _, backward = prepare("everything", 300, 40, torch.float32)
    none = backward._replace(
        **{name: value[:0] for name, value in backward._asdict().items()
           if isinstance(value, Tensor) and value.shape[:1] == (300,)},
        addends=tuple(e[:0] for e in backward.addends), grad_addends=tuple(e[:0] for e in backward.grad_addends),
    )  # fmt: skip
    for name in ("sums", "grad_norm_weight", "grad_down_DS", "grad_up_RD", "grad_gram_RR"):
        assert getattr(call(none, "cpp"), name).count_nonzero() == 0, name


@pytest.mark.parametrize("scalar_map", sorted(scalars.SCALAR_MAPS))
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])  # 1000: beyond the range of exp
def test_maps_of_plain_numbers(scalar_map, scale):
    raw = (scale * torch.randn(scalars.SCALAR_MAPS[scalar_map], dtype=torch.float64)).requires_grad_()
    alpha, beta = scalars.coefficients(raw, scalar_map)
    got = torch.tensor(numbers.coefficients(raw.tolist(), scalar_map), dtype=torch.float64)
    torch.testing.assert_close(got, torch.cat([alpha, beta]).detach(), rtol=1e-14, atol=1e-300)
    of_alpha, of_beta = torch.randn(2, dtype=torch.float64)
    want = scalars.gradient(raw.detach(), scalar_map, of_alpha[None], of_beta[None])
    got = torch.tensor(numbers.gradient(raw.tolist(), scalar_map, of_alpha.item(), of_beta.item()), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-300)
    assert all(n != n for n in numbers.coefficients([float("nan")] * len(raw), scalar_map))


def test_errors():
    from effkern.ops.laurel import cpp

    forward, backward = prepare("rw+lr", 20, 32, torch.float32)
    wrong = [
        (forward._replace(branch_ND=torch.zeros(20, 31)), r"operands must be \[N, D\] like x"),
        (forward._replace(branch_ND=torch.zeros(20, 32, dtype=torch.bfloat16)), r"operands must be \[N, D\] like x"),
        (forward._replace(x_ND=torch.zeros(20, 32).double()), "x must be .*float32 or bfloat16"),
        (forward._replace(x_ND=torch.zeros(32, 20).t()), "stride 1 along D"),
        (forward._replace(down_DS=torch.zeros(31, 3)), r"down must be \[D, S\]"),
        (forward._replace(alpha=torch.zeros(3)), r"alpha and beta must be packed float32 \[1\] or \[D\]"),
        (forward._replace(rstd_N=None), "normed and rstd come together"),
        (forward._replace(up_RD=torch.zeros(4, 32)), "up must have P to P . S rows"),
        (backward._replace(rstd_N=None), "grad_normed needs y, rstd"),
        (backward._replace(grad_down_DS=None), "come with own and with their gradients"),
        (backward._replace(sums=torch.zeros(2, 1)), r"sums must be float64 \[2 . addends, 1\]"),
        (backward._replace(grad_up_RD=torch.zeros(32, 3).t()), "must be contiguous float32"),
    ]
    for p, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            (cpp.forward if isinstance(p, ForwardPass) else cpp.backward)(p)
