"""Mean, standardisation and projection are linear: folded into the table, a token costs as many bytes as are kept."""

import torch
from torch import Tensor

OP = "fold_projection"


def fold_projection(
    table_VD: Tensor, mean_D: Tensor, scale_D: Tensor, components_KD: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """P = (table - mean) diag(1 / scale) components^T, so that the mean of rows of P is the projected mean of rows.

    Computed in float64, in blocks of rows.

    Args:
        table_VD: embedding table, [V, D], any floating dtype.
        mean_D, scale_D: statistics of the means of rows (not of the rows), [D]; scale > 0.
        components_KD: directions to keep, [K, D].
        dtype: of the result; a half type halves the bytes of every later mean.

    Returns:
        [V, K], contiguous. Nothing gets a gradient.

    Raises:
        ValueError: a shape does not fit, or scale is not positive (looked at on the CPU).
    Source: own algebra.
    """
    if table_VD.dim() != 2 or components_KD.dim() != 2 or components_KD.shape[1] != table_VD.shape[1]:
        got = f"{list(table_VD.shape)} and {list(components_KD.shape)}"
        raise ValueError(f"{OP}: table and components must be [V, D] and [K, D], got {got}")
    dim = table_VD.shape[1]
    for name, x in (("mean", mean_D), ("scale", scale_D)):
        if x.shape != (dim,):
            raise ValueError(f"{OP}: {name} must have shape [{dim}], got {list(x.shape)}")
    if scale_D.device.type == "cpu" and not (scale_D > 0).all():
        raise ValueError(f"{OP}: scale must be positive, got {scale_D.min().item()}")
    with torch.no_grad():
        directions_DK = (components_KD.double() / scale_D.double()).t()
        shift_K = mean_D.double() @ directions_DK
        parts = [(part.double() @ directions_DK - shift_K).to(dtype) for part in table_VD.split(1 << 14)]
        return torch.cat(parts) if parts else table_VD.new_empty((0, components_KD.shape[0]), dtype=dtype)
