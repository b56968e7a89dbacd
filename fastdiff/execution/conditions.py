"""How a condition reaches a network: decided from the signature of its forward, and refused before any call.

A tensor is the third argument, or goes by keyword where the network names its condition at another place; a dict goes as
keywords, or, where the network takes none of them, as it is, the third argument.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, DTypeError, MissingConditionError, ShapeError
from . import torch_private
from .loop import Condition
from .modules import inner

LABELS = ("y", "class_labels", "labels", "classes", "label", "class_label")  # the field's names for class numbers [B]
CONDITIONS = ("cond", "condition", "context", "encoder_hidden_states", "c", *LABELS)  # and for any condition
NO_CONDITIONS = ("self_cond", "features")  # a network's own last output; what a run makes of the time
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NONE: frozenset[str] = frozenset()


class Whole(dict[str, Tensor]):
    """A dict condition that is the network's third argument as it is."""


@dataclass(frozen=True)
class Takes:
    """What a network takes beside x and the time.

    third     its third argument, None where that is no condition: missing, or with a default other than None
    names     what it takes by keyword
    needs     what has no default
    any_name  whether it takes keywords of any name
    classes   how many classes it says that it has, 0 where it says that it has none, None where it says nothing
    arguments its signature
    """

    third: str | None
    names: frozenset[str]
    needs: frozenset[str]
    any_name: bool
    classes: int | None
    arguments: tuple[inspect.Parameter, ...] | None

    @property
    def shown(self) -> str:
        return "of unknown names" if self.arguments is None else f"({', '.join(map(str, self.arguments))})"

    @property
    def tensor(self) -> str | None:
        """Where a tensor goes: to `third`, or to one of `names`; None where it has no place."""
        if self.third in CONDITIONS or self.third in self.needs:
            return self.third
        return next((name for name in CONDITIONS if name in self.names), self.third)

    @property
    def labels(self) -> str | None:
        """Where class numbers go; None where they have no place."""
        return next((name for name in LABELS if name in self.names or name == self.third), self.tensor)


