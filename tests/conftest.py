"""One process for both frameworks: kernels on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
from contextlib import contextmanager

import numpy as np
import pytest
from frameworks import GPU, INSTALLED, framework_of

from mmattn.op import Target

TORCH, JAX = ("torch" in INSTALLED, "jax" in INSTALLED)
SMALL_GPU = Target(sms=1)  # so that a program walks several blocks of tokens in small cases too

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch works on the same GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if not GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
if TORCH:
    import torch

    torch.set_num_threads(1)
if JAX:
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # a callback with a large operand hangs otherwise
    jax.config.update("jax_disable_most_optimizations", not GPU)  # LLVM's take longer than they save


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """On a GPU whatever launches kernels is a GPU test; without one, what needs a GPU is skipped."""
    for item in items:
        if GPU and "kernels" in item.fixturenames:
            item.add_marker(pytest.mark.gpu)
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(params=["torch", "jax"])
def framework(request):
    """Each framework in turn."""
    if request.param not in INSTALLED:
        pytest.skip(f"{request.param} is not installed")
    return framework_of(request.param)


@contextmanager
def running_kernels():
    """implementation="triton" runs the kernels in both frameworks, on outputs that start as NaN."""
    with pytest.MonkeyPatch.context() as patch:
        if TORCH:
            from mmattn_torch import _bind

            empty = _bind.empty
            patch.setattr(_bind, "empty", lambda spec, device: poison(empty(spec, device)))
            _bind.forget()
        if not GPU:
            interpret(patch)
        try:
            yield
        finally:
            if TORCH:
                _bind.forget()


def interpret(patch: pytest.MonkeyPatch) -> None:
    """Put Triton's interpreter in the place of a GPU."""
    import interpreted

    if TORCH:
        from mmattn_torch import _bind

        patch.setattr(_bind, "launch", interpreted.torch_launch)
        patch.setattr(_bind, "problem", lambda device: None)
        patch.setattr(_bind, "target", lambda device: SMALL_GPU)
    if JAX:
        from mmattn_jax import _bind as jax_bind

        patch.setattr(jax_bind, "host_launch", interpreted.jax_launch)
        patch.setattr(jax_bind, "target", lambda: SMALL_GPU)


@pytest.fixture
def kernels():
    """Kernels on the GPU where there is one, else in the interpreter."""
    with running_kernels():
        yield


def poison(x):
    if x.is_floating_point():
        return x.fill_(np.nan)
    return x.fill_(2**31 - 1) if x.dtype.itemsize == 4 else x
