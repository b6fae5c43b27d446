"""Calls of the loss that one process and a group of processes must answer alike."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from effkern import TeacherHidden, TeacherLogits, TeacherLogProbs
from effkern.ops.distill.rows import DIVERGENCES, SPARSE_KINDS
from tests.ops.distill_cases import PARAMETERS, divergence_options, teacher_of

ROWS, DIM, VOCAB = 13, 6, 22
# Very uneven slices, an empty one among them.
UNEVEN = {2: [19, 3], 4: [1, 17, 0, 4]}


@dataclass
class Call:
    """Tensors and keywords of one whole call, and how it is cut."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    teacher: Any = None
    keywords: dict[str, Any] = field(default_factory=dict)
    sizes: dict[int, list[int]] | None = None
    """Rows of the slices by number of ranks; as torch.chunk does it if None."""
    sequence_parallel: bool = False
    grad: Tensor | float = 1.0
    backwards: int = 1
    tolerance: float = 1e-12


def make(seed: int, *, teacher: Any = "logits", divergence: str = "forward_kl", padded: int = VOCAB, rows: int = ROWS,
         bias: bool = False, **keywords: Any) -> Call:  # fmt: skip
    """Random tensors in float64, three ignored rows, chunks of about five rows."""
    torch.manual_seed(seed)
    vocab = keywords.get("vocab_valid", padded)
    labels = torch.randint(0, vocab, (rows,))
    labels[1:7:2] = -100
    given = None
    if teacher is not None:
        logits = 1.5 * torch.randn(rows, padded, dtype=torch.float64)
        given = teacher_of(teacher, logits, labels, 6) if isinstance(teacher, str) else teacher(logits)
        tempered = DIVERGENCES[divergence].tempered
        t_teacher = 1.0 if teacher in SPARSE_KINDS or teacher == "confidence" else 0.8
        keywords = {
            "omega": 0.6, "temperature": 1.7 if tempered else None,
            "teacher_temperature": t_teacher if tempered else None, **divergence_options(divergence), **keywords,
        }  # fmt: skip
    hidden = torch.randn(rows, DIM, dtype=torch.float64)
    weight = torch.randn(padded, DIM, dtype=torch.float64) * 0.8
    bias_V = torch.randn(padded, dtype=torch.float64) if bias else None
    keywords.setdefault("chunk_bytes", 8 * 5 * VOCAB // 2)
    return Call(hidden, weight, labels, bias_V, given, keywords)


EVERYTHING: dict[str, Any] = {
    "bias": True, "vocab_valid": 19, "padded": 24, "softcap": 5.0, "logit_scale": 1.3, "label_smoothing": 0.1,
    "z_loss": 1e-2,
}  # fmt: skip


def _cut_logprobs(logits: Tensor) -> TeacherLogProbs:
    """Log-probabilities with a third of the entries cut away: their mass is below 1."""
    cut = torch.log_softmax(logits, -1)
    cut[:, ::3] = -torch.inf
    return TeacherLogProbs(cut)


def _full_hidden(logits: Tensor) -> TeacherHidden:
    rows, vocab = logits.shape
    make = {"dtype": torch.float64}
    states, head = torch.randn(rows, 4, **make), torch.randn(vocab, 4, **make)
    return TeacherHidden(states, head, torch.randn(vocab, **make), 3.0, 0.7)


def cases() -> dict[str, Call]:
    """All calls, by name; the same in every process."""
    made: dict[str, Call] = {}

    def add(name: str, changes: dict[str, Any] | None = None, **options: Any) -> None:
        call = make(len(made), **options)
        made[name] = replace(call, **changes) if changes else call

    for name in DIVERGENCES:
        add(f"logits-{name}", divergence=name)
        per_token = {"weights": torch.rand(ROWS), "omega": torch.linspace(0, 1, ROWS)}
        add(f"everything-{name}", divergence=name, **per_token, **EVERYTHING)
        if DIVERGENCES[name].tempered:
            add(f"logprobs-{name}", divergence=name, teacher="logprobs", teacher_temperature=1.0)
    for name in ("forward_kl", "symmetric_kl", "skew_forward_kl"):
        add(f"cut-logprobs-{name}", divergence=name, teacher=_cut_logprobs, teacher_temperature=1.0,
            **(PARAMETERS[name] | ({"beta": 1.0} if name == "symmetric_kl" else {})))  # fmt: skip
    add("logprobs-tempered", teacher="logprobs")
    for name in ("forward_kl", "jsd", "decoupled_kl", "zscored_mse"):
        add(f"hidden-{name}", divergence=name, teacher=_full_hidden, padded=24, vocab_valid=20)
    for kind in SPARSE_KINDS:
        add(f"sparse-{kind}", teacher=kind)
        add(f"sparse-{kind}-everything", teacher=kind, **EVERYTHING | {"vocab_valid": 22})
    add("sparse-tail_bucket-reverse", teacher="tail_bucket", divergence="reverse_kl")
    for kind in ("confidence", "similarity", "similarity+prob"):
        add(kind, teacher=kind, padded=24, vocab_valid=24)
    add("similarity-jsd", teacher="similarity", divergence="jsd")
    add("similarity-decoupled", teacher="similarity", divergence="decoupled_kl")

    add("cross-entropy", teacher=None)
    add("cross-entropy-everything", teacher=None, **EVERYTHING)
    add("sum", reduction="sum", weights=torch.rand(ROWS))
    add("none", {"grad": torch.linspace(-1, 2, ROWS, dtype=torch.float64), "backwards": 2}, reduction="none", bias=True)
    add("none-jsd", {"grad": torch.linspace(-1, 2, ROWS, dtype=torch.float64)}, reduction="none", divergence="jsd")
    add("denom", denom=37.0, weights=torch.rand(ROWS))
    add("denom-tensor", {"grad": 0.3, "backwards": 2}, denom=torch.tensor(5.0))
    add("omega-0", omega=0.0)
    add("omega-1", omega=1.0)
    add("t-squared", t_squared=True)
    add("normalised-jsd", divergence="jsd", normalize_jsd=True)
    add("normalised-jsd-end", divergence="jsd", normalize_jsd=True, beta=0.0)
    add("weights-0", weights=(torch.arange(ROWS) % 2).double())
    add("no-rows", rows=0)
    add("one-chunk", chunk_bytes=1 << 30)
    add("one-row-chunks", chunk_bytes=1, divergence="jsd")
    ignored = make(999, bias=True)
    made["all-ignored"] = replace(ignored, labels=torch.full_like(ignored.labels, -100))
    add("sequence-parallel", {"sequence_parallel": True}, rows=12, bias=True, divergence="jsd")

    # A slice of padding alone, an empty one, very uneven ones.
    for name in ("forward_kl", "jsd", "decoupled_kl", "zscored_mse", "cosine"):
        add(f"padding-rank-{name}", divergence=name, padded=24, vocab_valid=6, bias=True)
        add(f"uneven-{name}", {"sizes": UNEVEN}, divergence=name, bias=True, label_smoothing=0.1)
    add("uneven-sparse", {"sizes": UNEVEN}, teacher="uniform_tail")
    add("padding-rank-sparse", teacher="tail_to_label", padded=24, vocab_valid=6)

    # Entries masked in both models; all of the first slice of four among them.
    for name in ("forward_kl", "reverse_kl", "jsd", "skew_reverse_kl", "tvd"):
        call = make(len(made), divergence=name, bias=True)
        masked = torch.tensor([0, 1, 2, 3, 4, 5, 9, 21])
        assert call.bias is not None
        call.bias[masked] = -torch.inf
        call.teacher.logits[:, masked] = -torch.inf
        made[f"masked-{name}"] = replace(call, labels=torch.where(call.labels >= 0, 6 + call.labels % 3, -100))
    for name in ("forward_kl", "jsd", "decoupled_kl"):
        call = make(len(made), divergence=name)
        teacher = TeacherLogits(call.teacher.logits * 3e3)
        made[f"extreme-{name}"] = replace(call, hidden=call.hidden * 1e3, teacher=teacher, tolerance=1e-11)
    for name in ("forward_kl", "jsd", "zscored_mse"):
        call = make(len(made), divergence=name, bias=True, rows=24)
        made[f"float32-{name}"] = replace(_to(call, torch.float32), tolerance=2e-5)
    # The gradient of hidden is summed in bfloat16, as tensor parallelism does with activations.
    made["bfloat16"] = replace(_to(make(len(made), rows=24), torch.bfloat16), tolerance=2e-2)
    return made


def _to(call: Call, dtype: torch.dtype) -> Call:
    bias = None if call.bias is None else call.bias.to(dtype)
    teacher = TeacherLogits(call.teacher.logits.to(dtype))
    return replace(call, hidden=call.hidden.to(dtype), weight=call.weight.to(dtype), bias=bias, teacher=teacher)


def slice_sizes(call: Call, world: int) -> list[int]:
    """Rows of each rank's slice."""
    if call.sizes is not None:
        return call.sizes[world]
    size = -(-len(call.weight) // world)
    return [min(max(len(call.weight) - rank * size, 0), size) for rank in range(world)]


def cut(call: Call, rank: int, world: int) -> Call:
    """The call as one rank makes it."""
    sizes = slice_sizes(call, world)
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    teacher = call.teacher
    if isinstance(teacher, TeacherLogits):
        teacher = TeacherLogits(teacher.logits[:, part])
    elif isinstance(teacher, TeacherLogProbs):
        teacher = TeacherLogProbs(teacher.logprobs[:, part])
    elif isinstance(teacher, TeacherHidden):
        bias = None if teacher.bias is None else teacher.bias[part]
        teacher = TeacherHidden(teacher.hidden, teacher.weight[part], bias, teacher.softcap, teacher.logit_scale)
    hidden = call.hidden.chunk(world)[rank] if call.sequence_parallel else call.hidden
    bias = None if call.bias is None else call.bias[part]
    return replace(call, hidden=hidden, weight=call.weight[part], bias=bias, teacher=teacher)


def answer(call: Call, function: Any, **keywords: Any) -> dict[str, Tensor]:
    """Loss, statistics and gradients of one call."""
    tensors = [x.detach().clone().requires_grad_() for x in (call.hidden, call.weight, call.bias) if x is not None]
    bias = tensors[2] if call.bias is not None else None
    result = function(
        tensors[0], tensors[1], call.labels, bias=bias, teacher=call.teacher, **{**call.keywords, **keywords}
    )
    for n in range(call.backwards):
        for x in tensors:
            x.grad = None
        (result.loss * call.grad).sum().backward(retain_graph=n + 1 < call.backwards)
    given = {"loss": result.loss.detach()} | {f"stats.{name}": x for name, x in result.stats._asdict().items()}
    for name, x in zip(("hidden", "weight", "bias"), tensors):
        assert x.grad is not None
        given[name] = x.grad
    return given
