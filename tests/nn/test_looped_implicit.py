"""Fixed points: what the solvers find, and the gradients against many loops and against the closed form."""

import pytest
import torch
from torch import nn

from effkern.nn import Implicit, LoopedBlock
from effkern.nn.looped.implicit import solve
from tests.nn.looped_cases import DIM, AliveBytes, Layer, randomize
from tests.numerics import rel_err

SOLVERS = ["anderson", "iterate"]
PARTS = [{}, {"norm": True}, {"residual": "euler", "substeps": 2}, {"residual": "laurel", "rank": 2}]


class Contraction(nn.Module):
    """tanh(W h) with ||W|| < 1."""

    def __init__(self, norm=0.7):
        super().__init__()
        weight = torch.randn(DIM, DIM, dtype=torch.float64)
        self.weight = nn.Parameter(norm * weight / torch.linalg.matrix_norm(weight, 2))

    def forward(self, h):
        return torch.tanh(h @ self.weight.T)


class Affine(Contraction):
    def forward(self, h):
        return h @ self.weight.T


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("options", PARTS, ids=str)
def test_the_fixed_point_is_where_many_loops_end(options, solver):
    block = LoopedBlock(Contraction(), 3, dim=DIM, injection="add", dtype=torch.float64, **options)
    with torch.no_grad():
        for p in (*block.norm.parameters(),) if block.norm is not None else ():
            # A norm of unit weight would make the map expand.
            p.fill_(0.2)
    x = torch.randn(4, 3, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    weight = torch.randn_like(x)
    many = block(x, loops=400, mode="autograd")
    want = torch.autograd.grad((many * weight).sum(), leaves)
    got = block(x, mode=Implicit(solver, 300, 1e-14, backward="adjoint"))
    assert rel_err(got, many.detach()) < 1e-12
    for a, b in zip(torch.autograd.grad((got * weight).sum(), leaves), want):
        # Scalars are float32.
        assert rel_err(a, b.double()) < (1e-10 if b.dtype == torch.float64 else 1e-6)
    assert block.last_solution.residual < 1e-13


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_in_closed_form(solver):
    """h = W h + x: h* = (1 - W)^-1 x. The adjoint's gradient is (1 - W)^-T g; Jacobian-free is g."""
    block = LoopedBlock(Affine(), 1, injection="add")
    x = torch.randn(2, DIM, dtype=torch.float64, requires_grad=True)
    w, g = block.core.weight.detach(), torch.randn(2, DIM, dtype=torch.float64)
    inverse = torch.linalg.inv(torch.eye(DIM, dtype=torch.float64) - w)
    h = x.detach() @ inverse.T
    # x_t = h + e goes through W as a whole here: h = W (h + x).
    h = h @ w.T
    for backward, u in (("adjoint", g @ inverse), ("jacobian_free", g)):
        y = block(x, mode=Implicit(solver, 200, 1e-15, backward=backward))
        assert rel_err(y, h) < 1e-12
        dx, dw = torch.autograd.grad(y, [x, block.core.weight], g)
        assert rel_err(dx, u @ w) < 1e-12
        assert rel_err(dw, u.T @ (h + x.detach())) < 1e-12


def test_anderson_needs_fewer_steps():
    steps = {}
    block = LoopedBlock(Contraction(0.97), 1, injection="add")
    x = torch.randn(4, DIM, dtype=torch.float64)
    for solver in SOLVERS:
        block(x, mode=Implicit(solver, 1000, 1e-10))
        steps[solver] = block.last_solution.steps
    assert steps["anderson"] < 0.6 * steps["iterate"]


def test_anderson_solves_an_affine_map_in_its_dimension():
    """Memory N + 1 finds the solution of N equations as a Krylov method does; iteration alone would diverge."""
    w = 3 * torch.eye(4, dtype=torch.float64) + torch.randn(4, 4, dtype=torch.float64) * 0.2
    b = torch.randn(5, 4, dtype=torch.float64)
    solution = solve(lambda h: h @ w.T + b, torch.zeros(5, 4, dtype=torch.float64), "anderson", 12, 1e-9, 6, 0.0)
    want = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - w, b.T).T
    assert rel_err(solution.state, want) < 1e-7
    assert solution.report.steps <= 8


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_row_does_not_see_the_others(solver):
    block = LoopedBlock(Contraction(), 1, injection="add")
    x = torch.randn(4, 3, DIM, dtype=torch.float64)
    how = Implicit(solver, 9, 0.0)
    torch.testing.assert_close(block(x, mode=how)[1:2], block(x[1:2], mode=how), rtol=1e-10, atol=1e-12)
    assert block.last_solution.steps == 9
    # A row without a gap, as one at its solution, leaves the rest alone.
    x[0] = 0
    assert block(x, mode=how).isfinite().all()


def test_half_precision_and_autocast():
    core = Contraction().bfloat16()
    block = LoopedBlock(core, 1, injection="add")
    x = torch.randn(4, 3, DIM).bfloat16().requires_grad_()
    y = block(x, mode=Implicit(steps=20, backward="adjoint"))
    twin = LoopedBlock(Contraction(), 1, injection="add")
    twin.load_state_dict(block.state_dict())
    z = twin(x.double(), mode=Implicit(steps=50, tol=1e-12))
    assert y.dtype == torch.bfloat16
    assert rel_err(y, z.detach()) < 0.02
    y.float().sum().backward()
    assert core.weight.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        y = LoopedBlock(core.float(), 1, injection="add")(x.detach().float(), mode=Implicit(backward="adjoint"))
    y.sum().backward()
    assert core.weight.grad.isfinite().all()


