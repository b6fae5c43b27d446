"""One-sided Shampoo."""

from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from effkern.optim.shampoo.optimizer import Shampoo


class OneSidedShampoo(Shampoo):
    """Shampoo with a preconditioner on one side of each matrix, of exponent -1/2.

        L <- beta2 L + (1 - beta2) G G^T        M <- beta1 M + (1 - beta1) G
        U = (L + ridge lambda_max(L) I)^-1/2 M
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(m n) U / |U|_F

    The step of a matrix has a root mean square of 0.2 lr, about that of AdamW, so that AdamW's learning rate and decay
    are the place to start from. What is no matrix is stepped by AdamW.

    Args:
        side: "auto" (the smaller one), "left" or "right".
        options: any of Shampoo's but side and exponents.

    Raises, state, memory: as Shampoo; for an m x n matrix m n + 2 p^2 numbers, p the preconditioned side.
    Source: Xie et al., Algorithm 2 (arXiv 2503.10537), with ASGO's momentum, betas and norm (arXiv 2503.20762).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.8),
        *,
        side: Literal["auto", "left", "right"] = "auto",
        **options: Any,
    ) -> None:
        _check_side(side)
        if "exponents" in options:
            raise TypeError("OneSidedShampoo: exponents must be left out (1/2); Shampoo has them")
        super().__init__(params, lr, betas, side=side, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_side(param_group.get("side", "auto"))
        super().add_param_group(param_group)


def _check_side(side: Any) -> None:
    if side not in ("auto", "left", "right"):
        raise ValueError(f'OneSidedShampoo: side must be "auto", "left" or "right", got {side!r}')
