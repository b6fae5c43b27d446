"""The paper's form, word for word: the whole prompt goes through every layer. Autograd gives its gradients.

This is what all implementations are held to, in float64; it costs O(loops (n + m)^2 d) per problem and keeps every
layer's Z for backward.
"""

import torch
from torch import Tensor


def looped_linear_attention(
    x_BND: Tensor, y_BN: Tensor, query_BMD: Tensor, preconditioner: Tensor, loops: int, steps_L: Tensor | None = None
) -> Tensor:
    """Predictions after each loop, [L, B, M]; `preconditioner` is [D, D] or [L, D, D].

    Z_0 = [[x_1 .. x_n, q_1 .. q_m], [y_1 .. y_n, 0 .. 0]],  Z <- Z - (e_l / n) P Z M (Z^T Q Z),
    P = diag(0, .., 0, 1),  M = diag(1_n, 0_m),  Q = diag(A_l, 0); the prediction is minus the queries' last entries.
    """
    batch, n, d = x_BND.shape
    m = query_BMD.shape[1]
    columns = torch.cat([x_BND, query_BMD], 1).transpose(1, 2)
    last = torch.cat([y_BN, y_BN.new_zeros(batch, m)], 1)[:, None]
    z = torch.cat([columns, last], 1)
    p, mask = x_BND.new_zeros(d + 1, d + 1), x_BND.new_zeros(n + m, n + m)
    p[d, d] = 1.0
    mask.diagonal()[:n] = 1.0
    predictions = []
    for layer in range(loops):
        a = preconditioner if preconditioner.dim() == 2 else preconditioner[layer]
        q = torch.nn.functional.pad(a, (0, 1, 0, 1))
        step = 1.0 if steps_L is None else steps_L[layer]
        z = z - step / n * (p @ z @ mask @ (z.transpose(1, 2) @ q @ z))
        predictions.append(-z[:, d, n:])
    return torch.stack(predictions)
