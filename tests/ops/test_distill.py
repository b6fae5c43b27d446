"""Values and gradients of linear_distill_loss: every implementation against the float64 reference."""

from dataclasses import replace

import pytest
import torch

from effkern import TeacherHidden, TeacherLogits, linear_distill_loss
from effkern.ops.distill.rows import RowOptions
from tests.numerics import assert_as_good_as_eager, rel_err
from tests.ops import distill_cases as cases

IMPLEMENTATIONS = cases.implementations()
IMPL = pytest.mark.parametrize("impl", IMPLEMENTATIONS)

# The interpreter rounds float32 to bfloat16 by cutting, which doubles the rounding error of each gradient entry.
BFLOAT16_FACTOR = {"triton": 3.0}


def check(case: cases.Case, impl: str, grad: float = 1.0, factor: float = 2.0, **overrides) -> None:
    # Eight units of rounding (1e-6 in float32): with few entries eager is often exact by luck.
    truth = cases.oracle(cases.to(case, dtype=torch.float64), grad)
    eager = cases.oracle(case, grad)
    fast = cases.ours(case, impl, grad, **overrides)
    assert len(fast) == len(truth)
    for name, f, e, t in zip(("loss", "hidden", "weight", "bias"), fast, eager, truth):
        try:
            assert_as_good_as_eager(f, e, t, factor=factor, ulps=8)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


