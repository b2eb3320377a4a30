"""The one guarded import of Gluon, Triton's language of layouts, barriers and warp roles, with what Hopper adds to it.

It is no stable interface: compiled with Triton 3.6, 3.7 and 3.9. Where a name is missing there is no Gluon kernel.
"""

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
    from triton.experimental.gluon.language.nvidia.hopper.tma import make_tensor_descriptor

    async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the latter until 3.8
except (ImportError, AttributeError):
    from ._triton import tl as gl
    from ._triton import triton as gluon

    GluonASTSource = GluonJITFunction = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = None
    async_load = make_tensor_descriptor = None

INSTALLED = tma is not None


def is_gluon(kernel) -> bool:
    """Whether a kernel is written in Gluon."""
    return INSTALLED and isinstance(kernel, GluonJITFunction)


__all__ = [
    "INSTALLED",
    "GluonASTSource",
    "async_load",
    "gl",
    "gluon",
    "is_gluon",
    "make_tensor_descriptor",
    "mbarrier",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
