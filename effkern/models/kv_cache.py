"""Keys and values of earlier positions, one slot per application of an attention layer or fewer (kv_policy).

Shape letters: B batch, R rows of it that still run, T new positions, K key/value heads, D head size.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from effkern.models.config import DecoderConfig
from effkern.models.kv_policy import KVPolicy
from effkern.models.stages import Stage


class Rows(NamedTuple):
    """Which sequences of the cache's batch a pass is about. None stands for all."""

    compute: Tensor | None = None
    """Those that the new keys belong to, int64 [R]."""
    write: Tensor | None = None
    """Positions in `compute` whose keys are kept, where not all are: the others have exited."""
    span: tuple[int, int] | None = None
    """The first and one past the last of `compute`, on the host."""

    @staticmethod
    def of(compute: Tensor) -> "Rows":
        """The rows `compute`, ascending and at least one. Waits for the device."""
        first, last = compute[[0, -1]].tolist()
        return Rows(compute, span=(first, last + 1))


ALL = Rows()

# Attention over rows that have left reads their keys once; taking the others out reads, writes and reads again.
_GATHER = 3


class Extended(NamedTuple):
    """What new positions attend to."""

    keys: Tensor
    values: Tensor
    past: int
    """How many of them come from earlier passes; all of those are visible."""
    rows: Tensor | None = None
    """Not None: the keys are of more sequences than the queries, which are numbers `rows` of them."""


class KVSlot(Protocol):
    """What an attention layer needs of a cache."""

    def extend(self, key: Tensor, value: Tensor) -> Extended:
        """Keep the keys and values of new positions, and return them behind those of earlier passes."""


class LayerCache:
    """Keys and values of one slot: [B, K, positions, D]."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def write(self, start: int, key: Tensor, value: Tensor, rows: Rows) -> None:
        """Positions start ... start + T - 1 of `rows`; a second write takes the place of the first."""
        stop = start + key.shape[2]
        for stored, new in ((self.keys, key), (self.values, value)):
            where, new = _kept(rows, new)
            if where is None:
                stored[:, :, start:stop] = new
            else:
                stored[where, :, start:stop] = new.to(stored.dtype)

    def read(self, stop: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Positions 0 ... stop - 1: views for the whole batch, copies for rows of it."""
        keys, values = self.keys[:, :, :stop], self.values[:, :, :stop]
        return (keys, values) if rows.compute is None else (keys[rows.compute], values[rows.compute])


class Ring(LayerCache):
    """Keys and values of the last positions, in any order: attention does not look at it."""

    def write(self, start: int, key: Tensor, value: Tensor, rows: Rows) -> None:
        first, places = _places(self.keys.shape[2], start, start + key.shape[2], key.device)
        for stored, new in ((self.keys, key), (self.values, value)):
            where, new = _kept(rows, new[:, :, first - start :])
            if where is None:
                stored[:, :, places] = new.to(stored.dtype)
            else:
                stored[where[:, None], :, places] = new.transpose(1, 2).to(stored.dtype)


def _places(size: int, start: int, stop: int, device: torch.device) -> tuple[int, Tensor]:
    """Of positions start ... stop - 1 the first that a ring of `size` keeps, and where those from it on go."""
    first = max(start, stop - size)
    return first, torch.arange(first, stop, device=device) % size


def _kept(rows: Rows, new: Tensor) -> tuple[Tensor | None, Tensor]:
    """The rows of the batch to write, and what. Earlier passes are constants to autograd."""
    new = new.detach()
    if rows.write is None:
        return rows.compute, new
    return (rows.write if rows.compute is None else rows.compute[rows.write]), new[rows.write]


class _Full:
    """A slot that holds all positions."""

    def __init__(self, layer: LayerCache, start: int, rows: Rows) -> None:
        self.layer, self.start, self.rows = layer, start, rows

    def extend(self, key: Tensor, value: Tensor) -> Extended:
        self.layer.write(self.start, key, value, self.rows)
        if self.start == 0 or self.rows.write is not None or key.requires_grad:
            # Behind an empty past the new keys are all there are; a row that has exited keeps its old ones; and
            # gradients go through the new ones alone.
            return _behind((self.layer.read(self.start, self.rows),), key, value, self.start)
        stop, rows = self.start + key.shape[2], self.rows
        if rows.compute is not None and rows.span is not None and key.shape[2] == 1:
            first, end = rows.span
            if end - first < _GATHER * len(rows.compute):
                keys, values = (x[first:end, :, :stop] for x in (self.layer.keys, self.layer.values))
                return Extended(keys, values, self.start, rows.compute - first)
        return Extended(*self.layer.read(stop, rows), self.start)


class _Window:
    """A loop's own ring for the last positions, the shared slot for older ones."""

    def __init__(self, shared: LayerCache, ring: Ring, start: int, rows: Rows) -> None:
        self.shared, self.ring, self.start, self.rows = shared, ring, start, rows

    def extend(self, key: Tensor, value: Tensor) -> Extended:
        near = min(self.start, self.ring.keys.shape[2])
        past = (self.shared.read(self.start - near, self.rows), self.ring.read(near, self.rows))
        extended = _behind(past, key, value, self.start)
        self.shared.write(self.start, key, value, self.rows)
        self.ring.write(self.start, key, value, self.rows)
        return extended


