"""Checks of what stands in the tensors, made by the op itself: labels and omega always, the teacher if asked for.

On a GPU an asynchronous assertion says what is wrong, so that nothing waits.
"""

import torch
from torch import Tensor

from effkern.ops.distill.rows import RowOptions
from effkern.ops.distill.teachers import Source

# Rows of a V-wide teacher that are looked at at a time.
ROWS = 128
# Largest mass of log-probabilities: theirs is rounded to the type they are stored in.
MASS = 1.01


def check_rows(labels: Tensor, omega: Tensor, ignore_index: int, vocab: int, num_kept: int | None) -> None:
    """Labels within the vocabulary, omega within [0, 1], and `num_kept` as said."""
    kept = labels != ignore_index
    in_range = ((labels >= 0) & (labels < vocab)) | ~kept
    omega_ok = ((omega >= 0) & (omega <= 1)) | ~kept
    rule = f"lie in [0, {vocab}) or be ignore_index ({ignore_index})"
    _require(in_range, "labels", rule, labels)
    _require(omega_ok, "omega", "lie in [0, 1]", omega)
    if num_kept is not None:
        count = kept.sum()
        _require(count == num_kept, "num_kept", f"be the number of rows that are not ignored, not {num_kept}", count)


def _require(holds: Tensor, name: str, rule: str, got: Tensor) -> None:
    """Raise with the first entry of `got` where `holds` is false."""
    if holds.device.type != "cpu":
        torch._assert_async(holds.all(), f"linear_distill_loss: {name} must {rule}")
    elif not bool(holds.all()):
        raise ValueError(f"linear_distill_loss: {name} must {rule}, got {got[~holds][0].item()}")


def check_teacher(source: Source, options: RowOptions, labels: Tensor, vocab: int) -> None:
    """Every value of the teacher on the rows that count."""
    kept_N = labels != options.ignore_index
    if source.kind == "sparse":
        ids, logprobs = source.tensors
        _check_sparse(ids, logprobs, kept_N, vocab, options.teacher)
    elif source.kind == "table":
        _check_finite("teacher.table", source.tensors[0])
        for prob in source.tensors[1:]:
            ok = ((prob >= 0) & (prob <= 1)) | ~kept_N
            _require(ok, "teacher.prob", "lie in [0, 1]", prob)
    elif source.kind == "hidden":
        _check_finite("teacher.hidden", torch.where(kept_N[:, None], source.tensors[0], 0))
    elif source.kind == "rows":
        _check_dense(source.tensors[0], kept_N, options.teacher == "logprobs", vocab)


def _check_finite(name: str, x: Tensor) -> None:
    _require(x.isfinite(), name, "be finite", x)


def _check_dense(rows_NV: Tensor, kept_N: Tensor, logprobs: bool, vocab: int) -> None:
    name = "teacher.logprobs" if logprobs else "teacher.logits"
    for n in range(0, rows_NV.shape[0], ROWS):
        part = torch.where(kept_N[n : n + ROWS, None], rows_NV[n : n + ROWS, :vocab], 0)
        ok = part < torch.inf
        _require(ok, name, "hold neither NaN nor +inf", part)
        if logprobs:
            mass = torch.where(kept_N[n : n + ROWS], part.float().exp().sum(-1), 1.0)
            _require(mass <= MASS, name, "have a mass of at most 1", mass)
        else:
            most = part.amax(-1)
            _require(most > -torch.inf, name, "have a finite entry in every row", most)


def _check_sparse(ids: Tensor, logprobs: Tensor, kept_N: Tensor, vocab: int, kind: str) -> None:
    ids = torch.where(kept_N[:, None], ids, -1)
    filled = ids != -1
    in_range = ((ids >= 0) & (ids < vocab)) | ~filled
    rule = f"lie in [0, {vocab}), or be -1 in an empty slot"
    _require(in_range, "teacher.ids", rule, ids)
    ordered = torch.where(filled, ids, -1 - torch.arange(ids.shape[1], device=ids.device)).sort(-1).values
    distinct = ordered[:, 1:] != ordered[:, :-1]
    _require(distinct, "teacher.ids", "be distinct in a row", ordered[:, 1:])
    some = filled.any(-1) | ~kept_N
    _require(some, "teacher.ids", "have an entry in every row that counts", filled.sum(-1))
    values = torch.where(filled, logprobs, -1.0)
    ok = values <= 1e-3
    _require(ok, "teacher.logprobs", "be logarithms of masses of at most 1", values)
    mass = torch.where(filled, logprobs.float(), -torch.inf).exp().sum(-1)
    # Where the rest gets what the kept entries leave, they may leave everything.
    some_mass = (mass > 0) | (kind in ("tail_bucket", "tail_to_label", "uniform_tail"))
    fits = (mass <= MASS) & some_mass | ~kept_N
    _require(fits, "teacher.logprobs", "have a mass above 0 and at most 1", mass)
