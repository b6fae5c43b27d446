"""Ops, modules and optimizers in several Python threads at once: bit for bit what one thread alone computes."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effkern
from effkern.models import Decoder, DecoderConfig
from effkern.nn import LaurelResidual, LoopedBlock
from effkern.nn.lora import inject_lora
from effkern.ops import addresses
from effkern.optim import LoRARite, OneSidedShampoo, Shampoo, create
from tests.ops.op_calls import CALLS, CASES, Make

# Triton's interpreter has one state for the whole process.
THREADED = [(name, impl) for name, impl in CASES if impl != "triton"]
THREADS, ROUNDS = 4, 3


@pytest.fixture(autouse=True)
def _often_switched():
    """Threads change places every few instructions instead of every 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of the jobs, each in a thread of its own, all let go at one moment."""
    gate, results = threading.Barrier(len(jobs)), [None] * len(jobs)
    errors: list[BaseException] = []

    def work(i: int) -> None:
        gate.wait()
        try:
            results[i] = jobs[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return results


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected)):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), i


@pytest.mark.parametrize(("name", "impl"), THREADED, ids=[f"{n}-{i}" for n, i in THREADED])
def test_an_op_in_threads(name, impl):
    """Half of the threads have the same shapes and values, the others shapes of their own."""
    sizes = [0, 0, 1, 13][:THREADS]
    run = CALLS[name].run
    expected = [run(Make(extra=extra), impl) for extra in sizes]
    found = at_once([lambda extra=extra: [run(Make(extra=extra), impl) for _ in range(ROUNDS)] for extra in sizes])
    for rounds, truth in zip(found, expected):
        for outputs in rounds:
            assert_same(outputs, truth)


def test_all_ops_at_once():
    jobs = [lambda c=c: CALLS[c[0]].run(Make(), c[1]) for c in THREADED]
    expected = [job() for job in jobs]
    for found, truth in zip(at_once(jobs), expected):
        assert_same(found, truth)


def shared_modules() -> dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], Callable[[int], Tensor]]]:
    torch.manual_seed(0)
    laurel = LaurelResidual(16, "rw+lr", rank=3)
    looped = LoopedBlock(nn.Sequential(nn.Linear(16, 16), nn.Tanh()), 3, dim=16, injection="add", norm=True)
    decoder = Decoder(
        DecoderConfig(
            vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, mlp_size=24, max_seq_len=16
        )
    )

    def wide(seed: int) -> Tensor:
        return torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))

    def tokens(seed: int) -> Tensor:
        return torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(seed))

    return {
        "laurel": (laurel, lambda m, x: m(x.sin(), x).y, wide),
        "looped": (looped, lambda m, x: m(x), wide),
        "decoder": (decoder, lambda m, x: m(x), tokens),
    }


@pytest.mark.parametrize("name", shared_modules())
def test_a_module_shared_by_threads(name):
    """Forward and gradients of one module for several batches."""
    module, call, batch = shared_modules()[name]
    trained = [p for p in module.parameters() if p.requires_grad]

    def job(seed: int) -> list[Tensor]:
        y = call(module, batch(seed))
        return [y.detach(), *torch.autograd.grad(y.square().sum(), trained, allow_unused=False)]

    expected = [job(seed) for seed in range(THREADS)]
    for _ in range(4 * ROUNDS):
        for found, truth in zip(at_once([lambda s=s: job(s) for s in range(THREADS)]), expected):
            assert_same(found, truth)


class Meeting(nn.Module):
    """Where it is run again in backward, a thread shows that it is there, and gives another one the time to come."""

    def __init__(self, own: threading.Event, other: threading.Event) -> None:
        super().__init__()
        self.own, self.other = own, other

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.own.set()
            self.other.wait(0.3)
        return x.clone()


def test_blocks_that_share_a_weight_keep_its_hooks():
    """Two blocks with first parameters of their own and one hooked weight, each in a thread: one after the other."""
    torch.manual_seed(0)
    shared, calls = nn.Linear(4, 4), []
    shared.weight.register_hook(lambda grad: calls.append(1) or 2 * grad)
    here, there = threading.Event(), threading.Event()
    blocks = [
        LoopedBlock(nn.Sequential(nn.Linear(4, 4), shared, Meeting(*events)), 2, dim=4)
        for events in ((here, there), (there, here))
    ]
    x = torch.randn(3, 4)

    def job(block: LoopedBlock) -> list[Tensor]:
        return list(torch.autograd.grad(block(x).square().sum(), [shared.weight, *block.core[0].parameters()]))

    here.set(), there.set()
    expected = [job(block) for block in blocks]
    here.clear(), there.clear(), calls.clear()
    for found, truth in zip(at_once([lambda b=b: job(b) for b in blocks]), expected):
        assert_same(found, truth)
    assert calls == [1, 1]
    assert len(shared.weight._backward_hooks) == 1


FORK = """
import os, signal, threading
import torch
from effkern.nn import LoopedBlock
from effkern.nn.looped.hooks import hooks_aside
from effkern.ops import addresses
core = torch.nn.Linear(4, 4)
block, x = LoopedBlock(core, 2, dim=4), torch.ones(1, 4)
held, done = threading.Event(), threading.Event()

