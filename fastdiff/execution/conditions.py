"""How a condition reaches a network: decided from the signature of its forward, and refused before any call.

A tensor is the third argument, or goes by keyword where the network names its condition at another place: class numbers go where
it names labels, other tensors where it names any other condition. A dict goes as keywords, or, where the network takes none of
them, as it is, the third argument.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
import weakref
from collections.abc import Mapping, Sequence
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
    shape     of the condition that it says it takes, () where it says that it takes none, None where it says nothing
    arguments its signature
    """

    third: str | None
    names: frozenset[str]
    needs: frozenset[str]
    any_name: bool
    classes: int | None
    shape: tuple[int, ...] | None
    arguments: tuple[inspect.Parameter, ...] | None

    @property
    def shown(self) -> str:
        return "of unknown names" if self.arguments is None else f"({', '.join(map(str, self.arguments))})"

    @property
    def tensor(self) -> str | None:
        """Where a tensor that is not of class numbers goes: to `third`, or to one of `names`; None where it has no place."""
        if self.third in self.needs or (self.third in CONDITIONS and self.third not in LABELS):
            return self.third
        other = next((name for name in CONDITIONS if name in self.names), self.third)
        none_but_labels = other in LABELS or (self.shape == () and bool(self.classes))
        return self.third if self.third in LABELS and none_but_labels else other

    @property
    def labels(self) -> str | None:
        """Where class numbers go; None where they have no place."""
        other = None if self.shape else self.tensor
        return next((name for name in LABELS if name in self.names or name == self.third), other)

    def joined(self, labels: Tensor | None, cond: Tensor | None) -> Condition:
        """Labels and a condition as a call takes them: either alone, or a dict of both."""
        if labels is None or cond is None:
            return cond if labels is None else labels
        return {str(self.labels): labels, str(self.tensor): cond}


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
        return Takes("cond", NONE, NONE, True, _classes(net), _shape(net), None)
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
        _shape(net),
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
    if taken.shape == () and given & {*CONDITIONS} - {*LABELS}:
        raise ConfigError(
            "cond must hold no condition for a network without cond_shape: build it with cond_shape=, or leave cond out"
        )
    missing = sorted(taken.needs - given)
    if missing:
        raise MissingConditionError(
            f"cond must give what the network's arguments {taken.shown:.70} need, and {missing[0]:.30} is missing: give "
            f"cond={'a tensor or ' * (len(taken.needs) == 1)}a dict with {', '.join(map(repr, sorted(taken.needs))):.40}"
        )
    return cond or None if type(cond) is dict else cond


def check_untrained(taken: Takes, cond: Condition, classes: int | None, shape: tuple[int, ...] | None) -> None:
    """ConfigError where a condition that `arranged` made holds labels, and the model was trained without (`classes` 0), or
    another condition, and it was trained without (`shape` ())."""
    if classes == 0 and (shape is None or _entry(taken, cond, taken.labels, LABELS, False)[0] is not None):
        what = "hold no labels" if shape else "be None"
        raise ConfigError(
            f"cond must {what}, as the model was trained without labels: leave cond out, or train it with labelled data"
        )
    if shape == () and _entry(taken, cond, taken.tensor, (), False)[0] is not None:
        what = "hold labels alone" if classes else "be None"
        raise ConfigError(
            f"cond must {what}, as the model was trained without conditions: leave them out, or train it with Data(x, cond=)"
        )


def check_labels(
    taken: Takes, cond: Condition, count: int, classes: int, null: int | None, looks: bool, by_name: bool
) -> Tensor:
    """The class numbers of a condition that `arranged` made: integers [count] from 0 to classes - 1, or `null`; else
    MissingConditionError, DTypeError, ShapeError or DataError.

    null     the label that means none, where the model was trained with it
    looks    at the values also where that would stall a device
    by_name  whether the caller gave them in a dict
    """
    labels, argument = _entry(taken, cond, taken.labels, LABELS, by_name)
    rule = f"the labels 0 to {classes - 1} that the model was trained with"
    if labels is None:
        none = "" if null is None else f", or {null}, which means no label"
        example = f"cond=torch.randint({classes}, ({count},))"
        if cond is not None:
            example = f"cond={{{taken.labels!r}: labels, {taken.tensor!r}: …}}"
        raise MissingConditionError(
            f"cond must hold {rule}, got none: give one for each sample, such as {example}{none}"
        )
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise DTypeError(f"{argument} must hold {rule}, got {got}: convert them with torch.as_tensor(labels).long()")
    if labels.shape != (count,):
        raise ShapeError(
            f"{argument} must hold {rule}, one for each of {count} samples, got shape {tuple(labels.shape)}"
        )
    if not are_seen(labels, looks):
        return labels
    low, high = (int(end) for end in labels.aminmax())
    if low >= 0 and high < classes:
        return labels
    known = (labels >= 0) & (labels < classes)
    if null is not None and bool((known | (labels == null)).all()):
        return labels
    way = "give those, or train with more"
    if null is not None:
        way = f"give those, or {null} for none"
    elif high == taken.classes:  # the network's own
        way = f"{high} means no label, which is trained with train(cond_dropout=)"
    raise DataError(f"{argument} must hold {rule}, got {low} to {high}: {way}")


