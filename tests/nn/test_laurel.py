"""LaurelResidual: chains of every variant against the paper's sums over kept inputs, starts, dtypes, errors."""

import copy
import io

import pytest
import torch

from effkern.nn import LaurelResidual
from effkern.nn.laurel import VARIANTS, column_orthogonal
from effkern.ops.laurel.scalars import SCALAR_MAPS
from tests.numerics import rel_err

DIM, RANK, LAYERS = 12, 4, 5


def chain(variant: str, look_back: int = 3, dtype=torch.float64, **options) -> torch.nn.ModuleList:
    """LAYERS residuals with random parameters."""
    most = look_back - 1 if VARIANTS[variant].previous else 0
    residuals = torch.nn.ModuleList(
        LaurelResidual(DIM, variant, rank=RANK, num_previous=min(most, i), num_following=min(most, LAYERS - 1 - i),
                       dtype=dtype, **options)
        for i in range(LAYERS)
    )  # fmt: skip
    LaurelResidual.link(list(residuals))
    with torch.no_grad():
        for p in residuals.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return residuals


def run(residuals, x, x0=None):
    history, y = (), x
    for r in residuals:
        y, _, history = r(torch.sin(y), y, history, x0=x0)
    assert history == ()
    return y


def paper(residuals, x, x0=None):
    """The sums over whole previous inputs, k D numbers per token."""
    inputs, y = [], x
    for i, r in enumerate(residuals):
        inputs.insert(0, y)
        alpha, beta = 2 * r.weights.double().softmax(0) if r.kind.scalars else (1.0, 1.0)
        mixed = 0.0
        if r.kind.low_rank and not r.kind.previous:
            mixed = y @ r.down @ r.up
        for j in range(r.num_previous + 1 if r.kind.previous else 0):
            if not r.kind.low_rank:
                term = inputs[j]
            elif r.kind.shared:
                term = inputs[j] @ r.down @ r.up
            else:
                columns = slice(j * RANK, (j + 1) * RANK)
                term = inputs[j] @ residuals[i - j].down[:, columns] @ r.up[columns]
            mixed = mixed + r.gamma[j].double() * term
        y = alpha * torch.sin(y) + beta * (y + mixed)
        if x0 is not None:
            y = y + r.x0_weight.double() * x0
    return y


