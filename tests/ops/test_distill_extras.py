"""weight_grad and num_kept, which only save work, and check=True, which only looks."""

import math
from dataclasses import replace

import pytest
import torch

from effkern import TeacherConfidence, TeacherHidden, TeacherLogProbs, TeacherSimilarity, TeacherTopK
from effkern import linear_distill_loss as loss_of
from tests.ops import distill_cases as cases

IMPL = pytest.mark.parametrize("impl", cases.implementations())
BULK = pytest.mark.parametrize("impl", cases.implementations(bulk=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@IMPL
def test_weight_grad_accumulates(impl, dtype):
    """Added to what is there, over several calls and chunks; `weight` itself gets none, the others theirs."""
    case = cases.make(rows=9, vocab=40, bias=True, dtype=dtype)
    rows_alone = cases.ours(case, impl, chunk_bytes=3 * 4 * 40)
    into = torch.randn(40, 24, device=cases.DEVICE)
    start = into.clone()
    for _ in range(2):
        (loss, _), x = cases.result(case, impl, weight_grad=into, chunk_bytes=3 * 4 * 40)
        loss.backward()
        assert x[1].grad is None
        assert torch.equal(loss.detach(), rows_alone[0])
        assert torch.equal(x[0].grad, rows_alone[1])
        assert torch.equal(x[2].grad, rows_alone[3])
    # In float32 even where the returned gradient is rounded to bfloat16.
    truth = cases.oracle(cases.to(case, dtype=torch.float64))[2]
    bound = 1e-6 if dtype == torch.float32 else 8e-3
    assert ((into - start) / 2 - truth).norm() <= bound * truth.norm() + 1e-6


@IMPL
def test_weight_grad_refuses_what_it_cannot_scale(impl):
    case = cases.make(rows=5, vocab=20)
    into = torch.zeros(20, 24, device=cases.DEVICE)
    (loss, _), _ = cases.result(case, impl, weight_grad=into)
    with pytest.raises(RuntimeError, match=r"with weight_grad the gradient of the loss must be 1 \(scale by denom\)"):
        (2.0 * loss).backward()


@IMPL
def test_weight_grad_is_written_once(impl):
    """A second backward gives the other gradients again, and adds nothing more."""
    case = cases.make(rows=5, vocab=20, bias=True)
    into = torch.zeros(20, 24, device=cases.DEVICE)
    (loss, _), x = cases.result(case, impl, weight_grad=into)
    before = into.clone()
    first = torch.autograd.grad(loss, (x[0], x[2]), retain_graph=True)
    second = torch.autograd.grad(loss, (x[0], x[2]))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.equal(into, before)
    frozen = into.clone()
    with torch.no_grad():
        cases.result(case, impl, weight_grad=into)
    assert torch.equal(into, frozen)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight_grad": torch.zeros(20, 23)}, ValueError, r"weight_grad must have shape \[20, 24\], got \[20, 23\]"),
        ({"weight_grad": torch.zeros(20, 24).double()}, TypeError, r"weight_grad must have one of the dtypes float32"),
        ({"weight_grad": torch.zeros(24, 20).t()}, ValueError, r"weight_grad must be contiguous"),
        ({"weight_grad": torch.zeros(20, 24), "reduction": "none"}, ValueError, r"weight_grad must be None with reduc"),
        ({"num_kept": 4}, ValueError, r"num_kept must be the number of rows that are not ignored, not 4, got 3"),
        ({"num_kept": -1}, ValueError, r"num_kept must lie in \[0, "),
        ({"num_kept": 3.0}, TypeError, r"num_kept must be an int, got float"),
    ],
)
def test_rules(changes, error, message):
    case = cases.to(cases.make(rows=5, vocab=20), device="cpu")
    with pytest.raises(error, match="^linear_distill_loss: " + message):
        cases.result(case, **changes)


