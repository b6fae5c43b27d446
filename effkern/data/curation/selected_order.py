"""Training on a selection first: the batches of SALT_DS."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effkern.data.curation.artifact import Artifact, open_artifact
from effkern.data.dataset import PackedDataset
from effkern.data.order import BatchOrder


class SelectedOrder(BatchOrder):
    """BatchOrder whose steps before `until` are of chosen windows alone, permuted anew for each time through them.

    Later steps are those of BatchOrder, so a window may come again.

    Args:
        selection: a step of kind "selection" (`effkern data select`), made from this split of `dataset` alone, with
            this seq_len.
        until: the first step that is of all windows.
        options: those of BatchOrder.

    Raises:
        ValueError: the selection was made from something else, is damaged, or does not fill a batch.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        split: str = "train",
        *,
        selection: str | Path | Artifact,
        until: int,
        **options: Any,
    ) -> None:
        super().__init__(dataset, split, **options)
        found = selection if isinstance(selection, Artifact) else open_artifact(selection, "selection")
        self.selection, self.until = found, until
        self.windows = _windows(found, dataset, split, self.seq_len)
        if len(self.windows) < self.batch_size:
            raise ValueError(
                f"selection must keep a batch of {self.batch_size} windows, got {len(self.windows)} in {found.path}"
            )

    def indices(self, step: int) -> NDArray[np.int64]:
        """Numbers of the windows in this process's rows of batch `step`."""
        if step >= self.until:
            return super().indices(step)
        return self.windows[self._draw(step, len(self.windows), f"selected:{self.seed}")]


def _windows(selection: Artifact, dataset: PackedDataset, split: str, seq_len: int) -> NDArray[np.int64]:
    sources = {name: value for name, value in selection.inputs.items() if name.startswith("source")}
    wanted = {"source0": f"{dataset.hash}:{split}:{seq_len}"}
    if sources != wanted:
        raise ValueError(
            f"selection must be made from {dataset.path} alone, split {split!r}, seq_len {seq_len}, "
            f"got {', '.join(sorted(selection.places.values()))} ({sources}): {selection.path}"
        )
    return selection.load("kept")
