"""Batches from worker processes: in order, whatever happens to the processes."""

import time

import numpy as np
import psutil
import pytest

from effkern.train import feed as module
from effkern.train.feed import Feed


class Order:
    """Batch `step` holds the step, and is larger than a pipe."""

    def batch(self, step):
        if step == 11:
            raise FileNotFoundError("tokens.bin is gone")
        return np.full((32, 1025), step, np.int64)


class Deadly:
    def batch(self, step):
        psutil.Process().kill()


def workers():
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_a_worker_killed_in_the_middle_of_a_batch_costs_no_batch():
    feed, notes = Feed(Order(), 50, 2), []
    feed.note = notes.append
    try:
        for step in range(4):
            assert (feed.batch(step) == step).all()
        # Both have sent as much of the next one as a pipe takes, and wait.
        deadline = time.monotonic() + 60
        while any(child.status() != psutil.STATUS_SLEEPING for child in workers()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        victim = workers()[0]
        victim.kill()
        for step in range(4, 11):
            assert (feed.batch(step) == step).all()
        assert len(notes) == 1
        assert f"data workers started again: process {victim.pid} ended with status -9" in notes[0]
        # What goes wrong in reading comes through as what it is.
        with pytest.raises(FileNotFoundError, match=r"tokens\.bin is gone"):
            feed.batch(11)
    finally:
        feed.close()
    assert workers() == []


def test_workers_that_die_again_and_again_end_the_run(monkeypatch):
    monkeypatch.setattr(module, "MOST_DEATHS", 1)
    feed, notes = Feed(Deadly(), 50, 1), []
    feed.note = notes.append
    with pytest.raises(RuntimeError, match=r"process \d+ ended with status -9"):
        feed.batch(7)
    assert len(notes) == 1
    assert workers() == []
