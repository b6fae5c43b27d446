"""How the looped stages of a decoder loop, as data."""

from dataclasses import dataclass

from effkern.models.stages import Stage, parse_stages
from effkern.nn.looped.modes import Truncated
from effkern.nn.looped.parts import CONDITIONINGS, INJECTIONS, RESIDUALS, STARTS
from effkern.nn.looped.sampling import PoissonLognormalLoops, Sampler, UniformLoops

MODES = ("recompute", "full", "recompute_layer", "truncated", "autograd")
SAMPLES = ("none", "uniform", "poisson")
# "argument" is for cores that take the scalar themselves.
LAYER_SCALARS = ("none", "increment", "stream")


@dataclass(frozen=True)
class LoopConfig:
    """Stages of a decoder, and what effkern.nn.LoopedBlock has between the loops of each looped one."""

    stages: str = ""
    """Layers x loops in order, as "4x1,4x4,4x1"; a plain stage is Kx1. Needs stack = "looped"."""
    init: str = "input"
    """h_0: "input" (the stage's), "zeros", "learned" or "noise". In evaluation noise depends on the position alone."""
    injection: str = "none"
    """Of the stage's input into every loop: "none", "add", "linear", "gate" or "convex"."""
    residual: str = "none"
    """Over loops: "none", "laurel" or "euler"."""
    rank: int = 0
    """Of residual = "laurel"; 0: alpha and beta alone."""
    norm: bool = False
    """RMSNorm after every loop."""
    conditioning: str = "none"
    """On the loop: "none", "table", "sinusoidal" or "time"."""
    layer_scalars: str = "none"
    """Per (loop, layer): "none", "increment" or "stream"."""
    mode: str = "recompute"
    """What training keeps: "recompute", "full", "recompute_layer", "truncated" or "autograd"."""
    gradient_loops: int = 0
    """Loops, counted from the last, that get a gradient: needed by mode = "truncated"; 0: all."""
    sample: str = "none"
    """Loops of a training step: "none" those of the stage; "uniform" 1 to 2 loops - 1; "poisson" 1 + Poisson of a
    log-normal rate whose mean is the stage's loops (Huginn). A function of (run.seed, stage, step)."""
    sigma: float = 0.5
    """Of sample = "poisson"."""
    max_loops: int = 0
    """Largest number of a call and of tables; 0: as many as can be drawn, no limit without tables."""
    exit_gate: bool = False
    """A probability to exit after each loop: sigmoid(w . h + b) of the state (effkern.nn.ExitGate)."""
    exit_beta: float = 0.0
    """With exit_gate training minimises the expected loss over loops - exit_beta * entropy of the exits, in nats; it
    must then be positive."""

    def __post_init__(self) -> None:
        for name, known in (
            ("init", STARTS),
            ("injection", INJECTIONS),
            ("residual", RESIDUALS),
            ("conditioning", CONDITIONINGS),
            ("layer_scalars", LAYER_SCALARS),
            ("mode", MODES),
            ("sample", SAMPLES),
        ):
            self._require(name, getattr(self, name) in known, f"be one of {known}")
        for name in ("rank", "gradient_loops", "max_loops"):
            value = getattr(self, name)
            self._require(name, type(value) is int and value >= 0, "be a whole number of at least 0")
        self._require("sigma", 0 <= self.sigma <= 10, "lie in [0, 10]")
        self._require("exit_beta", self.exit_beta >= 0, "be at least 0")
        if self.exit_beta:
            self._require("exit_beta", self.exit_gate, "be 0 without exit_gate")
        self._require("rank", self.rank == 0 or self.residual == "laurel", 'be 0 without residual = "laurel"')
        if self.mode == "truncated":
            self._require("gradient_loops", self.gradient_loops >= 1, 'be at least 1 for mode = "truncated"')
        elif self.gradient_loops:
            self._require("mode", False, f'be "truncated" for gradient_loops = {self.gradient_loops}')
        if self.stages:
            self._check_stages(parse_stages(self.stages))

    def _check_stages(self, stages: tuple[Stage, ...]) -> None:
        looped = [stage.loops for stage in stages if stage.looped]
        self._require("stages", bool(looped), "have a stage of several loops")
        if self.mode == "truncated" and self.sample == "none":
            self._require("gradient_loops", self.gradient_loops <= min(looped), f"be at most {min(looped)} loops")
        if self.max_loops:
            self._require("max_loops", self.max_loops >= max(looped), f"be at least {max(looped)} loops")
        elif self.has_tables and self.sample == "poisson":
            self._require("max_loops", False, 'be given for tables with sample = "poisson"')

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"LoopConfig: {name} must {rule}, got {getattr(self, name)!r}")

    @property
    def has_tables(self) -> bool:
        return self.conditioning == "table" or self.layer_scalars != "none"

    def sampler(self, stage: Stage) -> Sampler | None:
        """What draws the loops of a training step; None where they are fixed."""
        gradient = self.gradient_loops or None
        if self.sample == "uniform":
            high = 2 * stage.loops - 1
            return UniformLoops(1, min(high, self.max_loops or high), gradient)
        if self.sample == "poisson":
            return PoissonLognormalLoops(stage.loops, self.sigma, self.max_loops or None, gradient)
        return None

    def most_loops(self, stage: Stage) -> int | None:
        """Rows of tables, and the limit of a call; None: neither."""
        if self.max_loops or not self.has_tables:
            return self.max_loops or None
        sampler = self.sampler(stage)
        return sampler.high if isinstance(sampler, UniformLoops) else stage.loops

    def mean_loops(self, stage: Stage) -> float:
        """Of a training step, without what max_loops cuts off."""
        sampler = self.sampler(stage)
        if isinstance(sampler, UniformLoops):
            return (sampler.low + sampler.high) / 2
        return stage.loops if sampler is None else stage.loops + 1

    def execution(self) -> str | Truncated:
        """The mode that LoopedBlock gets. One that draws loops truncates by its sampler."""
        if self.mode != "truncated":
            return self.mode
        return Truncated(self.gradient_loops) if self.sample == "none" else "recompute"
