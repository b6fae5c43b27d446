"""Batches by step number, read ahead by worker processes if asked for; a worker that dies costs time alone."""

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

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


class _Steps(Dataset[np.ndarray]):
    """Batch `step` as item `step`; a function of the step alone, so no worker has a state to lose."""

    def __init__(self, order: BatchOrder) -> None:
        self.order = order

    def __getitem__(self, step: int) -> np.ndarray:
        return self.order.batch(step)


class Feed:
    """Batches of `order` for steps up to `last`, asked for in order.

    With `workers` they come from a torch DataLoader. Where one of its processes dies, the loader is made again from the
    step that is missing, and `note` is told; after MOST_DEATHS in a row RuntimeError goes through.
    """

    def __init__(self, order: BatchOrder, last: int, workers: int) -> None:
        self._order, self._last, self._workers = order, last, workers
        self.note: Callable[[str], None] = print
        self._batches: Iterator[np.ndarray] | None = None
        self._next = -1

    def batch(self, step: int) -> np.ndarray:
        """int64 [rows, seq_len + 1]."""
        if self._workers == 0:
            return self._order.batch(step)
        deaths = 0
        while True:
            if self._batches is None or step != self._next:
                self._batches = self._start(step)
            try:
                found = next(self._batches)
            except RuntimeError as error:
                deaths += 1
                self._batches = None
                if deaths > MOST_DEATHS:
                    raise
                self.note(f"step {step}: data workers started again: {error}")
                continue
            self._next = step + 1
            return found

    def _start(self, step: int) -> Iterator[np.ndarray]:
        loader = DataLoader(
            _Steps(self._order),
            batch_size=None,
            sampler=range(step, self._last),
            num_workers=self._workers,
            multiprocessing_context="spawn",
            collate_fn=_as_it_is,
            worker_init_fn=_one_thread,
        )
        # The loader's own handler raises wherever the main thread is, in the middle of a step: a death is found when a
        # batch is asked for, which is soon enough.
        handler = signal.getsignal(signal.SIGCHLD)
        batches = iter(loader)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        return batches

    def close(self) -> None:
        """End the workers."""
        self._batches = None


def _as_it_is(batch: Any) -> Any:
    return batch


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
