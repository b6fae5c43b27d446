"""The files of a checkpoint in shards: torch.distributed.checkpoint, in its safetensors format.

One shard-*.safetensors of each rank, whose tensors are called "model.NAME" and "state.NAME". Which part of a tensor a
file holds is JSON in its header, in place of torch's .metadata file: nothing is unpickled.
"""

import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

Place = Callable[[str, torch.Size, torch.dtype], Tensor]
"""(name, global shape, dtype) -> the tensor to read into: a DTensor takes its rank's part."""


def write_shards(folder: Path, tensors: dict[str, Tensor], *, no_dist: bool) -> None:
    """Write this rank's part of `tensors`; all ranks call it. Of equal copies one rank writes one."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        # Without a group it says that it assumes a single process.
        warnings.simplefilter("ignore", UserWarning)
        dcp.save(tensors, storage_writer=writer, no_dist=no_dist)


def whole(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Read everything, into memory of the CPU."""
    return torch.empty(size, dtype=dtype)


def read_shards(
    path: Path, place: Place = whole, only: Collection[str] | None = None, *, no_dist: bool = True
) -> dict[str, dict[str, Tensor]]:
    """Tensors of a sharded checkpoint by kind ("model", "state") and name; `only` some kinds."""
    stored: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    state = {
        name: place(name, meta.size, meta.properties.dtype)
        for name, meta in stored.items()
        if only is None or name.partition(".")[0] in only
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=no_dist)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        kind, _, rest = name.partition(".")
        found.setdefault(kind, {})[rest] = tensor
    return found
