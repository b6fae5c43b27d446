"""Both means in plain PyTorch, with every row in memory; float64 too, and with autograd's gradients.

N groups, T rows of all groups, V rows of the table, D columns
"""

import torch
from torch import Tensor


def mean_pool(table_VD: Tensor, ids_T: Tensor, offsets: Tensor, pad: int, eod: int, normalize: bool) -> Tensor:
    ids_T = ids_T.long()
    return _pool(_wide(table_VD)[ids_T], (ids_T != pad) & (ids_T != eod), offsets, None, normalize)


def norm_mean_pool(
    hidden_TD: Tensor, offsets: Tensor, keep_T: Tensor | None, weight_D: Tensor | None, eps: float, normalize: bool
) -> Tensor:
    x_TD = _wide(hidden_TD)
    if weight_D is not None:
        x_TD = x_TD * torch.rsqrt(x_TD.square().mean(1, keepdim=True) + eps)
    keep_T = torch.ones(len(x_TD), dtype=torch.bool, device=x_TD.device) if keep_T is None else keep_T
    return _pool(x_TD, keep_T, offsets, weight_D, normalize)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _pool(rows_TD: Tensor, keep_T: Tensor, offsets: Tensor, weight_D: Tensor | None, normalize: bool) -> Tensor:
    num_groups = len(offsets) - 1
    group_T = torch.repeat_interleave(torch.arange(num_groups, device=offsets.device), offsets.diff())[keep_T]
    sums_ND = rows_TD.new_zeros(num_groups, rows_TD.shape[1]).index_add(0, group_T, rows_TD[keep_T])
    mean_ND = sums_ND / torch.bincount(group_T, minlength=num_groups).clamp_min(1)[:, None]
    if weight_D is not None:
        mean_ND = mean_ND * _wide(weight_D).to(mean_ND.dtype)
    if not normalize:
        return mean_ND
    # Squares of what is very large or small would leave the range.
    largest = mean_ND.abs().amax(1, keepdim=True)
    unit = mean_ND / torch.where(largest == 0, 1.0, largest)
    return unit / torch.where(largest == 0, 1.0, unit.norm(dim=1, keepdim=True))
