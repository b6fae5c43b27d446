"""Attention's first products and LAuReL's in one: [q | k | v | x A] = x [Wq | Wk | Wv | A]."""

from typing import Any

import torch
from torch import Tensor, nn

from effkern.integrations.transformers.swap import is_bare, original_class

KEY = "laurel_products"


class _Given:
    """An attention module whose projections are computed already; everything else is the module's."""

    def __init__(self, attention: nn.Module, products: dict[str, Tensor]) -> None:
        self._attention, self._products = attention, products

    def __getattr__(self, name: str) -> Any:
        if name in self._products:
            return lambda hidden_states: self._products[name]
        return getattr(self._attention, name)


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Forward of the attention module: the original's, on the products that the layer passes along, if it does."""
    products = kwargs.pop(KEY, None)
    return original_class(self).forward(self if products is None else _Given(self, products), *args, **kwargs)


def products(x: Tensor, attention: nn.Module, down: nn.Linear) -> tuple[dict[str, Tensor], Tensor] | None:
    """Each projection of `x` by the name of its module, and `x` times `down`'s weight; None where it is not worthwhile.

    Joining copies the weights, 3 numbers moved for each of theirs; what it saves is reading x again for every product.
    """
    names = [name for name in ("q_proj", "k_proj", "v_proj") if name in attention._modules]
    linears = [getattr(attention, name) for name in names]
    rows = [linear.weight.shape[0] for linear in (*linears, down)] if all(map(is_plain, linears)) else []
    if not rows or x.shape[:-1].numel() < sum(rows):
        return None
    joined = torch.cat([linear.weight for linear in (*linears, down)])
    *parts, of_down = nn.functional.linear(x, joined).split(rows, -1)
    return dict(zip(names, parts)), of_down.to(x.dtype)


def is_plain(linear: nn.Module) -> bool:
    return type(linear) is nn.Linear and linear.bias is None and is_bare(linear)