def check_vectors(
    taken: Takes, cond: Condition, count: int, shape: tuple[int, ...], null: bool, looks: bool, by_name: bool
) -> Tensor:
    """The numbers of a condition that `arranged` made: floats [count, *shape], finite, or with `null` also all NaN for a sample,
    which means none; else MissingConditionError, DTypeError, ShapeError or DataError. Arguments as in `check_labels`."""
    value, argument = _entry(taken, cond, taken.tensor, (), by_name)
    rule = f"the conditions [{count}, {', '.join(map(str, shape))}] that the model was trained with"
    none = ", or NaN for a sample without" if null else ""
    if value is None:
        example = "cond=tensor" if cond is None else f"cond={{{taken.labels!r}: labels, {taken.tensor!r}: tensor}}"
        raise MissingConditionError(f"cond must hold {rule}, got none: give {example}{none}")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise DTypeError(f"{argument} must hold {rule}, floating numbers, got {got}: use .float()")
    if value.shape != (count, *shape):
        raise ShapeError(
            f"{argument} must hold {rule}, got shape {tuple(value.shape)}: one for all is .expand({count}, …)"
        )
    if are_seen(value, looks) and not math.isfinite(value.detach().sum(dtype=torch.float64)):
        bad = ~value.isfinite()
        if null:
            bad &= ~without(value).view(-1, *[1] * (value.ndim - 1))
        if len(where := torch.nonzero(bad)):
            index = tuple(where[0].tolist())
            way = ""
            if value[index].isnan():
                way = ": NaN in all numbers of a sample means none"
                way += "" if null else ", which is trained with train(cond_dropout=)"
            raise DataError(f"{argument} must be finite, got {value[index].item()} at index {index}{way}")
    return value


def check_together(labels: Tensor, cond: Tensor, null: int, looks: bool) -> None:
    """DataError where a sample has a label and no condition, or the other way round: a training leaves out both."""
    if not (are_seen(labels, looks) and are_seen(cond, looks)):
        return
    apart = (labels == null) != without(cond)
    if bool(apart.any()):
        index = int(apart.nonzero()[0])
        raise DataError(
            f"cond must leave out both label and condition of a sample, as its training did, or none, got one at index {index}: "
            f"give label {null} with NaN"
        )


def without(cond: Tensor) -> Tensor:
    """Which samples of cond [B, *] have no condition, [B]: those whose numbers are all NaN."""
    return cond.isnan().flatten(1).all(1)


def _entry(taken: Takes, cond: Condition, place: str | None, others: Sequence[str], by_name: bool) -> tuple[Any, str]:
    """What a condition that `arranged` made has at a place, or at one of `others`, and what a message calls it."""
    if not isinstance(cond, dict):
        return (cond if place == taken.third else None), "cond"
    key = next((name for name in (place, *others) if name in cond), None)
    return (None if key is None else cond[key]), f"cond[{key!r}]" if by_name and key is not None else "cond"


def are_seen(value: Tensor, looks: bool = False) -> bool:
    """Whether a tensor's values are there to be looked at, without stalling a device unless the caller `looks`."""
    hidden = torch.compiler.is_compiling() or value.is_meta or torch_private.functorch_is_active()
    return not hidden and (looks or value.device.type == "cpu") and value.numel() > 0


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


def _shape(net: Any) -> tuple[int, ...] | None:
    """A network's `cond_shape`."""
    said = getattr(net, "cond_shape", False)
    if said is None:
        return ()
    return tuple(said) if isinstance(said, (tuple, list)) and all(type(n) is int for n in said) else None


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
