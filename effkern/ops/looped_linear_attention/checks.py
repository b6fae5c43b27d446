"""Rules of looped_linear_attention's arguments."""

import torch
from torch import Tensor

from effkern.ops.looped_linear_attention.problem import FORMS

OP = "looped_linear_attention"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Most numbers of state that the C++ kernels take (a matrix of it for each of 16 problems at once), and what Triton
# keeps in registers: features or queries, and loops.
CPP_STATE, TRITON_TILE, TRITON_LOOPS = 256, 32, 1024


def check_types(steps: Tensor | None, loops: int, **tensors: Tensor) -> None:
    given = tensors if steps is None else {**tensors, "step_sizes": steps}
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{OP}: {name} must be float32, float64, bfloat16 or float16, got {t.dtype}")
        if t.device != tensors["x"].device:
            raise ValueError(f"{OP}: {name} must be on {tensors['x'].device}, got {t.device}")
    for name in ("y", "query"):
        if tensors[name].dtype != tensors["x"].dtype:
            raise TypeError(f"{OP}: {name} must have the dtype of x, {tensors['x'].dtype}, got {tensors[name].dtype}")
    if type(loops) is not int:
        raise TypeError(f"{OP}: loops must be an int, got {loops!r}")
    if loops < 1:
        raise ValueError(f"{OP}: loops must be at least 1, got {loops}")


def check_shapes(x: Tensor, y: Tensor, query: Tensor) -> None:
    if x.dim() < 2 or x.shape[-1] < 1 or x.shape[-2] < 1:
        raise ValueError(f"{OP}: x must have shape [..., n, d] with n, d >= 1, got {tuple(x.shape)}")
    if y.shape != x.shape[:-1]:
        raise ValueError(f"{OP}: y must have shape {tuple(x.shape[:-1])}, got {tuple(y.shape)}")
    leading, dim = x.shape[:-2], x.shape[-1]
    single = query.shape == (*leading, dim)
    if not single and not (query.dim() == x.dim() and query.shape[:-2] == leading and query.shape[-1] == dim):
        rule = f"have shape {(*leading, dim)} or [{', '.join(map(str, (*leading, 'm', dim)))}]"
        raise ValueError(f"{OP}: query must {rule}, got {tuple(query.shape)}")
    if not single and query.shape[-2] < 1:
        raise ValueError(f"{OP}: query must hold at least one query per problem, got {tuple(query.shape)}")


def check_parameters(preconditioner: Tensor, steps: Tensor | None, dim: int, loops: int) -> None:
    if preconditioner.shape not in ((dim, dim), (loops, dim, dim)):
        rule = f"have shape ({dim}, {dim}), or ({loops}, {dim}, {dim}) for loops={loops}"
        raise ValueError(f"{OP}: preconditioner must {rule}, got {tuple(preconditioner.shape)}")
    if steps is not None and steps.shape != (loops,):
        raise ValueError(f"{OP}: step_sizes must have shape ({loops},), one per loop, got {tuple(steps.shape)}")


def check_form(form: str, shared: bool) -> None:
    if form not in ("auto", *FORMS):
        raise ValueError(f"{OP}: form must be one of {', '.join(map(repr, ('auto', *FORMS)))}, got {form!r}")
    if not shared and form not in ("auto", "factors"):
        raise ValueError(f"{OP}: form must be 'auto' or 'factors' with one preconditioner per loop, got {form!r}")


def not_covered(impl: str, state: int, dim: int, queries: int, loops: int, dtype: torch.dtype) -> str | None:
    """The rule of an implementation that these sizes break."""
    if impl == "cpp" and max(state, dim) > CPP_STATE:
        return f"at most {CPP_STATE} numbers of state and features, got {max(state, dim)}"
    if impl == "triton":
        if dtype == torch.float64:
            return "float32, bfloat16 and float16, got torch.float64"
        if loops > TRITON_LOOPS:
            return f"at most {TRITON_LOOPS} loops, got {loops}"
        if max(dim, queries) > TRITON_TILE:
            return f"at most {TRITON_TILE} features and queries, got {max(dim, queries)}"
    return None
