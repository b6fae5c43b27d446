"""The ops' benchmarks: no number on a wrong result, and the work of each variant is its own."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, suite
from benchmarks.case import WrongResult
from effkern.ops.distill import gemm_schema

OPS = [suite.load(name) for name in suite.SMALL]
ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def small(op):
    (case,) = harness.cases_of(op, harness.parse(op, suite.SMALL[op.name].split()))
    return case


def scaled(function, factor=1.01):
    """The same with results that are 1% too large."""

    def wrong(*arguments, **options):
        found = function(*arguments, **options)
        if isinstance(found, tuple):
            parts = [t * factor if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in found]
            return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)
        return found * factor

    return wrong


def loss_only(function):
    def wrong(*arguments, **options):
        found = function(*arguments, **options)
        return found._replace(loss=found.loss * 1.01)

    return wrong


# The function that is made wrong where it is not that of the op's name, or how where 1% too large is not enough.
PATCHES = {
    "distill": ("linear_distill_loss", loss_only), "kmeans": ("kmeans_assign", scaled),
    "laurel": ("laurel_residual", scaled), "loop_similarity": ("loop_similarity", lambda f: scaled(f, 2.0)),
    "lora_rite": ("lora_rite_step_", lambda f: lambda groups, grads, rates, o: f(groups, grads, [2e-3], o)),
    "shampoo": ("apply_", lambda f: lambda *a, lr, **o: f(*a, lr=1.01 * lr, **o)),
}  # fmt: skip
TINY = {
    "batched_eigh": {"n": 8, "count": 4}, "distill": {"rows": 8, "dim": 16, "teacher_dim": 16, "vocab": 50},
    "kmeans": {"points": 40, "centroids": 9, "dim": 8}, "mean_pool": {},
    "label_rank": {"rows": 8, "vocab": 50}, "laurel": {"rows": 8, "dim": 32, "rank": 4},
    "loop_step": {"rows": 8, "dim": 32}, "looped_linear_attention": {"batch": 2, "examples": 8, "dim": 4, "loops": 3},
    "lora_rite": {"pairs": 1, "rank": 4}, "shampoo": {"width": 16}, "soft_labels": {"rows": 8, "dim": 16, "vocab": 50},
    "token_stats": {"rows": 8, "dim": 16, "vocab": 50}, "gemm_bf16": {},
}  # fmt: skip


@ops
def test_no_number_on_a_wrong_result(op, monkeypatch):
    module = sys.modules[op.module()]
    case = {**small(op), **TINY.get(op.name, {})}
    if op.name == "gemm_bf16":
        if not gemm_schema.bf16_gemm():
            pytest.skip("this CPU does not multiply bfloat16")
        real = module.OPS
        add = lambda total, g, h, first: (real.bf16_add_tn_(total, g, h, first), total.mul_(1.01))  # noqa: E731
        broken = SimpleNamespace(bf16_mm_nt_=real.bf16_mm_nt_, bf16_add_tn_=add)
        name, wrong = "OPS", lambda _: broken
    else:
        name, wrong = PATCHES.get(op.name, (op.name, scaled))
    op.check(case)
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    with pytest.raises(WrongResult, match="wrong result"):
        op.check(case)


def broken(op, case, monkeypatch, name, wrong) -> None:
    """The check passes, and does not with something wrong in its module."""
    module = sys.modules[op.module()]
    op.check(case)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, wrong(getattr(module, name)))
        with pytest.raises(WrongResult, match="wrong result"):
            op.check(case)


@pytest.mark.parametrize("method", ["topk", "sampled", "stratified"])
def test_wrong_labels_of_a_teacher_are_seen(method, monkeypatch):
    op = suite.load("soft_labels")
    case = {"method": method, "rows": 64, "dim": 16, "vocab": 200, "dtype": "float32", "device": "cpu"}

    def next_ids(function):
        def wrong(*arguments, **options):
            found = function(*arguments, **options)
            return found._replace(ids=torch.where(found.ids < 0, found.ids, (found.ids + 1) % 200))

        return wrong

    def uniform(function):
        def wrong(hidden, weight, **options):
            found, flat = function(hidden, weight, **options), function(hidden, 0.5 * weight, **options)
            # The same masses in all, but drawn from a flatter distribution.
            k = options.get("k", 0)
            kept = torch.log_softmax(flat.logprobs[:, k:], 1)
            kept += found.logprobs[:, k:].logsumexp(1, keepdim=True)
            ids = torch.cat([found.ids[:, :k], flat.ids[:, k:]], 1)
            return found._replace(ids=ids, logprobs=torch.cat([found.logprobs[:, :k], kept], 1))

        return wrong

    broken(op, case, monkeypatch, "soft_labels", next_ids)
    if method != "topk":
        broken(op, case, monkeypatch, "soft_labels", uniform)


@pytest.mark.parametrize("m", [1, 4])
def test_wrong_labels_and_updates_of_kmeans_are_seen(m, monkeypatch):
    op = suite.load("kmeans")
    case = {"points": 200, "centroids": 16, "dim": 8, "m": m, "dtype": "float32", "device": "cpu"}

    def first(function):
        return lambda *a, **o: (lambda r: r._replace(labels=r.labels * 0))(function(*a, **o))

    broken(op, case, monkeypatch, "kmeans_assign", first)
    broken(op, case, monkeypatch, "kmeans_update", scaled)
    assert op.floor_of("effkern update") == {"index_add": 1.0}
    assert op.floor_of("effkern") == {"products": 1.0}


def test_a_gradient_that_is_not_added_is_seen(monkeypatch):
    if not gemm_schema.bf16_gemm():
        pytest.skip("this CPU does not multiply bfloat16")
    op = suite.load("gemm_bf16")

    def overwrites(ops):
        add = lambda total, g, h, first: ops.bf16_add_tn_(total, g, h, True)  # noqa: E731
        return SimpleNamespace(bf16_mm_nt_=ops.bf16_mm_nt_, bf16_add_tn_=add)

    broken(op, small(op), monkeypatch, "OPS", overwrites)


def test_references_have_a_work_of_their_own():
    case = {"rows": 256, "dim": 64, "vocab": 1000, "kernel": "amx"}
    op = suite.load("gemm_bf16")
    # The operands and a bfloat16 result.
    assert op.work_of(case, "torch.mm, logits").bytes == 2 * ((256 + 1000) * 64 + 256 * 1000)
    # 36 roots of 384 x 384; per layer 12 squares of gradients.
    square, gradients = 36 * 384**2, 6 * 12 * 384**2
    works = suite.load("shampoo").works({"layers": 6, "width": 384, "ridge": 1e-6})
    assert works["bmm X G"].bytes == 4 * (square + 2 * gradients)
    assert works["bmm G G^T"].bytes == 4 * (gradients + square)
    # Forward f, x, y, z; backward their gradients, y, and one result for both inputs; w three times.
    case = {"rows": 512, "dim": 768, "rank": 32, "dtype": "float32", "pass": "both"}
    assert suite.load("laurel").work_of(case, "add+norm").bytes == 4 * 768 * (8 * 512 + 3)
    case = {"form": "glue", "rows": 512, "dim": 768, "dtype": "bfloat16", "pass": "both"}
    assert suite.load("loop_step").work(case).bytes == 2 * 9 * 512 * 768


def test_lora_rite_copies_the_bytes_that_it_declares():
    op = suite.load("lora_rite")
    module = sys.modules[op.module()]
    case = {"pairs": 2, "rows": 32, "rank": 4, "device": "cpu"}
    group, grads = module.make(**case)
    target = module.variants(group, grads)["copy"]()
    # X, M and G read, X and M written; a copy reads and writes.
    assert 2 * target.nbytes == op.work(case).bytes == 4 * 5 * 2 * 2 * 32 * 4


def test_rows_that_several_ids_name_are_read_once():
    op = suite.load("mean_pool")
    case = {"kind": "tokens", "dtype": "float32", "vocab": 50, "dim": 16, "length": 128, "groups": 4, "device": "cpu"}
    module = sys.modules[op.module()]
    _, ids, _ = module.make(case)
    rows = len(set(ids.tolist()))
    assert rows < 50 < ids.numel() == 512
    read = 4 * rows * 16 + 8 * 512
    assert op.work(case).bytes == read + 4 * 4 * 16
    assert op.work_of(case, "gather").bytes == read + 4 * 512 * 16
    assert op.rotates
    assert op.prepare(case, ["effkern"]).held == read
    hidden = {**case, "kind": "hidden"}
    assert op.work(hidden).bytes == 4 * 512 * 16 + 4 * 4 * 16
    assert op.prepare(hidden, ["effkern"]).held == 4 * 512 * 16


def test_timed_grams_leave_the_factors(monkeypatch):
    op = suite.load("shampoo")
    module, made = sys.modules[op.module()], []
    monkeypatch.setattr(module, "make", lambda case: made.append(module.Decoder(1, 16, steps=2)) or made[0])
    prepared = op.prepare({"layers": 1, "width": 16, "ridge": 1e-6}, ["effkern gram"])
    factors, scratch = made[0].factors.clone(), made[0].scratch.clone()
    prepared.variants["effkern gram"]()
    assert torch.equal(made[0].factors, factors)
    assert not torch.equal(made[0].scratch, scratch)


def test_every_loss_is_checked_at_the_size_that_is_timed(monkeypatch):
    op = suite.load("distill")
    module = sys.modules[op.module()]
    sizes = {"rows": 128, "dim": 16, "vocab": 100, "teacher_dim": 16, "dtype": "float32", "device": "cpu"}
    case = {"divergence": "forward_kl", "case": "hidden", **sizes}
    real = module.linear_distill_loss
    assert list(op.prepare(case, ["products", "effkern", "eager", "8 MiB"]).variants) == [
        "products", "effkern", "eager", "8 MiB",
    ]  # fmt: skip

    def refused(name: str) -> None:
        with pytest.raises(WrongResult, match="wrong result"):
            op.prepare(case, ["products", name])

    # A competitor that computes nothing; ours wrong beyond the rows of the check.
    monkeypatch.setattr(module, "liger_loss", lambda _: lambda x: x.hidden.sum() * 0 + x.weight.sum() * 0)
    refused(module.LIGER_NAME)
    monkeypatch.setattr(
        module, "linear_distill_loss",
        lambda h, *a, **o: (lambda r: r._replace(loss=r.loss * 2) if len(h) > 64 else r)(real(h, *a, **o)),
    )  # fmt: skip
    op.check(case)
    for name in ("effkern", "8 MiB"):
        refused(name)


def test_the_loss_is_checked_in_several_chunks(monkeypatch):
    from effkern.ops.distill import chunked

    op = suite.load("distill")
    module = sys.modules[op.module()]
    case = {"divergence": "forward_kl", "case": "logits", "rows": 64, "dim": 16, "vocab": 100, "teacher_dim": 16,
            "dtype": "float32", "device": "cpu"}  # fmt: skip
    real, passes = chunked.row_pass, []

    def counted(impl):
        run = real(impl)
        return lambda rows, *a: passes[-1].append(1) or run(rows, *a)

    monkeypatch.setattr(chunked, "row_pass", counted)
    loss = module.linear_distill_loss
    monkeypatch.setattr(module, "linear_distill_loss", lambda *a, **o: passes.append([]) or loss(*a, **o))
    op.check(case)
    assert [len(p) for p in passes] == [1, 4]
