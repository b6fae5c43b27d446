"""Laws that hold for any input: hypothesis picks shapes, teachers, divergences and options."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from effkern import TeacherConfidence, TeacherHidden, TeacherLogits, TeacherLogProbs, TeacherSimilarity, TeacherTopK
from tests.ops import distill_cases as cases

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

BULK = pytest.mark.parametrize("impl", cases.implementations(bulk=True))
# Every example is a handful of rows; the same ones in each run.
few = settings(
    max_examples=20, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

PAIRS = [
    *(("logits", name) for name in cases.PARAMETERS),
    *(("logprobs", name) for name in cases.TEMPERED),
    *(("hidden", name) for name in ("forward_kl", "jsd", "mse")),
    *(("similarity", name) for name in ("forward_kl", "decoupled_kl", "tvd")),
    ("similarity+prob", "forward_kl"),
    ("confidence", "forward_kl"),
    *cases.SPARSE_PAIRS,
]


@st.composite
def problems(draw: Any, pairs: list = PAIRS, wide: bool = False, plain: bool = False) -> cases.Case:
    """A case of any kind; `wide` in float64, `plain` without what makes gradients not sum to zero."""
    kind, name = draw(st.sampled_from(pairs))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rows, vocab = draw(st.integers(1, 6)), draw(st.sampled_from([2, 3, 17, 40]))
    tempered = name in cases.TEMPERED
    options = {
        "temperature": draw(st.sampled_from([0.5, 1.0, 3.0])) if tempered else 1.0,
        "teacher_temperature": draw(st.sampled_from([0.5, 1.0, 2.0]))
        if tempered and kind in cases.DENSE_KINDS
        else 1.0,
        "label_smoothing": draw(st.sampled_from([0.0, 0.2])),
    }
    if not plain:
        options |= {
            "softcap": draw(st.sampled_from([None, 4.0])),
            "logit_scale": draw(st.sampled_from([1.0, -0.5])),
            "z_loss": draw(st.sampled_from([0.0, 0.03])),
        }
    case = cases.make(
        rows, 5, vocab, teacher=kind, bias=draw(st.booleans()), weights=draw(st.booleans()),
        ignored=draw(st.integers(0, 1)), omega=draw(st.sampled_from([0.0, 0.4, 1.0])), spread=1.5, **options,
        **cases.divergence_options(name),
    )  # fmt: skip
    case = replace(case, reduction=draw(st.sampled_from(["mean", "sum"])), t_squared=draw(st.booleans()))
    return cases.to(case, dtype=torch.float64) if wide else case


def near(got: list[Tensor], want: list[Tensor], exact: float) -> None:
    for g, w in zip(got, want):
        assert (g - w).norm() <= exact * (1 + w.norm()), (g, w)


def wide_run(case: cases.Case, **overrides) -> list[Tensor]:
    return cases.ours(case, "reference", **overrides)


@few
@given(case=problems())
@BULK
def test_any_problem_is_the_oracle(impl, case):
    """Values and gradients in float32 within 1e-5 of float64."""
    truth = cases.oracle(cases.to(case, dtype=torch.float64))
    near(cases.ours(case, impl), truth, 1e-5)


# The logit losses that see where the logits are.
ANCHORED = ("mse", "cosine")


@few
@given(case=problems([p for p in PAIRS if p[1] not in ANCHORED], wide=True, plain=True))
def test_gradient_sums_to_zero(case):
    """Over the vocabulary, where adding a constant to all logits changes nothing: the bias gets its sum."""
    bias = torch.zeros_like(case.weight[:, 0]) if case.bias is None else case.bias
    grad_bias = wide_run(replace(case, bias=bias))[3]
    assert abs(grad_bias.sum()) <= 1e-12 * (1 + grad_bias.abs().sum())


def shuffled(case: cases.Case) -> tuple[cases.Case, Tensor]:
    """The case with another order of its vocabulary: entry i of the new one is entry order[i] of the old one."""
    vocab = case.weight.shape[0]
    order = torch.randperm(vocab, device=cases.DEVICE)
    place = order.argsort()
    t = case.teacher
    if isinstance(t, TeacherLogits):
        t = TeacherLogits(t.logits[:, order])
    elif isinstance(t, TeacherLogProbs):
        t = TeacherLogProbs(t.logprobs[:, order])
    elif isinstance(t, TeacherHidden):
        t = replace(t, weight=t.weight[order])
    elif isinstance(t, TeacherSimilarity):
        t = replace(t, table=t.table[order][:, order])
    elif isinstance(t, TeacherTopK):
        t = replace(t, ids=torch.where(t.ids >= 0, place[t.ids.clamp_min(0)], t.ids))
    else:
        assert isinstance(t, TeacherConfidence)
    labels = torch.where(case.labels >= 0, place[case.labels.clamp_min(0)], case.labels)
    bias = None if case.bias is None else case.bias[order]
    return replace(case, teacher=t, labels=labels, bias=bias, weight=case.weight[order]), order


@few
@given(case=problems(wide=True))
def test_order_of_the_vocabulary_does_not_matter(case):
    other, order = shuffled(case)
    plain, moved = wide_run(case), wide_run(other)
    near(moved, [plain[0], plain[1], *(g[order] for g in plain[2:])], 1e-12)


@few
@given(case=problems(), rows=st.integers(1, 7))
@BULK
def test_chunks_do_not_matter(impl, case, rows):
    near(cases.ours(case, impl, chunk_bytes=4 * rows * case.weight.shape[0]), cases.ours(case, impl), 1e-5)


@few
@given(case=problems(wide=True), factor=st.sampled_from([0.25, 3.0, 1e4]))
def test_scaling_of_weights(case, factor):
    """A sum grows with its weights, a mean does not."""
    weights = torch.rand_like(case.hidden[:, 0]) if case.weights is None else case.weights
    case = replace(case, weights=weights)
    scaled, plain = wide_run(replace(case, weights=weights * factor)), wide_run(case)
    near([g / (factor if case.reduction == "sum" else 1.0) for g in scaled], plain, 1e-12)


@few
@given(case=problems([p for p in PAIRS if p[1] in cases.TEMPERED], wide=True, plain=True), factor=st.just(2.0))
def test_scaling_of_logits(case, factor):
    """D at (f z, f T) is D at (z, T): temperature is a unit of the student's logits."""
    case = replace(case, omega=1.0, t_squared=False)
    bias = None if case.bias is None else case.bias * factor
    hot = case.options._replace(temperature=case.options.temperature * factor)
    scaled = wide_run(replace(case, weight=case.weight * factor, bias=bias, options=hot))
    plain = wide_run(case)
    near([scaled[0], scaled[1], *(g * factor for g in scaled[2:])], plain, 1e-11)


