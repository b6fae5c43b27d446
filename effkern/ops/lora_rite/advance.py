"""A group's update with its next bases, and a second look at factors that the step has stretched.

`stages.rebase_` sees y^T y alone, with y = X W. Where one direction of X has grown by more than 316 times its
neighbours, those are below the rounding of y^T y, though X itself has full rank: they would lose a step, and their
moments. So such a factor's basis comes from a float64 Gram matrix of X itself, in the same step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from effkern.ops.lora_rite import stages
from effkern.ops.lora_rite.group import RiteGroup
from effkern.ops.lora_rite.stages import Products, Reduce, Update


def advance_(
    group: RiteGroup,
    grads: Sequence[Tensor],
    update: Update,
    tolerance: float,
    reduce: Reduce | None = None,
    impl: str = "auto",
) -> None:
    """update_ and rebase_ of a group, with the sums over rows in between.

    The second look costs a copy of `whiten`, and nothing else where no factor was stretched. The host decides on it:
    on CUDA therefore only where the r x r stages are plain, which wait for the device in any case. The compiled ones
    cut off for one step what was left behind.
    """
    lists = (group.factors, group.moments, grads, group.wide)
    like = group.factors[0]
    if stages.choose(impl, like, group.rank) == "triton" and reduce is None:
        from effkern.ops.lora_rite import triton

        single = like.dtype == torch.float32
        if triton.advance_(*lists, update, group.whiten, group.transport, group.exact, single, tolerance):
            return
    products = stages.update_(*lists, update, group.whiten, group.exact, impl=impl)
    if reduce is not None:
        products = Products(*(reduce(group, x) for x in products))
    before, was_exact = group.whiten, group.exact
    looks = like.device.type == "cpu" or (
        like.device.type == "cuda" and not stages.small_compiled(impl, like, group.rank)
    )
    if looks:
        before, was_exact = before.clone(), was_exact.clone()
    stages.rebase_(group, products, update.gate, tolerance, impl)
    if looks:
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
