"""The recurrences in plain PyTorch, all problems at once, with gradients by hand; any device, float32 or float64.

Backward keeps nothing but the inputs. It runs the recurrence again and stores the state every SEGMENT loops, then takes
the segments from the last to the first, with the states of one segment at a time. Running the recurrence backwards
instead, s = (1 - e G)^-1 (s' - e h), would be exact in real numbers only: it magnifies what forward has made small.

    mu_l = e_l lambda_{l+1},  lambda_l = lambda_{l+1} - G^T mu_l + (gradient of the prediction after loop l) C
    dG = -sum_l mu_l s_l^T,   dh = sum_l mu_l,   de_l = lambda_{l+1} . r_l,   r_l = h - G s_l

The residual r has a recurrence of its own, r <- r - e G T r, because it gets small: taken as a difference it would have
the absolute error of h. With T = A_l^T ("factors") lambda meets A_l first, and dA_l = e_l r_l lambda_{l+1}^T.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from effkern.ops.looped_linear_attention.problem import Grads, Needs, Problem

SEGMENT = 32


State = tuple[Tensor, Tensor]


class Recurrence(NamedTuple):
    """s <- s + e_l T_l (h - G s), prediction C s; T_l is A_l^T, or 1 (None) where G and h have it in them.

    A state is s and r = h - G s, [B, K] each.
    """

    g_BKK: Tensor
    h_BK: Tensor
    c_BMK: Tensor
    precondition: Tensor | None
    steps_L: Tensor | None

    def step(self, layer: int) -> Tensor | float:
        return 1.0 if self.steps_L is None else self.steps_L[layer]

    def matrix(self, layer: int) -> Tensor:
        """A_l."""
        assert self.precondition is not None
        return self.precondition[layer if self.precondition.shape[0] > 1 else 0]

    def start(self) -> State:
        return torch.zeros_like(self.h_BK), self.h_BK

    def advance(self, state: State, layer: int) -> State:
        s_BK, residual_BK = state
        change_BK = residual_BK if self.precondition is None else residual_BK @ self.matrix(layer)
        change_BK = self.step(layer) * change_BK
        return s_BK + change_BK, residual_BK - _apply(self.g_BKK, change_BK)

    def predict(self, state_BK: Tensor) -> Tensor:
        return _apply(self.c_BMK, state_BK)


def _apply(matrix_BIJ: Tensor, vector_BJ: Tensor) -> Tensor:
    return torch.bmm(matrix_BIJ, vector_BJ[:, :, None])[:, :, 0]


def _outer(a_BI: Tensor, b_BJ: Tensor) -> Tensor:
    return a_BI[:, :, None] * b_BJ[:, None, :]


def _moments(p: Problem) -> tuple[Tensor, Tensor]:
    """S and b."""
    xt_BDN = p.x_BND.transpose(1, 2)
    return torch.bmm(xt_BDN, p.x_BND) / p.x_BND.shape[1], _apply(xt_BDN, p.y_BN) / p.x_BND.shape[1]


def _prepare(p: Problem) -> Recurrence:
    if p.form == "dual":
        mapped_BND = p.x_BND @ p.preconditioner[0]
        turned_BDN = mapped_BND.transpose(1, 2)
        n = p.x_BND.shape[1]
        return Recurrence(
            torch.bmm(p.x_BND, turned_BDN) / n, p.y_BN / n, torch.bmm(p.query_BMD, turned_BDN), None, p.steps_L
        )
    gram_BDD, moment_BD = _moments(p)
    if p.form == "factors":
        return Recurrence(gram_BDD, moment_BD, p.query_BMD, p.preconditioner, p.steps_L)
    turned_DD = p.preconditioner[0].t()
    return Recurrence(turned_DD @ gram_BDD, moment_BD @ p.preconditioner[0], p.query_BMD, None, p.steps_L)


def forward(p: Problem) -> Tensor:
    """Predictions, [L, B, M] or [1, B, M]."""
    r = _prepare(p)
    state = r.start()
    predictions = []
    for layer in range(p.loops):
        state = r.advance(state, layer)
        if p.every_loop or layer == p.loops - 1:
            predictions.append(r.predict(state[0]))
    return torch.stack(predictions)


def backward(p: Problem, grad_LBM: Tensor, needs: Needs) -> Grads:
    r = _prepare(p)
    checkpoints = []
    state = r.start()
    for layer in range(p.loops):
        if layer % SEGMENT == 0:
            checkpoints.append(state)
        state = r.advance(state, layer)
    grad_g_BKK, grad_h_BK, grad_c_BMK = (torch.zeros_like(t) for t in (r.g_BKK, r.h_BK, r.c_BMK))
    grad_a = torch.zeros_like(p.preconditioner)
    grad_steps_L = p.x_BND.new_zeros(p.loops)
    costate_BK = torch.zeros_like(r.h_BK)
    for segment in reversed(range(len(checkpoints))):
        first, last = segment * SEGMENT, min((segment + 1) * SEGMENT, p.loops)
        states = [checkpoints[segment]]
        for layer in range(first, last):
            states.append(r.advance(states[-1], layer))
        for layer in reversed(range(first, last)):
            (before_BK, residual_BK), (after_BK, _) = states[layer - first : layer - first + 2]
            if p.every_loop or layer == p.loops - 1:
                grad_BM = grad_LBM[layer if p.every_loop else 0]
                costate_BK = costate_BK + torch.bmm(grad_BM[:, None], r.c_BMK)[:, 0]
                grad_c_BMK += _outer(grad_BM, after_BK)
            sent_BK = costate_BK
            if r.precondition is not None:
                sent_BK = costate_BK @ r.matrix(layer).t()
                at = layer if grad_a.shape[0] > 1 else 0
                grad_a[at] += r.step(layer) * (residual_BK.t() @ costate_BK)
            grad_steps_L[layer] = (residual_BK * sent_BK).sum()
            sent_BK = r.step(layer) * sent_BK
            grad_g_BKK -= _outer(sent_BK, before_BK)
            grad_h_BK += sent_BK
            costate_BK = costate_BK - torch.bmm(sent_BK[:, None], r.g_BKK)[:, 0]
    of_inputs = _of_dual if p.form == "dual" else _of_moments
    of_x, of_y, of_query, of_a = of_inputs(p, grad_g_BKK, grad_h_BK, grad_c_BMK)
    return Grads(
        of_x if needs.data else None,
        of_y if needs.data else None,
        of_query if needs.data else None,
        (grad_a if of_a is None else of_a[None]) if needs.preconditioner else None,
        grad_steps_L if needs.steps else None,
    )


Found = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _of_dual(p: Problem, grad_g_BNN: Tensor, grad_h_BN: Tensor, grad_c_BMN: Tensor) -> Found:
    """Through G = X (X A)^T / n, h = y / n, C = q (X A)^T: the gradients of x, y, query and A."""
    n, a_DD = p.x_BND.shape[1], p.preconditioner[0]
    mapped_BND = p.x_BND @ a_DD
    grad_mapped_BND = torch.bmm(grad_g_BNN.transpose(1, 2), p.x_BND) / n
    grad_mapped_BND += torch.bmm(grad_c_BMN.transpose(1, 2), p.query_BMD)
    grad_x_BND = torch.bmm(grad_g_BNN, mapped_BND) / n + grad_mapped_BND @ a_DD.t()
    grad_a_DD = p.x_BND.flatten(0, 1).t() @ grad_mapped_BND.flatten(0, 1)
    return grad_x_BND, grad_h_BN / n, torch.bmm(grad_c_BMN, mapped_BND), grad_a_DD


def _of_moments(p: Problem, grad_g_BDD: Tensor, grad_h_BD: Tensor, grad_c_BMD: Tensor) -> Found:
    """Through S and b, and in the primal form through G = A^T S and h = A^T b before."""
    n, grad_a_DD = p.x_BND.shape[1], None
    if p.form == "primal":
        gram_BDD, moment_BD = _moments(p)
        a_DD = p.preconditioner[0]
        grad_a_DD = torch.einsum("bij,bkj->ik", gram_BDD, grad_g_BDD) + moment_BD.t() @ grad_h_BD
        grad_g_BDD, grad_h_BD = a_DD @ grad_g_BDD, grad_h_BD @ a_DD.t()
    grad_x_BND = torch.bmm(p.x_BND, grad_g_BDD + grad_g_BDD.transpose(1, 2)) + _outer(p.y_BN, grad_h_BD)
    return grad_x_BND / n, _apply(p.x_BND, grad_h_BD) / n, grad_c_BMD, grad_a_DD
