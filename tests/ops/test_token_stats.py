"""token_stats: every implementation against the whole logits in float64."""

import math

import pytest
import torch
from torch import Tensor

from effkern import LabelStats, native, token_stats
from effkern.ops import registry
from effkern.ops.distill import gemm
from effkern.ops.token_stats import label_rank, reference
from tests.numerics import assert_as_good_as_eager

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORE = -100

IMPLS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("cpp", "cpu", id="cpp"),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]
# rows, vocabulary, hidden size, bytes of the logits' buffer
SHAPES = {
    "one_chunk": (5, 31, 8, None),
    "one_column": (4, 1, 3, None),
    "several_chunks": (70, 513, 16, 513 * 4 * 32),
    "ragged_last_chunk": (37, 101, 9, 101 * 4 * 5),
    "one_row_per_chunk": (3, 2051, 7, 1),
    "several_product_tiles": (9, 4099, 33, None),
    "empty": (0, 17, 4, None),
}


def skip_unless_available(impl: str, device: str) -> None:
    reason = {i.name: i for i in registry.registered()["token_stats"]}[impl].unavailable(torch.device(device))
    if reason is not None:
        pytest.skip(reason)


def make(
    num_rows: int, vocab: int, dim: int, dtype: torch.dtype, device: str = "cpu", whole: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, output layer and labels, one of them ignored; `whole` numbers have exact logits in any dtype."""
    hidden, weight = torch.randn(num_rows, dim), torch.randn(vocab, dim)
    if whole:
        hidden, weight = hidden.mul(2).round().clamp(-4, 4), weight.mul(2).round().clamp(-4, 4)
    labels = torch.randint(vocab, (num_rows,))
    if num_rows > 2:
        labels[1] = IGNORE
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


def check(hidden: Tensor, weight: Tensor, labels: Tensor, impl: str, chunk_bytes: int | None = None, **options):
    """Values as accurate as eager; ranks between the counts with the label's logit moved by the rounding error."""
    got = token_stats(hidden, weight, labels, impl=impl, chunk_bytes=chunk_bytes, **options)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    truth = reference.token_stats(hidden.double(), weight.double(), labels, **wide)
    eager = reference.token_stats(hidden, weight, labels, **options)
    for fast, plain, exact in zip(got[:3], eager[:3], truth[:3]):
        assert fast.shape == labels.shape
        assert_as_good_as_eager(fast, plain, exact, ulps=4)
    ignored = labels == options.get("ignore_index", IGNORE)
    for part, value in zip(got, (0, 0, 0, -1)):
        assert (part[ignored] == value).all()

    cap, scale = options.get("softcap"), options.get("logit_scale", 1.0)
    z = hidden.double() @ weight.double().t()
    z = scale * (z if options.get("bias") is None else z + options["bias"].double())
    z = (z if cap is None else cap * torch.tanh(z / cap))[:, : options.get("vocab_valid")][~ignored]
    z_y = truth[2][~ignored, None]
    slack = 1e-5 * (1 + z_y.abs())
    assert got.rank.dtype == torch.int64
    assert (got.rank[~ignored] >= (z > z_y + slack).sum(1)).all()
    assert (got.rank[~ignored] <= (z > z_y - slack).sum(1) - 1).all()
    return got


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_float64(shape, dtype, impl, device):
    skip_unless_available(impl, device)
    *sizes, budget = shape
    check(*make(*sizes, dtype, device), impl, budget)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_of_exact_logits_are_exact(dtype, impl, device):
    """Whole numbers have many ties, and no rounding can move one."""
    skip_unless_available(impl, device)
    hidden, weight, labels = make(40, 301, 12, dtype, device, whole=True)
    got = token_stats(hidden, weight, labels, impl=impl, chunk_bytes=301 * 4 * 7)
    truth = reference.token_stats(hidden.double(), weight.double(), labels)
    assert torch.equal(got.rank, truth[3])
    assert torch.equal(got.label_logit.double(), truth[2])


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_scale_softcap_and_padding(dtype, impl, device):
    skip_unless_available(impl, device)
    hidden, weight, labels = make(23, 130, 11, dtype, device)
    bias = torch.randn(130, device=device, dtype=dtype)
    weight[120:] = bias[120:] = float("nan")
    labels.clamp_(max=119)
    options = {"softcap": 6.0, "logit_scale": 0.7, "vocab_valid": 120}
    clean = weight[:120]
    got = check(hidden, clean, labels, impl, 120 * 4 * 9, bias=bias[:120], softcap=6.0, logit_scale=0.7)
    padded = token_stats(hidden, weight, labels, bias=bias, impl=impl, chunk_bytes=120 * 4 * 9, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, padded))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_any_strides_and_int32_labels(impl, device):
    skip_unless_available(impl, device)
    hidden, weight, labels = make(19, 77, 10, torch.float32, device)
    plain = token_stats(hidden, weight, labels, impl=impl)
    wide = torch.zeros(38, 20, device=device)
    wide[::2, ::2] = hidden
    strided = token_stats(wide[::2, ::2], weight.t().contiguous().t(), labels.int(), impl=impl)
    for a, b in zip(strided[:3], plain[:3]):
        torch.testing.assert_close(a, b)
    assert torch.equal(strided.rank, plain.rank)
    repeated = labels[:1].expand(19)
    got = token_stats(hidden[:1].expand(19, -1), weight, repeated, impl=impl)
    assert torch.equal(got.rank, plain.rank[0].expand(19))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_are_not_computed(dtype, monkeypatch):
    """On a CPU the product sees the rows that count and no other, in the chunks that the budget allows."""
    seen: list[int] = []
    product = gemm.logits

    def logits(hidden, weight, buffer):
        seen.append(hidden.shape[0])
        return product(hidden, weight, buffer)

    monkeypatch.setattr(gemm, "logits", logits)
    hidden, weight, labels = make(100, 50, 6, dtype)
    labels[torch.randperm(100)[:70]] = IGNORE
    kept = labels != IGNORE
    hidden[~kept] = float("nan")
    got = token_stats(hidden, weight, labels, chunk_bytes=50 * 4 * 8)
    assert sum(seen) == int(kept.sum())
    assert max(seen) <= 8
    alone = reference.token_stats(hidden[kept].double(), weight.double(), labels[kept])
    torch.testing.assert_close(got.loss[kept].double(), alone[0], rtol=1e-5, atol=1e-5)
    assert (got.rank[~kept] == -1).all()
    assert not any(part[~kept].any() for part in got[:3])

    seen.clear()
    got = token_stats(hidden, weight, torch.full_like(labels, 3), ignore_index=3)
    assert not seen
    assert (got.rank == -1).all()
    assert not got.loss.any()


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_infinite_and_nan_logits_are_as_in_label_rank(impl, device):
    skip_unless_available(impl, device)
    hidden, weight = torch.eye(4, device=device), torch.zeros(6, 4, device=device)
    bias = torch.tensor([0.0, 1e4, -math.inf, 2.0, -1e4, 0.0], device=device)
    labels = torch.tensor([1, 2, 0, 4], device=device)
    hidden[3, 0] = math.nan
    got = token_stats(hidden, weight, labels, bias=bias, impl=impl)
    expected = label_rank(hidden @ weight.t() + bias, labels, impl=impl)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert got.loss[1] == math.inf
    assert got.rank[:3].tolist() == [0, 5, 2]
    assert got.lse[3].isnan()


