"""Several optimizers as one: each steps its own parameters."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class Together(Optimizer):
    """A torch.optim.Optimizer whose groups are those of its parts, one after another.

    Schedulers set the parts' rates through param_groups; a closure runs once; GradScaler unscales all and skips all.
    state_dict is one of torch's form, with parameters numbered through.

    Args:
        parts: optimizers without a common parameter.

    Raises:
        ValueError: no part, or a parameter in two.
    """

    # Whatever a part could do by itself: all parts step or none.
    _step_supports_amp_scaling = False

    def __init__(self, *parts: Optimizer) -> None:
        if not parts:
            raise ValueError("Together: parts must be one optimizer at least, got none")
        params = [p for part in parts for group in part.param_groups for p in group["params"]]
        if len(params) != len(set(params)):
            raise ValueError("Together: parts must not share parameters, got one in two of them")
        self.parts, self._made = parts, False
        super().__init__(params, dict(parts[0].defaults))
        self._made = True

    # torch's class assigns these two; here they are the parts'.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        pass

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:
        return defaultdict(dict, {p: entry for part in self.parts for p, entry in part.state.items()})

    @state.setter
    def state(self, value: Any) -> None:
        pass

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """
        Raises:
            NotImplementedError: always, once it is made: add the group to one of `parts`.
        """
        # torch's constructor brings the parameters here, which the parts have.
        if self._made:
            raise NotImplementedError("Together: a group must be added to one of parts, got it here")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every part; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        packed: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0
        for part in self.parts:
            own = part.state_dict()
            packed["state"].update({first + index: entry for index, entry in own["state"].items()})
            packed["param_groups"] += [_moved(group, first) for group in own["param_groups"]]
            first += _count(part)
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: it is of another number of groups or parameters; nothing was changed.
        """
        stored = state_dict["param_groups"]
        want = [len(group["params"]) for group in self.param_groups]
        got = [len(group["params"]) for group in stored]
        if want != got:
            raise ValueError(f"Together: state_dict must be of groups with {want} parameters, got {got}")
        at = 0
        for part in self.parts:
            groups = stored[at : at + len(part.param_groups)]
            at += len(groups)
            # Numbers, or names as torch.distributed.checkpoint has them.
            keys = {key for group in groups for key in group["params"]}
            state = {key: entry for key, entry in state_dict["state"].items() if key in keys}
            part.load_state_dict({"state": state, "param_groups": groups})

    def __reduce__(self) -> Any:
        return type(self), self.parts


def _count(part: Optimizer) -> int:
    return sum(len(group["params"]) for group in part.param_groups)


def _moved(group: dict[str, Any], by: int) -> dict[str, Any]:
    return {**group, "params": [index + by for index in group["params"]]}
