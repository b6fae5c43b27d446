"""The tables of docs/distillation-losses.md: each left side by its published formula, each right side as printed.

The formulas are written anew from the libraries' definitions; Liger-Kernel itself is called where it is installed
(`pip install --no-deps liger-kernel`; its chunked losses are plain PyTorch and run on a CPU).
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effkern import TeacherHidden, TeacherLogits, TeacherLogProbs, linear_distill_loss
from tests.ops import distill_cases as cases

BULK = pytest.mark.parametrize("impl", cases.implementations(bulk=True))
PAGE = Path(__file__).parents[2] / "docs" / "distillation-losses.md"
T, W, N = 2.0, 0.7, 24


class Inputs(NamedTuple):
    hidden: Tensor
    head: Tensor
    labels: Tensor
    states: Tensor
    teacher_head: Tensor


def inputs(dtype: torch.dtype) -> Inputs:
    hidden, head, states, teacher_head = (torch.randn(*s, dtype=dtype) for s in ((N, 8), (40, 8), (N, 5), (40, 5)))
    labels = torch.randint(0, 40, (N,))
    labels[3:7] = -100
    made = Inputs(hidden, head, labels, states, teacher_head)
    return Inputs(*(x.to(cases.DEVICE) for x in made))


class Sides(NamedTuple):
    """What the formulas are written in; q and p at temperature 1."""

    z: Tensor
    u: Tensor
    labels: Tensor

    def kept(self, per_token: Tensor, labels: bool = True) -> Tensor:
        """Mean over the tokens that are not ignored, or over all."""
        return per_token[self.labels != -100].mean() if labels else per_token.mean()

    def log_q(self, t: float = 1.0) -> Tensor:
        return F.log_softmax(self.z / t, -1)

    def log_p(self, t: float = 1.0) -> Tensor:
        return F.log_softmax(self.u / t, -1)

    def ce(self) -> Tensor:
        return F.cross_entropy(self.z, self.labels, ignore_index=-100)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def cross(log_a: Tensor, log_b: Tensor) -> Tensor:
    """-sum a log b: what "forward KL" means where the entropy is left out."""
    return -(log_a.exp() * log_b).sum(-1)


def generalised_jsd(s: Sides, beta: float, t: float) -> Tensor:
    """GKD, equation 1, with the ends that TRL and Liger-Kernel give it."""
    log_q, log_p = s.log_q(t), s.log_p(t)
    if beta == 0:
        return s.kept(kl(log_p, log_q))
    if beta == 1:
        return s.kept(kl(log_q, log_p))
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return s.kept(beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m))


def decoupled(s: Sides, alpha: float, beta: float, t: float) -> Tensor:
    """Zhao et al., equation 7: target class against the rest, and among the rest."""
    y = s.labels.clamp_min(0)[:, None]
    q_y, p_y = s.log_q(t).exp().gather(1, y), s.log_p(t).exp().gather(1, y)
    binary = kl(torch.cat([p_y, 1 - p_y], 1).log(), torch.cat([q_y, 1 - q_y], 1).log())
    keep = torch.ones_like(s.z, dtype=torch.bool).scatter(1, y, False)
    rest = [x[keep].view(len(y), -1) / t for x in (s.u, s.z)]
    within = kl(*(F.log_softmax(x, -1) for x in rest))
    return t * t * s.kept(alpha * binary + beta * within)


def skewed(s: Sides, lam: float, forward: bool) -> Tensor:
    log_q, log_p = s.log_q(), s.log_p()
    if forward:
        return s.kept(cross(log_p, (lam * log_p.exp() + (1 - lam) * log_q.exp()).log()))
    return s.kept(kl(log_q, ((1 - lam) * log_p.exp() + lam * log_q.exp()).log()))


def js_distance(s: Sides, lam: float) -> Tensor:
    log_q, log_p = s.log_q(), s.log_p()
    log_m = ((1 - lam) * log_p.exp() + lam * log_q.exp()).log()
    return s.kept(lam * kl(log_q, log_m) + (1 - lam) * kl(log_p, log_m))


def tv(s: Sides) -> Tensor:
    return s.kept((s.log_p().exp() - s.log_q().exp()).abs().sum(-1) / 2)


def hinton(s: Sides) -> Tensor:
    return F.kl_div(s.log_q(T), s.log_p(T).exp(), reduction="none").sum(-1) * T * T


class Yours(NamedTuple):
    """A formula, how much of the teacher's entropy it has more than ours, and whether ignored tokens are in it."""

    formula: Callable[[Sides], Tensor]
    entropy: float = 0.0
    ignores: bool = True


