"""The decoder's shape, as data."""

from dataclasses import dataclass, field

from effkern.models.loop_config import LoopConfig
from effkern.models.parts import MLPS, RESIDUALS, STACKS
from effkern.models.stages import parse_stages
from effkern.nn.laurel import INITS, VARIANTS
from effkern.ops.laurel.scalars import SCALAR_MAPS


@dataclass(frozen=True)
class LaurelConfig:
    """LAuReL residuals of a decoder; see effkern.nn.LaurelResidual."""

    variant: str = "rw+lr"
    """A key of effkern.nn.laurel.VARIANTS."""
    rank: int = 32
    """Of the low-rank variants."""
    placement: str = "both"
    """"attn", "ffn", "both", or "block": one residual around both branches."""
    look_back: int = 3
    """k of the pa variants: inputs that a residual mixes, its own and k - 1 previous ones."""
    scalar_map: str = "softmax2"
    per_channel: bool = False
    x0: bool = False
    """Also add the first hidden state, with a learned factor that starts at 0."""
    init: str = "column_orthogonal"
    save_branch: bool = False
    """Keep the branch's output for alpha's gradient, which in bfloat16 is inexact without it where the stream is much
    larger than the branch."""

    def __post_init__(self) -> None:
        for name, known in (
            ("variant", VARIANTS),
            ("placement", ("attn", "ffn", "both", "block")),
            ("scalar_map", SCALAR_MAPS),
            ("init", INITS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"LaurelConfig: {name} must be one of {sorted(known)}, got {value!r}")
        for name in ("rank", "look_back"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"LaurelConfig: {name} must be a whole number of at least 1, got {value!r}")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and parts of a decoder. Every rule is checked when it is made.

    `residual`, `mlp` and `stack` name entries of the registries in effkern.models.parts; a new kind of block is
    added by registering it there.
    """

    vocab_size: int = 4096
    """Number of tokens of the tokenizer."""
    hidden_size: int = 192
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 6
    """Divides num_heads; smaller is grouped-query attention."""
    mlp_size: int = 512
    max_seq_len: int = 256
    """Longest sequence, prompt and generated tokens together."""
    head_dim: int = 0
    """0: hidden_size / num_heads."""
    vocab_multiple: int = 1
    """The head is padded up to a multiple of this; the padding never gets probability."""
    tie_head: bool = True
    """The output head is the embedding."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    """Of the embedding and an untied head. Projections: 1/sqrt(inputs), ends of branches over sqrt(2 depth)."""
    residual: str = "add"
    """"add", or "laurel": as `laurel` says."""
    laurel: LaurelConfig = field(default_factory=LaurelConfig)
    mlp: str = "swiglu"
    stack: str = "plain"
    """"plain": num_layers blocks; "looped": the stages of `loop`, which have num_layers blocks together."""
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "mlp_size",
            "max_seq_len",
            "vocab_multiple",
        ):
            self._require(name, getattr(self, name) >= 1, "be at least 1")
        self._require("head_dim", self.head_dim >= 0, "be at least 0")
        self._require("num_kv_heads", self.num_heads % self.num_kv_heads == 0, f"divide num_heads={self.num_heads}")
        if self.head_dim == 0:
            self._require(
                "hidden_size", self.hidden_size % self.num_heads == 0, f"be a multiple of num_heads={self.num_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"DecoderConfig: head_dim must be even for rotary positions, got {self.head_size}")
        for name in ("rope_theta", "norm_eps", "init_std"):
            self._require(name, getattr(self, name) > 0, "be positive")
        self._check_parts()
        self._check_loop()
        if not isinstance(self.laurel, LaurelConfig):
            raise TypeError(f"DecoderConfig: laurel must be a LaurelConfig, got {self.laurel!r}")
        if self.residual == "laurel" and VARIANTS[self.laurel.variant].low_rank and self.laurel.rank > self.hidden_size:
            raise ValueError(
                f"DecoderConfig: laurel.rank must be at most hidden_size={self.hidden_size}, got {self.laurel.rank}"
            )

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"DecoderConfig: {name} must {rule}, got {getattr(self, name)!r}")

    def _check_parts(self) -> None:
        for name, registry in (("residual", RESIDUALS), ("mlp", MLPS), ("stack", STACKS)):
            known: list[str] = sorted(registry)
            self._require(name, getattr(self, name) in known, f"be one of {known}")

    def _check_loop(self) -> None:
        if not isinstance(self.loop, LoopConfig):
            raise TypeError(f"DecoderConfig: loop must be a LoopConfig, got {self.loop!r}")
        if self.stack != "looped":
            if self.loop != LoopConfig():
                self._require("stack", False, "be 'looped' where loop is given")
            return
        if not self.loop.stages:
            raise ValueError("DecoderConfig: loop.stages must be given for stack='looped', as '4x1,4x4,4x1', got ''")
        layers = sum(stage.layers for stage in parse_stages(self.loop.stages))
        rule = f"be {layers}, the layers of loop.stages={self.loop.stages!r}"
        self._require("num_layers", self.num_layers == layers, rule)
        if self.loop.rank > self.hidden_size:
            rule = f"be at most hidden_size={self.hidden_size}"
            raise ValueError(f"DecoderConfig: loop.rank must {rule}, got {self.loop.rank}")
        if self.residual == "laurel" and (VARIANTS[self.laurel.variant].previous or self.laurel.x0):
            # What such a residual reads of earlier ones would come from another loop, or from another stage.
            raise ValueError(
                "DecoderConfig: laurel.variant must be 'rw', 'lr' or 'rw+lr', without x0, for stack='looped', "
                f"got {self.laurel.variant!r} with x0={self.laurel.x0}"
            )

    @property
    def depth(self) -> int:
        """Layers that a token goes through, loops counted."""
        return STACKS[self.stack].applications(self)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and of the head."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