@pytest.mark.parametrize("x0", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_chain_is_the_paper(variant, per_channel, x0):
    """The look-ahead products give the sums exactly, and all gradients."""
    residuals = chain(variant, per_channel=per_channel, x0=x0)
    x = torch.randn(3, 2, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [x, *residuals.parameters()]
    ours, truth = run(residuals, x, x if x0 else None), paper(residuals, x, x if x0 else None)
    # alpha and beta are made of float32 scalars.
    assert rel_err(ours, truth.detach()) < 2e-6
    weight = torch.randn_like(truth)
    for a, b in zip(torch.autograd.grad(ours, leaves, weight), torch.autograd.grad(truth, leaves, weight)):
        assert rel_err(a, b.double()) < 1e-5


@pytest.mark.parametrize("look_back", [1, 2, 5, 9])
def test_any_look_back(look_back):
    residuals = chain("rw+lr+pa", look_back)
    x = torch.randn(4, DIM, dtype=torch.float64)
    assert rel_err(run(residuals, x), paper(residuals, x).detach()) < 2e-6


def test_history_is_small():
    """r numbers per token and pair of residuals: k (k + 1) / 2 of them at most, with k = 3, and never D."""
    residuals = chain("rw+lr+pa")
    x, history = torch.randn(7, DIM, dtype=torch.float64), ()
    for r in residuals:
        x, _, history = r(torch.sin(x), x, history)
        assert sum(h.shape[-1] for h in history) <= 3 * RANK


@pytest.mark.parametrize("scalar_map", SCALAR_MAPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_start(variant, scalar_map):
    """x + f(x), or half of each for the maps whose sum is one; and not stuck there."""
    r = LaurelResidual(DIM, variant, rank=RANK, scalar_map=scalar_map)
    f, x = torch.randn(5, DIM), torch.randn(5, DIM)
    share = 0.5 if VARIANTS[variant].scalars and scalar_map in ("softmax", "sigmoid1") else 1.0
    y = r(f, x).y
    torch.testing.assert_close(y, share * (f + x))
    y.square().sum().backward()
    assert all((p.grad != 0).any() for n, p in r.named_parameters() if n not in ("down", "gamma")), "no gradient"


def test_column_orthogonal():
    down = column_orthogonal(12, 4)
    torch.testing.assert_close(down.T @ down, torch.eye(4) / 16)
    assert (column_orthogonal(13, 4) != 0).sum() == 13


def test_scalars_stay_float32():
    r = LaurelResidual(DIM, "rw+lr+pa", rank=RANK, x0=True)
    with torch.no_grad():
        r.weights.fill_(1 / 3)
    before = {n: p.clone() for n, p in r.named_parameters()}
    r.bfloat16()
    for name, p in r.named_parameters():
        assert p.dtype == (torch.bfloat16 if name in ("down", "up") else torch.float32)
        assert torch.equal(p, before[name].to(p.dtype)), name
    assert r.double().weights.dtype == torch.float64
    x = torch.randn(3, DIM)
    assert LaurelResidual(DIM, "rw+lr", rank=RANK).bfloat16()(x.bfloat16(), x.bfloat16()).y.dtype == torch.bfloat16
    r.to("meta")
    assert all(p.device.type == "meta" for p in r.parameters())


def test_half_precision_parameters_from_outside():
    """FSDP and functional_call hand in parameters of their own dtype."""
    r = LaurelResidual(DIM, "rw+lr+pa", rank=RANK, x0=True)
    x = torch.randn(3, DIM).bfloat16()
    half = {n: p.detach().bfloat16().requires_grad_() for n, p in r.named_parameters()}
    y = torch.func.functional_call(r, half, (x, x), {"x0": x}).y
    torch.testing.assert_close(y, 2 * x)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for n, p in half.items())


def test_casting_keeps_gradients_with_their_parameters():
    r = LaurelResidual(DIM, "rw+lr", rank=RANK)
    r(torch.randn(3, DIM), torch.randn(3, DIM)).y.sum().backward()
    r.bfloat16()
    assert all(p.grad.dtype == p.dtype for p in r.parameters())
    torch.optim.AdamW(r.parameters()).step()


def test_the_branch_is_kept_on_request():
    f, x = (torch.randn(256, DIM) * s for s in (1, 300))
    f, x, g = f.bfloat16(), x.bfloat16(), torch.randn(256, DIM).bfloat16()
    r = LaurelResidual(DIM, "rw", scalar_map="sigmoid", save_branch=True)
    r(f, x).y.backward(g)
    truth = 0.5 * (g.double() * f.double()).sum()
    assert abs(r.weights.grad[0].double() - truth) < 1e-5 * (g.double() * f.double()).abs().sum()


@pytest.mark.parametrize("variant", ["rw+pa-shared", "rw+lr+pa"])
def test_copies_of_a_deep_stack(variant):
    """Copied as a whole, however deep, and linked among themselves."""
    stack = torch.nn.ModuleList(
        LaurelResidual(2, variant, rank=1, num_previous=min(2, i), num_following=min(2, 299 - i)) for i in range(300)
    )
    LaurelResidual.link(list(stack))
    twin = copy.deepcopy(stack)
    with torch.no_grad():
        stack[1].down.zero_()
    x = y = torch.randn(3, 2)
    history = ()
    for r in twin:
        y, _, history = r(torch.zeros_like(x), y, history)
    torch.testing.assert_close(y, x)
    if variant == "rw+pa-shared":
        assert twin[0]._stack[1] is twin[1]


def test_state_dict():
    first, second = chain("rw+pa-shared", x0=True), chain("rw+pa-shared", x0=True)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, DIM, dtype=torch.float64)
    assert torch.equal(run(first, x, x), run(second, x, x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_count(variant):
    for options in ({}, {"per_channel": True, "x0": True, "scalar_map": "sigmoid1"}):
        made = LaurelResidual(DIM, variant, rank=RANK, **options)
        assert LaurelResidual.count(DIM, variant, rank=RANK, **options) == sum(p.numel() for p in made.parameters())


def test_fused_norm():
    r = chain("rw+lr", dtype=torch.float32)[0]
    f, x, w = torch.randn(5, DIM), torch.randn(5, DIM), torch.randn(DIM)
    step = r(f, x, norm_weight=w, norm_eps=1e-3)
    torch.testing.assert_close(step.normed, torch.nn.functional.rms_norm(step.y, (DIM,), w, 1e-3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "rw+la"}, "variant must be one of .*got 'rw\\+la'"),
        ({"rank": 13}, r"rank must lie in \[1, D=12\], got 13"),
        ({"rank": 0}, r"rank must lie in \[1, D=12\], got 0"),
        ({"scalar_map": "tanh"}, "scalar_map must be one of .*got 'tanh'"),
        ({"init": "zeros"}, "init must be one of .*got 'zeros'"),
        ({"num_previous": 1}, "num_previous must be 0 for variant 'rw\\+lr', which reads none, got 1"),
        ({"variant": "pa-id", "num_following": -1}, "num_following must be at least 0, got -1"),
    ],
)
def test_construction_errors(options, message):
    with pytest.raises(ValueError, match="LaurelResidual: " + message):
        LaurelResidual(DIM, **({"rank": RANK} | options))


def test_call_errors():
    x = torch.zeros(3, DIM)
    r = LaurelResidual(DIM, "rw+pa", num_previous=2)
    with pytest.raises(ValueError, match="history must hold 2 earlier inputs or their products, got 1"):
        r(x, x, (x,))
    with pytest.raises(ValueError, match=r"history\[1\] must be of this batch, \(3,\), got \(4,\)"):
        r(x, x, (x, torch.zeros(4, DIM)))
    with pytest.raises(ValueError, match="x0 must be given, got None"):
        LaurelResidual(DIM, "rw", x0=True)(x, x)
    with pytest.raises(ValueError, match="x0 must be None, as the module was made with x0=False, got a tensor"):
        LaurelResidual(DIM, "rw")(x, x, x0=x)
    shared = [LaurelResidual(DIM, "pa-shared", rank=RANK, num_previous=i, num_following=1 - i) for i in (0, 1)]
    with pytest.raises(ValueError, match=r"link\(residuals\) must tell of 1 later residuals, got none"):
        shared[0](x, x)
    with pytest.raises(ValueError, match=r"residuals\[0\].num_previous must be at most 0, got 1"):
        LaurelResidual.link(shared[::-1])
    other = [LaurelResidual(DIM, "rw+lr+pa", rank=r, num_previous=i, num_following=1 - i) for i, r in enumerate((4, 2))]
    with pytest.raises(ValueError, match=r"residuals\[1\].rank must be that of the stack, 4, got 2"):
        LaurelResidual.link(other)
    jump = [LaurelResidual(DIM, "pa-id", num_previous=p, num_following=f) for p, f in ((0, 1), (0, 1), (2, 0))]
    with pytest.raises(ValueError, match=r"residuals\[2\].num_previous must be at most 1, one more .*got 2"):
        LaurelResidual.link(jump)
    with pytest.raises(ValueError, match=r"residuals\[0\].num_following must be 0, as so many read its input, got 1"):
        LaurelResidual.link(shared[:1])
