"""One small call of each public op, forward and backward, in every implementation that a machine without GPU runs.

The same table serves what must hold for every op: opcheck, threads, determinism, devices, CUDA graphs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import effkern
from effkern.ops.lora_rite import RiteGroup, RiteOptions, lora_rite_rebuild_, lora_rite_step_, new_group
from effkern.ops.lora_rite.group import STATE
from effkern.ops.shampoo import apply_, gram_ema_, inverse_root
from effkern.ops.soft_labels import soft_labels_from_logits
from effkern.ops.token_stats import label_rank


class Make:
    """Inputs of a call: they depend on the seed alone, are made on the CPU and moved.

    `again` gives the same tensors to another call, as a CUDA graph needs it. `extra` makes the calls larger; the tensor
    number `odd` comes on the meta device.
    """

    def __init__(self, device: str = "cpu", seed: int = 0, extra: int = 0, odd: int | None = None) -> None:
        self.device, self.extra, self.odd = torch.device(device), extra, odd
        self.generator = torch.Generator().manual_seed(seed)
        self.kept: list[Any] = []
        self.place = 0

    def again(self) -> "Make":
        self.place = 0
        return self

    def keep(self, make: Callable[[], Any]) -> Any:
        if self.place == len(self.kept):
            self.kept.append(make())
        self.place += 1
        return self.kept[self.place - 1]

    def put(self, make: Callable[[], Tensor], grad: bool = False) -> Tensor:
        device = torch.device("meta") if len(self.kept) == self.odd else self.device
        return self.keep(lambda: make().to(device).requires_grad_(grad))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return self.put(lambda: torch.randn(*shape, generator=self.generator).to(dtype), grad)

    def whole(self, high: int, *shape: int) -> Tensor:
        return self.put(lambda: torch.randint(0, high, shape, generator=self.generator))

    def labels(self, high: int, rows: int) -> Tensor:
        """One of them is left out."""
        ignored = torch.arange(rows) == 2
        return self.put(lambda: torch.randint(0, high, (rows,), generator=self.generator).where(~ignored, -100))

    def positive(self, batch: int, side: int) -> Tensor:
        def square() -> Tensor:
            x = torch.randn(batch, side, side + 4, generator=self.generator)
            return x @ x.mT

        return self.put(square)

    def rows(self, count: int) -> int:
        return count + self.extra

    def tensors(self) -> list[Tensor]:
        """All that a call may write to."""
        found = [x for x in self.kept if isinstance(x, Tensor)]
        groups = [x for x in self.kept if isinstance(x, RiteGroup)]
        return found + [x for g in groups for x in (*g.moments, *(getattr(g, name) for name in STATE[1:]))]


Run = Callable[[Make, str], list[Tensor]]


class OpCall(NamedTuple):
    run: Run
    impls: tuple[str, ...]
    """Without "auto"; those of CUDA alone are left out."""


def _grads(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and, where gradients are enabled, those of a weighted sum of theirs."""
    if not torch.is_grad_enabled():
        return outputs
    total = sum((x.double() * torch.arange(x.numel(), device=x.device).view(x.shape).cos()).sum() for x in outputs)
    assert isinstance(total, Tensor)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(total, inputs)]


def distill(make: Make, impl: str, teacher: str, dtype: torch.dtype = torch.float32, **keywords) -> list[Tensor]:
    rows, vocab, dim = make.rows(9), 37, 6
    hidden = make.normal(rows, dim, dtype=dtype, grad=True)
    weight, bias = make.normal(vocab, dim, dtype=dtype, grad=True), make.normal(vocab, grad=True)
    labels = make.labels(vocab, rows)
    given: effkern.TeacherLogits | effkern.TeacherHidden | effkern.TeacherTopK | None = None
    if teacher == "logits":
        given = effkern.TeacherLogits(make.normal(rows, vocab))
    elif teacher == "hidden":
        given = effkern.TeacherHidden(make.normal(rows, 4), make.normal(vocab, 4))
    elif teacher == "topk":
        ids = make.normal(rows, vocab).topk(3).indices
        given = effkern.TeacherTopK(ids, make.normal(rows, 3).log_softmax(-1) - 0.2, "tail_bucket")
    soft = {} if given is None else {"teacher": given, "omega": 0.4, "temperature": 2.0}
    soft |= {} if given is None or teacher == "topk" else {"teacher_temperature": 2.0}
    # Several chunks.
    memory = {} if "reduction" in keywords else {"chunk_bytes": 4 * vocab * 4}
    result = effkern.linear_distill_loss(
        hidden, weight, labels, bias=bias, impl=impl, softcap=5.0, num_kept=rows - 1, **soft, **memory, **keywords
    )
    return [result.stats.lse, *_grads([result.loss], [hidden, weight, bias])]


