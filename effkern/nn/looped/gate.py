"""When to stop looping, as Ouro learns it: a gate on every state, the exit distribution, and the losses of two stages.

L loops, ... any shape of tokens, D channels. All in float32 (float64) and by logarithms: no product of many factors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

OP = "ExitGate"


class ExitDistribution(NamedTuple):
    """See ExitGate.forward."""

    logits: Tensor
    """z_t, [L, ...]; lambda_t = sigmoid(z_t). The last one takes no part in the distribution."""
    log_probs: Tensor
    """log p_t, [L, ...]."""

    @property
    def cdf(self) -> Tensor:
        """p_1 + .. + p_t, [L, ...]; 1 at the last."""
        cdf = self.log_probs.exp().cumsum(0)
        return torch.cat([cdf[:-1], torch.ones_like(cdf[-1:])])

    def exit_loop(self, quantile: float) -> Tensor:
        """The first t, counted from 0, whose cdf reaches `quantile`, [...] int64: where inference stops."""
        if not 0 < quantile <= 1:
            raise ValueError(f"{OP}: quantile must lie in (0, 1], got {quantile!r}")
        return (self.cdf >= quantile).int().argmax(0)


class ExitGate(nn.Module):
    """lambda_t = sigmoid(w . h_t + b), and p_t = lambda_t prod_{j<t} (1 - lambda_j), the last loop taking what is left.

    Starts at w = 0, b = 0: every gate a half.

    Args:
        dim: D.

    Source: Ouro (arXiv 2510.25741).
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if type(dim) is not int or dim < 1:
            raise ValueError(f"{OP}: dim must be a whole number of at least 1, got {dim!r}")
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.fill()

    @torch.no_grad()
    def fill(self, generator: torch.Generator | None = None) -> None:
        self.weight.zero_()
        self.bias.zero_()

    def logit(self, state: Tensor) -> Tensor:
        """z of one state, [...] from [..., D], in float32 at least."""
        if state.shape[-1:] != self.weight.shape:
            raise ValueError(f"{OP}: state must have shape (..., {len(self.weight)}), got {tuple(state.shape)}")
        wide = torch.promote_types(state.dtype, torch.float32)
        return (state.to(wide) @ self.weight.to(wide)) + self.bias.to(wide)

    def forward(self, states: Sequence[Tensor]) -> ExitDistribution:
        """Of the states h_1 .. h_L: what LoopedBlock.all_states returns. Detach them for stage II."""
        if len(states) < 1:
            raise ValueError(f"{OP}: states must hold at least one, got none")
        logits = torch.stack([self.logit(h) for h in states])
        return ExitDistribution(logits, exit_log_probs(logits))


def exit_log_probs(logits: Tensor) -> Tensor:
    """log p_t of z_t, both [L, ...]: log sigmoid(z_t), but for the last t, plus sum_{j<t} log sigmoid(-z_j)."""
    going_on = nn.functional.logsigmoid(-logits[:-1]).cumsum(0)
    reached = torch.cat([torch.zeros_like(logits[:1]), going_on])
    return reached + torch.cat([nn.functional.logsigmoid(logits[:-1]), torch.zeros_like(logits[:1])])


def expected_exit_loss(log_probs: Tensor, losses: Tensor, beta: float, *, mask: Tensor | None = None) -> Tensor:
    """Stage I: mean over tokens of sum_t p_t loss_t - beta H(p), H(p) = - sum_t p_t log p_t.

    The entropy is, up to a constant, minus the divergence from a uniform prior over loops.

    Args:
        log_probs: [L, ...]. Gets a gradient.
        losses: of each loop and token, [L, ...]. Gets a gradient.
        beta: >= 0, nats.
        mask: [...], which tokens count; None: all. Of the others anything may come, NaN too, and their gradient is 0.

    Returns:
        0-d; 0 if no token counts.

    Raises:
        ValueError: shapes differ, or beta < 0.
    """
    _same("expected_exit_loss", "losses", losses, log_probs)
    if not beta >= 0:
        raise ValueError(f"expected_exit_loss: beta must be at least 0, got {beta!r}")
    log_probs, losses = _counted("expected_exit_loss", mask, log_probs, losses)
    probs = log_probs.exp()
    # p log p is 0 where p is, also where log p is -inf: before the product, as 0 * inf is NaN in its gradient.
    finite = torch.where(probs > 0, log_probs, 0.0)
    return _mean((probs * losses + beta * probs * finite).sum(0), mask)


def exit_gate_loss(
    logits: Tensor, losses: Tensor, *, slope: float = 50.0, threshold: float = 0.005, mask: Tensor | None = None
) -> Tensor:
    """Stage II: 1 - lambda_t learns whether loop t was worth it; the model is frozen.

    w_t = sigmoid(slope (max(0, loss_{t-1} - loss_t) - threshold)), for t = 2 .. L
    mean over t and tokens of - w_t log(1 - lambda_t) - (1 - w_t) log lambda_t

    Args:
        logits: z_t, [L, ...], L >= 2, of detached states. Gets a gradient.
        losses: of each loop and token, [L, ...]. Gets none.
        slope, threshold: Ouro's.
        mask: as in expected_exit_loss.

    Returns:
        0-d; 0 if no token counts.

    Raises:
        ValueError: shapes differ, or fewer than two loops.
    """
    _same("exit_gate_loss", "losses", losses, logits)
    if len(logits) < 2:
        raise ValueError(f"exit_gate_loss: logits must be of at least 2 loops, got {len(logits)}")
    logits, losses = _counted("exit_gate_loss", mask, logits, losses.detach().to(logits.dtype))
    gain = (losses[:-1] - losses[1:]).clamp_min(0)
    worth = torch.sigmoid(slope * (gain - threshold))
    terms = nn.functional.binary_cross_entropy_with_logits(-logits[1:], worth, reduction="none")
    return _mean(terms.mean(0), mask)


def _same(op: str, name: str, x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(y.shape)}, got {tuple(x.shape)}")


def _counted(op: str, mask: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
    """Each [L, ...], 0 where the mask is: before any product, whose gradient would be 0 * NaN."""
    if mask is None:
        return values
    shape = values[0].shape[1:]
    if mask.shape != shape:
        raise ValueError(f"{op}: mask must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    return tuple(torch.where(mask != 0, x, 0.0) for x in values)


def _mean(terms: Tensor, mask: Tensor | None) -> Tensor:
    """Of finite terms where the mask is 0."""
    return terms.mean() if mask is None else (terms * mask).sum() / mask.sum().clamp_min(1)
