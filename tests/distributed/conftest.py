"""Groups of 2 and 4 gloo processes, started once each: starting them takes longer than all they do."""

from typing import Any

import pytest

from tests.distributed import count_worker, looped_worker, lora_worker, shampoo_worker, vocab_worker
from tests.distributed.spawn import spawn


def _work(rank: int, world: int) -> dict[str, Any]:
    looped = looped_worker.work(rank) if world == 2 else {}
    found = {**count_worker.work(rank, world), **vocab_worker.work(rank, world), **looped}
    return {**found, **lora_worker.work(rank, world), **shampoo_worker.work(rank, world)}


@pytest.fixture(scope="session", params=(2, 4), ids=lambda world: f"{world}-ranks")
def group(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What every rank of a group has found."""
    return spawn(request.param, _work)
