"""Lengths may be new for ever: what is remembered of them is bounded, and forgetting changes no result."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import tracemalloc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from frameworks import INSTALLED

import mmattn
from mmattn.op import Target, flatten, remembered

PACKAGES = ["mmattn", *(f"mmattn_{name}" for name in INSTALLED)]
UNBOUNDED = {  # caches with one entry for each device, op, kernel or table of a model, not for each length
    "mmattn.streams.over_streams",
    "mmattn.tuned.table",
    "mmattn_torch._bind.target",
    "mmattn_torch._bind.spare",
    "mmattn_torch.nn._keep",
    "mmattn_jax._bind.primitives",
    "mmattn_jax._jax_triton.module",
    "mmattn_jax._jax_triton.static_variant",
}
needs_torch = pytest.mark.skipif("torch" not in INSTALLED, reason="needs torch")
needs_jax = pytest.mark.skipif("jax" not in INSTALLED, reason="needs jax")

MOST = 50e6  # bytes, whatever lengths come
CALLS = dict(  # name of the public function -> (shapes of its array arguments at length L, how to call it with them)
    layernorm_adaln=lambda L: ([(1, L, 32), (1, 32), (1, 32)], {}),
    rms_norm=lambda L: ([(1, L, 32), (32,)], {}),
    gated_residual=lambda L: ([(1, L, 32), (1, L, 32), (1, 32)], {}),
    gated_residual_norm_adaln=lambda L: ([(1, L, 32), (1, L, 32), (1, 32), (1, 32), (1, 32)], {}),
    qk_norm_rope=lambda L: ([(1, L, 3, 2, 16), (32,), (32,)], dict(over="width")),
    joint_attention=lambda L: ([(1, L, 2, 16)] * 3, dict(return_lse=True)),
    qk_norm_rope_attention=lambda L: ([(1, L, 3, 2, 16), (32,), (32,)], dict(over="width")),
    relu_linear_attention=lambda L: ([(1, L, 2, 16)] * 3, {}),
)


def caches():
    """(name, cache) of every function of the packages that remembers its results."""
    for package in map(importlib.import_module, PACKAGES):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            for name, x in vars(module).items():
                if hasattr(x, "cache_info") and x.__module__ in (module.__name__, None):
                    yield f"{module.__name__}.{name}", x


def forget():
    for name, cache in caches():
        if name not in UNBOUNDED:
            cache.cache_clear()


def test_every_cache_is_bounded():
    sizes = {name: x.cache_info().maxsize for name, x in caches()}
    assert {name for name, size in sizes.items() if size is None} == {x for x in UNBOUNDED if x.split(".")[0] in PACKAGES}
    assert len(sizes) > 20


def test_all_ops_are_called_here():
    calls = [getattr(mmattn, name)(*(np.empty(x, "f4") for x in shapes(4)[0]), **shapes(4)[1]) for name, shapes in CALLS.items()]
    assert {call.op.name for call in calls} == {op.name for op in mmattn.OPS}


@pytest.fixture
def grown():
    """grown(call, lengths): the bytes for each length that call(length) leaves behind."""

    def measure(call, lengths) -> float:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for length in lengths:
            call(length)
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) / len(lengths)

    forget()  # what was made before is not counted, nor is it when it goes
    tracemalloc.start()
    yield measure
    tracemalloc.stop()


MANY = remembered(len).cache_info().maxsize
LENGTHS = range(1000, 100_000, 64)  # numbers of blocks are new too; and numbers up to 256 take no memory in CPython
WARM, NEW, LAST = LENGTHS[: 2 * MANY], LENGTHS[2 * MANY :][:50], LENGTHS[2 * MANY :][50:80]


@pytest.fixture
def torch_call(monkeypatch):
    """torch_call(name)(length): the public function and its gradients, but for the launches."""
    import torch
    from torch.utils._pytree import tree_leaves

    import mmattn_torch
    from mmattn_torch import _bind

    def launch(plan, arrays, outs):
        constants, grid, names = (*plan.ints.values(), *plan.meta.values()), (*plan.grid, 1, 1)[:3], plan.kernel.arg_names
        return lambda addresses: (constants, grid, names)

    monkeypatch.setattr(_bind, "launch", launch)
    monkeypatch.setattr(_bind, "problem", lambda device: None)
    monkeypatch.setattr(_bind, "target", lambda device: Target())

    def calling(name: str):
        def call(length: int):
            shapes, how = CALLS[name](length)
            outs = getattr(mmattn_torch, name)(*(torch.empty(shape, requires_grad=True) for shape in shapes), **how)
            flat = tree_leaves(outs)
            torch.autograd.backward(flat, [torch.empty_like(x) for x in flat])

        return call

    yield calling
    _bind.forget()


@needs_torch
@pytest.mark.parametrize("name", CALLS)
def test_new_lengths_in_torch(name, torch_call, grown, monkeypatch):
    from mmattn_torch import _bind

    def remember(calls: int):
        for memory in ("_prepared", "_programs"):
            monkeypatch.setattr(_bind, memory, _bind.Latest(calls))

    call = torch_call(name)
    remember(10)
    for length in WARM:
        call(length)
    new = grown(call, NEW)
    remember(_bind.REMEMBERED)
    each = grown(call, LAST)
    assert new < 0.2 * each  # what the allocator itself does in a short time
    assert 2000 < each < MOST / (2 * _bind.REMEMBERED)


@needs_jax
@pytest.mark.parametrize("name", CALLS)
def test_new_lengths_in_jax(name, grown):
    """What the lowering of a call and of its gradients does, but for JAX's own part and the compilers'."""
    import jax
    import jax.numpy as jnp

    from mmattn_jax import _bind, ops

    made = lambda shape, dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    run = _bind.Run(Target(), lambda plan, arrays: tuple(made(*x) for x in plan.outs))

    def call(length: int):
        shapes, how = CALLS[name](length)
        checked = ops.checked(name, [made(shape, "float32") for shape in shapes], how, ops.SHAPED)
        arrays, layout = flatten(checked.op, checked.operands)
        specs, extras = checked.op.infer(SimpleNamespace(**checked.operands), **dict(checked.static))
        form = _bind.Form(name, layout, checked.static, len(specs), len(extras))
        results = _bind.Forward(checked.op).kernels(run, arrays, form)
        outs, extras = results[: form.outs], results[form.outs :]
        residuals = [*(arrays[i] for i in _bind.kept(checked.op, form)), *(outs if checked.op.keeps_outs else ()), *extras]
        assert _bind.Backward(checked.op).kernels(run, [*residuals, *outs], form)

    for length in WARM:
        call(length)
    new = grown(call, NEW)
    forget()
    assert new < 0.2 * grown(call, LAST)


@needs_torch
def test_latest():
    from mmattn_torch._bind import Latest

    latest = Latest(3)
    assert latest[0] is None
    for key in range(1, 100):
        latest.remember(key, str(key))
        assert latest[1] == "1" and latest[key] == str(key)  # what is looked up stays
        assert len(latest) <= 3 >= len(latest.old)
    assert latest[2] is None and latest[99] == "99"
    latest.forget()
    assert latest[99] is None


@needs_torch
def test_forgotten_calls_are_made_anew(kernels, monkeypatch):
    """With room for two calls, many lengths in turn; backwards run after their calls have been forgotten."""
    import torch

    import mmattn_torch
    from mmattn_torch import _bind

    for memory in ("_prepared", "_programs"):
        monkeypatch.setattr(_bind, memory, _bind.Latest(1))
    for cache in (_bind.meaning, _bind.call_text, _bind.dense):
        cache.cache_clear()
    generator = torch.Generator().manual_seed(0)

    def arguments(L):
        return [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((2, L, 16), (2, 16), (2, 16))]

    calls = [(f, arguments(L)) for L in (1, 7, 64, 7, 100) for f in (mmattn_torch.layernorm_adaln, mmattn_torch.rmsnorm_adaln)]
    for _ in range(2):
        outs = [f(*a) for f, a in calls]
        for i, ((f, a), y) in enumerate(zip(calls, outs, strict=True)):
            if i % 3 == 0:
                _bind.meaning.cache_clear()
            dy = torch.randn(y.shape, generator=generator)
            want = f(*a, implementation="reference")
            torch.testing.assert_close(y, want)
            grads = torch.autograd.grad(y, a, dy)
            torch.testing.assert_close(grads, torch.autograd.grad(want, a, dy), rtol=1e-4, atol=1e-4)


@needs_torch
@pytest.mark.parametrize("name", CALLS)
def test_what_is_remembered_holds_no_tensor(name, torch_call, monkeypatch):
    import torch

    made = []
    empty = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **how: made.append(empty(*a, **how)) or made[-1])
        torch_call(name)(24)
    alive = [weakref.ref(x) for x in made]
    assert len(alive) >= len(CALLS[name](24)[0])
    made.clear()
    gc.collect()
    from mmattn_torch import _bind

    spare = [id(_bind.spare(torch.device("cpu")))]
    assert [x().shape for x in alive if x() is not None and id(x()) not in spare] == []
