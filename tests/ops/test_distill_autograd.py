"""linear_distill_loss among PyTorch's machinery: autograd, compile, autocast, checkpoint, modes, threads, memory."""

import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from effkern import TeacherHidden, TeacherLogits, linear_distill_loss, native
from effkern.nn import LinearDistillLoss
from effkern.ops import registry
from tests.numerics import assert_as_good_as_eager, rel_err
from tests.ops import distill_cases as cases

IMPL = pytest.mark.parametrize("impl", cases.implementations())
SOFT = {"omega": 0.6, "temperature": 1.0, "teacher_temperature": 0.5}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@IMPL
def test_backward_twice(impl, reduction):
    """retain_graph: the second pass gives the same gradients, and leaves those of the first alone."""
    case = replace(cases.make(rows=9, vocab=70, bias=True), reduction=reduction)
    x = cases.leaves(case)
    loss = linear_distill_loss(x[0], x[1], case.labels, bias=x[2], impl=impl, **cases.arguments(case)).loss.sum()
    first = torch.autograd.grad(3.0 * loss, x, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(2.0 * loss, x)
    truth = cases.oracle(cases.to(case, dtype=torch.float64), grad=2.0)[1:]
    for f, k, s, t in zip(first, kept, second, truth):
        assert torch.equal(f, k)
        assert_as_good_as_eager(s, (f * 2 / 3), t, ulps=8)


@IMPL
def test_gradient_accumulation(impl):
    """Two halves with the global denominator add up to the whole, in .grad."""
    case = cases.make(rows=12, vocab=90)
    whole = cases.ours(case, impl)
    x = cases.leaves(case)
    keywords = cases.arguments(case)
    count = float((case.labels != -100).sum())
    for half in (slice(0, 5), slice(5, 12)):
        keywords |= {"teacher": TeacherLogits(case.teacher[half]), "denom": count}
        linear_distill_loss(x[0][half], x[1], case.labels[half], impl=impl, **keywords).loss.backward()
    truth = cases.oracle(cases.to(case, dtype=torch.float64))
    assert_as_good_as_eager(x[0].grad, whole[1], truth[1], ulps=8)
    assert_as_good_as_eager(x[1].grad, whole[2], truth[2], ulps=8)


@IMPL
def test_only_what_needs_a_gradient_gets_one(impl):
    case = cases.make(bias=True)
    hidden, weight, bias = cases.leaves(case)
    keywords = cases.arguments(case)
    loss = linear_distill_loss(hidden, weight.detach(), case.labels, bias=bias.detach(), impl=impl, **keywords).loss
    loss.backward()
    assert torch.equal(hidden.grad, cases.ours(case, impl)[1])
    loss = linear_distill_loss(hidden.detach(), weight, case.labels, bias=bias.detach(), impl=impl, **keywords).loss
    loss.backward()
    assert torch.equal(weight.grad, cases.ours(case, impl)[2])
    assert bias.grad is None


@IMPL
def test_no_gradient_work_without_gradients(impl, monkeypatch):
    """Under no_grad the same values come out, and no gradient product runs."""
    from effkern.ops.distill import gemm

    case = cases.make(rows=9, vocab=70)
    x = cases.leaves(case)
    with_grad = linear_distill_loss(x[0], x[1], case.labels, impl=impl, **cases.arguments(case))
    monkeypatch.setattr(gemm, "hidden_grad", lambda *a, **k: pytest.fail("gradient of hidden computed"))
    monkeypatch.setattr(gemm, "add_weight_grad", lambda *a, **k: pytest.fail("gradient of weight computed"))
    with torch.no_grad():
        without = linear_distill_loss(x[0], x[1], case.labels, impl=impl, **cases.arguments(case))
    assert not without.loss.requires_grad
    assert torch.equal(with_grad.loss, without.loss)
    for a, b in zip(with_grad.stats, without.stats):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("impl", "teacher", "reduction"),
    [
        *((i, "hidden", "mean") for i in ("auto", "triton", "reference")),
        ("auto", "logits", "none"),
        ("auto", "none", "mean"),
    ],
)
def test_compile_fullgraph(impl, teacher, reduction):
    """One graph, the same numbers as without, also for another number of rows and another omega."""
    reasons = {i.name: i.unavailable(torch.device(cases.DEVICE)) for i in registry.registered()["linear_distill_loss"]}
    if reasons.get(impl):
        pytest.skip(reasons[impl])
    torch._dynamo.reset()
    hidden_t, weight_t = torch.randn(13, 8, device=cases.DEVICE), torch.randn(50, 8, device=cases.DEVICE)

    def loss(hidden, weight, labels, logits, states, omega):
        t = {"logits": TeacherLogits(logits), "hidden": TeacherHidden(states, weight_t), "none": None}[teacher]
        soft = {**SOFT, "omega": omega} if t is not None else {}
        result = linear_distill_loss(
            hidden * 2, weight, labels, teacher=t, softcap=5.0, reduction=reduction, impl=impl, **soft
        )
        return result.loss.sum() * 1.5, result.stats.ce

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows, omega in ((13, 0.6), (7, 0.2)):
        case = cases.make(rows=rows, ignored=1)
        results = []
        for run in (loss, compiled):
            hidden, weight = cases.leaves(case)
            value, ce = run(hidden, weight, case.labels, case.teacher, hidden_t[:rows], omega)
            value.backward()
            results.append((value.detach(), ce, hidden.grad, weight.grad))
        for a, b in zip(*results):
            assert rel_err(b, a.double()) < 1e-6