def test_float64_runs_in_float64():
    hidden, weight, labels = make(12, 45, 7, torch.float64)
    got = token_stats(hidden, weight, labels, chunk_bytes=45 * 8 * 5)
    truth = reference.token_stats(hidden, weight, labels)
    for fast, exact in zip(got[:3], truth[:3]):
        assert fast.dtype == torch.float64
        torch.testing.assert_close(fast, exact, rtol=1e-13, atol=1e-13)
    assert torch.equal(got.rank, truth[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_takes_its_type_for_the_product_and_no_other(dtype):
    hidden, weight, labels = make(33, 90, 14, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_stats(hidden.to(dtype), weight, labels)
    expected = token_stats(hidden.bfloat16(), weight.bfloat16(), labels)
    assert got.loss.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = token_stats(hidden.double(), weight.double(), labels)
    assert exact.loss.dtype == torch.float64


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_compiles_whole(impl, device):
    skip_unless_available(impl, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def score(h, w, y):
        stats = token_stats(h * 2, w, y, impl=impl, softcap=9.0, chunk_bytes=2000)
        return stats.loss * (stats.rank < 10), stats.rank

    for num_rows in (6, 8, 11):
        hidden, weight, labels = make(num_rows, 77, 5, torch.bfloat16, device)
        loss, rank = score(hidden, weight, labels)
        plain = token_stats(hidden * 2, weight, labels, impl=impl, softcap=9.0, chunk_bytes=2000)
        assert torch.equal(loss, plain.loss * (plain.rank < 10))
        assert torch.equal(rank, plain.rank)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_contract(dtype, impl, device):
    skip_unless_available(impl, device)
    hidden, weight, labels = make(7, 33, 6, dtype, device)
    rest = (IGNORE, 30, dtype, impl, 500)
    op = torch.ops.effkern.token_stats
    torch.library.opcheck(op, (hidden, weight, None, labels.clamp(max=29), 1.0, None, *rest))
    torch.library.opcheck(op, (hidden.t().clone().t(), weight, weight[:, 0], labels.clamp(max=29), 0.5, 4.0, *rest))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_gets_no_gradient(impl, device):
    skip_unless_available(impl, device)
    hidden, weight, labels = make(4, 33, 5, torch.float32, device)
    got = token_stats(hidden.requires_grad_(), weight.requires_grad_(), labels, impl=impl)
    assert isinstance(got, LabelStats)
    assert not any(part.requires_grad for part in got)


def test_auto_prefers_compiled_code():
    expected = "reference" if native.load("_C") else "cpp"
    assert registry.choose("token_stats", "auto", torch.device("cpu")) == expected


H, W, Y = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)
ERRORS = {
    "no_tensor": (lambda: token_stats([0.0], W, Y), TypeError, "hidden must be a tensor, got list"),
    "shape": (lambda: token_stats(H[0], W, Y), ValueError, "hidden must have shape [*, *], got [3]"),
    "no_columns": (
        lambda: token_stats(H[:, :0], W[:, :0], Y),
        ValueError,
        "hidden must have at least one column, got [2, 0]",
    ),
    "dim": (lambda: token_stats(H, W[:, :2], Y), ValueError, "weight must have shape [*, 3], got [5, 2]"),
    "no_rows": (lambda: token_stats(H, W[:0], Y), ValueError, "weight must have 1 to 2^31 - 1 rows, got 0"),
    "dtype": (
        lambda: token_stats(H.int(), W, Y),
        TypeError,
        "hidden must be float32, bfloat16, float16, float64, got int32",
    ),
    "weight_dtype": (
        lambda: token_stats(H, W.half(), Y),
        TypeError,
        "weight must have the dtype of hidden (float32) outside autocast, got float16",
    ),
    "labels_dtype": (lambda: token_stats(H, W, Y.short()), TypeError, "labels must be int64, int32, got int16"),
    "labels_shape": (lambda: token_stats(H, W, Y[:1]), ValueError, "labels must have shape [2], got [1]"),
    "device": (lambda: token_stats(H, W, Y.to("meta")), ValueError, "labels must be on cpu like hidden, got meta"),
    "bias_shape": (lambda: token_stats(H, W, Y, bias=W[:, 0][:4]), ValueError, "bias must have shape [5], got [4]"),
    "softcap": (lambda: token_stats(H, W, Y, softcap=0.0), ValueError, "softcap must be > 0, got 0.0"),
    "softcap_type": (lambda: token_stats(H, W, Y, softcap="9"), TypeError, "softcap must be a number, got str"),
    "scale": (lambda: token_stats(H, W, Y, logit_scale=math.inf), ValueError, "logit_scale must be finite, got inf"),
    "vocab_valid": (lambda: token_stats(H, W, Y, vocab_valid=6), ValueError, "vocab_valid must lie in [1, 5], got 6"),
    "ignore_index": (lambda: token_stats(H, W, Y, ignore_index=0.5), TypeError, "ignore_index must be an int"),
    "chunk_bytes": (lambda: token_stats(H, W, Y, chunk_bytes=0), ValueError, "chunk_bytes must lie in [1, "),
    "label_high": (lambda: token_stats(H, W, Y + 5), ValueError, "labels must be -100 or lie in [0, 5), got 5"),
    "label_negative": (lambda: token_stats(H, W, Y - 1), ValueError, "labels must be -100 or lie in [0, 5), got -1"),
    "label_padding": (
        lambda: token_stats(H, W, Y + 4, vocab_valid=4),
        ValueError,
        "labels must be -100 or lie in [0, 4), got 4",
    ),
    "impl": (lambda: token_stats(H, W, Y, impl="fast"), ValueError, "impl must be one of"),
    "impl_device": (
        lambda: token_stats(H, W, Y, impl="cuda"),
        NotImplementedError,
        "impl='cuda' cannot run on cpu",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_argument_rule_and_fact(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith("token_stats: ")
    assert message in str(caught.value)


def test_a_named_impl_refuses_float64():
    if native.load("_C"):
        pytest.skip("effkern._C was not built")
    with pytest.raises(NotImplementedError, match=r"^token_stats: impl='cpp' does not cover float64 tensors$"):
        token_stats(H.double(), W.double(), Y, impl="cpp")