def hold():
    with hooks_aside(list(core.parameters())):
        held.set()
        done.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if not child:
    signal.alarm(20)
    block(x).sum().backward()
    assert addresses.table([1, 2], torch.device("cpu")).tolist() == [1, 2]
    os._exit(7)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
done.set()
thread.join()
block(x).sum().backward()
assert addresses.table([1, 2], torch.device("cpu")).tolist() == [1, 2]
print(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="is about fork")
def test_a_forked_process_waits_for_no_thread_of_its_parent():
    """A worker that a DataLoader forks while another thread is in the backward of a block."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], cwd=Path(__file__).parents[1], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "7\n"


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "OneSidedShampoo": lambda m: OneSidedShampoo(m.parameters(), lr=0.01),
    "Shampoo": lambda m: Shampoo(m.parameters(), lr=0.01),
    "create shampoo": lambda m: create("shampoo", m, lr=0.01),
    "LoRARite": lambda m: LoRARite(m, lr=0.01),
    "create lora_rite": lambda m: create("lora_rite", m, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_in_threads(name):
    """Each thread trains a model of its own, in a width of its own."""

    def train(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(8 + seed % 2, 12), nn.Tanh(), nn.Linear(12, 6))
        if "lora" in name.lower():
            inject_lora(model, ["0", "2"], rank=2)
        for p in model.parameters():
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
        optimizer = OPTIMIZERS[name](model)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(16, 8 + seed % 2, generator=generator)).square().sum().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    expected = [train(seed) for seed in range(THREADS)]
    for found, truth in zip(at_once([lambda s=s: train(s) for s in range(THREADS)]), expected):
        assert_same(found, truth)


def test_tables_of_addresses_are_asked_for_by_threads(monkeypatch):
    """So few are kept that threads throw out each other's."""
    monkeypatch.setattr(addresses, "_TABLES", {})
    monkeypatch.setattr(addresses, "_MOST", 2)

    def ask(first: int) -> None:
        for i in range(200):
            numbers = [(first + i) % 5, i % 3]
            assert addresses.table(numbers, torch.device("cpu")).tolist() == numbers

    at_once([lambda n=n: ask(n) for n in range(8)])
    assert len(addresses._TABLES) <= 2


FIRST_CALLS = """
import sys, threading
import torch
torch.set_num_threads(1)
from tests.ops.op_calls import CASES, CALLS, Make
sys.setswitchinterval(1e-6)
cases = [c for c in CASES if c[1] != "triton"]
gate, found, errors = threading.Barrier(8), [None] * 8, []

def work(i):
    gate.wait()
    try:
        # Nothing has been called yet: native modules, caches, implementations are all found now.
        found[i] = [CALLS[name].run(Make(), "auto" if i % 2 else impl) for name, impl in cases]
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for t in threads: t.start()
for t in threads: t.join()
if errors: raise errors[0]
for kind in (0, 1):
    for other in found[kind + 2 :: 2]:
        for a, b in zip(found[kind], other):
            assert all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))
print(len(cases))
"""


def test_first_calls_of_a_process_raced_by_threads():
    root = Path(__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST_CALLS], cwd=root, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(THREADED)


LAZY = """
import sys, threading
import effkern
sys.setswitchinterval(1e-6)
gate, errors = threading.Barrier(8), []

def work(i):
    gate.wait()
    try:
        for name in ("optim", "nn", "models")[i % 3 :] + ("optim", "nn", "models")[: i % 3]:
            getattr(effkern, name)
        assert effkern.optim.Shampoo is not None and effkern.nn.LoopedBlock is not None
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for t in threads: t.start()
for t in threads: t.join()
if errors: raise errors[0]
"""


def test_parts_of_the_package_imported_by_threads():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LAZY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert effkern.nn is not None
