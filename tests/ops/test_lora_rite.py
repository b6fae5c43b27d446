"""The core of LoRA-RITE against the QR reference in float64: steps, options, faults, state, contract."""

import copy

import pytest
import torch

from effkern.ops.lora_rite import RiteOptions, gram, lora_rite_rebuild_, lora_rite_step_, new_group, update_
from effkern.ops.lora_rite.group import STATE
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
OPTIONS = {
    "defaults": RiteOptions(),
    "escaped mass": RiteOptions(escaped_mass=True),
    "sum": RiteOptions(second_moment="sum", escaped_mass=True),
    "relative eps": RiteOptions(relative_eps=True, eps=1e-3),
    "decay": RiteOptions(weight_decay=0.3),
    "no clipping": RiteOptions(clip_grad=0.0, skip_rms=0.0),
    "some skipped": RiteOptions(clip_grad=0.5, skip_rms=0.08),
}


def distance(group, truth) -> float:
    """Largest relative distance of a factor."""
    pairs = zip(tall_factors(group), truth)
    return max(((x - y).norm() / y.norm().clamp_min(1e-30)).item() for x, y in pairs)


@pytest.mark.parametrize("zero_B", [False, True], ids=["dense", "zero B"])
@pytest.mark.parametrize("name", OPTIONS)
def test_plain_float64_is_the_reference(name, zero_B):
    problem = make(zero_B=zero_B)
    group = run(problem, 100, torch.float64, "plain", OPTIONS[name])
    assert distance(group, run_paper(problem, 100, OPTIONS[name])) < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("zero_B", [False, True], ids=["dense", "zero B"])
@pytest.mark.parametrize("name", OPTIONS)
def test_float32_follows_the_reference(name, zero_B, impl):
    """At most twice what rounding the inputs to float32 costs the reference."""
    problem = make(zero_B=zero_B)
    group = run(problem, 20, torch.float32, impl, OPTIONS[name])
    truth, floor = (run_paper(problem, 20, OPTIONS[name], rounding=r) for r in (False, True))
    exact, moved = products(truth), products(problem.factors())
    of_floor, of_ours = ((products(x) - exact).norm() for x in (floor, tall_factors(group)))
    assert (exact - moved).norm() > 1e4 * of_floor
    assert of_ours <= 2 * of_floor, of_ours / of_floor


def test_some_skipped_skips_some():
    """The threshold of that case lies between the factors', in the first step."""
    problem = make()
    group = group_of(problem, torch.float64, RiteOptions(), "plain")
    given = group_grads(problem, group)
    h = gram(given, group.wide, group.whiten.unflatten(0, (-1, 2)).flip(1).flatten(0, 1), impl="plain")
    rms = (h.diagonal(dim1=1, dim2=2).sum(-1) / group.rows / group.rank).sqrt()
    assert 0 < (rms > 0.08).sum() < len(rms)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("shapes", "rank"),
    [
        # One rank-1 pair; several tiles of one task; several tasks.
        (((7, 9),), 1),
        (((700, 40), (50, 1500)), 33),
        (((33000, 3),), 2),
        # Eigenvalues by LAPACK.
        (((900, 800),), 130),
    ],
)
def test_ragged_shapes(shapes, rank, impl):
    problem = make(shapes, rank)
    group = run(problem, 3, torch.float32, impl)
    truth, floor = (products(run_paper(problem, 3, rounding=r)) for r in (False, True))
    got = products(tall_factors(group))
    assert (got - truth).norm() <= 2 * (floor - truth).norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_fewer_rows_than_the_rank(impl):
    """V of A has no full rank either: rounding of g / eps is what its empty directions may show."""
    problem = make(((6, 30),), 8)
    group = run(problem, 3, torch.float32, impl)
    truth, start = products(run_paper(problem, 3)), products(problem.factors())
    largest = max(g.abs().max().item() for g in problem.grads(problem.factors()))
    bound = torch.finfo(torch.float32).eps * largest / RiteOptions().eps
    assert (products(tall_factors(group)) - truth).norm() <= bound * (truth - start).norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_agree(impl):
    """Every combination of [rows, r] and [r, rows] gives the same factors."""
    results = []
    for wide in ([True, False], [False, False], [False, True], [True, True]):
        problem = make(((40, 33),), 4)
        torch.manual_seed(0)
        made = make(((40, 33),), 4)
        problem = Problem(made.pairs, made.targets, wide=wide)
        results.append(tall_factors(run(problem, 5, torch.float32, impl)))
    for other in results[1:]:
        for x, y in zip(results[0], other):
            assert (x - y).norm() <= 1e-5 * (y.norm())


