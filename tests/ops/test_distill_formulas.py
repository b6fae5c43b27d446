"""The reference against paper: textbook values, the table of gradients, and its hand gradients against autograd."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from effkern import TeacherLogProbs, TeacherTopK
from effkern.ops.distill import reference
from effkern.ops.distill.rows import SPARSE_KINDS, RowOptions
from tests.ops import distill_cases as cases
from tests.ops import distill_textbook as textbook

pytestmark = pytest.mark.skipif(cases.DEVICE != "cpu", reason="float64 on paper needs no device")

EXACT = 1e-12
TEMPERATURES = [(1.0, 1.0), (0.25, 0.25), (4.0, 4.0), (2.0, 0.5)]


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= EXACT * want.abs().max().clamp_min(1.0)


def soft_alone(case: cases.Case) -> tuple[Tensor, Tensor]:
    """D [R], and its gradient with respect to z / T [R, V]."""
    case = replace(case, omega=1.0)
    options = cases.plain_options(case)
    rows = cases.rows_of(case)
    return reference.row_stats(rows, options)[2], reference.row_grad(rows, options) * options.temperature


def wide(**others) -> cases.Case:
    return cases.to(cases.make(rows=7, dim=9, vocab=12, ignored=0, **others), dtype=torch.float64)


# The logit losses are defined at temperature 1.
TEMPERED = [(n, t) for n in cases.PARAMETERS for t in TEMPERATURES if n in cases.TEMPERED or t == (1.0, 1.0)]


@pytest.mark.parametrize(("name", "temperatures"), TEMPERED)
def test_divergences_are_those_of_the_textbook(name, temperatures):
    options = {"temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    case = wide(spread=1.5, **cases.divergence_options(name), **options)
    x = textbook.dense(case.hidden @ case.weight.t(), case.teacher, case.labels, *temperatures)
    parameters = {"alpha": 0.0, "beta": 0.0, **cases.PARAMETERS[name]}
    value, gradient = soft_alone(case)
    close(value, textbook.value(x, name, **parameters))
    close(gradient, textbook.gradient(x, name, **parameters))


@pytest.mark.parametrize("mass", [0.7, 1.0])
@pytest.mark.parametrize("name", [n for n in cases.TEMPERED if n != "decoupled_kl"])
def test_log_probabilities_keep_their_mass(name, mass):
    """S = 0.7: nothing is renormalised, in any divergence."""
    case = wide(temperature=2.0, **cases.divergence_options(name))
    logprobs = torch.log_softmax(case.teacher, -1) + torch.tensor(mass).log()
    case.teacher = TeacherLogProbs(logprobs)
    x = textbook.given(case.hidden @ case.weight.t(), logprobs, case.labels, 2.0)
    parameters = {"alpha": 0.0, "beta": 0.0, **cases.PARAMETERS[name]}
    value, gradient = soft_alone(case)
    close(value, textbook.value(x, name, **parameters))
    close(gradient, textbook.gradient(x, name, **parameters))


def full_slots(case: cases.Case, kind: str) -> tuple[TeacherTopK, textbook.Sparse]:
    """Five entries of each row with three quarters of the mass; the label among them in the even rows."""
    rows, vocab = case.teacher.shape
    ids = torch.stack([torch.randperm(vocab)[:5] for _ in range(rows)])
    for row, (kept, label) in enumerate(zip(ids, case.labels)):
        others = kept[kept != label]
        more = torch.tensor([i for i in range(vocab) if i not in kept and i != label])
        ids[row] = torch.cat([label[None], others])[:5] if row % 2 == 0 else torch.cat([others, more])[:5]
    t = torch.softmax(torch.randn(rows, 5, dtype=torch.float64), -1) * 0.75
    q = torch.softmax(case.hidden @ case.weight.t() / case.options.temperature, -1)
    return TeacherTopK(ids, t.log(), kind), textbook.Sparse(ids, t, q, case.labels[:, None])


@pytest.mark.parametrize("t_student", [0.25, 1.0, 4.0])
@pytest.mark.parametrize(("kind", "divergence"), cases.SPARSE_PAIRS)
def test_sparse_kinds_are_those_of_the_textbook(kind, divergence, t_student):
    case = wide(temperature=t_student, divergence=divergence)
    case.teacher, x = full_slots(case, kind)
    value, gradient = soft_alone(case)
    reverse = divergence == "reverse_kl"
    close(value, textbook.sparse_value(x, kind, reverse))
    close(gradient, textbook.sparse_gradient(x, kind, reverse))


@pytest.mark.parametrize("t_teacher", [0.5, 2.0])
@pytest.mark.parametrize("kind", ["renormalized", "both_renormalized"])
def test_renormalised_kinds_can_be_tempered(kind, t_teacher):
    """Proportions are all that they use: t^(1 / T') renormalised."""
    case = wide(teacher_temperature=t_teacher)
    case.teacher, x = full_slots(case, kind)
    value, gradient = soft_alone(case)
    x = x._replace(t=x.t ** (1 / t_teacher))
    close(value, textbook.sparse_value(x, kind))
    close(gradient, textbook.sparse_gradient(x, kind))


# What may stand around a divergence; "teacher": another kind of teacher, "bias": another tensor.
AROUND = {
    "plain": {},
    "logprobs": {"teacher": "logprobs"},
    "tempered": {"temperature": 2.0, "teacher_temperature": 0.5},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.7},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.05},
    "bias": {"bias": True},
    "all": {"temperature": 0.5, "teacher_temperature": 4.0, "softcap": 5.0, "logit_scale": -1.3,
            "label_smoothing": 0.2, "z_loss": 0.01, "bias": True, "divergence_scale": 2.5},
}  # fmt: skip


