"""What goes wrong in Shampoo elsewhere, one test per pitfall, with the behaviour that is promised here."""

import math
import warnings

import pytest
import torch
from torch import nn

from effkern.optim import OneSidedShampoo, Shampoo


def weight(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(shape, dtype=dtype))


def step(optimizer, *grads):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, grad in zip(parameters, grads):
        p.grad = grad
    optimizer.step()


@pytest.mark.parametrize("grafting", ["sgd", "adam", "none"])
def test_zero_gradients_under_every_grafting(grafting):
    """No 0/0 where the direction has no length: the weight stays, and the next step is finite."""
    unused, used = weight(4, 6), weight(4, 6)
    optimizer = Shampoo([unused, used], lr=0.1, side="both", grafting=grafting)
    start = unused.detach().clone()
    for _ in range(2):
        step(optimizer, torch.zeros(4, 6), torch.randn(4, 6))
    assert torch.equal(unused, start)
    step(optimizer, torch.randn(4, 6), torch.zeros(4, 6))
    assert unused.isfinite().all()
    assert (unused != start).all()


def test_zero_gradient_blocks():
    """Unused weights: no 0/0, no movement, no failure; the same block learns when its gradient comes."""
    unused, used = weight(4, 6), weight(4, 6)
    optimizer = OneSidedShampoo([unused, used], lr=0.1)
    start = unused.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            step(optimizer, torch.zeros(4, 6), torch.randn(4, 6))
    assert torch.equal(unused, start)
    assert not optimizer.state[unused]["left"].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer, torch.randn(4, 6), torch.randn(4, 6))
    moved = (unused - start).norm() / math.sqrt(24)
    assert moved.item() == pytest.approx(0.1 * 0.2, rel=1e-4)