def laurel(make: Make, impl: str) -> list[Tensor]:
    rows, dim, rank = make.rows(7), 24, 3
    branch, x, e = (make.normal(rows, dim, grad=True) for _ in range(3))
    down, up = make.normal(dim, 2 * rank, grad=True), make.normal(rank, dim, grad=True)
    weights, norm_weight = make.normal(2, grad=True), make.normal(dim, grad=True)
    out = effkern.laurel_residual(
        branch, x, weights=weights, down=down, up=up, addends=[e], norm_weight=norm_weight, impl=impl, save_branch=False
    )
    return _grads([out.y, out.normed, out.ahead], [branch, x, weights, down, up, e, norm_weight])


def low_rank(make: Make, impl: str) -> list[Tensor]:
    branch, x = (make.normal(make.rows(7), 24, grad=True) for _ in range(2))
    down, up = make.normal(24, 6, grad=True), make.normal(3, 24, grad=True)
    out = effkern.laurel_residual(branch, x, down=down, up=up, impl=impl)
    return _grads([out.y, out.ahead], [branch, x, down, up])


def loop_step(make: Make, impl: str) -> list[Tensor]:
    f, h, e = (make.normal(make.rows(7), 24, grad=True) for _ in range(3))
    alpha, embedding = make.normal(24, grad=True), make.normal(24, grad=True)
    out = effkern.loop_step(f, h, e, alpha=alpha, beta=0.5, embedding=embedding, impl=impl, return_change=True)
    return _grads([out.state, out.core_input], [f, h, e, alpha, embedding])


def normed_loop_step(make: Make, impl: str) -> list[Tensor]:
    f, h, e = (make.normal(make.rows(7), 24, grad=True) for _ in range(3))
    alpha, beta, scale = make.normal(24, grad=True), make.normal(1, grad=True), make.normal(1, grad=True)
    down, up = make.normal(24, 3, grad=True), make.normal(3, 24, grad=True)
    weight, embedding = make.normal(24, grad=True), make.normal(24, grad=True)
    out = effkern.loop_step(
        f, h, e, alpha=alpha, beta=beta, low_rank=(down, up), norm_weight=weight, state_scale=scale, input_scale=0.3,
        embedding=embedding, save_branch=True, impl=impl,
    )  # fmt: skip
    return _grads([out.state, out.core_input], [f, h, e, alpha, beta, down, up, weight, scale, embedding])


def loop_similarity(make: Make, impl: str) -> list[Tensor]:
    tensors = [make.normal(5, make.rows(8), grad=True) for _ in range(4)]
    result = effkern.loop_similarity([tensors], 2, impl=impl)
    return _grads([result.mean, result.groups], tensors)


def looped_attention(make: Make, impl: str, form: str) -> list[Tensor]:
    batch, examples, dim = make.rows(3), 5, 4
    x, y, query = make.normal(batch, examples, dim, grad=True), make.normal(batch, examples, grad=True), None
    query, matrix = make.normal(batch, 2, dim, grad=True), make.normal(dim, dim, grad=True)
    steps = make.normal(3, grad=True)
    out = effkern.looped_linear_attention(
        x, y, query, matrix, 3, step_sizes=steps, every_loop=True, form=form, impl=impl
    )
    assert out.per_loop is not None
    return _grads([out.prediction, out.per_loop], [x, y, query, matrix, steps])


def mean_pool(make: Make, impl: str) -> list[Tensor]:
    ids, offsets = make.whole(11, 20), make.put(lambda: torch.tensor([0, 4, 4, 15, 20]))
    pooled = effkern.mean_pool(make.normal(11, make.rows(8)), ids, offsets, pad=0, normalize=True, impl=impl)
    keep, weight = make.put(lambda: torch.arange(20) % 3 > 0), make.normal(make.rows(8))
    hidden = make.normal(20, make.rows(8))
    return [pooled, effkern.norm_mean_pool(hidden, offsets, keep=keep, norm_weight=weight, impl=impl)]


def kmeans(make: Make, impl: str) -> list[Tensor]:
    points, centroids = make.normal(make.rows(40), 6), make.normal(5, 6)
    found = effkern.kmeans_assign(points, centroids, m=2, impl=impl)
    means, counts = effkern.kmeans_update(points, found.labels[:, 0].contiguous(), 5, impl=impl)
    return [*found, means, counts]


def scores(make: Make, impl: str) -> list[Tensor]:
    rows, vocab, dim = make.rows(9), 37, 6
    labels = make.whole(vocab, rows)
    found = effkern.token_stats(
        make.normal(rows, dim), make.normal(vocab, dim), labels, softcap=4.0, impl=impl, chunk_bytes=4 * vocab * 4
    )
    # Triton's kernel has no form for logits that exist.
    ranked = [] if impl == "triton" else [*label_rank(make.normal(rows, vocab), labels, impl=impl)]
    return [*found, *ranked]


def soft_labels(make: Make, impl: str) -> list[Tensor]:
    hidden, weight = make.normal(make.rows(9), 6), make.normal(37, 6)
    return [*effkern.soft_labels(hidden, weight, method="stratified", k=2, draws=5, seed=3, impl=impl)]


