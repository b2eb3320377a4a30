"""Which implementation a call takes, and why: Triton kernels or the reference formula."""

from __future__ import annotations

import inspect
import os
from functools import wraps
from typing import Literal, NamedTuple

from . import check
from ._triton import INSTALLED
from .op import Call, dtype_name, flatten

Implementation = Literal["auto", "triton", "reference"]
IMPLEMENTATIONS = ("auto", "triton", "reference")


class Explanation(NamedTuple):
    """The path that a call takes, "triton" or "reference", and the reason."""

    path: str
    reason: str


def from_environment() -> str:
    """The process default: MMATTN_IMPLEMENTATION, or "auto"."""
    value = os.environ.get("MMATTN_IMPLEMENTATION", "auto")
    check.choice("mmattn", "the environment variable MMATTN_IMPLEMENTATION", value, IMPLEMENTATIONS)
    return value


class Block:
    """Choose what the calls in a block run: "triton", "reference" or "auto".

        with implementation("reference"):       the calls in the block
        @implementation("reference")            the calls of a function; not of a generator or a coroutine, which raise TypeError
        set_implementation("reference")         all other calls of the process, in all threads

    "auto" takes the Triton kernels on a supported GPU and plain code of the framework elsewhere. It is the process default unless
    the environment variable MMATTN_IMPLEMENTATION says otherwise. "triton" raises where the kernels cannot run. "reference" is
    the formula in plain code. A call's own `implementation=` goes first.

    "auto" and "triton" have a first derivative in reverse mode, on every device, and refuse any other, so that code which works
    on a CPU works on a GPU. "reference", and float64, which takes it, have every derivative that the framework has.

    Blocks nest, one object may be entered again, and by several threads at once, and an exception ends a block as its end does.
    A block belongs to the context that entered it (contextvars): to its thread and its asyncio task, and to the tasks that are
    started in it. Other threads do not see it, also when they were started in the block. What has been compiled under one setting
    (torch.compile, jax.jit) is compiled anew under another. `implementation(name)` as a statement of its own sets the process
    default, as set_implementation does: it takes effect when the object goes without having been a block or a decorator.
    """

    used = False

    def __init__(self, name: Implementation):
        check.choice("implementation", "name", name, IMPLEMENTATIONS)
        self.name = name

    def enter(self) -> None:
        """Choose self.name, for the current context alone."""
        raise NotImplementedError

    def leave(self) -> None:
        """Choose again what was chosen outside of the innermost block of the current context."""
        raise NotImplementedError

    def set_default(self, name: Implementation) -> None:
        """Set the process default."""
        raise NotImplementedError

    def __enter__(self):
        self.used = True
        self.enter()
        return self

    def __exit__(self, *exception):
        self.leave()

    def __call__(self, function):
        self.used = True
        if any(is_kind(function) for is_kind in LATER):
            raise TypeError(
                f"implementation: {function.__qualname__} runs after the call of it has returned (a generator or a coroutine); "
                f'expected a plain function. Write `with implementation("{self.name}"):` inside of it.'
            )
        kind, name = type(self), self.name

        @wraps(function)
        def inner(*args, **kwargs):
            with kind(name):  # torch.compile enters no object from outside of the function that it compiles
                return function(*args, **kwargs)

        return inner

    def __del__(self):
        # Not in the constructor: a block would show its setting to other threads until it is entered.
        if not self.used and hasattr(self, "name"):
            self.set_default(self.name)


LATER = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)


def decide(call: Call, requested: str | None, default: str, device_problem: str | None) -> Explanation:
    """Resolve a call's `implementation=` against the context's default.

    device_problem says why this device cannot run the kernels, None if it can. A request for "triton" that cannot be met
    raises RuntimeError; only "auto" falls back.
    """
    name = call.name
    check.choice(name, "implementation", requested, (None, *IMPLEMENTATIONS))
    wanted = requested or default
    if wanted == "reference":
        return Explanation("reference", "asked for by " + ("the call" if requested else "the context or MMATTN_IMPLEMENTATION"))
    problem = call_problem(call) or (None if INSTALLED else "triton is not installed") or device_problem
    if problem is None:
        return Explanation("triton", "asked for" if wanted == "triton" else "the device and the arguments are supported")
    if wanted == "triton":
        raise unmet(name, problem)
    return Explanation("reference", problem)


ROCM = "the kernels have run on NVIDIA GPUs only, and this is one of AMD's (ROCm)"


def not_a_gpu(device: str) -> str:
    return f"the kernels run on CUDA GPUs, the arrays are on {device}"


def old_gpu(arch: int) -> str | None:
    return None if arch >= 80 else f"the kernels need compute capability 8.0, the GPU has {arch / 10}"


def no_gradient(op: str, operand: str, remedy: str) -> str:
    return (
        f"{op}: {operand} wants a gradient, for which there is no kernel; expected a constant. "
        f'Pass implementation="reference", which has one, or {remedy}.'
    )


def first_only(op: str) -> str:
    return (
        f'{op}: implementation="auto" and "triton" have a first derivative in reverse mode only, on every device; expected one '
        'backward pass. For forward mode and for second derivatives pass implementation="reference", which has all of them.'
    )


def unmet(op: str, problem: str) -> RuntimeError:
    return RuntimeError(f'{op}: implementation="triton" cannot be met: {problem}. Use implementation="auto" or "reference".')


def call_problem(call: Call) -> str | None:
    arrays, _ = flatten(call.op, call.operands)
    if any(dtype_name(x) == "float64" for x in arrays):
        return "float64 has no kernels"
    return None
