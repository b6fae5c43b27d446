"""The paper's algorithm for each structure, against dense float64 matrices of the whole parameter."""

import pytest
import torch
from torch import nn

from effkern.optim import Shampoo
from effkern.optim.structured import STRUCTURES, Structured, matrix_power

ROWS, COLS, STEPS = 3, 4, 5
N = ROWS * COLS


def gradients(count=STEPS):
    return [torch.randn(ROWS, COLS, dtype=torch.float64) for _ in range(count)]


def dense(name, projection):
    """What the structure keeps, as an N x N matrix (rows of the gradient one after the other)."""
    eye = torch.eye
    if name == "norm":
        return projection * eye(N, dtype=torch.float64)
    if name == "diagonal":
        return torch.diag(projection.flatten())
    if name == "left":
        return torch.kron(projection, eye(COLS, dtype=torch.float64))
    if name == "right":
        return torch.kron(eye(ROWS, dtype=torch.float64), projection)
    return projection.mT @ projection if name == "full-history" else projection


def members(name):
    """A basis of the algebra, as N x N matrices."""
    if name == "norm":
        return [torch.eye(N, dtype=torch.float64)]
    if name == "diagonal":
        return [torch.diag(torch.eye(N, dtype=torch.float64)[i]) for i in range(N)]
    size = {"left": ROWS, "right": COLS, "full": N}[name]
    units = [torch.outer(*torch.eye(size, dtype=torch.float64)[[i, j]]) for i in range(size) for j in range(size)]
    return [dense(name, unit) for unit in units]


@pytest.mark.parametrize("name", ["norm", "diagonal", "left", "right", "full"])
def test_projection_is_orthogonal_and_in_the_algebra(name):
    structure = STRUCTURES[name]()
    (g,) = gradients(1)
    projected = dense(name, structure.project(g))
    outside = torch.outer(g.flatten(), g.flatten()) - projected
    for member in members(name):
        assert abs((outside * member).sum()) < 1e-12
    stacked = torch.stack([m.flatten() for m in members(name)])
    left_over = projected.flatten() - stacked.T @ torch.linalg.lstsq(stacked.T, projected.flatten()).solution
    assert left_over.norm() < 1e-12


