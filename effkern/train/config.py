"""What a training run is, as data. Every rule that needs no other section is checked when a section is made."""

from dataclasses import dataclass, field
from typing import Any, Literal

from effkern.models import DecoderConfig


def _require(section: str, name: str, holds: bool, rule: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{section}.{name} must {rule}, got {value!r}")


CACHE_KINDS = ("truncated", "renormalized", "both_renormalized", "tail_bucket", "tail_to_label", "uniform_tail")


@dataclass(frozen=True)
class TeacherConfig:
    """The small model that stage 1 learns from."""

    checkpoint: str = ""
    """A run directory (its newest checkpoint) or one step directory. Its tokenizer must be the student's."""
    cache: str = ""
    """A cache made by `effkern data soft-labels`, in place of a live teacher: give one of the two."""
    cache_kind: Literal[
        "truncated", "renormalized", "both_renormalized", "tail_bucket", "tail_to_label", "uniform_tail"
    ] = "tail_bucket"
    """What a top-k cache is taken to say of the ids it does not hold (effkern.TeacherTopK)."""
    temperature: float = 1.0
    """Divides the teacher's logits; below 1 sharpens. A cache must have been made at this temperature."""
    student_temperature: float = 1.0
    """Divides the student's logits in the distillation term."""

    def __post_init__(self) -> None:
        for name in ("temperature", "student_temperature"):
            _require("teacher", name, getattr(self, name) > 0, "be positive", getattr(self, name))
        one = not (self.cache and self.checkpoint)
        _require("teacher", "cache", one, f"be empty where teacher.checkpoint={self.checkpoint!r} is given", self.cache)
        _require("teacher", "cache_kind", self.cache_kind in CACHE_KINDS, f"be one of {CACHE_KINDS}", self.cache_kind)


@dataclass(frozen=True)
class DataConfig:
    """The packed dataset and how it is cut into steps."""

    path: str = "data/stdlib"
    """Directory made by `effkern data build`."""
    seq_len: int = 128
    batch_size: int = 16
    """Sequences of one optimizer step."""
    micro_batch_size: int = 0
    """Sequences of one forward pass; 0 is batch_size. Smaller: gradient accumulation, the same loss."""
    seed: int = 0
    """Of the data order, which is a function of (seed, step)."""
    selection: str = ""
    """What `effkern data select` kept of data.path: the steps with a teacher draw from it alone (SALT_DS), or all steps
    of a run without one."""
    workers: int = 0
    """Processes that read batches ahead (effkern.train.feed); 0 reads them in the run's own process."""

    def __post_init__(self) -> None:
        _require("data", "workers", self.workers >= 0, "be at least 0", self.workers)
        for name in ("seq_len", "batch_size"):
            _require("data", name, getattr(self, name) >= 1, "be at least 1", getattr(self, name))
        ok = self.micro_batch_size == 0 or (self.micro_batch_size > 0 and self.batch_size % self.micro_batch_size == 0)
        _require("data", "micro_batch_size", ok, f"be 0 or divide batch_size={self.batch_size}", self.micro_batch_size)

    @property
    def micro_rows(self) -> int:
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True)
class ShampooConfig:
    """Shampoo of the matrices inside the layers (effkern.optim.Shampoo); everything else stays AdamW's."""

    side: Literal["auto", "left", "right", "both"] = "auto"
    """auto: the smaller side of each matrix."""
    exponent: float = 0.0
    """a of L^-a on each side in use; 0: 1/2 on one side, 1/4 on both."""
    lr_ratio: float = 1.0
    """Learning rate of these matrices, as a multiple of optimizer.lr. With grafting="rms" a step has a root mean square
    of 0.2 times its learning rate, as AdamW's has about, so that 1 is the place to start from."""
    beta2: float = 0.8
    """Of the factors; optimizer.beta1 is that of the momentum."""
    ridge: float = 1e-6
    """Added to the factors, relative to their largest eigenvalue."""
    grafting: Literal["none", "rms", "sgd", "adagrad", "rmsprop", "adam"] = "rms"
    precondition_frequency: int = 1
    """Steps between two roots."""
    start_step: int = 1
    """First step with preconditioner."""
    block_size: int = 1024
    """Matrices are cut into blocks of at most this size along preconditioned sides."""

    def __post_init__(self) -> None:
        name = "optimizer.shampoo"
        _require(
            name, "side", self.side in ("auto", "left", "right", "both"), "be auto, left, right or both", self.side
        )
        grafts = ("none", "rms", "sgd", "adagrad", "rmsprop", "adam")
        _require(name, "grafting", self.grafting in grafts, f"be one of {grafts}", self.grafting)
        _require(name, "lr_ratio", self.lr_ratio > 0, "be positive", self.lr_ratio)
        _require(name, "beta2", 0 <= self.beta2 < 1, "be in [0, 1)", self.beta2)
        _require(name, "exponent", 0 <= self.exponent <= 2, "be in [0, 2]", self.exponent)
        _require(name, "ridge", self.ridge >= 0, "be at least 0", self.ridge)
        for field_ in ("precondition_frequency", "start_step", "block_size"):
            _require(name, field_, getattr(self, field_) >= 1, "be at least 1", getattr(self, field_))


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Shampoo for matrices, with linear warm-up and a cosine to lr * min_lr_ratio.

    No restart at the switch of stages.
    """

    name: Literal["adamw", "shampoo"] = "adamw"
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Of matrices; the embedding and 1-d parameters have none."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    shampoo: ShampooConfig = field(default_factory=ShampooConfig)
    """Used with name = "shampoo"."""

    def __post_init__(self) -> None:
        _require("optimizer", "name", self.name in ("adamw", "shampoo"), "be adamw or shampoo", self.name)
        for name in ("lr", "eps"):
            _require("optimizer", name, getattr(self, name) > 0, "be positive", getattr(self, name))
        for name in ("beta1", "beta2"):
            _require("optimizer", name, 0 <= getattr(self, name) < 1, "be in [0, 1)", getattr(self, name))
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            _require("optimizer", name, getattr(self, name) >= 0, "be at least 0", getattr(self, name))
        _require("optimizer", "min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "be in [0, 1]", self.min_lr_ratio)


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run and the distillation weight over it (effkern.train.schedules)."""

    steps: int = 500
    mode: Literal["baseline", "salt", "rkd"] = "baseline"
    """baseline: no teacher; salt: teacher for the first kd_steps; rkd: teacher throughout."""
    transition: Literal["step", "linear", "linear_ratio"] = "step"
    omega: float = 0.5
    """Distillation weight at the start, in [0, 1]."""
    kd_steps: int = 0
    """salt: the first step without teacher (n_KD; n2 of the linear transitions)."""
    decay_start: int = 0
    """linear, linear_ratio: the step where omega begins to fall (n1)."""

    def __post_init__(self) -> None:
        _require("schedule", "steps", self.steps >= 1, "be at least 1", self.steps)
        _require("schedule", "mode", self.mode in ("baseline", "salt", "rkd"), "be baseline, salt or rkd", self.mode)
        known = ("step", "linear", "linear_ratio")
        _require("schedule", "transition", self.transition in known, f"be one of {known}", self.transition)
        _require("schedule", "omega", 0 <= self.omega <= 1, "be in [0, 1]", self.omega)
        if self.transition == "linear_ratio":
            _require("schedule", "omega", self.omega < 1, "be below 1 for linear_ratio", self.omega)
        if self.mode == "salt":
            _require(
                "schedule",
                "kd_steps",
                1 <= self.kd_steps <= self.steps,
                f"be in [1, steps={self.steps}]",
                self.kd_steps,
            )
            if self.transition != "step":
                ok = 0 <= self.decay_start < self.kd_steps
                _require("schedule", "decay_start", ok, f"be in [0, kd_steps={self.kd_steps})", self.decay_start)


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run happens. Only seed, device, precision, threads and compile can change its numbers."""

    out: str = "runs/train"
    seed: int = 0
    """Of the initial weights."""
    device: str = "auto"
    """auto: cuda if there is one, else cpu."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast, with float32 weights and optimizer state. auto: where it pays (effkern.train.device)."""
    threads: int = 0
    """CPU threads of torch; 0 leaves its default. Bit-exact repeats need the same number."""
    compile: bool = False
    """torch.compile the model's forward pass."""
    log_every: int = 1
    eval_every: int = 50
    """Validation also runs at the switch of stages and at the end; 0: only there."""
    eval_tokens: int = 32768
    """Tokens of one validation; 0 is the whole split."""
    checkpoint_every: int = 100
    """A checkpoint is also written at the end and on SIGINT or SIGTERM; 0: only there."""
    keep_last: int = 2
    max_nonfinite: int = 5
    """Stop after this many steps in a row with a loss or gradient that is not finite."""
    tensorboard: bool = True
    wandb: str = ""
    """Project of Weights & Biases that gets the log, too (the extra wandb)."""
    plot: bool = True
    """Write curves.png at the end."""
    restart: bool = False
    """Throw away what run.out holds instead of resuming it."""

    def __post_init__(self) -> None:
        for name in ("log_every", "keep_last", "max_nonfinite"):
            _require("run", name, getattr(self, name) >= 1, "be at least 1", getattr(self, name))
        for name in ("threads", "eval_every", "eval_tokens", "checkpoint_every"):
            _require("run", name, getattr(self, name) >= 0, "be at least 0", getattr(self, name))
        _require(
            "run", "precision", self.precision in ("auto", "fp32", "bf16"), "be auto, fp32 or bf16", self.precision
        )


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of torchrun share a run (effkern.train.parallel). The batch is cut, never multiplied."""

    mode: Literal["none", "ddp", "fsdp", "hsdp"] = "none"
    """none: one process. ddp: every rank holds the model. fsdp: weights, gradients and optimizer state in slices over
    all ranks. hsdp: in slices within each of `replicas` groups of ranks."""
    replicas: int = 1
    """hsdp: groups of ranks that hold a whole model each; divides the number of ranks."""
    vocab_parallel: bool = False
    """fsdp: the output layer stays in slices of the vocabulary; hidden states travel in place of its weight."""
    reshard_after_forward: bool = True
    """fsdp, hsdp: gather a block's weights again for its backward pass, in place of keeping them."""
    timeout_s: int = 600
    """A collective that takes longer ends the run."""

    def __post_init__(self) -> None:
        modes = ("none", "ddp", "fsdp", "hsdp")
        _require("distributed", "mode", self.mode in modes, f"be one of {modes}", self.mode)
        for name in ("replicas", "timeout_s"):
            _require("distributed", name, getattr(self, name) >= 1, "be at least 1", getattr(self, name))
        one = self.replicas == 1 or self.mode == "hsdp"
        _require("distributed", "replicas", one, f"be 1 for mode={self.mode!r}", self.replicas)
        fits = not self.vocab_parallel or self.mode == "fsdp"
        _require("distributed", "vocab_parallel", fits, f"be False for mode={self.mode!r}", self.vocab_parallel)


