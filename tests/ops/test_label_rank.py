"""label_rank: every implementation against the reference in float64."""

import math

import pytest
import torch
from torch import Tensor

from effkern import native
from effkern.ops import registry
from effkern.ops.token_stats import LabelStats, label_rank, reference
from tests.numerics import assert_as_good_as_eager

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORE = -100

IMPLS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("cpp", "cpu", id="cpp"),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]
# One lane block of the C++ kernel is 32, one cache block 1024; one CUDA vector is 16 bytes.
SHAPES = {
    "one_column": (3, 1),
    "below_one_lane_block": (5, 31),
    "exact_block": (4, 1024),
    "one_over": (3, 1025),
    "odd_several_blocks": (7, 4099),
    "real_vocabulary": (3, 32000),
    "empty": (0, 17),
}


def skip_unless_available(impl: str, device: str) -> None:
    reason = {i.name: i for i in registry.registered()["label_rank"]}[impl].unavailable(torch.device(device))
    if reason is not None:
        pytest.skip(reason)


def make(num_rows: int, vocab: int, dtype: torch.dtype, device: str, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    logits = (torch.randn(num_rows, vocab) * scale).to(device, dtype)
    labels = torch.randint(vocab, (num_rows,)).to(device)
    if num_rows > 2:
        labels[1] = IGNORE
    return logits, labels


def check(logits: Tensor, labels: Tensor, impl: str, vocab_valid: int | None = None) -> LabelStats:
    """Compare with the reference: finite entries by accuracy, the others (inf, NaN, ranks) exactly."""
    vocab = logits.shape[1] if vocab_valid is None else vocab_valid
    got = label_rank(logits, labels, ignore_index=IGNORE, vocab_valid=vocab_valid, impl=impl)
    truth = reference.label_rank(logits.double(), labels, IGNORE, vocab)
    eager = reference.label_rank(logits, labels, IGNORE, vocab)
    assert got.rank.dtype == torch.int64
    assert torch.equal(got.rank, truth[3])
    for fast, plain, exact in zip(got[:3], eager[:3], truth[:3]):
        assert fast.shape == labels.shape
        finite = torch.isfinite(exact)
        torch.testing.assert_close(fast[~finite], exact[~finite].float(), rtol=0, atol=0, equal_nan=True)
        if finite.any():
            assert_as_good_as_eager(fast[finite], plain[finite], exact[finite], ulps=4)
    return got


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_float64(shape, dtype, impl, device):
    skip_unless_available(impl, device)
    num_rows, vocab = shape
    check(*make(num_rows, vocab, dtype, device), impl)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_and_padding_columns(dtype, impl, device):
    skip_unless_available(impl, device)
    storage, labels = make(5, 2051, dtype, device)
    # Rows start at every alignment; what lies between them must not be read.
    storage[:, :3] = storage[:, 2040:] = float("nan")
    view = storage[:, 3:2040]
    assert not check(view, labels.clamp(max=2036), impl).loss.isnan().any()
    # Columns from vocab_valid on are padding.
    got = check(storage[:, 3:], labels.clamp(max=2036), impl, vocab_valid=2037)
    assert not got.loss.isnan().any()
    # One row shown many times: stride 0.
    check(view[:1].expand(4, -1), labels[2:3].clamp(0, 2036).expand(4).contiguous(), impl)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(dtype, impl, device):
    """+-1e4, ties, -inf, +inf and NaN, at the label and beside it, in the first and in a later block."""
    skip_unless_available(impl, device)
    inf, nan = math.inf, math.nan
    for at in (0, 5, 1500):
        logits, _ = make(14, 2000, dtype, device, scale=1.0)
        labels = torch.full((14,), 7, device=device)
        logits[0, at] = 1e4
        logits[1] -= 1e4
        logits[2] = 0.5
        logits[3, :] = -inf
        logits[4, :1999] = -inf
        logits[5, 7] = -inf
        logits[6, at] = inf
        logits[7, 7] = inf
        logits[8, at] = nan
        logits[9, 7] = nan
        logits[10] = nan
        logits[11, at], logits[11, 1999] = inf, nan
        logits[12, at] = -inf
        logits[13, 3], logits[13, 7] = 1e4, 1e4
        check(logits, labels, impl)


def test_nan_and_infinity_mean_what_the_docstring_says():
    logits = torch.tensor([[0.0, math.nan, 2.0], [0.0, 1.0, math.nan], [1.0, -math.inf, 0.0], [-math.inf] * 3])
    got = label_rank(logits, torch.tensor([0, 2, 1, 0]), impl="reference")
    assert got.rank.tolist() == [1, 0, 2, 0]
    assert got.loss.isnan().tolist() == [True, True, False, True]
    assert got.loss[2] == math.inf
    assert got.lse[3] == -math.inf


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_loss_near_large_logits(impl, device):
    """A common offset costs no accuracy: the compiled kernels subtract it before they round."""
    skip_unless_available(impl, device)
    if impl == "reference":
        pytest.skip("the reference forms lse - z_y, as the formula says")
    logits = (torch.randn(6, 513).mul(64).round() / 64 + 8192).to(device)
    labels = torch.arange(6, device=device)
    exact = reference.label_rank(logits.double(), labels, IGNORE, 513)[0]
    got = label_rank(logits, labels, impl=impl).loss
    assert (got - exact).abs().max() < 2e-6 * exact.abs().max()


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_all_half_precision_values(impl, device):
    """Each of the 65536 bit patterns of both 16-bit formats is widened exactly."""
    skip_unless_available(impl, device)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        logits = bits.view(dtype)[:, None].to(device)
        got = label_rank(logits, torch.zeros(2**16, dtype=torch.int64, device=device), impl=impl)
        torch.testing.assert_close(got.label_logit, logits[:, 0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_label_outside_the_vocabulary_without_the_check(impl, device):
    """Where values are not looked at (CUDA, torch.compile) such a row is marked, and the others are right."""
    skip_unless_available(impl, device)
    logits, labels = make(5, 40, torch.float32, device)
    labels[0], labels[3] = 40, -1
    if impl == "reference":
        got = LabelStats(*reference.label_rank(logits, labels, IGNORE, 40))
    else:
        got = LabelStats(*torch.ops.effkern.label_rank(logits, labels, IGNORE, 40))
    truth = reference.label_rank(logits.double(), labels, IGNORE, 40)
    assert got.rank.tolist() == truth[3].tolist()
    assert got.rank[0] == got.rank[3] == -1
    torch.testing.assert_close(got.loss.double(), truth[0], rtol=1e-6, atol=1e-6, equal_nan=True)
    assert got.loss.isnan().tolist() == [True, False, False, True, False]
    assert torch.isfinite(got.lse).all()


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_compiles_whole(impl, device):
    skip_unless_available(impl, device)
    logits, labels = make(6, 77, torch.bfloat16, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def hard_and_learnable(z, y):
        stats = label_rank(z, y, impl=impl)
        return stats.loss * (stats.rank < 10), stats.rank

    loss, rank = hard_and_learnable(logits, labels)
    plain = label_rank(logits, labels, impl=impl)
    assert torch.equal(loss, plain.loss * (plain.rank < 10))
    assert torch.equal(rank, plain.rank)


@pytest.mark.parametrize(("impl", "device"), IMPLS[1:])
def test_operator_contract(impl, device):
    skip_unless_available(impl, device)
    logits, labels = make(4, 33, torch.float32, device)
    torch.library.opcheck(torch.ops.effkern.label_rank, (logits, labels, IGNORE, 33))
    torch.library.opcheck(torch.ops.effkern.label_rank, (logits[:, 1:], labels.clamp(max=30), IGNORE, 31))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_gets_no_gradient(impl, device):
    skip_unless_available(impl, device)
    logits, labels = make(4, 33, torch.float32, device)
    got = label_rank(logits.requires_grad_(), labels, impl=impl)
    assert not any(part.requires_grad for part in got)


def test_auto_prefers_compiled_code():
    expected = "reference" if native.load("_C") else "cpp"
    assert registry.choose("label_rank", "auto", torch.device("cpu")) == expected


Z, Y = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
ERRORS = {
    "rank": (lambda: label_rank(Z[0], Y), ValueError, "logits must be [N, V], got 1 dimensions"),
    "dtype": (
        lambda: label_rank(Z.double(), Y),
        TypeError,
        "logits must be float32, bfloat16 or float16, got torch.float64",
    ),
    "labels_dtype": (lambda: label_rank(Z, Y.int()), TypeError, "labels must be int64, got torch.int32"),
    "labels_shape": (lambda: label_rank(Z, Y[:1]), ValueError, "labels must have shape (2,), got (1,)"),
    "labels_device": (lambda: label_rank(Z, Y.to("meta")), ValueError, "labels must be on cpu, got meta"),
    "labels_stride": (
        lambda: label_rank(Z, torch.zeros(4, dtype=torch.int64)[::2]),
        ValueError,
        "labels must be contiguous, got stride 2",
    ),
    "no_columns": (lambda: label_rank(Z[:, :0], Y), ValueError, "logits must have 1 to 2^31 - 1 columns, got 0"),
    "stride": (lambda: label_rank(torch.zeros(5, 2).T, Y), ValueError, "logits must have stride 1 along V, got 2"),
    "vocab_valid": (lambda: label_rank(Z, Y, vocab_valid=6), ValueError, "vocab_valid must be in [1, 5], got 6"),
    "label_high": (lambda: label_rank(Z, Y + 5), ValueError, "labels must be -100 or in [0, 5), got 5"),
    "label_negative": (lambda: label_rank(Z, Y - 1), ValueError, "labels must be -100 or in [0, 5), got -1"),
    "label_padding": (
        lambda: label_rank(Z, Y + 4, vocab_valid=4),
        ValueError,
        "labels must be -100 or in [0, 4), got 4",
    ),
    "impl": (lambda: label_rank(Z, Y, impl="fast"), ValueError, "impl must be one of"),
    "device": (lambda: label_rank(Z, Y, impl="cuda"), NotImplementedError, "impl='cuda' cannot run on cpu"),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_argument_rule_and_fact(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith("label_rank: ")
    assert message in str(caught.value)
