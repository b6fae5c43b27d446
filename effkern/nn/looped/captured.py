"""Tensors that a core reads from around it: they would silently get no gradient from loops that are detached."""

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import GradientEdge


def check_captured(outputs: list[GradientEdge], known: Iterable[Tensor]) -> None:
    """Raises ValueError if the graph of `outputs` reaches a leaf that is not among `known`."""
    leaves = {id(x) for x in known}
    # A tensor that is not a leaf of autograd's own graph ends the walk as well.
    ends = {x.grad_fn for x in known if x.grad_fn is not None}
    todo = [end.node for end in outputs]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node in ends:
            continue
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in leaves:
            raise ValueError(
                "LoopedBlock: core must get every tensor with a gradient as an argument or own it as a parameter, got "
                f'one of shape {tuple(variable.shape)} from around it (mode="autograd" takes it)'
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
