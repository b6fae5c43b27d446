"""gkd_loss: the formula of TRL's generalized_jsd_loss in float64, from logits and from hidden states."""

import pytest
import torch
from torch.nn import functional as F

from effkern import TeacherHidden
from effkern.integrations.trl import gkd_loss
from tests.numerics import assert_as_good_as_eager, rel_err

BETAS = (0, 0.1, 0.5, 1)


def formula(student, teacher, labels=None, beta=0.5, temperature=1.0, reduction="batchmean"):
    """Written from the definition; `mean` and `batchmean` are TRL's denominators."""
    log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    m = beta * p + (1 - beta) * q
    if beta == 0:
        entries = p * (log_p - log_q)
    elif beta == 1:
        entries = q * (log_q - log_p)
    else:
        entries = beta * p * (log_p - m.log()) + (1 - beta) * q * (log_q - m.log())
    kept = torch.ones(student.shape[:-1], dtype=torch.bool) if labels is None else labels != -100
    total = entries[kept].sum()
    count = student.shape[0] if labels is None else kept.sum()
    return {"sum": total, "mean": total / (kept.sum() * student.shape[-1]), "batchmean": total / count}[reduction]


def case(dtype=torch.float32, shape=(3, 7, 37), masked=True):
    student, teacher = (2 * torch.randn(shape, dtype=torch.float64)).to(dtype), torch.randn(shape).to(dtype) * 2
    labels = torch.randint(0, shape[-1], shape[:-1])
    labels.view(-1)[::3] = -100
    return student, teacher, labels if masked else None


def run(function, student, *args, **options):
    x = student.detach().requires_grad_()
    loss = function(x, *args, **options)
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("masked", [True, False])
def test_logits(beta, reduction, masked):
    student, teacher, labels = case(masked=masked)
    options = {"beta": beta, "temperature": 1.7, "reduction": reduction}
    truth = run(formula, student.double(), teacher.double(), labels, **options)
    eager = run(formula, student, teacher, labels, **options)
    for fast, plain, true, ulps in zip(run(gkd_loss, student, teacher, labels, **options), eager, truth, (4, 1)):
        assert_as_good_as_eager(fast, plain, true, ulps=ulps)


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype, impl, monkeypatch):
    """Three rows a chunk; sums are float32, the gradient is rounded once."""
    from effkern.ops.distill import chunked

    monkeypatch.setattr(chunked, "chunk_bytes", lambda device: 3 * 37 * 4)
    student, teacher, labels = case(dtype)
    loss, grad = run(gkd_loss, student, teacher, labels, impl=impl)
    true_loss, true_grad = run(formula, student.double(), teacher.double(), labels)
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
    assert rel_err(loss, true_loss) < 1e-6
    # Rounded without and with the denominator.
    assert rel_err(grad, true_grad) < torch.finfo(dtype).eps


def test_float64_and_logits_that_were_cut():
    """A view without the prompt, as TRL cuts it, and a teacher with gaps between its entries."""
    student, teacher, labels = case(torch.float64, (3, 9, 37))
    cut, gaps = student[:, 2:-1], teacher[:, 2:-1].mT.contiguous().mT
    loss, grad = run(gkd_loss, cut, gaps, labels[:, 2:-1])
    true_loss, true_grad = run(formula, cut, gaps, labels[:, 2:-1])
    assert rel_err(loss, true_loss) < 1e-14
    assert rel_err(grad, true_grad) < 1e-13


@pytest.mark.parametrize("beta", BETAS)
def test_hidden_states(beta):
    """Gradients of hidden states and output layer; two hidden sizes."""
    hidden, weight, bias = torch.randn(2, 8, 12), torch.randn(37, 12), torch.randn(37)
    states, table = torch.randn(2, 8, 5), torch.randn(37, 5)
    labels = torch.randint(0, 37, (2, 8))
    labels[0, :3] = -100
    found = []
    for wide in (False, True):
        h, w, b = ((x.double() if wide else x).detach().requires_grad_() for x in (hidden, weight, bias))
        if wide:
            loss = formula(h @ w.t() + b, states.double() @ table.double().t(), labels, beta, 0.7)
        else:
            loss = gkd_loss((h, w, b), (states, table), labels, beta, 0.7)
        loss.backward()
        found.append((loss.detach(), h.grad, w.grad, b.grad))
    for got, true in zip(*found):
        assert rel_err(got, true) < 2e-6
    same = gkd_loss((hidden, weight, bias), TeacherHidden(states, table), labels, beta, 0.7)
    assert torch.equal(same, found[0][0])


