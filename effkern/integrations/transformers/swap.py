"""A module gets another forward by becoming a subclass of its class, and loses it by becoming what it was.

Unlike a forward set on the instance, the subclass goes through everything that the library does to classes of decoder
layers: gradient checkpointing, recording of hidden states, `isinstance`, copies.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

_ORIGINAL = "_effkern_original"
_FORWARD = "_effkern_forward"
# An attribute of a forward: names of keyword arguments that it takes beside those of the class's own forward.
EXTRA_ARGUMENTS = "_effkern_extra_arguments"


def _like(original: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with the signature of the class's own and its extra arguments: trainers pick columns by signatures."""
    extra = getattr(forward, EXTRA_ARGUMENTS, None)
    if extra is None:
        return forward

    def like(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    own = inspect.signature(original.forward)
    *known, rest = own.parameters.values()
    assert rest.kind is inspect.Parameter.VAR_KEYWORD
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in extra]
    like.__signature__ = own.replace(parameters=[*known, *added, rest])  # type: ignore[attr-defined]
    like.__doc__, like.__name__ = original.forward.__doc__, "forward"
    return like


@cache
def _subclass(original: Any, forward: Callable[..., Any]) -> type:
    # The name stays: lists such as `_no_split_modules` know layers by it.
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    own = {"forward": _like(original, forward), _FORWARD: forward, _ORIGINAL: original, "__reduce_ex__": _reduce}
    return type(original.__name__, (original,), {**names, **own})


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """Pickled as its class and its forward: the subclass itself cannot be found by name.

    The forward as it was given: the library may have wrapped the class's own.
    """
    return _rebuild, (original_class(module), vars(type(module))[_FORWARD]), vars(module)


def _rebuild(original: Any, forward: Callable[..., Any]) -> nn.Module:
    return original.__new__(_subclass(original, forward))


def swap(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give `module` the method `forward`, in place of one that it was given before."""
    _release(module)
    module.__class__ = _subclass(original_class(module), forward)


def restore(module: nn.Module) -> None:
    """Undo `swap`; nothing happens to a module that it was not done to."""
    _release(module)
    if _ORIGINAL in vars(type(module)):
        module.__class__ = getattr(type(module), _ORIGINAL)


def original_class(module: nn.Module) -> Any:
    """The class before `swap`, or the class as it is."""
    return getattr(type(module), _ORIGINAL, type(module))


def is_swapped(module: nn.Module) -> bool:
    return hasattr(type(module), _ORIGINAL)


def path_of(module: nn.Module) -> str:
    """Where the library defines the module's class."""
    original = original_class(module)
    return f"{original.__module__}.{original.__qualname__}"


def is_patched(module: nn.Module) -> bool:
    """True if the instance has a forward that is not its class's."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def runs_swapped(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """True if a call of `module` ends in the `forward` of swap, be it wrapped (mixed precision), not replaced."""
    own = getattr(type(module), _FORWARD, None)
    called = inspect.unwrap(vars(module).get("forward", type(module).forward))
    return own is forward and getattr(called, "__func__", called) is inspect.unwrap(type(module).forward)


def _release(module: nn.Module) -> None:
    # transformers 5.0 leaves the class's forward behind on the instance after recording outputs.
    if not is_patched(module):
        vars(module).pop("forward", None)


def is_bare(module: nn.Module) -> bool:
    """True if calling the module does nothing but its class's forward: then its weight may be used without the call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not (is_patched(module) or any(hooks))
