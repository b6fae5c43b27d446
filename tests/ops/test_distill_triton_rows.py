"""The Triton row passes themselves, every formula and path, in the interpreter (or on a GPU) against float64.

V = 37 in blocks of 32: two steps, the second mostly masked. Rows: an ordinary one, an ignored one full of NaN, one
of weight 0, and one whose label is what the teacher thinks most likely.
"""

import pytest
import torch
from torch import Tensor

from effkern.ops.distill.reference import reference_rows
from effkern.ops.distill.rows import DIVERGENCES, SPARSE_KINDS, RowOptions, Rows
from effkern.ops.distill.types import DistillStats
from tests.numerics import assert_as_good_as_eager

pytest.importorskip("triton")

from effkern.ops.distill import triton as launcher
from effkern.ops.distill import triton_launch
from effkern.ops.distill.triton_launch import Launch
from effkern.ops.distill.triton_scale import scale_grad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes a quarter of a second for each: these leave the default run.
BULK = pytest.mark.slow
SOFTMAX = [name for name, x in DIVERGENCES.items() if x.tempered]
MIX = {"alpha": 0.3, "beta": 0.4}
EVERYTHING = {
    "divergence_scale": 2.5, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 7.0, "logit_scale": 1.3,
}  # fmt: skip


@pytest.fixture
def streaming(monkeypatch):
    """Blocks of 32, so that small rows take several steps, and two kept slots at a time that look for their equals."""
    monkeypatch.setattr(triton_launch, "EQUALS", 16)
    for table in ("DENSE_LAUNCH", "SPARSE_LAUNCH"):
        monkeypatch.setattr(launcher, table, [Launch(1 << 31, 32, 4, 128)])


def make(vocab: int = 37, rows: int = 4, *, teacher: str = "logits", bias: bool = False, spread: float = 3.0) -> Rows:
    """Random tensors; the statistics are NaN."""
    z, u = torch.randn(2, rows, vocab) * spread
    labels, scale, omega = torch.randint(0, vocab, (rows,)), torch.rand(rows) + 0.1, torch.rand(rows)
    ids = logprobs = None
    if teacher in SPARSE_KINDS:
        logprobs, ids = torch.log_softmax(u, -1).topk(min(6, vocab), -1)
        u, labels[-1] = None, ids[-1, 0]
    elif teacher == "none":
        u = None
        omega.zero_()
    else:
        labels[-1] = u[-1].argmax()
        u = torch.log_softmax(u, -1) - 0.1 if teacher == "logprobs" else u
    if rows == 4:
        labels[1], z[1], scale[2] = -100, torch.nan, 0.0
    bias_V = torch.randn(vocab) if bias else None
    return Rows(z, u, ids, logprobs, bias_V, labels, scale, omega, torch.full((13, rows), torch.nan))


