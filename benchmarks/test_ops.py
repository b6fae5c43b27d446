"""One small case of every op for pytest-benchmark: pytest benchmarks/ [-k OP] [--benchmark-autosave] ...

Not part of the tests: `pytest` alone does not come here. Results are checked before the first timing of a case. A
group is one case; variants of torch.compile take tens of seconds to compile and run with -m "slow or not slow".
"""

from functools import cache
from typing import Any

import pytest

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch

from benchmarks import harness, suite
from benchmarks.case import Case, Prepared, WrongResult

COMPILED = ("torch.compile", "compile", "liger chunked (compiled)")


def parameters() -> list[Any]:
    found = []
    for name in suite.SMALL:
        op = suite.load(name)
        for variant in op.variants:
            if variant not in op.optional:
                marks = [pytest.mark.slow] if variant in COMPILED else []
                found.append(pytest.param(name, variant, id=f"{name}-{variant}", marks=marks))
    return found


def small_case(name: str) -> tuple[Case, int]:
    """The case, and its threads."""
    op = suite.load(name)
    a = harness.parse(op, suite.SMALL[name].split())
    (case,) = harness.cases_of(op, a)
    return case, a.threads


@cache
def checked(name: str) -> Case:
    case, _ = small_case(name)
    suite.load(name).check(case)
    return case


@pytest.fixture(autouse=True)
def _quiet():
    before = torch.get_num_threads()
    runner.keep_memory()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "variant"), parameters())
def test_speed(name: str, variant: str, benchmark: Any) -> None:
    op = suite.load(name)
    torch.set_num_threads(small_case(name)[1] or torch.get_num_threads())
    try:
        case = checked(name)
    except WrongResult as error:
        pytest.fail(str(error))
    except SystemExit as error:
        pytest.skip(str(error))
    prepared: Prepared = harness.prepare(op, case, [variant])
    if variant not in prepared.variants:
        pytest.skip(f"{variant} does not cover {harness.title(case)}")
    run = prepared.variants[variant]

    def finished() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.group = f"{name}: {harness.title(case)}"
    work = op.work_of(case, variant)
    benchmark.extra_info.update({"case": case, "threads": torch.get_num_threads(), **runner.machine()})
    if work is not None:
        benchmark.extra_info.update({"bytes": int(work.bytes), "flops": int(work.flops), "flop_dtype": work.dtype})
    benchmark(finished)
