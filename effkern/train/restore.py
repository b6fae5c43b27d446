"""Between live training objects and checkpoints, and from checkpoints to models for other uses."""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

import effkern.models as models
from effkern.data import PackedDataset
from effkern.train.checkpoint import Checkpoint, CheckpointError, load_checkpoint, resolve_checkpoint
from effkern.train.config import FREE_ON_RESUME, TrainConfig
from effkern.train.mapping import differences, overlay
from effkern.train.state_codec import decode, encode

if TYPE_CHECKING:
    from effkern.train.shards import Place


class Stored(Protocol):
    """What of a model a checkpoint holds: the model itself, or its adapter."""

    def state_dict(self) -> dict[str, torch.Tensor]: ...


@dataclass
class RunState:
    """Counters of a run. The seconds cover all its processes, so they go on after a resume."""

    step: int = 0
    """Completed steps: the index of the next one."""
    tokens: int = 0
    skipped: int = 0
    nonfinite_in_a_row: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    timed_s: float = 0.0
    """Sum over the timed steps; the two below are parts of it."""
    loss_s: float = 0.0
    teacher_s: float = 0.0


@dataclass(frozen=True)
class Inputs:
    """What a run depends on beside its config, by hash."""

    dataset: str
    tokenizer: str
    teacher: str = ""
    labels: str = ""
    """Of the soft-label cache, where there is one in place of a teacher."""
    base: str = ""
    """Of the weights below an adapter."""
    selection: str = ""
    """Of the windows that the first steps draw from."""

    @staticmethod
    def of(dataset: PackedDataset) -> "Inputs":
        return Inputs(dataset.hash, dataset.manifest.tokenizer.sha256)


@dataclass
class LoadedModel:
    """A model read from a checkpoint."""

    model: models.Decoder
    step: int
    path: Path
    inputs: Inputs
    meta: dict[str, Any] = field(repr=False)

    @property
    def weights_hash(self) -> str:
        files = self.meta["files"]
        if "model.safetensors" in files:
            return files["model.safetensors"]
        return hashlib.sha256("".join(digest for _, digest in sorted(files.items())).encode()).hexdigest()


def snapshot(
    model: Stored, optimizer: torch.optim.Optimizer, state: RunState, config: TrainConfig, inputs: Inputs
) -> Checkpoint:
    """Everything a resumed run needs. The data order needs no state: it is a function of (data.seed, step)."""
    kept: dict[str, torch.Tensor] = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        kept["rng.cuda"] = torch.cuda.get_rng_state()
    optimizer_form = encode(optimizer.state_dict(), kept, "optimizer")
    data = {
        "config": asdict(config),
        "inputs": asdict(inputs),
        "data_order": {"seed": config.data.seed, "next_step": state.step},
        "state": asdict(state),
        "optimizer": optimizer_form,
        "versions": {"torch": torch.__version__},
    }
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    return Checkpoint(state.step, {"model": weights, "state": kept}, data)


def check_same_run(checkpoint: Checkpoint, config: TrainConfig, inputs: Inputs) -> None:
    """Raises CheckpointError listing every field in which the stored run differs; nothing is changed."""
    # A field that is newer than the run had its default.
    begun = overlay(TrainConfig(), checkpoint.data["config"], source=f"checkpoint {checkpoint.path}")
    wrong = differences(asdict(begun), config, FREE_ON_RESUME)
    stored = checkpoint.data["inputs"]
    for name in ("dataset", "tokenizer", "base", "selection"):
        if stored.get(name, "") != getattr(inputs, name):
            wrong.append(f"{name} (hash): {stored.get(name, '')[:12]} -> {getattr(inputs, name)[:12]}")
    # No teacher is loaded after the switch, so there is none to compare.
    for name, now in (("teacher", inputs.teacher), ("labels", inputs.labels)):
        if now and stored.get(name, "") != now:
            wrong.append(f"{name} (hash): {stored.get(name, '')[:12] or 'none'} -> {now[:12]}")
    if wrong:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} belongs to another run; nothing was overwritten. Stored -> now:\n  "
            + "\n  ".join(wrong)
            + "\nChoose another run.out, or --run.restart to throw the stored run away."
        )


