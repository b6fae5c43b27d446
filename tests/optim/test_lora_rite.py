"""LoRARite against the reference, and each fault of the published code that must not be possible here."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from effkern.ops.lora_rite.reference import RiteOptions, rite_step
from effkern.optim import LoraPair, LoRARite
from tests.numerics import rel_err
from tests.optim.lora_cases import Product, normal, optimizer_steps, pairs_of, reference_steps

LR = 0.02


def problems(zero_B=True, dtype=torch.float64):
    """Two ranks, rows above and below one block, one factor with fewer rows than the rank."""
    shapes = [(9, 7, 3), (40, 2, 3), (33, 65, 4)]
    return [Product(*shape, seed=10 * i + 1, zero_B=zero_B, dtype=dtype) for i, shape in enumerate(shapes)]


def distance(found, truth):
    return max(
        max(rel_err(p.A.detach().T, q.A), rel_err(p.B.detach(), q.B)) for p, q in zip(found, truth)
    )  # fmt: skip


CASES = {
    "default": {},
    "escaped-mass": {"escaped_mass": True},
    "sum": {"second_moment": "sum", "escaped_mass": True},
    "decay-relative": {"weight_decay": 0.3, "relative_eps": True, "eps": 1e-3},
    "clip": {"clip_grad": 1e-3, "skip_rms": 0.0},
    "skip": {"clip_grad": 0.0, "skip_rms": 1.2e-2},
    "betas": {"betas": (0.0, 0.5)},
}


@pytest.mark.parametrize("zero_B", [True, False], ids=["zero-start", "dense-start"])
@pytest.mark.parametrize("case", CASES)
def test_hundred_steps_are_those_of_the_reference(case, zero_B):
    """float64: what the form of the algorithm loses. Mixed ranks, a pair of which one factor is below its rank."""
    options = CASES[case]
    of = problems(zero_B)
    truth = reference_steps(of, 100, [(LR, LR)] * 3, [RiteOptions(**options)] * 3)
    optimizer = LoRARite(pairs_of(of), lr=LR, fused=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if case != "skip" else "ignore")
        optimizer_steps(of, optimizer, 100)
    assert distance(of, truth) < 1e-10
    moved = [rel_err(p.B.detach(), q.B) for p, q in zip(problems(zero_B), truth)]
    assert min(moved) > 0.05


def test_the_case_of_skipping_skips_some_factors_and_not_all():
    """So that the agreement above is about something."""
    of = problems()
    optimizer = LoRARite(pairs_of(of), lr=LR, **CASES["skip"])
    with pytest.warns(UserWarning, match=r"root mean square above skip_rms=0.012"):
        optimizer_steps(of, optimizer, 1)
    seconds = [bool(optimizer.state[p.B]["second"].abs().sum() > 0) for p in of]
    assert set(seconds) == {True, False}


@pytest.mark.parametrize("fused", [False, None], ids=["plain", "auto"])
def test_float32_is_as_good_as_the_reference_in_float32(fused):
    """100 steps from the same start; the truth is float64. The pair with two rows for a rank of three has eigenvalues
    of V that are rounding noise, to which only eps gives a size: here a hundredth of the largest."""
    of = problems(zero_B=False, dtype=torch.float32)
    chosen = {"eps": 1e-2, "relative_eps": True}
    options = [RiteOptions(**chosen)] * 3
    truth = reference_steps(of, 100, [(LR, LR)] * 3, options)
    pairs = _single(of)
    for step in range(100):
        grads = []
        for p, q in zip(of, pairs):
            a, b = p.gradients(q.A.T, q.B, step)
            grads.append((a.T, b))
        pairs = rite_step(pairs, grads, [(LR, LR)] * 3, options)
    optimizer_steps(of, LoRARite(pairs_of(of), lr=LR, fused=fused, **chosen), 100)
    for p, q, t in zip(of, pairs, truth):
        assert distance([p], [t]) <= 2 * max(rel_err(q.A, t.A), rel_err(q.B, t.B))


def _single(of):
    from effkern.ops.lora_rite.reference import new_pair

    return [new_pair(p.A.detach().T.contiguous(), p.B.detach().clone()) for p in of]


def test_rates_by_group_factor_and_tensor():
    """Two groups with their own rates, B at four times A's rate, the rate as a number and as a tensor."""
    of = problems()
    rates = [(0.01, 0.04), (0.01, 0.04), (0.03, 0.03)]
    truth = reference_steps(of, 12, rates, [RiteOptions()] * 3)
    pairs = pairs_of(of)
    groups = [{"params": pairs[:2], "lr": torch.tensor(0.01), "lr_ratio_B": 4.0}, {"params": pairs[2:], "lr": 0.03}]
    optimizer_steps(of, LoRARite(groups, fused=False), 12)
    # float32 tensors hold 0.01 to seven digits.
    assert distance(of, truth) < 1e-6