LORA_OPTIMIZERS = ("lora_rite", "adamw", "lora_muon", "scaled_adam")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters on a trained model instead of all weights of a new one; rank 0: none (`effkern finetune` sets them)."""

    checkpoint: str = ""
    """The trained model: a run directory (its newest checkpoint) or one step directory."""
    rank: int = 0
    alpha: float = 16.0
    """W' = W + (alpha / rank) B A."""
    dropout: float = 0.0
    targets: str = "qkv,out,gate_up,down"
    """Layers that get an adapter, by the end of their names, with commas between."""
    optimizer: str = "lora_rite"
    """lora_rite, adamw, lora_muon or scaled_adam."""
    lr_ratio: float = 1.0
    """Learning rate of B over that of A (LoRA+)."""
    train_A: bool = True
    """False: A stays as it starts (LoRA-FA)."""

    def __post_init__(self) -> None:
        _require("lora", "rank", self.rank >= 0, "be at least 0", self.rank)
        _require("lora", "alpha", self.alpha > 0, "be positive", self.alpha)
        _require("lora", "dropout", 0 <= self.dropout < 1, "be in [0, 1)", self.dropout)
        _require("lora", "lr_ratio", self.lr_ratio > 0, "be positive", self.lr_ratio)
        known = self.optimizer in LORA_OPTIMIZERS
        _require("lora", "optimizer", known, f"be one of {LORA_OPTIMIZERS}", self.optimizer)
        one = (self.rank > 0) == bool(self.checkpoint)
        _require("lora", "checkpoint", one, f"be given exactly where lora.rank={self.rank} is not 0", self.checkpoint)

    @property
    def target_names(self) -> list[str]:
        return [name.strip() for name in self.targets.split(",") if name.strip()]


