"""Named starting points for `effkern train --preset NAME`; a config file and the command line override them.

Each student preset names the preset of its teacher, which is trained first and given as teacher.checkpoint.
"""

from dataclasses import dataclass, replace

from effkern.models import DecoderConfig, LaurelConfig, LoopConfig
from effkern.train.config import (
    DataConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    ShampooConfig,
    TeacherConfig,
    TrainConfig,
)
from effkern.train.presets_papers import laurel, looped


@dataclass(frozen=True)
class Preset:
    """A config, the preset of its teacher, and what in it no source confirms."""

    config: TrainConfig
    about: str
    teacher: str = ""
    unconfirmed: tuple[str, ...] = ()


def _demo() -> dict[str, Preset]:
    # Chosen by short runs: an embedding that starts at 0.1 learns far faster than at 0.02, three wide layers faster
    # than five narrow ones; omega 0.5 and 0.8 end alike. The teacher gets as many tokens as a student.
    student = TrainConfig(
        model=DecoderConfig(
            vocab_size=4096,
            hidden_size=256,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            mlp_size=1024,
            max_seq_len=256,
            init_std=0.1,
        ),
        teacher=TeacherConfig(checkpoint="runs/demo/teacher"),
        data=DataConfig(path="runs/demo/data", seq_len=128, batch_size=8),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=30),
        schedule=ScheduleConfig(steps=500, mode="salt", omega=0.5, kd_steps=150),
        run=RunConfig(out="runs/demo/salt", eval_every=50, eval_tokens=12288, checkpoint_every=100),
    )
    teacher = replace(
        student,
        model=replace(student.model, hidden_size=128, num_layers=4, mlp_size=384),
        teacher=TeacherConfig(),
        optimizer=OptimizerConfig(lr=6e-3, warmup_steps=30),
        schedule=ScheduleConfig(steps=500),
        run=replace(student.run, out="runs/demo/teacher", eval_every=150),
    )
    return {
        "demo": Preset(student, "the demo's student: minutes on two CPU cores", teacher="demo-teacher"),
        "demo-teacher": Preset(teacher, "the demo's teacher"),
    }


def _small() -> dict[str, Preset]:
    student = TrainConfig(
        model=DecoderConfig(
            vocab_size=32000,
            hidden_size=1024,
            num_layers=24,
            num_heads=16,
            num_kv_heads=8,
            mlp_size=2816,
            max_seq_len=1024,
            vocab_multiple=128,
        ),
        teacher=TeacherConfig(checkpoint="runs/small-teacher"),
        data=DataConfig(path="data/small", seq_len=1024, batch_size=256, micro_batch_size=16),
        optimizer=OptimizerConfig(lr=6e-4, warmup_steps=500),
        schedule=ScheduleConfig(steps=10000, mode="salt", omega=0.5, kd_steps=2000),
        run=RunConfig(
            out="runs/small", eval_every=250, eval_tokens=1 << 20, checkpoint_every=500, log_every=10, compile=True
        ),
    )
    teacher = replace(
        student,
        model=replace(student.model, hidden_size=640, num_layers=16, num_heads=10, num_kv_heads=5, mlp_size=1728),
        teacher=TeacherConfig(),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=500),
        schedule=ScheduleConfig(steps=10000),
        run=replace(student.run, out="runs/small-teacher"),
    )
    return {
        "small": Preset(student, "a student for one GPU", teacher="small-teacher"),
        "small-teacher": Preset(teacher, "its teacher"),
    }


_PAPER_UNCONFIRMED = (
    "data.batch_size=2048, data.seq_len=1280: from memory (their product agrees with published token counts)",
    "schedule.steps=208000: from memory (the published 70% point, 146K, agrees)",
    "schedule.omega=0.667, teacher.temperature=0.25: from memory",
    "teacher.temperature on the teacher alone, student at 1, no T^2 factor: from memory",
    "schedule.transition=step is published; the formulas of the linear ones: from memory or inferred",
    "model.vocab_size=256000: from memory (SentencePiece, 256K)",
    "optimizer.lr=1e-3, cosine, linear warm-up: from memory, low confidence",
    "one learning-rate schedule and optimizer state through the switch: inferred",
    "optimizer.warmup_steps, betas, weight_decay, clip_norm, AdamW itself: not published, ours",
    "model depth, width, heads (chosen to give 2.8B and 1.5B): not published, ours",
    "objective: the paper trains with UL2 (mixture from memory); here causal language modelling",
)


def _paper() -> dict[str, Preset]:
    student = TrainConfig(
        model=DecoderConfig(
            vocab_size=256000,
            hidden_size=2560,
            num_layers=27,
            num_heads=20,
            num_kv_heads=20,
            mlp_size=6912,
            max_seq_len=1280,
            vocab_multiple=128,
        ),
        teacher=TeacherConfig(checkpoint="runs/paper-1.5b", temperature=0.25),
        data=DataConfig(path="data/pile", seq_len=1280, batch_size=2048, micro_batch_size=8),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=10000),
        schedule=ScheduleConfig(steps=208000, mode="salt", omega=0.667, kd_steps=36000),
        run=RunConfig(
            out="runs/paper-2.8b",
            eval_every=2000,
            eval_tokens=1 << 22,
            checkpoint_every=2000,
            log_every=20,
            compile=True,
        ),
    )
    teacher = replace(
        student,
        model=replace(student.model, hidden_size=2048, num_layers=19, num_heads=16, num_kv_heads=16, mlp_size=5504),
        teacher=TeacherConfig(),
        schedule=ScheduleConfig(steps=208000),
        run=replace(student.run, out="runs/paper-1.5b"),
    )
    return {
        "paper-2.8b": Preset(
            student, "SALT's setting, arXiv 2410.18779: 1.5B teaches 2.8B", "paper-1.5b", _PAPER_UNCONFIRMED
        ),
        "paper-1.5b": Preset(teacher, "its teacher", unconfirmed=_PAPER_UNCONFIRMED),
    }


def _composed() -> dict[str, Preset]:
    """The demo's student with everything at once, on a third of its tokens."""
    student = _demo()["demo"].config
    composed = replace(
        student,
        model=replace(
            student.model,
            residual="laurel",
            laurel=LaurelConfig(variant="rw+lr", rank=16),
            stack="looped",
            loop=LoopConfig(stages="1x1,1x2,1x1"),
        ),
        optimizer=replace(student.optimizer, name="shampoo", shampoo=ShampooConfig(precondition_frequency=10)),
        schedule=replace(student.schedule, steps=150, kd_steps=45),
        run=replace(student.run, out="runs/demo/composed"),
    )
    about = "the demo's student with LAuReL, a loop, one-sided Shampoo and SALT: a minute or two"
    return {"demo-composed": Preset(composed, about, teacher="demo-teacher")}


def _others() -> dict[str, Preset]:
    return {
        name: Preset(config, about, unconfirmed=unconfirmed)
        for name, (config, about, unconfirmed) in (looped() | laurel()).items()
    }


PRESETS: dict[str, Preset] = {**_demo(), **_composed(), **_small(), **_paper(), **_others()}


def get_preset(name: str) -> Preset:
    """The preset `name`. Raises ValueError naming those that exist."""
    if name not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
