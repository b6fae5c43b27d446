"""`effkern estimate`: memory, communication and time of a step on N GPUs, by a model that is printed along.

P ranks, S of them share one copy of the model, R = P / S copies; W weights, U those of the root (embedding, output
layer, last norm), H those of the output layer, d hidden size, n tokens of a micro-batch on one rank, m micro-batches
"""

from dataclasses import dataclass

import torch

from effkern.models import Decoder, DecoderConfig, count_parameters, forward_flops
from effkern.ops.distill.ceilings import Ceilings, known
from effkern.train.config import TrainConfig
from effkern.train.estimate import (
    activation_bytes,
    bytes_in_turn,
    describe_bytes,
    head_bytes,
    loss_bytes,
    planned,
    training_flops,
    working_bytes,
)
from effkern.train.schedules import teacher_steps

FORMULAS = (
    "memory: weights, gradients 4 B and optimizer state, over S; Shampoo's factors and roots whole on every rank;",
    "  gathered (S > 1): root and two blocks at 4 B, and the unreduced gradient of root and one block; without",
    "  reshard_after_forward all of them; bf16 copies 2 B a weight; activations of one micro-batch; loss op: its",
    "  chunks and (S = 1) 4 B a weight of the output layer; teacher 4 B a weight over S, and its root whole. Of a",
    "  single micro-batch a step gradients come as activations go, but for ddp, whose buckets stay: not their sum, but",
    "  the larger of gradients (S = 1 and tied: and the head's again) and activations with loss op",
    "bytes that a rank sends in a step, rings: gather or scatter of M bytes over S ranks M (S-1)/S, all-reduce twice",
    "  that. ddp: all-reduce of 4 W. fsdp: scatter of 4 W; a gather of 4 (W - U) forward and, with",
    "  reshard_after_forward, backward, and of 4 U, in each of m micro-batches. hsdp: the same over S, and an",
    "  all-reduce of 4 W / S over R. vocab_parallel: H is neither gathered nor scattered; per micro-batch gathers of",
    "  n P hidden states, of student and teacher, and labels, a scatter of as many gradients, and an all-reduce of",
    "  72 B a token of n P (60 B without a teacher). teacher: a gather of 4 B a weight per micro-batch, but for its",
    "  root. Shampoo: a gather of its roots; over slices also of gradient, momentum and Gram products, at most 12 B a",
    "  weight of its matrices",
    "time: FLOPs of a rank over 0.75 of the data sheet's rate; optimizer: 28 B a weight of the rank over 0.9 of the",
    "  memory bandwidth; communication at 0.8 of the link, or of the network where a ring leaves its node. A step",
    "  takes between max(FLOPs, communication) + optimizer (all of it hidden) and their sum, without Shampoo's roots",
)
LINK_SHARE = 0.8
# GB/s and direction of one GPU, data sheets: NVLink, and a network card for each GPU.
LINKS = {"h100": 450.0, "h200": 450.0, "a100": 300.0, "a100-40": 300.0, "b200": 900.0}
NETWORK = 50.0


@dataclass(frozen=True)
class Cluster:
    """N GPUs of one kind, in nodes; rates in bytes/s of one GPU and direction, before LINK_SHARE."""

    gpus: int
    kind: Ceilings
    per_node: int
    link: float
    network: float

    @staticmethod
    def of(gpus: int, gpu: str = "h100", per_node: int = 8, link: float = 0.0, network: float = NETWORK) -> "Cluster":
        """From names and GB/s; link 0 takes that of the GPU.

        Raises:
            ValueError: an unknown GPU, or a number that is not positive.
        """
        for name, value in (("gpus", gpus), ("per_node", per_node), ("network", network)):
            if value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
        if link < 0:
            raise ValueError(f"--link must be positive, or 0 for the GPU's own, got {link}")
        kind = known(gpu)
        return Cluster(gpus, kind, per_node, 1e9 * (link or LINKS[gpu]), 1e9 * network)

    def rate(self, ranks: int) -> float:
        """Of a ring over `ranks` neighbours."""
        return LINK_SHARE * (self.link if ranks <= self.per_node else self.network)


@dataclass(frozen=True)
class RankEstimate:
    """Of one rank; bytes, FLOPs and seconds of one step."""

    memory: dict[str, float]
    in_turn: float
    """Bytes of gradients, activations and loss op that do not lie beside the rest."""
    sent: dict[str, float]
    """Bytes that a rank sends in a step of stage 1, by what they are."""
    flops: float
    teacher_flops: float
    compute_s: float
    teacher_s: float
    optimizer_s: float
    communication_s: float
    teacher_communication_s: float

    @property
    def peak(self) -> float:
        """Bytes in stage 1."""
        return sum(self.memory.values()) - self.in_turn

    def step_s(self, *, teacher: bool) -> tuple[float, float]:
        """Seconds of a step: with all communication hidden, and with none."""
        compute = self.compute_s + (self.teacher_s if teacher else 0.0)
        sent = self.communication_s - (0.0 if teacher else self.teacher_communication_s)
        return max(compute, sent) + self.optimizer_s, compute + sent + self.optimizer_s