@pytest.mark.parametrize("beta", [4e-8, 1e-12, 1 - 4e-8, 1 - 1e-12])
def test_a_beta_that_float32_cannot_tell_from_its_ends(beta):
    """Where 1 - beta, or beta, is 1 or next to it in float32: the first order of the formula in float64."""
    student, teacher, labels = case()
    # A row whose teacher has nearly nothing at the student's most likely entry, and the other way round.
    student[0, 0, 0], teacher[0, 0, 0], student[0, 1, 1], teacher[0, 1, 1] = 15.0, -9.0, -9.0, 15.0
    loss, grad = run(gkd_loss, student, teacher, labels, beta=beta)
    exact = run(formula, student.double(), teacher.double(), labels, beta=beta)[0]
    ends = run(formula, student.double(), teacher.double(), labels, beta=round(beta))
    small = min(beta, 1 - beta)
    assert rel_err(loss, small * ends[0]) < 1e-6
    assert rel_err(grad, small * ends[1]) < 1e-5
    assert rel_err(loss, exact) < 0.01
    hidden = gkd_loss((student, torch.eye(37)), (teacher, torch.eye(37)), labels, beta=beta)
    assert rel_err(hidden, small * ends[0]) < 1e-6


def test_padded_vocabularies_and_ignored_rows_that_hold_anything():
    student, teacher, labels = case()
    want = run(gkd_loss, student, teacher, labels)
    wider, other = F.pad(student, (0, 3), value=9.0), F.pad(teacher, (0, 11), value=torch.nan)
    wider[labels == -100] = torch.inf
    loss, grad = run(gkd_loss, wider, other, labels, vocab_valid=37)
    assert torch.equal(loss, want[0])
    assert torch.equal(grad[..., :37], want[1])
    assert not grad[..., 37:].any()
    loss, grad = run(gkd_loss, student, teacher, torch.full_like(labels, -100))
    assert loss == 0
    assert not grad.any()


def test_as_the_method_of_a_trainer():
    """TRL calls it through the instance, by keyword."""

    class Trainer:
        generalized_jsd_loss = staticmethod(gkd_loss)

    student, teacher, labels = case()
    options = {"student_logits": student, "teacher_logits": teacher, "labels": labels, "beta": 0.3}
    loss = Trainer().generalized_jsd_loss(**options, temperature=0.9)
    assert rel_err(loss, formula(student.double(), teacher.double(), labels, 0.3, 0.9)) < 1e-6


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"reduction": "none"}, NotImplementedError, r"gkd_loss: reduction must be one of .* got 'none'"),
        ({"reduction": "max"}, ValueError, r"gkd_loss: reduction must be one of .* got 'max'"),
        ({"beta": 1.1}, ValueError, r"gkd_loss: beta must be in \[0, 1\], got 1.1"),
        ({"temperature": 0.0}, ValueError, r"gkd_loss: temperature must be positive and finite, got 0.0"),
        ({"num_items_in_batch": 0}, ValueError, r"num_items_in_batch must be a positive number or a 0-d tensor, got 0"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, ValueError, r"labels must have shape \[3, 7\], got \[3\]"),
        ({"teacher_logits": torch.zeros(3, 6, 37)}, ValueError, r"must have the leading dimensions \[3, 7\]"),
        ({"teacher_logits": torch.zeros(3, 7, 36)}, ValueError, r"teacher_logits must cover vocab_valid=37 .* got 36"),
        ({"teacher_logits": (torch.zeros(3, 7, 2), torch.zeros(37, 2))}, TypeError, r"must be logits where student_l"),
        ({"student_logits": torch.zeros(3, 7, 37).long()}, TypeError, r"must be a floating tensor, got torch.int64"),
        ({"student_logits": {}}, TypeError, r"student_logits must be a tensor, \(hidden, weight\) or .* got dict"),
    ],
)
def test_bad_input(changes, kind, message):
    student, teacher, labels = case()
    with pytest.raises(kind, match=message):
        gkd_loss(**{"student_logits": student, "teacher_logits": teacher, "labels": labels, **changes})


def test_a_second_backward_and_a_second_derivative_are_refused():
    student, teacher, labels = case()
    x = student.requires_grad_()
    with pytest.raises(NotImplementedError, match="create_graph=True is not covered"):
        torch.autograd.grad(gkd_loss(x, teacher, labels), x, create_graph=True)
    loss = gkd_loss(x, teacher, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="must be used once, got a second backward"):
        loss.backward()
