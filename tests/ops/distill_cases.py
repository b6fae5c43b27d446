"""Inputs of the distillation loss that its tests share, and its three runs: truth, eager, ours."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from effkern import (
    TeacherConfidence,
    TeacherHidden,
    TeacherLogits,
    TeacherLogProbs,
    TeacherSimilarity,
    TeacherTopK,
    linear_distill_loss,
    native,
)
from effkern.ops import registry
from effkern.ops.distill import reference
from effkern.ops.distill.rows import DIVERGENCES, SPARSE_KINDS, RowOptions, Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Every divergence, with parameters inside of their range and unlike each other.
PARAMETERS: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "symmetric_kl": {"beta": 0.3},
    "jsd": {"beta": 0.3},
    "skew_forward_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.15},
    "tvd": {},
    "decoupled_kl": {"alpha": 1.5, "beta": 0.4},
    "mse": {},
    "centered_mse": {},
    "zscored_mse": {},
    "cosine": {},
}
assert list(PARAMETERS) == list(DIVERGENCES)
TEMPERED = [name for name, d in DIVERGENCES.items() if d.tempered]
# What a sparse teacher can serve.
SPARSE_PAIRS = [*((kind, "forward_kl") for kind in SPARSE_KINDS), ("tail_bucket", "reverse_kl")]
DENSE_KINDS = ("logits", "hidden", "logprobs", "confidence", "similarity", "similarity+prob")


def divergence_options(name: str) -> dict[str, Any]:
    return {"divergence": name, **PARAMETERS[name]}


def implementations(bulk: bool = False) -> list:
    """Every implementation, with the reason where this machine cannot run it.

    Triton's interpreter takes half a second for what the others do in ten milliseconds: of a test with many
    combinations (`bulk`) it runs only in the slow set.
    """
    params = []
    for i in registry.registered()["linear_distill_loss"]:
        reason = i.unavailable(torch.device(DEVICE))
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        if bulk and i.name == "triton" and native.triton_interprets():
            marks.append(pytest.mark.slow)
        params.append(pytest.param(i.name, marks=marks))
    return params


@dataclass
class Case:
    """Tensors and options of one call. A teacher that is a tensor is one of logits."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teacher: Any = None
    bias: Tensor | None = None
    weights: Tensor | None = None
    omega: float | Tensor = 0.0
    vocab_valid: int | None = None
    reduction: str = "mean"
    denom: float | None = None
    t_squared: bool = False
    normalize_jsd: bool = False
    options: RowOptions = field(default_factory=RowOptions)


def sparse_teacher(logits: Tensor, labels: Tensor, k: int, kind: str, empty: bool = True) -> TeacherTopK:
    """The k largest of softmax(logits), one slot of each second row left empty, the label kept in each third."""
    log_p = torch.log_softmax(logits.float(), -1)
    values, ids = log_p.topk(k, -1)
    rows = torch.arange(len(ids), device=ids.device)
    y = labels.clamp_min(0)
    there = (ids == y[:, None]).any(-1)
    put = (rows % 3 == 0) & ~there
    ids[:, 0] = torch.where(put, y, ids[:, 0])
    values[:, 0] = torch.where(put, log_p.gather(1, y[:, None]).squeeze(1), values[:, 0])
    if empty and k > 1:
        ids[::2, k - 1] = -1
    return TeacherTopK(ids, values, kind)


def teacher_of(kind: str, logits: Tensor, labels: Tensor, k: int = 5) -> Any:
    """A teacher of the class or the sparse kind `kind` that is made of `logits` [N, V]."""
    rows, vocab = logits.shape
    device, prob = logits.device, torch.rand(rows, device=logits.device)
    if kind in SPARSE_KINDS:
        return sparse_teacher(logits, labels, min(k, vocab), kind)
    if kind == "logits":
        return TeacherLogits(logits)
    if kind == "logprobs":
        return TeacherLogProbs(torch.log_softmax(logits.float(), -1).to(logits.dtype))
    if kind == "hidden":
        states, head = torch.randn(rows, 7, device=device), torch.randn(vocab, 7, device=device)
        return TeacherHidden(states.to(logits.dtype), head.to(logits.dtype))
    if kind == "confidence":
        return TeacherConfidence(prob)
    assert kind in ("similarity", "similarity+prob")
    return TeacherSimilarity(torch.randn(vocab, vocab, device=device), prob if "+" in kind else None)


