"""Which implementation calls take that do not say it themselves."""

from __future__ import annotations

from contextvars import ContextVar

import torch

from mmattn import check
from mmattn.choice import IMPLEMENTATIONS, Block, Implementation, from_environment

from . import _choice  # this module

process = from_environment()


class State:
    """The innermost block that the current context has entered, None for none, and the one around it.

    Tasks share the state that they were started with, so it is never changed, but by torch.compile: that can set an attribute and
    no ContextVar. Blocks within a compiled function are in `traced`, which is empty but where such a block has a graph break.
    """

    def __init__(self, name: str | None = None, outer: State | None = None):
        self.name, self.outer, self.traced = name, outer, ()

    def setting(self) -> str:
        return self.traced[-1] if self.traced else self.name or process


_context: ContextVar[State | None] = ContextVar("mmattn_torch.implementation", default=None)


def state_of_context() -> State:
    state = _context.get()
    if state is None:  # one for all contexts would be shared by threads
        state = State()
        _context.set(state)
    return state


def of_context() -> str:
    """The setting of the current context, where nothing is being compiled."""
    state = _context.get()
    return process if state is None else state.setting()


COMPUTED = dict(state=state_of_context, setting=of_context)


def __getattr__(name: str):
    """This module's `state` and `setting`, for torch.compile: it cannot trace a ContextVar, but guards on an attribute of a
    module, and a guard asks for the attribute anew at each call, in the thread and the task that call."""
    if name in COMPUTED:
        return COMPUTED[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def current() -> str:
    """The setting of the current context."""
    if not torch.compiler.is_dynamo_compiling():
        return of_context()
    traced = _choice.state.traced
    return traced[-1] if traced else _choice.setting


class implementation(Block):
    __doc__ = f"""{Block.__doc__.rstrip()}

    In torch, the backward of a call takes what its forward took. What activation checkpointing recomputes takes the setting of
    the thread that recomputes it: on a CPU the one that calls backward(), so that a block has to span both, on a GPU one of
    autograd's own, which is outside of all blocks: there use set_implementation.
    """

    def enter(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            _choice.state.traced = (*_choice.state.traced, self.name)
        else:
            _context.set(State(self.name, _context.get()))

    def leave(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            _choice.state.traced = _choice.state.traced[:-1]
        else:
            _context.set(state_of_context().outer)

    def set_default(self, name: Implementation) -> None:
        set_implementation(name)


def set_implementation(name: Implementation) -> None:
    """Set what calls outside of all `implementation` blocks run, in all threads: "triton", "reference" or "auto"."""
    global process
    check.choice("set_implementation", "name", name, IMPLEMENTATIONS)
    process = name
