"""State of the packaged port: taken over in the middle of a run, the next steps are those of that run."""

import pytest
import torch

from effkern.ops.lora_rite.reference import RiteOptions, new_pair, rite_step
from effkern.optim import LoRARite
from effkern.optim.lora import import_port_state
from tests.numerics import rel_err
from tests.optim.lora_cases import Product, pairs_of

LR = 0.02


def steps(problems, pairs, first, count, options):
    for step in range(first, first + count):
        grads = []
        for p, q in zip(problems, pairs):
            a, b = p.gradients(q.A.T, q.B, step)
            grads.append((a.T, b))
        pairs = rite_step(pairs, grads, [(LR, LR)] * len(pairs), [options] * len(pairs))
    return pairs


def port_state(pairs):
    """The port keeps, under each A, what the reference keeps of a pair."""
    state = {}
    for i, q in enumerate(pairs):
        a, b = q.state_A, q.state_B
        state[2 * i] = {"step": q.t, "v_l": a.V, "v_r": b.V, "m_l": a.M, "m_r": b.M, "basis_l": b.U_other,
                        "basis_r": a.U_other, "escape_l": a.rho, "escape_r": b.rho}  # fmt: skip
    return {"state": state, "param_groups": [{"params": list(range(2 * len(pairs)))}]}


def problems():
    return [Product(9, 12, 3, seed=1), Product(20, 8, 4, seed=5)]


def test_a_run_goes_on():
    of, options = problems(), RiteOptions(escaped_mass=True)
    pairs = steps(of, [new_pair(p.A.detach().T.contiguous(), p.B.detach()) for p in of], 0, 5, options)
    with torch.no_grad():
        for p, q in zip(of, pairs):
            p.A.copy_(q.A.T)
            p.B.copy_(q.B)
    optimizer = LoRARite(pairs_of(of), lr=LR, escaped_mass=True)
    import_port_state(optimizer, port_state(pairs))
    for step in range(5, 10):
        for p in of:
            p.A.grad, p.B.grad = p.gradients(p.A.detach(), p.B.detach(), step)
        optimizer.step()
    for p, q in zip(of, steps(of, pairs, 5, 5, options)):
        assert rel_err(p.A.detach().T, q.A) < 1e-10
        assert rel_err(p.B.detach(), q.B) < 1e-10


def test_the_port_itself():
    optimizer = pytest.importorskip("pytorch_optimizer.optimizer.lora_rite").LoRARite
    of = problems()
    port = optimizer([x for p in of for x in (p.A, p.B)], lr=LR)
    for step in range(10):
        for p in of:
            p.A.grad, p.B.grad = p.gradients(p.A.detach(), p.B.detach(), step)
        if step == 5:
            copies = problems()
            for p, q in zip(copies, of):
                p.load_state_dict(q.state_dict())
            ours = LoRARite(pairs_of(copies), lr=LR)
            import_port_state(ours, port.state_dict())
        if step >= 5:
            for p in copies:
                p.A.grad, p.B.grad = p.gradients(p.A.detach(), p.B.detach(), step)
            ours.step()
        port.step()
    for p, q in zip(copies, of):
        # It adds eps^2 inside the root beside eps outside.
        assert rel_err(p.B.detach(), q.B.detach()) < 1e-8
        assert rel_err(p.A.detach(), q.A.detach()) < 1e-8


def test_what_does_not_fit_changes_nothing():
    of = problems()
    pairs = [new_pair(p.A.detach().T.contiguous(), p.B.detach()) for p in of]
    optimizer, good = LoRARite(pairs_of(of), lr=LR), port_state(pairs)
    with pytest.raises(ValueError, match=r"state must be of 2 pairs, got 2 parameters"):
        import_port_state(optimizer, {**good, "param_groups": [{"params": [0, 1]}]})
    with pytest.raises(ValueError, match=r"state of pair1 must have \('step', .* got \['step'\]"):
        import_port_state(optimizer, {**good, "state": {**good["state"], 2: {"step": 1}}})
    wrong = {**good["state"][2], "v_l": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"v_l of pair1 must have shape \(4, 4\), got \(2, 2\)"):
        import_port_state(optimizer, {**good, "state": {**good["state"], 2: wrong}})
    assert not optimizer.state