# By the left column of the page's tables.
YOURS = {
    'F.kl_div(log_softmax(z / T), softmax(u / T), reduction="batchmean") * T * T': Yours(
        lambda s: F.kl_div(s.log_q(T), s.log_p(T).exp(), reduction="batchmean") * T * T, ignores=False
    ),
    "w * T * T * KL(p, q) + (1 - w) * cross_entropy(z, labels)": Yours(
        lambda s: W * s.kept(hinton(s)) + (1 - W) * s.ce()
    ),
    "F.cross_entropy(z, softmax(u))": Yours(lambda s: s.kept(cross(s.log_p(), s.log_q())), entropy=1.0),
    "F.mse_loss(z, u)": Yours(lambda s: s.kept((s.z - s.u).square().mean(-1))),
    "generalized_jsd_loss(z, u, labels, beta=0.3, temperature=T)": Yours(lambda s: generalised_jsd(s, 0.3, T)),
    "generalized_jsd_loss(z, u, labels, beta=0, temperature=T)": Yours(lambda s: generalised_jsd(s, 0, T)),
    "generalized_jsd_loss(z, u, labels, beta=1, temperature=T)": Yours(lambda s: generalised_jsd(s, 1, T)),
    "LigerFusedLinearJSDLoss(beta=0.3, temperature=T)": Yours(
        lambda s: 0.5 * s.ce() + 0.5 * generalised_jsd(s, 0.3, T)
    ),
    "LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0, temperature=T)": Yours(
        lambda s: generalised_jsd(s, 0, T)
    ),
    "LigerFusedLinearJSD(jsd_beta=0.3, temperature=T)": Yours(lambda s: generalised_jsd(s, 0.3, T)),
    "LigerFusedLinearCosineSimilarityLoss(beta=1.0)": Yours(
        lambda s: 0.5 * s.ce() + 0.5 * s.kept(1 - (F.normalize(s.z, dim=-1) * F.normalize(s.u, dim=-1)).sum(-1))
    ),
    "LigerFusedLinearKLDivLoss(temperature=T)": Yours(lambda s: s.kept(kl(s.log_p(), s.log_q(T)))),
    "LigerTVDLoss()": Yours(tv),
    "ForwardKLLoss()": Yours(lambda s: s.kept(cross(s.log_p(), s.log_q())), entropy=1.0),
    "ReverseKLLoss()": Yours(lambda s: s.kept(kl(s.log_q(), s.log_p()))),
    "SymmetricKLLoss(sym_kd_ratio=0.3)": Yours(
        lambda s: s.kept(0.3 * cross(s.log_p(), s.log_q()) + 0.7 * kl(s.log_q(), s.log_p())), entropy=0.3
    ),
    "kd_ratio * ForwardKLLoss() + (1 - kd_ratio) * CE": Yours(
        lambda s: W * s.kept(cross(s.log_p(), s.log_q())) + (1 - W) * s.ce(), entropy=W
    ),
    "symmetric_kl(lam=0.9)": Yours(
        lambda s: s.kept(0.1 * cross(s.log_p(), s.log_q()) + 0.9 * kl(s.log_q(), s.log_p())), entropy=0.1
    ),
    "js_distance(lam=0.9)": Yours(lambda s: js_distance(s, 0.9)),
    "tv_distance()": Yours(tv),
    "skewed_forward_kl(lam=0.1)": Yours(lambda s: skewed(s, 0.1, True), entropy=1.0),
    "skewed_reverse_kl(lam=0.1)": Yours(lambda s: skewed(s, 0.1, False)),
    "KDLoss(temperature=T)(z, u, labels)": Yours(lambda s: s.kept(hinton(s))),
    "KDLoss(temperature=T)(z, u, labels, num_batch_labels=100)": Yours(
        lambda s: hinton(s)[s.labels != -100].sum() / 100
    ),
    "(1 - kd_alpha) * CE + kd_alpha * T^2 * KL(teacher, student)": Yours(
        lambda s: (1 - W) * s.ce() + W * s.kept(hinton(s))
    ),
    "dkd_loss(alpha=1.0, beta=8.0, temperature=T)": Yours(lambda s: decoupled(s, 1.0, 8.0, T)),
}


def rows_of_the_page() -> dict[str, tuple[str, str]]:
    """Right and third column by the left one, of the tables headed yours, ours, difference."""
    rows, inside = {}, False
    for line in PAGE.read_text().splitlines():
        columns = [c.strip() for c in line.strip("|").split(" | ")]
        if columns[:2] == ["yours", "ours"]:
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not set(line) <= set("|- "):
            assert len(columns) == 3, line
            rows[columns[0].strip("`")] = (columns[1].strip("`"), columns[2].strip("|").strip())
    return rows


ROWS = rows_of_the_page()