@pytest.mark.parametrize("grafting", ["rms", "none", "adam", "sgd"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite(bad, grafting):
    """The block keeps factor, root, momentum, second moment and weight; its neighbours step; the next step goes on
    from there; one warning with the name."""
    torch.manual_seed(0)
    broken, healthy = weight(4, 6), weight(4, 6)
    optimizer = Shampoo([("broken", broken), ("healthy", healthy)], lr=0.1, weight_decay=0.1, grafting=grafting)
    step(optimizer, torch.randn(4, 6), torch.randn(4, 6))
    before = {k: v.clone() for k, v in optimizer.state[broken].items()}
    start, other = broken.detach().clone(), healthy.detach().clone()
    grad = torch.randn(4, 6)
    grad[2, 3] = bad
    with pytest.warns(RuntimeWarning, match=r"gradient of broken is not finite; .* stay as they were"):
        step(optimizer, grad, torch.randn(4, 6))
    for key, value in before.items():
        if key != "step":
            assert torch.equal(optimizer.state[broken][key], value), key
    assert torch.equal(broken, start)
    assert (healthy - other).abs().min() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer, grad, torch.randn(4, 6))
        step(optimizer, torch.randn(4, 6), torch.randn(4, 6))
    assert broken.isfinite().all()
    assert (broken - start).abs().min() > 0


def test_gradients_that_stay_infinite_stop_the_run():
    optimizer = Shampoo([("layer.weight", weight(4, 6))], max_failures=3)
    bad = torch.full((4, 6), torch.nan)
    with pytest.warns(RuntimeWarning, match="layer.weight"):
        step(optimizer, bad)
    step(optimizer, bad)
    with pytest.raises(RuntimeError, match=r"gradient of layer.weight must be finite, got 3 failures in a row"):
        step(optimizer, bad)


def test_a_finite_gradient_ends_the_count():
    optimizer = Shampoo([weight(4, 6)], max_failures=2)
    with pytest.warns(RuntimeWarning, match="parameter 0 of group 0"):
        step(optimizer, torch.full((4, 6), torch.nan))
    for _ in range(2):
        step(optimizer, torch.randn(4, 6))
        step(optimizer, torch.full((4, 6), torch.nan))


def test_a_root_that_fails_keeps_the_one_before():
    """A factor that no method takes: the old root serves, one warning, an error after max_failures in a row."""
    broken, healthy = weight(4, 6), weight(4, 6)
    optimizer = Shampoo([("broken", broken), ("healthy", healthy)], lr=0.1, max_failures=3)
    step(optimizer, torch.randn(4, 6), torch.randn(4, 6))
    root = optimizer.state[broken]["left_root"].clone()
    other = optimizer.state[healthy]["left_root"].clone()
    optimizer.state[broken]["left"][0, 1, 1] = torch.nan
    start = broken.detach().clone()
    with pytest.warns(RuntimeWarning, match=r"inverse root of broken failed; it keeps the one before"):
        step(optimizer, torch.randn(4, 6), torch.randn(4, 6))
    assert torch.equal(optimizer.state[broken]["left_root"], root)
    assert not torch.equal(optimizer.state[healthy]["left_root"], other)
    assert broken.isfinite().all()
    assert (broken - start).abs().min() > 0


def test_roots_that_keep_failing_stop_the_run():
    w = weight(4, 6)
    optimizer = Shampoo([("w", w)], max_failures=2)
    step(optimizer, torch.randn(4, 6))
    optimizer.state[w]["left"][0, 1, 1] = torch.nan
    with pytest.warns(RuntimeWarning, match="root of w failed"):
        step(optimizer, torch.randn(4, 6))
    with pytest.raises(RuntimeError, match=r"root of w must be finite, got 2 failures in a row \(max_failures=2\)"):
        step(optimizer, torch.randn(4, 6))


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_rank_deficient_factors(side):
    """Step 1, a gradient of rank 1, a sparse one: finite updates of the promised length, no failure."""
    w = weight(8, 12)
    optimizer = Shampoo([w], lr=0.1, side=side)
    grads = [torch.outer(torch.randn(8), torch.randn(12)), torch.zeros(8, 12)]
    grads[1][3, 5] = 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for grad in grads:
            before = w.detach().clone()
            step(optimizer, grad)
            assert ((w - before).norm() / math.sqrt(96)).item() == pytest.approx(0.02, rel=1e-3)


def test_pseudo_inverse_leaves_tiny_eigenvalues_alone():
    """Noise of 1e-4 in a direction: the ridge lets it through at full size, the pseudo-inverse takes it out."""
    signal = torch.zeros(4, 16, dtype=torch.float64)
    signal[:2] = torch.randn(2, 16, dtype=torch.float64)
    grad = signal.clone()
    grad[2:] = 1e-4 * torch.randn(2, 16, dtype=torch.float64)
    sizes = {}
    for name, options in {"ridge": {"ridge": 1e-12}, "pseudo": {"ridge": 0.0, "pseudo_inverse": 1e-6}}.items():
        w = nn.Parameter(torch.zeros(4, 16, dtype=torch.float64))
        step(Shampoo([w], lr=1.0, grafting="none", **options), grad)
        sizes[name] = w.detach()[2:].norm() / w.detach()[:2].norm()
    assert sizes["ridge"].item() == pytest.approx(1.0, rel=1e-3)
    assert sizes["pseudo"] < 1e-4


def test_stale_roots_meet_a_new_direction():
    """With a ridge the response is bounded: at most ridge^-1/2 of the largest, and the update has its length."""
    w = weight(6, 10, dtype=torch.float64)
    optimizer = Shampoo([w], lr=0.1, precondition_frequency=100, ridge=1e-6)
    first = torch.zeros(6, 10, dtype=torch.float64)
    first[:3] = torch.randn(3, 10, dtype=torch.float64)
    step(optimizer, first)
    root = optimizer.state[w]["left_root"][0]
    top = torch.linalg.eigvalsh(optimizer.state[w]["left"][0]).max()
    assert torch.linalg.eigvalsh(root).max().item() <= 1.01 * (1e-6 * top) ** -0.5
    before = w.detach().clone()
    step(optimizer, torch.randn(6, 10, dtype=torch.float64))
    assert torch.equal(root, optimizer.state[w]["left_root"][0])
    assert ((w - before).norm() / math.sqrt(60)).item() == pytest.approx(0.02, rel=1e-6)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_factors_stay_symmetric(impl):
    """To the bit, after two hundred float32 steps."""
    w = weight(9, 30)
    optimizer = Shampoo([w], impl=impl, precondition_frequency=50)
    for _ in range(200):
        step(optimizer, torch.randn(9, 30))
    for key in ("left", "left_root"):
        factor = optimizer.state[w][key][0]
        assert torch.equal(factor, factor.T)


@pytest.mark.parametrize("method", ["auto", "eigh"])
def test_negative_eigenvalues_are_clamped_before_the_ridge(method):
    """A factor with an eigenvalue of -1e-3 of the largest, whatever made it so: no failure, and no eigenvalue of the
    root above what the ridge of 1e-4 allows."""
    w = weight(4, 6)
    optimizer = Shampoo([w], betas=(0.9, 0.9999999), ridge=1e-4, max_failures=1, root_method=method)
    step(optimizer, torch.randn(4, 6))
    basis = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    factor = basis @ torch.diag(torch.tensor([1.0, 0.5, 0.1, -1e-3]).double()) @ basis.T
    optimizer.state[w]["left"].copy_(factor)
    step(optimizer, torch.randn(4, 6))
    values = torch.linalg.eigvalsh(optimizer.state[w]["left_root"][0].double())
    assert values.max().item() == pytest.approx(1e-4**-0.5, rel=1e-2)
    assert values.min() > 0.9


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-13, 2.0**20])
def test_scale_of_the_gradient_does_not_matter(scale):
    """Loss scaling, batch size, 1 / sqrt(n): the ridge is relative, so that the steps are the same.

    Up to 1e-3, to which a root is found; powers of two, which round nothing.
    """
    a, b = weight(5, 8), weight(5, 8)
    start = a.detach().clone()
    with torch.no_grad():
        b.copy_(a)
    first, second = OneSidedShampoo([a], lr=0.1), OneSidedShampoo([b], lr=0.1)
    for _ in range(4):
        grad = torch.randn(5, 8)
        step(first, grad)
        step(second, scale * grad)
    assert (a - b).norm() <= 1e-3 * (a - start).norm()


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("shape", [(4, 4), (4, 64), (64, 4)])
def test_length_of_the_update_depends_on_neither_shape_nor_side(side, shape):
    w = weight(*shape)
    optimizer = Shampoo([w], lr=0.1, side=side)
    for _ in range(3):
        before = w.detach().clone()
        step(optimizer, torch.randn(shape))
    assert (w - before).square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)


