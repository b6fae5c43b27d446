"""Sizes, memory and FLOPs of a run before it starts, from formulas that are printed with the numbers."""

from dataclasses import dataclass

import torch

from effkern.models import DecoderConfig, count_parameters, forward_flops
from effkern.models.parts import STACKS
from effkern.models.stages import parse_stages
from effkern.ops.distill.ceilings import CPU_CHUNK_BYTES
from effkern.ops.distill.cost import Problem, plan
from effkern.train.config import TrainConfig
from effkern.train.optimizer import planned
from effkern.train.schedules import teacher_steps

FORMULAS = (
    "weights 4 B, gradients 4 B, AdamW moments 8 B a parameter; bf16 adds a 2 B copy of what autocast casts;",
    "  Shampoo: momentum 4 B a parameter and 8 p^2 B a block with a preconditioner of size p",
    "activations = micro-batch tokens x [blocks x (2 d (8 + a) + a D (4 H + 3 K) + 4 a m) + d (8 + a) + 3 a m],",
    "  a = bytes of a product's result (2 in bf16, 4 in fp32); H, K, D heads, kv heads, head size; m mlp size;",
    "  what autograd keeps, and last what the backward pass of one MLP makes; torch.compile keeps less. A looped stage",
    "  of k layers and L loops keeps L k blocks with mode full, L x 4 d + k blocks with recompute, (L + k) x 4 d + 1",
    "  block with recompute_layer",
    "loss op: the gradient of the output layer, 4 B a weight, and chunks of logits within its own budget",
    "of a single micro-batch a step, gradients come as activations go: not the sum of gradients, activations and loss",
    "  op lies in memory, but the larger of gradients (tied: and the head's again) and activations with loss op",
    "teacher: weights 4 B, and its hidden states; it keeps nothing for a backward pass",
    "FLOPs: forward = 2 per weight of blocks and head + 2 x width x (length + 1) per attention; backward = 2 forwards;",
    "  the teacher costs one forward in the steps that use it; loops that run again are not counted",
)


@dataclass(frozen=True)
class Estimate:
    """Bytes and FLOPs of a run."""

    parameters: int
    teacher_parameters: int
    tokens: int
    teacher_tokens: int
    weights: int
    gradients: int
    optimizer: int
    autocast_copies: int
    activations: int
    loss: int
    in_turn: int
    """Of gradients, activations and loss op, what does not lie in memory beside the rest."""
    teacher_weights: int
    student_flops: float
    teacher_flops: float

    @property
    def memory(self) -> int:
        """Bytes at the peak of stage 1."""
        parts = (
            self.weights,
            self.gradients,
            self.optimizer,
            self.autocast_copies,
            self.activations,
            self.loss,
            self.teacher_weights,
        )
        return sum(parts) - self.in_turn


