"""torch.use_deterministic_algorithms(True): every op runs, and gives the same bits again."""

import pytest
import torch
from torch import Tensor

from tests.ops.op_calls import CALLS, CASES, IDS, Make

# Their docstrings say that the number of threads makes no difference.
FOR_ANY_THREADS = ("looped_linear_attention", "mean_pool", "batched_eigh", "lora_rite")
PROMISED = [name for name, impl in CASES if impl == "cpp" and name.startswith(FOR_ANY_THREADS)]


@pytest.fixture(autouse=True)
def _strict():
    """Not with warnings alone: an operator of torch without a deterministic form raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def bits(name: str, impl: str, extra: int = 0) -> list[Tensor]:
    return [x.nan_to_num(7.0) for x in CALLS[name].run(Make(extra=extra), impl)]


# Triton's interpreter takes its time.
EVERY = [pytest.param(*case, id=i, marks=[pytest.mark.slow] * (case[1] == "triton")) for case, i in zip(CASES, IDS)]


@pytest.mark.parametrize(("name", "impl"), EVERY)
def test_the_same_bits_again(name, impl):
    assert all(map(torch.equal, bits(name, impl), bits(name, impl)))


@pytest.mark.parametrize("name", PROMISED)
def test_the_same_bits_for_any_number_of_threads(name):
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(bits(name, "cpp", extra=100 if "eigh" in name else 700))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_what_torch_itself_refuses_is_seen_here():
    """That the mode is on, and strict."""
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.nn.functional.max_unpool2d(torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64), 1)
