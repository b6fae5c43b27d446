"""The r x r CUDA kernels of LoRA-RITE on the host, against the plain form: values, races, overruns.

Eigenvectors are free in sign and order, so that what is compared does not depend on them.
"""

import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from effkern.ops.lora_rite import RiteOptions, gram, plain
from effkern.ops.lora_rite.terms import terms_of
from tests.native.test_cuda_host import MEMORY, THREAD, breaks, execute, program, under  # noqa: F401
from tests.ops.lora_rite_cases import group_grads, make, run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not found")

SOURCE = "lora_rite_host"
STATE = ("whiten", "second", "transport", "escaped", "steps", "exact")


@dataclass
class Case:
    """One step of a group; `products`: grams, crosses and sizes of its update, [F, ...]."""

    options: RiteOptions
    grams: Tensor
    rows: Tensor
    state: dict[str, Tensor]
    products: tuple[Tensor, Tensor, Tensor]
    scratch: bool = False
    tiles: int = 3

    def split(self, total: Tensor) -> Tensor:
        """[F, tiles, ...] with the given sum over tiles."""
        shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).view(1, -1, *[1] * (total.dim() - 1))
        return total[:, None] * shares

    def pack(self) -> bytes:
        t, (count, n, _) = terms_of(self.options), self.grams.shape
        header = struct.pack(
            "8q7d", count, n, self.tiles, t.relative_eps, t.escaped_mass, t.sum_second, self.scratch, True, t.beta1,
            t.beta2, t.eps, t.weight_decay, t.clip, t.skip_rms, t.tolerance,
        )  # fmt: skip
        tiles = torch.cat(
            [self.split(x).flatten(2) if x.dim() > 1 else self.split(x)[..., None] for x in self.products], 2
        )
        state = [self.state[name] for name in STATE]
        parts = [self.split(self.grams), self.rows, self.lr(), *state[:5], tiles, state[5]]
        return header + b"".join(x.contiguous().numpy().tobytes() for x in parts)

    def lr(self) -> Tensor:
        return torch.linspace(0.01, 0.02, len(self.rows), dtype=torch.float64)

    def truth(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor], dict[str, Tensor]]:
        """What plain gives, the state after precondition, and the state after rebase."""
        terms, state = terms_of(self.options), {name: x.clone() for name, x in self.state.items()}
        traces = plain.traces(self.grams, self.rows, terms.skip_rms)
        update = plain.precondition_(
            self.grams, traces, self.rows, self.lr(), None, *(state[name] for name in STATE[:5]), terms
        )
        middle = state
        state = {name: x.clone() for name, x in self.state.items()}
        arguments = (*self.products, update[0], state["whiten"], state["transport"], state["exact"])
        plain.rebase_(*arguments, True, terms.tolerance)
        return update, middle, state

    def check(self, data: bytes) -> bytes:
        count, n, _ = self.grams.shape

        def take(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            nonlocal data
            size = dtype.itemsize * int(torch.tensor(shape).prod()) if shape else dtype.itemsize
            raw, data = data[:size], data[size:]
            return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)

        gate = take()
        carry, taken, apply, whiten = (take(count, n, n) for _ in range(4))
        second, shrink, escaped = take(count, n), take(count), take(count)
        steps = take(count, dtype=torch.int64)
        after = {"whiten": take(count, n, n), "transport": take(count, n, n), "exact": take(count, dtype=torch.int32)}
        update, middle, state = self.truth()
        if not update[0].isfinite():
            assert not gate.isfinite()
            for name, found in {"second": second, "escaped": escaped, "steps": steps, **after}.items():
                assert torch.equal(found, self.state[name]), name
            assert torch.equal(whiten, self.state["whiten"])
            return data
        close = {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(gate, update[0], **close)
        for found, want in ((second.sort(-1)[0], middle["second"].sort(-1)[0]), (shrink, update[4]),
                            (escaped, middle["escaped"])):  # fmt: skip
            torch.testing.assert_close(found, want, **close)
        assert torch.equal(steps, middle["steps"])

        def invariants(carry: Tensor, taken: Tensor, apply: Tensor, whiten: Tensor) -> list[Tensor]:
            found = [carry @ carry.mT, carry @ apply, taken @ apply, taken @ taken.mT, whiten @ whiten.mT]
            return [x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-300) for x in found]

        for found, want in zip(invariants(carry, taken, apply, whiten), invariants(*update[1:4], middle["whiten"])):
            torch.testing.assert_close(found, want, **close)
        assert torch.equal(after["exact"], state["exact"])

        def of_rebase(s: dict[str, Tensor]) -> list[Tensor]:
            w, p = s["whiten"], s["transport"]
            found = [w @ w.mT, w @ p, p.mT @ p]
            return [x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-300) for x in found]

        for found, want in zip(of_rebase(after), of_rebase(state)):
            torch.testing.assert_close(found, want, **close)
        return data


