"""The bfloat16 products of effkern._C with float32 results: against float64 on the same inputs."""

import ctypes
import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from effkern import native
from effkern.ops.distill import gemm, gemm_schema
from tests.numerics import rel_err

OPS = torch.ops.effkern
KERNELS = [name for name in gemm_schema.KERNELS if name != "none"]
# C rows, V vocabulary, D hidden size. The AVX-512 kernel computes 8 x 48 results; the depth goes in pairs and in blocks
# of 2048 (D, in bf16_mm_nt_) and 1024 (C, in bf16_add_tn_); a thread packs 32 * 8 columns of V at a time
# (bf16_add_tn_). The AMX kernel computes 32 x 32 results; the depth goes in steps of 32 and in blocks of 2048; a thread
# packs 4 * 32 lines of V at a time; in bf16_add_tn_ the order is another if hidden exceeds 1 MiB.
SHAPES = {
    "one": (1, 1, 1),
    "one_block": (8, 48, 32),
    "one_vector": (16, 16, 48),
    "tiles": (64, 256, 64),
    "beyond_a_tile": (17, 33, 65),
    "tails": (9, 49, 33),
    "odd": (7, 31, 5),
    "narrow": (3, 65, 2),
    "several_tiles": (17, 777, 51),
    "several_depths_of_logits": (10, 70, 2 * 2048 + 3),
    "several_depths_of_gradient": (2 * 1024 + 1, 70, 40),
    "large_hidden": (2 * 1024 + 1, 70, 300),
    "real_vocabulary": (24, 32000, 16),
}
EMPTY = {"no_rows": (0, 5, 4), "no_vocabulary": (3, 0, 4), "no_depth": (3, 5, 0)}


@pytest.fixture(autouse=True, params=KERNELS, ids=[f"cpp-{name}" for name in KERNELS])
def _kernel(request) -> Iterator[None]:
    if not gemm_schema.bf16_gemm():
        pytest.skip(native.load("_C") or "this CPU does not multiply bfloat16")
    before = gemm_schema.kernel()
    try:
        gemm_schema.choose(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).partition("\n")[0])
    assert gemm_schema.kernel() == request.param
    yield
    gemm_schema.choose(before)


