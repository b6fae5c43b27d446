"""Ouro's exit gate: the distribution as a product, both losses from their formulas, gradients, extremes, errors."""

import math

import pytest
import torch

from effkern.nn import ExitGate, LoopedBlock, exit_gate_loss, exit_log_probs, expected_exit_loss
from tests.nn.looped_cases import DIM, Layer

LOOPS = 5


def probs_by_hand(logits):
    gates, left, probs = torch.sigmoid(logits), torch.ones_like(logits[0]), []
    for t in range(len(logits) - 1):
        probs.append(gates[t] * left)
        left = left * (1 - gates[t])
    return torch.stack([*probs, left])


@pytest.mark.parametrize("loops", [1, 2, LOOPS])
def test_exit_distribution(loops):
    gate = ExitGate(DIM, dtype=torch.float64)
    with torch.no_grad():
        gate.weight.normal_()
        gate.bias.fill_(-0.3)
    states = [torch.randn(3, 4, DIM, dtype=torch.float64) for _ in range(loops)]
    out = gate(states)
    for t, h in enumerate(states):
        torch.testing.assert_close(out.logits[t], (h * gate.weight).sum(-1) - 0.3, rtol=1e-12, atol=1e-12)
    probs = probs_by_hand(out.logits)
    torch.testing.assert_close(out.log_probs.exp(), probs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(probs.sum(0), torch.ones_like(probs[0]))
    torch.testing.assert_close(out.cdf, probs.cumsum(0), rtol=1e-12, atol=1e-12)
    for q in (0.01, 0.5, 1.0):
        want = torch.tensor([[next(t for t in range(loops) if t == loops - 1 or probs[: t + 1, i, j].sum() >= q)
                              for j in range(4)] for i in range(3)])  # fmt: skip
        assert torch.equal(out.exit_loop(q), want)


def test_expected_exit_loss():
    logits = torch.randn(LOOPS, 7, dtype=torch.float64, requires_grad=True)
    losses = torch.rand(LOOPS, 7, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1])
    probs = probs_by_hand(logits)
    tokens = (probs * losses).sum(0) + 0.1 * (probs * probs.log()).sum(0)
    for given, want in ((None, tokens.mean()), (mask, (tokens * mask).sum() / 5)):
        got = expected_exit_loss(exit_log_probs(logits), losses, 0.1, mask=given)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        pairs = zip(*(torch.autograd.grad(x, (logits, losses), retain_graph=True) for x in (got, want)))
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_large_entropy_weight_leads_to_the_uniform_prior():
    logits = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
    losses = torch.tensor([[4.0], [3.0], [2.0], [1.0]], dtype=torch.float64)
    for beta, tolerance in ((1e4, 1e-3), (0.01, None)):
        optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

        def closure(optimizer=optimizer, beta=beta):
            optimizer.zero_grad()
            loss = expected_exit_loss(exit_log_probs(logits), losses, beta) / beta
            loss.backward()
            return loss

        optimizer.step(closure)
        probs = exit_log_probs(logits).exp().squeeze(1)
        # The minimum is the softmax of - loss / beta.
        torch.testing.assert_close(probs, torch.softmax(-losses[:, 0] / beta, 0), rtol=0, atol=tolerance or 1e-3)


def test_exit_gate_loss():
    logits = torch.randn(LOOPS, 7, dtype=torch.float64, requires_grad=True)
    losses = (torch.rand(LOOPS, 7, dtype=torch.float64) * 0.05).requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1])
    tokens = torch.zeros(7, dtype=torch.float64)
    for t in range(1, LOOPS):
        gain = torch.relu(losses[t - 1] - losses[t]).detach()
        worth = 1 / (1 + torch.exp(-50 * (gain - 0.005)))
        stop = torch.sigmoid(logits[t])
        tokens = tokens - (worth * torch.log(1 - stop) + (1 - worth) * torch.log(stop)) / (LOOPS - 1)
    for given, want in ((None, tokens.mean()), (mask, (tokens * mask).sum() / 5)):
        got = exit_gate_loss(logits, losses, mask=given)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        a, b = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (got, want))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert torch.autograd.grad(exit_gate_loss(logits, losses), losses, allow_unused=True) == (None,)