# One source of teachers each: the kind of `cases.make`, and what the op calls it.
SOURCES = {"none": (False, "none"), "rows": (True, "rows"), "hidden": ("hidden", "hidden"),
           "sparse": ("tail_bucket", "sparse"), "table": ("similarity+prob", "table")}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
@IMPL
def test_opcheck(impl, source):
    """Schema and shape function of the op for every source of teachers, with and without a buffer for the weight."""
    case = cases.make(rows=6, vocab=40, bias=True, teacher=SOURCES[source][0])
    hidden, weight, bias = cases.leaves(case)
    ones, omega = torch.ones(6, device=cases.DEVICE), torch.full((6,), 0.5, device=cases.DEVICE)
    t = case.teacher
    teacher = {"none": list, "rows": lambda: [t], "hidden": lambda: [t.hidden, t.weight],
               "sparse": lambda: [t.ids, t.logprobs], "table": lambda: [t.table, t.prob]}[source]()  # fmt: skip
    options = list(case.options._replace(teacher=cases.plain_teacher(case)[1]))
    vocab = 40 if source == "table" else 38
    if source in ("rows", "hidden", "none"):
        case.labels.clamp_(max=37)
    else:
        vocab = 40
    into = torch.zeros_like(weight.detach())
    for needs, weight_grad in (([True, True, True], None), ([False, False, False], None), ([True, True, False], into)):
        torch.library.opcheck(
            torch.ops.effkern.linear_distill_fwd.default,
            (hidden, weight, bias, case.labels, ones, omega, teacher, source, 1.0, None, *options, vocab,
             torch.float32, impl, True, needs, None, None, None, True, weight_grad),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_opcheck_rows_cpp(sparse):
    if "cpp" not in [i.name for i in registry.registered()["linear_distill_loss"]] or native.load("_C"):
        pytest.skip(str(native.load("_C") or "the C++ row pass is not registered"))
    z, u = torch.randn(5, 40), torch.randn(5, 40)
    ids, logprobs = torch.stack([torch.randperm(40)[:4] for _ in range(5)]), torch.full((5, 4), -2.0)
    dense, kept = ((None, ids, logprobs), 0) if sparse else ((u, None, None), -1)
    torch.library.opcheck(
        torch.ops.effkern.distill_rows_.default,
        (z, *dense, None, torch.arange(5), torch.ones(5), torch.full((5,), 0.5), torch.zeros(13, 5), 0, 0.0, 0.0, 1.0,
         False, kept, True, False, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, -100),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@IMPL
def test_autocast(impl):
    """float32 parameters, bfloat16 products: the gradient of the weight is float32, at least as exact as eager's."""
    case = cases.make(rows=16, vocab=300, dim=32)
    case.teacher = case.teacher.bfloat16().float()
    truth = cases.oracle(cases.to(cases.to(case, dtype=torch.bfloat16), dtype=torch.float64))
    with torch.autocast(cases.DEVICE, dtype=torch.bfloat16):
        fast = cases.ours(case, impl)
        eager = cases.oracle(case)
    for f, e, t in zip(fast, eager, truth):
        assert f.dtype == torch.float32
        assert_as_good_as_eager(f, e, t, factor=3.0 if impl == "triton" else 2.0)


@IMPL
def test_autocast_of_mixed_dtypes(impl):
    """bfloat16 activations meet a float32 weight, as they do under autocast."""
    case = cases.make(rows=8, vocab=100)
    with torch.autocast(cases.DEVICE, dtype=torch.bfloat16):
        hidden = case.hidden.bfloat16().requires_grad_()
        weight = case.weight.clone().requires_grad_()
        linear_distill_loss(hidden, weight, case.labels, impl=impl, **cases.arguments(case)).loss.backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    truth = cases.oracle(cases.to(cases.to(case, dtype=torch.bfloat16), dtype=torch.float64))
    assert rel_err(weight.grad, truth[2]) < 5e-3


@pytest.mark.parametrize("use_reentrant", [True, False])
@IMPL
def test_activation_checkpoint(impl, use_reentrant):
    case = cases.make(rows=9, vocab=60)
    plain = cases.ours(case, impl)
    hidden, weight = cases.leaves(case)

    def block(h, w):
        return linear_distill_loss(h * 1.0, w, case.labels, impl=impl, **cases.arguments(case)).loss

    checkpoint(block, hidden, weight, use_reentrant=use_reentrant).backward()
    assert torch.equal(hidden.grad, plain[1])
    assert torch.equal(weight.grad, plain[2])


@IMPL
def test_float16_gradients_survive_a_large_denominator(impl):
    """grad / 1e6 underflows in float16 before a GradScaler's factor could lift it; here the factor comes first."""
    if impl == "cpp":
        pytest.skip("float16 runs on the reference on a CPU")
    case = replace(cases.make(rows=6, vocab=100, dtype=torch.float16, ignored=0), denom=1e6)
    truth = cases.oracle(cases.to(case, dtype=torch.float64), grad=65536.0)
    fast = cases.ours(case, impl, grad=65536.0)
    assert rel_err(fast[1], truth[1]) < 5e-3
    assert rel_err(fast[2], truth[2]) < 5e-3


@IMPL
def test_second_call_and_threads(impl):
    """Calls share nothing: four threads at once give what one gives."""
    if impl == "triton" and native.triton_interprets():
        pytest.skip("Triton's interpreter keeps one program at a time")
    made = [cases.make(rows=11, vocab=300) for _ in range(4)]
    alone = [cases.ours(case, impl) for case in made]
    together: list = [None] * 4

    def work(i: int) -> None:
        for _ in range(3):
            together[i] = cases.ours(made[i], impl)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(alone, together):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


@IMPL
def test_inputs_are_not_written(impl):
    case = cases.make(rows=5, bias=True, weights=True, ignored=1, softcap=4.0)
    copies = {k: v.clone() for k, v in vars(case).items() if isinstance(v, torch.Tensor)}
    cases.ours(case, impl)
    assert all(torch.equal(getattr(case, k), v) for k, v in copies.items())


@IMPL
def test_module(impl):
    """The module flattens leading dimensions and passes its options on."""
    case = cases.make(rows=12, vocab=40)
    module = LinearDistillLoss(temperature=2.0, teacher_temperature=0.5, z_loss=0.01, impl=impl)
    states = torch.randn(3, 4, 6, device=cases.DEVICE)
    weight_t = torch.randn(40, 6, device=cases.DEVICE)
    got = module(
        case.hidden.view(3, 4, -1),
        case.weight,
        case.labels.view(3, 4),
        teacher=TeacherHidden(states, weight_t),
        omega=0.3,
    )
    want = linear_distill_loss(
        case.hidden, case.weight, case.labels, teacher=TeacherHidden(states.view(12, 6), weight_t), omega=0.3,
        temperature=2.0, teacher_temperature=0.5, z_loss=0.01, impl=impl,
    )  # fmt: skip
    assert torch.equal(got.loss, want.loss)
    with pytest.raises(TypeError, match=r"LinearDistillLoss: options must be among .*, got \['z_los'\]"):
        LinearDistillLoss(z_los=0.1)


PEAK = """
import resource, sys, torch, effkern
torch.set_num_threads(2)
rows, vocab = int(sys.argv[1]), 16000
hidden = torch.randn(rows, 64, requires_grad=True)
weight = torch.randn(vocab, 64, requires_grad=True)
teacher = effkern.TeacherHidden(torch.randn(rows, 32), torch.randn(vocab, 32))
labels = torch.randint(0, vocab, (rows,))
def step():
    hidden.grad = weight.grad = None
    effkern.linear_distill_loss(hidden, weight, labels, teacher=teacher, omega=0.5, temperature=1.0,
                                teacher_temperature=1.0, impl="cpp", chunk_bytes=8 << 20).loss.backward()
hidden.grad, weight.grad = torch.ones_like(hidden), torch.ones_like(weight)
torch.mm(torch.randn(256, 64), weight.detach()[:2000].t())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_peak_memory_does_not_grow_with_the_tokens():
    """4096 x 16000 logits would be 250 MiB; two 8 MiB buffers, a weight tile and thread scratch are live."""
    if "cpp" not in [i.name for i in registry.registered()["linear_distill_loss"]] or native.load("_C"):
        pytest.skip(str(native.load("_C") or "the C++ row pass is not registered"))
    peaks = [
        float(subprocess.run([sys.executable, "-c", PEAK, rows], capture_output=True, text=True, check=True).stdout)
        for rows in ("1024", "4096")
    ]
    assert peaks[1] < 40
    assert peaks[1] < peaks[0] + 10
