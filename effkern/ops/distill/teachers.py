"""What the chunk driver asks a teacher for: its part of a chunk of rows, dense or sparse.

C rows of a chunk, V vocabulary, K entries of a sparse teacher, Dt hidden size of the teacher
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops.distill import gemm

Pick = Callable[[Tensor], Tensor]


class Source(NamedTuple):
    """A teacher as the op takes it: tensors, and what they are.

    "none": nothing; "rows": logits or log-probabilities [N, Vt]; "hidden": hidden states, weight and perhaps bias;
    "sparse": ids and log-probabilities [N, K]; "table": logits [V, V] by label, which `logit_scale` tempers, and
    perhaps confidences [N].
    """

    kind: str
    tensors: tuple[Tensor, ...]
    logit_scale: float = 1.0
    softcap: float | None = None


class TeacherRows(NamedTuple):
    """One chunk of a teacher."""

    dense_CV: Tensor | None = None
    ids_CK: Tensor | None = None
    logprobs_CK: Tensor | None = None


def prepare(source: Source) -> Source:
    """The source with what its chunks share already computed: the log-probabilities of a table."""
    if source.kind != "table":
        return source
    table, *prob = source.tensors
    log_table = table.to(torch.promote_types(table.dtype, torch.float32)) * source.logit_scale
    if prob:
        # The label's own entry comes from the confidence; the rest of the row is normalised without it.
        log_table = log_table.clone()
        log_table.fill_diagonal_(-torch.inf)
    return source._replace(tensors=(torch.log_softmax(log_table, -1), *prob))


def rows(source: Source, pick: Pick, labels_C: Tensor, vocab: int, buffer: Tensor | None) -> TeacherRows:
    """The chunk that `pick` cuts from tensors over all rows. `buffer` holds former logits of a "hidden" teacher."""
    if source.kind == "rows":
        return TeacherRows(pick(source.tensors[0]))
    if source.kind == "hidden":
        return TeacherRows(_hidden_logits(source, pick, vocab, buffer))
    if source.kind == "sparse":
        ids, logprobs = source.tensors
        return TeacherRows(None, pick(ids).contiguous(), pick(logprobs).contiguous())
    if source.kind == "table":
        return TeacherRows(_table_rows(source, pick, labels_C))
    return TeacherRows()


def _hidden_logits(source: Source, pick: Pick, vocab: int, buffer: Tensor | None) -> Tensor:
    hidden, weight, *bias = source.tensors
    u_CV = gemm.logits(pick(hidden), weight[:vocab], buffer)
    if bias:
        u_CV += bias[0][:vocab]
    if source.logit_scale != 1.0:
        u_CV *= source.logit_scale
    if source.softcap is not None:
        u_CV.div_(source.softcap).tanh_().mul_(source.softcap)
    return u_CV


def _table_rows(source: Source, pick: Pick, labels_C: Tensor) -> Tensor:
    log_table, *prob = source.tensors
    y = labels_C.long().clamp(0, log_table.shape[0] - 1)
    log_rho = log_table[y]
    if prob:
        p = pick(prob[0]).to(log_rho.dtype)[:, None]
        log_rho = (log_rho + torch.log1p(-p)).scatter_(1, y[:, None], p.log())
    return log_rho
