"""Inputs of looped_linear_attention by name, and the paper's form as their oracle."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern import looped_linear_attention
from effkern.ops import registry
from effkern.ops.looped_linear_attention import reference


class Case(NamedTuple):
    batch: int = 5
    examples: int = 9
    dim: int = 5
    queries: int = 0
    """0: one query per problem, without a dimension for it."""
    loops: int = 7
    form: str = "auto"
    free: bool = False
    steps: bool = False
    every_loop: bool = False


# Each is one path of the op. 32, 64: loops whose states plain.py, Triton and the C++ kernels hold at a time.
CASES: dict[str, Case] = {
    "factors": Case(form="factors"),
    "factors, steps, every loop": Case(form="factors", steps=True, every_loop=True, queries=3),
    "free": Case(free=True),
    "free, steps, every loop": Case(free=True, steps=True, every_loop=True, queries=2),
    "free, segments": Case(free=True, steps=True, loops=131, every_loop=True),
    "primal": Case(form="primal"),
    "primal, steps, every loop": Case(form="primal", steps=True, every_loop=True, queries=3),
    "primal, segments": Case(form="primal", loops=131, steps=True),
    "primal, one segment to the brim": Case(form="primal", loops=64, every_loop=True),
    "dual": Case(form="dual", examples=4),
    "dual, steps, every loop": Case(form="dual", examples=4, steps=True, every_loop=True, queries=3),
    "dual, more examples than features": Case(form="dual", steps=True, every_loop=True),
    "dual, segments": Case(form="dual", examples=4, loops=131, every_loop=True),
    "one of everything": Case(batch=1, examples=1, dim=1, loops=1, steps=True, every_loop=True),
    "one loop": Case(loops=1, form="primal"),
}

Given = dict[str, Tensor]


def make(c: Case, dtype: torch.dtype = torch.float32) -> Given:
    """Leaves by argument name. A is not symmetric; its size keeps the iteration of every problem contracting."""
    matrices = (c.loops,) if c.free else ()
    x = torch.randn(c.batch, c.examples, c.dim)
    size = c.examples / torch.linalg.matrix_norm(x, 2).square().max().item() if c.batch else 1.0
    given = {
        "x": x,
        "y": torch.randn(c.batch, c.examples),
        "query": torch.randn(c.batch, *((c.queries,) if c.queries else ()), c.dim),
        "preconditioner": size * (torch.eye(c.dim) + 0.3 * torch.randn(*matrices, c.dim, c.dim) / c.dim**0.5),
    }
    if c.steps:
        given["step_sizes"] = 0.4 + 0.4 * torch.rand(c.loops)
    return {name: t.to(dtype).requires_grad_() for name, t in given.items()}


def to(given: Given, dtype: torch.dtype) -> Given:
    return {name: t.detach().to(dtype).requires_grad_() for name, t in given.items()}


def formula(given: Given, c: Case) -> Tensor:
    """Predictions after each loop [L, B, M] (or the last one), by the paper's form."""
    query = given["query"] if c.queries else given["query"][:, None]
    out = reference.looped_linear_attention(
        given["x"], given["y"], query, given["preconditioner"], c.loops, given.get("step_sizes")
    )
    return out if c.every_loop else out[-1:]


def ours(given: Given, c: Case, impl: str, **keywords: Any) -> Tensor:
    options = {"form": c.form, "every_loop": c.every_loop, "impl": impl} | keywords
    out = looped_linear_attention(
        given["x"], given["y"], given["query"], given["preconditioner"], c.loops,
        step_sizes=given.get("step_sizes"), **options,
    )  # fmt: skip
    found = out.prediction[None] if out.per_loop is None else out.per_loop
    return found if c.queries else found[..., None]


def run(given: Given, output: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The predictions, and the gradients by argument name."""
    found = torch.autograd.grad(output, list(given.values()), grad.to(output.dtype))
    return {"predictions": output.detach(), **dict(zip(given, found))}


def implementations() -> list[str]:
    """Those that run here; Triton has its own file, as its interpreter is slow."""
    cpu = torch.device("cpu")
    known = registry.registered()["looped_linear_attention"]
    return [i.name for i in known if i.name != "triton" and i.unavailable(cpu) is None]
