"""The Triton form of LoRA-RITE's tall passes: in the interpreter on the CPU, and on a GPU."""

import pytest
import torch

from effkern.ops.lora_rite import RiteOptions, gram, lora_rite_step_
from effkern.ops.lora_rite.group import STATE
from effkern.ops.lora_rite.stages import Update, update_
from tests.ops.lora_rite_cases import Problem, group_grads, group_of, make, products, run, run_paper, tall_factors

triton = pytest.importorskip("triton")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need the interpreter")


@pytest.fixture
def short_tasks(monkeypatch):
    """Programs of few rows, so that tiny factors have several."""
    from effkern.ops.lora_rite import triton as kernels

    monkeypatch.setattr(kernels, "TASK_ROWS", 64)
    monkeypatch.setattr(kernels, "_PLANS", {})


@interpreted
@pytest.mark.parametrize("zero_B", [False, True], ids=["dense", "zero B"])
def test_triton_steps_follow_the_reference(zero_B, short_tasks):
    """Both precisions: with B = 0 the first steps are float64. Ranges with a rest, of both layouts."""
    problem = make(((70, 40), (33, 129)), 5, zero_B=zero_B)
    group = run(problem, 3, torch.float32, "triton")
    truth, floor = (products(run_paper(problem, 3, rounding=r)) for r in (False, True))
    got = products(tall_factors(group))
    assert (got - truth).norm() <= 2 * (floor - truth).norm()


@interpreted
@pytest.mark.parametrize("whitened", [False, True])
def test_triton_gram(whitened, short_tasks):
    problem = make(((130, 7),), 3)
    group = group_of(problem, torch.float32, RiteOptions(), "plain")
    w = torch.randn(2, 3, 3, dtype=torch.float64) if whitened else None
    got = gram(group.factors, group.wide, w, impl="triton")
    exact = []
    for i, x in enumerate(tall_factors(group)):
        y = x @ w[i].float().double() if whitened else x
        exact.append(y.T @ y)
    truth = torch.stack(exact)
    assert (got - truth).norm() <= (1e-6 if whitened else 1e-14) * truth.norm()


@interpreted
@pytest.mark.parametrize("exact", [0, 1])
def test_triton_update(exact, short_tasks):
    """Against the plain form, products and all; nothing outside the factors is written."""
    problem = make(((70, 40),), 4)
    plain, fast = (group_of(problem, torch.float32, RiteOptions(), "plain") for _ in range(2))
    for m, n in zip(plain.moments, fast.moments):
        m.copy_(torch.randn_like(m))
        n.copy_(m)
    matrices = [torch.randn(2, 4, 4, dtype=torch.float64) / 2 for _ in range(3)]
    update = Update(torch.ones((), dtype=torch.float64), *matrices, torch.tensor([0.9, 1.1], dtype=torch.float64))
    grads = group_grads(problem, plain)
    flags = torch.full_like(plain.exact, exact)
    want = update_(plain.factors, plain.moments, grads, plain.wide, update, plain.whiten, flags, impl="plain")
    got = update_(fast.factors, fast.moments, grads, fast.wide, update, fast.whiten, flags, impl="triton")
    for x, y in zip((*fast.factors, *fast.moments), (*plain.factors, *plain.moments)):
        assert (x - y).norm() <= 1e-6 * y.norm()
    for x, y in zip(got, want):
        assert (x - y).norm() <= 2e-6 * y.norm()


@interpreted
def test_triton_skips_a_step_that_is_not_finite():
    problem = make(((20, 17),), 3)
    group = run(problem, 1, torch.float32, "triton")
    grads = group_grads(problem, group)
    grads[0][0, 0] = float("nan")
    before = [x.clone() for x in (*group.factors, *group.moments, *(getattr(group, name) for name in STATE[1:]))]
    assert not lora_rite_step_([group], [grads], [1e-2], [RiteOptions()], impl="triton").isfinite()
    after = [*group.factors, *group.moments, *(getattr(group, name) for name in STATE[1:])]
    assert all(torch.equal(x, y) for x, y in zip(before, after))


@interpreted
def test_triton_refuses_large_ranks():
    problem = make(((40, 40),), 17)
    group = group_of(problem, torch.float32, RiteOptions(), "plain")
    with pytest.raises(NotImplementedError, match="takes ranks up to 16, got 17"):
        gram(group.factors, group.wide, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [4, 16, 32])
@pytest.mark.parametrize("zero_B", [False, True], ids=["dense", "zero B"])
def test_cuda_steps_follow_the_reference(rank, zero_B):
    problem = make(((700, 300), (65, 1300)), rank, zero_B=zero_B)
    on_gpu = Problem([(A.cuda(), B.cuda()) for A, B in problem.pairs], [t.cuda() for t in problem.targets])
    options = RiteOptions()
    group = group_of(on_gpu, torch.float32, options, "auto")
    for _ in range(5):
        lora_rite_step_([group], [group_grads(on_gpu, group)], [1e-2], [options])
    truth, floor = (products(run_paper(problem, 5, lrs=(1e-2, 1e-2), rounding=r)) for r in (False, True))
    got = products([x.cpu() for x in tall_factors(group)])
    assert (got - truth).norm() <= 2 * (floor - truth).norm()
