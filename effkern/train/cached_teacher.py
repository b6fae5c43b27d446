"""A soft-label cache in place of a live teacher: no forward pass and no weights in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from effkern.data import BatchOrder
from effkern.data.soft_labels import SoftLabelCache
from effkern.ops.distill import TeacherTopK
from effkern.train.config import TrainConfig


@dataclass(frozen=True)
class StepLabels:
    """The labels of one step's batch, on the device: ids and logprobs [batch * seq_len, K]."""

    ids: Tensor
    logprobs: Tensor
    kind: str
    seq_len: int

    def rows(self, first: int, count: int) -> TeacherTopK:
        """The target of sequences first ... first + count - 1 of the batch."""
        part = slice(first * self.seq_len, (first + count) * self.seq_len)
        return TeacherTopK(self.ids[part], self.logprobs[part], self.kind)


class CachedTeacher:
    """Opens config.teacher.cache and checks that it serves `steps` of `order`, before any of them runs.

    Raises:
        FileNotFoundError: no finished cache there.
        ValueError: it is damaged; tokenizer, dataset, packing, vocabulary or temperature differ; a step has a window
            without labels.
    """

    def __init__(self, config: TrainConfig, order: BatchOrder, steps: range, device: torch.device) -> None:
        path = config.teacher.cache
        self._cache = SoftLabelCache(path)
        self._order, self._device = order, device
        self._cache.check(order.dataset, seq_len=order.seq_len, split=order.split)
        spec = self._cache.spec
        if spec.temperature != config.teacher.temperature:
            raise ValueError(
                f"teacher.temperature must be that of teacher.cache, {spec.temperature}, for {path}, "
                f"got {config.teacher.temperature}"
            )
        if spec.vocab_size != config.model.vocab_size:
            raise ValueError(
                f"teacher.cache must have vocab_size={config.model.vocab_size}, got {spec.vocab_size} in {path}"
            )
        self._kind = config.teacher.cache_kind if spec.method == "topk" else spec.method
        if spec.method == "topk" and spec.k >= spec.vocab_size:
            # Nothing is left out: what the masses lack of 1 is rounding and no tail.
            self._kind = "truncated"
        self._check_steps(steps)

    def _check_steps(self, steps: range) -> None:
        if self._cache.spec.num_windows == self._order.num_windows:
            return
        for step in steps:
            missing = self._cache.missing(self._order.indices(step))
            if missing.size:
                raise ValueError(
                    f"teacher.cache must hold labels for steps {steps.start} to {steps.stop - 1}, got none for window "
                    f"{missing[0]} of step {step}: {self._cache.path} (data.seed, data.batch_size and the steps with a "
                    f"teacher must be those that it was made for)"
                )

    @property
    def hash(self) -> str:
        return self._cache.hash

    def labels(self, step: int) -> StepLabels:
        """Labels of the batch that `order` has at `step`."""
        found = self._cache.read(self._order.indices(step))
        ids = torch.from_numpy(found.ids).to(self._device)
        return StepLabels(ids, torch.from_numpy(found.logprobs).to(self._device), self._kind, self._order.seq_len)
