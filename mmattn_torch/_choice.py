"""Which implementation calls take that do not say it themselves."""

from __future__ import annotations

from typing import Literal

from mmattn import check
from mmattn.choice import IMPLEMENTATIONS, from_environment

Implementation = Literal["auto", "triton", "reference"]

default = from_environment()


def current() -> str:
    return default


class implementation:
    """Choose what the calls that follow run: "triton", "reference" or "auto", as torch.set_grad_enabled chooses gradients.

    Calling it sets the process default; as a context manager it restores the former one at the end of the block.
    "auto", the default unless the environment variable MMATTN_IMPLEMENTATION says otherwise, takes the Triton kernels on a
    supported GPU and plain torch code elsewhere. "triton" raises where the kernels cannot run. "reference" is the formula in
    plain torch code, with every derivative that torch has. A compiled function recompiles when the setting has changed.
    """

    def __init__(self, name: Implementation):
        global default
        check.choice("implementation", "name", name, IMPLEMENTATIONS)
        self.previous = default
        default = name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global default
        default = self.previous