def _shares(config: TrainConfig, gpus: int) -> tuple[int, int]:
    """S and R."""
    mode = config.distributed.mode
    if mode == "none" and gpus > 1:
        raise ValueError(f"distributed.mode must be ddp, fsdp or hsdp for --gpus {gpus}, got 'none'")
    if config.data.batch_size % gpus:
        raise ValueError(f"data.batch_size must be a multiple of --gpus {gpus}, got {config.data.batch_size}")
    if gpus % config.distributed.replicas:
        raise ValueError(f"distributed.replicas must divide --gpus {gpus}, got {config.distributed.replicas}")
    copies = {"none": 1, "ddp": gpus, "fsdp": 1, "hsdp": config.distributed.replicas}[mode]
    return gpus // copies, copies


def _root_weights(model: DecoderConfig) -> tuple[int, int]:
    """U and H; a tied head is the embedding."""
    table = model.padded_vocab * model.hidden_size
    return table * (1 if model.tie_head else 2) + model.hidden_size, table


def _largest_unit(model: DecoderConfig) -> int:
    """Weights of the largest block, or looped stage, that FSDP gathers at once."""
    from effkern.train.sharding import units

    with torch.device("meta"):
        return max(sum(p.numel() for p in unit.parameters()) for unit in units(Decoder(model)))


def _factors(config: TrainConfig) -> tuple[int, int]:
    """Bytes of Shampoo's factors and roots, and the number of weights they are for."""
    if config.optimizer.name != "shampoo":
        return 0, 0
    from effkern.optim.shampoo import Shampoo
    from effkern.optim.shampoo.saved import expected_shapes
    from effkern.train.optimizer import build_optimizer

    with torch.device("meta"):
        optimizer = build_optimizer(Decoder(config.model), config.optimizer)
    assert isinstance(optimizer, Shampoo)
    factors = weights = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            if optimizer.uses_shampoo(group, p):
                weights += p.numel()
                factors += 4 * sum(torch.Size(shape).numel() for shape in expected_shapes(group, p).values())
    return factors, weights


