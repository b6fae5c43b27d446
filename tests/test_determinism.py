"""torch.use_deterministic_algorithms(True): every op runs, and gives the same bits again."""

import pytest
import torch

from tests.ops.op_calls import CALLS, CASES, IDS, Make


@pytest.fixture(autouse=True)
def _strict():
    """Not with warnings alone: an operator of torch without a deterministic form raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def bits(run) -> list[torch.Tensor]:
    return [x.nan_to_num(7.0) for x in run]


@pytest.mark.parametrize(("name", "impl"), CASES, ids=IDS)
def test_the_same_bits_again(name, impl):
    first, again = (bits(CALLS[name].run(Make(), impl)) for _ in range(2))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize(("name", "impl"), CASES, ids=IDS)
def test_thread_counts(name, impl):
    if impl == "triton":
        pytest.skip("one thread")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(bits(CALLS[name].run(Make(extra=100 if "jacobi" in name else 700), impl)))
    finally:
        torch.set_num_threads(before)
    same = all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    print("THREADCOUNT", name, impl, same)