def inputs(c: int, v: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [C, D], weight [V, D] and a gradient [C, V] that is the first half of float32 rows."""
    grad = torch.randn(c, v).view(torch.bfloat16)[:, :v]
    return torch.randn(c, d).bfloat16(), torch.randn(v, d).bfloat16(), grad.copy_(torch.randn(c, v))


def strided(rows: int, columns: int) -> Tensor:
    """float32, in a buffer with more columns; NaN."""
    return torch.full((rows, columns + 3), torch.nan)[:, :columns]


def check(out: Tensor, a: Tensor, b: Tensor, before: Tensor | None = None) -> None:
    """out = before + a b: each entry within the error bound of float32 sums in any order."""
    a, b = a.double(), b.double()
    truth, size = a @ b, a.abs() @ b.abs()
    if before is not None:
        truth, size = truth + before, size + before.abs()
    bound = (a.shape[1] + 2) * 2**-24 * size
    assert out.dtype == torch.float32
    assert ((out.double() - truth).abs() <= bound).all(), ((out.double() - truth).abs() - bound).max()


@pytest.mark.parametrize("shape", (SHAPES | EMPTY).values(), ids=(SHAPES | EMPTY).keys())
def test_logits(shape):
    hidden, weight, _ = inputs(*shape)
    out = strided(shape[0], shape[1])
    OPS.bf16_mm_nt_(out, hidden, weight)
    check(out, hidden, weight.t())
    # What lies behind the rows stays.
    assert out.as_strided((shape[0], 3), (shape[1] + 3, 1), shape[1]).isnan().all()


@pytest.mark.parametrize("shape", (SHAPES | EMPTY).values(), ids=(SHAPES | EMPTY).keys())
def test_weight_gradient(shape):
    hidden, _, grad = inputs(*shape)
    total = strided(shape[1], shape[2])
    OPS.bf16_add_tn_(total, grad, hidden, True)
    check(total, grad.t(), hidden)
    total.copy_(before := torch.randn(shape[1], shape[2]))
    OPS.bf16_add_tn_(total, grad, hidden, False)
    check(total, grad.t(), hidden, before.double())
    assert total.as_strided((shape[1], 3), (shape[2] + 3, 1), shape[2]).isnan().all()


def test_large_results():
    """From 8 MiB on the AMX kernel writes whole lines of 64 bytes past the caches; the last columns are none."""
    hidden, weight, grad = inputs(70, 32016, 80)
    out, total = torch.full((70, 32016), torch.nan), torch.full((32016, 80), torch.nan)
    OPS.bf16_mm_nt_(out, hidden, weight)
    check(out, hidden, weight.t())
    OPS.bf16_add_tn_(total, grad, hidden, True)
    check(total, grad.t(), hidden)


def test_sums_of_whole_numbers_are_exact():
    """Every product lands where it belongs: sums below 2^24 have no rounding."""
    hidden, weight, grad = (x.float().mul(3).round().bfloat16() for x in inputs(130, 299, 515))
    out, total = strided(130, 299), strided(299, 515)
    OPS.bf16_mm_nt_(out, hidden, weight)
    OPS.bf16_add_tn_(total, grad, hidden, True)
    assert torch.equal(out, hidden.float() @ weight.float().t())
    assert torch.equal(total, grad.float().t() @ hidden.float())
    OPS.bf16_add_tn_(total, grad, hidden, False)
    assert torch.equal(total, 2 * (grad.float().t() @ hidden.float()))


def test_strided_operands():
    """Rows of a wider matrix, and misaligned ones."""
    wide_a, wide_b, out = torch.randn(20, 77).bfloat16(), torch.randn(100, 99).bfloat16(), strided(20, 100)
    a, b = wide_a[:, 1:52], wide_b[:, 3:54]
    OPS.bf16_mm_nt_(out, a, b)
    check(out, a, b.t())
    total = strided(51, 50)
    OPS.bf16_add_tn_(total, a, wide_a[:, 27:], True)
    check(total, a.t(), wide_a[:, 27:])


@pytest.fixture
def guarded():
    """Makes copies that end where the mapped memory ends, so that a read or write behind them ends the process.

    The address sanitizer does not see masked loads and stores.
    """
    libc, regions = ctypes.CDLL(None, use_errno=True), []

    def copy(x: Tensor) -> Tensor:
        size = x.numel() * x.itemsize
        whole = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        region = mmap.mmap(-1, whole + mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(region))
        assert libc.mprotect(ctypes.c_void_p(start + whole), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        regions.append((start + whole, region))
        return torch.frombuffer(region, dtype=x.dtype, count=x.numel(), offset=whole - size).view(x.shape).copy_(x)

    yield copy
    for page, _ in regions:
        libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("name", ["one", "one_block", "tails", "odd", "narrow", "several_tiles"])
def test_nothing_behind_the_matrices_is_touched(name, guarded):
    c, v, d = SHAPES[name]
    hidden, weight, grad = map(guarded, inputs(c, v, d))
    out, total = guarded(torch.zeros(c, v)), guarded(torch.zeros(v, d))
    OPS.bf16_mm_nt_(out, hidden, weight)
    check(out, hidden, weight.t())
    for first in (True, False):
        OPS.bf16_add_tn_(total, grad, hidden, first)
    check(total / 2, grad.t(), hidden)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_values_that_are_not_finite_reach_their_entries_only(value):
    """Padding inside the kernel is zero, and 0 * inf would spread."""
    hidden, weight, grad = inputs(9, 50, 33)
    hidden[8, 32] = value
    out, total = strided(9, 50), strided(50, 33)
    OPS.bf16_mm_nt_(out, hidden, weight)
    OPS.bf16_add_tn_(total, grad, hidden, True)
    assert out[:8].isfinite().all()
    torch.testing.assert_close(out[8], weight[:, 32].float() * value, rtol=0, atol=0, equal_nan=True)
    assert total[:, :32].isfinite().all()
    torch.testing.assert_close(total[:, 32], grad[8].float() * value, rtol=0, atol=0, equal_nan=True)


def test_subnormal_numbers_count_as_zero():
    """As stated where the kernel is described."""
    tiny, one, out = torch.full((1, 2), 1e-39).bfloat16(), torch.ones(1, 2).bfloat16(), strided(1, 1)
    assert tiny[0, 0] != 0
    OPS.bf16_mm_nt_(out, tiny, one)
    assert out.item() == 0


def test_any_number_of_threads_gives_the_same_bits():
    hidden, weight, grad = inputs(100, 5003, 130)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out, total = strided(100, 5003), torch.ones(5003, 130)
            OPS.bf16_mm_nt_(out, hidden, weight)
            OPS.bf16_add_tn_(total, grad, hidden, False)
            results.append((out, total))
    finally:
        torch.set_num_threads(threads)
    for out, total in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(total, results[0][1])


def test_products_of_the_loss_are_the_kernels(monkeypatch):
    """gemm takes them where it may, and gives the library what they do not take."""
    hidden, weight, grad = inputs(40, 333, 24)
    out, total = strided(40, 333), torch.empty(333, 24)
    OPS.bf16_mm_nt_(out, hidden, weight)
    OPS.bf16_add_tn_(total, grad, hidden, True)
    for same in (hidden, hidden.t().contiguous().t()):
        assert torch.equal(gemm.logits(same, weight, None), out)
    got = torch.empty(333, 24)
    gemm.add_weight_grad(got, grad, hidden, first=True)
    assert torch.equal(got, total)

    columns = weight.t().contiguous().t()
    check(gemm.logits(hidden, columns, None), hidden, columns.t())
    monkeypatch.setattr(gemm_schema, "bf16_gemm", lambda: False)
    check(gemm.logits(hidden, weight, strided(64, 333)), hidden, weight.t())
    gemm.add_weight_grad(got, grad, hidden, first=True)
    # Rounded to bfloat16.
    torch.testing.assert_close(got, total, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_a_type_that_the_library_is_slow_in(dtype, monkeypatch):
    """Widened a tile of the vocabulary at a time, and rounded once."""
    monkeypatch.setattr(gemm_schema, "bf16_gemm", lambda: False)
    monkeypatch.setattr(gemm, "_onednn_supports", lambda dtype: False)
    hidden, weight, grad = (x.to(dtype) for x in inputs(20, 2 * gemm.CPU_TILE + 5, 24))
    check(gemm.logits(hidden, weight, None), hidden, weight.t())
    out = torch.empty(20, 24, dtype=dtype)
    gemm.hidden_grad(grad, weight, out)
    truth = grad.double() @ weight.double()
    assert rel_err(out, truth) < torch.finfo(dtype).eps / 2
    total = torch.empty(weight.shape[0], 24)
    gemm.add_weight_grad(total, grad, hidden, first=True)
    check(total, grad.t(), hidden)
    gemm.add_weight_grad(total, grad, hidden, first=False)
    check(total / 2, grad.t(), hidden)
    rounded = torch.empty(weight.shape[0], 24, dtype=dtype)
    gemm.add_weight_grad(rounded, grad, hidden, first=True)
    assert rel_err(rounded, grad.double().t() @ hidden.double()) < torch.finfo(dtype).eps / 2


def test_operator_contract():
    hidden, weight, grad = inputs(5, 49, 6)
    torch.library.opcheck(OPS.bf16_mm_nt_, (torch.zeros(5, 49), hidden, weight))
    torch.library.opcheck(OPS.bf16_add_tn_, (torch.zeros(49, 6), grad, hidden, False))


A, B, OUT = torch.zeros(3, 4).bfloat16(), torch.zeros(5, 4).bfloat16(), torch.zeros(3, 5)
G, H, TOTAL = torch.zeros(3, 5).bfloat16(), torch.zeros(3, 4).bfloat16(), torch.zeros(5, 4)
ERRORS = {
    "float": (lambda: OPS.bf16_mm_nt_(OUT, A.float(), B), "a [C, D] and b [V, D] must be bfloat16"),
    "depth": (lambda: OPS.bf16_mm_nt_(OUT, A, B[:, 1:]), "a [C, D] and b [V, D] must be bfloat16"),
    "columns": (lambda: OPS.bf16_mm_nt_(OUT, A, B.t().contiguous().t()), "stride 1 along D"),
    "out": (lambda: OPS.bf16_mm_nt_(OUT.t(), A, B), "out must be float32 [C, V]"),
    "out_dtype": (lambda: OPS.bf16_mm_nt_(OUT.double(), A, B), "out must be float32 [C, V]"),
    "rows": (lambda: OPS.bf16_add_tn_(TOTAL, G, H[:2], True), "g [C, V] and h [C, D] must be bfloat16"),
    "total": (lambda: OPS.bf16_add_tn_(TOTAL[:4], G, H, True), "total must be float32 [V, D]"),
    "total_stride": (lambda: OPS.bf16_add_tn_(torch.zeros(4, 5).t(), G, H, True), "stride 1 along D"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_argument_and_rule(call, message):
    with pytest.raises(RuntimeError) as caught:
        call()
    assert message in str(caught.value)
