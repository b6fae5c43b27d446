"""LoRARite over several processes against one: every process has the same product, and state is cut by rows."""

import pytest
import torch

from tests.distributed.lora_worker import alone
from tests.numerics import rel_err


@pytest.fixture(scope="module")
def truth():
    return alone()


def close(found, wanted):
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_ddp(group, truth):
    for found in group:
        close(found["lora-ddp"], truth["six"])
        for mine, first in zip(found["lora-ddp"], group[0]["lora-ddp"]):
            assert torch.equal(mine, first)


@pytest.mark.parametrize("cut", ["lora-fsdp", "lora-fsdp-rows"])
def test_fsdp(group, truth, cut):
    """Six steps, a state_dict, two more steps: with the state as it was and as it was loaded, bit for bit the same."""
    for found in group:
        close(found[cut]["factors"], truth["eight"])
        for mine, again in zip(found[cut]["factors"], found[cut]["resumed"]):
            assert torch.equal(mine, again)
    assert sum(found[cut]["local"] for found in group) == group[0][cut]["all"]
    assert max(found[cut]["local"] for found in group) < 0.7 * group[0][cut]["all"]


def test_a_factor_that_is_whole_on_every_process(group, truth):
    for found in group:
        close(found["lora-pair"], truth["pair"])


def test_bfloat16_and_a_nan_on_one_process(group, truth):
    """Masters cut by rows, parameters along the rank; what one process alone has seen stops the step of all."""
    for found in group:
        low = found["lora-low"]
        for got, master, want in zip(low["found"], low["masters"], truth["low"]):
            assert torch.equal(got, master.bfloat16())
            # Six steps of float32 sums in another order.
            assert rel_err(master, want.double()) < 1e-5
        assert low["untouched"]
        assert rel_err(low["doubled"], 2 * low["masters"][1].double()) < 0.1
        assert low["steps"] == 6


def test_a_mesh_of_replicas_and_shards(group, truth):
    if len(group) != 4:
        pytest.skip("needs 4 ranks")
    for found in group:
        close(found["lora-pair-2d"], truth["pair"])