@pytest.mark.parametrize("name", ["norm", "diagonal", "left", "right", "full"])
def test_preconditioner_is_the_argmin(name):
    """V = argmin over the structure of <M + eps I, V^-1> + Tr V: no step inside of it is better."""
    structure, eps = STRUCTURES[name](), 1e-2
    grads = gradients()
    total = sum(torch.outer(g.flatten(), g.flatten()) for g in grads)
    kept = sum(structure.project(g) for g in grads)
    v = matrix_power(dense(name, kept) + eps * torch.eye(N, dtype=torch.float64), 0.5)

    def value(h):
        return ((total + eps * torch.eye(N, dtype=torch.float64)) * torch.linalg.inv(h)).sum() + h.trace()

    best = value(v)
    for member in members(name):
        change = (member + member.T) * 1e-4 * v.norm()
        for sign in (1, -1):
            if torch.linalg.eigvalsh(v + sign * change).min() > 0:
                assert value(v + sign * change) >= best
    # And V is what `solve` applies.
    g = grads[-1]
    expected = torch.linalg.solve(v, g.flatten()).view_as(g)
    torch.testing.assert_close(structure.solve(kept, g, eps), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("accumulation", ["sum", "ema", "weighted"])
@pytest.mark.parametrize("name", list(STRUCTURES))
def test_steps(name, accumulation):
    """x <- x - lr V^-1 g with M kept whole, N x N, and projected at each step."""
    beta, eps, lr = 0.8, 1e-3, 0.1
    w = nn.Parameter(torch.randn(ROWS, COLS, dtype=torch.float64))
    optimizer = Structured([w], lr, structure=name, accumulation=accumulation, beta=beta, eps=eps)
    structure = STRUCTURES["full" if name == "full-history" else name]()
    x, m = w.detach().flatten().clone(), 0.0
    for g in gradients():
        term = dense("full" if name == "full-history" else name, structure.project(g))
        decay, weight = {"sum": (1, 1), "ema": (beta, 1 - beta), "weighted": (beta, 1)}[accumulation]
        m = decay * m + weight * term
        x = x - lr * matrix_power(m + eps * torch.eye(N, dtype=torch.float64), -0.5) @ g.flatten()
        w.grad = g
        optimizer.step()
    torch.testing.assert_close(w.detach().flatten(), x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["norm", "diagonal", "full", "full-history"])
def test_one_preconditioner_for_all_parameters(name):
    """layerwise=False steps two parameters as the one vector that they are together."""
    a, b = (nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((2, 3), (4,)))
    both = nn.Parameter(torch.cat([a.detach().flatten(), b.detach()]))
    joint = Structured([a, b], 0.1, structure=name, layerwise=False)
    single, separate = Structured([both], 0.1, structure=name), [nn.Parameter(p.detach().clone()) for p in (a, b)]
    layerwise = Structured(separate, 0.1, structure=name)
    for _ in range(3):
        both.grad = torch.randn(10, dtype=torch.float64)
        a.grad, b.grad = both.grad[:6].view(2, 3), both.grad[6:]
        separate[0].grad, separate[1].grad = a.grad, b.grad
        for optimizer in (joint, single, layerwise):
            optimizer.step()
    torch.testing.assert_close(torch.cat([a.detach().flatten(), b.detach()]), both.detach(), rtol=1e-11, atol=1e-12)
    # Only a diagonal preconditioner is layerwise by itself.
    assert torch.allclose(separate[0], a, rtol=1e-6) == (name == "diagonal")


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_ema_is_weighted_with_another_rate(name):
    """lr_W = lr_E / sqrt(1 - beta), eps_W = eps_E / (1 - beta): the same iterates."""
    beta, eps, lr = 0.9, 1e-4, 0.1
    w = nn.Parameter(torch.randn(ROWS, COLS, dtype=torch.float64))
    v = nn.Parameter(w.detach().clone())
    ema = Structured([w], lr, structure=name, accumulation="ema", beta=beta, eps=eps)
    weighted = Structured(
        [v], lr / (1 - beta) ** 0.5, structure=name, accumulation="weighted", beta=beta, eps=eps / (1 - beta)
    )
    for g in gradients():
        w.grad = v.grad = g
        ema.step()
        weighted.step()
    torch.testing.assert_close(w, v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("accumulation", ["sum", "ema"])
def test_the_optimizer_is_the_algorithm(side, accumulation):
    """Shampoo without momentum, correction and grafting; L stands for n times the projection, so that the rate takes
    a factor sqrt(n). Gradients whose factor has full rank, so that the ridges do not matter."""
    rows, cols = (ROWS, COLS) if side == "left" else (COLS, ROWS)
    w = nn.Parameter(torch.randn(rows, cols, dtype=torch.float64))
    v = nn.Parameter(w.detach().clone())
    oracle = Structured([w], 0.1, structure=side, accumulation=accumulation, beta=0.8, eps=1e-16)
    ours = Shampoo(
        [v], 0.1 * COLS**0.5, (0.0, 0.8), side=side, accumulation=accumulation, bias_correction=False,
        grafting="none", ridge=1e-16, root_method="eigh",
    )  # fmt: skip
    for g in gradients():
        w.grad = v.grad = g if side == "left" else g.mT
        oracle.step()
        ours.step()
    torch.testing.assert_close(w, v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "block"}, r"structure must be one of .* got 'block'"),
        ({"structure": "norm", "lr": 0.0}, r"lr must be positive, got 0.0"),
        ({"structure": "norm", "beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
        ({"structure": "norm", "accumulation": "mean"}, r"accumulation must be sum, ema or weighted, got 'mean'"),
        ({"structure": "left", "layerwise": False}, r"layerwise must be True for 'left', got False"),
        ({"structure": "left", "shape": (3,)}, r"parameters must be matrices for 'left', got \(3,\)"),
    ],
)
def test_errors(options, message):
    shape = options.pop("shape", (2, 3))
    with pytest.raises(ValueError, match=message):
        Structured([nn.Parameter(torch.randn(shape))], **{"lr": 0.1, **options})


@pytest.mark.parametrize("eps", [0.0, 1e-12])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(STRUCTURES))
def test_projections_without_full_rank(name, dtype, scale, eps):
    """Tall matrices, a row of zeros, eigenvalues that rounding put below 0: finite steps, no longer than eps allows."""
    w = nn.Parameter(torch.zeros(6, 4, dtype=dtype))
    optimizer = Structured([w], 1.0, structure=name, eps=eps)
    for _ in range(4):
        before = w.detach().clone()
        w.grad = scale * torch.randn(6, 4, dtype=dtype)
        w.grad[2] = 0.0
        optimizer.step()
        assert w.isfinite().all()
        assert (w - before).norm() > 0
        if eps:
            assert (w - before).norm() <= 1.01 * w.grad.norm() / eps**0.5


