"""The process default of `implementation=`, which is part of the key of JAX's caches."""

from __future__ import annotations

from typing import Literal

import jax

from mmattn import check
from mmattn.choice import IMPLEMENTATIONS, from_environment

Implementation = Literal["auto", "triton", "reference"]

_default = jax.make_user_context(from_environment())


def current() -> str:
    return _default.value


class implementation:
    """Choose the implementation of the ops: "triton", "reference" or "auto".

    `implementation("reference")` sets the default of the process, `with implementation("reference"):` that of the block.
    The first default is MMATTN_IMPLEMENTATION, else "auto". A jitted function that was traced under another setting is
    traced anew. An op's own `implementation=` goes first.
    """

    def __init__(self, name: Implementation):
        check.choice("implementation", "name", name, IMPLEMENTATIONS)
        self._before = _default.get_global()
        self._scope = _default(name)
        _default.set_global(name)

    def __enter__(self) -> None:
        _default.set_global(self._before)
        self._scope.__enter__()

    def __exit__(self, *exception) -> None:
        self._scope.__exit__(*exception)
