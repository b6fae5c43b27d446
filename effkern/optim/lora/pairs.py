"""Which parameters of a model are the two factors of one LoRA pair, and along which dimension their rank lies."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

# Attribute names of the two factors, as PEFT has them: modules of layers, parameters of embeddings.
NAMES = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


class LoraPair(NamedTuple):
    """Two factors of one product; `rank_dim_*` is the dimension of length r, all others together are the rows."""

    name: str
    A: Tensor
    B: Tensor
    rank_dim_A: int
    rank_dim_B: int

    @property
    def rank(self) -> int:
        return self.A.shape[self.rank_dim_A]


def tall(tensor: Tensor, rank_dim: int, like: Tensor | None = None) -> Tensor:
    """View of a factor as [rows, r], without a copy: lora_B.weight itself, and lora_A.weight transposed.

    Kernel positions of a convolution are rows. Their order is that of the memory of `like` (the parameter), so that a
    parameter in channels_last is a view too; a gradient or moment of another layout then comes as a copy.

    Raises:
        ValueError: the parameter has gaps, so that no view exists.
    """
    layout = tensor if like is None else like
    dims = [d for d in range(layout.dim()) if d != rank_dim]
    strides = layout.stride()
    dims.sort(key=lambda d: (-strides[d], d))
    moved = tensor.permute(*dims, rank_dim)
    if like is not None:
        return moved.reshape(-1, tensor.shape[rank_dim])
    try:
        return moved.view(-1, tensor.shape[rank_dim])
    except RuntimeError as error:
        raise ValueError(
            f"LoRA factor must be dense in memory, got shape {list(tensor.shape)} with strides {tensor.stride()}"
        ) from error


def _check(pair: LoraPair) -> LoraPair:
    r_A, r_B = pair.A.shape[pair.rank_dim_A], pair.B.shape[pair.rank_dim_B]
    if r_A != r_B:
        raise ValueError(
            f"{pair.name}: both factors must have the same rank, got {r_A} in {list(pair.A.shape)} "
            f"and {r_B} in {list(pair.B.shape)}"
        )
    for label, factor in (("A", pair.A), ("B", pair.B)):
        if not factor.is_floating_point():
            raise TypeError(f"{pair.name}: {label} must be a real floating tensor, got {factor.dtype}")
        if factor.numel() == 0:
            raise ValueError(f"{pair.name}: {label} must not be empty, got shape {list(factor.shape)}")
    if pair.A.device != pair.B.device:
        raise ValueError(f"{pair.name}: both factors must be on one device, got {pair.A.device} and {pair.B.device}")
    return pair


def _by_adapter(holder: Any) -> dict[str, Tensor]:
    """Factors of one attribute by adapter name; a bare module or parameter is the adapter ""."""
    if isinstance(holder, Tensor):
        return {"": holder}
    if isinstance(holder, (nn.ModuleDict, nn.ParameterDict, Mapping)):
        return {
            key: value if isinstance(value, Tensor) else cast(Tensor, value.weight) for key, value in holder.items()
        }
    return {"": holder.weight}


def find_pairs(model: nn.Module, adapter: str | None = None) -> list[LoraPair]:
    """All trainable LoRA pairs of a model, in the order of its modules.

    A pair is what one module keeps as `lora_A` and `lora_B` (or `lora_embedding_A` and `lora_embedding_B`), under one
    adapter name: modules with a weight [r, ...] and [rows, r, ...], or parameters [r, columns] and [rows, r]. Factors
    that both have requires_grad=False belong to an adapter that is not trained and are left out.

    Args:
        adapter: only the pairs of this adapter.

    Raises:
        ValueError: a factor without its partner, two ranks in one pair, or experts stacked in one factor; named.
    """
    found: list[LoraPair] = []
    for path, module in model.named_modules():
        for name_A, name_B in NAMES:
            holders = getattr(module, name_A, None), getattr(module, name_B, None)
            if holders[0] is None and holders[1] is None:
                continue
            place = f"{path}." if path else ""
            if holders[0] is None or holders[1] is None:
                missing, there = (name_A, name_B) if holders[0] is None else (name_B, name_A)
                raise ValueError(f"find_pairs: {place}{there} must have a partner, got no {place}{missing}")
            factors_A, factors_B = _by_adapter(holders[0]), _by_adapter(holders[1])
            for key in [*factors_A, *(key for key in factors_B if key not in factors_A)]:
                suffix = f".{key}" if key else ""
                if key not in factors_A or key not in factors_B:
                    missing, there = (name_A, name_B) if key not in factors_A else (name_B, name_A)
                    raise ValueError(
                        f"find_pairs: {place}{there}{suffix} must have a partner, got no {place}{missing}{suffix}"
                    )
                A, B = factors_A[key], factors_B[key]
                if adapter not in (None, key) or not (A.requires_grad or B.requires_grad):
                    continue
                if getattr(module, "num_experts", 1) > 1:
                    raise ValueError(
                        f"find_pairs: {path} must hold one product, got {module.num_experts} experts in one factor"
                    )
                found.append(_check(LoraPair(f"{place}{name_A}{suffix}", A, B, 0, 1)))
    return found


def pair_names(named: Iterable[tuple[str, Tensor]]) -> list[LoraPair]:
    """Pairs among named parameters, such as model.named_parameters(): B has the name of A with the letter changed.

    Raises:
        ValueError: a parameter that is no factor, or whose partner is not in the list; all are named.
    """
    parameters = dict(named)
    used: set[str] = set()
    pairs: list[LoraPair] = []
    for name, A in parameters.items():
        for mark_A, mark_B in NAMES:
            parts = name.split(".")
            if mark_A not in parts:
                continue
            partner = ".".join(mark_B if part == mark_A else part for part in parts)
            if partner in parameters:
                pairs.append(_check(LoraPair(name, A, parameters[partner], 0, 1)))
                used |= {name, partner}
    left = [name for name in parameters if name not in used]
    if left:
        raise ValueError(f"LoRA parameters must come in pairs lora_A, lora_B, got without a partner: {', '.join(left)}")
    return pairs


def orient(name: str, A: Tensor, B: Tensor) -> LoraPair:
    """The pair (A, B) with the rank dimension of each factor, from their shapes alone.

    The rank is the length that both have and that is not above the rest of either. Where a shape leaves a choice (a
    square factor, or several common lengths) there is no safe guess, and the pair must be given as a LoraPair.

    Raises:
        ValueError: no or several readings of the shapes.
    """

    def candidates(X: Tensor) -> list[tuple[int, int]]:
        return [(d, n) for d, n in enumerate(X.shape[:2]) if X.dim() >= 2 and n <= X.numel() // max(1, n)]

    fits = [(i, j) for i, n in candidates(A) for j, m in candidates(B) if n == m]
    if len(fits) != 1:
        what = "no common rank" if not fits else "several readings"
        raise ValueError(
            f"{name}: the shapes of a pair must say which dimension is the rank, got {list(A.shape)} and "
            f"{list(B.shape)} with {what}; give LoraPair(name, A, B, rank_dim_A, rank_dim_B)"
        )
    return _check(LoraPair(name, A, B, *fits[0]))


def as_pairs(what: Any, where: str = "params") -> list[LoraPair]:
    """LoRA pairs of a model, of (A, B) tuples or LoraPairs, of named parameters, or of a flat list A, B, A, B.

    A flat list is taken only in PEFT's layout, A [r, ...] followed by B [rows, r, ...].

    Raises:
        TypeError: none of these.
        ValueError: an odd or ambiguous list; the message names the entry.
    """
    if isinstance(what, nn.Module):
        pairs = find_pairs(what)
        if not pairs:
            raise ValueError(f"{where} must hold LoRA pairs (lora_A and lora_B of its modules), got none")
        return pairs
    if isinstance(what, Tensor):
        raise TypeError(f"{where} must be a model or a list of pairs, got one tensor")
    items = list(what)
    if items and all(isinstance(item, Tensor) for item in items):
        if len(items) % 2:
            raise ValueError(f"{where} must hold factors in the order A, B, A, B, got {len(items)} tensors")
        pairs = []
        for i in range(0, len(items), 2):
            A, B = items[i], items[i + 1]
            if A.dim() < 2 or B.dim() < 2 or A.shape[0] != B.shape[1]:
                raise ValueError(
                    f"{where}[{i}] and [{i + 1}] must be A [r, ...] and B [rows, r, ...] of one pair, got "
                    f"{list(A.shape)} and {list(B.shape)}; give the model or (A, B) tuples instead"
                )
            pairs.append(_check(LoraPair(f"{where}[{i}]", A, B, 0, 1)))
        return pairs
    if items and all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in items):
        return pair_names(items)
    pairs = []
    for i, item in enumerate(items):
        if isinstance(item, LoraPair):
            pairs.append(_check(item))
        elif isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(x, Tensor) for x in item):
            pairs.append(orient(f"{where}[{i}]", *item))
        else:
            raise TypeError(f"{where}[{i}] must be a pair (A, B) of tensors or a LoraPair, got {type(item).__name__}")
    if not pairs:
        raise ValueError(f"{where} must hold at least one LoRA pair, got none")
    return pairs


def check_distinct(pairs: Iterable[LoraPair]) -> None:
    """Raises ValueError naming both pairs if a factor occurs twice: its two steps would work against each other."""
    seen: dict[Any, str] = {}
    for pair in pairs:
        for label, factor in (("A", pair.A), ("B", pair.B)):
            here = f"{label} of {pair.name}"
            for key in _identities(factor):
                if key in seen:
                    raise ValueError(
                        f"LoRA factors must belong to one pair each, got {here} shared with {seen[key]}; "
                        "one step cannot be invariant for two products"
                    )
                seen[key] = here


def _identities(factor: Tensor) -> list[Any]:
    """What two factors must not share: the object, and where it has memory of its own the place of it."""
    plain = type(factor) in (Tensor, nn.Parameter) and factor.device.type != "meta"
    return [id(factor), (factor.device, factor.data_ptr())] if plain else [id(factor)]


def other_trainable(model: nn.Module, pairs: Iterable[LoraPair]) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters of a model that are no factor of any pair (biases, norms, DoRA magnitudes ...)."""
    factors = {id(x) for pair in pairs for x in (pair.A, pair.B)}
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in factors]