def make(
    rows: int = 13, dim: int = 24, vocab: int = 50, *, dtype: torch.dtype = torch.float32, teacher: bool | str = True,
    bias: bool = False, weights: bool = False, omega: float = 0.6, spread: float = 1.0, ignored: int = 2, **options,
) -> Case:  # fmt: skip
    """Random inputs; logits have about the standard deviation `spread`. `teacher` may be a kind of `teacher_of`."""
    labels = torch.randint(0, vocab, (rows,))
    labels[1 : 1 + ignored] = options.get("ignore_index", -100)
    case = Case(
        hidden=torch.randn(rows, dim).to(dtype),
        weight=(torch.randn(vocab, dim) * spread / dim**0.5).to(dtype),
        labels=labels,
        teacher=(torch.randn(rows, vocab) * spread).to(dtype) if teacher else None,
        bias=(torch.randn(vocab) * 0.5).to(dtype) if bias else None,
        weights=torch.rand(rows) if weights else None,
        omega=omega if teacher else 0.0,
        options=RowOptions(**options),
    )
    if isinstance(teacher, str):
        case.teacher = teacher_of(teacher, case.teacher, labels)
    return to(case, device=DEVICE)


def of_logits(z: Tensor, u: Tensor, labels: Tensor, *, bias: Tensor | None = None, **others: Any) -> Case:
    """A case whose raw logits are exactly `z` [N, V]: the weight's gradient is the transposed gradient of the logits.

    Sums over the rows, so that each row can be looked at on its own.
    """
    hidden, weight = torch.eye(len(z), dtype=z.dtype), z.t().contiguous()
    case = Case(hidden, weight, labels, u, bias, omega=0.6, reduction="sum")
    return to(replace(case, **others), device=DEVICE)


def to(case: Any, **kwargs) -> Any:
    """The case (or teacher) with its floating tensors (device: all tensors) converted."""
    only_device = {k: v for k, v in kwargs.items() if k == "device"}

    def moved(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(**(kwargs if x.is_floating_point() else only_device))
        if is_dataclass(x):
            return replace(x, **{f.name: moved(getattr(x, f.name)) for f in fields(x)})
        return x

    return moved(case)


def leaves(case: Case) -> list[Tensor]:
    """Detached copies that require a gradient: hidden, weight, bias."""
    return [x.detach().clone().requires_grad_() for x in (case.hidden, case.weight, case.bias) if x is not None]


def plain_teacher(case: Case) -> tuple[Tensor | tuple[Tensor, Tensor] | None, str]:
    """The teacher as the reference takes it, all N x V of it, and what it is (RowOptions.teacher)."""
    t, labels = case.teacher, case.labels.long().clamp_min(0)
    vocab = case.vocab_valid or case.weight.shape[0]
    if t is None or isinstance(t, Tensor):
        return t, "logits"
    if isinstance(t, TeacherLogits):
        return t.logits, "logits"
    if isinstance(t, TeacherHidden):
        u = t.hidden @ t.weight[:vocab].t()
        u = t.logit_scale * (u if t.bias is None else u + t.bias[:vocab])
        return (u if t.softcap is None else t.softcap * torch.tanh(u / t.softcap)), "logits"
    if isinstance(t, TeacherLogProbs):
        as_given = case.options.teacher_temperature == 1 and case.options.divergence != "decoupled_kl"
        return t.logprobs, "logprobs" if as_given else "logits"
    if isinstance(t, TeacherTopK):
        return (t.ids, t.logprobs if t.lse is None else t.logprobs - t.lse[:, None]), t.kind
    if isinstance(t, TeacherConfidence):
        rest = ((1 - t.prob) / (vocab - 1))[:, None].expand(-1, vocab)
        return rest.scatter(1, labels[:, None], t.prob[:, None]).log(), "logprobs"
    assert isinstance(t, TeacherSimilarity)
    rho = torch.softmax(t.table / case.options.teacher_temperature, -1)[labels]
    if t.prob is not None:
        rest = rho.scatter(1, labels[:, None], 0.0)
        rho = (1 - t.prob)[:, None] * rest / rest.sum(-1, keepdim=True)
        rho = rho.scatter(1, labels[:, None], t.prob[:, None])
    return rho.log(), "logprobs" if case.options.divergence != "decoupled_kl" else "logits"


def plain_options(case: Case) -> RowOptions:
    """The options with the factor of D, and the end of a normalised JSD by name."""
    o = case.options._replace(teacher=plain_teacher(case)[1])
    if isinstance(case.teacher, TeacherSimilarity):
        o = o._replace(teacher_temperature=1.0)
    factor = o.temperature**2 if case.t_squared else 1.0
    if case.normalize_jsd and o.beta in (0, 1):
        o = o._replace(divergence="forward_kl" if o.beta == 0 else "reverse_kl")
    elif case.normalize_jsd:
        factor /= o.beta * (1 - o.beta)
    return o._replace(divergence_scale=factor)


def oracle(case: Case, grad: Tensor | float = 1.0) -> list[Tensor]:
    """[loss, grad_hidden, grad_weight, grad_bias?] of the reference with all logits live, in the case's dtypes."""
    x = leaves(case)
    loss = reference.linear_distill_loss(
        x[0], x[1], case.labels, plain_teacher(case)[0], options=plain_options(case), omega=case.omega,
        bias=x[2] if x[2:] else None, weights=case.weights, vocab_valid=case.vocab_valid, reduction=case.reduction,
        denom=case.denom,
    )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad((loss * grad).sum(), x)]