def test_small_matrices_stay_matrices():
    """No merging of dimensions: 2 x 3 has a 2 x 2 factor; what has one row or column is AdamW's, and says so."""
    small, row = weight(2, 3), weight(1, 3)
    optimizer = Shampoo([small, row])
    step(optimizer, torch.randn(2, 3), torch.randn(1, 3))
    assert optimizer.state[small]["left"].shape == (1, 2, 2)
    assert set(optimizer.state[row]) == {"step", "exp_avg", "exp_avg_sq"}


def test_embeddings_and_large_matrices_are_cut():
    table = weight(40, 6)
    optimizer = Shampoo([table], side="both", block_size=16)
    step(optimizer, torch.randn(40, 6))
    shapes = {k: tuple(v.shape) for k, v in optimizer.state[table].items() if k.startswith(("left", "right"))}
    assert shapes == {
        "left": (2, 14, 14), "left_root": (2, 14, 14), "right": (2, 6, 6), "right_root": (2, 6, 6),
        "left.1": (1, 12, 12), "left_root.1": (1, 12, 12), "right.1": (1, 6, 6), "right_root.1": (1, 6, 6),
    }  # fmt: skip


BAD_OPTIONS = [
    ({"precondition_frequency": 0}, r"precondition_frequency must be at least 1, got 0"),
    (
        {"precondition_frequency": [(2, 1)]},
        r"precondition_frequency must be a whole number or pairs .* got \[\(2, 1\)\]",
    ),
    ({"precondition_frequency": 1.5}, r"precondition_frequency must be a whole number or pairs .* got 1.5"),
    ({"side": "top"}, r"side must be one of \('auto', 'left', 'right', 'both'\), got 'top'"),
    ({"exponents": -0.5}, r"exponents must be None, a positive number, or a pair .* got -0.5"),
    ({"exponents": (0.1, 0.4)}, r"exponents must be one number where side='auto', got \(0.1, 0.4\)"),
    ({"accumulation": "kl"}, r'side must be "both" with accumulation="kl", got \'auto\''),
    ({"grafting": "lars"}, r"grafting must be one of .* got 'lars'"),
    ({"lr": -1.0}, r"lr must be at least 0, got -1.0"),
    ({"lr": torch.ones(2)}, r"lr must have one element where it is a tensor, got \(2,\)"),
    ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    ({"ridge": math.nan}, r"ridge must be at least 0, got nan"),
    ({"graft_scale": 0.0}, r"graft_scale must be positive and finite, got 0.0"),
    ({"adamw_betas": (0.9, 1.0)}, r"adamw_betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    ({"pseudo_inverse": 2.0}, r"pseudo_inverse must be None or a share .* got 2.0"),
    ({"block_size": 0}, r"block_size must be a whole number of at least 1, got 0"),
    ({"max_failures": True}, r"max_failures must be a whole number of at least 1, got True"),
    ({"root_method": "qr"}, r"root_method must be one of .* got 'qr'"),
    ({"ridge": math.inf}, "ridge must be finite, got inf"),
    ({"weight_decay": math.inf}, "weight_decay must be finite, got inf"),
    ({"lr": math.inf}, "lr must be finite, got inf"),
    ({"lr": True}, "lr must be at least 0, got True"),
    ({"lr": torch.tensor(1)}, "lr must be floating where it is a tensor, got torch.int64"),
    ({"exponents": True}, "exponents must be None, a positive number, or a pair .* got True"),
    ({"betas": ("a", 0.9)}, r"betas must be two numbers in \[0, 1\), got \('a', 0.9\)"),
    ({"impl": "nonsense"}, "impl must be one of .* got 'nonsense'"),
    ({"root_method": "gram_ns", "side": "both"}, "root_method must suit .* needs an exponent of -1/2, got -0.25"),
    ({"root_method": "rational", "ridge": 0.0}, "root_method must suit .* needs ridge >= 1e-07, got 0.0"),
    ({"root_method": "rational", "pseudo_inverse": 0.1}, "root_method must suit .* needs pseudo_inverse=None"),
    ({"root_method": "rational", "exponents": 1}, "root_method must suit .* needs -1 < exponent < 0, got -1.0"),
]


@pytest.mark.filterwarnings("ignore:Shampoo. exponents")
@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(o) for o, _ in BAD_OPTIONS])
def test_options_that_break_a_rule(options, message):
    with pytest.raises(ValueError, match=message):
        Shampoo([weight(3, 4)], **options)