@pytest.mark.parametrize("impl", IMPLS)
def test_rank_deficient_gradients(impl):
    """Targets of rank 2 and B = 0: B stays of rank 2, and takes no step along rounding noise."""
    problem = make(((40, 33),), 6, zero_B=True)
    low = torch.randn(40, 2, dtype=torch.float64) @ torch.randn(2, 33, dtype=torch.float64)
    A = torch.zeros(40, 6, dtype=torch.float64)
    A[:, :2] = low @ torch.randn(33, 2, dtype=torch.float64)
    A[:, 2:] = A[:, :2] @ torch.randn(2, 4, dtype=torch.float64)
    problem = Problem([(A.float().double(), problem.pairs[0][1])], [low])
    group = run(problem, 10, torch.float32, impl)
    truth = products(run_paper(problem, 10))
    assert group.exact.tolist() == [1, 1]
    got = products(tall_factors(group))
    assert (got - truth).norm() < 1e-5 * truth.norm()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_touches_no_state(impl, value):
    problem, options = make(), RiteOptions()
    group = run(problem, 2, torch.float32, impl)
    grads = group_grads(problem, group)
    grads[2][0, 0] = value
    before = copy.deepcopy([*group.factors, *group.moments, *(getattr(group, name) for name in STATE[1:])])
    norm = lora_rite_step_([group], [grads], [1e-2], [options], impl=impl)
    assert not norm.isfinite()
    after = [*group.factors, *group.moments, *(getattr(group, name) for name in STATE[1:])]
    assert all(torch.equal(x, y) for x, y in zip(before, after))
    grads[2][0, 0] = 0.0
    assert lora_rite_step_([group], [grads], [1e-2], [options], impl=impl).isfinite()
    assert (group.steps == 3).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_pair_without_gradient_is_left_out(impl):
    """The other pair moves as if it were alone."""
    problem, options = make(((40, 33), (40, 33))), RiteOptions()
    group = run(problem, 2, torch.float32, impl)
    alone = Problem(problem.pairs[1:], problem.targets[1:])
    single = run(alone, 0, torch.float32, impl)
    single.factors, single.moments = ([x.clone() for x in xs[2:]] for xs in (group.factors, group.moments))
    for name in STATE[1:]:
        setattr(single, name, getattr(group, name)[2:].clone())
    before = [x.clone() for x in (*group.factors[:2], *group.moments[:2])]
    grads = group_grads(problem, group)
    for missing in ([None, None, *grads[2:]], [None, grads[1], *grads[2:]]):
        lora_rite_step_([group], [missing], [1e-2], [options], impl=impl)
        lora_rite_step_([single], [grads[2:]], [1e-2], [options], impl=impl)
    assert all(torch.equal(x, y) for x, y in zip(before, [*group.factors[:2], *group.moments[:2]]))
    assert group.steps.tolist() == [2, 2, 4, 4]
    assert all(torch.equal(x, y) for x, y in zip(group.factors[2:], single.factors))
    assert lora_rite_step_([group], [[None] * 4], [1e-2], [options], impl=impl) == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_groups_share_one_norm(impl):
    """Clipping looks at all groups: two groups of one pair each are one group of two pairs."""
    problem, options = make(((40, 33), (21, 50))), RiteOptions(clip_grad=0.1)
    together = group_of(problem, torch.float32, options, impl)
    parts = [
        group_of(Problem(problem.pairs[i : i + 1], problem.targets[i : i + 1]), torch.float32, options, impl)
        for i in range(2)
    ]
    for _ in range(3):
        grads = group_grads(problem, together)
        norm = lora_rite_step_([together], [grads], [1e-2], [options], impl=impl)
        assert norm > options.clip_grad**2
        again = lora_rite_step_(parts, [grads[:2], grads[2:]], [1e-2] * 2, [options] * 2, impl=impl)
        torch.testing.assert_close(again, norm, rtol=1e-14, atol=0)
    for x, y in zip(together.factors, [x for part in parts for x in part.factors]):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_scale_and_found_inf(impl):
    problem, options = make(), RiteOptions()
    plain, scaled = (run(problem, 1, torch.float32, impl) for _ in range(2))
    grads = group_grads(problem, plain)
    # A power of two: the same bits.
    inverse = torch.tensor(2.0**-10)
    lora_rite_step_([plain], [grads], [1e-2], [options], impl=impl)
    loud = [g * 2**10 for g in grads]
    arguments = ([scaled], [loud], [1e-2], [options])
    stopped = lora_rite_step_(*arguments, grad_scale=inverse, found_inf=torch.ones(1), impl=impl)
    assert not stopped.isfinite()
    assert (scaled.steps == 1).all()
    lora_rite_step_(*arguments, grad_scale=inverse, found_inf=torch.zeros(1), impl=impl)
    assert all(torch.equal(x, y) for x, y in zip(plain.factors, scaled.factors))