def rows_of(case: Case) -> Rows:
    """The case as one chunk of rows for the reference's row functions, each of scale 1."""
    vocab = case.vocab_valid or case.weight.shape[0]
    raw = case.hidden @ case.weight[:vocab].t()
    acc = torch.promote_types(raw.dtype, torch.float32)
    omega = torch.as_tensor(case.omega, dtype=acc, device=raw.device).expand(len(raw))
    teacher = plain_teacher(case)[0]
    dense, sparse = (None, teacher) if isinstance(teacher, tuple) else (teacher, (None, None))
    bias = None if case.bias is None else case.bias[:vocab]
    scale = torch.ones(len(raw), dtype=acc, device=raw.device)
    return Rows(raw, dense, *sparse, bias, case.labels, scale, omega, omega)


def stats_oracle(case: Case) -> Tensor:
    """DistillStats of the reference, stacked, with all logits live, in the case's dtypes."""
    return reference.row_stats(rows_of(case), plain_options(case))


def arguments(case: Case) -> dict:
    """Keywords of the public function, without its tensors that get a gradient."""
    o = case.options._asdict()
    given = case.teacher is not None
    for internal in ("divergence_scale", "teacher"):
        del o[internal]
    for name in ("alpha", "beta"):
        o[name] = o[name] if name in DIVERGENCES[o["divergence"]].parameters else None
    for name in ("temperature", "teacher_temperature"):
        o[name] = o[name] if given else None
    return {
        **o,
        "teacher": TeacherLogits(case.teacher) if isinstance(case.teacher, Tensor) else case.teacher,
        "omega": case.omega if given else None,
        "weights": case.weights,
        "vocab_valid": case.vocab_valid,
        "reduction": case.reduction,
        "denom": case.denom,
        "t_squared": case.t_squared,
        "normalize_jsd": case.normalize_jsd,
    }


def result(case: Case, impl: str = "auto", **overrides):
    """What the public function returns, and the leaves that it was called with."""
    x = leaves(case)
    keywords = {**arguments(case), **overrides}
    return linear_distill_loss(x[0], x[1], case.labels, bias=x[2] if x[2:] else None, impl=impl, **keywords), x


def ours(case: Case, impl: str, grad: Tensor | float = 1.0, **overrides) -> list[Tensor]:
    """The same list as that of `oracle` from the public function."""
    (loss, _), x = result(case, impl, **overrides)
    return [loss.detach(), *torch.autograd.grad((loss * grad).sum(), x)]


__all__ = ["DENSE_KINDS", "DEVICE", "PARAMETERS", "SPARSE_PAIRS", "TEMPERED", "Case", "TeacherHidden", "TeacherLogits",
           "arguments", "divergence_options", "implementations", "leaves", "make", "of_logits", "oracle", "ours",
           "plain_options", "plain_teacher", "result", "rows_of", "sparse_teacher", "stats_oracle", "teacher_of",
           "to"]  # fmt: skip
