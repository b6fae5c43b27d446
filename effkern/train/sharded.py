"""Checkpoints that all ranks write and any number of ranks reads.

The directory, its publication by one rename and the hashes in meta.json are those of effkern.train.checkpoint; in place
of model.safetensors and state.safetensors there are the files of effkern.train.shards.
"""

import shutil
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from effkern.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    file_hash,
    list_checkpoints,
    load_checkpoint,
    problem_of,
    publish,
    read_meta,
    staging,
    write_meta,
)
from effkern.train.parallel import Alone, RankError
from effkern.train.shards import Place, read_shards, write_shards


def save_sharded(root: Path, checkpoint: Checkpoint, keep_last: int, parallel: Alone) -> Path:
    """save_checkpoint of all ranks together: each writes and hashes its own part, rank 0 publishes.

    Raises:
        CheckpointError: one rank could not write, on every rank; what was there before is untouched.
    """
    tensors = {f"{kind}.{name}": t for kind, found in checkpoint.tensors.items() for name, t in found.items()}
    folder = root
    try:
        folder = parallel.on_main(lambda: staging(root, checkpoint.step))
        parallel.together(lambda: write_shards(folder, tensors, no_dist=parallel.world == 1))
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        own = parallel.together(
            lambda: {name: file_hash(folder / name) for name in files[parallel.rank :: parallel.world]}
        )
        hashes = {name: digest for part in parallel.gather(own) for name, digest in part.items()}
        return parallel.on_main(lambda: _finish(root, folder, checkpoint, hashes, keep_last))
    except (OSError, SafetensorError, CheckpointException, RankError, CheckpointError) as error:
        # It was raised on every rank; none goes on before what is left is gone.
        if folder != root:
            parallel.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
        if isinstance(error, CheckpointError):
            raise
        older = list_checkpoints(root)
        newest = f"the newest one is {older[-1]}" if older else "there is none before it"
        name = f"step-{checkpoint.step:08d}"
        raise CheckpointError(f"checkpoint {root / name} could not be written ({error}); {newest}") from error


def _finish(root: Path, folder: Path, checkpoint: Checkpoint, hashes: dict[str, str], keep_last: int) -> Path:
    write_meta(folder, checkpoint, hashes, layout="sharded")
    return publish(root, folder, checkpoint.step, keep_last)


def newest(root: Path, parallel: Alone) -> Checkpoint | None:
    """load_newest of all ranks together, without tensors: files are hashed by turns.

    Raises:
        CheckpointError: there are some and none is intact.
    """
    problems: dict[Path, str] = {}
    for path in reversed(parallel.on_main(lambda: list_checkpoints(root))):
        own = problem_of(path, part=(parallel.rank, parallel.world))
        found = next((text for text in parallel.gather(own) if text is not None), None)
        if found is None:
            meta = read_meta(path)
            return Checkpoint(meta["step"], {}, meta, path, problems)
        problems[path] = found
    if problems:
        raise CheckpointError("no checkpoint is intact, nothing was overwritten:\n  " + "\n  ".join(problems.values()))
    return None


def read(checkpoint: Checkpoint, place: Place, parallel: Alone) -> None:
    """Read the tensors of an intact checkpoint of either layout, each to where `place` says."""
    assert checkpoint.path is not None
    if checkpoint.data.get("layout") != "sharded":
        whole = load_checkpoint(checkpoint.path)
        for kind, found in whole.tensors.items():
            checkpoint.tensors[kind] = {}
            for name, tensor in found.items():
                target = place(f"{kind}.{name}", tensor.shape, tensor.dtype)
                checkpoint.tensors[kind][name] = _cut(tensor, target)
        return
    checkpoint.tensors = read_shards(checkpoint.path, place, no_dist=parallel.world == 1)


def _cut(tensor: Tensor, like: Tensor) -> Tensor:
    """The whole `tensor`, spread as `like` is."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None)
