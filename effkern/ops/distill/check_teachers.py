"""Argument checks of the teachers: types, shapes, dtypes, layout, and which divergence each can serve."""

import math
from typing import Any

import torch
from torch import Tensor

from effkern.ops.distill.checks import fail, number, positive, same_dtype, tensor
from effkern.ops.distill.rows import DIVERGENCES, SPARSE_KINDS
from effkern.ops.distill.types import (
    TeacherConfidence,
    TeacherHidden,
    TeacherLogits,
    TeacherLogProbs,
    TeacherSimilarity,
    TeacherTopK,
)


def check_teacher(teacher: Any, hidden: Tensor, vocab: int, divergence: str, teacher_temperature: float | None) -> None:
    """Sizes, layout, enough vocabulary, and a divergence that the teacher's entries suffice for."""
    rows, device = hidden.shape[0], hidden.device
    if isinstance(teacher, TeacherLogits):
        _check_dense("teacher.logits", teacher.logits, rows, device, vocab)
    elif isinstance(teacher, TeacherLogProbs):
        _check_dense("teacher.logprobs", teacher.logprobs, rows, device, vocab)
        if not DIVERGENCES[divergence].tempered:
            fail(ValueError, "divergence", "compare probabilities with TeacherLogProbs", repr(divergence))
    elif isinstance(teacher, TeacherHidden):
        _check_hidden(teacher, rows, device, vocab)
    elif isinstance(teacher, TeacherTopK):
        _check_sparse(teacher, rows, device, divergence, teacher_temperature)
    elif isinstance(teacher, TeacherConfidence):
        tensor("teacher.prob", teacher.prob, (rows,), device)
        _forward_only(teacher, divergence)
        if vocab < 2:
            fail(ValueError, "vocab_valid", "be at least 2 with TeacherConfidence", vocab)
    elif isinstance(teacher, TeacherSimilarity):
        tensor("teacher.table", teacher.table, (vocab, vocab), device)
        if teacher.prob is not None:
            tensor("teacher.prob", teacher.prob, (rows,), device)
        if not DIVERGENCES[divergence].tempered:
            fail(ValueError, "divergence", "compare probabilities with TeacherSimilarity", repr(divergence))
    else:
        fail(TypeError, "teacher", "be one of the Teacher classes or None", type(teacher).__name__)
    if divergence == "decoupled_kl" and vocab < 2:
        fail(ValueError, "vocab_valid", "be at least 2 with 'decoupled_kl'", vocab)


def _covers(name: str, size: int, vocab: int) -> None:
    if size < vocab:
        fail(ValueError, name, f"cover vocab_valid ({vocab}) entries of the vocabulary", size)


def _check_dense(name: str, x: Any, rows: int, device: torch.device, vocab: int) -> None:
    tensor(name, x, (rows, None), device)
    if rows > 0 and x.shape[1] > 1 and x.stride(1) != 1:
        fail(ValueError, name, "have stride 1 along the vocabulary", f"strides {list(x.stride())}")
    _covers(name, x.shape[1], vocab)


def _check_hidden(teacher: TeacherHidden, rows: int, device: torch.device, vocab: int) -> None:
    tensor("teacher.hidden", teacher.hidden, (rows, None), device)
    tensor("teacher.weight", teacher.weight, (None, teacher.hidden.shape[1]), device)
    same_dtype("teacher.weight", teacher.weight, "teacher.hidden", teacher.hidden)
    if teacher.bias is not None:
        tensor("teacher.bias", teacher.bias, (teacher.weight.shape[0],), device)
    number("teacher.logit_scale", teacher.logit_scale, low=-math.inf)
    if teacher.softcap is not None:
        positive("teacher.softcap", teacher.softcap)
    _covers("teacher.weight", teacher.weight.shape[0], vocab)


def _forward_only(teacher: Any, divergence: str) -> None:
    if divergence != "forward_kl":
        fail(ValueError, "divergence", f"be 'forward_kl' with {type(teacher).__name__}", repr(divergence))


def _check_sparse(
    teacher: TeacherTopK, rows: int, device: torch.device, divergence: str, temperature: float | None
) -> None:
    if teacher.kind not in SPARSE_KINDS:
        fail(ValueError, "teacher.kind", f"be one of {', '.join(map(repr, SPARSE_KINDS))}", repr(teacher.kind))
    tensor("teacher.ids", teacher.ids, (rows, None), device, (torch.int64, torch.int32))
    tensor("teacher.logprobs", teacher.logprobs, tuple(teacher.ids.shape), device)
    if teacher.ids.shape[1] == 0:
        fail(ValueError, "teacher.ids", "have at least one column", f"shape {list(teacher.ids.shape)}")
    if teacher.lse is not None:
        tensor("teacher.lse", teacher.lse, (rows,), device)
    if divergence == "reverse_kl":
        if teacher.kind != "tail_bucket":
            fail(ValueError, "divergence", f"be 'forward_kl' with a TeacherTopK of kind {teacher.kind!r}", "reverse_kl")
    else:
        _forward_only(teacher, divergence)
    exact = teacher.kind in ("renormalized", "both_renormalized")
    if temperature is not None and temperature != 1 and not exact:
        rule = f"be 1 with a TeacherTopK of kind {teacher.kind!r}: what was cut away cannot be re-tempered"
        fail(ValueError, "teacher_temperature", rule, temperature)