@pytest.mark.parametrize(
    ("parameter", "rule"),
    [
        (nn.Parameter(torch.randn(3, 4, dtype=torch.complex64)), "must be real, got torch.complex64"),
        (nn.Parameter(torch.ones(3, 4, dtype=torch.int64), requires_grad=False), "must be float64, .* got torch.int64"),
        (nn.Parameter(torch.randn(3, 4).to_sparse()), "must be dense, got layout torch.sparse_coo"),
    ],
    ids=["complex", "integer", "sparse"],
)
def test_parameters_of_other_kinds(parameter, rule):
    """Refused by name; an optimizer that exists is as it was."""
    with pytest.raises(TypeError, match=r"bad.weight " + rule):
        Shampoo([("bad.weight", parameter)])
    optimizer = Shampoo([("good", weight(3, 4))])
    with pytest.raises(TypeError, match=r"bad.weight " + rule):
        optimizer.add_param_group({"params": [("bad.weight", parameter)]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_change_nothing():
    table, w = nn.Embedding(5, 4, sparse=True), weight(3, 4)
    optimizer = Shampoo([w, table.weight])
    table(torch.tensor([1, 2])).sum().backward()
    w.grad = torch.randn(3, 4)
    before = w.detach().clone()
    with pytest.raises(TypeError, match=r"gradient of parameter 1 of group 0, shape \(5, 4\), must be dense"):
        optimizer.step()
    assert torch.equal(before, w)
    assert not optimizer.state[w]


def test_vectors_under_the_rule_shampoo():
    with pytest.raises(
        ValueError, match=r"b must have two rows and two columns at least under rule='shampoo', got shape"
    ):
        Shampoo([{"params": [("b", weight(4))], "rule": "shampoo"}])


def test_options_that_decide_the_state_stay():
    optimizer = Shampoo([weight(3, 4)])
    step(optimizer, torch.randn(3, 4))
    optimizer.param_groups[0]["side"] = "both"
    with pytest.raises(ValueError, match=r"side, .* of group 0 must stay as they were at its first step"):
        step(optimizer, torch.randn(3, 4))


def test_one_sided_takes_one_side():
    with pytest.raises(ValueError, match=r'side must be "auto", "left" or "right", got \'both\''):
        OneSidedShampoo([weight(3, 4)], side="both")
    with pytest.raises(ValueError, match=r'side must be "auto", "left" or "right", got \'both\''):
        OneSidedShampoo([{"params": [weight(3, 4)], "side": "both"}])
    with pytest.raises(TypeError, match="exponents must be left out"):
        OneSidedShampoo([weight(3, 4)], exponents=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": torch.tensor(0.1, device="meta")},
        {"side": "both", "grafting": "none"},
        {"grafting": "adam", "precondition_frequency": 2},
        {"accumulation": "kl", "side": "both"},
        {"start_step": 2, "block_size": 8, "grafting": "sgd"},
    ],
    ids=str,
)
def test_no_value_is_read(options):
    """Tensors without values: whatever a step asks of them beside shapes raises. Counters are read at `check_every`."""
    parameters = [nn.Parameter(torch.empty(shape, device="meta")) for shape in [(12, 20), (12, 20), (20, 12)]]
    optimizer = Shampoo(parameters, check_every=3, impl="reference", **options)
    for p in parameters:
        p.grad = torch.empty_like(p)
    for _ in range(2):
        optimizer.step()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|pin"):
        optimizer.step()


@pytest.mark.gpu
def test_no_host_synchronisation():
    """Between two reads of the counters, with every root a polynomial."""
    parameters = [nn.Parameter(torch.randn(32, 48, device="cuda")) for _ in range(3)]
    optimizer = OneSidedShampoo(parameters, lr=0.01, check_every=2)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    parameters[0].grad[0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="gradient of parameter 0"), pytest.raises(RuntimeError, match="in a row"):
        repeat(optimizer, 12)


def repeat(optimizer, steps):
    for _ in range(steps):
        optimizer.step()
        torch.cuda.synchronize()
