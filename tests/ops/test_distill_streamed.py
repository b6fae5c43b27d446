"""The loss in slices of the vocabulary: the same numbers as in chunks of rows, and chosen where memory asks for it."""

import pytest
import torch

from effkern import (
    TeacherHidden,
    TeacherLogits,
    TeacherLogProbs,
    TeacherSimilarity,
    TeacherTopK,
    linear_distill_loss,
)
from effkern.ops.distill import cost, streamed

N, D, V, K = 40, 8, 300, 5


@pytest.fixture
def slices(monkeypatch) -> list[int]:
    """Makes the model choose slices where it may, and records how wide they are."""
    widths: list[int] = []
    run, choose = streamed.run, cost.choose

    def spy(*args, **kwargs):
        widths.append(args[5])
        return run(*args, **kwargs)

    def prefer(found):
        return next((plan for plan in found if plan.method == "streamed"), None) or choose(found)

    monkeypatch.setattr(streamed, "run", spy)
    monkeypatch.setattr(cost, "choose", prefer)
    return widths


def teachers() -> dict:
    u = 2 * torch.randn(N, V, dtype=torch.float64)
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(N)])
    log_p = u.log_softmax(-1)
    kept = log_p.gather(1, ids)
    return {
        "none": None,
        "logits": TeacherLogits(u),
        "logprobs": TeacherLogProbs(log_p - 0.1),
        "hidden": TeacherHidden(torch.randn(N, 4, dtype=torch.float64), torch.randn(V + 9, 4, dtype=torch.float64),
                                bias=torch.randn(V + 9, dtype=torch.float64), softcap=6.0, logit_scale=1.3),
        **{kind: TeacherTopK(ids, kept, kind) for kind in ("uniform_tail", "tail_bucket", "tail_to_label")},
    }  # fmt: skip


def call(teacher, divergence: str, dtype: torch.dtype = torch.float64, **options) -> list[torch.Tensor]:
    """Loss, statistics and gradients; padding, ignored rows, a row of weight 0, and every option that reshapes."""
    torch.manual_seed(1)
    hidden, weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((N, D), (V + 7, D), (V + 7,)))
    labels = torch.randint(0, V, (N,))
    labels[2:5] = -100
    weights = torch.rand(N)
    weights[7] = 0
    dense = divergence not in ("mse", "cosine")
    fixed = isinstance(teacher, (TeacherLogProbs, TeacherTopK))
    result = linear_distill_loss(
        hidden, weight, labels, bias=bias, weights=weights, vocab_valid=V, teacher=teacher, divergence=divergence,
        omega=None if teacher is None else 0.5, beta=0.3 if divergence == "symmetric_kl" else None,
        temperature=2.0 if dense else 1.0, teacher_temperature=1.0 if fixed or not dense else 0.7,
        label_smoothing=0.1, z_loss=0.01, softcap=5.0, logit_scale=0.9, **options,
    )  # fmt: skip
    result.loss.backward()
    return [result.loss.detach(), *result.stats, *(x.grad for x in (hidden, weight, bias))]


@pytest.mark.parametrize("divergence", streamed.DIVERGENCES)
@pytest.mark.parametrize("kind", list(teachers()))
def test_slices_agree_with_rows(slices, kind, divergence):
    teacher = teachers()[kind]
    sparse = isinstance(teacher, TeacherTopK)
    if (kind == "logprobs" and divergence in ("mse", "cosine")) or (
        sparse and divergence != "forward_kl" and (kind, divergence) != ("tail_bucket", "reverse_kl")
    ):
        pytest.skip("no such combination")
    by_rows = call(teacher, divergence, impl="reference")
    assert not slices
    by_slices = call(teacher, divergence, impl="reference", memory_limit=40_000)
    assert len(slices) == 1
    assert 1 < slices[0] < V // 2
    for a, b in zip(by_rows, by_slices):
        assert torch.equal(a.isfinite(), b.isfinite())
        torch.testing.assert_close(a[a.isfinite()], b[b.isfinite()], rtol=1e-12, atol=1e-12)


def test_extreme_logits_and_masks(slices):
    """Slices whose maxima differ by 1e4, and one of -inf alone in both models."""
    u = torch.randn(N, V, dtype=torch.float64)
    u[:, 50:60] += 1e4
    u[:, 120:300] = -torch.inf
    hidden, weight = torch.randn(N, D).double(), torch.randn(V, D).double()
    bias = torch.zeros(V).double()
    bias[120:] = -torch.inf
    bias[10:20] = 1e4
    labels = torch.randint(0, 10, (N,))
    options = {"omega": 0.5, "temperature": 1.0, "teacher_temperature": 1.0, "bias": bias, "impl": "reference"}
    a = linear_distill_loss(hidden, weight, labels, teacher=TeacherLogits(u), **options)
    b = linear_distill_loss(hidden, weight, labels, teacher=TeacherLogits(u), memory_limit=40_000, **options)
    assert slices
    assert torch.isfinite(a.loss)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=0)
    for x, y in zip(a.stats, b.stats):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(slices, dtype):
    teacher = TeacherLogits(teachers()["logits"].logits.to(dtype))
    by_rows = call(teacher, "forward_kl", dtype)
    by_slices = call(teacher, "forward_kl", dtype, memory_limit=20_000)
    assert slices
    tolerance = 3e-6 if dtype == torch.float32 else 2e-2
    for a, b in zip(by_rows, by_slices):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= tolerance * a.double().norm()


def test_what_cannot_be_streamed_stays_in_rows(slices):
    table = TeacherSimilarity(torch.randn(V, V, dtype=torch.float64))
    call(table, "forward_kl", impl="reference", memory_limit=1000)
    dense = teachers()["logits"]
    linear_distill_loss(
        torch.randn(N, D), torch.randn(V, D), torch.randint(0, V, (N,)), teacher=TeacherLogits(dense.logits.float()),
        divergence="jsd", beta=0.5, omega=0.5, temperature=1.0, teacher_temperature=1.0, memory_limit=1000,
    )  # fmt: skip
    call(dense, "forward_kl", impl="reference", memory_limit=None)
    # A named kernel is never replaced.
    call(TeacherLogits(dense.logits.float()), "forward_kl", torch.float32, impl="cpp", memory_limit=1000)
    assert not slices


def test_limits_are_checked():
    x = (torch.randn(4, D), torch.randn(V, D), torch.randint(0, V, (4,)))
    with pytest.raises(ValueError, match=r"linear_distill_loss: memory_limit must lie in \[1, \d+\], got 0"):
        linear_distill_loss(*x, memory_limit=0)
    with pytest.raises(ValueError, match="linear_distill_loss: chunk_bytes must be None with memory_limit"):
        linear_distill_loss(*x, memory_limit=1 << 20, chunk_bytes=1 << 20)