def test_pseudo_inverse_of_a_singular_projection():
    values = torch.tensor([4.0, 0.0, -1e-17], dtype=torch.float64)
    half, ten = (
        torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64),
        torch.tensor([4.01, 0.01, 0.01], dtype=torch.float64),
    )
    torch.testing.assert_close(matrix_power(torch.diag(values), -0.5), torch.diag(half))
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    ridged = matrix_power(basis @ torch.diag(values) @ basis.T, -0.5, 1e-2)
    torch.testing.assert_close(ridged, basis @ torch.diag(ten.pow(-0.5)) @ basis.T, rtol=1e-9, atol=1e-9)


def test_structure_of_each_group():
    """As optimizers of their own; a group that breaks a rule leaves the optimizer as it was."""
    a, b = (nn.Parameter(torch.randn(ROWS, COLS, dtype=torch.float64)) for _ in range(2))
    copies = [nn.Parameter(p.detach().clone()) for p in (a, b)]
    optimizer = Structured([{"params": [a]}, {"params": [b], "structure": "full-history"}], 0.1, structure="left")
    alone = [Structured([copies[0]], 0.1, structure="left"), Structured([copies[1]], 0.1, structure="full-history")]
    for _ in range(3):
        a.grad, b.grad = gradients(2)
        copies[0].grad, copies[1].grad = a.grad, b.grad
        for o in (optimizer, *alone):
            o.step()
    assert torch.equal(a, copies[0])
    assert torch.equal(b, copies[1])
    with pytest.raises(ValueError, match=r"parameters must be matrices for 'left', got \(3,\)"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(3))]})
    with pytest.raises(ValueError, match=r"lr must be positive, got -3"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(3, 2))], "lr": -3})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("name", ["norm", "diagonal", "full", "full-history"])
def test_absent_gradients_of_one_preconditioner(name):
    """They count as zeros in the vector, and their parameter stays."""
    a, b = (nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((2, 3), (4,)))
    c, d = (nn.Parameter(p.detach().clone()) for p in (a, b))
    ours, truth = (Structured(ps, 0.1, structure=name, layerwise=False) for ps in ([a, b], [c, d]))
    for t in range(3):
        a.grad = c.grad = torch.randn(2, 3, dtype=torch.float64)
        b.grad = d.grad = torch.randn(4, dtype=torch.float64)
        kept = b.detach().clone()
        if t == 1:
            b.grad, d.grad = None, torch.zeros(4, dtype=torch.float64)
        ours.step()
        truth.step()
        if t == 1:
            assert torch.equal(b, kept)
            with torch.no_grad():
                d.copy_(b)
    torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b, d, rtol=1e-12, atol=1e-12)
