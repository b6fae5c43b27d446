"""LinearDistillLoss is linear_distill_loss: leading dimensions of every teacher, and every option."""

from dataclasses import replace
from inspect import signature

import pytest
import torch
from torch import Tensor

from effkern import TeacherHidden, TeacherLogits, TeacherLogProbs, TeacherTopK, linear_distill_loss
from effkern.nn import LinearDistillLoss
from effkern.ops.distill.rows import SPARSE_KINDS
from tests.ops import distill_cases as cases

# Tensors of a teacher that are not per token.
SHARED = ("weight", "bias", "table")


def folded(teacher):
    """The same teacher over [2, 3] tokens."""
    per_token = {f: v for f, v in vars(teacher).items() if isinstance(v, Tensor) and f not in SHARED}
    return replace(teacher, **{f: v.view(2, 3, *v.shape[1:]) for f, v in per_token.items()})


@pytest.mark.parametrize("kind", [*cases.DENSE_KINDS, *SPARSE_KINDS, "lse", "all of a hidden one"])
def test_leading_dimensions_of_every_teacher(kind):
    """Loss and gradients bit for bit, with weights and omega per token."""
    case = cases.make(rows=6, vocab=30, weights=True, bias=True, ignored=1)
    if kind == "lse":
        teacher = cases.teacher_of("renormalized", case.teacher, case.labels)
        teacher = replace(teacher, lse=torch.randn(6, device=cases.DEVICE))
    elif kind == "all of a hidden one":
        states, head, b = (torch.randn(*s, device=cases.DEVICE) for s in ((6, 7), (30, 7), (30,)))
        teacher = TeacherHidden(states, head, b, softcap=3.0, logit_scale=0.5)
    else:
        teacher = cases.teacher_of(kind, case.teacher, case.labels)
    omega = torch.rand(2, 3, device=cases.DEVICE)
    x, y = cases.leaves(case), cases.leaves(case)
    module = LinearDistillLoss(temperature=2.0, teacher_temperature=1.0)
    got = module(
        x[0].view(2, 3, -1), x[1], case.labels.view(2, 3), teacher=folded(teacher), omega=omega, bias=x[2], denom=9.0,
        weights=case.weights.view(2, 3),
    )  # fmt: skip
    want = linear_distill_loss(
        y[0], y[1], case.labels, teacher=teacher, omega=omega.flatten(), bias=y[2], denom=9.0, weights=case.weights,
        temperature=2.0, teacher_temperature=1.0,
    )  # fmt: skip
    assert torch.equal(got.loss, want.loss)
    for a, b in zip(got.stats, want.stats):
        assert torch.equal(a, b)
    for a, b in zip(torch.autograd.grad(got.loss, x), torch.autograd.grad(want.loss, y)):
        assert torch.equal(a, b)


OPTIONS = [
    {"divergence": "jsd", "beta": 0.3},
    {"divergence": "jsd", "beta": 1.0, "normalize_jsd": True},
    {"divergence": "skew_reverse_kl", "alpha": 0.2, "t_squared": True},
    {"divergence": "decoupled_kl", "alpha": 1.0, "beta": 2.0, "check": True},
    {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0, "logit_scale": 0.5, "vocab_valid": 28},
    {"reduction": "sum", "ignore_index": 5, "chunk_bytes": 999, "impl": "reference"},
    {"reduction": "sum", "memory_limit": 1 << 20},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_options_are_passed_on(options):
    case = cases.make(rows=6, vocab=30, ignored=1, ignore_index=options.get("ignore_index", -100))
    case.labels.clamp_(max=27)
    soft = {"temperature": 2.0, "teacher_temperature": 0.5}
    module = LinearDistillLoss(**soft, **options)
    assert f"{next(iter(options))}=" in repr(module)
    given = {"teacher": TeacherLogits(case.teacher), "omega": 0.4}
    got = module(case.hidden, case.weight, case.labels, **given)
    want = linear_distill_loss(case.hidden, case.weight, case.labels, **given, **soft, **options)
    plain = linear_distill_loss(case.hidden, case.weight, case.labels, **given, **soft)
    assert torch.equal(got.loss, want.loss)
    assert not torch.equal(got.loss, plain.loss)


def test_every_keyword_is_an_option_or_comes_with_the_call():
    keywords = set(signature(linear_distill_loss).parameters)
    of_the_call = set(signature(LinearDistillLoss.forward).parameters) - {"self"}
    of_the_module = LinearDistillLoss.OPTIONS | {"temperature", "teacher_temperature"}
    assert keywords == of_the_call | of_the_module
    assert not of_the_call & of_the_module


def test_options_are_checked_when_the_module_is_made():
    with pytest.raises(ValueError, match=r"beta must be given with divergence 'jsd'"):
        LinearDistillLoss(divergence="jsd")
    with pytest.raises(ValueError, match=r"alpha must be None with divergence 'forward_kl', got 0.5"):
        LinearDistillLoss(alpha=0.5)
    with pytest.raises(TypeError, match=r"t_squared must be a bool, got int"):
        LinearDistillLoss(t_squared=1)
    with pytest.raises(TypeError, match=r"LinearDistillLoss: options must be among .*, got \['omega'\]"):
        LinearDistillLoss(omega=0.5)


def test_what_is_no_teacher_is_refused_by_the_op():
    module = LinearDistillLoss(temperature=1.0, teacher_temperature=1.0)
    x = torch.randn(3, 4), torch.randn(5, 4), torch.arange(3)
    with pytest.raises(TypeError, match=r"teacher must be one of the Teacher classes or None, got Tensor"):
        module(*x, teacher=torch.randn(3, 5), omega=0.5)
    with pytest.raises(TypeError, match=r"teacher.ids must be a tensor, got list"):
        module(*x, teacher=TeacherTopK([[1]], torch.zeros(3, 1), "truncated"), omega=0.5)
    cut = TeacherLogProbs(torch.randn(2, 4, 5)[:, :-1])
    with pytest.raises(ValueError, match=r"teacher.logprobs must flatten to \[N, V\] without a copy"):
        module(torch.randn(2, 3, 4), x[1], torch.zeros(2, 3, dtype=torch.int64), teacher=cut, omega=0.5)


def test_weight_grad_and_num_kept():
    case = cases.make(rows=6, vocab=30, ignored=2)
    plain = cases.ours(case, "auto")
    into = torch.zeros_like(case.weight)
    hidden, weight = cases.leaves(case)
    module = LinearDistillLoss(temperature=1.0, teacher_temperature=1.0)
    module(hidden, weight, case.labels, teacher=TeacherLogits(case.teacher), omega=case.omega, num_kept=4,
           weight_grad=into).loss.backward()  # fmt: skip
    assert torch.allclose(into, plain[2], rtol=1e-5, atol=1e-7)
    assert torch.allclose(hidden.grad, plain[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["logits", "tail_bucket", "similarity+prob"])
def test_compile(kind):
    torch._dynamo.reset()
    case = cases.make(rows=6, vocab=30, teacher=kind, ignored=1)
    module = LinearDistillLoss(temperature=1.0, teacher_temperature=1.0)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    arguments = (case.hidden.view(2, 3, -1), case.weight, case.labels.view(2, 3))
    keywords = {"teacher": folded(case.teacher), "omega": 0.5}
    assert torch.allclose(compiled(*arguments, **keywords).loss, module(*arguments, **keywords).loss)