@dataclass(frozen=True)
class TrainConfig:
    """One run of `effkern train`."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        if self.distributed.vocab_parallel:
            untied = not self.model.tie_head
            _require("distributed", "vocab_parallel", untied, "be False where model.tie_head=True", True)
            gate = self.model.loop.exit_gate
            _require("distributed", "vocab_parallel", not gate, "be False where model.loop.exit_gate=True", True)
        fits = self.data.seq_len <= self.model.max_seq_len
        _require("data", "seq_len", fits, f"be at most model.max_seq_len={self.model.max_seq_len}", self.data.seq_len)


_FREE_RUN_FIELDS = (
    "out",
    "log_every",
    "eval_every",
    "eval_tokens",
    "checkpoint_every",
    "keep_last",
    "tensorboard",
    "wandb",
    "plot",
    "restart",
)
# A run may be resumed with other values of these: they cannot change what is computed.
# The paths may move; the hashes of what they point to are compared instead.
FREE_PATHS = ("data.path", "data.selection", "teacher.checkpoint", "teacher.cache", "lora.checkpoint")
# Another number of ranks, or another way to share a run, changes the order of sums and nothing else.
_FREE_SHARING = ("mode", "replicas", "vocab_parallel", "reshard_after_forward", "timeout_s")
FREE_ON_RESUME = frozenset(
    (
        *(f"run.{name}" for name in _FREE_RUN_FIELDS),
        *FREE_PATHS,
        *(f"distributed.{name}" for name in _FREE_SHARING),
        "data.workers",
    )
)