def placement(model: Stored, optimizer: torch.optim.Optimizer) -> "Place":
    """Where the tensors of a checkpoint belong: weights and what the optimizer holds of their shape as they are cut,
    the rest whole."""
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def place(name: str, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        like = weights.get(name)
        if name.startswith("state.optimizer.state."):
            like = parameters[int(name.split(".")[3])]
        if like is not None and like.shape == size:
            return torch.empty_like(like, dtype=dtype, requires_grad=False)
        return torch.empty(size, dtype=dtype)

    return place


def restore(checkpoint: Checkpoint, model: Stored, optimizer: torch.optim.Optimizer) -> RunState:
    """Put a checkpoint's weights, optimizer state and RNG in place; returns its counters."""
    _copy_weights(checkpoint, model)
    kept = checkpoint.tensors["state"]
    optimizer.load_state_dict(decode(checkpoint.data["optimizer"], kept))
    torch.set_rng_state(kept["rng.cpu"].clone())
    if "rng.cuda" in kept and torch.cuda.is_available():
        torch.cuda.set_rng_state(kept["rng.cuda"].clone())
    return RunState(**checkpoint.data["state"])


def _copy_weights(checkpoint: Checkpoint, model: Stored) -> None:
    """Copy into the existing parameters, so that their memory is the allocator's and not a mapped file."""
    own, stored = model.state_dict(), checkpoint.tensors["model"]
    if own.keys() != stored.keys():
        names = sorted(own.keys() ^ stored.keys())
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: parameters must be those of the model, these are not: {names}"
        )
    for name, tensor in own.items():
        if tensor.shape != stored[name].shape:
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: {name} must have shape {tuple(tensor.shape)}, "
                f"got {tuple(stored[name].shape)}"
            )
        tensor.copy_(stored[name])


def load_model(path: str | Path, device: torch.device | str = "cpu") -> LoadedModel:
    """The model of a run directory (its newest intact checkpoint) or of a step directory, in eval mode.

    Raises:
        CheckpointError: there is no intact checkpoint.
    """
    folder = resolve_checkpoint(Path(path))
    checkpoint = load_checkpoint(folder, only=("model",))
    adapter = checkpoint.data["config"].get("lora", {}).get("rank", 0)
    if adapter:
        raise CheckpointError(
            f"checkpoint {folder} holds an adapter of rank {adapter} alone; the whole model is in "
            f"{folder.parent.parent / 'merged'}"
        )
    shape = checkpoint.data["config"]["model"]
    model = models.Decoder(overlay(models.DecoderConfig(), shape, source=f"checkpoint {folder}"))
    _copy_weights(checkpoint, model)
    inputs = Inputs(**checkpoint.data["inputs"])
    return LoadedModel(model.to(device).eval().requires_grad_(False), checkpoint.step, folder, inputs, checkpoint.data)


def load_teacher(config: TrainConfig, inputs: Inputs, device: torch.device) -> LoadedModel:
    """The teacher of a run.

    Raises:
        ValueError: none is named, or its tokenizer, vocabulary or length does not fit the student.
        CheckpointError: it cannot be read.
    """
    if not config.teacher.checkpoint:
        raise ValueError(
            f"teacher.checkpoint must name a trained model for schedule.mode={config.schedule.mode}, got ''"
        )
    loaded = load_model(config.teacher.checkpoint, device)
    if loaded.inputs.tokenizer != inputs.tokenizer:
        was, now = loaded.inputs.tokenizer[:12], inputs.tokenizer[:12]
        raise ValueError(f"teacher.checkpoint must have the tokenizer of data.path ({now}), got {was} in {loaded.path}")
    shape = loaded.model.config
    if shape.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"teacher.checkpoint must have vocab_size={config.model.vocab_size}, "
            f"got {shape.vocab_size} in {loaded.path}"
        )
    if shape.max_seq_len < config.data.seq_len:
        raise ValueError(
            f"teacher.checkpoint must have max_seq_len >= {config.data.seq_len}, "
            f"got {shape.max_seq_len} in {loaded.path}"
        )
    return loaded


def weights_digest(model: models.Decoder) -> str:
    """SHA-256 over names and bits of all parameters: equal for bit-identical models."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
