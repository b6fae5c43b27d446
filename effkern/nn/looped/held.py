"""The tensors that a module had in forward, for what runs again in backward."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


class Held:
    """Parameters and buffers as a call found them; torch.func.functional_call may have put them in while it ran."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.tensors: dict[str, Tensor] = dict(owner.named_parameters(remove_duplicate=False))
        each = list({id(p): p for p in self.tensors.values()}.values())
        self.trained = [p for p in each if p.requires_grad]
        self.frozen = [p for p in each if not p.requires_grad]

    def hold_buffers(self) -> None:
        """As they are now: after the last loop, as a core may replace its own."""
        self.tensors.update(self.owner.named_buffers(remove_duplicate=False))

    def again(self) -> AbstractContextManager[object]:
        """With these in the module, where it has others now."""
        now: dict[str, Tensor] = dict(self.owner.named_parameters(remove_duplicate=False))
        now.update(self.owner.named_buffers(remove_duplicate=False))
        others = {name: x for name, x in self.tensors.items() if now.get(name) is not x}
        if not others:
            return nullcontext()
        return nn.utils.stateless._reparametrize_module(self.owner, others)
