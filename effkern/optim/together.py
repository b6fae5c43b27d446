"""Several optimizers as one: each steps its own parameters."""

from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _State(MutableMapping[Tensor, Any]):
    """State of all parts by parameter; what is written here is written to the part that steps the parameter."""

    def __init__(self, parts: tuple[Optimizer, ...]) -> None:
        self._parts = parts

    def _of(self, param: Tensor) -> MutableMapping[Tensor, Any]:
        for part in self._parts:
            if param in part.state or any(param is p for group in part.param_groups for p in group["params"]):
                return part.state
        raise KeyError("Together: state must be of a parameter of one of parts, got another key")

    def __getitem__(self, param: Tensor) -> Any:
        # As in torch's, what is missing is made.
        return self._of(param)[param]

    def __setitem__(self, param: Tensor, entry: Any) -> None:
        self._of(param)[param] = entry

    def __delitem__(self, param: Tensor) -> None:
        del self._of(param)[param]

    def __contains__(self, param: object) -> bool:
        return any(param in part.state for part in self._parts)

    def __iter__(self) -> Iterator[Tensor]:
        return chain.from_iterable(part.state for part in self._parts)

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts)

    # The mixin's go by a KeyError of what is missing.
    def get(self, param: Any, default: Any = None) -> Any:
        return next((part.state[param] for part in self._parts if param in part.state), default)

    def setdefault(self, param: Any, default: Any = None) -> Any:
        return self._of(param).setdefault(param, default)

    def pop(self, param: Any, *default: Any) -> Any:
        own: Any = next((part.state for part in self._parts if param in part.state), {})
        return own.pop(param, *default)

    def __reduce__(self) -> Any:
        return defaultdict, (dict, dict(self))

    def __repr__(self) -> str:
        return repr(dict(self))


class Together(Optimizer):
    """A torch.optim.Optimizer whose groups are those of its parts, one after another.

    Schedulers set the parts' rates through param_groups; a closure runs once; GradScaler unscales all and skips all.
    state_dict is one of torch's form, with parameters numbered through. What is written to state or set as param_groups
    goes to the parts; hooks registered here run once, around all parts.

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
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if not self._made:
            return
        groups, count = list(value), len(self.param_groups)
        if len(groups) != count:
            raise ValueError(f"Together: param_groups must be {count}, those of parts in order, got {len(groups)}")
        for part in self.parts:
            own = len(part.param_groups)
            part.param_groups, groups = groups[:own], groups[own:]

    @property
    def state(self) -> Any:
        return _State(self.parts)

    @state.setter
    def state(self, value: MutableMapping[Tensor, Any]) -> None:
        if not self._made:
            return
        entries, own = dict(value), self.state
        for param in entries:
            own._of(param)  # Raises before anything is changed.
        own.clear()
        own.update(entries)

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
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        packed: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0
        for part in self.parts:
            own = part.state_dict()
            packed["state"].update({first + index: entry for index, entry in own["state"].items()})
            for group in own["param_groups"]:
                packed["param_groups"].append({**group, "params": [first + index for index in group["params"]]})
            first += sum(len(group["params"]) for group in part.param_groups)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, packed)
            packed = packed if changed is None else changed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: it is of another number of groups or parameters.
            Exception: a part's own, where it refuses its share. Nothing was changed in any part then either.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        stored = state_dict["param_groups"]
        want = [len(group["params"]) for group in self.param_groups]
        got = [len(group["params"]) for group in stored]
        if want != got:
            raise ValueError(f"Together: state_dict must be of groups with {want} parameters, got {got}")
        # A load gives an optimizer new groups and a new state, so that the old ones are still there to go back to.
        kept = [vars(part).copy() for part in self.parts]
        try:
            at = 0
            for part in self.parts:
                groups = stored[at : at + len(part.param_groups)]
                at += len(groups)
                # Numbers, or names as torch.distributed.checkpoint has them.
                keys = {key for group in groups for key in group["params"]}
                state = {key: entry for key, entry in state_dict["state"].items() if key in keys}
                part.load_state_dict({"state": state, "param_groups": groups})
        except BaseException:
            for part, attributes in zip(self.parts, kept):
                vars(part).clear()
                vars(part).update(attributes)
            raise
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __reduce__(self) -> Any:
        return type(self), self.parts