def test_memory_does_not_grow_with_the_steps():
    core = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Tanh())
    with torch.no_grad():
        core[0].weight.mul_(0.5)
    block, x, peaks = LoopedBlock(core, 1, injection="add"), torch.randn(256, 512, requires_grad=True), []
    for steps in (8, 40):
        with AliveBytes() as alive:
            block(x, mode=Implicit(steps=steps, tol=0.0)).sum().backward()
        peaks.append(alive.peak / (x.numel() * 4))
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
    # 2 m states, and a few on the way.
    assert peaks[1] < 2 * 6 + 6


def test_no_gradient():
    block, x = LoopedBlock(Contraction(), 1, injection="add"), torch.randn(2, DIM, dtype=torch.float64)
    with torch.no_grad():
        assert not block(x, mode=Implicit()).requires_grad
    block.requires_grad_(False)
    assert not block(x, mode=Implicit(backward="adjoint")).requires_grad


def test_errors():
    x = torch.randn(2, DIM, dtype=torch.float64)
    for options, message in (
        ({"solver": "broyden"}, "Implicit: solver must be one of .*got 'broyden'"),
        ({"backward": "exact"}, "Implicit: backward must be one of .*got 'exact'"),
        ({"steps": 0}, "Implicit: steps must be a whole number of at least 1, got 0"),
        ({"memory": 0}, "Implicit: memory must be a whole number of at least 1, got 0"),
        ({"tol": -1.0}, "Implicit: tol must be a number of at least 0, got -1.0"),
        ({"backward_steps": 0}, "Implicit: backward_steps must be a whole number of at least 1, got 0"),
        ({"ridge": float("inf")}, "Implicit: ridge must be finite, got inf"),
        ({"ridge": float("nan")}, "Implicit: ridge must be a number of at least 0, got nan"),
        ({"tol": True}, "Implicit: tol must be a number of at least 0, got True"),
    ):
        with pytest.raises(ValueError, match=message):
            Implicit(**options)
    make = {"dim": DIM, "dtype": torch.float64, "mode": Implicit()}
    for block, message in (
        (
            LoopedBlock(Layer(), 2, conditioning="table", max_loops=2, **make),
            "conditioning must be 'none' for Implicit",
        ),
        (LoopedBlock([Layer()], 2, layer_scalars="increment", max_loops=2, **make), "layer_scalars must be 'none'"),
        (LoopedBlock(Layer(), 2, loop_argument="t", **make), "loop_argument must be None for Implicit"),
        (LoopedBlock(Layer(), 2, residual="euler", **make), "substeps must be given for Implicit"),
    ):
        with pytest.raises(ValueError, match=message):
            block(x)
    block = LoopedBlock(Layer(dropout=0.5), 2, **make)
    with pytest.raises(ValueError, match="core must draw no random numbers with Implicit"):
        block(x)
    assert block.eval()(x).isfinite().all()
    with pytest.raises(ValueError, match="mode must have loops for all_states, got Implicit"):
        block.all_states(x)
    for loops in (3, -5):
        with pytest.raises(ValueError, match=f"loops must be None for Implicit, as all loops are one map, got {loops}"):
            block(x, loops=loops)


@pytest.mark.parametrize("backward", ["jacobian_free", "adjoint"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(0, DIM), (0, 3, DIM), (2, 0, DIM)], ids=str)
def test_an_empty_batch(shape, solver, backward):
    block = LoopedBlock(Contraction(), 1, injection="add")
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    y = block(x, mode=Implicit(solver, backward=backward))
    assert y.shape == shape
    assert block.last_solution.residual == 0
    y.sum().backward()
    assert x.grad.shape == shape
    assert (block.core.weight.grad == 0).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_how_far_the_adjoint_came(solver):
    """Of the call that it belongs to; too few steps are seen in the residual."""
    block = LoopedBlock(Contraction(0.9), 1, injection="add")
    x, reports = torch.randn(2, DIM, dtype=torch.float64), []
    for steps in (2, 400):
        y = block(x.requires_grad_(), mode=Implicit(solver, 400, 1e-12, backward="adjoint", backward_steps=steps))
        reports.append(block.last_solution)
        assert reports[-1].adjoint is None
        block(x, mode=Implicit(solver))
        assert block.last_solution.adjoint is None
        y.sin().sum().backward()
        assert block.last_solution.adjoint is None
    few, many = (report.adjoint for report in reports)
    assert few.steps == 2
    assert few.residual > 1e-4
    assert 2 < many.steps < 400
    assert many.residual <= 1e-12


def test_a_state_that_is_not_finite():
    class Doubling(nn.Module):
        def forward(self, x):
            return x * 1e100

    block = LoopedBlock(Doubling(), 1, check_finite=True, mode=Implicit("iterate", steps=5, tol=0.0))
    with pytest.raises(FloatingPointError, match=r"after loop 3 \(counted from 0, of 5\)"):
        block(torch.ones(2, 2, dtype=torch.float64))


def test_a_functional_call_and_dropout_free_layers():
    block = randomize(LoopedBlock(Contraction(0.3), 1, injection="add"), 0.05)
    x = torch.randn(2, DIM, dtype=torch.float64)
    given = {n: p.detach().clone().requires_grad_() for n, p in block.named_parameters()}
    y = torch.func.functional_call(block, given, (x,), {"mode": Implicit(steps=100, tol=1e-13)})
    assert rel_err(y, block(x, mode=Implicit(steps=100, tol=1e-13)).detach()) < 1e-12
    assert torch.autograd.grad(y.sum(), list(given.values()))[0].abs().sum() > 0
