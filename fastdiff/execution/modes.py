"""A network's mode, which threads share: evaluations and training steps, and what an interrupt leaves of them."""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from . import cpu

P = ParamSpec("P")
R = TypeVar("R")


class _Users:
    """Who uses a network now: evaluations, or the training steps of one thread; and who waits, in order."""

    def __init__(self) -> None:
        self.evaluations: dict[_Use, int] = {}  # to their threads
        self.steps: dict[_Use, int] = {}
        self.waiting: list[_Use] = []
        self.training: list[nn.Module] = []  # whose flag is set again after the evaluations


# a plain lock, whose `with` is C's own: Ctrl-C within threading.Condition's, which is Python, would leave it held for ever
_lock = threading.Lock()
PAUSE = 0.001  # seconds between two looks of who waits; a step or a run takes longer
_users: weakref.WeakKeyDictionary[nn.Module, _Users] = weakref.WeakKeyDictionary()
_mine = threading.local()


class _Use:
    """Base of `evaluating` and `stepping`: a thread within one never waits for the other, nor for itself."""

    def __init__(self, net: Any) -> None:
        self.net = net if isinstance(net, nn.Module) else None

    def __enter__(self) -> None:
        if self.net is None:
            return
        held = vars(_mine).setdefault("held", [])
        held.append(self)  # first, so that `leaves_no_trace` finds it whenever an interrupt comes
        while not self._entered(self.net):
            time.sleep(PAUSE)

    def _entered(self, net: nn.Module) -> bool:
        """Enter, if it is this one's turn and others leave room."""
        me = threading.get_ident()
        with _lock:
            users = _users.setdefault(net, _Users())
            if me not in users.evaluations.values() and me not in users.steps.values():
                if self not in users.waiting:
                    users.waiting.append(self)
                if users.waiting[0] is not self or not self.may_enter(users):
                    return False
                users.waiting.remove(self)
            self.begin(users, me)
            return True

    def __exit__(self, *_: object) -> None:
        if self.net is None:
            return
        with _lock:  # each line may be run again, if an interrupt ended the first try
            users = _users.get(self.net)
            if users is not None:
                if self in users.waiting:
                    users.waiting.remove(self)
                self.end(users)
                if not (users.evaluations or users.steps or users.waiting):
                    _users.pop(self.net, None)
            if self in _mine.held:
                _mine.held.remove(self)

    def may_enter(self, users: _Users) -> bool:
        """Whether others leave room."""
        raise NotImplementedError

    def begin(self, users: _Users, thread: int) -> None:
        """Enter."""
        users.steps[self] = thread

    def end(self, users: _Users) -> None:
        """Leave."""
        users.steps.pop(self, None)


class evaluating(_Use):
    """Evaluation mode for a network, and each submodule's own flag back afterwards; the first evaluation sets it, the last one
    restores it. It waits for another thread's training step, which would run in the wrong mode."""

    def may_enter(self, users: _Users) -> bool:
        return not users.steps

    def begin(self, users: _Users, thread: int) -> None:
        if not users.evaluations:
            users.training = [module for module in self.net.modules() if module.training]  # type: ignore[union-attr]
        users.evaluations[self] = thread
        for module in users.training:
            module.training = False

    def end(self, users: _Users) -> None:
        if users.evaluations.keys() == {self}:
            for module in users.training:
                module.training = True
        users.evaluations.pop(self, None)


class stepping(_Use):
    """A training step of a network: it waits for other threads' evaluations, and they for it."""

    def may_enter(self, users: _Users) -> bool:
        return not users.evaluations and not users.steps


def leaves_no_trace(function: Callable[P, R]) -> Callable[P, R]:
    """The function; where it ends with an exception, such as Ctrl-C at any instant (also as a `with` begins or ends), networks'
    modes and torch's gradients are as before. In a forked child the first call sets torch to one thread."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        gradients, held = torch.is_grad_enabled(), len(vars(_mine).get("held", ()))
        try:
            if cpu.forked:  # the child has none of its parent's threads, for which torch would wait for ever
                torch.set_num_threads(1)
            return function(*args, **kwargs)
        except BaseException:
            torch.set_grad_enabled(gradients)
            for use in reversed(vars(_mine).get("held", [])[held:]):
                use.__exit__()
            raise

    return call


def _forget() -> None:
    """After a fork: other threads, and what they hold, are the parent's."""
    global _lock
    _lock = threading.Lock()
    me = threading.get_ident()
    for users in list(_users.values()):
        users.waiting.clear()
        users.steps = {use: thread for use, thread in users.steps.items() if thread == me}
        others = [use for use, thread in users.evaluations.items() if thread != me]
        for use in others:
            use.end(users)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
