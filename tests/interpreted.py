"""The project's own kernels in Triton's interpreter, on host memory, next to ordinary JIT kernels in one process.

`launch(plan, operands, outs)` takes anything with an address, a dtype and an extent: torch CPU tensors or NumPy arrays. The
kernels come from a second copy of the `mmattn` package, imported while Triton interprets, so helpers that one module takes
from another are interpreted too; a test may put a mutated copy in its place (`package`).

What Triton's interpreter leaves to us:
- float32 -> bfloat16 truncates, and bfloat16 dots and arithmetic take bit patterns; all go through ml_dtypes here.
- dots in tf32 take float32 as it is; here they ignore its lower 13 bits, as the tensor cores do.
- `tl.cdiv`, `tl.sum`, ... are JIT functions when Triton was imported without TRITON_INTERPRET; here they run as Python.
- calling a device function patches `triton.language` and never restores it, after which nothing compiles; here only the
  launch patches, and restores.
- nothing checks addresses; here a load or store outside the launch's operands raises.
- it computes every integer sum and product once more in int64, for a check of overflow that only its debug mode reads.
- it is global state: one launch at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import pkgutil
import re
import sys
import threading
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

import mmattn
from mmattn.op import Plan, spec

POINTEES = dict(float32=tl.float32, float16=tl.float16, bfloat16=tl.bfloat16, int32=tl.int32, int64=tl.int64, bool=tl.int1)
LOCK = threading.RLock()
HOME = Path(mmattn.__file__).parent.parent


@contextlib.contextmanager
def interpreting_decorators():
    """What triton.jit decorates meanwhile is interpreted."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        yield


@cache
def load(home: Path) -> dict[str, ModuleType]:
    """The modules of a second copy of `mmattn` from the folder `home`, its kernels decorated for the interpreter."""
    ours = lambda: {name: module for name, module in sys.modules.items() if name.split(".")[0] == "mmattn"}
    originals = ours()
    for name in originals:
        del sys.modules[name]
    sys.path.insert(0, str(home))
    importlib.invalidate_caches()
    try:
        with interpreting_decorators():
            for module in pkgutil.walk_packages(importlib.import_module("mmattn").__path__, "mmattn."):
                importlib.import_module(module.name)
        return ours()
    finally:
        sys.path.remove(str(home))
        for name in ours():
            del sys.modules[name]
        sys.modules.update(originals)


home = HOME  # where the kernels of the next launches come from


@contextlib.contextmanager
def package(folder: Path):
    """Take the kernels from the copy of `mmattn` in `folder`."""
    global home
    home, before = folder, home
    try:
        yield
    finally:
        home = before


ORIGINAL = {
    name: getattr(interpreter.InterpreterBuilder, name)
    for name in ("binary_op", "cast_impl", "create_dot", "create_masked_load", "create_masked_store")
}


