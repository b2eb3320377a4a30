"""A launch and an operation as values, free of any array framework.

A `Plan` is one kernel launch. An `Op` says which plans run in which order, forward and backward, and states its formula
once more over any array namespace. `run(plan, *arrays) -> outputs` and `run.target` are all that an op asks of a
framework. A `Call` is an op with checked arguments: what a public function hands to its framework's binder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

DTYPE_NAMES: dict[Any, str] = {}  # a framework's dtype object -> its name; each front-end adds its own
FLOATS = ("float32", "bfloat16", "float16")
remembered = lru_cache(maxsize=64)
"""For functions of shapes, such as those that make plans. Lengths may be new for ever, so the latest results alone are kept:
enough for the layers of a model to share them. What is launched again and again the front-ends remember themselves."""


def dtype_name(x) -> str:
    return x.dtype if isinstance(x.dtype, str) else DTYPE_NAMES.get(x.dtype) or str(x.dtype)


class Spec(NamedTuple):
    """Shape and dtype name of an array that need not exist."""

    shape: tuple[int, ...]
    dtype: str


def spec(x) -> Spec:
    """The Spec of any array: torch, JAX, NumPy, or a Spec itself."""
    return Spec(tuple(x.shape), dtype_name(x))


Array = Any  # of the framework whose function was called
Streams = Any  # an Array, or a tuple of them, one per token stream
Vector = Any  # an Array, or a Row of one

UNUSED = Spec((1,), "float32")  # stands for an output that a launch does not write


class Row(NamedTuple):
    """Row `index` of every sample of a packed (B, M, D) array, as a (B, D) vector that is read in place.

    JAX has no views, so there a slice that feeds a kernel is a copy; a Row is none.
    """

    array: Any
    index: int

    @property
    def exists(self) -> bool:
        """Whether the array is packed and has such a row."""
        return type(self.index) is int and len(self.array.shape) == 3 and 0 <= self.index < self.array.shape[1]

    @property
    def shape(self):
        return (self.array.shape[0], self.array.shape[2])

    @property
    def dtype(self):
        return self.array.dtype


def several(x) -> bool:
    """Whether x holds one entry per stream."""
    return isinstance(x, tuple | list) and not isinstance(x, Spec | Row)


def row_stride(x, dense: int) -> int | None:
    """Elements between consecutive rows of x, a row being its last `dense` axes; None where x has no such stride.

    Sizes and strides are read where the framework has strides (torch views); any other array is contiguous.
    """
    shape = tuple(x.shape)
    row = math.prod(shape[len(shape) - dense :])
    strides = getattr(x, "stride", None)
    if strides is None:
        return row
    if 0 in shape:  # there is nothing to read
        return row
    step = 1
    strides = strides()
    for size, stride in zip(reversed(shape[len(shape) - dense :]), reversed(strides[len(shape) - dense :]), strict=True):
        if size != 1 and stride != step:
            return None
        step *= size
    every = [(n, s) for n, s in zip(shape, strides, strict=True)][: len(shape) - dense]
    leading = [(n, s) for n, s in every if n != 1]
    for (_, outer), (n, inner) in pairwise(leading):
        if outer != n * inner:
            return None
    if leading:
        return leading[-1][1]
    return max(row, every[0][1]) if every else row  # a lone row: as between two, so that the kernel is the same


def aligned(x, dense: int) -> bool:
    """Whether every row of x, its last `dense` axes, begins at a multiple of 16 bytes. (Memory without addresses does.)"""
    size = 4 if dtype_name(x) == "float32" else 2
    address = x.data_ptr() if hasattr(x, "data_ptr") else 0
    return address % 16 == 0 and row_stride(x, dense) * size % 16 == 0


class Target(NamedTuple):
    """What a plan may know of the GPU: compute capability, multiprocessors, bytes of shared memory per block, and whether
    kernels in Gluon run there (a real GPU, and a Triton that has it)."""

    arch: int = 90
    sms: int = 132
    shared: int = 232448
    gluon: bool = False


@dataclass(frozen=True)
class Plan:
    """One launch: `kernel[grid](*inputs, *outs, **ints, **meta)`, the kernel's parameters in that order.

    ints may be runtime integers (torch: no recompilation when they change) or constants (JAX); meta is constexpr.
    aliases: out -> input, by number, where the launch updates an array in place; the kernel gets its pointer twice.
    """

    kernel: Any
    grid: tuple[int, ...]
    outs: tuple[Spec, ...]
    ints: Mapping[str, int]
    meta: Mapping[str, Any]
    warps: int
    stages: int = 1
    aliases: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """A differentiable operation on named operands.

    An operand is an array, a tuple of arrays (one per stream, None where a stream has none) or None; `a.<name>` below.
    Every operand leads with the batch axis, except the `shared` ones: vectors or tables that all samples share, which may
    carry a leading group axis G (sample b reads row b // (B / G)). So vmap folds its axis into B and into G, one launch
    serves it, and gradients of shared vectors are reduced within a group only.

    infer(a, **static)                               -> (outs, extras), Specs; extras are residuals beyond the outs
    forward(run, a, **static)                        -> (outs, extras)
    backward(run, a, outs, extras, douts, **static)  -> {operand: gradient}, in the operand's shape and structure;
                                                        operands that are not in `keeps` arrive as None
    reference(xp, a, **static)                       -> outs, in plain array code over the namespace xp
    """

    name: str
    operands: tuple[str, ...]
    infer: Callable
    forward: Callable
    backward: Callable
    reference: Callable
    keeps: frozenset[str]  # operands that the backward reads; any other one is constant or in `passes`
    keeps_outs: bool = False  # whether the backward reads the outputs
    passes: Mapping[str, int] = field(default_factory=dict)  # operand -> the output whose gradient is its own; not in backward
    constant: frozenset[str] = frozenset()  # operands without a gradient: masks, positions, tables
    shared: Mapping[str, int] = field(default_factory=dict)  # operand -> rank without the group axis
    dense: Mapping[str, int] = field(default_factory=dict)  # operand read through a row stride -> its dense trailing axes

    def __hash__(self):
        return hash(self.name)

    def __repr__(self):
        return self.name


class Call(NamedTuple):
    """An op with checked operands; `result(outs)` is what the public function returns, which errors call `name`."""

    op: Op
    operands: dict[str, Any]
    static: tuple[tuple[str, Any], ...]
    result: Callable
    name: str = ""


class Operands:
    """Operands as attributes. (torch.compile cannot trace a types.SimpleNamespace.)"""

    def __init__(self, **operands):
        for name, x in operands.items():
            setattr(self, name, x)


Layout = tuple[tuple[str, int | tuple[int | None, ...] | None], ...]


def flatten(op: Op, operands: Mapping[str, Any]) -> tuple[list, Layout]:
    """The arrays that are present, in order, and where they go: a hashable map from operand to position(s)."""
    arrays, layout = [], []

    def place(x):
        if x is None:
            return None
        arrays.append(x)
        return len(arrays) - 1

    for name in op.operands:
        x = operands[name]
        layout.append((name, tuple(map(place, x)) if several(x) else place(x)))
    return arrays, tuple(layout)


def unflatten(layout: Layout, arrays) -> Operands:
    """Inverse of `flatten`: the operands as attributes."""
    pick = lambda at: None if at is None else arrays[at]
    return Operands(**{name: tuple(map(pick, at)) if isinstance(at, tuple) else pick(at) for name, at in layout})


def owners(layout: Layout) -> list[str]:
    """The operand that each flat array belongs to."""
    return [name for name, at in layout for i in (at if isinstance(at, tuple) else (at,)) if i is not None]


def groups(x, rank: int) -> int:
    """Number of groups of a shared operand whose rank without the group axis is `rank`."""
    return x.shape[0] if len(x.shape) > rank else 1


def cdiv(a, b):
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def wide(x):
    """x in at least float32, in any framework."""
    return x if dtype_name(x) in ("float32", "float64") else cast(x, "float32")


def widest(*arrays) -> str:
    """The dtype that a formula takes arrays in together: at least float32."""
    return "float64" if any(dtype_name(x) == "float64" for x in arrays) else "float32"


def widened(a, *names: str) -> Operands:
    """These operands in the dtype that a formula takes them in together.

    A formula widens first. Were a 16-bit table gathered or a vector broadcast before, its gradient would be summed in 16 bits.
    """
    given = {name: getattr(a, name) for name in names}
    dtype = widest(*(x for x in given.values() if x is not None))
    return Operands(**{name: None if x is None else cast(x, dtype) for name, x in given.items()})


def cast(x, dtype: str):
    if dtype_name(x) == dtype:
        return x
    if hasattr(x, "astype"):
        return x.astype(dtype)
    return x.to(next(d for d, name in DTYPE_NAMES.items() if name == dtype and type(d) is type(x.dtype)))


def ungrouped(xp, v, samples: int):
    """v (G, ...), a row per group, as a row per sample: (samples, ...)."""
    G, *rest = v.shape
    return xp.broadcast_to(v[:, None], (G, samples // G, *rest)).reshape(samples, *rest)
