"""One way to call jax-triton 0.3.1 and 0.4.x, and XLA for what it cannot compile: `call(plan, arrays, arch)` traces one launch.

jax_triton is imported when the first kernel is lowered for a GPU: elsewhere neither it nor the CUDA plugin is needed.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import zlib
from functools import cache, lru_cache
from types import FunctionType, ModuleType

import jax
import jax.numpy as jnp

from mmattn._gluon import GluonASTSource, is_gluon
from mmattn.op import Plan

CUSTOM_CALLS = ("triton_kernel_call", "triton_kernel_call_ffi")  # of 0.3 and of 0.4
EXPORT_CHECKS = tuple(map(jax.export.DisabledSafetyCheck.custom_call, CUSTOM_CALLS))
"""Pass as `disabled_checks` to `jax.export.export` to export a function with kernels for CUDA."""


def installed() -> bool:
    return importlib.util.find_spec("jax_triton") is not None


@cache  # one
def module() -> ModuleType:
    """jax_triton, without what its import leaves behind."""
    # 0.3.1 sets TRITON_CACHE_DIR to "", after which torch's launches in this process fail; 0.4 deletes the user's directory.
    directory = os.environ.get("TRITON_CACHE_DIR")
    try:
        import jax_triton
        from jax_triton import triton_lib
    finally:
        os.environ.pop("TRITON_CACHE_DIR", None)
        if directory is not None:
            os.environ["TRITON_CACHE_DIR"] = directory
    if hasattr(triton_lib, "cb"):
        # 0.4 needs a name that triton 3.6 lacks, for TMA alone, and without it replaces the whole CUDA backend by a stub.
        import triton.backends.nvidia.compiler as cuda

        triton_lib.cb = cuda
    return jax_triton


@cache  # one for each kernel
def static_variant(kernel):
    """The kernel with all but its pointers constexpr.

    JAX's sizes are static, and jax-triton never tells Triton that an integer is divisible by 16, so a runtime integer in
    an address would cost the vectorised loads.
    """
    import triton
    import triton.language as tl

    fn = kernel.fn
    variant = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    variant.__annotations__ = {name: tl.constexpr for name in kernel.arg_names if not name.endswith("_ptr")}
    variant.__module__, variant.__qualname__ = fn.__module__, fn.__qualname__
    return triton.jit(variant)


POINTERS = dict(bool="*i1", bfloat16="*bf16", float32="*fp32", int32="*i32")


@lru_cache(maxsize=64)  # lengths are constants, each of which is a kernel of its own, with its code
def compiled(kernel, constants: tuple, dtypes: tuple[str, ...], arch: int, **options) -> tuple:
    """What XLA launches of a kernel, its name, and the bytes of scratch memory that each program wants."""
    import triton
    from jax._src.lib import gpu_triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, constants = kernel.arg_names, dict(constants)
    signature = {name: "constexpr" if name in constants else POINTERS[dtypes[i]] for i, name in enumerate(names)}
    values = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(dtypes))}
    source = (GluonASTSource if is_gluon(kernel) else ASTSource)(kernel, signature, values, aligned)
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(enable_fp_fusion=False, **options))
    about = result.metadata
    launched = gpu_triton.TritonKernel(about.name, about.num_warps, 1, about.shared, result.asm["ptx"], "", arch)
    return launched, about.name, about.global_scratch_size


def call_directly(plan: Plan, arrays, outs, arch: int) -> tuple[jax.Array, ...]:
    """The call to XLA that jax-triton lowers to, for what it does not do: Gluon, and aliases in the same way in 0.3 and 0.4.

    Scratch memory is one more result.
    """
    from jax._src.lib import gpu_triton

    dtypes = tuple(str(x.dtype) for x in (*arrays, *outs))
    constants = (*plan.ints.items(), *plan.meta.items())
    kernel, name, scratch = compiled(plan.kernel, constants, dtypes, arch, num_warps=plan.warps, num_stages=plan.stages)
    if scratch:
        outs = (*outs, jax.ShapeDtypeStruct((math.prod(plan.grid) * scratch,), jnp.int8))
    parameters = [gpu_triton.create_array_parameter(0, 16)] * (len(arrays) + len(outs))
    launch = gpu_triton.TritonKernelCall(kernel, *(*plan.grid, 1, 1)[:3], parameters)
    aliases = {i: out for out, i in plan.aliases.items()}
    results = jax.ffi.ffi_call(CUSTOM_CALLS[1], outs, input_output_aliases=aliases)(
        *arrays, opaque=zlib.compress(launch.to_proto(name, b""))
    )
    return tuple(results[: len(plan.outs)])


def call(plan: Plan, arrays, arch: int) -> tuple[jax.Array, ...]:
    outs = tuple(jax.ShapeDtypeStruct(out.shape, jnp.dtype(out.dtype)) for out in plan.outs)
    if is_gluon(plan.kernel) or plan.aliases:
        return call_directly(plan, arrays, outs, arch)
    triton_call = module().triton_call
    if "out_type" in inspect.signature(triton_call).parameters:
        version = dict(out_type=outs, backend_options=dict(enable_fp_fusion=False))
    else:
        version = dict(out_shape=outs, enable_fp_fusion=False)
    return triton_call(
        *arrays,
        kernel=static_variant(plan.kernel),
        grid=plan.grid,
        num_warps=plan.warps,
        num_stages=plan.stages,
        compute_capability=arch,
        **version,
        **plan.ints,
        **plan.meta,
    )
