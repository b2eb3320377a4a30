"""Kernels over a tuple of token streams, whose number is known when a model is built.

Triton kernels have no variadic parameters, but their jitted functions take tuples. So a body is written once over tuples,
and `over_streams` writes the kernel that has one flat parameter per stream and hands the body its tuples.
"""

from __future__ import annotations

import inspect
import linecache
from functools import cache

from ._gluon import gluon, is_gluon
from ._triton import tl, triton

INTEGERS = ("LENGTHS", "PROGRAMS", "SAMPLES", "TABLE_SAMPLES", "CHUNKS", "BLOCKS")
"""Tuples of runtime integers, one per stream."""


@cache  # as many as there are bodies and numbers of streams
def over_streams(body, n: int):
    """The kernel `<body>_<n>` that runs `body` over n streams.

    The body names its parameters in the order inputs, outputs, integers, constants: `<name>_ptrs` is a tuple of pointers,
    `<name>_ptr` one pointer, a name of INTEGERS a tuple of integers, `<NAME>S_` one of constants, any other name a constant.
    The kernel's parameters are those, `<name>_ptrs` becoming `<name>0_ptr`, `<name>1_ptr`, ...
    """
    function = getattr(body, "fn", body)
    flat, passed, runtime = [], [], []
    for name in inspect.signature(function).parameters:
        each = [name_of(name, i) for i in range(n)]
        if name in INTEGERS:
            runtime += each
        if name.endswith("_ptrs") or name in INTEGERS:
            flat += each
        elif name.endswith("S_"):
            flat += [f"{x}: tl.constexpr" for x in each]
        else:
            flat.append(name if name.endswith("_ptr") else f"{name}: tl.constexpr")
            each = None
        passed.append(name if each is None else f"({', '.join(each)},)")
    kernel = f"{function.__name__.removesuffix('_body')}_{n}_kernel"
    source = f"def {kernel}({', '.join(flat)}):\n    {function.__name__}({', '.join(passed)})\n"
    filename = f"<{function.__module__}.{kernel}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    scope = dict(function.__globals__, tl=tl)
    exec(compile(source, filename, "exec"), scope)
    language = gluon if is_gluon(body) else triton
    return language.jit(do_not_specialize=runtime)(scope[kernel])


def integers(**tuples: tuple[int, ...]) -> dict[str, int]:
    """A plan's runtime integers from tuples with one number per stream."""
    return {name_of(name, i): x for name, xs in tuples.items() for i, x in enumerate(xs)}


def name_of(parameter: str, i: int) -> str:
    """Stream i's parameter of a tuple: q_ptrs -> q0_ptr, LENGTHS -> LENGTH0, Q_STRIDES_ -> Q_STRIDE0."""
    if parameter.endswith("_ptrs"):
        return f"{parameter.removesuffix('_ptrs')}{i}_ptr"
    return f"{parameter.removesuffix('_').removesuffix('S')}{i}"