def test_cpp_bits_do_not_depend_on_the_number_of_threads():
    problem = make(((3000, 700), (500, 900)), 8)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(problem, 3, torch.float32, "cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0].factors, other.factors))
        assert torch.equal(results[0].second, other.second)


@pytest.mark.parametrize("impl", IMPLS)
def test_state_copied_back_goes_on_with_the_same_bits(impl):
    problem, options = make(zero_B=True), RiteOptions(escaped_mass=True)
    whole = run(problem, 3, torch.float32, impl, options)
    resumed = new_group([x.clone() for x in whole.factors], whole.wide)
    for x, y in zip(resumed.moments, whole.moments):
        x.copy_(y)
    for name in STATE[1:]:
        getattr(resumed, name).copy_(getattr(whole, name))
    for group in (whole, resumed):
        for _ in range(2):
            lora_rite_step_([group], [group_grads(problem, group)], [1e-2], [options], impl=impl)
    assert all(torch.equal(x, y) for x, y in zip(whole.factors, resumed.factors))


@pytest.mark.parametrize("impl", IMPLS)
def test_rebuild_after_a_change_from_outside(impl):
    """Factors times a scalar: with kept moments the run goes on as the reference's, whose basis does not change."""
    problem, options = make(), RiteOptions()
    group = run(problem, 4, torch.float64 if impl == "plain" else torch.float32, impl)
    twin = copy.deepcopy(group)
    lora_rite_rebuild_(twin, options, impl=impl)
    grads = group_grads(problem, group)
    for g in (group, twin):
        lora_rite_step_([g], [grads], [1e-2], [options], impl=impl)
    tolerance = 1e-10 if impl == "plain" else 2e-6
    assert distance(twin, tall_factors(group)) < tolerance
    # Without: as if there had been no moments, but t goes on.
    lora_rite_rebuild_(twin, options, keep_moments=False, impl=impl)
    lora_rite_step_([twin], [[torch.zeros_like(x) for x in twin.factors]], [1e-2], [options], impl=impl)
    assert distance(twin, tall_factors(twin)) == 0
    assert all(m.abs().max() == 0 for m in twin.moments)


def test_state_is_small():
    """1.15 x the parameters at r = 16, 1.5 x at r = 64; AdamW has 2."""
    for rank, limit in ((16, 1.15), (64, 1.5)):
        factors = [torch.zeros(rank, 1024), torch.zeros(1024, rank)]
        group = new_group(factors, [True, False])
        assert 1.0 < group.state_bytes() / sum(x.nbytes for x in factors) <= limit


@pytest.mark.parametrize("impl", IMPLS)
def test_bases_are_orthonormal_and_second_moments_diagonal_in_them(impl):
    group = run(make(), 6, torch.float32, impl)
    for x, w in zip(tall_factors(group), group.whiten):
        u = x @ w
        assert (u.T @ u - torch.eye(group.rank, dtype=torch.float64)).norm() < 1e-5
    assert (group.second >= 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_stages_serve_other_optimizers(impl):
    """ScaledAdam's gradient step X - lr G (Y^T Y)^-1, by the grouped Gram matrix and the grouped update."""
    problem = make()
    group = group_of(problem, torch.float32, RiteOptions(), impl)
    grads = group_grads(problem, group)
    before, tall_grads = tall_factors(group), problem.grads(tall_factors(group))
    inverse = torch.linalg.inv(gram(group.factors, group.wide, impl=impl))
    inverse = inverse.unflatten(0, (-1, 2)).flip(1).flatten(0, 1).contiguous()
    eye = torch.eye(group.rank, dtype=torch.float64).repeat(len(grads), 1, 1)
    from effkern.ops.lora_rite import Update

    update = Update(
        torch.zeros((), dtype=torch.float64), torch.zeros_like(eye), inverse, 0.1 * eye,
        torch.ones(len(grads), dtype=torch.float64),
    )  # fmt: skip
    exact = torch.zeros_like(group.exact)
    found = update_(group.factors, group.moments, grads, group.wide, update, group.whiten, exact, impl=impl)
    for i, (x, g, new) in enumerate(zip(before, tall_grads, tall_factors(group))):
        truth = x - 0.1 * g @ torch.linalg.inv(before[i ^ 1].T @ before[i ^ 1])
        assert (new - truth).norm() < 1e-5 * truth.norm()
        y, u = new @ group.whiten[i], x @ group.whiten[i]
        assert (found.grams[i] - y.T @ y).norm() < 1e-5 * (y.T @ y).norm()
        assert (found.crosses[i] - y.T @ u).norm() < 1e-5 * (y.T @ u).norm()
        assert (found.sizes[i] - new.square().sum()).abs() < 1e-6 * found.sizes[i]


def test_cpp_opcheck():
    group = run(make(((9, 7),), 3), 1, torch.float32, "cpp")
    grads = [torch.randn_like(x) for x in group.factors]
    ops, check = torch.ops.effkern, torch.library.opcheck
    check(ops.lora_rite_gram.default, (grads, group.wide, group.whiten))
    check(ops.lora_rite_gram.default, (grads, group.wide, None))
    h = gram(grads, group.wide, group.whiten)
    traces = h.diagonal(dim1=1, dim2=2).sum(-1)
    lr = torch.full_like(traces, 1e-2)
    state = (group.whiten, group.second, group.transport, group.escaped, group.steps)
    numbers, flags = [0.9, 0.999, 1e-6, 0.0, 1.0, 1.0, 5e-7], [False, True, False]
    check(ops.lora_rite_precondition_.default, (h, traces, group.rows, lr, None, *state, numbers, flags))
    update = ops.lora_rite_precondition_(h, traces, group.rows, lr, None, *state, numbers, flags)
    lists = (group.factors, group.moments, grads, group.wide)
    check(ops.lora_rite_update_.default, (*lists, *update, group.whiten, group.exact))
    found = ops.lora_rite_update_(*lists, *update, group.whiten, group.exact)
    check(ops.lora_rite_rebase_.default, (*found, update[0], group.whiten, group.transport, group.exact, True, 5e-7))


def good() -> tuple:
    group = group_of(make(((9, 7),), 3), torch.float32, RiteOptions(), "plain")
    return [group], [[torch.zeros_like(x) for x in group.factors]], [0.1], [RiteOptions()]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda g, d, r, o: ([], [], [], []), ValueError, "at least one group, got none"),
        (lambda g, d, r, o: (g, d, r, []), ValueError, "of one length, got 1, 1, 1, 0"),
        (lambda g, d, r, o: (g, [d[0][:1]], r, o), ValueError, "one entry per factor, 2, got 1"),
        (lambda g, d, r, o: (g, [[d[0][0], d[0][1].T]], r, o), ValueError, r"shape of its factor, \(7, 3\)"),
        (lambda g, d, r, o: (g, [[1.0, d[0][1]]], r, o), TypeError, r"grads\[0\] must be a tensor, got float"),
        (lambda g, d, r, o: (g, [[d[0][0].int(), d[0][1]]], r, o), TypeError, "dense floating tensor"),
        (lambda g, d, r, o: (g, d, ["x"], o), TypeError, "lrs must be numbers or tensors, got str"),
        (lambda g, d, r, o: (g, d, [torch.ones(3)], o), ValueError, r"shape \(\) or \(2,\), got \(3,\)"),
        (
            lambda g, d, r, o: (g + g, d + d, r + r, [RiteOptions(), RiteOptions(clip_grad=2.0)]),
            ValueError,
            "share clip_grad and skip_rms",
        ),
    ],
)
def test_step_errors(change, kind, message):
    with pytest.raises(kind, match=message):
        lora_rite_step_(*change(*good()))