@pytest.mark.parametrize("kind", [None, *cases.DENSE_KINDS, "tail_to_label"])
@BULK
def test_num_kept_changes_nothing(impl, kind):
    case = cases.make(rows=11, vocab=40, bias=True, weights=True, teacher=kind or False, ignored=4)
    case.labels[-1] = -100
    for a, b in zip(cases.ours(case, impl), cases.ours(case, impl, num_kept=6)):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    case.labels[:] = -100
    assert all(x.eq(0).all() for x in cases.ours(case, impl, num_kept=0))


N, D, V = 3, 4, 10
NAN, INF = float("nan"), float("inf")


def topk(ids: list[int], logprobs: list[float], kind: str = "truncated") -> TeacherTopK:
    """One bad row between two good ones."""
    good = ([1, 2, 3], [-1.0, -2.0, -3.0])
    rows = [good, (ids, logprobs), good]
    return TeacherTopK(torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]), kind)


def rows_with(value: float, mass: float = 1.0) -> torch.Tensor:
    x = torch.log_softmax(torch.randn(N, V), -1) + math.log(mass)
    x[1, 4] = value if value == value or mass == 1.0 else x[1, 4]
    return x


BAD = [
    (lambda: cases.TeacherLogits(rows_with(NAN)), r"teacher.logits must hold neither NaN nor \+inf, got nan"),
    (lambda: cases.TeacherLogits(rows_with(INF)), r"teacher.logits must hold neither NaN nor \+inf, got inf"),
    (lambda: cases.TeacherLogits(torch.full((N, V), -INF)), r"teacher.logits must have a finite entry in every row"),
    (lambda: TeacherHidden(torch.full((N, 2), NAN), torch.randn(V, 2)), r"teacher.hidden must be finite, got nan"),
    (lambda: TeacherLogProbs(rows_with(NAN)), r"teacher.logprobs must hold neither NaN nor \+inf, got nan"),
    (lambda: TeacherLogProbs(rows_with(0.5)), r"teacher.logprobs must have a mass of at most 1, got"),
    (lambda: topk([1, 2, 10], [-1.0, -2.0, -3.0]), r"teacher.ids must lie in \[0, 10\), or be -1 .*, got 10"),
    (lambda: topk([1, 2, -5], [-1.0, -2.0, -3.0]), r"teacher.ids must lie in \[0, 10\), or be -1 .*, got -5"),
    (lambda: topk([1, 2, 1], [-1.0, -2.0, -3.0]), r"teacher.ids must be distinct in a row, got 1"),
    (lambda: topk([-1, -1, -1], [-1.0, -2.0, -3.0]), r"teacher.ids must have an entry in every row that counts, got 0"),
    (lambda: topk([1, 2, 4], [-0.1, -0.1, -0.1]), r"teacher.logprobs must have a mass above 0 and at most 1, got 2.7"),
    (lambda: topk([1, 2, 4], [-INF, -INF, -INF]), r"teacher.logprobs must have a mass above 0 and at most 1, got 0"),
    (
        lambda: topk([1, 2, 4], [0.7, -2.0, -3.0]),
        r"teacher.logprobs must be logarithms of masses .*, got 0.69",
    ),
    (lambda: topk([1, 2, 4], [NAN, -2.0, -3.0]), r"teacher.logprobs must be logarithms of masses .*, got nan"),
    (lambda: TeacherConfidence(torch.tensor([0.5, -0.1, 0.5])), r"teacher.logprobs must be logarithms of masses"),
    (lambda: TeacherConfidence(torch.tensor([0.5, 1.1, 0.5])), r"teacher.logprobs must be logarithms of masses"),
    (lambda: TeacherSimilarity(torch.full((V, V), NAN)), r"teacher.table must be finite, got nan"),
    (
        lambda: TeacherSimilarity(torch.randn(V, V), torch.tensor([0.5, 1.1, 0.5])),
        r"teacher.prob must lie in \[0, 1\], got 1.1",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m[:60] for _, m in BAD])