def estimate_ranks(
    config: TrainConfig, dtype: torch.dtype, cluster: Cluster, teacher: DecoderConfig | None = None
) -> RankEstimate:
    """Estimate one step of `config` on `cluster`; without `teacher` its cost is left out.

    Raises:
        ValueError: the GPUs do not divide the batch, or the config's mode is for one process.
    """
    ranks, settings, data = cluster.gpus, config.distributed, config.data
    shards, copies = _shares(config, ranks)
    weights, (root, head) = count_parameters(config.model), _root_weights(config.model)
    spread = head if settings.vocab_parallel else 0
    rows = data.batch_size // ranks
    micro = min(data.micro_rows, rows)
    micros, tokens = -(-rows // micro), micro * data.seq_len
    uses_teacher = teacher is not None and teacher_steps(config.schedule) > 0
    guide = count_parameters(teacher) if teacher is not None and uses_teacher else 0
    guide_root = _root_weights(teacher)[0] if teacher is not None and uses_teacher else 0
    guide_width = teacher.hidden_size if teacher is not None and uses_teacher else 0
    factors, matrices = _factors(config)

    unit = _largest_unit(config.model) if shards > 1 else 0
    whole = 0.0
    if shards > 1:
        kept = root - spread + 2 * unit if settings.reshard_after_forward else weights - spread
        whole = 4.0 * (kept + root - spread + unit)
    memory = {
        "weights": 4.0 * weights / shards,
        "gradients": 4.0 * weights / shards,
        "optimizer": (_state_bytes(config, weights) - factors) / shards + factors,
        "gathered": whole,
        "bf16 copies": 2.0 * weights if dtype == torch.bfloat16 else 0.0,
        "activations": float(
            activation_bytes(config.model, tokens, dtype) + working_bytes(config.model, tokens, dtype)
        ),
        "loss op": float(_loss_op(config, dtype, cluster, tokens, guide_width, shards)),
        "teacher": 4.0 * (guide / shards + (guide_root if shards > 1 else 0)),
    }
    passing = memory["activations"] + memory["loss op"]
    again = head_bytes(config.model) if config.model.tie_head and shards == 1 else 0
    in_turn = 0.0 if settings.mode == "ddp" else bytes_in_turn(micros, memory["gradients"], passing, again)

    def ring(size: float, over: int) -> float:
        return size * (over - 1) / over

    gathers = 2 if settings.reshard_after_forward else 1
    sent: dict[str, float] = {}
    if shards > 1:
        sent["gather of weights"] = micros * ring(4.0 * (gathers * (weights - root) + root - spread), shards)
        sent["scatter of gradients"] = ring(4.0 * (weights - spread), shards)
        sent["gather of the teacher"] = micros * ring(4.0 * (guide - guide_root), shards)
    across = {"all-reduce of gradients": 2 * ring(4.0 * weights / shards, copies)} if copies > 1 else {}
    if spread:
        per_token = dtype.itemsize * (2.0 * config.model.hidden_size + guide_width) + 8.0
        sent["hidden states"] = micros * ring(per_token * tokens * shards, shards)
        per_token = 72.0 if uses_teacher else 60.0
        sent["statistics of the loss"] = micros * 2 * ring(per_token * tokens * shards, shards)
    if factors and ranks > 1:
        sent["roots of Shampoo"] = ring(factors / 2, ranks)
        if shards > 1:
            sent["Shampoo over slices"] = ring(12.0 * matrices, shards)
    sent = {name: size for name, size in sent.items() if size}

    per_rank = rows * data.seq_len
    rate = cluster.kind.matrix[dtype.itemsize]
    flops = training_flops(config.model, data.seq_len) * per_rank
    guide_flops = forward_flops(teacher, data.seq_len).total * per_rank if teacher is not None and uses_teacher else 0.0
    inside, outside = cluster.rate(shards if shards > 1 else ranks), cluster.rate(ranks)
    guide_s = sent.get("gather of the teacher", 0.0) / inside
    return RankEstimate(
        memory, in_turn, {**sent, **across}, flops, guide_flops, flops / rate, guide_flops / rate,
        28.0 * weights / shards / cluster.kind.bandwidth, sum(sent.values()) / inside + sum(across.values()) / outside,
        guide_s,
    )  # fmt: skip


def _loss_op(
    config: TrainConfig, dtype: torch.dtype, cluster: Cluster, tokens: int, teacher_dim: int, shards: int
) -> int:
    """Bytes of chunks, and of the output layer's gradient where it is not among what is gathered."""
    model, budget = config.model, cluster.kind.chunk_bytes
    if config.distributed.vocab_parallel:
        return loss_bytes(model, tokens * shards, dtype, budget, teacher_dim, shards)
    return loss_bytes(model, tokens, dtype, budget, teacher_dim) + (head_bytes(model) if shards == 1 else 0)


def _state_bytes(config: TrainConfig, weights: int) -> float:
    return 8.0 * weights if config.optimizer.name == "adamw" else float(planned(config)[1])


def render_ranks(numbers: RankEstimate, config: TrainConfig, cluster: Cluster, dtype: torch.dtype) -> str:
    """The estimate as text, with its formulas."""
    shards, copies = _shares(config, cluster.gpus)
    fits = numbers.peak <= cluster.kind.memory
    tokens = config.data.batch_size * config.data.seq_len
    stages = [("with teacher", True), ("without", False)] if numbers.teacher_flops else [("", False)]
    times = []
    for name, teacher in stages:
        low, high = numbers.step_s(teacher=teacher)
        label = f"step {name}".strip()
        times.append(f"{label:22}{low:.4g} to {high:.4g} s, {tokens / high:,.0f} to {tokens / low:,.0f} tokens/s")
    lines = [
        f"{cluster.gpus} x {cluster.kind.name}, {cluster.per_node} a node; {config.distributed.mode}: {copies} x "
        f"{shards} slices; {dtype}",
        f"memory a GPU          {describe_bytes(numbers.peak)} of {describe_bytes(cluster.kind.memory)}"
        + ("" if fits else ": DOES NOT FIT"),
        *(f"  {name:20}{describe_bytes(size)}" for name, size in numbers.memory.items() if size),
        *([f"  {'in turn':19}-{describe_bytes(numbers.in_turn)}"] if numbers.in_turn else []),
        f"sent a GPU and step   {describe_bytes(sum(numbers.sent.values()))}",
        *(f"  {name:28}{describe_bytes(size)}" for name, size in numbers.sent.items()),
        f"FLOPs a GPU and step  {numbers.flops:.3e} student, {numbers.teacher_flops:.3e} teacher",
        *times,
        f"  products {numbers.compute_s:.4g} s, teacher {numbers.teacher_s:.4g} s, optimizer "
        f"{numbers.optimizer_s:.4g} s, communication {numbers.communication_s:.4g} s",
        "model",
        *(f"  {line}" for line in FORMULAS),
    ]
    return "\n".join(lines)