@pytest.mark.parametrize(
    ("factors", "wide", "kind", "message"),
    [
        ([], [], ValueError, "must come in pairs"),
        ([torch.ones(3, 2)], [False], ValueError, "must come in pairs .* got 1"),
        ([torch.ones(3, 2), torch.ones(4, 3)], [False, False], ValueError, r"factors\[1\] must have rank 2"),
        ([torch.ones(3, 2), torch.ones(4, 2)], [False], ValueError, "one entry per factor, 2, got 1"),
        ([torch.ones(3, 2), torch.ones(4, 2).bfloat16()], [False] * 2, TypeError, "all of one dtype"),
        ([torch.ones(3, 2), torch.ones(2, 4).T], [False] * 2, ValueError, "must be contiguous, got strides"),
        ([torch.ones(1, 4097), torch.ones(1, 4097)], [False] * 2, ValueError, "rank of at most 4096"),
        ([torch.ones(3, 2), None], [False] * 2, TypeError, "must be a tensor, got NoneType"),
        ([torch.ones(3, 2), torch.ones(0, 2)], [False] * 2, ValueError, "not empty"),
    ],
)
def test_group_errors(factors, wide, kind, message):
    with pytest.raises(kind, match=message):
        new_group(factors, wide)


def test_implementation_that_does_not_fit():
    group = group_of(make(((9, 7),), 3), torch.float64, RiteOptions(), "plain")
    with pytest.raises(NotImplementedError, match=r"takes float32 factors, got torch\.float64"):
        gram(group.factors, group.wide, impl="cpp")
