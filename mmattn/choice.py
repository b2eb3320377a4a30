"""Which implementation a call takes, and why: Triton kernels or the reference formula."""

from __future__ import annotations

import os
from typing import NamedTuple

from . import check
from ._triton import INSTALLED
from .op import Call, dtype_name, flatten

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


def unmet(op: str, problem: str) -> RuntimeError:
    return RuntimeError(f'{op}: implementation="triton" cannot be met: {problem}. Use implementation="auto" or "reference".')


def call_problem(call: Call) -> str | None:
    arrays, _ = flatten(call.op, call.operands)
    if any(dtype_name(x) == "float64" for x in arrays):
        return "float64 has no kernels"
    return None