def run(row_pass, rows: Rows, options: RowOptions, dtype: torch.dtype, grad_dtype: torch.dtype | None) -> tuple:
    """Statistics and gradient from copies of `rows` in `dtype`; half-precision teachers stay."""

    def copy(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x.to(DEVICE)
        if x.dtype in (torch.float32, torch.float64):
            return x.to(dtype, copy=True, memory_format=torch.preserve_format)
        return x

    rows = Rows(*map(copy, rows))
    grad = row_pass(rows, grad_dtype, options)
    return rows.stats_SR, grad


def assert_rounded(x: Tensor, exact: Tensor) -> None:
    """Bit for bit on a GPU; the interpreter cuts off what bfloat16 does not hold."""
    if DEVICE == "cuda" or x.dtype == torch.float32:
        assert torch.equal(x, exact.to(x.dtype))
    else:
        torch.testing.assert_close(x.float(), exact, rtol=2**-7, atol=0)


def check(rows: Rows, options: RowOptions) -> None:
    """Statistics and gradient as good as those of plain torch in float32."""
    truth, truth_grad = run(reference_rows, rows, options, torch.float64, torch.float64)
    eager, eager_grad = run(reference_rows, rows, options, torch.float32, torch.float32)
    ours, grad = run(launcher.triton_rows, rows, options, torch.float32, torch.float32)
    for name, x, in_float32, exact in zip(DistillStats._fields, ours, eager, truth):
        finite = exact.isfinite()
        assert torch.equal(x[~finite].double(), exact[~finite]), name
        try:
            # 12 units: a few numbers each, which eager may hit by luck.
            assert_as_good_as_eager(x[finite], in_float32[finite], exact[finite], ulps=12.0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    assert_as_good_as_eager(grad, eager_grad, truth_grad, ulps=4.0)


def extras(name: str, everything: bool, teacher: str) -> dict:
    if not everything:
        return {}
    retempered = teacher in ("logits", "renormalized", "both_renormalized")
    tempered = {"temperature": 2.0, "teacher_temperature": 1.5 if retempered else 1.0}
    return {**EVERYTHING, **(tempered if DIVERGENCES[name].tempered else {})}


@pytest.mark.parametrize(
    "everything", [pytest.param(False, marks=BULK, id="plain"), pytest.param(True, id="everything")]
)
@pytest.mark.parametrize("teacher", ["logits", "logprobs"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence(name, teacher, everything, streaming):
    if teacher == "logprobs" and not DIVERGENCES[name].tempered:
        pytest.skip("compares logits")
    options = RowOptions(name, **MIX, teacher=teacher, **extras(name, everything, teacher))
    check(make(teacher=teacher, bias=everything), options)


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize(
    ("kind", "name"), [*((kind, "forward_kl") for kind in SPARSE_KINDS), ("tail_bucket", "reverse_kl")]
)
def test_every_sparse_kind(kind, name, everything, streaming):
    """With an empty slot, one beyond the vocabulary, a repeated id, and the label among the kept."""
    rows = make(teacher=kind, bias=everything)
    rows.ids_RK[0, 2], rows.ids_RK[3, 4], rows.ids_RK[0, 4] = -1, 37, rows.ids_RK[0, 1]
    check(rows, RowOptions(name, teacher=kind, **extras(name, everything, kind)))


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_no_teacher(everything, streaming):
    check(make(teacher="none", bias=everything), RowOptions(**(EVERYTHING if everything else {})))


@pytest.mark.parametrize("name", ["symmetric_kl", "jsd", "decoupled_kl", "zscored_mse"])
def test_dense_row_in_registers(name):
    options = RowOptions(name, **MIX, **extras(name, True, "logits"))
    check(make(bias=True), options)


@pytest.mark.parametrize("kind", ["none", "tail_bucket"])
def test_sparse_row_in_registers(kind):
    check(make(teacher=kind, bias=True), RowOptions(teacher=kind, **EVERYTHING))


@pytest.mark.parametrize("table", ["DENSE_LAUNCH", "SPARSE_LAUNCH"])
def test_every_row_of_the_launch_table(table):
    """The smallest vocabulary that picks each row: one over the limit of the one before."""
    sizes = [1] + [launch.limit + 1 for launch in getattr(triton_launch, table)[:-1]]
    teacher, name = ("logits", "jsd") if table == "DENSE_LAUNCH" else ("uniform_tail", "forward_kl")
    for vocab in sizes:
        check(make(vocab, 1, teacher=teacher), RowOptions(name, **MIX, teacher=teacher))


@BULK
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "zscored_mse"])
def test_two_entries(name):
    """Not z-scored: of two entries only their order is left, and of the gradient only rounding."""
    check(make(2, 2), RowOptions(name, **MIX))


@pytest.mark.parametrize("name", SOFTMAX)
def test_masked_entries(name, streaming):
    """-inf in both models, in both blocks and in a whole one, and nowhere a NaN."""
    rows = make(rows=2)
    for masked in (rows.logits_RV, rows.teacher_RV):
        masked[:, [3, 35]] = -torch.inf
        masked[1, :32] = -torch.inf
    rows.labels_R[0], rows.labels_R[1] = 5, 33
    check(rows, RowOptions(name, **MIX))


@BULK
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"])
def test_one_hot_teacher(name, streaming):
    rows = make(rows=2)
    for n in range(2):
        rows.teacher_RV[n] = -torch.inf
        rows.teacher_RV[n, 7 * n + 8] = 2.0
    rows.labels_R[0] = 8
    check(rows, RowOptions(name, **MIX))


@BULK
@pytest.mark.parametrize("name", DIVERGENCES)
def test_large_logits(name, streaming):
    check(make(rows=2, spread=1e4), RowOptions(name, **MIX))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_models(name, streaming):
    """No divergence, and no gradient of one, but what rounding leaves; both have the same largest entry."""
    rows = make(rows=2)
    rows.teacher_RV.copy_(rows.logits_RV)
    rows.omega_R.fill_(1.0)
    stats, grad = run(launcher.triton_rows, rows, RowOptions(name, **MIX), torch.float32, torch.float32)
    assert stats[2].abs().max() < 1e-12
    assert grad.abs().max() < 1e-7
    assert stats[12].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_small_divergence_keeps_its_digits(name, streaming):
    """Models that differ by 1e-3: the terms are of order 1e-3, their sum of order 1e-7."""
    rows = make(rows=2)
    rows.teacher_RV.copy_(rows.logits_RV + 1e-3 * torch.randn(2, 37))
    options = RowOptions(name, **MIX)
    truth, _ = run(reference_rows, rows, options, torch.float64, None)
    stats, _ = run(launcher.triton_rows, rows, options, torch.float32, None)
    assert ((stats[2].double() - truth[2]).abs() < 1e-3 * truth[2]).all()


@pytest.mark.parametrize("beta", [1e-8, 1 - 1e-8])
def test_tiny_share_of_a_mixture(beta, streaming):
    check(make(spread=20.0), RowOptions("jsd", beta=beta))


def test_digits_of_one_minus_beta(monkeypatch):
    """A kernel on a GPU gets its scalars in float32, where 1 - beta is off by 1e-2; the interpreter leaves them be."""
    inner = launcher.distill_dense_kernel

    class Rounded:
        def __getitem__(self, grid):
            def call(*args, **constants):
                inner[grid](*(torch.tensor(x).item() if isinstance(x, float) else x for x in args), **constants)

            return call

    monkeypatch.setattr(launcher, "distill_dense_kernel", Rounded())
    beta = 1 - 1e-6
    for name in ("jsd", "symmetric_kl"):
        check(make(), RowOptions(name, beta=beta, divergence_scale=1 / (beta * (1 - beta))))


def test_confident_student_has_a_gradient_ratio(streaming):
    """1 - q_y of 1e-8, where float32 has q_y = 1: (p_y - q_y) / (1 - q_y) from the small numbers themselves."""
    rows = make(rows=2)
    for logits, top in ((rows.logits_RV, 22.0), (rows.teacher_RV, 23.0)):
        logits.scatter_(1, rows.labels_R[:, None], logits.amax(-1, keepdim=True) + top)
    options = RowOptions()
    truth, _ = run(reference_rows, rows, options, torch.float64, None)
    stats, _ = run(launcher.triton_rows, rows, options, torch.float32, None)
    # Truth itself takes 1 - q_y from a q_y that is almost 1.
    torch.testing.assert_close(stats[11].double(), truth[11], rtol=1e-4, atol=0)
    torch.testing.assert_close(stats[1].double(), truth[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("where", ["at the label", "elsewhere", "on two entries", "on an id that stands twice"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_tail_bucket_of_a_sure_student(name, where, streaming):
    """All but about 1e-6 of its mass on kept entries."""
    rows = make(rows=6, teacher="tail_bucket")
    kept = rows.ids_RK[:, :2] if where == "on two entries" else rows.ids_RK[:, :1]
    rows.logits_RV.scatter_(1, kept, rows.logits_RV.max().item() + 15.0)
    rows.labels_R[:] = rows.ids_RK[:, 3 if where == "elsewhere" else 0]
    if where == "on an id that stands twice":
        rows.ids_RK[:, 5] = rows.ids_RK[:, 0]
    options = RowOptions(name, teacher="tail_bucket", temperature=1.2)
    truth, truth_grad = run(reference_rows, rows, options, torch.float64, torch.float64)
    eager, eager_grad = run(reference_rows, rows, options, torch.float32, torch.float32)
    ours, grad = run(launcher.triton_rows, rows, options, torch.float32, torch.float32)
    # The divergence and the gradient ratio; the entropy of such a student is lost in any float32.
    for s in (2, 11):
        assert_as_good_as_eager(ours[s], eager[s], truth[s], ulps=12.0)
    assert_as_good_as_eager(grad, eager_grad, truth_grad, ulps=4.0)
    # The pass that adds up the tail marks the kept logits: nothing of that stays.
    logits = rows.logits_RV.to(DEVICE, copy=True)
    on_device = Rows(logits, *(None if x is None else x.to(DEVICE) for x in rows[1:]))
    assert launcher.triton_rows(on_device, None, options) is None
    assert torch.equal(logits.cpu(), rows.logits_RV)


@pytest.mark.parametrize("teacher", ["logits", "uniform_tail", "none"])
def test_bfloat16_gradient_is_the_float32_one_rounded_once(teacher, streaming):
    rows = make(teacher=teacher)
    options = RowOptions(teacher=teacher, **EVERYTHING)
    wide_stats, wide = run(launcher.triton_rows, rows, options, torch.float32, torch.float32)
    stats, grad = run(launcher.triton_rows, rows, options, torch.float32, torch.bfloat16)
    assert grad.dtype == torch.bfloat16
    assert_rounded(grad, wide)
    assert torch.equal(stats, wide_stats)
    evaluated, none = run(launcher.triton_rows, rows, options, torch.float32, None)
    assert none is None
    assert torch.equal(evaluated, stats)


def test_rows_that_do_not_count(streaming):
    """Ignored ones are zero in everything; those of weight 0 have no gradient, even where they hold NaN."""
    rows = make()
    rows.logits_RV[2, 5] = torch.nan
    stats, grad = run(launcher.triton_rows, rows, RowOptions("jsd", **MIX), torch.float32, torch.float32)
    assert not stats[:, 1].any()
    assert not grad[1].any()
    assert not grad[2].any()


@pytest.mark.parametrize("teacher", ["logits", "tail_bucket"])
def test_layouts(teacher, streaming):
    """Rows further apart than V, a wider teacher in half precision, narrow integers; the gradient replaces logits."""
    rows = make(teacher=teacher)
    wide = torch.full((4, 48), torch.nan)
    wide[:, :37] = rows.logits_RV
    rows = rows._replace(logits_RV=wide[:, :37], labels_R=rows.labels_R.int())
    if teacher == "logits":
        rows = rows._replace(teacher_RV=torch.cat([rows.teacher_RV, torch.full((4, 3), torch.nan)], 1).half())
    else:
        rows = rows._replace(ids_RK=rows.ids_RK.int(), logprobs_RK=rows.logprobs_RK.half())
    check(rows, RowOptions(teacher=teacher))
    logits = rows.logits_RV.to(DEVICE)
    on_device = Rows(logits, *(None if x is None else x.to(DEVICE) for x in rows[1:]))
    assert launcher.triton_rows(on_device, torch.float32, RowOptions(teacher=teacher)).data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_grad(dtype):
    grad = torch.randn(3, 1111, device=DEVICE).to(dtype)
    copy = grad.clone()
    scale_grad(copy, torch.tensor(1.0, device=DEVICE))
    assert torch.equal(copy, grad)
    scale_grad(copy, torch.tensor(0.3, device=DEVICE))
    assert_rounded(copy, 0.3 * grad.float())