OPTIONS = (
    RiteOptions(escaped_mass=True, clip_grad=0.01),
    RiteOptions(second_moment="sum", relative_eps=True, weight_decay=0.1, skip_rms=0.02),
)


def case(rank: int, options: RiteOptions, zero_B: bool = False, steps: int = 2, **other) -> Case:
    """A group after some steps; its update's products are those of a small move."""
    problem = make(((20, 17),), rank, zero_B=zero_B)
    group = run(problem, steps, torch.float64, "plain", options)
    h = gram(group_grads(problem, group), group.wide, plain.other(group.whiten), impl="plain")
    eye = torch.eye(rank, dtype=torch.float64)
    moved = eye + 0.1 * torch.randn(2, rank, rank, dtype=torch.float64)
    grams, crosses = moved.mT @ moved, moved.mT
    if zero_B:
        # Gram matrices of a factor of lower rank itself.
        low = torch.randn(2, 2, rank, dtype=torch.float64)
        grams, crosses = low.mT @ low, low.mT @ low
    sizes = grams.diagonal(dim1=1, dim2=2).sum(-1)
    state = {name: getattr(group, name).clone() for name in STATE}
    state["exact"][:] = int(zero_B)
    return Case(options, h, group.rows, state, (grams.contiguous(), crosses.contiguous(), sizes), **other)


def cases() -> list[Case]:
    made = [case(rank, options) for rank in (1, 2, 5) for options in OPTIONS]
    # Vectors in global memory; no full rank; a Gram matrix that cannot be trusted; a gradient that is not finite.
    made += [case(5, OPTIONS[0], scratch=True), case(4, OPTIONS[1], zero_B=True)]
    weak = case(4, OPTIONS[0])
    weak.products[0][0] = torch.ones(4, 4) + 1e-7 * torch.eye(4)
    broken = case(3, OPTIONS[0])
    broken.grams[1, 0, 0] = float("nan")
    return [*made, weak, broken]


def solve(program: Path, folder: Path, given: list[Case], *flags: str):  # noqa: F811
    (folder / "cases").write_bytes(b"".join(c.pack() for c in given))
    done = execute(program, folder / "cases", folder / "results", *flags)
    return done, (folder / "results").read_bytes()


@under(MEMORY, source=SOURCE)
def test_agrees_and_is_clean(program, tmp_path):  # noqa: F811
    check(program, tmp_path, cases())


@under(THREAD, source=SOURCE)
def test_shows_no_race(program, tmp_path):  # noqa: F811
    check(program, tmp_path, [case(3, OPTIONS[0]), case(2, OPTIONS[1], zero_B=True)])


def check(program: Path, tmp_path: Path, given: list[Case]) -> None:  # noqa: F811
    done, results = solve(program, tmp_path, given)
    assert done.returncode == 0, done.stderr
    for c in given:
        results = c.check(results)
    assert results == b""


@under(MEMORY, source=SOURCE)
def test_several_warps(program, tmp_path):  # noqa: F811
    check(program, tmp_path, [case(10, OPTIONS[0])])


@under(THREAD, source=SOURCE)
@pytest.mark.parametrize("barrier", range(3))
def test_every_barrier_is_needed(program, tmp_path, barrier):  # noqa: F811
    """Of each of the three kernels its first ones."""
    assert breaks(lambda: solve(program, tmp_path, [case(4, OPTIONS[0])], "--skip-barrier", str(barrier))[0])