def _behind(past: tuple[tuple[Tensor, Tensor], ...], key: Tensor, value: Tensor, length: int) -> Extended:
    """New keys and values behind parts of earlier ones, `length` positions together."""
    if length == 0:
        return Extended(key, value, 0)
    keys, values = (
        torch.cat([*(part[i].to(new.dtype) for part in past), new], dim=2) for i, new in enumerate((key, value))
    )
    return Extended(keys, values, length)


class StageCache:
    """The slots of one stage: [slot][layer], and the rings of a window, [loop][layer]."""

    def __init__(
        self, stage: Stage, policy: KVPolicy, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.stage, self.policy = stage, policy
        batch, heads, _, width = shape
        slots, rings = policy.num_slots(stage.loops), policy.num_rings(stage.loops)
        full = (slots, stage.layers, *shape)
        near = (rings, stage.layers, batch, heads, policy.size, width)
        # Keys and values, [slot, layer, B, K, positions, D].
        self._full = [torch.zeros(full, device=device, dtype=dtype) for _ in range(2)]
        self._near = [torch.zeros(near, device=device, dtype=dtype) for _ in range(2)]
        layers = range(stage.layers)
        self.slots = [[LayerCache(*(x[s, i] for x in self._full)) for i in layers] for s in range(slots)]
        self.rings = [[Ring(*(x[s, i] for x in self._near)) for i in layers] for s in range(rings)]

    @property
    def layers(self) -> list[LayerCache]:
        return [layer for group in self.slots for layer in group] + [ring for group in self.rings for ring in group]

    def views(self, loop: int, start: int, rows: Rows = ALL) -> list[KVSlot]:
        """One slot per layer for the pass that begins at position `start`, in its loop `loop`."""
        slots = self.slots[self.policy.slot(loop)]
        # The last loop's own keys are those of the shared slot.
        if loop < len(self.rings):
            return [_Window(slot, ring, start, rows) for slot, ring in zip(slots, self.rings[loop])]
        return [_Full(slot, start, rows) for slot in slots]

    def fill(self, ran: int, start: int, stop: int, rows: Tensor) -> None:
        """Positions start ... stop - 1 of `rows` have exited after `ran` loops: later loops find their last one."""
        source = self.policy.slot(ran - 1)
        # Loops take slots in order, so those that no loop has written yet come last.
        written = 1 + max(self.policy.slot(loop) for loop in range(ran))
        for full, near in zip(self._full, self._near):
            # [layer, R, K, T, D]
            last = full[source][:, rows, :, start:stop]
            if written < len(full):
                full[written:, :, rows, :, start:stop] = last
            if ran < len(near):
                first, places = _places(near.shape[4], start, stop, rows.device)
                # [R, T, 1, layer, K, D], which is the order of the indexed side.
                new = last[:, :, :, first - start :].permute(1, 3, 0, 2, 4)[:, :, None]
                near[ran:, :, rows[:, None], :, places] = new


class KVCache:
    """The caches of all stages, for `batch` sequences of up to `max_len` tokens that have run through together.

    Memory: bytes_per_token for each of batch * max_len tokens (a window's rings: `size` positions instead of max_len).
    """

    def __init__(
        self,
        config: DecoderConfig,
        stages: Sequence[Stage],
        batch: int,
        max_len: int,
        device: torch.device,
        dtype: torch.dtype,
        policy: str | KVPolicy = "full",
    ) -> None:
        self.policy = KVPolicy.parse(policy)
        self.batch, self.max_len, self.length = batch, max_len, 0
        self.shape = (config.num_kv_heads, config.head_size)
        shape = (batch, config.num_kv_heads, max_len, config.head_size)
        plain = KVPolicy("full")
        self.stages = [
            StageCache(stage, self.policy if stage.looped else plain, shape, device, dtype) for stage in stages
        ]

    @property
    def layers(self) -> list[LayerCache]:
        """All slots in the order of the layers that use them first."""
        return [layer for stage in self.stages for layer in stage.layers]

    @property
    def loops(self) -> tuple[int, ...]:
        return tuple(stage.stage.loops for stage in self.stages)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Slots * layers * 2 * key/value heads * head size * bytes of a number, over the stages; rings apart."""
        return sum(2 * layer.keys[0, :, 0].nbytes for stage in self.stages for group in stage.slots for layer in group)

    def begin(self, length: int) -> int:
        """Room for `length` new positions; returns where they start.

        Raises:
            ValueError: there is none.
        """
        if self.length + length > self.max_len:
            raise ValueError(f"LayerCache: positions must be at most {self.max_len}, got {self.length + length}")
        return self.length

    def check(self, config: DecoderConfig, stages: Sequence[Stage], batch: int) -> None:
        """
        Raises:
            ValueError: the cache was made for another model, number of loops or batch.
        """
        shape = (config.num_kv_heads, config.head_size)
        layers, own = tuple(s.layers for s in stages), tuple(s.stage.layers for s in self.stages)
        if (shape, layers) != (self.shape, own):
            raise ValueError(
                f"Decoder: cache must be for (key/value heads, head size) {shape} and stages of {layers} layers, "
                f"got one for {self.shape} and {own}"
            )
        loops = tuple(s.loops for s in stages)
        if loops != self.loops:
            raise ValueError(f"Decoder: cache must be for {loops} loops of the stages, got one for {self.loops}")
        if batch != self.batch:
            raise ValueError(f"Decoder: cache must be for a batch of {batch}, got one for {self.batch}")
