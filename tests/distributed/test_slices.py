"""The row pass over slices in one process: with reductions that change nothing, and as a compiler traces it."""

import pytest
import torch

from effkern import linear_distill_loss
from effkern.distributed import vocab_parallel_distill_loss
from effkern.ops.distill.parallel import agree, chunks, local
from effkern.ops.distill.parallel.chunks import Reductions
from tests.distributed import vocab_cases
from tests.distributed.vocab_cases import VOCAB, answer, make
from tests.numerics import assert_as_good_as_eager

CASES = vocab_cases.cases()


class Alone:
    """A group of one process."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.fixture
def alone(monkeypatch):
    """Calls without a process group."""
    monkeypatch.setattr(local, "group_of", lambda weight, group: Alone())
    monkeypatch.setattr(agree, "reductions", lambda group, sequence_parallel: Reductions())
    monkeypatch.setattr(agree, "budget", lambda group, own, **facts: own)


CALLS = ["everything-forward_kl", "everything-jsd", "everything-zscored_mse", "logprobs-symmetric_kl", "cross-entropy",
         "sparse-uniform_tail", "sparse-tail_bucket-reverse", "hidden-decoupled_kl", "everything-cosine"]  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_one_process_runs_the_same_code(alone, name):
    call = CASES[name]
    truth, given = answer(call, linear_distill_loss, impl="reference"), answer(call, vocab_parallel_distill_loss)
    assert given.keys() == truth.keys()
    for key, value in truth.items():
        torch.testing.assert_close(given[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CALLS[:2] + CALLS[5:8])
def test_every_phase_can_be_traced(alone, monkeypatch, name):
    """As a GPU would run them, but without code generation: no graph break, and the same numbers."""
    call, plain = CASES[name], answer(CASES[name], vocab_parallel_distill_loss)
    traced = []

    def trace(phase):
        traced.append(phase.__name__)
        return torch.compile(chunks.RAW[phase], fullgraph=True, backend="eager")

    torch._dynamo.reset()

    monkeypatch.setattr(chunks, "compiled_phase", trace)
    inner = chunks.row_pass
    monkeypatch.setattr(chunks, "row_pass", lambda *args: inner(*args[:-1], True))
    for key, value in answer(call, vocab_parallel_distill_loss).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-13, atol=1e-13)
    assert {"maxima", "sums", "finish"} <= set(traced)


def test_small_divergence_in_float32(alone):
    """Models that nearly agree: the value does not drown in the rounding of its sums, 2e-7 at this size of lse."""
    call = make(3, teacher="logits", omega=1.0, temperature=1.0, teacher_temperature=1.0)
    logits = call.hidden @ call.weight.t()
    teacher = type(call.teacher)((logits + 1e-3 * torch.randn_like(logits)).float())
    call.hidden, call.weight, call.teacher = call.hidden.float(), call.weight.float(), teacher
    got = answer(call, vocab_parallel_distill_loss)["stats.divergence"]
    call.hidden, call.weight = call.hidden.double(), call.weight.double()
    call.teacher = type(teacher)(teacher.logits.double())
    truth = answer(call, linear_distill_loss, impl="reference")["stats.divergence"]
    assert truth.max() < 2e-6
    assert (got.double() - truth).abs().max() < 2e-9


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_tail_bucket_of_a_sure_student_in_float32(alone, divergence):
    """1e-6 of the student's mass is off the kept entries, which one minus the kept sum knows to a tenth in float32."""
    call = make(5, teacher="tail_bucket", divergence=divergence, temperature=1.0, omega=1.0, rows=VOCAB)
    logits = torch.randn(VOCAB, VOCAB, dtype=torch.float64)
    logits.scatter_(1, call.teacher.ids[:, :1], logits.logsumexp(-1, keepdim=True) + 14.0)
    call.hidden, call.weight = torch.eye(VOCAB), logits.t().float()
    got, eager = answer(call, vocab_parallel_distill_loss), answer(call, linear_distill_loss, impl="reference")
    call.hidden, call.weight = call.hidden.double(), call.weight.double()
    truth = answer(call, linear_distill_loss, impl="reference")
    for name in ("stats.divergence", "weight"):
        assert_as_good_as_eager(got[name], eager[name], truth[name], ulps=4.0)


def test_a_second_derivative_is_refused(alone):
    call = make(4)
    hidden = call.hidden.requires_grad_()
    loss = vocab_parallel_distill_loss(hidden, call.weight, call.labels, teacher=call.teacher, **call.keywords).loss
    with pytest.raises(NotImplementedError, match="vocab_parallel_distill_loss: create_graph=True is not covered"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_labels_changed_before_a_second_backward(alone):
    call = make(4)
    hidden, labels = call.hidden.requires_grad_(), call.labels.clone()
    loss = vocab_parallel_distill_loss(hidden, call.weight, labels, teacher=call.teacher, **call.keywords).loss
    loss.backward(retain_graph=True)
    labels[0] += 1
    with pytest.raises(RuntimeError, match="labels or teacher were modified in place"):
        loss.backward()
