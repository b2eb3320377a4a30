"""The one guarded import of Gluon, Triton's language of layouts, barriers and warp roles, with what Hopper adds to it.

It is no stable interface: compiled with Triton 3.6, 3.7 and 3.9. Where a name is missing there is no Gluon kernel.
"""

try:
    from triton._C.libtriton.ir import DESCRIPTOR_REDUCE_KIND
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.language.nvidia.hopper.tma import make_tensor_descriptor

    async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the latter until 3.8
    async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    store_wait = tma.store_wait
    copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # the latter until 3.8
    commit_copies = async_copy.commit_group
    await_copies = async_copy.wait_group

    @gl._core.builtin
    def async_add(view, coord, smem, _semantic=None):
        """Start to add shared memory to a tile of a tensor descriptor: tma.async_atomic_add, which Triton has from 3.8 on."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(DESCRIPTOR_REDUCE_KIND.ADD, view.handle, coord, smem.handle)

except (ImportError, AttributeError):
    from ._triton import tl as gl
    from ._triton import triton as gluon

    GluonASTSource = GluonJITFunction = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = None
    await_copies = commit_copies = copy_async = None
    async_add = async_load = async_store = fence_async_shared = make_tensor_descriptor = store_wait = None

INSTALLED = tma is not None


def is_gluon(kernel) -> bool:
    """Whether a kernel is written in Gluon."""
    return INSTALLED and isinstance(kernel, GluonJITFunction)


__all__ = [
    "INSTALLED",
    "GluonASTSource",
    "async_add",
    "async_load",
    "async_store",
    "await_copies",
    "commit_copies",
    "copy_async",
    "fence_async_shared",
    "gl",
    "gluon",
    "is_gluon",
    "make_tensor_descriptor",
    "mbarrier",
    "store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
