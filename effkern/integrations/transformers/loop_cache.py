"""Entries of transformers' cache for the loops of a span: those of loop 0 are the layers' own, the others come behind.

layer start + j in loop t > 0: entry num_layers + (t - 1) (stop - start) + j
"""

import copy
from typing import Any

from torch import Tensor

_MARK = "_effkern_loops"


class SpanCache:
    """The cache of one pass, with entries for every loop.

    Raises:
        ValueError: another span, number of loops or damping has filled it.
    """

    def __init__(
        self, cache: Any, start: int, stop: int, loops: int, num_layers: int, damping: int | None = None
    ) -> None:
        self.cache, self.start, self.width, self.num_layers = cache, start, stop - start, num_layers
        self._seen: set[tuple[int, int]] = set()
        mark = (start, stop, loops, damping)
        filled = len(cache.layers) > start and int(cache.get_seq_length(start)) > 0
        found = getattr(cache, _MARK, None)
        if filled and found != mark:
            what = "no loops" if found is None else _loops(*found)
            rule = f"be empty or filled by {_loops(*mark)}"
            raise ValueError(f"loop_layers: past_key_values must {rule}, got one filled with {what}")
        if found != mark:
            _grow(cache, start, stop, loops, num_layers)
            setattr(cache, _MARK, mark)
        # A loop that runs again has its own new keys alone: all there are, where nothing was stored and nothing is
        # preallocated.
        self.may_replay = not filled and not any(hasattr(layer, "max_cache_len") for layer in cache.layers)

    def of_loop(self, loop: int, index: int) -> "LoopCache | None":
        """What layer start + index gets in place of the cache; None in a loop that runs again for its gradient."""
        visit = (loop, index)
        if visit in self._seen:
            return None
        self._seen.add(visit)
        shift = 0 if loop == 0 else self.num_layers + (loop - 1) * self.width - self.start
        return LoopCache(self.cache, shift)


class LoopCache:
    """transformers' cache with entries that lie `shift` further."""

    def __init__(self, cache: Any, shift: int) -> None:
        self._cache, self._shift = cache, shift

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(key_states, value_states, layer_idx + self._shift, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self._cache.get_seq_length(layer_idx + self._shift)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _loops(start: int, stop: int, loops: int, damping: int | None) -> str:
    damped = "" if damping is None else f" with damping {damping}"
    return f"layers {start} to {stop - 1} in {loops} loops{damped}"


def _grow(cache: Any, start: int, stop: int, loops: int, num_layers: int) -> None:
    """Entries for the further loops, of the kind that their layers have; a cache that grows by itself needs none."""
    # What an empty cache had of another span.
    if len(cache.layers) > num_layers:
        del cache.layers[num_layers:]
    if cache.layer_class_to_replicate is not None:
        return
    if len(cache.layers) != num_layers:
        raise ValueError(f"loop_layers: past_key_values must have {num_layers} layers, got {len(cache.layers)}")
    for _ in range(loops - 1):
        cache.layers.extend(copy.deepcopy(layer) for layer in cache.layers[start:stop])
