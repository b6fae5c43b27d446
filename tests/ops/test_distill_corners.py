"""Corners of the loss where a formula that is right elsewhere loses its digits, its factor, or its zero."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from effkern import (
    TeacherConfidence,
    TeacherLogits,
    TeacherLogProbs,
    TeacherSimilarity,
    TeacherTopK,
    linear_distill_loss,
)
from effkern.nn import LinearDistillLoss
from effkern.ops.distill import reference
from effkern.ops.distill.cpp import cpp_rows
from effkern.ops.distill.rows import RowOptions, Rows
from effkern.ops.soft_labels import soft_labels_from_logits
from tests.numerics import rel_err

N, D, V = 6, 8, 40
T1 = {"temperature": 1.0, "teacher_temperature": 1.0}


def inputs(dtype=torch.float32):
    hidden, weight = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((N, D), (V, D)))
    return hidden, weight, torch.randint(0, V, (N,))


@pytest.mark.parametrize("limit", [None, 4000])
def test_weight_grad_of_float16_is_divided_by_the_denominator(limit):
    hidden, weight, labels = inputs(torch.float16)
    linear_distill_loss(hidden, weight, labels).loss.backward()
    into = torch.zeros(V, D)
    linear_distill_loss(hidden, weight, labels, weight_grad=into, memory_limit=limit).loss.backward()
    assert rel_err(into, weight.grad.double()) < 2e-3


def test_weight_grad_is_refused_where_forward_runs_twice():
    hidden, weight, labels = inputs()
    into = torch.zeros(V, D)

    def call(x):
        return linear_distill_loss(x * 2, weight, labels, weight_grad=into).loss

    with pytest.raises(NotImplementedError, match="weight_grad must be None inside of an activation checkpoint"):
        checkpoint(call, hidden, use_reentrant=False)
    assert not into.any()
    checkpoint(call, hidden, use_reentrant=True).backward()
    again = torch.zeros(V, D)
    linear_distill_loss(hidden * 2, weight, labels, weight_grad=again)
    torch.testing.assert_close(into, again)


@pytest.mark.parametrize("with_prob", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "decoupled_kl"])
def test_a_table_is_tempered_once(divergence, with_prob):
    hidden, weight, labels = inputs(torch.float64)
    table, prob = torch.randn(V, V).double() * 3, torch.rand(N).double()
    parameters = {"alpha": 1.0, "beta": 2.0} if divergence == "decoupled_kl" else {}
    options = {"omega": 0.5, "divergence": divergence, "temperature": 1.0, **parameters}
    rows = (table[labels] / 2).softmax(-1)
    if with_prob:
        rest = rows.scatter(1, labels[:, None], 0.0)
        rows = (rest / rest.sum(-1, keepdim=True) * (1 - prob)[:, None]).scatter(1, labels[:, None], prob[:, None])
    teacher = TeacherSimilarity(table, prob if with_prob else None)
    ours = linear_distill_loss(hidden, weight, labels, teacher=teacher, teacher_temperature=2.0, **options)
    by_hand = linear_distill_loss(
        hidden, weight, labels, teacher=TeacherLogits(rows.log()), teacher_temperature=1.0, **options
    )
    for a, b in zip(ours.stats, by_hand.stats):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("divergence", "parameters", "same_as"),
    [
        ("skew_forward_kl", {"alpha": 0}, "forward_kl"),
        ("skew_reverse_kl", {"alpha": 0.0}, "reverse_kl"),
        ("symmetric_kl", {"beta": 1}, "forward_kl"),
        ("symmetric_kl", {"beta": 0.0}, "reverse_kl"),
    ],
)
def test_ends_of_mixtures_are_the_kl_divergences(divergence, parameters, same_as):
    """Gaps of thousands between the models, and entries that one of them lacks: the other term must not be seen."""
    hidden, weight, labels = inputs()
    logprobs = (torch.randn(N, V) * 30).log_softmax(-1)
    if same_as == "forward_kl":
        logprobs[:, 3] = -torch.inf
    results = []
    for name, numbers in ((divergence, parameters), (same_as, {})):
        x = hidden.detach().clone().requires_grad_()
        result = linear_distill_loss(
            x, weight, labels, teacher=TeacherLogProbs(logprobs), omega=1.0, divergence=name, **T1, **numbers
        )
        result.loss.backward()
        assert torch.isfinite(result.loss)
        results.append((result.loss.detach(), x.grad))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_decoupled_without_its_inner_term_does_not_see_its_masks():
    hidden, weight, labels = inputs()
    labels = labels.clamp(max=V - 2)
    bias = torch.zeros(V)
    bias[-1] = -torch.inf
    options = {"teacher": TeacherLogits(torch.randn(N, V)), "omega": 0.5, "divergence": "decoupled_kl", **T1}
    for impl in ("auto", "reference"):
        result = linear_distill_loss(hidden, weight, labels, bias=bias, alpha=1.0, beta=0.0, impl=impl, **options)
        assert torch.isfinite(result.loss)


@pytest.mark.parametrize("beta", [0.999, 0.9999, 1 - 1e-6, 1e-3, 1e-4])
def test_normalised_jsd_near_its_ends(beta):
    case = [torch.randn(4, 500) * 2 for _ in range(2)]
    o = RowOptions("jsd", beta=beta, divergence_scale=1 / (beta * (1 - beta)))
    truth, ours = rows_of(*case, o)
    assert rel_err(ours[0][2], truth[0][2]) < 1e-3
    assert rel_err(ours[1], truth[1]) < 1e-3


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize("share", [1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_tiny_share_of_a_mixture(name, share, impl):
    """Where one model is sure and the other is not, log(m) is that of the share, which 1 would swallow."""
    z, u = torch.randn(4, 500), torch.randn(4, 500) * 12
    for o in (RowOptions(name, alpha=share, beta=share), RowOptions(name, alpha=share, beta=1 - share)):
        stats, grad = rows_of(z, u, o)[0]
        x, y = torch.log_softmax(u.double(), -1), torch.log_softmax(z.double(), -1)
        alpha, beta = (torch.tensor(v, dtype=torch.float64).log() for v in (o.alpha, o.beta))
        rest_alpha, rest_beta = torch.tensor([1 - o.alpha, 1 - o.beta], dtype=torch.float64).log()
        if name == "jsd":
            m = torch.logaddexp(beta + x, rest_beta + y)
            value = o.beta * x.exp() * (x - m) + (1 - o.beta) * y.exp() * (y - m)
        elif name == "skew_forward_kl":
            value = x.exp() * (x - torch.logaddexp(alpha + x, rest_alpha + y))
        else:
            value = y.exp() * (y - torch.logaddexp(rest_alpha + x, alpha + y))
        assert rel_err(stats[2], value.sum(-1)) < 1e-5
        ours = rows_of(z, u, o, impl=impl)[1]
        assert rel_err(ours[0][2], stats[2]) < 1e-5
        assert rel_err(ours[1], grad) < 1e-5


def rows_of(z, u, options, ids=None, logprobs=None, impl="cpp"):
    """(statistics, gradient) of the reference in float64 and of the C++ rows, or of the reference in float32."""
    labels, ones = torch.zeros(z.shape[0], dtype=torch.int64), torch.ones(z.shape[0])
    found = []
    for wide in (True, False):
        cast = (lambda x: None if x is None else x.double()) if wide else (lambda x: None if x is None else x.clone())
        stats = torch.zeros(13, z.shape[0], dtype=torch.float64 if wide else torch.float32)
        rows = Rows(cast(z), cast(u), ids, cast(logprobs), None, labels, cast(ones), cast(ones), stats)
        run = cpp_rows if impl == "cpp" and not wide else reference.reference_rows
        grad = run(rows, stats.dtype, options)
        found.append((stats, grad))
    return found


@pytest.mark.parametrize("lead", [8.0, 14.0, 18.0])
def test_tail_bucket_of_a_sure_student(lead):
    """The student puts all but exp(-lead) on what the teacher keeps."""
    rows, vocab, k = 5, 3000, 8
    z = torch.randn(rows, vocab)
    ids = torch.stack([torch.randperm(vocab)[:k] for _ in range(rows)])
    z.scatter_add_(1, ids, torch.full((rows, k), lead + 6.0))
    logprobs = torch.randn(rows, k).log_softmax(-1) + torch.tensor(0.9).log()
    o = RowOptions("forward_kl", teacher="tail_bucket")
    (_, truth), (_, ours) = rows_of(z, None, o, ids, logprobs)
    assert rel_err(ours, truth) < 1e-5
    kept = torch.zeros(rows, vocab, dtype=torch.bool).scatter_(1, ids, True)
    assert rel_err(ours[~kept], truth[~kept]) < 1e-5
    # It vanishes as long as the floor of the masses is not reached.
    torch.testing.assert_close(ours.double().sum(-1), truth.sum(-1), rtol=0, atol=1e-5)


def test_counts_with_draws_per_row():
    counts = torch.tensor([[3, 1, 0], [2, 2, 2], [1, 0, 0]])
    teacher = TeacherTopK.from_counts(torch.arange(9).view(3, 3), counts, counts.sum(-1))
    torch.testing.assert_close(teacher.logprobs.exp().sum(-1), torch.ones(3))
    assert teacher.ids[0, 2] == -1


def test_confidence_of_zero_is_legal_when_checked():
    hidden, weight, labels = inputs()
    prob = torch.tensor([0.0, 1.0, 0.5, 0.2, 0.0, 1.0])
    result = linear_distill_loss(hidden, weight, labels, teacher=TeacherConfidence(prob), omega=0.5, check=True, **T1)
    assert torch.isfinite(result.loss)


def test_tokens_must_be_spread_alike():
    loss = LinearDistillLoss(**T1)
    hidden, weight = torch.randn(2, 3, D), torch.randn(V, D)
    with pytest.raises(ValueError, match=r"labels must have the leading dimensions of hidden, \[2, 3\], got \[3, 2\]"):
        loss(hidden, weight, torch.zeros(3, 2, dtype=torch.int64))
    teacher = TeacherLogits(torch.randn(3, 2, V))
    with pytest.raises(ValueError, match=r"teacher.logits must have the leading dimensions of hidden"):
        loss(hidden, weight, torch.zeros(2, 3, dtype=torch.int64), teacher=teacher, omega=0.5)


@pytest.mark.parametrize(("spread", "temperature"), [(10.0, 3e-18), (1e20, 0.7), (1.0, 1e-18), (3e37, 1e-30)])
def test_soft_labels_at_the_edge_of_the_numbers(spread, temperature):
    """Differences that no exponential holds leave the largest entry alone."""
    z = torch.randn(500, 50) * spread
    for impl in ("cpp", "reference"):
        labels = soft_labels_from_logits(z, method="sampled", draws=4, temperature=temperature, impl=impl)
        assert torch.equal(labels.ids[:, 0].long(), z.argmax(-1))
        torch.testing.assert_close(labels.logprobs[:, 0], torch.zeros(500))
