"""The one guarded import of Triton, which has no wheels for macOS and Windows.

Without it the kernels are never decorated; the reference path needs none of them.
"""

try:
    import triton
    import triton.language as tl
except ImportError:
    from types import SimpleNamespace

    as_is = lambda function: function
    triton = SimpleNamespace(jit=lambda kernel=None, **_: kernel or as_is, constexpr_function=as_is, __version__=None)
    tl = SimpleNamespace(constexpr=lambda value=None: value)

INSTALLED = triton.__version__ is not None
INTERPRETED = tl.constexpr(INSTALLED and triton.knobs.runtime.interpret)
"""Whether kernels decorated from now on are interpreted, which cannot execute instructions of the GPU."""

__all__ = ["INSTALLED", "INTERPRETED", "tl", "triton"]
