"""Every divergence and every sparse kind, on every implementation, over rows that each are a case of their own."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from effkern import TeacherTopK, linear_distill_loss
from effkern.ops.distill import reference
from tests.numerics import assert_rows_as_good_as_eager
from tests.ops import distill_cases as cases

IMPL = pytest.mark.parametrize("impl", cases.implementations())
BULK = pytest.mark.parametrize("impl", cases.implementations(bulk=True))
DIVERGENCE = pytest.mark.parametrize("name", cases.PARAMETERS)
SPARSE = pytest.mark.parametrize(("kind", "divergence"), cases.SPARSE_PAIRS, ids=str)


def by_hand(case: cases.Case) -> tuple[Tensor, Tensor]:
    """Statistics [13, N] and gradient of the logits [N, V] of the reference, a row of weight 0 without any.

    By its hand gradients: autograd makes nan of 0 times what a masked or ignored entry holds.
    """
    rows, options = cases.rows_of(case), cases.plain_options(case)
    grad = reference.row_grad(rows, options)
    weights = torch.ones_like(grad[:, 0]) if case.weights is None else case.weights.to(grad.dtype)
    return reference.row_stats(rows, options), torch.where(weights[:, None] != 0, weights[:, None] * grad, 0.0)


def rounding(case: cases.Case) -> Tensor:
    """One unit of rounding of the largest logit of either model, over its temperature, [N]; at least 1e-6."""
    rows, o = cases.rows_of(case), case.options
    parts = [rows.logits_RV / o.temperature]
    if rows.teacher_RV is not None:
        parts.append(rows.teacher_RV / o.teacher_temperature)
    largest = torch.stack([p.nan_to_num(0.0, 0.0, 0.0).abs().amax(-1) for p in parts]).amax(0)
    return (torch.finfo(torch.float32).eps * largest).clamp_min(1e-6)


def check(case: cases.Case, impl: str) -> tuple[Tensor, ...]:
    """Statistics and gradient of each row to 1e-5, and to the rounding of its largest logit in float32.

    For a case of `cases.of_logits`. Returns the gradients.
    """
    (loss, stats), x = cases.result(case, impl)
    grads = torch.autograd.grad(loss, x)
    (truth, exact), (eager, plain) = (by_hand(c) for c in (cases.to(case, dtype=torch.float64), case))
    step = rounding(case)
    # What the teacher says of itself where it holds nan is not specified.
    known = ~truth[2].isnan()
    for field, got, p, e in zip(stats._fields, stats, eager, truth):
        at = slice(None) if field in ("loss", "ce", "divergence", "lse", "label_logprob", "entropy", "hit") else known
        try:
            assert_rows_as_good_as_eager(got[at], p[at], e[at], relative=1e-5, absolute=step[at])
        except AssertionError as error:
            raise AssertionError(f"{field}: {error}") from error
    assert_rows_as_good_as_eager(grads[1].t(), plain, exact, relative=1e-5, absolute=step)
    if case.bias is not None:
        total = exact.sum(0)[None]
        assert_rows_as_good_as_eager(grads[2][None], plain.sum(0)[None], total, relative=1e-5, absolute=1e-6)
    kept = torch.ones_like(stats.loss) if case.weights is None else case.weights
    want = torch.where(kept != 0, kept * truth[0], 0.0).sum()
    assert loss == want or abs(loss - want) <= 1e-5 * want.abs() + step.sum()
    return grads


ROWS = ("random", "one-hot teacher", "one-hot teacher at the label", "p = q", "student +-1e4", "teacher +-1e4",
        "both +-1e4", "ties", "no spread", "weight 0, nan", "ignored, nan")  # fmt: skip


def zoo(vocab: int, options: dict[str, Any], masked: bool = False) -> cases.Case:
    """One row per name of ROWS; `masked` puts -inf into both models at every third entry."""
    z, u = torch.randn(len(ROWS), vocab), torch.randn(len(ROWS), vocab)
    y = torch.randint(0, vocab, (len(ROWS),))
    signs = 1e4 * torch.where(torch.arange(vocab) % 2 == 0, 1.0, -1.0)
    row = {name: i for i, name in enumerate(ROWS)}
    for name, at in (("one-hot teacher", (y + 1) % vocab), ("one-hot teacher at the label", y)):
        u[row[name]] = 0.0
        u[row[name], at[row[name]]] = 1e4
    # Halved and doubled exactly: p = q at T = 2 T' as well.
    ratio = options.get("teacher_temperature", 1.0) / options.get("temperature", 1.0)
    u[row["p = q"]] = z[row["p = q"]] * ratio
    z[row["student +-1e4"]] = z[row["both +-1e4"]] = signs
    u[row["teacher +-1e4"]] = u[row["both +-1e4"]] = -signs if vocab > 2 else signs
    z[row["ties"]], u[row["ties"]] = z[row["ties"]].round(), u[row["ties"]].round()
    z[row["no spread"]] = u[row["no spread"]] = 0.0
    u[row["weight 0, nan"]] = u[row["ignored, nan"]] = float("nan")
    y[row["ignored, nan"]] = -100
    weights = torch.ones(len(ROWS))
    weights[row["weight 0, nan"]] = 0.0
    bias = None
    if masked:
        bias = torch.zeros(vocab)
        bias[::3] = u[:, ::3] = float("-inf")
        u[row["weight 0, nan"], 1] = float("nan")
        y = torch.where(y >= 0, (y - y % 3 + 1).clamp_max(vocab - 1), y)
    return cases.of_logits(z, u, y, bias=bias, weights=weights, options=cases.RowOptions(**options))


# No multiple of any tile.
@DIVERGENCE
@IMPL
def test_rows_of_every_divergence(impl, name):
    check(zoo(37, cases.divergence_options(name)), impl)


# The smallest vocabulary, and one over a tile of the GPU kernel.
@pytest.mark.parametrize("vocab", [2, 1027])
@DIVERGENCE
@BULK
def test_rows_of_other_widths(impl, name, vocab):
    check(zoo(vocab, cases.divergence_options(name)), impl)


@DIVERGENCE
@BULK
def test_nan_of_a_dense_teacher_is_seen(impl, name):
    case = cases.of_logits(torch.randn(3, 40), torch.randn(3, 40), torch.arange(3))
    case.options = cases.RowOptions(**cases.divergence_options(name))
    case.teacher[1, 38] = float("nan")
    (loss, stats), x = cases.result(case, impl)
    assert loss.isnan()
    assert stats.loss.isnan().tolist() == stats.divergence.isnan().tolist() == [False, True, False]
    # Of the hidden states: in the weight's gradient nan * 0 reaches every row.
    grad = torch.autograd.grad(loss, x)[0]
    assert grad[1].isnan().all()
    assert grad[::2].isfinite().all()


@SPARSE
@BULK
def test_nan_of_a_sparse_teacher_is_seen(impl, kind, divergence):
    case = sparse_zoo(40, kind, divergence)
    case.weights[:] = 1.0
    nan = SPARSE_ROWS.index("weight 0, nan")
    case.teacher.logprobs[nan, :-1] = case.teacher.logprobs[0, :-1]
    (loss, stats), x = cases.result(case, impl)
    assert loss.isnan()
    rows = [i == nan for i in range(len(SPARSE_ROWS))]
    assert stats.loss.isnan().tolist() == stats.divergence.isnan().tolist() == rows
    assert torch.autograd.grad(loss, x)[0].isnan().any(1).tolist() == rows


@pytest.mark.parametrize("name", cases.TEMPERED)
@BULK
def test_masked_vocabulary(impl, name):
    """-inf in both models: as if the entry were not there, with an exactly zero gradient."""
    case = zoo(38, cases.divergence_options(name), masked=True)
    _, grad_weight, grad_bias = check(case, impl)
    assert grad_weight[::3].eq(0).all()
    assert grad_bias[::3].eq(0).all()


@pytest.mark.parametrize("temperatures", [(0.25, 0.25), (4.0, 4.0), (2.0, 0.5)], ids=str)
@pytest.mark.parametrize("name", cases.TEMPERED)
@BULK
def test_temperatures(impl, name, temperatures):
    t = {"temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    check(zoo(37, {**cases.divergence_options(name), **t}), impl)


@DIVERGENCE
@BULK
def test_equal_models(impl, name):
    """p = q: no gradient, and a divergence of zero that is not below zero."""
    case = zoo(1500 if impl == "triton" else 5000, cases.divergence_options(name))
    case.omega, case.teacher = 1.0, case.hidden @ case.weight.t()
    (loss, stats), x = cases.result(case, impl)
    # The cosine of a vector of zeros is 0 with everything.
    kept = [i for i, row in enumerate(ROWS) if (name, row) != ("cosine", "no spread")]
    assert (stats.divergence >= 0).all()
    assert stats.divergence[kept].max() < 1e-9
    assert torch.autograd.grad(loss, x)[1].abs().max() < 1e-6


# Each entry changes one thing around the divergence.
AROUND = {
    "softcap and bias": {"softcap": 2.0, "bias": True},
    "scale": {"logit_scale": 0.7},
    "smoothing and z-loss": {"label_smoothing": 0.1, "z_loss": 0.01},
}


@pytest.mark.parametrize("around", AROUND)
@DIVERGENCE
@BULK
def test_options_around_every_divergence(impl, name, around):
    check_random(cases.make(rows=5, vocab=45, ignored=1, **AROUND[around], **cases.divergence_options(name)), impl)


@pytest.mark.parametrize("around", AROUND)
@SPARSE
@BULK
def test_options_around_every_sparse_kind(impl, kind, divergence, around):
    setting = {**AROUND[around], "divergence": divergence, "temperature": 2.0}
    check_random(cases.make(rows=6, vocab=45, ignored=1, teacher=kind, **setting), impl)


def check_random(case: cases.Case, impl: str, **overrides) -> None:
    """Loss and gradients of a case without extremes."""
    truth = cases.oracle(cases.to(case, dtype=torch.float64))
    for got, plain, exact in zip(cases.ours(case, impl, **overrides), cases.oracle(case), truth):
        flat = [v.reshape(1, -1) for v in (got, plain, exact)]
        assert_rows_as_good_as_eager(*flat, relative=1e-6, absolute=1e-9)


SPARSE_ROWS = ("random", "random, label kept", "empty slots", "one entry of mass 1", "empty row", "all of V",
               "mass zero", "mass above 1", "repeated id", "id out of range", "student +-1e4", "p = q",
               "weight 0, nan", "ignored, nan")  # fmt: skip


def sparse_zoo(vocab: int, kind: str, divergence: str, k: int = 6) -> cases.Case:
    z = torch.randn(len(SPARSE_ROWS), vocab)
    y = torch.randint(0, vocab, (len(z),))
    row = {name: i for i, name in enumerate(SPARSE_ROWS)}
    k = min(k, vocab)
    made = cases.sparse_teacher(torch.randn(len(z), vocab) * 2, y, k, kind, empty=False)
    ids, logprobs = made.ids.clone(), made.logprobs.clone()
    at = {name: (row[name], slice(None)) for name in SPARSE_ROWS}
    y[row["random, label kept"]] = ids[row["random, label kept"], -1]
    ids[row["empty slots"], 1::2] = -1
    ids[row["one entry of mass 1"], 1:], logprobs[row["one entry of mass 1"], 0] = -1, 0.0
    ids[at["empty row"]] = -1
    logprobs[row["mass zero"], -1] = -torch.inf if divergence == "forward_kl" else logprobs[row["mass zero"], -1]
    logprobs[at["mass above 1"]] += 1.5 - logprobs[at["mass above 1"]].logsumexp(-1)
    ids[row["repeated id"], -1] = ids[row["repeated id"], 0]
    ids[row["id out of range"], 0] = vocab
    ids[row["id out of range"], -1] = -7
    z[row["student +-1e4"]] = 1e4 * torch.where(torch.arange(vocab) % 2 == 0, 1.0, -1.0)
    log_q = torch.log_softmax(z, -1)
    logprobs[at["p = q"]] = log_q[at["p = q"]][ids[at["p = q"]]]
    logprobs[at["weight 0, nan"]] = logprobs[at["ignored, nan"]] = float("nan")
    y[row["ignored, nan"]] = -100
    if divergence == "reverse_kl":
        # q > 0 = t of the whole rest: as large as the floor of the tail lets it be, which float32 cannot resolve.
        logprobs[at["mass above 1"]] -= 2.0
    weights = torch.ones(len(z))
    weights[row["weight 0, nan"]] = 0.0
    teacher = TeacherTopK(ids, logprobs, kind)
    case = cases.of_logits(z, None, y, weights=weights, options=cases.RowOptions(divergence=divergence))
    return replace(case, teacher=cases.to(teacher, device=cases.DEVICE))


@SPARSE
@IMPL
def test_rows_of_every_sparse_kind(impl, kind, divergence):
    """What is defined without check=True as well: empty and repeated slots, ids out of range, masses above 1."""
    check(sparse_zoo(40, kind, divergence), impl)


@pytest.mark.parametrize("vocab", [7, 1027])
@SPARSE
@BULK
def test_rows_of_every_sparse_kind_in_other_widths(impl, kind, divergence, vocab):
    check(sparse_zoo(vocab, kind, divergence), impl)


@SPARSE
@BULK
def test_all_of_the_vocabulary_kept(impl, kind, divergence):
    """k = V: nothing is left to assume, and every kind is the dense teacher, bucket and all."""
    case = cases.make(rows=6, vocab=9, ignored=1, omega=0.8, divergence=divergence, temperature=2.0)
    log_p = torch.log_softmax(case.teacher, -1)
    ids = torch.stack([torch.randperm(9, device=cases.DEVICE) for _ in range(6)])
    full = TeacherTopK(ids, log_p.gather(1, ids), kind)
    for got, want in zip(cases.ours(replace(case, teacher=full), impl), cases.ours(case, impl)):
        # Of a tail bucket 1e-7 remains on either side.
        assert torch.allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("layout", ["int32", "strided", "lse", "float16"])
@IMPL
def test_layouts_of_sparse_teachers(impl, layout):
    case = cases.make(rows=7, vocab=60, teacher="uniform_tail", ignored=1)
    t = case.teacher
    if layout == "int32":
        same, other = t, replace(t, ids=t.ids.int())
    elif layout == "strided":
        wide_ids, wide_values = torch.stack([t.ids, t.ids + 1], -1), torch.stack([t.logprobs, -t.logprobs], -1)
        same, other = t, replace(t, ids=wide_ids[..., 0], logprobs=wide_values[..., 0])
    elif layout == "lse":
        lse = torch.randn(7, device=cases.DEVICE)
        same = replace(t, logprobs=(t.logprobs + lse[:, None]) - lse[:, None])
        other = replace(t, logprobs=t.logprobs + lse[:, None], lse=lse)
    else:
        other = replace(t, logprobs=t.logprobs.half())
        same = replace(other, logprobs=other.logprobs.float())
    for a, b in zip(cases.ours(case, impl, teacher=same), cases.ours(case, impl, teacher=other)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*cases.DENSE_KINDS, "tail_bucket"])
@BULK
def test_every_teacher_class(impl, kind, dtype):
    """Also with bfloat16 states, omega per token, a bias and a T of its own."""
    case = cases.make(rows=9, vocab=45, teacher=kind, bias=True, weights=True, dtype=dtype, temperature=2.0)
    case.omega = torch.rand(9, device=cases.DEVICE)
    truth = cases.oracle(cases.to(case, dtype=torch.float64))
    got, plain = cases.ours(case, impl), cases.oracle(case)
    eps = torch.finfo(dtype).eps
    for g, p, e in zip(got, plain, truth):
        flat = [v.reshape(1, -1) for v in (g, p, e)]
        assert_rows_as_good_as_eager(*flat, relative=8 * eps, absolute=1e-9)


@pytest.mark.parametrize("kind", [*cases.DENSE_KINDS, "truncated"])
@BULK
def test_chunks_of_every_teacher(impl, kind):
    """One row per chunk, a ragged last one, all at once: each source is cut where the rows are."""
    case = replace(cases.make(rows=11, vocab=40, teacher=kind, ignored=3), reduction="sum")
    truth = cases.oracle(cases.to(case, dtype=torch.float64))
    plain = cases.oracle(case)
    for rows in (1, 3, 100):
        got = cases.ours(case, impl, chunk_bytes=rows * 4 * 40)
        for g, p, e in zip(got, plain, truth):
            flat = [v.reshape(1, -1) for v in (g, p, e)]
            assert_rows_as_good_as_eager(*flat, relative=1e-6, absolute=1e-9)


@pytest.mark.parametrize("kind", ["logits", "hidden", "tail_bucket", "similarity"])
@IMPL
def test_empty_and_ignored_batches(impl, kind):
    case = cases.make(rows=4, vocab=30, teacher=kind)
    case.labels[:] = -100
    got = cases.ours(case, impl)
    assert all(x.eq(0).all() for x in got)
    empty = replace(cases.make(rows=1, vocab=30, teacher=kind, ignored=0))
    cut = {f: v[:0] for f, v in vars(empty.teacher).items() if isinstance(v, Tensor) and f not in ("table", "weight")}
    empty = replace(empty, hidden=empty.hidden[:0], labels=empty.labels[:0], teacher=replace(empty.teacher, **cut))
    got = cases.ours(empty, impl)
    assert all(x.eq(0).all() for x in got)
    assert got[2].shape == empty.weight.shape


@IMPL
def test_float16_logprobs(impl):
    """A cache of half-precision log-probabilities: as good as the same numbers in float32, to the last bit."""
    case = cases.make(rows=8, vocab=70, teacher="logprobs", temperature=2.0)
    half = replace(case.teacher, logprobs=case.teacher.logprobs.half())
    full = replace(half, logprobs=half.logprobs.float())
    for a, b in zip(cases.ours(case, impl, teacher=half), cases.ours(case, impl, teacher=full)):
        assert torch.equal(a, b)


@IMPL
def test_second_backward_and_factor_of_a_sparse_teacher(impl):
    case = cases.make(rows=6, vocab=40, teacher="tail_to_label")
    (loss, _), x = cases.result(case, impl)
    first = [g.clone() for g in torch.autograd.grad(2.0 * loss, x, retain_graph=True)]
    second = torch.autograd.grad(2.0 * loss, x)
    want = cases.oracle(cases.to(case, dtype=torch.float64), grad=2.0)[1:]
    for f, s, w in zip(first, second, want):
        assert torch.equal(f, s)
        assert (f - w).norm() <= 1e-5 * w.norm()


COMPILED = ["logits", "hidden", "logprobs", "tail_bucket", "confidence", "similarity+prob"]


@pytest.mark.parametrize("kind", COMPILED)
def test_compile_one_of_each_teacher(kind):
    """fullgraph, and the numbers of the plain call; teachers are made inside of the graph."""
    torch._dynamo.reset()
    case = cases.make(rows=6, vocab=30, teacher=kind, ignored=1, temperature=2.0)
    fields = {f: v for f, v in vars(case.teacher).items() if isinstance(v, Tensor)}

    def loss(hidden, weight, labels, tensors):
        keywords = {**cases.arguments(case), "teacher": replace(case.teacher, **tensors)}
        return linear_distill_loss(hidden, weight, labels, **keywords).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain = cases.ours(case, "auto")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            x = cases.leaves(case)
            value = compiled(*x, case.labels, fields)
            got = [value.detach(), *(torch.autograd.grad(value, x) if grad else [])]
        for a, b in zip(got, plain):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)