class Builder:
    """Replacements for methods of Triton's InterpreterBuilder; `memory` holds the launch's [start, stop) addresses, sorted."""

    memory = np.empty((0, 2), np.uint64)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return interpreter.TensorHandle(src.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return widened(src)
        return ORIGINAL["cast_impl"](self, src, dst_type)

    def get_bf16(self, value):  # Triton 3.9 has it
        return interpreter.TensorHandle(np.array([value], ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)

    def create_dot(self, a, b, acc, precision, *rest):
        a, b = widened(a), widened(b)
        if precision == INPUT_PRECISION.TF32:
            a, b = as_tensor_cores_read(a), as_tensor_cores_read(b)
        return ORIGINAL["create_dot"](self, a, b, acc, precision, *rest)

    def binary_op(self, lhs, rhs, op):
        out = ORIGINAL["binary_op"](self, widened(lhs), widened(rhs), op)
        if lhs.dtype.scalar != tl.bfloat16 or out.data.dtype == np.bool_:
            return out
        return self.cast_impl(out, tl.bfloat16)

    def create_masked_load(self, ptrs, mask, *rest):
        mask = as_mask(mask)
        check_addresses("load", ptrs, mask)
        return ORIGINAL["create_masked_load"](self, ptrs, mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        mask = as_mask(mask)
        check_addresses("store", ptrs, mask)
        return ORIGINAL["create_masked_store"](self, ptrs, value, mask, *rest)


def tree_sum(self, input):
    """tl.sum over one axis, in pairs as on a GPU: NumPy adds one after the other along an axis that others follow in memory."""
    x, axis = input.handle.data, self.axis
    total = np.sum(x) if axis is None else np.sum(np.ascontiguousarray(np.moveaxis(x, axis, -1)), -1)
    if self.keep_dims:
        total = total.reshape((1,) * x.ndim) if axis is None else np.expand_dims(total, axis)
    return self.to_tensor(total, input.dtype)


def as_mask(x):
    """A comparison's result keeps the dtype of what was compared, and takes it on when it is broadcast."""
    return interpreter.TensorHandle(x.data.astype(bool), tl.int1)


def widened(x):
    """A bfloat16 handle, which holds bit patterns, in float32; any other as it is."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle(np.ascontiguousarray(x.data).view(ml_dtypes.bfloat16).astype(np.float32), tl.float32)


def as_tensor_cores_read(x):
    """A float32 handle as a dot in tf32 takes it: what the upper 19 bits say. Any other as it is."""
    if x.dtype.scalar != tl.float32:
        return x
    return interpreter.TensorHandle((np.ascontiguousarray(x.data).view(np.uint32) & 0xFFFFE000).view(np.float32), tl.float32)


def check_addresses(verb: str, ptrs, mask) -> None:
    at = ptrs.data[np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)]  # some masks come as int32
    owner = np.searchsorted(Builder.memory[:, 0], at, side="right") - 1
    outside = (owner < 0) | (at >= Builder.memory[owner, 1])
    if outside.any():
        raise IndexError(f"{verb} outside of every operand: {outside.sum()} of {at.size} addresses")


def call_device_function(self, *args, **kwargs):
    return rewritten(self.fn)(*args, **kwargs)


@cache
def rewritten(fn):
    return interpreter.InterpretedFunction(fn).rewrite()


@contextlib.contextmanager
def interpreting():
    """The interpreter's world for one launch: what must be replaced before, restored after."""
    language = SimpleNamespace(__globals__=dict(tl=tl, core=tl.core))  # the namespaces of kernels and of tl.sum, tl.zeros, ...
    methods = {name: method for name, method in vars(Builder).items() if callable(method)}
    changes = [(interpreter.InterpreterBuilder, methods)]
    changes += [(interpreter.ReduceOps, dict(sum=tree_sum))]
    changes += [(interpreter.interpreter_builder, dict(options=interpreter.InterpreterOptions(sanitize_overflow=False)))]
    changes += [(owner, dict(__call__=call_device_function)) for owner in (JITFunction, interpreter.InterpretedFunction)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(warnings.catch_warnings(category=RuntimeWarning, action="ignore"))  # nanmax of nothing but NaN
        for owner, replacements in changes:
            for name, replacement in replacements.items():
                stack.enter_context(patch.object(owner, name, replacement, create=True))
        stack.callback(interpreter._patch_lang(language).restore)
        yield


def address(x) -> int:
    return x.data_ptr() if hasattr(x, "data_ptr") else x.ctypes.data


def extent(x) -> tuple[int, int]:
    """First byte and the byte after the last one of a strided array."""
    size = x.element_size() if hasattr(x, "element_size") else x.itemsize
    strides = [s * size for s in x.stride()] if hasattr(x, "stride") else x.strides
    return address(x), address(x) + size + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))


def merged(extents) -> np.ndarray:
    """Sorted disjoint [start, stop) rows that cover the same addresses."""
    rows = []
    for start, stop in sorted(extents):
        if rows and start <= rows[-1][1]:
            rows[-1][1] = max(rows[-1][1], stop)
        else:
            rows.append([start, stop])
    return np.array(rows, np.uint64).reshape(-1, 2)


def pointer(x) -> tl.tensor:
    kind = tl.pointer_type(POINTEES[spec(x).dtype.removeprefix("torch.")])
    return tl.tensor(interpreter.TensorHandle(np.array([address(x)], np.uint64), kind), kind)


def twin(kernel: JITFunction):
    """The interpreted copy's kernel of the same module and name."""
    copy, name = load(home), kernel.fn.__name__
    module = copy[kernel.fn.__module__]
    if hasattr(module, name):
        return getattr(module, name)
    body, streams = re.fullmatch(r"(\w+)_(\d+)_kernel", name).groups()
    with interpreting_decorators():
        return copy["mmattn.streams"].over_streams(getattr(module, f"{body}_body"), int(streams))


def launch(plan: Plan, operands, outs) -> None:
    """Run every program of a plan, one after the other."""
    arrays = (*operands, *outs)
    with LOCK, interpreting():
        kernel = twin(plan.kernel)
        fn = kernel.rewrite()
        Builder.memory = merged(extent(x) for x in arrays if 0 not in x.shape)
        scalars = [tl.tensor(interpreter.TensorHandle(np.array([n], np.int32), tl.int32), tl.int32) for n in plan.ints.values()]
        names = kernel.arg_names[len(arrays) :][: len(scalars)]
        assert names == list(plan.ints), f"{plan.kernel.fn.__name__} takes {names}, its plan gives {list(plan.ints)}"
        builder = interpreter.interpreter_builder
        grid = (*plan.grid, 1, 1)[:3]
        builder.set_grid_dim(*grid)
        for program in np.ndindex(grid):
            builder.set_grid_idx(*program)
            fn(*map(pointer, arrays), *scalars, **plan.meta)


def poisoned(shape, dtype) -> np.ndarray:
    """An output that no kernel has written: NaN, and no integer that anybody would take for one that was."""
    return np.full(shape, np.iinfo(dtype).max if np.dtype(dtype).kind == "i" else np.nan, dtype)


def at_address(address: int, like):
    """The tensor at an address that looks like another one."""
    import torch

    if 0 in like.shape:
        return torch.empty_like(like)
    reach = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_byte * (reach * like.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


def torch_launch(plan: Plan, operands, outs):
    """Stands in for mmattn_torch._bind.launch; what it returns launches again, at addresses alone."""
    operands = [x.detach() for x in operands]
    launch(plan, operands, outs)

    def again(addresses: list[int]) -> None:
        arrays = [at_address(address, x) for address, x in zip(addresses, (*operands, *outs), strict=True)]
        launch(plan, arrays[: len(operands)], arrays[len(operands) :])

    return again


def jax_launch(plan: Plan, operands) -> tuple:
    """Stands in for mmattn_jax._bind.host_launch: the launch as a callback, NumPy only inside."""
    import jax

    dtype = lambda name: np.dtype(getattr(ml_dtypes, name, name))
    results = tuple(jax.ShapeDtypeStruct(out.shape, dtype(out.dtype)) for out in plan.outs)

    def callback(*arrays):
        outs = tuple(
            np.array(arrays[plan.aliases[i]]) if i in plan.aliases else poisoned(r.shape, r.dtype) for i, r in enumerate(results)
        )
        launch(plan, [np.ascontiguousarray(x) for x in arrays], outs)
        return outs

    return tuple(jax.pure_callback(callback, results, *operands, vmap_method="sequential"))