def test_scheduler_and_maximize():
    of, up = problems(), problems()
    optimizer = LoRARite(pairs_of(of), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(3):
        optimizer_steps(of, optimizer, 1, first=step)
        scheduler.step()
    pairs = reference_steps(problems(), 0, [], [])
    for step in range(3):
        lr = 0.05 * 0.5**step
        grads = [tuple(x.T if i == 0 else x for i, x in enumerate(p.gradients(q.A.T, q.B, step)))
                 for p, q in zip(of, pairs)]  # fmt: skip
        pairs = rite_step(pairs, grads, [(lr, lr)] * 3, [RiteOptions()] * 3)
    assert distance(of, pairs) < 1e-12
    ascent = LoRARite(pairs_of(up), lr=0.05, maximize=True)
    for step in range(3):
        for p in up:
            p.A.grad, p.B.grad = (-g for g in p.gradients(p.A.detach(), p.B.detach(), step))
        for group in ascent.param_groups:
            group["lr"] = 0.05 * 0.5**step
        ascent.step()
    assert distance(up, pairs) < 1e-12


def test_closure():
    (p,) = problems()[:1]
    optimizer = LoRARite(pairs_of([p]), lr=LR)

    def closure():
        optimizer.zero_grad()
        loss = (p.B @ p.A - p.target).square().mean()
        loss.backward()
        return loss

    before = optimizer.step(closure)
    assert before == (p.target.square()).mean()
    for _ in range(30):
        after = optimizer.step(closure)
    assert after < 0.98 * before


# The published code ------------------------------------------------------------------------------------------------


def test_negative_eigenvalues_of_rounding_do_not_zero_a_step():
    """There a negative eigenvalue of V gives NaN, which becomes a step of 0 for the whole factor. Gradients of rank 1
    leave r - 1 eigenvalues at rounding noise of both signs."""
    torch.manual_seed(0)
    A, B = nn.Parameter(torch.randn(8, 64)), nn.Parameter(torch.randn(48, 8))
    optimizer = LoRARite([LoraPair("p", A, B, 0, 1)], lr=1e-2, skip_rms=0.0)
    negative = 0
    for _ in range(20):
        u, v = torch.randn(48), torch.randn(64)
        G = torch.outer(u, v)
        A.grad, B.grad = B.detach().T @ G, G @ A.detach().T
        g = A.grad.T @ torch.linalg.pinv(torch.linalg.qr(B.detach()).R)
        negative += bool(torch.linalg.eigvalsh(g.T @ g / 64).amin() < 0)
        before = A.detach().clone(), B.detach().clone()
        optimizer.step()
        for now, was in zip((A, B), before):
            assert torch.isfinite(now).all()
            assert (now - was).norm() > 1e-4
    assert negative > 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["weights-first", "optimizer-first"])
