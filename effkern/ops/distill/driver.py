"""Which way a call of the loss is computed, by the cost model: chunks of rows, or slices of the vocabulary."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops.distill import ceilings, chunked, cost, gemm, streamed
from effkern.ops.distill.rows import DIVERGENCES, RowOptions


class Memory(NamedTuple):
    """What a call may use: bytes of one V-wide buffer, and of everything beside inputs and gradients; None: defaults.

    `may_stream`: slices of the vocabulary may be chosen, whose row pass is PyTorch's.
    """

    chunk: int | None = None
    limit: int | None = None
    may_stream: bool = False


@lru_cache(4096)
def _plan(
    problem: cost.Problem, device: torch.device, chunk: int, limit: int | None, methods: tuple[str, ...]
) -> cost.Plan:
    return cost.plan(problem, ceilings.of_device(device), budget=limit, chunk_bytes=chunk, methods=methods)


def plan(
    x: chunked.Inputs, options: RowOptions, vocab: int, impl: str, num_rows: int, need_weight: bool, memory: Memory
) -> cost.Plan:
    """How the cost model would have this call computed."""
    kind = {"rows": "logits", "table": "logits"}.get(x.teacher.kind, x.teacher.kind)
    dtype = x.hidden_ND.dtype
    acc = gemm.accumulator_dtype(dtype)
    # One chunk saves the accumulators of a weight gradient that leaves in another type, if there is one to be made.
    own_grad = need_weight and x.weight_grad_VD is None
    teacher_dim = x.teacher.tensors[0].shape[1] if kind == "hidden" else 0
    problem = cost.Problem(
        num_rows, vocab, x.hidden_ND.shape[1], kind, teacher_dim,  # type: ignore[arg-type]
        element_bytes=dtype.itemsize, weight_grad_bytes=(x.weight_grad_dtype if own_grad else acc).itemsize,
        logit_bytes=acc.itemsize, passes=DIVERGENCES[options.divergence].passes,
        grad_in_place=impl == "cpp", slice_buffers=streamed.buffers(x.hidden_ND.device),
    )  # fmt: skip
    device = x.hidden_ND.device
    chunk = chunked.chunk_bytes(device) if memory.chunk is None else memory.chunk
    streams = memory.may_stream and memory.limit is not None and streamed.covers(options, x.teacher)
    return _plan(problem, device, chunk, memory.limit, cost.METHODS if streams else cost.UNIVERSAL)


def run(
    x: chunked.Inputs,
    options: RowOptions,
    vocab: int,
    impl: str,
    needs: tuple[bool, bool, bool],
    memory: Memory,
    num_kept: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Statistics and gradients, as `chunked.run`. `num_kept`: number of rows that count, where the caller knows it."""
    index_M = chunked.kept_rows(x.labels_N, options.ignore_index, num_kept)
    num_rows = x.hidden_ND.shape[0] if index_M is None else index_M.shape[0]
    way = plan(x, options, vocab, impl, num_rows, needs[1], memory)
    if way.method == "streamed":
        return streamed.run(x, options, vocab, needs, index_M, way.columns)
    return chunked.run(x, options, vocab, impl, needs, index_M, way.rows)
