"""LoRARite: writes from outside, loss scaling, frozen factors, large ranks; LoRAMuon and ScaledAdam."""

import copy

import pytest
import torch
from torch import nn

from effkern.ops.lora_rite.group import MAX_RANK
from effkern.optim import LoRAMuon, LoraPair, LoRARite, ScaledAdam
from effkern.optim.lora.runs import no_kernel
from tests.numerics import rel_err
from tests.optim.lora_cases import Product, normal, optimizer_steps, pairs_of


def one(**changes):
    return Product(**{"m": 9, "n": 12, "r": 3, "seed": 1, "zero_B": False, **changes})


def test_a_factor_written_from_outside_gets_a_new_basis():
    """The step after it is that of an optimizer which never knew another factor, moments apart: here they are zero."""
    p, q = one(), one()
    optimizer = LoRARite(pairs_of([p]), lr=0.05, betas=(0.0, 0.0))
    optimizer_steps([p], optimizer, 3)
    with torch.no_grad():
        p.A.mul_(3.0)
        p.B.copy_(normal(7, 9, 3))
    q.load_state_dict(p.state_dict())
    optimizer_steps([p], optimizer, 1, first=3)
    optimizer_steps([q], LoRARite(pairs_of([q]), lr=0.05, betas=(0.0, 0.0)), 1, first=3)
    assert rel_err(p.A.detach(), q.A.detach()) < 1e-12
    assert rel_err(p.B.detach(), q.B.detach()) < 1e-12


@pytest.mark.parametrize("how", ["new-memory", "rebuild"])
def test_writes_that_no_counter_sees(how):
    p, q = one(), one()
    optimizer = LoRARite(pairs_of([p]), lr=0.05, betas=(0.0, 0.0))
    optimizer_steps([p], optimizer, 3)
    if how == "new-memory":
        p.A.data = normal(8, 3, 12)
    else:
        p.A.data.copy_(normal(8, 3, 12))
        optimizer.rebuild()
    q.load_state_dict(p.state_dict())
    optimizer_steps([p], optimizer, 1, first=3)
    optimizer_steps([q], LoRARite(pairs_of([q]), lr=0.05, betas=(0.0, 0.0)), 1, first=3)
    assert rel_err(p.A.detach(), q.A.detach()) < 1e-12
    assert rel_err(p.B.detach(), q.B.detach()) < 1e-12


def test_other_pairs_keep_their_bits_when_one_is_written():
    pair, alone = [one(), one(seed=5)], [one(), one(seed=5)]
    first, second = (LoRARite(pairs_of(x), lr=0.05, clip_grad=0.0) for x in (pair, alone))
    optimizer_steps(pair, first, 3)
    optimizer_steps(alone, second, 3)
    with torch.no_grad():
        pair[0].A.mul_(2.0)
    optimizer_steps(pair, first, 2, first=3)
    optimizer_steps(alone, second, 2, first=3)
    assert torch.equal(pair[1].A, alone[1].A)
    assert torch.equal(pair[1].B, alone[1].B)
    assert not torch.equal(pair[0].A, alone[0].A)


def test_weights_loaded_after_the_state_of_other_weights():
    """The state of one run and the weights of another: the stored bases do not fit, which the first step sees."""
    p = one()
    optimizer = LoRARite(pairs_of([p]), lr=0.05, betas=(0.0, 0.0))
    optimizer_steps([p], optimizer, 3)
    q, fresh = one(), one()
    target = LoRARite(pairs_of([q]), lr=0.05, betas=(0.0, 0.0))
    target.load_state_dict(optimizer.state_dict())
    optimizer_steps([q], target, 1)
    optimizer_steps([fresh], LoRARite(pairs_of([fresh]), lr=0.05, betas=(0.0, 0.0)), 1)
    assert rel_err(q.B.detach(), fresh.B.detach()) < 1e-12


def test_a_bfloat16_parameter_written_from_outside_becomes_its_master():
    p = one(dtype=torch.bfloat16)
    optimizer = LoRARite(pairs_of([p]), lr=1e-6)
    optimizer_steps([p], optimizer, 2)
    with torch.no_grad():
        p.B.fill_(0.75)
    optimizer_steps([p], optimizer, 1, first=2)
    assert (p.B == 0.75).all()
    assert (optimizer.state[p.B]["master"] - 0.75).abs().max() < 1e-3


