"""linear_distill_loss at the edges of its contract: layouts, scales, second derivatives, graphs, modules."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from effkern import TeacherHidden, TeacherLogits, linear_distill_loss
from effkern.nn import LinearDistillLoss
from tests.numerics import assert_as_good_as_eager, rel_err
from tests.ops import distill_cases as cases

IMPL = pytest.mark.parametrize("impl", cases.implementations())
SOFT = {"temperature": 1.0, "teacher_temperature": 0.5}


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("rows", [1, 6])
@IMPL
def test_strided_and_expanded_vectors(impl, rows):
    """Columns of a matrix, int32 labels, a scalar expanded to all rows: the same bits as packed vectors."""
    case = cases.make(rows=rows, vocab=40, bias=True, weights=True, ignored=0)
    case.omega = torch.rand(rows, device=cases.DEVICE)
    packed = cases.ours(case, impl)
    strided = replace(
        case,
        labels=torch.stack([case.labels, case.labels + 20], 1)[:, 0],
        bias=torch.stack([case.bias, -case.bias], 1)[:, 0],
        weights=torch.stack([case.weights, -case.weights], 1)[:, 0],
        omega=torch.stack([case.omega, -case.omega], 1)[:, 0],
    )
    assert same(cases.ours(strided, impl), packed)
    assert same(cases.ours(replace(strided, labels=strided.labels.int()), impl), packed)
    expanded = replace(case, labels=torch.tensor(3, device=cases.DEVICE).expand(rows))
    assert same(cases.ours(expanded, impl), cases.ours(replace(case, labels=expanded.labels.contiguous()), impl))
    scalar = replace(case, omega=torch.tensor(0.25, device=cases.DEVICE))
    assert same(cases.ours(scalar, impl), cases.ours(replace(case, omega=0.25), impl))


@IMPL
def test_vocabulary_of_one(impl):
    """log softmax of one entry is 0, for any stride of the teacher's only column."""
    case = replace(cases.make(rows=4, vocab=1, ignored=0), teacher=torch.randn(4, 3, device=cases.DEVICE)[:, 1:2])
    assert all(x.abs().max() < 1e-6 for x in cases.ours(case, impl))


@IMPL
def test_row_factors_with_reduction_none(impl):
    """Each row's gradient is scaled by its own incoming gradient; an infinite one of an ignored row is no matter."""
    case = replace(cases.make(rows=9, vocab=60), reduction="none")
    factors = torch.rand(9, device=cases.DEVICE)
    truth = cases.oracle(cases.to(case, dtype=torch.float64), grad=factors.double())
    for fast, eager, exact in zip(cases.ours(case, impl, grad=factors), cases.oracle(case, grad=factors), truth):
        assert_as_good_as_eager(fast, eager, exact, ulps=8)
    x = cases.leaves(case)
    loss = linear_distill_loss(x[0], x[1], case.labels, impl=impl, **cases.arguments(case)).loss
    root = loss.sqrt().sum()
    root.backward()
    assert x[0].grad.isfinite().all()
    assert x[0].grad[1:3].eq(0).all()


@IMPL
def test_denominator_as_tensor(impl):
    """The same as the number; it gets no gradient, and 0 gives 0 even over an infinite sum."""
    case = cases.make(rows=7, vocab=30)
    number = cases.ours(case, impl, denom=11.0)
    tensor = torch.tensor(11.0, device=cases.DEVICE, requires_grad=True)
    x = cases.leaves(case)
    keywords = {**cases.arguments(case), "denom": tensor}
    loss = linear_distill_loss(x[0], x[1], case.labels, impl=impl, **keywords).loss
    assert same([loss.detach(), *torch.autograd.grad(loss, x)], number)
    with pytest.raises(RuntimeError, match="does not require grad"):
        linear_distill_loss(case.hidden, case.weight, case.labels, impl=impl, **keywords).loss.backward()
    keywords["denom"] = torch.tensor(0.0, device=cases.DEVICE)
    case.teacher[0, 1] = 0.0
    bias = torch.zeros(30, device=cases.DEVICE)
    bias[1] = float("-inf")
    assert linear_distill_loss(case.hidden, case.weight, case.labels, bias=bias, impl=impl, **keywords).loss == 0


