"""What a peer is, how its result is checked, and how a family of peers is timed in turn.

A family is one op as several packages offer it: cases as data, the inputs of a case, references in float64, and one
`Peer` per implementation. Nothing is timed before its result was held against the reference its peer names; a peer
whose definition differs from all of them says how, and its step must at least be finite and move every parameter.
"""

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
from torch import Tensor

Problem = Any
"""The inputs of one case; every family has its own class."""

LEAST_SECONDS = 0.05
"""One timing repeats a shorter call for about as long."""


class Trial(NamedTuple):
    """A peer set up on the inputs of one case."""

    step: Callable[[], object]
    """What is timed."""
    result: Callable[[], list[Tensor]]
    """What the steps so far have made: a loss and its gradients, outputs, or parameters."""
    state: Callable[[], int] | None = None
    """Bytes that are kept between two steps."""
    turn: Callable[[int], None] | None = None
    """Sets the gradients of step 0, 1, ... while results are checked; when times are taken they stay as they are."""


@dataclass(frozen=True)
class Peer:
    name: str
    build: Callable[[Problem], Trial]
    """Imports the package; it may raise NotImplementedError where these inputs are not covered."""
    reference: str = "float64"
    """Which of the family's references it must equal; "" where its definition differs from all of them."""
    bound: float | None = None
    """Largest relative error, where it is not the family's, and why is said beside it."""
    differs: str = ""
    """How its definition differs; needed with reference=""."""
    package: str = ""
    """As pip knows it; "": torch or this package."""
    module: str = ""
    """What is imported of it, where that is not the package's name."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    why_not: str = ""
    """Said where the device is not one of these, or where no package of that name can be installed."""

    def __post_init__(self) -> None:
        if bool(self.reference) == bool(self.differs):
            raise ValueError(f"peers: {self.name!r} must have one of reference and differs")

    def missing(self, device: str) -> str:
        """Why it cannot run here; "" if it can."""
        if device not in self.devices:
            return self.why_not or f"needs one of {', '.join(self.devices)}, got {device}"
        if not self.package:
            return ""
        try:
            version(self.package)
        except PackageNotFoundError:
            return f"not installed: pip install --no-deps {self.package}"
        try:
            importlib.import_module(self.module or self.package.replace("-", "_"))
        # A package of others may fail at import with anything.
        except Exception as error:
            return f"{self.package} {version(self.package)} cannot be imported: {type(error).__name__}: {error}"
        return ""


@dataclass(frozen=True)
class Family:
    """One op and everybody who offers it."""

    name: str
    about: str
    cases: Callable[[bool], list[dict[str, Any]]]
    """Of the short run (True) and of the full one."""
    make: Callable[[dict[str, Any], str], Problem]
    """Inputs of a case on a device. The same case gives the same numbers."""
    small: dict[str, Any]
    """Sizes with which results are checked."""
    references: dict[str, Callable[[Problem], list[Tensor]]]
    peers: tuple[Peer, ...]
    bounds: dict[str, float] = field(default_factory=lambda: {"float32": 1e-5, "bfloat16": 2e-2})
    steps: int = 1
    """After so many steps the results are compared."""
    shared: bool = True
    """Whether all peers may use one set of inputs: not where a step writes them."""


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def wrong(family: Family, peer: Peer, case: dict[str, Any], device: str) -> str:
    """What is wrong with its result on a small case of the same kind; "" if nothing is."""
    problem = family.make({**case, **family.small}, device)
    trial = peer.build(problem)
    # Parameters are stepped in place.
    before = [t.detach().clone() for t in trial.result()] if not peer.reference else []
    for i in range(family.steps):
        if trial.turn is not None:
            trial.turn(i)
        trial.step()
    found = [t.detach() for t in trial.result()]
    if not all(torch.isfinite(t).all() for t in found):
        return "wrong result: not finite"
    if not peer.reference:
        still = sum(torch.equal(a, b) for a, b in zip(before, found))
        return f"wrong result: {still} of {len(found)} parameters did not move" if still else ""
    truth = family.references[peer.reference](family.make({**case, **family.small}, device))
    if len(truth) != len(found):
        return f"wrong result: {len(found)} tensors instead of {len(truth)}"
    errors = [relative_error(a, b) for a, b in zip(found, truth)]
    bound = peer.bound or family.bounds[case.get("dtype", "float32")]
    # A comparison with NaN is false.
    if all(error <= bound for error in errors):
        return ""
    return f"wrong result: relative error {max(errors):.1e} > {bound:.0e}"


def repeated(run: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """A function that lasts long enough to be timed, and how many calls it makes."""
    run()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    count = max(1, int(LEAST_SECONDS / (time.perf_counter() - start)))

    def many() -> None:
        for _ in range(count):
            run()

    return many, count


def is_ours(peer: Peer) -> bool:
    return peer.name.startswith("effkern")


def tried(peer: Peer, act: Callable[[], str]) -> str:
    """What `act` says, or why it could not: packages of others may fail with anything, this one may not."""
    try:
        return act()
    except NotImplementedError as error:
        return str(error)
    except Exception as error:
        if is_ours(peer):
            raise
        first = (str(error).splitlines() or [""])[0]
        return f"failed: {type(error).__name__}: {first}"


Measured = tuple[dict[str, runner.Timing], dict[str, dict[str, Any]], dict[str, str]]
"""Timings and further fields by peer, and why the others were left out."""


def measure(family: Family, case: dict[str, Any], device: str, rounds: int, only: list[str] | None = None) -> Measured:
    """All peers that can run, in turn, on the same inputs.

    Raises:
        SystemExit: an implementation of this package gives a wrong result.
    """
    runs: dict[str, tuple[Callable[[], object], int]] = {}
    extra: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    chosen = [peer for peer in family.peers if not only or peer.name in only]

    def leave_out(peer: Peer, reason: str) -> None:
        left_out[peer.name] = reason
        print(f"left out: {family.name}: {peer.name}: {reason}", file=sys.stderr, flush=True)

    for peer in chosen:
        reason = peer.missing(device) or tried(peer, lambda p=peer: wrong(family, p, case, device))  # type: ignore[misc]
        if reason.startswith("wrong") and is_ours(peer):
            raise SystemExit(f"{family.name}: {peer.name}: {reason}; nothing is timed")
        if reason:
            leave_out(peer, reason)
    # What was compiled for the small case would make the sizes of this one dynamic.
    torch.compiler.reset()
    common = family.make(case, device) if family.shared else None
    for peer in chosen:
        if peer.name in left_out:
            continue
        made: list[Trial] = []

        def start(peer: Peer = peer, made: list[Trial] = made) -> str:
            made.append(peer.build(common if family.shared else family.make(case, device)))
            runs[peer.name] = repeated(made[0].step)
            return ""

        if reason := tried(peer, start):
            leave_out(peer, reason)
            continue
        trial = made[0]
        extra[peer.name] = {"package": f"{peer.package} {version(peer.package)}"} if peer.package else {}
        if peer.differs:
            extra[peer.name]["differs"] = peer.differs
        if trial.state is not None:
            extra[peer.name]["state_mib"] = trial.state() / 2**20
        if device != "cpu":
            extra[peer.name]["peak_mib"] = runner.peak_device_memory(trial.step) / 2**20
    # Each has run twice by now.
    timings = runner.interleave({name: run for name, (run, _) in runs.items()}, rounds, warmup=0)
    single = {
        name: runner.Timing(*(seconds / runs[name][1] for seconds in (t.wall, t.wall_low, t.wall_high, t.cpu)))
        for name, t in timings.items()
    }
    return single, extra, left_out
