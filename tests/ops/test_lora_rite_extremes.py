"""LoRA-RITE at its edges: directions that a step stretches, gradients near float32's least number, library threads."""

import pytest
import torch

from effkern.ops.lora_rite import RiteOptions, gram, lora_rite_rebuild_, lora_rite_step_, new_group
from tests.ops.lora_rite_cases import (
    Problem,
    group_grads,
    group_of,
    make,
    products,
    run,
    run_paper,
    tall_factors,
)

IMPLS = ["cpp", "plain"]


def stretched(small: float) -> Problem:
    """Orthonormal factors; one column of B is short, so that A's first step along it is 1e-2 / small times as long."""
    A, B = (torch.linalg.qr(torch.randn(rows, 8, dtype=torch.float64))[0] for rows in (64, 48))
    B[:, -1] *= small
    return Problem([(A.float().double(), B.float().double())], [torch.randn(64, 48, dtype=torch.float64)], scale=0.01)


@pytest.mark.parametrize(
    ("impl", "dtype", "factor"),
    [
        # Products of y in float32: their rounding, magnified by the stretch of about 800. At most 540 in 6 starts.
        ("cpp", torch.float32, 1e3),
        # Products of y in float64: at most 1.4.
        ("plain", torch.float32, 4.0),
        # The condition of the start's Gram matrix, 1e8, is what counts here: at most 0.85e8.
        ("plain", torch.float64, 2e8),
    ],
)
def test_stretch_of_one_direction_keeps_the_others(impl, dtype, factor):
    problem = stretched(1e-4)
    start = products(problem.factors())
    group = run(problem, 4, dtype, impl, lrs=(1e-2, 1e-2))
    truth = products(run_paper(problem, 4, lrs=(1e-2, 1e-2)))
    got = products(tall_factors(group))
    # All directions are there, with bases that are orthonormal.
    for x, w in zip(tall_factors(group), group.whiten):
        torch.testing.assert_close((x @ w).T @ (x @ w), torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-3)
    assert (got - truth).norm() <= factor * torch.finfo(dtype).eps * (truth - start).norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_second_look_is_a_sum_over_all_processes(impl):
    """A's own Gram matrix passes through `reduce` too, with zeros for the factor that kept its shape."""
    problem, seen = stretched(1e-4), []

    def note(group, x):
        seen.append(x.clone())
        return x

    options = RiteOptions()
    group = group_of(problem, torch.float32, options, impl)
    lrs = torch.tensor([5e-2, 1e-6], dtype=torch.float64)
    for calls in (5, 4):
        seen.clear()
        lora_rite_step_([group], [group_grads(problem, group)], [lrs], [options], reduce=note, impl=impl)
        assert len(seen) == calls
        if calls == 5:
            (A, _), last = tall_factors(group), seen[-1]
            torch.testing.assert_close(last[0], A.T @ A, rtol=1e-12, atol=1e-12)
            assert (last[1] == 0).all()
            # The next step is an ordinary one.
            group.exact.zero_()


@pytest.mark.parametrize(("impl", "dtype", "bound"), [("cpp", torch.float32, 2e-6), ("plain", torch.float64, 1e-13)])
def test_rebuild_between_steps_keeps_the_moments(impl, dtype, bound):
    """Factors of full rank, momentum and second moments in use: new bases are other coordinates, and nothing else."""
    problem, options = make(), RiteOptions(escaped_mass=True)
    start = products(problem.factors())
    groups = [group_of(problem, dtype, options, impl) for _ in range(2)]
    for _ in range(6):
        for group in groups:
            lora_rite_step_([group], [group_grads(problem, group)], [1e-2], [options], impl=impl)
        lora_rite_rebuild_(groups[1], options, impl=impl)
    one, two = (products(tall_factors(group)) for group in groups)
    assert (one - two).norm() <= bound * (one - start).norm()


@pytest.mark.parametrize("overlap", ["the same", "a part"])
def test_factors_that_share_memory_are_refused(overlap):
    memory = torch.randn(200)
    shared = memory[:60].view(20, 3) if overlap == "the same" else memory[59:119].view(20, 3)
    with pytest.raises(ValueError, match=r"not share memory, got factors\[0\] and factors\[3\]"):
        new_group([memory[:60].view(20, 3), torch.randn(3, 9), torch.randn(3, 9), shared], [False, True, True, False])
    # Neighbours in one buffer share nothing.
    new_group([memory[:60].view(20, 3), memory[60:120].view(20, 3)], [False, False])


SCALES = [2.0**-46, 2.0**-60, 2.0**-76, 2.0**-110]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_cpp_gram_keeps_its_digits_of_small_numbers(scale, wide):
    x, W = torch.randn(700, 5), torch.randn(2, 5, 5, dtype=torch.float64)
    shaped = [x, 3 * x.flip(0)]
    shaped = [y.T.contiguous() for y in shaped] if wide else shaped
    want = gram(shaped, [wide] * 2, W, impl="cpp")
    # Powers of two: the same digits, here and where the square of an element is no float32.
    got = gram([y * scale for y in shaped], [wide] * 2, W, impl="cpp")
    torch.testing.assert_close(got / scale**2, want, rtol=1e-6, atol=1e-6 * want.abs().max().item())
    assert (gram([y * 0 for y in shaped], [wide] * 2, W, impl="cpp") == 0).all()
    shaped[1][3, 2] = float("nan")
    broken = gram([y * scale for y in shaped], [wide] * 2, W, impl="cpp")
    assert broken[0].isfinite().all()
    assert broken[1].isnan().any()


def test_cpp_relative_eps_takes_the_same_step_whatever_the_size_of_the_loss():
    options = RiteOptions(relative_eps=True, eps=1e-3, clip_grad=0.0, skip_rms=0.0)
    problem, results = make(), []
    for scale in (1.0, 2.0**-76):
        group = group_of(problem, torch.float32, options, "cpp")
        for _ in range(3):
            grads = [g * scale for g in group_grads(problem, group)]
            lora_rite_step_([group], [grads], [1e-2], [options], impl="cpp")
        results.append(products(tall_factors(group)))
    start = products(problem.factors())
    for other in results[1:]:
        assert (other - results[0]).norm() <= 1e-5 * (results[0] - start).norm()


@pytest.mark.parametrize("rank", [16, 128])
def test_cpp_bits_do_not_depend_on_the_library_s_threads(rank):
    """Ranks whose eigenproblems go to LAPACK, and a single task, which runs outside of a parallel region."""
    x, results, threads = torch.randn(1000, rank), [], torch.get_num_threads()
    problem = make(((rank + 40, rank + 20),), rank)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            group = run(problem, 2, torch.float32, "cpp")
            W = group.whiten[:1].contiguous()
            sums = [gram([x], [False], impl="cpp"), gram([x], [False], W, impl="cpp")]
            results.append([*group.factors, group.second, group.whiten, *sums])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results))
