"""The basis of a factor that one step has stretched: more in one direction than float32 products of y = X W can follow.

`stages.rebase_` sees y^T y alone. Where one direction has grown by more than 316 times its neighbours, those are below
the rounding of y^T y, though X itself has full rank: without a look at X they would lose a step and their moments.
"""

import torch
from torch import Tensor

from effkern.ops.lora_rite import stages
from effkern.ops.lora_rite.group import RiteGroup
from effkern.ops.lora_rite.stages import Products, Reduce


def rebase_(
    group: RiteGroup,
    products: Products,
    gate: Tensor | None,
    tolerance: float,
    reduce: Reduce | None = None,
    impl: str = "auto",
) -> None:
    """`stages.rebase_`, and a float64 Gram matrix of X itself for each factor that it could not keep its full rank.

    On CUDA only where the r x r stages are plain, which wait for the device in any case: the compiled ones cut such
    directions off for one step. Costs a copy of `whiten`, and nothing else where no factor was stretched.
    """
    like = group.factors[0]
    if like.device.type != "cpu" and stages.small_compiled(impl, like, group.rank):
        stages.rebase_(group, products, gate, tolerance, impl)
        return
    before, was_exact = group.whiten.clone(), group.exact.clone()
    stages.rebase_(group, products, gate, tolerance, impl)
    places = ((was_exact == 0) & (group.exact != 0)).nonzero().flatten()
    if len(places):
        _from_factors(group, products, places, before[places], tolerance, reduce, impl)


def _from_factors(
    group: RiteGroup, products: Products, places: Tensor, whiten: Tensor, tolerance: float,
    reduce: Reduce | None, impl: str,
) -> None:  # fmt: skip
    """The basis of the factors at `places`; whiten [len(places), r, r] is the one that the products were made with."""
    chosen = places.tolist()
    factors, wide = [group.factors[i] for i in chosen], [group.wide[i] for i in chosen]
    grams = stages.gram(factors, wide, impl=impl)
    if reduce is not None:
        whole = torch.zeros_like(products.grams)
        whole[places] = grams
        grams = reduce(group, whole)[places]
    # X^T u = W^-T y^T u, with W as the products took it: such a factor had full rank.
    used = whiten.to(factors[0].dtype).double()
    crosses, _ = torch.linalg.solve_ex(used.mT, products.crosses[places])
    part = RiteGroup(
        factors=factors,
        wide=wide,
        moments=[],
        whiten=torch.eye(group.rank, dtype=torch.float64, device=grams.device).repeat(len(chosen), 1, 1),
        second=group.second[places],
        transport=torch.empty_like(grams),
        escaped=group.escaped[places],
        steps=group.steps[places],
        exact=torch.ones_like(group.exact[places]),
        rows=group.rows[places],
    )
    stages.rebase_(part, Products(grams, crosses.contiguous(), products.sizes[places]), None, tolerance, impl)
    for name in ("whiten", "transport", "exact"):
        getattr(group, name)[places] = getattr(part, name)