def soft_labels_of_logits(make: Make, impl: str) -> list[Tensor]:
    logits, positions = make.normal(make.rows(9), 37), make.whole(1000, make.rows(9))
    return [*soft_labels_from_logits(logits, method="topk", k=3, positions=positions, impl=impl)]


def roots(make: Make, impl: str, method: str) -> list[Tensor]:
    """`failures`, and so the write to it, is a part of the result."""
    matrices, failures = make.positive(2, make.rows(9)), make.put(lambda: torch.zeros(2, dtype=torch.int32))
    found = inverse_root(matrices, method=method, failures=failures, impl=impl)
    return [*found, failures]


def shampoo(make: Make, impl: str) -> list[Tensor]:
    m, n = make.rows(9), 7
    weights, momenta, grads = ([make.normal(m, n) for _ in range(2)] for _ in range(3))
    factor, left, right = make.positive(2, m), make.positive(2, m), make.positive(2, n)
    gram_ema_(factor, grads, decay=0.9, weight=0.1, impl=impl)
    norms = apply_(
        weights, grads, left, right, lr=0.1, momenta=momenta, momentum_decay=0.9, momentum_weight=0.1, nesterov=True,
        weight_decay=0.1, norm=1.0, impl=impl,
    )  # fmt: skip
    return [factor, norms, *weights, *momenta]


def eigh(make: Make, impl: str, method: str) -> list[Tensor]:
    return [*effkern.batched_eigh(make.positive(3, make.rows(8)), method=method, impl=impl)]


def lora_rite(make: Make, impl: str) -> list[Tensor]:
    rank, options = 3, RiteOptions()
    factors = [make.normal(rank, make.rows(40)), make.normal(33, rank)]
    steps = [[make.normal(*x.shape) for x in factors] for _ in range(2)]

    def ready() -> RiteGroup:
        group = new_group(factors, [True, False])
        lora_rite_rebuild_(group, options, impl=impl)
        return group

    group: RiteGroup = make.keep(ready)
    for grads in steps:
        lora_rite_step_([group], [grads], [0.01], [options], impl=impl)
    return [*group.factors, *group.moments, group.whiten, group.second, group.transport]


_ALL, _PLAIN = ("cpp", "triton", "reference"), ("cpp", "reference")

CALLS: dict[str, OpCall] = {
    "linear_distill_loss": OpCall(lambda make, impl: distill(make, impl, "none"), _ALL),
    "linear_distill_loss, teacher's logits": OpCall(lambda make, impl: distill(make, impl, "logits"), _ALL),
    "linear_distill_loss, teacher's hidden states": OpCall(
        lambda make, impl: distill(make, impl, "hidden", divergence="jsd", beta=0.5), _ALL
    ),
    "linear_distill_loss, sparse teacher": OpCall(lambda make, impl: distill(make, impl, "topk"), _ALL),
    "linear_distill_loss, bfloat16": OpCall(
        lambda make, impl: distill(make, impl, "logits", dtype=torch.bfloat16), _PLAIN
    ),
    "linear_distill_loss, per token": OpCall(
        lambda make, impl: distill(make, impl, "logits", reduction="none"), _PLAIN
    ),
    "laurel_residual": OpCall(laurel, _ALL),
    "laurel_residual, low rank alone": OpCall(low_rank, _PLAIN),
    "loop_step": OpCall(loop_step, _ALL),
    "loop_step, normed": OpCall(normed_loop_step, _ALL),
    "loop_similarity": OpCall(loop_similarity, _ALL),
    "looped_linear_attention": OpCall(lambda make, impl: looped_attention(make, impl, "factors"), _ALL),
    "looped_linear_attention, primal": OpCall(lambda make, impl: looped_attention(make, impl, "primal"), _PLAIN),
    "looped_linear_attention, dual": OpCall(lambda make, impl: looped_attention(make, impl, "dual"), _ALL),
    "mean_pool": OpCall(mean_pool, _ALL),
    "kmeans": OpCall(kmeans, _ALL),
    "token_stats": OpCall(scores, _ALL),
    "soft_labels": OpCall(soft_labels, _PLAIN),
    "soft_labels, of logits": OpCall(soft_labels_of_logits, _PLAIN),
    "inverse_root, eigh": OpCall(lambda make, impl: roots(make, impl, "eigh"), _PLAIN),
    "inverse_root, rational": OpCall(lambda make, impl: roots(make, impl, "rational"), _PLAIN),
    "inverse_root, polar_express": OpCall(
        lambda make, impl: roots(make, impl, "polar_express"), ("triton", "reference")
    ),
    "shampoo": OpCall(shampoo, _ALL),
    "batched_eigh": OpCall(lambda make, impl: eigh(make, impl, "auto"), _PLAIN),
    "batched_eigh, jacobi": OpCall(lambda make, impl: eigh(make, impl, "jacobi"), ("cpp",)),
    "lora_rite": OpCall(lora_rite, ("cpp", "triton", "plain")),
}

CASES = [(name, impl) for name, call in CALLS.items() for impl in call.impls]
IDS = [f"{name}-{impl}" for name, impl in CASES]
