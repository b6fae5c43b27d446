"""The loop step as one writes it in PyTorch, with autograd's gradients. float64 stays float64, else float32 inside."""

import torch
from torch import Tensor

from effkern.ops.loop_step.terms import Factor, Terms


def loop_step(f: Tensor, h: Tensor, e: Tensor | None, t: Terms) -> tuple[Tensor, Tensor, Tensor | None]:
    """s, x (s itself where no term is added) and the change."""
    wide = torch.promote_types(h.dtype, torch.float32)

    def scaled(factor: Factor, x: Tensor) -> Tensor:
        return (factor.to(wide) if isinstance(factor, Tensor) else factor) * x.to(wide)

    s = scaled(t.alpha, f)
    if t.has_beta:
        s = s + scaled(t.beta, h)
    if t.down is not None and t.up is not None:
        # In the type of h, whatever autocast would choose.
        with torch.autocast(h.device.type, enabled=False):
            s = s + ((h @ t.down.to(h.dtype)) @ t.up.to(h.dtype)).to(wide)
    if t.norm:
        s = s * (s.square().mean(-1, keepdim=True) + t.eps).rsqrt()
        if t.norm_weight is not None:
            s = s * t.norm_weight.to(wide)
    # What leaves is what x and the change are made of.
    s = f if t.keeps_f else s.to(h.dtype)
    x = s
    if t.has_core_input:
        total = scaled(t.state_scale, s)
        if e is not None:
            total = total + scaled(t.input_scale, e)
        if t.embedding is not None:
            total = total + t.embedding.to(wide)
        x = total.to(h.dtype)
    change = None
    if t.return_change:
        with torch.no_grad():
            now = s.to(wide)
            moved = (now - h.to(wide)).norm(dim=-1)
            # A state that has not moved has changed by 0, also where it is 0.
            change = torch.where(moved == 0, 0.0, moved / now.norm(dim=-1))
    return s, x, change
