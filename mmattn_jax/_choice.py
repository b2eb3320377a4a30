"""Which implementation calls take that do not say it themselves; part of the key of JAX's caches."""

from __future__ import annotations

import threading
from contextvars import ContextVar

import jax

from mmattn import check
from mmattn.choice import IMPLEMENTATIONS, Block, Implementation, from_environment

key = jax.make_user_context(from_environment())
"""What jit's caches are keyed by: the process default, which it holds, or what `Thread` puts in its place."""


class Thread(threading.local):
    """The innermost block of this thread, as the key of jit's caches has it."""

    name: str | None = None
    scope = None

    def enter(self, name: str | None) -> None:
        """Let the key say `name`, or the process default for None. At most one scope of JAX's is open in a thread: several would
        have to be closed in order, and asyncio tasks close their blocks in any order."""
        if self.scope is not None:
            self.scope.__exit__(None, None, None)
        self.name, self.scope = name, None if name is None else key(name)
        if self.scope is not None:
            self.scope.__enter__()


thread = Thread()
_context: ContextVar[tuple[str, ...]] = ContextVar("mmattn_jax.implementation", default=())


def innermost() -> str | None:
    blocks = _context.get()
    return blocks[-1] if blocks else None


def current(traced: bool = False) -> str:
    """The setting of the current context. traced: whether the call is being traced, into a cache whose key is the thread's."""
    name = innermost()
    if traced and name != thread.name:
        raise RuntimeError(
            f"implementation: this context is in {described(name)}, its thread is in {described(thread.name)}, and jax.jit's "
            "cache tells threads apart, not contexts; expected a block that is entered and left where its calls are. Do not "
            "await in a block, enter one again in a thread that runs a copy of a context, or pass implementation= to the call."
        )
    return key.get_global() if name is None else name


def described(name: str | None) -> str:
    return "no block" if name is None else f'a block of "{name}"'


class implementation(Block):
    __doc__ = f"""{Block.__doc__.rstrip()}

    In JAX, a backward and what jax.checkpoint recomputes take what was traced forward. The cache of jax.jit tells threads apart,
    not contexts: do not await in a block around jitted calls. While a task does, jitted calls of other tasks raise RuntimeError
    where they are traced, and functions that are compiled already run as the block says; calls outside of jit are right.
    """

    def enter(self) -> None:
        _context.set((*_context.get(), self.name))
        thread.enter(innermost())

    def leave(self) -> None:
        _context.set(_context.get()[:-1])
        thread.enter(innermost())

    def set_default(self, name: Implementation) -> None:
        set_implementation(name)


def set_implementation(name: Implementation) -> None:
    """Set what calls outside of all `implementation` blocks run, in all threads: "triton", "reference" or "auto"."""
    check.choice("set_implementation", "name", name, IMPLEMENTATIONS)
    key.set_global(name)