def test_checked_mode_says_what_is_wrong(make, message):
    """On a row that counts; the same row ignored is no error, and without check=True there is none either."""
    labels = torch.tensor([1, 2, 3])
    keywords = {"teacher": make(), "omega": 0.5, "temperature": 1.0, "teacher_temperature": 1.0}
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    with pytest.raises(ValueError, match="^linear_distill_loss: " + message):
        loss_of(hidden, weight, labels, check=True, **keywords)
    loss_of(hidden, weight, labels, **keywords)
    if not isinstance(keywords["teacher"], TeacherSimilarity) or keywords["teacher"].prob is not None:
        labels[:] = -100
        assert loss_of(hidden, weight, labels, check=True, **keywords).loss == 0


@pytest.mark.parametrize("kind", [*cases.DENSE_KINDS, *(k for k, _ in cases.SPARSE_PAIRS[:-1])])
@BULK
def test_checked_mode_passes_what_is_right(impl, kind):
    case = cases.make(rows=7, vocab=30, teacher=kind)
    for a, b in zip(cases.ours(case, impl), cases.ours(case, impl, check=True)):
        assert torch.equal(a, b)


@IMPL
def test_unchecked_slots_are_what_is_documented(impl):
    """Out of range: empty. Repeated: added up. A mass above 1: no tail. No entry: mass 0."""
    hidden, weight = torch.randn(1, D, device=cases.DEVICE), torch.randn(V, D, device=cases.DEVICE)
    labels = torch.tensor([5], device=cases.DEVICE)

    def run(ids: list[int], t: list[float], kind: str) -> list[torch.Tensor]:
        teacher = TeacherTopK(torch.tensor([ids]), torch.tensor([t]).log(), kind)
        w = weight.clone().requires_grad_()
        result = loss_of(hidden, w, labels, teacher=cases.to(teacher, device=cases.DEVICE), omega=1.0, temperature=1.0,
                         impl=impl)  # fmt: skip
        return [result.stats.teacher_lse, *torch.autograd.grad(result.loss, w)]

    for kind in ("truncated", "tail_bucket", "tail_to_label"):
        for a, b in zip(run([1, V, -9], [0.3, 0.5, 0.1], kind), run([1, -1, -1], [0.3, 0.5, 0.1], kind)):
            assert torch.equal(a, b)
    for kind in ("truncated", "tail_to_label"):
        for a, b in zip(run([1, 2, 1], [0.2, 0.3, 0.4], kind), run([1, 2, -1], [0.6, 0.3, 0.0], kind)):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(run([1, 2], [0.9, 0.6], "tail_to_label"), run([1, 2], [0.9, 0.6], "truncated")):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    lse, grad = run([-1, -1], [0.5, 0.5], "truncated")
    assert lse == -INF
    assert grad.eq(0).all()


