"""What the losses turn into at their limits, and what their estimates turn into on average."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from effkern import TeacherLogProbs, TeacherSimilarity, TeacherTopK, linear_distill_loss
from tests.ops import distill_cases as cases

IMPL = pytest.mark.parametrize("impl", cases.implementations())
BULK = pytest.mark.parametrize("impl", cases.implementations(bulk=True))


def logit_gradient(case: cases.Case, impl: str, **overrides) -> Tensor:
    """Of a case of `cases.of_logits`, [N, V]."""
    (loss, _), x = cases.result(case, impl, **overrides)
    return torch.autograd.grad(loss, x)[1].t()


def random_logits(rows: int = 6, vocab: int = 30, dtype: torch.dtype = torch.float32, **options) -> cases.Case:
    z, u = torch.randn(rows, vocab, dtype=dtype), torch.randn(rows, vocab, dtype=dtype)
    return cases.of_logits(z, u, torch.randint(0, vocab, (rows,)), options=cases.RowOptions(**options))


@pytest.mark.parametrize("t_squared", [False, True])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (4.0, 4.0), (2.0, 0.5)], ids=str)
@BULK
def test_gradient_ratio_is_omega_t(impl, temperatures, t_squared):
    """(1 - lam) + lam (c / T) (p~_t - q~_t) / (1 - q_t), c = 1 or T^2 (Tang et al.)."""
    t_q, t_p = temperatures
    case = replace(random_logits(temperature=t_q, teacher_temperature=t_p), t_squared=t_squared)
    case.omega = torch.rand(6, device=cases.DEVICE)
    z, u, y = case.hidden.double() @ case.weight.double().t(), case.teacher.double(), case.labels[:, None]
    soft_q, soft_p = torch.softmax(z / t_q, -1).gather(1, y), torch.softmax(u / t_p, -1).gather(1, y)
    q, c, lam = torch.softmax(z, -1).gather(1, y), t_q**2 if t_squared else 1.0, case.omega[:, None]
    want = (1 - lam) + lam * (c / t_q) * (soft_p - soft_q) / (1 - q)
    got = cases.result(case, impl)[0].stats.gradient_ratio
    assert torch.allclose(got.double(), want.squeeze(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", cases.PARAMETERS)
@BULK
def test_gradient_ratio_is_what_it_says(impl, name):
    """The gradient on the label's logit over that of the cross entropy alone, for every divergence."""
    case = random_logits(**cases.divergence_options(name))
    got = cases.result(case, impl)[0].stats.gradient_ratio
    at_label = [logit_gradient(c, impl).gather(1, case.labels[:, None]) for c in (case, replace(case, teacher=None))]
    assert torch.allclose(got, (at_label[0] / at_label[1]).squeeze(1), rtol=1e-4, atol=1e-5)


@IMPL
def test_gradient_ratio_at_its_limits(impl):
    """Teacher sure of the label: 1, the cross entropy itself. As sure as the student: 1 - omega."""
    case = random_logits()
    sure = torch.full_like(case.teacher, -1e4).scatter(1, case.labels[:, None], 1e4)
    ratio = cases.result(replace(case, teacher=sure), impl)[0].stats.gradient_ratio
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-6)
    same = case.hidden @ case.weight.t()
    ratio = cases.result(replace(case, teacher=same), impl)[0].stats.gradient_ratio
    assert torch.allclose(ratio, torch.full_like(ratio, 1 - case.omega), atol=1e-6)


@IMPL
def test_gradient_ratio_of_whole_rows(impl):
    """The L1 norms have the same ratio where no wrong class is pushed up: q_i >= omega p_i."""
    case = random_logits(vocab=12)
    q = torch.softmax(case.hidden @ case.weight.t(), -1)
    one_hot = torch.zeros_like(q).scatter(1, case.labels[:, None], 1.0)
    case.teacher = (0.7 * q + 0.3 * one_hot).log()
    mixed, hard = logit_gradient(case, impl), logit_gradient(replace(case, teacher=None), impl)
    ratio = cases.result(case, impl)[0].stats.gradient_ratio
    assert torch.allclose(ratio, mixed.abs().sum(-1) / hard.abs().sum(-1), atol=1e-5)


def test_t_squared_kl_tends_to_centred_logits():
    """T^2 KL -> (1 / 2V) sum (z_c - u_c)^2, value and gradient, with an error of order 1 / T."""
    errors = []
    for t in (100.0, 1000.0):
        case = random_logits(dtype=torch.float64, temperature=t, teacher_temperature=t)
        case = replace(case, t_squared=True, omega=1.0)
        torch.manual_seed(0)
        case.weight, case.teacher = torch.randn_like(case.weight), torch.randn_like(case.teacher)
        soft = cases.ours(case, "reference")
        limit = replace(case, options=cases.RowOptions(divergence="centered_mse"), t_squared=False)
        errors.append([((a - 0.5 * b).norm() / b.norm()).item() for a, b in zip(soft, cases.ours(limit, "reference"))])
    for far, near in zip(*errors):
        assert near < 5e-3
        assert near < 0.2 * far


@pytest.mark.parametrize("t", [0.5, 4.0])
@pytest.mark.parametrize("name", cases.TEMPERED)
@BULK
def test_t_squared_is_a_factor(impl, name, t):
    case = random_logits(temperature=t, teacher_temperature=t, **cases.divergence_options(name))
    case.omega = 1.0
    for with_it, without in zip(cases.ours(replace(case, t_squared=True), impl), cases.ours(case, impl)):
        assert torch.allclose(with_it, t**2 * without, rtol=1e-6)