def activation_bytes(model: DecoderConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps from a forward pass over `tokens` tokens (FORMULAS, without its last term)."""
    a = dtype.itemsize
    d, heads = model.hidden_size, 4 * model.num_heads + 3 * model.num_kv_heads
    block = 2 * d * (8 + a) + a * heads * model.head_size + 4 * a * model.mlp_size
    return tokens * (_kept_blocks(model, block) + d * (8 + a))


def working_bytes(model: DecoderConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that the backward pass makes beside them: gradients inside of one MLP."""
    return tokens * 3 * dtype.itemsize * model.mlp_size


def loss_bytes(
    model: DecoderConfig, rows: int, dtype: torch.dtype, budget: int, teacher_dim: int, parts: int = 1
) -> int:
    """Bytes of the loss op over `rows` tokens beyond its inputs and gradients, for one of `parts` of the vocabulary."""
    problem = Problem(
        rows, -(-model.padded_vocab // parts), model.hidden_size, teacher="hidden" if teacher_dim else "none",
        teacher_dim=teacher_dim, element_bytes=dtype.itemsize, weight_grad_bytes=4,
    )  # fmt: skip
    return plan(problem, chunk_bytes=budget).peak_bytes


def head_bytes(model: DecoderConfig) -> int:
    """Of the gradient of the output layer."""
    return 4 * model.padded_vocab * model.hidden_size


def bytes_in_turn(micros: int, gradients: float, passing: float, again: float) -> float:
    """What of `gradients` and of what backward leaves behind, `passing`, is not there at one time (FORMULAS); `again`:
    of a gradient that is there twice at the end."""
    return max(0.0, min(gradients, passing - again)) if micros == 1 else 0.0


def training_flops(model: DecoderConfig, seq_len: int) -> float:
    """FLOPs a token, forward and backward: with drawn loops those of their mean, backward only through loops that have
    a gradient."""
    if model.stack != "looped":
        return 3.0 * forward_flops(model, seq_len).total
    loop, stages = model.loop, parse_stages(model.loop.stages)
    ran = [min(round(loop.mean_loops(s)), loop.max_loops or s.loops + 1) if s.looped else 1 for s in stages]
    back = [min(loops, loop.gradient_loops or loops) for loops in ran]

    def forward(counts: list[int]) -> float:
        return forward_flops(model, seq_len, [n for n, s in zip(counts, stages) if s.looped]).total

    return forward(ran) + 2.0 * forward(back)


def _kept_blocks(model: DecoderConfig, block: int) -> int:
    """Bytes a token of all blocks: those of a stage that runs again count once, beside the inputs of its loops."""
    if model.stack != "looped":
        return STACKS[model.stack].applications(model) * block
    mode, state = model.loop.mode, 4 * model.hidden_size
    kept, again = 0, 0
    for stage in parse_stages(model.loop.stages):
        loops = round(model.loop.mean_loops(stage)) if stage.looped else 1
        if not stage.looped or mode in ("full", "autograd"):
            kept += loops * stage.layers * block
        elif mode == "recompute_layer":
            kept, again = kept + loops * state, max(again, stage.layers * state + block)
        else:
            with_gradient = min(loops, model.loop.gradient_loops or loops)
            kept, again = kept + with_gradient * state, max(again, stage.layers * block)
    return kept + again


def estimate(
    config: TrainConfig, dtype: torch.dtype, teacher: DecoderConfig | None = None, budget: int = CPU_CHUNK_BYTES
) -> Estimate:
    """Estimate `config` in precision `dtype`; without `teacher` its cost is left out. `budget`: of the loss op's buffer
    on the device."""
    parameters = count_parameters(config.model)
    tokens_per_step = config.data.batch_size * config.data.seq_len
    stage_one = teacher_steps(config.schedule) if teacher is not None else 0
    tokens = config.schedule.steps * tokens_per_step
    teacher_tokens = stage_one * tokens_per_step
    # Both models and their optimizer state stay float32; only products run in bf16.
    copies = 2 * parameters if dtype == torch.bfloat16 else 0
    rows = config.data.micro_rows * config.data.seq_len
    activations = activation_bytes(config.model, rows, dtype) + working_bytes(config.model, rows, dtype)
    guide_dim = teacher.hidden_size if teacher is not None and stage_one else 0
    loss = head_bytes(config.model) + loss_bytes(config.model, rows, dtype, budget, guide_dim)
    micros = config.data.batch_size // config.data.micro_rows
    again = head_bytes(config.model) if config.model.tie_head else 0
    return Estimate(
        parameters=parameters,
        teacher_parameters=count_parameters(teacher) if teacher is not None else 0,
        tokens=tokens,
        teacher_tokens=teacher_tokens,
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer=8 * parameters if config.optimizer.name == "adamw" else planned(config)[1],
        autocast_copies=copies,
        activations=activations,
        loss=loss,
        in_turn=round(bytes_in_turn(micros, 4 * parameters, activations + loss, again)),
        teacher_weights=4 * count_parameters(teacher) if teacher is not None and stage_one else 0,
        student_flops=training_flops(config.model, config.data.seq_len) * tokens,
        teacher_flops=forward_flops(teacher, config.data.seq_len).total * teacher_tokens
        if teacher is not None
        else 0.0,
    )


def describe_bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def _count(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.2f}{unit}"
    return f"{number:.0f}"


def render(numbers: Estimate, config: TrainConfig, dtype: torch.dtype, unconfirmed: tuple[str, ...] = ()) -> str:
    """The estimate as text, with its formulas and what no source confirms."""
    schedule, data = config.schedule, config.data
    share = numbers.teacher_flops / numbers.student_flops
    lines = [
        f"student       {_count(numbers.parameters)} parameters ({numbers.parameters:,})",
        f"teacher       {_count(numbers.teacher_parameters)} parameters"
        if numbers.teacher_parameters
        else "teacher       none",
        f"schedule      {schedule.mode}, {schedule.steps:,} steps x {data.batch_size} x {data.seq_len} "
        f"= {_count(numbers.tokens)} tokens",
        f"stage 1       {_count(numbers.teacher_tokens)} tokens with the teacher, omega {schedule.omega}, "
        f"transition {schedule.transition}",
        f"precision     {dtype}",
        f"memory        {describe_bytes(numbers.memory)} in stage 1",
        f"  weights     {describe_bytes(numbers.weights)}",
        f"  gradients   {describe_bytes(numbers.gradients)}",
        f"  optimizer   {describe_bytes(numbers.optimizer)}",
        f"  bf16 copies {describe_bytes(numbers.autocast_copies)}",
        f"  activations {describe_bytes(numbers.activations)} (micro-batch of {data.micro_rows} x {data.seq_len})",
        f"  loss op     {describe_bytes(numbers.loss)}",
        f"  in turn    -{describe_bytes(numbers.in_turn)}",
        f"  teacher     {describe_bytes(numbers.teacher_weights)}",
        f"FLOPs         {numbers.student_flops:.3e} student, {numbers.teacher_flops:.3e} teacher (+{100 * share:.1f}%)",
        "parameter groups",
        *(f"  {line}" for line in planned(config)[0]),
        "formulas",
        *(f"  {line}" for line in FORMULAS),
    ]
    if unconfirmed:
        lines += ["unconfirmed values", *(f"  {line}" for line in unconfirmed)]
    return "\n".join(lines)