@IMPL
def test_rows_of_weight_zero(impl):
    """They have statistics but add nothing, even where they hold nan."""
    case = cases.make(rows=8, vocab=50, weights=True, ignored=1)
    case.weights[4] = 0.0
    clean = cases.ours(case, impl)
    case.hidden[4] = float("nan")
    dirty = cases.ours(case, impl)
    assert same(clean, dirty)
    stats = linear_distill_loss(case.hidden, case.weight, case.labels, impl=impl, **cases.arguments(case)).stats
    assert stats.ce[4].isnan()
    assert stats.ce[3] > 0


@pytest.mark.parametrize("factor", [1 / 3, 65536.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scale_is_not_rounded_to_the_gradients_type(dtype, factor):
    """A factor rounded to bfloat16 would shrink all entries alike; one of 65536 is inf in float16."""
    case = cases.make(rows=40, vocab=300, dim=32, dtype=dtype, ignored=0, spread=0.05)
    case.reduction = "sum"
    truth = cases.oracle(cases.to(case, dtype=torch.float64), grad=factor)
    fast = cases.ours(case, "auto", grad=factor)
    # Times 65536 the gradient of the weight itself leaves float16's range.
    for got, want in list(zip(fast, truth))[1 : 3 if factor < 1 else 2]:
        assert got.isfinite().all()
        along = (got.double() * want).sum() / want.square().sum()
        assert abs(along - 1) < 1e-3


def test_second_derivatives_are_refused():
    case = cases.make(rows=4, vocab=20)
    x = cases.leaves(case)
    loss = linear_distill_loss(x[0], x[1], case.labels, **cases.arguments(case)).loss
    with pytest.raises(NotImplementedError, match=r"linear_distill_loss: create_graph=True is not covered"):
        torch.autograd.grad(loss, x, create_graph=True)


@IMPL
def test_teacher_from_inference_mode(impl):
    case = cases.make(rows=5, vocab=30, ignored=1)
    want = cases.ours(case, impl)
    with torch.inference_mode():
        teacher = TeacherLogits(case.teacher * 1.0)
    assert same(cases.ours(case, impl, teacher=teacher), want)


def test_a_teacher_buffer_may_be_refilled_after_forward():
    """One backward needs it no more; a second one notices."""
    case = cases.make(rows=5, vocab=30)
    want = cases.ours(case, "auto")
    x = cases.leaves(case)
    loss = linear_distill_loss(x[0], x[1], case.labels, **cases.arguments(case)).loss
    case.teacher.zero_()
    assert same([loss.detach(), *torch.autograd.grad(loss, x, retain_graph=True)], want)
    with pytest.raises(RuntimeError, match="labels or teacher were modified in place"):
        torch.autograd.grad(loss, x)


def test_compile_keeps_one_graph_for_all_omegas_and_denominators():
    """A schedule changes omega at every step: that must not compile again (the limit is eight graphs)."""
    torch._dynamo.reset()
    case = cases.make(rows=6, vocab=30)
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    def loss(hidden, weight, labels, teacher, omega, denom):
        soft = {"omega": omega, "denom": denom, **SOFT}
        return linear_distill_loss(hidden, weight, labels, teacher=TeacherLogits(teacher), **soft).loss

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for i in range(12):
        arguments = (case.hidden, case.weight, case.labels, case.teacher, 0.05 * i + 0.01, 10.0 + i)
        assert rel_err(compiled(*arguments), loss(*arguments).double()) < 1e-6
    assert len(frames) <= 2


def test_compile_with_dynamic_vocabulary_autocast_and_no_grad():
    torch._dynamo.reset()

    def loss(hidden, weight, labels, states, head):
        teacher = TeacherHidden(states, head)
        return linear_distill_loss(hidden, weight, labels, teacher=teacher, omega=0.5, **SOFT).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    states = torch.randn(13, 8, device=cases.DEVICE)
    for vocab in (50, 61):
        case = cases.make(vocab=vocab)
        head = torch.randn(vocab, 8, device=cases.DEVICE)
        inputs = (case.hidden, case.weight, case.labels, states, head)
        with torch.no_grad():
            assert torch.equal(compiled(*inputs), loss(*inputs))
        with torch.autocast(cases.DEVICE, dtype=torch.bfloat16):
            assert torch.equal(compiled(*inputs), loss(*inputs))


@IMPL
def test_teacher_hidden_under_autocast(impl):
    """The teacher's product runs in autocast's type, as the student's does."""
    case = cases.make(rows=8, vocab=100)
    states, head = torch.randn(8, 12, device=cases.DEVICE), torch.randn(100, 12, device=cases.DEVICE)
    with torch.autocast(cases.DEVICE, dtype=torch.bfloat16):
        mixed = cases.ours(case, impl, teacher=TeacherHidden(states, head))
        halves = cases.ours(case, impl, teacher=TeacherHidden(states.bfloat16(), head.bfloat16()))
    assert same(mixed, halves)


def test_fake_tensors_and_meta():
    """Shapes without numbers: forward and backward run, as tools that plan memory need it."""
    with FakeTensorMode():
        hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
        linear_distill_loss(hidden, weight, torch.zeros(4, dtype=torch.int64)).loss.backward()
        assert weight.grad.shape == (10, 8)
    meta = {"device": "meta"}
    result = linear_distill_loss(
        torch.randn(4, 8, **meta), torch.randn(10, 8, **meta), torch.zeros(4, dtype=torch.int64, **meta)
    )
    assert result.stats.ce.shape == (4,)


def test_module_passes_everything_on():
    """weights, denom, bias, omega per token, and every kind of teacher, with leading dimensions."""
    case = cases.make(rows=6, vocab=40, weights=True, bias=True, ignored=1)
    module = LinearDistillLoss(**SOFT, softcap=4.0)
    omega = torch.rand(2, 3, device=cases.DEVICE)
    hidden_teacher = TeacherHidden(
        torch.randn(2, 3, 5, device=cases.DEVICE), torch.randn(40, 5, device=cases.DEVICE),
        torch.randn(40, device=cases.DEVICE), softcap=3.0, logit_scale=1.5,
    )  # fmt: skip
    flat = replace_hidden(hidden_teacher)
    for given, plain in (
        (TeacherLogits(case.teacher.view(2, 3, 40)), TeacherLogits(case.teacher)),
        (hidden_teacher, flat),
    ):
        got = module(
            case.hidden.view(2, 3, -1), case.weight, case.labels.view(2, 3), teacher=given, omega=omega, denom=9.0,
            bias=case.bias, weights=case.weights.view(2, 3),
        )  # fmt: skip
        want = linear_distill_loss(
            case.hidden, case.weight, case.labels, teacher=plain, omega=omega.flatten(), denom=9.0, bias=case.bias,
            weights=case.weights, softcap=4.0, **SOFT,
        )  # fmt: skip
        assert torch.equal(got.loss, want.loss)


def replace_hidden(teacher: TeacherHidden) -> TeacherHidden:
    return replace(teacher, hidden=teacher.hidden.flatten(0, -2))


def test_module_refuses_what_would_copy_or_fail_later():
    with pytest.raises(ValueError, match=r"reduction must be 'none', 'sum' or 'mean', got 'avg'"):
        LinearDistillLoss(reduction="avg")
    module = LinearDistillLoss(**SOFT)
    cut = TeacherLogits(torch.randn(2, 4, 10)[:, :-1])
    with pytest.raises(ValueError, match=r"teacher.logits must flatten to \[N, V\] without a copy"):
        module(torch.randn(2, 3, 4), torch.randn(10, 4), torch.zeros(2, 3, dtype=torch.int64), teacher=cut, omega=0.5)
    with pytest.raises(ValueError, match=r"temperature must be given with a teacher"):
        LinearDistillLoss()(
            torch.randn(3, 4), torch.randn(5, 4), torch.arange(3), teacher=TeacherLogits(torch.randn(3, 5)), omega=0.5
        )
    with pytest.raises(ValueError, match=r"hidden must have 2 dimension"):
        module(torch.tensor(1.0), torch.randn(5, 4), torch.tensor(1))