@pytest.mark.parametrize(("beta", "name"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
@IMPL
def test_normalised_jsd_at_its_ends(impl, beta, name):
    """The Kullback-Leibler divergences themselves."""
    case = replace(random_logits(divergence="jsd", beta=beta), normalize_jsd=True)
    end = replace(case, options=cases.RowOptions(divergence=name), normalize_jsd=False)
    for a, b in zip(cases.ours(case, impl), cases.ours(end, impl)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_normalised_jsd_is_continuous(end):
    """Towards both ends the distance shrinks with beta; without the factor the loss would vanish instead."""
    case = replace(random_logits(dtype=torch.float64, divergence="jsd", beta=end), omega=1.0, normalize_jsd=True)
    last = cases.ours(case, "reference")
    for step in (1e-3, 1e-6):
        near = replace(case, options=case.options._replace(beta=abs(end - step)))
        for a, b in zip(cases.ours(near, "reference"), last):
            assert (a - b).norm() <= 20 * step * b.norm()
        plain = cases.ours(replace(near, normalize_jsd=False), "reference")
        assert plain[0] < 2 * step * last[0]


@pytest.mark.parametrize("beta", [0.05, 1 - 1e-6])
@IMPL
def test_normalised_jsd_between(impl, beta):
    """Close to 1 the factor shows what 1 - beta has lost: 1e-2 of it, were it taken in float32."""
    case = replace(cases.make(divergence="jsd", beta=beta), normalize_jsd=True)
    for got, want in zip(cases.ours(case, impl), cases.oracle(cases.to(case, dtype=torch.float64))):
        assert (got - want).norm() <= 2e-6 * want.norm()


@pytest.mark.parametrize("kind", ["sampled", "stratified"])
def test_sampled_labels_are_unbiased(kind):
    """The mean gradient over many draws is that of the full teacher: 4 standard deviations at each entry."""
    rows, vocab, draws, head = 4000, 20, 10, 4
    z, u = torch.randn(1, vocab).double(), 2 * torch.randn(1, vocab).double()
    p = torch.softmax(u, -1)
    top, tail = p.topk(head), p.clone()
    tail[0, top.indices[0]] = 0.0
    if kind == "sampled":
        ids = torch.arange(vocab).expand(rows, vocab).contiguous()
        counts = torch.zeros(rows, vocab).scatter_add(
            1, torch.multinomial(p[0], rows * draws, replacement=True).view(rows, draws), torch.ones(rows, draws)
        )
        teacher = TeacherTopK.from_counts(ids, counts, draws)
        assert teacher.kind == "sampled"
        assert torch.equal(teacher.ids >= 0, counts > 0)
        variance = p * (1 - p) / draws
    else:
        drawn = torch.multinomial(tail[0], rows * draws, replacement=True).view(rows, draws)
        ids = torch.cat([top.indices.expand(rows, head), drawn], 1)
        mass = (1 - top.values.sum()) / draws
        logprobs = torch.cat([top.values.log().expand(rows, head), mass.log().expand(rows, draws)], 1)
        # An id that was drawn twice stands there twice, and counts twice.
        teacher = TeacherTopK(ids, logprobs.contiguous(), "stratified")
        share = tail / tail.sum()
        variance = tail.sum() ** 2 * share * (1 - share) / draws
    hidden = torch.ones(rows, 1, dtype=torch.float64)
    weight = z.t().contiguous().requires_grad_()
    result = linear_distill_loss(hidden, weight, torch.zeros(rows, dtype=torch.int64), teacher=teacher, omega=1.0,
                                 temperature=1.0)  # fmt: skip
    (got,) = torch.autograd.grad(result.loss, weight)
    want = torch.softmax(z, -1) - p
    assert ((got.t() - want).abs() <= 4 * (variance / rows).sqrt() + 1e-6).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kd_topk_by_hand(temperature):
    """from_logits: the k largest probabilities stay, the others share what is left."""
    case = cases.make(rows=7, vocab=40, temperature=temperature)
    p = torch.softmax(case.teacher / temperature, -1)
    kth = p.topk(6).values[:, -1:]
    kept = p >= kth
    rest = (1 - (p * kept).sum(-1, keepdim=True)) / (40 - 6)
    by_hand = TeacherLogProbs(torch.where(kept, p, rest).log())
    made = TeacherTopK.from_logits(case.teacher, 6, temperature=temperature)
    assert made.kind == "uniform_tail"
    for a, b in zip(cases.ours(case, "auto", teacher=made), cases.ours(case, "auto", teacher=by_hand)):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_similarity_table_by_hand():
    """Cosine of each pair of rows over alpha, to the power beta with its sign, softmax by label."""
    head = torch.randn(9, 5, dtype=torch.float32)
    table = TeacherSimilarity.table_of(head, alpha=0.5, beta=2.0)
    for i in range(9):
        for j in range(9):
            s = (head[i] @ head[j] / (head[i].norm() * head[j].norm()) / 0.5).item()
            assert abs(table[i, j].item() - (abs(s) ** 2 if s > 0 else -(abs(s) ** 2))) < 1e-5
    assert TeacherSimilarity.table_of(head).diagonal().allclose(torch.ones(9))