# One shape per code path: below one lane group, one lane group exactly, one over, one block, one over, several.
@pytest.mark.parametrize("vocab", [2, 31, 32, 33, 1024, 1025, 3001])
@IMPL
def test_vocabulary_sizes(impl, vocab):
    check(cases.make(rows=6, vocab=vocab), impl)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.25},
        {"temperature": 4.0, "teacher_temperature": 4.0},
        {"temperature": 2.0, "teacher_temperature": 0.25},
        {"label_smoothing": 0.1},
        {"z_loss": 0.01},
        {"softcap": 2.0},
        {"logit_scale": 0.7},
        {"softcap": 5.0, "logit_scale": 1.5, "z_loss": 1e-3, "label_smoothing": 0.2, "temperature": 2.0},
        {"ignore_index": 7},
    ],
    ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()),
)
@pytest.mark.parametrize("teacher", [True, False], ids=["teacher", "hard"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@IMPL
def test_options(impl, options, teacher, bias):
    check(cases.make(teacher=teacher, bias=bias, weights=True, spread=2.0, **options), impl)


@pytest.mark.parametrize("omega", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@IMPL
def test_reductions_and_grad_output(impl, omega, reduction):
    case = replace(cases.make(omega=omega, weights=True), reduction=reduction)
    check(case, impl, grad=2.5)
    if reduction == "mean":
        check(replace(case, denom=77.0), impl)


@IMPL
def test_omega_per_token(impl):
    case = cases.make()
    case.omega = torch.rand(13, device=cases.DEVICE)
    check(case, impl)
    scalar = torch.tensor(0.25, device=cases.DEVICE)
    for a, b in zip(cases.ours(replace(case, omega=scalar), impl), cases.ours(replace(case, omega=0.25), impl)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@IMPL
def test_half_precision(impl, dtype):
    if impl == "cpp" and dtype == torch.float16:
        with pytest.raises(NotImplementedError, match=r"impl='cpp' does not cover float16 tensors"):
            cases.ours(cases.make(dtype=dtype), impl)
        return
    check(cases.make(dtype=dtype, vocab=700, bias=True), impl, factor=BFLOAT16_FACTOR.get(impl, 2.0))


@IMPL
def test_bfloat16_teacher_of_float32_student(impl):
    case = cases.make(vocab=1100)
    case.teacher = case.teacher.bfloat16()
    check(case, impl)


@IMPL
def test_float32_logits_in_bfloat16(impl):
    """Models that nearly agree: bf16 logits would ruin the gradient (design.md), float32 ones must not."""
    case = cases.make(rows=8, dim=64, vocab=1500, dtype=torch.bfloat16, spread=4.0, omega=1.0, ignored=0)
    wide = cases.to(case, dtype=torch.float64)
    case.teacher = (wide.hidden @ wide.weight.t()).float() + 0.05 * torch.randn(8, 1500, device=cases.DEVICE)
    truth = cases.oracle(cases.to(case, dtype=torch.float64))
    fast, eager = cases.ours(case, impl), cases.oracle(case)
    assert rel_err(fast[1], truth[1]) < 0.02
    assert rel_err(eager[1], truth[1]) > 0.1


@pytest.mark.parametrize("bias", [True, False])
@IMPL
def test_teacher_hidden(impl, bias):
    """Another hidden size, padded differently, with scale and softcap of its own."""
    case = replace(cases.make(vocab=60), vocab_valid=50)
    case.labels = torch.where(case.labels >= 50, 3, case.labels)
    hidden, weight = torch.randn(13, 10, device=cases.DEVICE), torch.randn(57, 10, device=cases.DEVICE)
    b = torch.randn(57, device=cases.DEVICE) if bias else None
    wide = hidden.double() @ weight.double().t() + (0 if b is None else b.double())
    u = 3.0 * torch.tanh(1.3 * wide / 3.0)
    truth = cases.oracle(cases.to(replace(case, teacher=u), dtype=torch.float64))
    eager = cases.oracle(replace(case, teacher=u.float()))
    fast = cases.ours(case, impl, teacher=TeacherHidden(hidden, weight, b, softcap=3.0, logit_scale=1.3))
    for f, e, t in zip(fast, eager, truth):
        assert_as_good_as_eager(f, e, t, ulps=8)


@IMPL
def test_padded_vocabulary_takes_no_part(impl):
    """Rows of `weight` beyond vocab_valid may hold anything, and get exact zeros."""
    case = replace(cases.make(vocab=60, bias=True), vocab_valid=50)
    case.labels = torch.where(case.labels >= 50, 3, case.labels)
    case.weight[50:] = float("nan")
    case.teacher[:, 50:] = float("inf")
    small = replace(case, weight=case.weight[:50], teacher=case.teacher[:, :50], bias=case.bias[:50], vocab_valid=None)
    padded, plain = cases.ours(case, impl), cases.ours(small, impl)
    assert torch.equal(padded[0], plain[0])
    assert torch.equal(padded[2][:50], plain[2])
    assert padded[2][50:].eq(0).all()
    assert padded[3][50:].eq(0).all()


@IMPL
def test_chunk_size_does_not_matter(impl):
    """One row per chunk, a ragged last chunk, all in one: same loss bits per row, gradients to rounding."""
    case = replace(cases.make(rows=13, vocab=200, bias=True), reduction="sum")
    whole = cases.ours(case, impl, chunk_bytes=1 << 30)
    truth = cases.oracle(cases.to(case, dtype=torch.float64))
    for rows in (1, 5, 12):
        parts = cases.ours(case, impl, chunk_bytes=rows * 800)
        for p, w, t in zip(parts, whole, truth):
            assert_as_good_as_eager(p, w, t, ulps=4)


@IMPL
def test_strided_inputs(impl):
    case = cases.make(rows=9, dim=20, vocab=70)
    wide = {
        "hidden": torch.randn(20, 9, device=cases.DEVICE).t(),
        "weight": torch.randn(140, 20, device=cases.DEVICE)[::2],
        "teacher": torch.randn(9, 96, device=cases.DEVICE)[:, 5:75],
    }
    strided = replace(case, **wide)
    packed = replace(case, **{k: v.contiguous() for k, v in wide.items()})
    truth = cases.oracle(cases.to(packed, dtype=torch.float64))
    for s, p, t in zip(cases.ours(strided, impl), cases.ours(packed, impl), truth):
        assert_as_good_as_eager(s, p, t, ulps=4)


@IMPL
def test_extreme_logits(impl):
    """+-1e4, ties, one-hot teacher, -inf masks in the teacher and (through the bias) in the student."""
    case = cases.make(rows=6, dim=8, vocab=65, ignored=0, bias=True)
    case.hidden[0] *= 1e4
    case.hidden[1] = 0.0
    case.teacher[1] = 0.0
    case.teacher[2] = float("-inf")
    case.teacher[2, 5] = 0.0
    case.teacher[3] *= 1e4
    case.teacher[:, 60:] = float("-inf")
    case.bias[60:] = float("-inf")
    case.labels[:] = torch.arange(6)
    fast, eager = cases.ours(case, impl), cases.oracle(case)
    truth = cases.oracle(cases.to(case, dtype=torch.float64))
    for f, e, t in zip(fast, eager, truth):
        assert_as_good_as_eager(f, e, t, ulps=8)


@IMPL
def test_infinite_divergence_is_reported(impl):
    """p > 0 = q: the loss is inf, as the formula says, unless omega switches the term off."""
    case = cases.make(rows=3, vocab=40, ignored=0, bias=True)
    case.bias[7] = float("-inf")
    case.labels[:] = 1
    x = cases.leaves(case)
    keywords = cases.arguments(case)
    result = linear_distill_loss(x[0], x[1], case.labels, bias=x[2], impl=impl, **keywords)
    assert result.loss.isposinf()
    off = linear_distill_loss(x[0], x[1], case.labels, bias=x[2], impl=impl, **{**keywords, "omega": 0.0})
    assert off.loss.isfinite()


@IMPL
def test_agreeing_models_give_no_soft_gradient(impl):
    """p = q: the divergence vanishes and so does the gradient, to rounding of the probabilities."""
    case = cases.make(rows=5, dim=16, vocab=300, omega=1.0, ignored=0)
    case.teacher = case.hidden @ case.weight.t()
    result = linear_distill_loss(case.hidden, case.weight, case.labels, impl=impl, **cases.arguments(case))
    assert result.stats.divergence.abs().max() < 1e-10
    assert cases.ours(case, impl)[1].abs().max() < 1e-7


@IMPL
def test_small_divergence_is_accurate(impl):
    """Near agreement the plain sum p (log p - log q) loses all digits in float32; the op does not."""
    case = cases.make(rows=4, dim=16, vocab=2000, omega=1.0, ignored=0)
    exact = case.hidden.double() @ case.weight.double().t()
    case.teacher = (exact + 3e-3 * torch.randn(exact.shape, device=cases.DEVICE)).float()
    wide = cases.to(case, dtype=torch.float64)
    truth = cases.stats_oracle(wide)[2]
    got = linear_distill_loss(
        case.hidden, case.weight, case.labels, impl=impl, **cases.arguments(case)
    ).stats.divergence
    assert truth.max() < 1e-5
    assert (got - truth).abs().max() < 1e-9


@IMPL
def test_ignored_rows_are_exact_zeros(impl):
    """Even where the hidden state or the teacher holds inf and nan."""
    case = cases.make(rows=9, vocab=40, ignored=3, weights=True)
    clean = cases.ours(case, impl)
    case.hidden[1], case.hidden[2] = float("nan"), float("inf")
    case.teacher[2], case.teacher[3] = float("nan"), float("inf")
    case.weights[1] = float("nan")
    dirty = cases.ours(case, impl)
    for c, d in zip(clean, dirty):
        assert torch.equal(c, d)
    assert dirty[1][1:4].eq(0).all()
    stats = linear_distill_loss(case.hidden, case.weight, case.labels, impl=impl, **cases.arguments(case)).stats
    assert torch.stack(stats)[:, 1:4].eq(0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@IMPL
def test_all_ignored_and_empty(impl, reduction):
    case = replace(cases.make(rows=4, ignored=3), reduction=reduction)
    case.labels[:] = -100
    for result in (
        cases.ours(case, impl),
        cases.ours(replace(case, weights=torch.zeros_like(case.labels).float()), impl),
    ):
        assert all(x.eq(0).all() for x in result)
    empty = replace(case, hidden=case.hidden[:0], labels=case.labels[:0], teacher=case.teacher[:0])
    result = cases.ours(empty, impl)
    assert all(x.eq(0).all() for x in result)
    assert result[2].shape == case.weight.shape


@IMPL
def test_nan_is_seen(impl):
    case = cases.make(rows=4, vocab=90, ignored=0)
    case.teacher[2, 88] = float("nan")
    loss, grad_hidden, *_ = cases.ours(case, impl)
    assert loss.isnan()
    assert grad_hidden.isnan().all(dim=1).tolist() == [False, False, True, False]


@IMPL
def test_stats(impl):
    case = cases.make(rows=7, vocab=130, bias=True, temperature=2.0, teacher_temperature=0.5, spread=2.0)
    result = linear_distill_loss(
        case.hidden, case.weight, case.labels, bias=case.bias, impl=impl, **cases.arguments(case)
    )
    truth = cases.stats_oracle(cases.to(case, dtype=torch.float64))
    assert len(truth) == len(result.stats) == 13
    for name, got, want in zip(result.stats._fields, result.stats, truth):
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-6), name
        assert not got.requires_grad


@IMPL
def test_omega_zero_is_plain_cross_entropy(impl):
    """Bit for bit the same as without a teacher, and torch's cross entropy to rounding."""
    case = cases.make(rows=30, vocab=500, omega=0.0)
    with_teacher = cases.ours(case, impl)
    without = cases.ours(replace(case, teacher=None), impl)
    for a, b in zip(with_teacher, without):
        assert torch.equal(a, b)
    logits = case.hidden.double() @ case.weight.double().t()
    truth = torch.nn.functional.cross_entropy(logits, case.labels)
    assert abs(without[0].item() - truth.item()) < 1e-6


def test_reference_gradcheck():
    """The gradients of the reference row pass are written by hand; here against finite differences."""
    case = cases.to(cases.make(rows=5, dim=6, vocab=11, bias=True, weights=True, spread=2.0), dtype=torch.float64)
    options = RowOptions(
        temperature=2.0, teacher_temperature=0.5, label_smoothing=0.1, z_loss=0.05, softcap=3.0, logit_scale=1.2
    )
    case = replace(case, options=options)

    def loss(hidden, weight, bias):
        return linear_distill_loss(
            hidden, weight, case.labels, bias=bias, impl="reference", chunk_bytes=200, **cases.arguments(case)
        ).loss

    assert torch.autograd.gradcheck(loss, cases.leaves(case))


@pytest.mark.slow
@IMPL
def test_offsets_beyond_int32(impl):
    """The last row of a teacher of more than 2^31 logits: read where it is, not 2^32 bytes before."""
    if impl != "cpp":
        pytest.skip("the reference is PyTorch's own indexing; a grid of 66000 rows is too large for the interpreter")
    rows, vocab = 66_000, 33_000
    teacher = torch.zeros(rows, vocab, dtype=torch.bfloat16)
    teacher[-1] = torch.randn(vocab)
    labels = torch.full((rows,), -100)
    labels[-1] = 5
    hidden, weight = torch.randn(rows, 4), torch.randn(vocab, 4)
    options = {"omega": 0.5, "temperature": 1.0, "teacher_temperature": 1.0, "impl": impl}
    far = linear_distill_loss(hidden, weight, labels, teacher=TeacherLogits(teacher), **options)
    near = linear_distill_loss(hidden[-1:], weight, labels[-1:], teacher=TeacherLogits(teacher[-1:].clone()), **options)
    assert torch.equal(far.stats.divergence[-1], near.stats.divergence[0])
