"""The float32 product of effkern._C: against float64 on the same inputs, and where the loss takes it."""

import pytest
import torch

from effkern import native
from effkern.ops.distill import gemm, gemm_schema
from tests.ops.test_gemm_bf16 import EMPTY, SHAPES, check, guarded, strided

__all__ = ["guarded"]

OP = torch.ops.effkern.f32_mm_nt_


@pytest.fixture(autouse=True)
def _kernel():
    if not gemm_schema.bf16_gemm():
        pytest.skip(native.load("_C") or "this CPU does not multiply bfloat16")


@pytest.mark.parametrize("shape", (SHAPES | EMPTY).values(), ids=(SHAPES | EMPTY).keys())
def test_logits(shape):
    c, v, d = shape
    hidden, weight, out = torch.randn(c, d), torch.randn(v, d), strided(c, v)
    OP(out, hidden, weight)
    check(out, hidden, weight.t())
    # What lies behind the rows stays.
    assert out.as_strided((c, 3), (v + 3, 1), v).isnan().all()


def test_strided_operands_and_subnormal_numbers():
    wide_a, wide_b, out = torch.randn(20, 77), torch.randn(100, 99), strided(20, 100)
    OP(out, wide_a[:, 1:52], wide_b[:, 3:54])
    check(out, wide_a[:, 1:52], wide_b[:, 3:54].t())
    tiny, out = torch.full((1, 2), 1e-39), strided(1, 1)
    OP(out, tiny, torch.ones(1, 2))
    assert out.item() == tiny.sum().item() > 0


@pytest.mark.parametrize("name", ["one", "one_block", "tails", "odd", "narrow", "several_tiles"])
def test_nothing_behind_the_matrices_is_touched(name, guarded):
    c, v, d = SHAPES[name]
    hidden, weight, out = guarded(torch.randn(c, d)), guarded(torch.randn(v, d)), guarded(torch.zeros(c, v))
    OP(out, hidden, weight)
    check(out, hidden, weight.t())


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_values_that_are_not_finite_reach_their_rows_only(value):
    hidden, weight, out = torch.randn(9, 33), torch.randn(50, 33), strided(9, 50)
    hidden[8, 32] = value
    OP(out, hidden, weight)
    assert out[:8].isfinite().all()
    torch.testing.assert_close(out[8], weight[:, 32] * value, rtol=0, atol=0, equal_nan=True)


def test_wrong_operands_are_refused():
    a, b, out = torch.randn(3, 4), torch.randn(5, 4), torch.empty(3, 5)
    for wrong in ((out, a.double(), b), (out, a, b[:, :3]), (out.t(), a, b), (out.bfloat16(), a, b), (out, a, b[0])):
        with pytest.raises(RuntimeError, match="f32_mm_nt_"):
            OP(*wrong)


def test_any_number_of_threads_gives_the_same_bits():
    hidden, weight, results = torch.randn(100, 130), torch.randn(5003, 130), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            OP(out := strided(100, 5003), hidden, weight)
            results.append(out)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(out, results[0]) for out in results[1:])


def test_logits_reuse_their_buffer_at_the_highest_precision_only():
    hidden, weight, buffer = torch.randn(9, 33), torch.randn(50, 33), torch.empty(16, 50)
    before = torch.get_float32_matmul_precision()
    try:
        assert gemm.logits(hidden, weight, buffer).data_ptr() == buffer.data_ptr()
        torch.set_float32_matmul_precision("medium")
        assert not gemm.uses_f32_kernel(hidden)
    finally:
        torch.set_float32_matmul_precision(before)


def test_logits_of_operands_that_the_kernel_does_not_take():
    """Columns in memory, and a buffer of which every other column is asked for."""
    hidden, weight = torch.randn(33, 9).t(), torch.randn(33, 50).t()
    check(gemm.logits(hidden, weight, None), hidden, weight.t())
    out = torch.full((9, 100), torch.nan)
    check(gemm.logits(hidden, weight.contiguous(), out[:, ::2]), hidden, weight.t())
    assert out[:, 1::2].isnan().all()