@pytest.mark.parametrize("overflow", [False, True])
def test_loss_scaling(overflow):
    """Scaled gradients with the scale handed over give the step of the plain ones; an overflow changes nothing."""
    p, q = one(dtype=torch.float32), one(dtype=torch.float32)
    optimizer, plain = LoRARite(pairs_of([p]), lr=0.05), LoRARite(pairs_of([q]), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        before = copy.deepcopy(p.state_dict())
        optimizer.zero_grad()
        G = normal(step, 9, 12, dtype=torch.float32, scale=1e-2)
        scaler.scale(((p.B @ p.A) * G).sum()).backward()
        broken = overflow and step == 1
        if broken:
            p.A.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if broken:
            assert torch.equal(p.A, before["A"])
            assert scaler.get_scale() == 512.0
            continue
        plain.zero_grad()
        ((q.B @ q.A) * G).sum().backward()
        plain.step()
    torch.testing.assert_close(p.A, q.A, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(p.B, q.B, rtol=1e-5, atol=1e-6)


def test_scaler_after_unscale_for_a_look_at_the_gradients():
    p, q = one(dtype=torch.float32), one(dtype=torch.float32)
    optimizer, scaler = LoRARite(pairs_of([p]), lr=0.05), torch.amp.GradScaler("cpu", init_scale=64.0)
    G = normal(3, 9, 12, dtype=torch.float32, scale=1e-2)
    scaler.scale(((p.B @ p.A) * G).sum()).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(p.B.grad, G @ p.A.detach().T)
    scaler.step(optimizer)
    q.A.grad, q.B.grad = q.B.detach().T @ G, G @ q.A.detach().T
    LoRARite(pairs_of([q]), lr=0.05).step()
    torch.testing.assert_close(p.B, q.B, rtol=1e-5, atol=1e-6)


def test_float16_gradients_lose_their_scale_in_float32():
    """1e-9 times a scale of 65536 is a float16 number; 1e-9 is not."""
    p, q = one(dtype=torch.float16), one(dtype=torch.float32)
    with torch.no_grad():
        q.A.copy_(p.A)
        q.B.copy_(p.B)
    optimizer, plain = LoRARite(pairs_of([p]), eps=1e-12), LoRARite(pairs_of([q]), eps=1e-12)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(65536.0), torch.tensor([0.0])
    for mine, theirs in ((p.A, q.A), (p.B, q.B)):
        mine.grad = (normal(4, *mine.shape, scale=1e-9) * 65536).half()
        theirs.grad = mine.grad.float() / 65536
    optimizer.step()
    plain.step()
    assert optimizer.state[p.A]["exp_avg"].norm() > 1
    torch.testing.assert_close(optimizer.state[p.B]["master"], q.B.detach())


def test_a_group_added_in_the_middle():
    of, alone = [one(), one(seed=5, r=2)], [one()]
    optimizer, single = LoRARite(pairs_of(of[:1]), lr=0.05), LoRARite(pairs_of(alone), lr=0.05)
    optimizer_steps(of[:1], optimizer, 3)
    optimizer.add_param_group({"params": [LoraPair("later", of[1].A, of[1].B, 0, 1)], "lr": 0.1})
    optimizer_steps(of, optimizer, 3, first=3)
    optimizer_steps(alone, single, 6)
    # The sizes of these gradients are below the clip, so that pairs do not meet.
    assert torch.equal(of[0].A, alone[0].A)
    assert torch.equal(of[0].B, alone[0].B)
    assert [int(optimizer.state[p.A]["step"]) for p in of] == [6, 3]


def test_a_frozen_factor_stays_and_its_partner_trains():
    """LoRA-FA. B's step is that of the pair, for A's own update is no part of it in the first step."""
    p, q = one(), one()
    p.A.requires_grad_(False)
    optimizer = LoRARite(pairs_of([p]), lr=0.05, weight_decay=0.1)
    for step in range(4):
        before = p.A.detach().clone()
        p.B.grad = p.gradients(p.A, p.B.detach(), step)[1]
        optimizer.step()
        assert torch.equal(p.A, before)
        if step == 0:
            optimizer_steps([q], LoRARite(pairs_of([q]), lr=0.05, weight_decay=0.1, clip_grad=0.0), 1)
            assert rel_err(p.B.detach(), q.B.detach()) < 1e-12
    assert p.A.grad is None


def test_ranks_above_the_own_solver():
    """r = 129 takes LAPACK's solver, and is the same method."""
    r = 129
    big, small = Product(r + 3, r + 5, r, seed=1, zero_B=False), Product(r + 3, r + 5, r, seed=1, zero_B=False)
    from effkern.ops.lora_rite.reference import RiteOptions
    from tests.optim.lora_cases import reference_steps

    (truth,) = reference_steps([small], 2, [(0.02, 0.02)], [RiteOptions()])
    optimizer_steps([big], LoRARite(pairs_of([big]), lr=0.02), 2)
    # The Gram matrix of a square Gaussian factor has condition 1e4 to 1e6.
    assert rel_err(big.A.detach().T, truth.A) < 1e-8
    assert rel_err(big.B.detach(), truth.B) < 1e-8
    r = MAX_RANK + 1
    with pytest.raises(NotImplementedError, match=rf"fused=True needs a compiled kernel, but rank {r} is above"):
        LoRARite(pairs_of([Product(1, 1, r, seed=1, dtype=torch.float32)]), fused=True)


def test_fused_means_fused():
    with pytest.raises(NotImplementedError, match=r"fused=True needs a compiled kernel, but float64 factors have none"):
        LoRARite(pairs_of([one()]), fused=True)
    if no_kernel(3, torch.empty(0)) is None:
        p, q = one(dtype=torch.float32), one(dtype=torch.float32)
        optimizer_steps([p], LoRARite(pairs_of([p]), fused=True), 3)
        optimizer_steps([q], LoRARite(pairs_of([q]), fused=False), 3)
        torch.testing.assert_close(p.B, q.B, rtol=1e-5, atol=1e-6)


def test_mixed_precisions_and_ranks_share_the_clip():
    """The global norm is over all pairs, whatever their rank and dtype."""
    mixed = [one(), one(seed=5, r=2, dtype=torch.float32), one(seed=9, dtype=torch.bfloat16)]
    same = [one(), one(seed=5, r=2), one(seed=9)]
    for p, q in zip(mixed, same):
        q.A.data.copy_(p.A.data)
        q.B.data.copy_(p.B.data)
    options = {"lr": 0.02, "clip_grad": 1e-3, "eps": 1e-3}
    optimizer_steps(mixed, LoRARite(pairs_of(mixed), **options), 1)
    optimizer_steps(same, LoRARite(pairs_of(same), **options), 1)
    unclipped = [one()]
    optimizer_steps(unclipped, LoRARite(pairs_of(unclipped), **options), 1)
    assert rel_err(mixed[0].B.detach(), same[0].B.detach()) < 1e-4
    assert rel_err(unclipped[0].B.detach(), same[0].B.detach()) > 1e-3


def test_sparse_gradients_are_refused():
    p = one()
    p.A.grad, p.B.grad = torch.zeros_like(p.A).to_sparse(), torch.zeros_like(p.B)
    with pytest.raises(NotImplementedError, match=r"pair0 must have dense gradients, got a sparse one"):
        LoRARite(pairs_of([p])).step()


def test_state_is_small():
    """One moment and r x r matrices: r = 16 and 1024 rows within 1.15 of the parameters, r = 64 within 1.5."""
    for r, limit in ((16, 1.15), (64, 1.5)):
        A, B = nn.Parameter(torch.randn(r, 1024)), nn.Parameter(torch.zeros(1024, r))
        optimizer = LoRARite([LoraPair("p", A, B, 0, 1)])
        A.grad, B.grad = torch.zeros(r, 1024), torch.randn(1024, r)
        optimizer.step()
        state = [t for entry in optimizer.state_dict()["state"].values() for t in entry.values()]
        assert sum(t.numel() * t.element_size() for t in state) <= limit * 4 * (A.numel() + B.numel())


@pytest.mark.gpu
def test_on_a_gpu_without_a_host_read():
    """Steps with a falling rate, a loss scale and a NaN, while any wait for the device raises; the CPU's values."""
    on_cpu, on_gpu = [[one(m=70, n=90, r=8, dtype=torch.float32, seed=s) for s in (1, 5)] for _ in "12"]
    on_gpu = [p.cuda() for p in on_gpu]
    optimizers = [LoRARite(pairs_of(x), lr=0.05, escaped_mass=True) for x in (on_cpu, on_gpu)]
    grads = [[p.gradients(p.A.detach(), p.B.detach(), step) for p in on_cpu] for step in range(6)]
    grads[3][0][0][0, 0] = torch.nan
    moved = [[tuple(g.cuda() for g in both) for both in step] for step in grads]
    for step in range(6):
        for problems, optimizer, given in ((on_cpu, optimizers[0], grads), (on_gpu, optimizers[1], moved)):
            for p, both in zip(problems, given[step]):
                p.A.grad, p.B.grad = both
            for group in optimizer.param_groups:
                group["lr"] = 0.05 / (step + 1)
            torch.cuda.set_sync_debug_mode("error" if step and problems is on_gpu else "default")
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
    for p, q in zip(on_cpu, on_gpu):
        torch.testing.assert_close(p.A, q.A.cpu(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(p.B, q.B.cpu(), rtol=1e-4, atol=1e-5)
        assert int(optimizers[1].state[q.A]["step"]) == 5


# Peers --------------------------------------------------------------------------------------------------------------


def msign(X):
    U, _, V = torch.linalg.svd(X, full_matrices=False)
    return U @ V


def test_lora_muon_against_its_formula():
    p, q = one(), one()
    optimizer = LoRAMuon(pairs_of([p]), lr=0.1, momentum=0.9, weight_decay=0.5)
    A, B = q.A.detach().T.clone(), q.B.detach().clone()
    mA, mB = torch.zeros_like(A), torch.zeros_like(B)
    for step in range(5):
        optimizer_steps([p], optimizer, 1, first=step)
        gA, gB = q.gradients(A.T, B, step)
        mA, mB = 0.9 * mA + 0.1 * gA.T, 0.9 * mB + 0.1 * gB
        inverse = []
        for X in (A, B):
            U, S, _ = torch.linalg.svd(X.T @ X)
            inverse.append(U * S.rsqrt() @ U.T)
        s = (1 - 0.1 * 0.5) ** 0.5
        A, B = (
            s * A - 0.05 / s * msign(mA @ inverse[1]) @ inverse[1],
            s * B - 0.05 / s * msign(mB @ inverse[0]) @ inverse[0],
        )
    assert rel_err(p.A.detach().T, A) < 1e-9
    assert rel_err(p.B.detach(), B) < 1e-9


def test_lora_muon_moves_the_product_by_the_rate_in_spectral_norm():
    """From B = 0, where dZ = dB A^T alone: all singular values are lr / 2."""
    p = one(zero_B=True)
    optimizer_steps([p], LoRAMuon(pairs_of([p]), lr=0.1), 1)
    values = torch.linalg.svdvals(p.B.detach() @ p.A.detach())[:3]
    torch.testing.assert_close(values, torch.full((3,), 0.05, dtype=torch.float64))


def test_scaled_adam_is_adamw_on_riemannian_gradients():
    p, q = one(), one()
    optimizer = ScaledAdam(pairs_of([p]), lr=0.01, reg=0.1, weight_decay=0.2, lr_ratio_B=2.0)
    adam = torch.optim.AdamW([{"params": [q.A]}, {"params": [q.B], "lr": 0.02}], lr=0.01, weight_decay=0.2)
    eye = 0.1 * torch.eye(3, dtype=torch.float64)
    for step in range(5):
        optimizer_steps([p], optimizer, 1, first=step)
        A, B = q.A.detach(), q.B.detach()
        gA, gB = q.gradients(A, B, step)
        q.A.grad, q.B.grad = torch.linalg.solve(B.T @ B + eye, gA), gB @ torch.linalg.inv(A @ A.T + eye)
        adam.step()
    assert rel_err(p.A.detach(), q.A.detach()) < 1e-12
    assert rel_err(p.B.detach(), q.B.detach()) < 1e-12


@pytest.mark.parametrize("kind", [LoRAMuon, ScaledAdam])
def test_peers_resume_bit_for_bit_and_skip_what_is_not_finite(kind):
    p, q = one(dtype=torch.float32), one(dtype=torch.float32)
    first = kind(pairs_of([p]), lr=0.01)
    optimizer_steps([p], first, 3)
    q.load_state_dict(p.state_dict())
    second = kind(pairs_of([q]), lr=0.01)
    second.load_state_dict(first.state_dict())
    q.A.grad, q.B.grad = torch.full_like(q.A, torch.nan), torch.ones_like(q.B)
    second.step()
    assert torch.equal(p.B, q.B)
    optimizer_steps([p], first, 2, first=3)
    optimizer_steps([q], second, 2, first=3)
    assert torch.equal(p.A, q.A)
    assert torch.equal(p.B, q.B)
    with pytest.raises(TypeError, match=r"pair0 must be float32 or float64, both factors, got torch.bfloat16"):
        kind(pairs_of([one(dtype=torch.bfloat16)]))
