"""Which implementation calls take that do not say it themselves."""

from __future__ import annotations

from contextlib import ContextDecorator
from typing import Literal

from mmattn import check
from mmattn.choice import IMPLEMENTATIONS, from_environment

Implementation = Literal["auto", "triton", "reference"]

default = from_environment()


def current() -> str:
    return default


class implementation(ContextDecorator):
    """Choose what the calls that follow run: "triton", "reference" or "auto", as torch.set_grad_enabled chooses gradients.

    Calling it sets the process default, for all threads; as a context manager or a decorator it restores the former one at the
    end. "auto", the default unless the environment variable MMATTN_IMPLEMENTATION says otherwise, takes the Triton kernels on a
    supported GPU and plain torch code elsewhere. "triton" raises where the kernels cannot run. "reference" is the formula in
    plain torch code, with every derivative that torch has. A compiled function recompiles when the setting has changed.
    What activation checkpointing recomputes takes the setting of the backward: let the block span both.
    """

    def __init__(self, name: Implementation):
        global default
        check.choice("implementation", "name", name, IMPLEMENTATIONS)
        self.name, self.outer, self.entered = name, [default], False
        default = name

    def __enter__(self):
        global default
        if self.entered:  # an object that is used again; the first block's outer setting was noted when it was made
            self.outer.append(default)
        self.entered, default = True, self.name
        return self

    def __exit__(self, *_):
        global default
        default = self.outer.pop()

    def __call__(self, function):
        global default
        default = self.outer.pop()
        self.entered = True
        return super().__call__(function)