def test_extremes():
    """Sure gates, and tokens that do not count."""
    logits = torch.tensor([[1e4, -1e4, 0.0]] * 3, requires_grad=True)
    losses = torch.tensor([[1.0, 2.0, torch.nan]] * 3)
    mask = torch.tensor([True, True, False])
    log_probs = exit_log_probs(logits)
    loss = expected_exit_loss(log_probs, losses, 0.5, mask=mask)
    assert loss == 1.5
    assert log_probs[0, 0] == 0
    loss.backward()
    assert logits.grad.isfinite()[:, :2].all()
    assert exit_gate_loss(logits.detach(), losses, mask=mask).isfinite()
    assert expected_exit_loss(exit_log_probs(logits), losses, 0.0, mask=mask * 0) == 0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_gradients_at_tokens_that_do_not_count_are_zero(poison):
    """Whatever is there; and the others' are as if those tokens were not."""
    logits, losses = (torch.randn(4, 3, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([1, 0, 1])

    def gradients(make, columns, fill=None):
        leaves = [x[:, columns].clone() for x in (logits, losses)]
        if fill is not None:
            for x in leaves:
                x[:, 1] = fill
        leaves = [x.requires_grad_() for x in leaves]
        make(*leaves, mask[columns]).backward()
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]

    for make in (
        lambda z, x, m: expected_exit_loss(exit_log_probs(torch.where(m > 0, z, 0.0)), x, 0.1, mask=m),
        lambda p, x, m: expected_exit_loss(p, x, 0.1, mask=m),
        lambda z, x, m: exit_gate_loss(z, x, mask=m),
    ):
        found = gradients(make, [0, 1, 2], poison)
        for grad, want in zip(found, gradients(make, [0, 2])):
            assert (grad[:, 1] == 0).all()
            torch.testing.assert_close(grad[:, [0, 2]], want, rtol=1e-12, atol=1e-14)


def test_a_probability_of_zero_has_a_finite_gradient():
    """p log p at log p = -inf, as where a gate is sure: value and gradient are their limits, 0."""
    log_probs = torch.tensor([[0.0], [-torch.inf]], requires_grad=True)
    loss = expected_exit_loss(log_probs, torch.ones(2, 1), 0.5)
    assert loss == 1
    # d/dl of e^l (loss + beta l) is e^l (loss + beta l + beta).
    assert torch.autograd.grad(loss, log_probs)[0].tolist() == [[1.5], [0.0]]


def test_stages_train_what_they_should():
    """Stage I the model and the gate, stage II the gate alone."""
    block, gate = LoopedBlock(Layer(dtype=torch.float32), 3), ExitGate(DIM)
    x, target = torch.randn(4, DIM), torch.randn(4, DIM)
    states = block.all_states(x)
    losses = torch.stack([(h - target).square().mean(-1) for h in states])
    expected_exit_loss(gate(states).log_probs, losses, 0.1).backward()
    assert all(p.grad.abs().sum() > 0 for p in (*block.parameters(), gate.weight, gate.bias))
    block.zero_grad()
    states = [h.detach() for h in block.all_states(x)]
    exit_gate_loss(gate(states).logits, losses.detach()).backward()
    assert all(p.grad is None for p in block.parameters())


def test_half_precision_states():
    gate = ExitGate(DIM, dtype=torch.bfloat16)
    out = gate([torch.randn(3, DIM).bfloat16() for _ in range(3)])
    assert out.log_probs.dtype == torch.float32
    assert torch.equal(out.log_probs.exp().sum(0), torch.ones(3))
    assert math.isclose(out.log_probs[0, 0].exp().item(), 0.5)


def test_errors():
    with pytest.raises(ValueError, match="ExitGate: dim must be a whole number of at least 1, got 0"):
        ExitGate(0)
    gate = ExitGate(DIM)
    with pytest.raises(ValueError, match=r"ExitGate: state must have shape \(\.\.\., 6\), got \(2, 5\)"):
        gate([torch.zeros(2, 5)])
    with pytest.raises(ValueError, match="ExitGate: states must hold at least one, got none"):
        gate([])
    out = gate([torch.zeros(2, DIM)] * 2)
    with pytest.raises(ValueError, match=r"ExitGate: quantile must lie in \(0, 1\], got 0"):
        out.exit_loop(0)
    with pytest.raises(ValueError, match=r"expected_exit_loss: losses must have shape \(2, 2\), got \(2, 3\)"):
        expected_exit_loss(out.log_probs, torch.zeros(2, 3), 0.1)
    with pytest.raises(ValueError, match="expected_exit_loss: beta must be at least 0, got -1"):
        expected_exit_loss(out.log_probs, torch.zeros(2, 2), -1)
    with pytest.raises(ValueError, match=r"expected_exit_loss: mask must have shape \(2,\), got \(3,\)"):
        expected_exit_loss(out.log_probs, torch.zeros(2, 2), 1, mask=torch.ones(3))
    with pytest.raises(ValueError, match="exit_gate_loss: logits must be of at least 2 loops, got 1"):
        exit_gate_loss(torch.zeros(1, 2), torch.zeros(1, 2))
