"""LoRA adapters on linear, embedding and convolution layers, with the parameter names that PEFT gives them.

W' = W + s B A with A [r, in], B [out, r], s = alpha / r (or alpha / sqrt(r)). A starts random, B at zero, W is frozen.
Adapters of PEFT itself need none of this: effkern.optim finds their factors as it finds these.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

ADAPTER = "default"


class LoraLayer(nn.Module):
    """A frozen layer and the two factors of its change; the classes below say how they meet.

    There is no `weight`: code that multiplies by a layer's weight instead of calling the layer would leave out the
    adapter without a word. `base_layer.weight` is the frozen one, `merged_weight()` the one with the adapter in it.

    Parameters: base_layer.*, and lora_A.default.weight [r, ...], lora_B.default.weight [rows, r, ...] (for an
    embedding lora_embedding_A.default [r, rows], lora_embedding_B.default [columns, r]).
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float, rslora: bool) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoraLayer: rank must be at least 1, got {rank}")
        if not 0 <= dropout < 1:
            raise ValueError(f"LoraLayer: dropout must be in [0, 1), got {dropout}")
        self.base_layer = base.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self._unmerged: Tensor | None = None

    @property
    def _weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as they are stored."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """s B A in the shape of the weight, float32 or wider."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight; the weight without it is kept for `unmerge`. Nothing where it is merged."""
        if self._unmerged is None:
            merged, self._unmerged = self.merged_weight(), self._weight.detach().clone()
            self._weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight back, bit for bit."""
        if self._unmerged is not None:
            self._weight.copy_(self._unmerged)
            self._unmerged = None

    def merged_weight(self) -> Tensor:
        """The weight with the adapter in it, of the weight's dtype, rounded once."""
        if self._unmerged is not None:
            return self._weight.detach().clone()
        delta = self.delta()
        return (self._weight.detach().to(delta.dtype) + delta.detach()).to(self._weight.dtype)

    def _start(self, generator: torch.Generator | None) -> None:
        """A uniform in +-1 / sqrt(fan in), which is what PEFT's Kaiming start with a = sqrt(5) comes to; B zero."""
        A, B = self.factors()
        with torch.no_grad():
            drawn = torch.rand(A.shape, generator=generator, dtype=torch.float32)
            A.copy_((2 * drawn - 1) / math.sqrt(A[0].numel()))
            B.zero_()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LoraLinear(LoraLayer):
    """y = base(x) + s (dropout(x) A^T) B^T."""

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(base, rank, alpha, dropout, rslora)
        like: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype, "bias": False}
        self.lora_A = nn.ModuleDict({ADAPTER: nn.Linear(base.in_features, rank, **like)})
        self.lora_B = nn.ModuleDict({ADAPTER: nn.Linear(rank, base.out_features, **like)})
        self._start(generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight  # type: ignore[return-value]

    def delta(self) -> Tensor:
        A, B = self.factors()
        return self.scaling * (_wide(B) @ _wide(A))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.merged:
            return y
        return y + self.lora_B[ADAPTER](self.lora_A[ADAPTER](self.lora_dropout(x))) * self.scaling


class LoraEmbedding(LoraLayer):
    """y = base(ids) + s A^T[ids] B^T."""

    def __init__(
        self, base: nn.Embedding, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(base, rank, alpha, dropout, rslora)
        rows, columns = base.weight.shape
        self.lora_embedding_A = nn.ParameterDict({ADAPTER: nn.Parameter(base.weight.new_empty(rank, rows))})
        self.lora_embedding_B = nn.ParameterDict({ADAPTER: nn.Parameter(base.weight.new_empty(columns, rank))})
        self._start(generator)

    def _start(self, generator: torch.Generator | None) -> None:
        """A zero and B normal, as PEFT starts embeddings."""
        A, B = self.factors()
        with torch.no_grad():
            A.zero_()
            B.copy_(torch.randn(B.shape, generator=generator, dtype=torch.float32))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[ADAPTER], self.lora_embedding_B[ADAPTER]

    def delta(self) -> Tensor:
        A, B = self.factors()
        return self.scaling * (_wide(B) @ _wide(A)).T

    def forward(self, ids: Tensor) -> Tensor:
        y = self.base_layer(ids)
        if self.merged:
            return y
        A, B = self.factors()
        rows = nn.functional.embedding(ids, A.T, padding_idx=self.base_layer.padding_idx)  # type: ignore[arg-type]
        return y + (self.lora_dropout(rows) @ B.T) * self.scaling


class LoraConv2d(LoraLayer):
    """y = base(x) + s conv1x1(conv(dropout(x), A), B); A has the kernel, stride, padding and dilation of the layer."""

    def __init__(
        self, base: nn.Conv2d, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(base, rank, alpha, dropout, rslora)
        if base.groups != 1:
            raise ValueError(f"LoraConv2d: base must have groups=1, got {base.groups}")
        plain: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype, "bias": False}
        like = {**plain, "stride": base.stride, "padding": base.padding, "dilation": base.dilation}
        like["padding_mode"] = base.padding_mode
        down = nn.Conv2d(base.in_channels, rank, cast(tuple[int, int], base.kernel_size), **like)
        self.lora_A = nn.ModuleDict({ADAPTER: down})
        self.lora_B = nn.ModuleDict({ADAPTER: nn.Conv2d(rank, base.out_channels, 1, **plain)})
        self._start(generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight  # type: ignore[return-value]

    def delta(self) -> Tensor:
        A, B = self.factors()
        return self.scaling * (_wide(B.flatten(1)) @ _wide(A.flatten(1))).view(self._weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.merged:
            return y
        return y + self.lora_B[ADAPTER](self.lora_A[ADAPTER](self.lora_dropout(x))) * self.scaling


_LAYERS: tuple[tuple[type[nn.Module], Callable[..., LoraLayer]], ...] = (
    (nn.Linear, LoraLinear), (nn.Embedding, LoraEmbedding), (nn.Conv2d, LoraConv2d),
)  # fmt: skip


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def inject_lora(
    model: nn.Module,
    targets: Sequence[str],
    *,
    rank: int | Callable[[str], int] = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
) -> list[str]:
    """Freeze `model` and put adapters on the layers whose name ends in one of `targets`; in place.

    Args:
        targets: module names or their ends, such as "qkv" or "mlp.down".
        rank: of every adapter, or a function from the layer's name to its rank.
        alpha: s = alpha / rank; with rslora alpha / sqrt(rank).
        seed: of A; each layer draws from (seed, its name) alone.

    Returns:
        Names of the layers with adapters, in the model's order.

    Raises:
        ValueError: a target matches no layer, one that has an adapter already, or one whose weight is another layer's
            too (a tied head): the adapter would be in one of them, and the merged weight in both.
        TypeError: a target is not a Linear, Embedding or Conv2d, or is a part of nn.MultiheadAttention, which reads its
            weight and never calls it. The model is as it was after any of these.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = {name: module for name, module in modules.items() if _matches(name, targets)}
    unused = [target for target in targets if not any(_matches(name, [target]) for name in chosen)]
    if unused or not chosen:
        known = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)})
        raise ValueError(f"inject_lora: targets must name layers of the model, got {unused or targets}; it has {known}")
    made: dict[str, LoraLayer] = {}
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for name, module in chosen.items():
            wrap = _wrapper(model, name, module)
            r = rank(name) if callable(rank) else rank
            generator = torch.Generator().manual_seed(_mix(seed, name))
            made[name] = wrap(module, r, alpha, dropout, rslora, generator)
    except Exception:
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        raise
    model.requires_grad_(False)
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        layer.train(layer.base_layer.training)
        setattr(model.get_submodule(parent), child, layer)
        for factor in layer.factors():
            factor.requires_grad_(True)
    return list(made)


def _wrapper(model: nn.Module, name: str, module: nn.Module) -> Callable[..., LoraLayer]:
    """What puts an adapter on a layer; raises what inject_lora raises where it must have none."""
    if isinstance(module, LoraLayer) or ".base_layer" in f".{name}":
        raise ValueError(f"inject_lora: {name} must have no adapter yet, got one; merge it first")
    wrap = next((wrap for kind, wrap in _LAYERS if isinstance(module, kind)), None)
    if wrap is None:
        raise TypeError(f"inject_lora: {name} must be Linear, Embedding or Conv2d, got {type(module).__name__}")
    parent = name.rpartition(".")[0]
    if isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        raise TypeError(
            f"inject_lora: {name} must be a layer that is called, got a part of MultiheadAttention {parent}"
        )
    named = model.named_parameters(remove_duplicate=False)
    names = [key for key, parameter in named if parameter is module.weight]
    if len(names) > 1:
        raise ValueError(f"inject_lora: {name} must have a weight of its own, got one weight for {' and '.join(names)}")
    return wrap


def _mix(seed: int, name: str) -> int:
    """A 63-bit seed of (seed, name), the same in every process."""
    value = 14695981039346656037
    for byte in f"{seed}:{name}".encode():
        value = (value ^ byte) * 1099511628211 % (1 << 64)
    return value >> 1


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def merge_lora(model: nn.Module) -> int:
    """Replace every adapted layer by its base layer with the adapter added to the weight; in place, for good.

    Returns:
        The number of layers. `LoraLayer.merge` and `unmerge` do the same for a time.
    """
    layers = lora_layers(model)
    for name, layer in layers.items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    return len(layers)


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict as it would be after `merge_lora`; the model stays as it is."""
    layers = lora_layers(model)
    found: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        owner = next((name for name in layers if key.startswith(f"{name}.")), None)
        if owner is None:
            found[key] = value
        elif key.startswith(f"{owner}.base_layer."):
            rest = key.removeprefix(f"{owner}.base_layer.")
            found[f"{owner}.{rest}"] = layers[owner].merged_weight() if rest == "weight" else value
    return found


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The factors alone, under the names of a PEFT adapter file: base_model.model.<layer>.lora_A.weight."""
    found = {}
    for name, layer in lora_layers(model).items():
        for key, value in layer.state_dict(keep_vars=False).items():
            if key.startswith("lora_") and f".{ADAPTER}" in key:
                found[f"base_model.model.{name}.{key.replace(f'.{ADAPTER}', '')}"] = value
    return found


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy factors from a PEFT adapter file's tensors, or from `lora_state_dict`, into the model's adapters.

    Raises:
        ValueError: names or shapes are not those of the model's adapters; nothing was copied.
    """
    own = lora_state_dict(model)
    given = {_plain(key): value for key, value in state.items()}
    if own.keys() != given.keys():
        raise ValueError(
            f"load_lora_state_dict: state must hold the factors of the model, these do not fit: "
            f"{sorted(own.keys() ^ given.keys())}"
        )
    for name, value in own.items():
        if value.shape != given[name].shape:
            raise ValueError(
                f"load_lora_state_dict: {name} must have shape {list(value.shape)}, got {list(given[name].shape)}"
            )
    for name, value in own.items():
        value.copy_(given[name])


def _plain(key: str) -> str:
    key = re.sub(rf"(\.lora_(embedding_)?[AB])\.{ADAPTER}(?=\.weight$|$)", r"\1", key)
    return key if key.startswith("base_model.model.") else f"base_model.model.{key}"
