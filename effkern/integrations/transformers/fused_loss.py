"""The forward of a patched causal language model: with labels, the loss comes straight from the hidden states.

The output layer is called as ever, but with what to do: so hooks of sharding and devices see a call, and gather its
weight for it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effkern.integrations.transformers.heads import Head, capped, require_as_seen
from effkern.integrations.transformers.swap import EXTRA_ARGUMENTS, is_swapped, original_class
from effkern.nn.distill import LinearDistillLoss
from effkern.ops.distill import TeacherTopK
from effkern.ops.distill.types import Teacher

IGNORED = -100
# Arguments of the loss, which the backbone has no use for.
_OF_LOSS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index", "logits_to_keep", "return_dict")
EXTRA = ("teacher", "teacher_ids", "teacher_logprobs", "omega", "skip_logits")


@dataclass
class FusedLoss:
    """What a patched model knows, as its attribute `effkern_loss`."""

    head: Head
    loss_fn: LinearDistillLoss
    omega: float | None
    teacher_kind: str
    skip_logits: bool | None
    names: tuple[str, ...]
    """Of forward's positional arguments."""
    output: Any
    """The class of forward's result."""
    fields: tuple[str, ...]
    """Of it, those that the backbone's result has too."""
    neutral: bool
    """Without a teacher the loss is the library's own: no z_loss, no smoothing, no rows of padding."""


@dataclass
class Call:
    """What the output layer is asked for in place of logits."""

    loss_fn: LinearDistillLoss
    labels: Tensor
    teacher: Teacher | None
    omega: float | Tensor | None
    denom: float | Tensor | None

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result = self.loss_fn(
            hidden, weight, self.labels, teacher=self.teacher, omega=self.omega, bias=bias, denom=self.denom
        )
        return result.loss


def head_forward(self: Any, input: Tensor, effkern_call: Call | None = None) -> Tensor:
    """The output layer: logits, or the loss of a call."""
    if effkern_call is None:
        return original_class(self).forward(self, input)
    return effkern_call(input, self.weight, self.bias)


def model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model: as the library's, but with labels there are no logits while it trains, nor with skip_logits=True.

    Where there are logits beside the loss, the library computes both as long as that is the same loss.
    """
    own: FusedLoss | None = vars(self).get("effkern_loss")
    if own is None:
        return _unpatched(self, args, kwargs)
    given = _by_name(self, own.names, args, kwargs)
    asked = {name: given.pop(name, None) for name in EXTRA}
    teacher = _teacher(self, own, asked)
    labels, kept = given.get("labels"), given.get("logits_to_keep", 0)
    if teacher is not None and labels is None:
        raise ValueError(f"{_name(self)}: labels must be given with a teacher (-100 for tokens without), got None")
    every = isinstance(kept, int) and kept == 0
    if not every and labels is not None and (teacher is not None or not own.neutral):
        rule = "0 with a teacher, or with a z_loss, smoothing or padding,"
        raise ValueError(f"{_name(self)}: logits_to_keep must be {rule} got {kept!r}")
    skip = asked["skip_logits"] if asked["skip_logits"] is not None else own.skip_logits
    skip = self.training if skip is None else skip
    if labels is None or not every or (teacher is None and own.neutral and not skip):
        return original_class(self).forward(self, **given)

    layer = _output_layer(self)
    require_as_seen(_name(self), self, own.head, resizable=own.loss_fn.options["vocab_valid"] is None)
    return_dict = given.get("return_dict")
    # The library's own forward does the same with what it does not know.
    passed_on = {name: value for name, value in given.items() if name not in _OF_LOSS}
    outputs = getattr(self, own.head.family.backbone)(**passed_on, return_dict=True)
    hidden = outputs.last_hidden_state
    omega = None if teacher is None else own.omega if asked["omega"] is None else asked["omega"]
    call = Call(own.loss_fn, _next_labels(labels, given, hidden), teacher, omega, _denominator(given, hidden))
    loss = layer(hidden, effkern_call=call)
    logits = None if skip else capped(layer(hidden), own.head)
    result = own.output(loss=loss, logits=logits, **{name: getattr(outputs, name, None) for name in own.fields})
    as_dict = self.config.return_dict if return_dict is None else return_dict
    return result if as_dict else result.to_tuple()


setattr(model_forward, EXTRA_ARGUMENTS, EXTRA)


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _unpatched(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A new model of a patched one's class, as type(model)(config) makes it: the library's."""
    asked = [name for name in EXTRA if kwargs.get(name) is not None]
    if asked:
        rule = "be patched itself to take a teacher (it was made with the class of a patched model)"
        raise TypeError(f"{_name(model)}: the model must {rule}, got {', '.join(asked)}")
    plain = {name: value for name, value in kwargs.items() if name not in EXTRA}
    return original_class(model).forward(model, *args, **plain)


def _by_name(model: nn.Module, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of forward, which takes `names` by position."""
    if len(args) > len(names):
        raise TypeError(f"{_name(model)}: forward must get at most {len(names)} arguments by position, got {len(args)}")
    twice = [name for name in names[: len(args)] if name in kwargs]
    if twice:
        raise TypeError(f"{_name(model)}: {twice[0]} must be given once, got it by position and by name")
    return {**dict(zip(names, args)), **kwargs}


def _teacher(model: nn.Module, own: FusedLoss, asked: dict[str, Any]) -> Teacher | None:
    ids, logprobs = asked["teacher_ids"], asked["teacher_logprobs"]
    if (ids is None) != (logprobs is None):
        got = "teacher_ids alone" if logprobs is None else "teacher_logprobs alone"
        raise ValueError(f"{_name(model)}: teacher_ids and teacher_logprobs must come together, got {got}")
    if ids is None:
        return asked["teacher"]
    if asked["teacher"] is not None:
        got = f"{type(asked['teacher']).__name__} and teacher_ids"
        raise ValueError(f"{_name(model)}: teacher must be given in one way, got {got}")
    return TeacherTopK(ids, logprobs, own.teacher_kind)


def _output_layer(model: Any) -> nn.Module:
    """The output layer as it is now: PEFT may have put a trained copy in its place."""
    layer = model.get_output_embeddings()
    copied = hasattr(layer, "modules_to_save") and hasattr(layer, "original_module")
    if not (is_swapped(layer) or copied):
        got = f"{type(layer).__module__}.{type(layer).__qualname__}"
        rule = "be the one that patch has seen, or PEFT's copy of it (unpatch, change the model, patch again)"
        raise TypeError(f"{_name(model)}: the output layer must {rule}, got {got}")
    return layer


def _next_labels(labels: Tensor, given: dict[str, Any], hidden: Tensor) -> Tensor:
    """The label of each position: the next token, as transformers' loss has it."""
    shifted = given.get("shift_labels")
    if shifted is None:
        ignore = given.get("ignore_index", IGNORED)
        shifted = nn.functional.pad(labels, (0, 1), value=ignore)[..., 1:]
    else:
        shifted = shifted.view(hidden.shape[:-1])
    if given.get("ignore_index", IGNORED) != IGNORED:
        shifted = torch.where(shifted == given["ignore_index"], IGNORED, shifted)
    return shifted.to(hidden.device)


def _denominator(given: dict[str, Any], hidden: Tensor) -> float | Tensor | None:
    """Tokens of all accumulation steps and processes, where the trainer counts them."""
    count = given.get("num_items_in_batch")
    if isinstance(count, Tensor):
        return count.to(hidden.device).reshape(())
    # Batches without any label: loss 0.
    return hidden.new_zeros((), dtype=torch.int64) if count == 0 else count