def hand_against_autograd(case: cases.Case) -> None:
    options = cases.plain_options(case)._replace(divergence_scale=case.options.divergence_scale)
    rows = cases.rows_of(case)
    raw = rows.logits_RV.detach().requires_grad_()
    rows = rows._replace(logits_RV=raw)
    (want,) = torch.autograd.grad(reference.row_stats(rows, options)[0].sum(), raw)
    close(reference.row_grad(rows, options).detach(), want)


# Logit losses: no log-probabilities, no temperatures.
DENSE = [(n, a) for n in cases.PARAMETERS for a in AROUND if n in cases.TEMPERED or a not in ("logprobs", "tempered")]


@pytest.mark.parametrize(("name", "around"), DENSE)
def test_hand_gradient_of_dense_teachers(name, around):
    setting = dict(AROUND[around])
    if name not in cases.TEMPERED:
        for key in ("temperature", "teacher_temperature"):
            setting.pop(key, None)
    hand_against_autograd(wide(spread=2.0, **setting, **cases.divergence_options(name)))


@pytest.mark.parametrize("around", [a for a in AROUND if a != "logprobs"])
@pytest.mark.parametrize(("kind", "divergence"), cases.SPARSE_PAIRS)
def test_hand_gradient_of_sparse_teachers(kind, divergence, around):
    """With empty slots, the label kept or not. T' changes the renormalised kinds alone."""
    setting = dict(AROUND[around])
    if not kind.endswith("renormalized"):
        setting.pop("teacher_temperature", None)
    hand_against_autograd(wide(spread=2.0, teacher=kind, divergence=divergence, **setting))


@pytest.mark.parametrize("kind", cases.DENSE_KINDS)
def test_hand_gradient_of_other_teachers(kind):
    hand_against_autograd(wide(teacher=kind, temperature=2.0, z_loss=0.01))


def test_every_kind_and_divergence_is_here():
    assert {kind for kind, _ in cases.SPARSE_PAIRS} == set(SPARSE_KINDS)
    assert RowOptions().divergence in cases.PARAMETERS