def test_resume_is_bit_for_bit(dtype, order):
    """There all state is made again at the first step after a load. Through a file, with weights_only."""
    straight, first = problems(dtype=dtype), problems(dtype=dtype)
    options = {"lr": LR, "escaped_mass": True}
    optimizer_steps(straight, LoRARite(pairs_of(straight), **options), 9)
    begun = LoRARite(pairs_of(first), **options)
    optimizer_steps(first, begun, 4)
    file = io.BytesIO()
    torch.save({"optimizer": begun.state_dict(), "weights": [p.state_dict() for p in first]}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    resumed = problems(dtype=dtype)
    optimizer = LoRARite(pairs_of(resumed), **options)
    if order == "optimizer-first":
        optimizer.load_state_dict(stored["optimizer"])
    for p, weights in zip(resumed, stored["weights"]):
        p.load_state_dict(weights)
    if order == "weights-first":
        optimizer.load_state_dict(stored["optimizer"])
    optimizer_steps(resumed, optimizer, 5, first=4)
    for p, q in zip(straight, resumed):
        assert torch.equal(p.A, q.A)
        assert torch.equal(p.B, q.B)
    copied = copy.deepcopy(optimizer)
    assert copied.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_state_keeps_its_precision_and_is_not_shared():
    of = problems(dtype=torch.bfloat16)
    optimizer = LoRARite(pairs_of(of), lr=LR)
    optimizer_steps(of, optimizer, 2)
    stored = optimizer.state_dict()
    other = problems(dtype=torch.bfloat16)
    target = LoRARite(pairs_of(other), lr=LR)
    target.load_state_dict(stored)
    for p, q in zip(of, other):
        for mine, theirs in ((p.A, q.A), (p.B, q.B)):
            for key, value in optimizer.state[mine].items():
                assert target.state[theirs][key].dtype == value.dtype, key
                assert torch.equal(target.state[theirs][key], value), key
    kept = {k: v.clone() for k, v in stored["state"][0].items()}
    optimizer_steps(of, optimizer, 1, first=2)
    for key in ("second", "step", "whiten"):
        assert torch.equal(stored["state"][0][key], kept[key])
    bigger = [Product(9, 7, 5, seed=1), *other[1:]]
    wrong = LoRARite(pairs_of(bigger), lr=LR)
    optimizer_steps(bigger, wrong, 1)
    kept = copy.deepcopy(wrong.state_dict()["state"])
    with pytest.raises(ValueError, match=r"state of A of pair0: exp_avg must have shape \[5, 7\], got \[3, 7\]"):
        wrong.load_state_dict(stored)
    for index, entry in wrong.state_dict()["state"].items():
        assert all(torch.equal(value, kept[index][key]) for key, value in entry.items())
    stored["state"][0]["whiten"] = torch.zeros(2, 2, dtype=torch.float64)
    target.load_state_dict(stored)
    with pytest.raises(ValueError, match=r"state of pair0: exp_avg must have shape .* and whiten \[3, 3\], got .*2, 2"):
        optimizer_steps(other, target, 1, first=2)
    stored["state"][0].pop("whiten")
    with pytest.raises(
        ValueError, match=r"state of A of pair0: must be of a LoRARite, got none of \['whiten'\]; import_p"
    ):
        target.load_state_dict(stored)
    renamed = [LoraPair(f"other{i}", p.A, p.B, 0, 1) for i, p in enumerate(other)]
    with pytest.raises(ValueError, match=r"stored param_groups\[0\] must have the pairs of this optimizer, got names"):
        LoRARite(renamed, lr=LR).load_state_dict(stored)


def test_bfloat16_parameters_are_rounded_float32_masters():
    """There bfloat16 raises. Ours: the float32 run from the same start, rounded; small steps are not lost."""
    low, single = problems(dtype=torch.bfloat16), problems(dtype=torch.float32)
    for p, q in zip(low, single):
        for name in ("A", "B"):
            getattr(q, name).data.copy_(getattr(p, name).data)
    a, b = LoRARite(pairs_of(low), lr=1e-5), LoRARite(pairs_of(single), lr=1e-5)
    for step in range(40):
        for p, q in zip(low, single):
            p.A.grad, p.B.grad = p.gradients(p.A.detach(), p.B.detach(), step)
            q.A.grad, q.B.grad = p.A.grad.float(), p.B.grad.float()
        a.step()
        b.step()
    for p, q in zip(low, single):
        assert torch.equal(p.B, q.B.bfloat16())
        assert torch.equal(a.state[p.A]["master"], q.A)
        assert torch.equal(p.A, q.A.bfloat16())


def test_a_pair_without_gradients_is_left_out():
    """There a missing gradient is an AttributeError. The others step as they would alone; counts are of each pair."""
    of, alone = problems(), problems()
    optimizer = LoRARite(pairs_of(of), lr=LR)
    single = LoRARite(pairs_of(alone[:1]), lr=LR)
    second = LoRARite(pairs_of(alone[1:2]), lr=LR)
    for step in range(6):
        for p, q in zip(of[:2], alone[:2]):
            p.A.grad, p.B.grad = p.gradients(p.A.detach(), p.B.detach(), step)
            q.A.grad, q.B.grad = q.gradients(q.A.detach(), q.B.detach(), step)
        if step % 2:
            of[0].A.grad = None
        optimizer.step()
        if step % 2 == 0:
            single.step()
        second.step()
    start = problems()
    assert torch.equal(of[2].A, start[2].A)
    # Clipping is off at these sizes, so that pairs do not meet.
    assert rel_err(of[0].B.detach(), alone[0].B.detach()) < 1e-12
    assert rel_err(of[1].B.detach(), alone[1].B.detach()) < 1e-12
    assert [int(optimizer.state[p.A]["step"]) for p in of] == [3, 6, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    """There NaN reaches eigh, which raises half-way through the pairs."""
    of = problems()
    optimizer = LoRARite(pairs_of(of), lr=LR, weight_decay=0.1, escaped_mass=True)
    optimizer_steps(of, optimizer, 3)
    before = copy.deepcopy([p.state_dict() for p in of]), copy.deepcopy(optimizer.state_dict()["state"])
    for p in of:
        p.A.grad, p.B.grad = p.gradients(p.A.detach(), p.B.detach(), 3)
    of[1].B.grad[0, 0] = bad
    optimizer.step()
    for p, old in zip(of, before[0]):
        assert torch.equal(p.A, old["A"])
        assert torch.equal(p.B, old["B"])
    now = optimizer.state_dict()["state"]
    for index, entry in before[1].items():
        for key, value in entry.items():
            assert torch.equal(now[index][key], value), key
    again = problems()
    fresh = LoRARite(pairs_of(again), lr=LR, weight_decay=0.1, escaped_mass=True)
    optimizer_steps(again, fresh, 5)
    optimizer_steps(of, optimizer, 2, first=3)
    assert distance(of, [_Tall(p) for p in again]) == 0


class _Tall:
    def __init__(self, p):
        self.A, self.B = p.A.detach().T, p.B.detach()


def test_relative_eps_is_a_share_of_the_largest_root():
    """There the option is a NameError. It is invariant to the gradient's scale; the absolute one is not."""
    steps = {}
    for relative in (True, False):
        for scale in (1.0, 1e-3):
            (p,) = problems(zero_B=False)[:1]
            optimizer = LoRARite(pairs_of([p]), lr=LR, eps=1e-2, relative_eps=relative)
            before = p.B.detach().clone()
            p.A.grad, p.B.grad = (g * scale for g in p.gradients(p.A.detach(), p.B.detach(), 0))
            optimizer.step()
            steps[relative, scale] = p.B.detach() - before
    assert rel_err(steps[True, 1e-3], steps[True, 1.0]) < 1e-10
    assert rel_err(steps[False, 1e-3], steps[False, 1.0]) > 0.5


def test_no_host_read_in_a_step():
    """There a pair costs three. Meta tensors have no values: any read of one would raise."""
    from effkern.ops.lora_rite import lora_rite_step_, new_group

    factors = [torch.empty(3, 8, device="meta"), torch.empty(9, 3, device="meta")]
    group = new_group(factors, [True, False])
    grads = [torch.empty_like(x) for x in factors]
    gate = lora_rite_step_([group], [grads], [0.1], [RiteOptions(escaped_mass=True)], impl="plain")
    assert gate.device.type == "meta"


def test_steps_of_equivalent_pairs_agree():
    """What the method is for: A, B and Q^-1 A, B Q have the same product, before and after 20 steps. It holds for
    factors of full rank alone: what a factor has outside the range of its partner is not seen in the product."""
    of, turned = problems(zero_B=False)[::2], problems(zero_B=False)[::2]
    for i, p in enumerate(turned):
        r = p.A.shape[0]
        left, _ = torch.linalg.qr(normal(i, r, r))
        Q = left * torch.logspace(0, 3, r, dtype=torch.float64)
        p.A.data.copy_(torch.linalg.solve(Q, p.A.data))
        p.B.data.copy_(p.B.data @ Q)
    optimizer_steps(of, LoRARite(pairs_of(of), lr=LR), 20)
    optimizer_steps(turned, LoRARite(pairs_of(turned), lr=LR), 20)
    adam = problems(zero_B=False)[::2]
    optimizer_steps(adam, torch.optim.AdamW([x for p in adam for x in (p.A, p.B)], lr=LR), 20)
    for p, q in zip(of, turned):
        assert rel_err(q.B.detach() @ q.A.detach(), p.B.detach() @ p.A.detach()) < 1e-9
    assert rel_err(adam[0].B.detach() @ adam[0].A.detach(), of[0].B.detach() @ of[0].A.detach()) > 1e-2


def test_float32_keeps_the_invariance_that_rounded_inputs_allow(capsys):
    """Up to condition 1e5, after 1 and 20 steps: twice the error of float64 arithmetic on float32 inputs at most."""
    from benchmarks.lora_rite_step import invariance

    for line in invariance(None, rows=96, rank=8):
        change, ours = line["case"]["change"], line["ours_over_floor"]
        assert max(ours) < (4 if change == "condition 1e6" else 2), change
        assert min(line["errors"]["AdamW"]) > 0.1
        assert max(line["errors"]["reference float64"]) < 1e-7
    assert "| condition 1e5 |" in capsys.readouterr().out