@few
@given(case=problems(wide=True), omega=st.floats(0.0, 1.0))
def test_omega_mixes_linearly(case, omega):
    hard, mixed, soft = (wide_run(replace(case, omega=w)) for w in (0.0, omega, 1.0))
    near(mixed, [(1 - omega) * h + omega * s for h, s in zip(hard, soft)], 1e-11)


@few
@given(case=problems([("logits", n) for n in cases.PARAMETERS], wide=True))
def test_divergences_are_divergences(case):
    """Never below zero, zero for equal models, and bounded where the formula says so."""
    stats = cases.result(case, "reference")[0].stats
    scale = case.options.temperature**2 if case.t_squared else 1.0
    d = stats.divergence / scale
    assert (d >= 0).all()
    beta = torch.tensor(case.options.beta, dtype=torch.float64)
    bound = {"tvd": 1.0, "jsd": -torch.xlogy(beta, beta) - torch.xlogy(1 - beta, 1 - beta), "cosine": 2.0}
    assert (d <= bound.get(case.options.divergence, torch.inf) + 1e-12).all()


@few
@given(case=problems(wide=True), seed=st.integers(0, 99))
def test_order_of_the_tokens_does_not_matter(case, seed):
    order = torch.randperm(len(case.labels), generator=torch.Generator().manual_seed(seed)).to(cases.DEVICE)
    shared = ("table", "weight", "bias")
    moved = {f: v[order] for f, v in vars(case.teacher).items() if isinstance(v, Tensor) and f not in shared}
    weights = None if case.weights is None else case.weights[order]
    other = replace(case, hidden=case.hidden[order], labels=case.labels[order], weights=weights,
                    teacher=replace(case.teacher, **moved))  # fmt: skip
    plain, got = wide_run(case), wide_run(other)
    near(got, [plain[0], plain[1][order], *plain[2:]], 1e-12)
