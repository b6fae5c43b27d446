"""The decoder layers that apply_laurel knows: what they are called, and how their norms stand."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from effkern.integrations.transformers.swap import is_bare, path_of


class Layout(NamedTuple):
    """Attributes of a layer."""

    before_mlp: str
    """The norm behind the attention's residual."""
    after_attention: str | None = None
    """A norm of the branch, before the residual."""
    after_mlp: str | None = None
    one_plus: bool = False
    """The norms multiply by 1 + weight."""
    mask_first: bool = True
    """The order of forward's arguments: attention_mask before position_embeddings."""


PRE_NORM = Layout("post_attention_layernorm")
GEMMA = PRE_NORM._replace(one_plus=True)
SANDWICH = Layout(
    "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm", one_plus=True,
    mask_first=False,
)  # fmt: skip

_FAMILIES = {
    "Llama": PRE_NORM,
    "Mistral": PRE_NORM,
    "Qwen2": PRE_NORM,
    "Qwen3": PRE_NORM,
    "Gemma": GEMMA,
    "Gemma2": SANDWICH,
    "Gemma3": SANDWICH,
}


def _path(family: str, suffix: str) -> str:
    return f"transformers.models.{family.lower()}.modeling_{family.lower()}.{family}{suffix}"


NAMES = ", ".join(_FAMILIES)
LAYOUTS = {_path(family, "DecoderLayer"): layout for family, layout in _FAMILIES.items()}
_NORMS = {_path(family, "RMSNorm") for family in _FAMILIES}


def norm_weight(norm: nn.Module, layout: Layout) -> tuple[Tensor, float] | None:
    """What to multiply by behind `norm`'s division, and its eps; None if it must be called.

    It must where it is not the library's own (another kernel, another class, sharded by itself) or has hooks.
    """
    if path_of(norm) not in _NORMS or not is_bare(norm):
        return None
    known: Any = norm
    eps = known.variance_epsilon if hasattr(known, "variance_epsilon") else known.eps
    return (1.0 + known.weight.float() if layout.one_plus else known.weight), eps
