"""Batches by step number, read ahead by worker processes if asked for; a worker that dies costs time alone."""

import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from effkern.data import BatchOrder, PackedDataset
from effkern.data.curation.selected_order import SelectedOrder
from effkern.train.config import TrainConfig
from effkern.train.schedules import teacher_steps

MOST_DEATHS = 3
"""Workers that may die one after another, without a batch between them."""


def order_of(config: TrainConfig, dataset: PackedDataset, rank: int, world: int) -> BatchOrder:
    """The batches of a run, this rank's part of each; with data.selection those of SALT_DS."""
    data = config.data
    sizes: dict[str, Any] = {
        "seq_len": data.seq_len, "batch_size": data.batch_size, "seed": data.seed, "rank": rank, "world_size": world,
    }  # fmt: skip
    if not data.selection:
        return BatchOrder(dataset, **sizes)
    until = teacher_steps(config.schedule) or config.schedule.steps
    return SelectedOrder(dataset, selection=data.selection, until=until, **sizes)


class Feed:
    """Batches of `order` for steps up to `last`, asked for in order.

    With `workers`, as many processes read ahead. Where one of them dies, all are started again from the step that is
    missing, and `note` is told; after MOST_DEATHS in a row RuntimeError is raised.
    """

    def __init__(self, order: BatchOrder, last: int, workers: int) -> None:
        self._order, self._last, self._workers = order, last, workers
        self.note: Callable[[str], None] = print
        self._readers: list[_Reader] = []
        self._first = self._next = -1

    def batch(self, step: int) -> np.ndarray:
        """int64 [rows, seq_len + 1]."""
        if self._workers == 0:
            return self._order.batch(step)
        deaths = 0
        while True:
            try:
                if not self._readers or step != self._next:
                    self._start(step)
                found = self._readers[(step - self._first) % self._workers].receive()
            except _Died as error:
                deaths += 1
                self.close()
                if deaths > MOST_DEATHS:
                    raise
                self.note(f"step {step}: data workers started again: {error}")
                continue
            self._next = step + 1
            return found

    def _start(self, first: int) -> None:
        self.close()
        self._first = first
        for worker in range(self._workers):
            self._readers.append(_Reader(self._order, range(first + worker, self._last, self._workers)))

    def close(self) -> None:
        """End the workers."""
        for reader in self._readers:
            reader.close()
        self._readers = []


class _Died(RuntimeError):
    pass


class _Reader:
    """A process that sends the batches of `steps` one after another; the pipe, when it is full, holds it up.

    Each has a pipe of its own, of which only it has the sending end: whatever it was doing when it died, a message
    half sent included, receive() meets the end of the pipe and waits for nothing. (Of a queue the other processes have
    that end, too, and half a message is waited for without an end.)
    """

    def __init__(self, order: BatchOrder, steps: range) -> None:
        context = get_context("spawn")
        self._pipe, sending = context.Pipe(duplex=False)
        self._process = context.Process(target=_send_batches, args=(sending, order, steps), daemon=True)
        try:
            self._process.start()
        except BrokenPipeError as error:
            raise self._died() from error
        finally:
            sending.close()

    def receive(self) -> np.ndarray:
        try:
            found = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(found, Exception):
            raise found
        return found

    def _died(self) -> _Died:
        self._process.join()
        return _Died(f"process {self._process.pid} ended with status {self._process.exitcode}")

    def close(self) -> None:
        self._pipe.close()
        # It has nothing to lose.
        self._process.kill()
        self._process.join()


def _send_batches(pipe: Connection, order: BatchOrder, steps: range) -> None:
    """In a process of its own. Batch `step` is a function of the step alone, so no worker has a state to lose."""
    # Ctrl-C is for the run, which still wants batches until it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # The run has ended, or was killed.
    with suppress(BrokenPipeError):
        for step in steps:
            try:
                pipe.send(order.batch(step))
            except BrokenPipeError:
                raise
            except Exception as error:
                pipe.send(error)
                return
