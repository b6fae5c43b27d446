"""LoRARite: skipped steps that are counted, masters that are kept, state that is not its own, copies, loss scales."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from effkern.optim import LoRAMuon, LoraPair, LoRARite, ScaledAdam
from tests.numerics import rel_err
from tests.optim.lora_cases import Product, normal, optimizer_steps, pairs_of


def one(**changes):
    return Product(**{"m": 9, "n": 12, "r": 3, "seed": 1, "zero_B": False, **changes})


def gradients(problems, step):
    for p in problems:
        p.A.grad, p.B.grad = p.gradients(p.A.detach(), p.B.detach(), step)


@pytest.mark.parametrize("kind", [LoRARite, LoRAMuon, ScaledAdam])
def test_skipped_steps_are_counted(kind):
    p = one()
    optimizer = kind(pairs_of([p]), lr=0.01)
    assert optimizer.skipped.dtype == torch.int64
    optimizer_steps([p], optimizer, 2)
    assert int(optimizer.skipped) == 0
    for _ in range(3):
        gradients([p], 2)
        p.B.grad[0, 0] = torch.nan
        optimizer.step()
    optimizer_steps([p], optimizer, 1, first=2)
    assert int(optimizer.skipped) == 3
    assert int(copy.deepcopy(optimizer).skipped) == 3


def test_finite_gradients_that_overflow_are_counted_too():
    p = one(dtype=torch.float32)
    optimizer = LoRARite(pairs_of([p]), skip_rms=0.0)
    for size, skipped in ((1e18, 0), (1e25, 1)):
        before = p.A.detach().clone()
        p.A.grad, p.B.grad = (torch.full_like(x, size) for x in (p.A, p.B))
        optimizer.step()
        assert int(optimizer.skipped) == skipped
        assert torch.equal(p.A, before) == bool(skipped)


def test_a_parameter_with_nan_stops_the_pairs_of_all_ranks_until_it_is_written_again():
    """Afterwards all go on as if nothing had been: with the basis and the moments from before."""
    of, untouched = ([one(), one(seed=5, r=2), one(seed=9)] for _ in "12")
    optimizer, straight = LoRARite(pairs_of(of), lr=0.05), LoRARite(pairs_of(untouched), lr=0.05)
    optimizer_steps(of, optimizer, 3)
    good = of[0].A.detach().clone()
    for step in range(2):
        with torch.no_grad():
            of[0].A[0, 0] = torch.nan
        before = copy.deepcopy([p.state_dict() for p in of])
        for p in of:
            p.A.grad, p.B.grad = normal(step, *p.A.shape, scale=0.01), normal(step, *p.B.shape, scale=0.01)
        optimizer.step()
        for p, old in zip(of, before):
            assert torch.equal(p.B, old["B"])
        assert torch.equal(of[1].A, before[1]["A"])
    assert [int(optimizer.state[p.A]["step"]) for p in of] == [3, 3, 3]
    assert int(optimizer.skipped) == 2
    with torch.no_grad():
        of[0].A.copy_(good)
    optimizer_steps(of, optimizer, 3, first=3)
    optimizer_steps(untouched, straight, 6)
    assert int(optimizer.skipped) == 2
    for p, q in zip(of, untouched):
        assert rel_err(p.A.detach(), q.A.detach()) < 1e-12
        assert rel_err(p.B.detach(), q.B.detach()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_write_that_changes_nothing_does_not_round_the_master(dtype):
    """Steps below a rounding of the parameter add up, whoever clamps or broadcasts it after each of them."""
    p, q = one(dtype=dtype), one(dtype=dtype)
    start = p.A.detach().double()
    optimizers = [LoRARite(pairs_of([x]), lr=1e-5) for x in (p, q)]
    for _ in range(60):
        for x, optimizer in zip((p, q), optimizers):
            optimizer_steps([x], optimizer, 1)
        with torch.no_grad():
            p.A.clamp_(-100, 100)
            p.B.copy_(p.B.clone())
    masters = [optimizer.state[x.A]["master"].double() for x, optimizer in zip((p, q), optimizers)]
    assert (masters[1] - start).norm() > 1e-4
    assert rel_err(masters[0] - start, masters[1] - start) < 1e-2


def test_an_element_written_from_outside_is_the_master_and_the_others_stay():
    p = one(dtype=torch.bfloat16)
    optimizer = LoRARite(pairs_of([p]), lr=1e-5)
    optimizer_steps([p], optimizer, 4)
    kept = optimizer.state[p.B]["master"].clone()
    with torch.no_grad():
        p.B[2, 1] = 5.0
    optimizer._prepared()
    kept[2, 1] = 5.0
    assert torch.equal(optimizer.state[p.B]["master"], kept)


@pytest.mark.parametrize("how", ["data", "load", "saved after the write"])
@pytest.mark.parametrize("other", [1.02, "swapped"])
def test_weights_that_differ_a_little_from_those_of_the_state(how, other):
    """The step is that after `copy_`, which a version counter tells."""

    def changed(x):
        return x * other if other != "swapped" else x.flip(0) if x is p.A else x.flip(1)

    p, q = one(), one()
    first, truth = (LoRARite(pairs_of([x]), lr=0.05) for x in (p, q))
    optimizer_steps([p], first, 4)
    optimizer_steps([q], truth, 4)
    written = {"A": changed(p.A.detach()), "B": changed(p.B.detach())}
    q.load_state_dict(written)
    if how == "data":
        p.A.data, p.B.data = written["A"].clone(), written["B"].clone()
    else:
        stored = first.state_dict()
        p.load_state_dict(written)
        stored = stored if how == "load" else first.state_dict()
        first = LoRARite(pairs_of([p]), lr=0.05)
        first.load_state_dict(stored)
        # Saved again before its first step it is still the state of what it was saved with.
        first.load_state_dict(first.state_dict())
    gradients([q], 4)
    p.A.grad, p.B.grad = q.A.grad.clone(), q.B.grad.clone()
    truth.step()
    first.step()
    assert rel_err(p.A.detach() - written["A"], q.A.detach() - written["A"]) < 1e-10
    assert rel_err(p.B.detach() - written["B"], q.B.detach() - written["B"]) < 1e-10


def test_a_write_to_one_factor_while_another_gets_new_memory():
    pairs, others = ([one(), one(seed=5)] for _ in "12")
    a, b = LoRARite(pairs_of(pairs), lr=0.05), LoRARite(pairs_of(others), lr=0.05)
    for problems, optimizer in ((pairs, a), (others, b)):
        optimizer_steps(problems, optimizer, 3)
        with torch.no_grad():
            problems[1].B.mul_(1.01)
    pairs[0].A.data = pairs[0].A.data.clone()
    optimizer_steps(pairs, a, 1, first=3)
    optimizer_steps(others, b, 1, first=3)
    for p, q in zip(pairs, others):
        assert rel_err(p.A.detach(), q.A.detach()) < 1e-12
        assert rel_err(p.B.detach(), q.B.detach()) < 1e-12


def test_moments_stay_through_an_equivalent_change_of_the_pair():
    """A to c A and B to B / c in the middle, with momentum: the product takes the same steps."""
    p, q = one(), one()
    a, b = LoRARite(pairs_of([p]), lr=0.05), LoRARite(pairs_of([q]), lr=0.05)
    optimizer_steps([p], a, 4)
    optimizer_steps([q], b, 4)
    with torch.no_grad():
        p.A.mul_(2.0)
        p.B.mul_(0.5)
    optimizer_steps([p], a, 4, first=4)
    optimizer_steps([q], b, 4, first=4)
    assert rel_err(p.B.detach() @ p.A.detach(), q.B.detach() @ q.A.detach()) < 1e-12


def test_state_of_another_optimizer_is_refused():
    p = one(dtype=torch.float32)
    optimizer, adam = LoRARite(pairs_of([p])), torch.optim.AdamW([p.A, p.B])
    for each in (optimizer, adam):
        optimizer_steps([p], each, 1)
    before = optimizer.state_dict()
    muon = LoRAMuon(pairs_of([p]))
    optimizer_steps([p], muon, 1)
    with pytest.raises(
        ValueError, match=r"must be of a LoRARite, got none of \['names', 'rank_dims'\]; import_port_st"
    ):
        optimizer.load_state_dict(adam.state_dict())
    with pytest.raises(
        ValueError, match=r"state of A of pair0: must be of a LoRARite, got none of \['whiten', 'second'"
    ):
        optimizer.load_state_dict(muon.state_dict())
    with pytest.raises(ValueError, match=r"must be of a ScaledAdam, got none of \['exp_avg_sq'\]$"):
        ScaledAdam(pairs_of([p])).load_state_dict(before)
    optimizer.load_state_dict(before)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_float32_state_goes_on_with_bfloat16_parameters():
    p, q = one(dtype=torch.float32), one(dtype=torch.bfloat16)
    p.load_state_dict(q.state_dict())
    single, low = LoRARite(pairs_of([p]), lr=1e-5), LoRARite(pairs_of([q]), lr=1e-5)
    optimizer_steps([p], single, 3)
    q.load_state_dict(p.state_dict())
    p.load_state_dict(q.state_dict())
    low.load_state_dict(single.state_dict())
    gradients([q], 3)
    p.A.grad, p.B.grad = q.A.grad.float(), q.B.grad.float()
    single.step()
    low.step()
    torch.testing.assert_close(low.state[q.A]["master"], p.A.detach(), rtol=0, atol=1e-9)
    assert low.state[q.A]["master"].dtype == torch.float32


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_their_options_and_take_the_same_steps(how):
    p = one(dtype=torch.float32)
    optimizer = LoRARite(pairs_of([p]), lr=0.05, fused=False, others="error")
    optimizer_steps([p], optimizer, 3)
    if how == "deepcopy":
        q, copied = copy.deepcopy((p, optimizer))
    else:
        file = io.BytesIO()
        pickle.dump((p, optimizer), file)
        file.seek(0)
        q, copied = pickle.load(file)
    optimizer_steps([p], optimizer, 3, first=3)
    optimizer_steps([q], copied, 3, first=3)
    assert torch.equal(p.A, q.A)
    assert torch.equal(p.B, q.B)
    model = nn.Module()
    model.lora_A, model.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
    model.rest = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"got other trainable parameters: rest.weight"):
        copied.add_param_group({"params": model})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [2.0**16, 2.0**26])
def test_a_scale_of_the_loss_costs_no_precision(dtype, scale):
    """The step on scaled gradients is that on the same gradients, unscaled in float64."""
    p, q = one(dtype=dtype), one()
    with torch.no_grad():
        q.A.copy_(p.A)
        q.B.copy_(p.B)
    options = {"lr": 0.01, "eps": 0.0, "clip_grad": 0.0}
    optimizer, truth = LoRARite(pairs_of([p]), **options), LoRARite(pairs_of([q]), **options)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor([0.0])
    start = q.A.detach().clone()
    for step in range(3):
        for i, (mine, theirs) in enumerate(((p.A, q.A), (p.B, q.B))):
            mine.grad = (normal(2 * step + i, *mine.shape, scale=1e-7) * scale).to(dtype)
            theirs.grad = mine.grad.double() / scale
        optimizer.step()
        truth.step()
    found = optimizer.state[p.A].get("master", p.A.detach())
    assert rel_err(found.double() - start, q.A.detach() - start) < 1e-4


def test_gradients_with_a_scale_are_not_copied(monkeypatch):
    from effkern.optim.lora import rite

    given = []
    real = rite.lora_rite_step_
    monkeypatch.setattr(
        rite, "lora_rite_step_", lambda groups, grads, *a, **k: given.extend(grads[0]) or real(groups, grads, *a, **k)
    )
    p = one(dtype=torch.float32)
    optimizer = LoRARite(pairs_of([p]))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor([0.0])
    optimizer_steps([p], optimizer, 1)
    assert [x.data_ptr() for x in given] == [p.A.grad.data_ptr(), p.B.grad.data_ptr()]


def test_ascent_by_group_with_a_scale():
    of, plain = ([one(), one(seed=5)] for _ in "12")
    groups = [[{"params": pairs_of(x)[i : i + 1], "maximize": bool(i)} for i in range(2)] for x in (of, plain)]
    optimizer, truth = LoRARite(groups[0], lr=0.05), LoRARite(groups[1], lr=0.05, maximize=False)
    truth.param_groups[1]["maximize"] = False
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor([0.0])
    for step in range(3):
        gradients(of, step)
        for sign, p, q in zip((1, -1), of, plain):
            q.A.grad, q.B.grad = sign * p.A.grad, sign * p.B.grad
            p.A.grad, p.B.grad = 8 * p.A.grad, 8 * p.B.grad
        optimizer.step()
        truth.step()
    for p, q in zip(of, plain):
        assert rel_err(p.A.detach(), q.A.detach()) < 1e-12
        assert rel_err(p.B.detach(), q.B.detach()) < 1e-12


def test_the_warning_is_about_gradients_without_their_scale(recwarn):
    p = one(dtype=torch.float32)
    optimizer = LoRARite(pairs_of([p]))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**20), torch.tensor([0.0])
    p.A.grad, p.B.grad = torch.full_like(p.A, 2.0**10), torch.full_like(p.B, 2.0**10)
    optimizer.step()
    assert not recwarn.list
    p.A.grad = torch.full_like(p.A, 2.0**28)
    with pytest.warns(UserWarning, match=r"above skip_rms=1.0"):
        optimizer.step()


def test_bad_arguments():
    A, B = nn.Parameter(torch.randn(4, 10)), nn.Parameter(torch.zeros(8, 4))
    with pytest.raises(ValueError, match=r"A of q: a factor must be dense in memory, got shape \[10, 4\]"):
        LoRARite([LoraPair("q", nn.Parameter(torch.randn(10, 8)[:, ::2]), B, 1, 1)])
    for bad in (torch.nan, -1.0):
        with pytest.raises(ValueError, match=r"lr must be at least 0 and finite, got (nan|-1)"):
            LoRARite([(A, B)], lr=torch.tensor(bad))
    with pytest.raises(TypeError, match=r"fused must be None, True or False, got 1"):
        LoRARite([(A, B)], fused=1)
    with pytest.raises(ValueError, match=r"a group must have params, got \['lr'\]"):
        LoRARite([{"lr": 1.0}])
    with pytest.raises(ValueError, match=r"got A of param_groups\[1\]\[0\] shared with A of params\[0\]"):
        LoRARite([{"params": [(A, B)]}, {"params": [(nn.Parameter(A.data), nn.Parameter(torch.zeros(8, 4)))]}])
    with pytest.raises(ValueError, match=r"got B of q shared with A of q"):
        LoRARite([LoraPair("q", A, nn.Parameter(A.data.T), 0, 1)])
    muon = LoRAMuon([(A, B)], lr=2.0, weight_decay=0.6)
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    before = A.detach().clone()
    with pytest.raises(
        ValueError, match=r"LoRAMuon: lr times weight_decay must be below 1 for both factors, got 2 and"
    ):
        muon.step()
    assert torch.equal(A, before)