def takes(net: Any) -> Takes:
    """What the network takes, within what wraps it; of one without a signature, that it takes anything."""
    net, bound = inner(net), functools.partial(inner)
    while isinstance(net, functools.partial):
        bound = functools.partial(inner, *net.args, *bound.args, **{**net.keywords, **bound.keywords})
        net = inner(net.func)
    forward = net.forward if isinstance(net, nn.Module) else net
    is_partial = bool(bound.args or bound.keywords)
    parameters = _parameters(functools.partial(forward, *bound.args, **bound.keywords) if is_partial else forward)
    if parameters is None:
        return Takes("cond", NONE, NONE, True, _classes(net), None)
    ordered = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    further = [*ordered[2:], *(p for p in parameters if p.kind is p.KEYWORD_ONLY)]
    rest = next((p for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    parts = list(net.children()) if isinstance(net, nn.Module) and not further and (rest or any_name) else []
    if len(parts) == 1:  # to which it passes on what it gets
        part = takes(parts[0])
        third = None if rest is None else part.third or rest.name
        needs, names = NONE if ordered else part.needs, part.names if any_name else NONE
        return replace(part, third=third, names=names, needs=needs, any_name=any_name)
    last = ordered[2] if len(ordered) > 2 else rest
    is_condition = last is not None and last.default in (None, last.empty) and not last.name.endswith(NO_CONDITIONS)
    made = {"features"} if hasattr(net, "time_features") else set()
    return Takes(
        last.name if last is not None and is_condition else None,
        frozenset(p.name for p in further if p.kind is not p.POSITIONAL_ONLY) - made,
        frozenset(p.name for p in further if p.default is p.empty),
        any_name,
        _classes(net),
        parameters,
    )


def arranged(taken: Takes, cond: Any) -> Condition:
    """cond as the network gets it: None, its third argument (a tensor, a Whole), or a dict of keywords; ConfigError where it has
    no place for it, MissingConditionError where it needs more."""
    given: set[str | None] = set()
    if isinstance(cond, dict):
        unknown = [] if taken.any_name else [str(key) for key in cond if key not in taken.names]
        if not unknown:
            cond, given = dict(cond), set(cond)
        elif len(unknown) == len(cond) and taken.third is not None:
            cond, given = Whole(cond), {taken.third}
        else:
            known = f"its keywords are {', '.join(sorted(taken.names))}" if taken.names else "leave cond out"
            raise ConfigError(
                f"cond has {', '.join(unknown):.40}, of which the network's arguments {taken.shown:.70} know nothing: {known:.60}"
            )
    elif cond is not None:
        place = taken.labels if are_labels(cond) else taken.tensor
        if place is None:
            named = taken.any_name or bool(taken.names)
            way = "give a dict, whose keys are its keywords" if named else "leave cond out"
            raise ConfigError(
                f"cond would be the third of the network's arguments {taken.shown:.70}, which have no place for it: {way}"
            )
        given = {place}
        cond = cond if place == taken.third else {place: cond}
    if taken.classes == 0 and given & set(LABELS):
        raise ConfigError(
            "cond must be None for a network without num_classes, got labels: build it with num_classes=, or leave cond out"
        )
    missing = sorted(taken.needs - given)
    if missing:
        raise MissingConditionError(
            f"cond must give what the network's arguments {taken.shown:.70} need, and {missing[0]:.30} is missing: give "
            f"cond={'a tensor or ' * (len(taken.needs) == 1)}a dict with {', '.join(map(repr, sorted(taken.needs))):.40}"
        )
    return cond or None if type(cond) is dict else cond


def check_labels(taken: Takes, cond: Condition, count: int, classes: int, looks: bool, by_name: bool) -> None:
    """ConfigError, DTypeError, ShapeError or DataError unless a condition that `arranged` made has class numbers, integers
    [count] from 0 to classes - 1.

    looks    at the values also where that would stall a device
    by_name  whether the caller gave them in a dict
    """
    argument, labels = "cond", cond if taken.labels == taken.third else None
    if isinstance(cond, dict):
        key = next((name for name in (taken.labels, *LABELS) if name in cond), None)
        labels = None if key is None else cond[key]
        argument = f"cond[{key!r}]" if by_name and key is not None else "cond"
    rule = f"the labels 0 to {classes - 1} that the model was trained with"
    if labels is None:
        raise ConfigError(
            f"cond must hold {rule}, got none: give one for each sample, such as cond=torch.randint({classes}, ({count},))"
        )
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise DTypeError(f"{argument} must hold {rule}, got {got}: convert them with torch.as_tensor(labels).long()")
    if labels.shape != (count,):
        raise ShapeError(
            f"{argument} must hold {rule}, one for each of {count} samples, got shape {tuple(labels.shape)}"
        )
    unseen = labels.is_meta or torch_private.functorch_is_active() or torch.compiler.is_compiling()
    if unseen or not (looks or labels.device.type == "cpu") or not count:
        return
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= classes:
        raise DataError(f"{argument} must hold {rule}, got {low} to {high}: give those, or train with more")


def are_labels(cond: Any) -> bool:
    """Whether a condition is of class numbers: integers [B]."""
    return isinstance(cond, Tensor) and cond.ndim == 1 and not (cond.is_floating_point() or cond.is_complex())


def _classes(net: Any) -> int | None:
    """A network's `num_classes`, or the num_class_embeds of diffusers' configurations."""
    said = getattr(net, "num_classes", False)
    if said is False and isinstance(config := getattr(net, "config", None), Mapping):
        said = config.get("num_class_embeds", False)
    if said is None:
        return 0
    return said if isinstance(said, int) and not isinstance(said, bool) else None


_known: weakref.WeakKeyDictionary[types.FunctionType, tuple[inspect.Parameter, ...]] = weakref.WeakKeyDictionary()


def _parameters(forward: Any) -> tuple[inspect.Parameter, ...] | None:
    """A callable's parameters, looked at once for each function; None where it says none."""
    function = getattr(forward, "__func__", forward)  # a method's
    if not isinstance(function, types.FunctionType):
        return _signature(forward)
    if function not in _known:
        _known[function] = _signature(function) or ()
    parameters = _known[function]
    bound = function is not forward and parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL
    return parameters[1:] if bound else parameters


def _signature(forward: Any) -> tuple[inspect.Parameter, ...] | None:
    schema = getattr(forward, "schema", None)  # of torch.jit
    try:
        if schema is None:
            return tuple(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return None
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    return tuple(
        inspect.Parameter(
            argument.name, kind, default=argument.default_value if argument.has_default_value() else empty
        )
        for argument in schema.arguments[1:]
    )