def call(x: Inputs, arguments: str, impl: str) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, gradients and teacher entropies of the call that the page prints."""
    u = x.states @ x.teacher_head.t()
    names = {"u": u, "p": torch.softmax(u, -1), "states": x.states, "teacher_head": x.teacher_head, "T": T, "w": W,
             "kd_ratio": W, "kd_alpha": W, "N": N, "TeacherHidden": TeacherHidden, "TeacherLogits": TeacherLogits,
             "TeacherLogProbs": TeacherLogProbs}  # fmt: skip
    keywords = eval(f"dict({arguments})", names)
    leaves = [x.hidden.clone().requires_grad_(), x.head.clone().requires_grad_()]
    loss, stats = linear_distill_loss(*leaves, x.labels, **keywords, impl=impl)
    return loss.detach(), list(torch.autograd.grad(loss, leaves)), stats.teacher_entropy


def compare(x: Inputs, arguments: str, yours: Yours, impl: str, exact: float) -> None:
    leaves = [x.hidden.clone().requires_grad_(), x.head.clone().requires_grad_()]
    sides = Sides(leaves[0] @ leaves[1].t(), x.states @ x.teacher_head.t(), x.labels)
    value = yours.formula(sides)
    want = torch.autograd.grad(value, leaves)
    loss, got, entropy = call(x, arguments, impl)
    loss = loss + yours.entropy * sides.kept(entropy)
    for a, b in zip([loss, *got], [value.detach(), *want]):
        assert (a - b).norm() <= exact * (1 + b.norm())


def test_the_page_and_the_tests_know_the_same_losses():
    assert ROWS.keys() == YOURS.keys()
    for name, (_, difference) in ROWS.items():
        said = re.match(r"value: (teacher's|[\w.]+ of the teacher's) entropy more", difference)
        assert bool(said) == (YOURS[name].entropy > 0), name


@pytest.mark.parametrize("name", YOURS)
def test_formula_in_float64(name):
    x = inputs(torch.float64)
    if not YOURS[name].ignores:
        x.labels[:] = torch.arange(N) % 40
    compare(x, ROWS[name][0], YOURS[name], "reference", 1e-12)


@pytest.mark.parametrize("name", YOURS)
@BULK
def test_formula_in_float32(impl, name):
    x = inputs(torch.float32)
    if not YOURS[name].ignores:
        x.labels[:] = torch.arange(N) % 40
    compare(x, ROWS[name][0], YOURS[name], impl, 5e-6)


def liger_loss(x: Inputs, name: str) -> Callable[..., Tensor]:
    chunked = pytest.importorskip(
        "liger_kernel.chunked_loss", reason="pip install --no-deps liger-kernel", exc_type=ImportError
    )
    names = {k: getattr(chunked, k) for k in ("LigerFusedLinearJSDLoss", "LigerFusedLinearCosineSimilarityLoss")}
    return eval(name.replace("(", "(compiled=False, ", 1), {**names, "T": T})


@pytest.mark.parametrize("name", [n for n in YOURS if re.match(r"LigerFusedLinear\w+Loss\((beta|weight)", n)])
@BULK
def test_liger_itself(impl, name):
    """Loss and both gradients of the package's chunked losses, of which one ignores some tokens."""
    x = inputs(torch.float32)
    leaves = [x.hidden.clone().requires_grad_(), x.head.clone().requires_grad_()]
    value = liger_loss(x, name)(*leaves, x.states, x.teacher_head, x.labels)
    want = torch.autograd.grad(value, leaves)
    loss, got, _ = call(x, ROWS[name][0], impl)
    for a, b in zip([loss, *got], [value.detach(), *want]):
        assert (a - b).norm() <= 1e-5 * (1 + b.norm())


@pytest.mark.parametrize(("beta", "name"), [(0, "forward_kl"), (1, "reverse_kl")])
def test_liger_at_the_ends_of_the_jsd(beta, name):
    """It switches to the KL: so does ours when asked by name, and when normalised."""
    x = inputs(torch.float32)
    soft = {"teacher": TeacherHidden(x.states, x.teacher_head), "omega": 1.0, "temperature": T,
            "teacher_temperature": T}  # fmt: skip
    theirs = liger_loss(x, f"LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta={beta}, "
                           "temperature=T)")(x.hidden, x.head, x.states, x.teacher_head, x.labels)  # fmt: skip
    for keywords in ({"divergence": name}, {"divergence": "jsd", "beta": beta, "normalize_jsd": True}):
        ours = linear_distill_loss(x.hidden, x.head, x.labels, **soft, **keywords).loss
        assert abs(ours - theirs) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["LigerFusedLinearJSD(jsd_beta=0.3, temperature=T)"])
def test_liger_triton_losses(name):
    """The losses of `liger_kernel.transformers`, which need a GPU."""
    module = pytest.importorskip(
        "liger_kernel.transformers.fused_linear_jsd", reason="pip install --no-deps liger-kernel", exc_type=ImportError
    )
    x = inputs(torch.float32)
    leaves = [x.hidden.clone().requires_grad_(), x.head.clone().requires_grad_()]
    loss_fn = eval(name, {"LigerFusedLinearJSD": module.LigerFusedLinearJSD, "T": T})
    value = loss_fn(*leaves, x.states, x.teacher_head, x.labels)
    want = torch.autograd.grad(value, leaves)
    loss, got, _ = call(x, ROWS[name][0], "auto")
    for a, b in zip([loss, *got], [value.detach(), *want]):
        assert (a - b).norm() <= 1e-3 * (1 + b.norm())
