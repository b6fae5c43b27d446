"""A long pass over examples, in parts that survive a stop."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effkern.data.curation.artifact import write_array

Progress = Callable[[int, int], None]


class Stopped(RuntimeError):
    """A stop was asked for; finished parts are kept, and the same call goes on."""


def run_parts(
    folder: Path,
    num_examples: int,
    part: int,
    batch: int,
    compute: Callable[[NDArray[np.int64]], NDArray],
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> NDArray:
    """compute(examples) of all examples, [num_examples, ...]; a part is written as soon as it is whole.

    Args:
        folder: of the step (see artifact.begin); parts in it are taken as they are.
        part: examples of a file: what is lost at most when the pass is killed.
        batch: examples of one call of `compute`.
        stop: asked before each batch.

    Raises:
        Stopped: `stop` said so.
    """
    found: list[NDArray] = []
    for number, first in enumerate(range(0, num_examples, part)):
        last = min(first + part, num_examples)
        file = folder / f".part-{number:06d}.npy"
        if file.exists():
            values = np.load(file, allow_pickle=False)
        else:
            pieces = []
            for start in range(first, last, batch):
                if stop():
                    raise Stopped(f"stopped after {first:,} of {num_examples:,} examples")
                pieces.append(compute(np.arange(start, min(start + batch, last), dtype=np.int64)))
                if progress:
                    progress(min(start + batch, last), num_examples)
            values = np.concatenate(pieces)
            write_array(file, values)
        if len(values) != last - first:
            raise ValueError(f"{file}: must hold {last - first} rows, got {len(values)}")
        found.append(values)
        if progress:
            progress(last, num_examples)
    return np.concatenate(found)
