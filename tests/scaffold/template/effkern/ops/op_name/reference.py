"""The squared-ReLU gate as one writes it in PyTorch, with autograd's gradients; float64 too."""

import torch
from torch import Tensor


def op_name(gate_ND: Tensor, up_ND: Tensor) -> Tensor:
    wide = torch.promote_types(gate_ND.dtype, torch.float32)
    return (gate_ND.to(wide).relu().square() * up_ND.to(wide)).to(gate_ND.dtype)