def test_a_case_without_alpha_or_with_too_much_of_it():
    """The rules of alpha and beta are told apart from their absence."""
    x = {"hidden": torch.randn(N, D), "weight": torch.randn(V, D), "labels": torch.arange(N)}
    soft = {"teacher": cases.TeacherLogits(torch.randn(N, V)), "omega": 0.5, "temperature": 1.0,
            "teacher_temperature": 1.0}  # fmt: skip
    for name, given, message in (
        ("jsd", {}, r"beta must be given with divergence 'jsd' \(there is no default that fits all\), got None"),
        ("jsd", {"beta": 0.0}, r"beta must lie between 0 and 1, where the divergence is not zero \(its limits: norm"),
        ("jsd", {"beta": 1}, r"beta must lie between 0 and 1, .*got 1"),
        ("jsd", {"beta": 1.5}, r"beta must lie in \[0, 1\], got 1.5"),
        ("jsd", {"beta": 0.5, "alpha": 0.1}, r"alpha must be None with divergence 'jsd', got 0.1"),
        ("forward_kl", {"beta": 0.5}, r"beta must be None with divergence 'forward_kl', got 0.5"),
        ("symmetric_kl", {"beta": -0.1}, r"beta must lie in \[0, 1\], got -0.1"),
        ("skew_forward_kl", {"alpha": 1.0}, r"alpha must be below 1 \(at 1 the divergence is zero\), got 1.0"),
        ("skew_reverse_kl", {}, r"alpha must be given with divergence 'skew_reverse_kl'"),
        ("decoupled_kl", {"alpha": 1.0}, r"beta must be given with divergence 'decoupled_kl'"),
        ("decoupled_kl", {"alpha": -1.0, "beta": 1.0}, r"alpha must be >= 0 and finite, got -1.0"),
        ("mse", {"temperature": 2.0}, r"temperature must be 1 with 'mse', which is taken on the logits themselves"),
        ("forward_kl", {"normalize_jsd": True}, r"normalize_jsd must be False unless divergence is 'jsd', got 'forw"),
    ):
        with pytest.raises(ValueError, match="^linear_distill_loss: " + message):
            loss_of(**x, **{**soft, "divergence": name, **given})
    for flag in ("t_squared", "normalize_jsd"):
        with pytest.raises(TypeError, match=rf"{flag} must be a bool, got int"):
            loss_of(**x, **{**soft, "divergence": "jsd", "beta": 0.5, flag: 1})


def sparse(**changes) -> TeacherTopK:
    return replace(topk([1, 2, 4], [-1.0, -2.0, -3.0]), **changes)


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        (sparse(kind="top"), {}, r"teacher.kind must be one of 'truncated', .*'stratified', got 'top'"),
        (sparse(ids=torch.zeros(2, 3, dtype=torch.int64)), {}, r"teacher.ids must have shape \[3, \*\], got \[2, 3\]"),
        (sparse(logprobs=torch.zeros(3, 2)), {}, r"teacher.logprobs must have shape \[3, 3\], got \[3, 2\]"),
        (sparse(ids=torch.zeros(3, 0, dtype=torch.int64), logprobs=torch.zeros(3, 0)), {},
         r"teacher.ids must have at least one column"),
        (sparse(lse=torch.zeros(4)), {}, r"teacher.lse must have shape \[3\], got \[4\]"),
        (sparse(), {"divergence": "reverse_kl"}, r"divergence must be 'forward_kl' with a TeacherTopK of kind 'trunc"),
        (sparse(), {"divergence": "tvd"}, r"divergence must be 'forward_kl' with TeacherTopK, got 'tvd'"),
        (sparse(), {"teacher_temperature": 2.0},
         r"teacher_temperature must be 1 with a TeacherTopK of kind 'truncated': what was cut away cannot be re-temp"),
        (TeacherConfidence(torch.ones(2)), {}, r"teacher.prob must have shape \[3\], got \[2\]"),
        (TeacherConfidence(torch.ones(3)), {"divergence": "mse"}, r"divergence must be 'forward_kl' with TeacherConf"),
        (TeacherSimilarity(torch.zeros(V, V + 1)), {}, r"teacher.table must have shape \[10, 10\], got \[10, 11\]"),
        (TeacherSimilarity(torch.zeros(V, V)), {"divergence": "mse"}, r"divergence must compare probabilities with T"),
        (TeacherLogProbs(torch.zeros(N, V)), {"divergence": "cosine"}, r"divergence must compare probabilities with T"),
        (TeacherLogProbs(torch.zeros(N, V - 1)), {}, r"teacher.logprobs must cover vocab_valid \(10\) entries"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)  # fmt: skip
def test_rules_of_teachers(teacher, changes, message):
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    soft = {"omega": 0.5, "temperature": 1.0, "teacher_temperature": 1.0}
    if changes.get("divergence") in ("mse", "cosine"):
        soft |= {"temperature": None, "teacher_temperature": None}
    with pytest.raises(ValueError, match="^linear_distill_loss: " + message):
        loss_of(hidden, weight, torch.arange(N), teacher=teacher, **{**soft, **changes})
