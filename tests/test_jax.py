"""What JAX does to our operations: transforms, lowering for a GPU that is not here, export, sharding, and the choice of path."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from functools import partial

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mmattn
import mmattn_jax
from mmattn import Row
from mmattn_jax import _bind, _jax_triton, ops

B, L, C, D, HEADS = 8, 6, 3, 16, 2
REFERENCE = dict(implementation="reference")
CPU = jax.devices("cpu")
needs_jax_triton = pytest.mark.skipif(not _jax_triton.installed(), reason="jax-triton is not installed")


@pytest.fixture(autouse=True)
def device(request):
    """Tests that launch no kernels run on the CPU, on a GPU machine too."""
    with jax.default_device(None if "kernels" in request.fixturenames else CPU[0]):
        yield


def randn(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), jnp.float32)


def packed(n: int, seed: int = 0) -> jax.Array:
    return randn(B, n, 3, HEADS, D // HEADS, seed=seed)


def heads(n: int, seed: int = 0) -> jax.Array:
    return randn(B, n, HEADS, D // HEADS, seed=seed)


KEYS = np.arange(L)[None] < np.array([L, 2, 0, 1, 3, L, L, 4])[:, None]
TABLE = {
    name: f(np.arange(9)[:, None] * 0.3 ** np.arange(D // HEADS // 2)).astype("f4")
    for name, f in dict(cos=np.cos, sin=np.sin).items()
}


def adaln(x, scale, shift, **how):
    return mmattn_jax.layernorm_adaln(x, scale, shift, **how)


def norm(x, weight, bias, **how):
    return mmattn_jax.layer_norm(x, weight, bias, **how)


def residual(x, h, gate, **how):
    return mmattn_jax.gated_residual(x, h, gate, **how)


def gated_norm(x, h, gate, scale, shift, weight, **how):
    return mmattn_jax.gated_residual_norm_adaln(x, h, gate, scale, shift, h_weight=weight, **how)


def mixed(x, h, gate, scale, shift, weight, **how):
    """A float32 residual stream, and what layers of other dtypes make for it."""
    return gated_norm(x, h, gate, scale, shift, weight, **how)


def table(x, scale, shift, base, **how):
    rows = np.arange(len(x) * x.shape[1], dtype="i4").reshape(x.shape[:2]) % 3
    return mmattn_jax.rmsnorm_adaln(x, scale, shift, rows=rows, scale_base=base, weight=base, **how)


def rotated(qkv, q_weight, k_weight, **how):
    return mmattn_jax.qk_norm_rope(qkv, q_weight, k_weight, over="width", **TABLE, start_pos=np.arange(len(qkv)) % 4, **how)


def attention(q, k, v, context, **how):
    streams = ((q, context), (k, context), (v, context))
    return mmattn_jax.joint_attention(*streams, key_masks=(KEYS[: len(q)], None), causal=True, return_lse=True, **how)


def fused(qkv, context, weights, **how):
    weights = (tuple(weights[:2]), tuple(weights[2:]))
    return mmattn_jax.qk_norm_rope_attention((qkv, context), *weights, over="width", **how)


def linear(q, k, v, context, **how):
    return mmattn_jax.relu_linear_attention((q, context), (k, context), (v, context), key_masks=(KEYS[: len(q)], None), **how)


EXAMPLES = {
    adaln: (randn(B, L, D), randn(B, D), randn(B, 1, D)),
    norm: (randn(B, L, D), randn(D), randn(D, seed=1)),
    residual: (randn(B, L, D), randn(B, L, D, seed=1), randn(B, D)),
    gated_norm: (randn(B, L, D), randn(B, L, D, seed=1), *(randn(B, D, seed=i) for i in range(3)), randn(D)),
    mixed: (
        randn(B, L, D),
        *(randn(*n, seed=1).astype(jnp.bfloat16) for n in ((B, L, D), *[(B, D)] * 3)),
        randn(D).astype(jnp.float16),
    ),
    table: (randn(B, L, D), randn(3, D), randn(3, D, seed=1), randn(D)),
    rotated: (packed(L), randn(D), randn(D, seed=1)),
    attention: (heads(L), heads(L, 1), heads(L, 2), heads(C)),
    fused: (packed(L), packed(C), randn(4, D)),
    linear: (heads(L), heads(L, 1), heads(L, 2), heads(C)),
}
label = lambda x: getattr(x, "__name__", str(x))
each_example = pytest.mark.parametrize("f", EXAMPLES, ids=label)


def loss(f, **how):
    """A scalar of all outputs, with a different cotangent for every element, that an lse of -inf leaves finite."""

    def total(*arrays):
        outs = jax.tree.leaves(f(*arrays, **how))
        return sum(
            jnp.sum(jnp.where(y > -jnp.inf, y, 0) * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)) for y in outs
        )

    return total


def grads(f, **how):
    """All gradients of loss(f), compiled: op by op they would take longer than all the rest."""
    return jax.jit(lambda *arrays: jax.grad(loss(f, **how), tuple(range(len(arrays))))(*arrays))


def reference(f):
    return jax.jit(partial(f, **REFERENCE))


def same(got, want, tolerance=2e-5):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        least = max(tolerance, 2 * float(jnp.finfo(a.dtype).eps))
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        size = np.abs(b, where=np.isfinite(b), out=np.zeros_like(b)).max(initial=1)
        np.testing.assert_allclose(a, b, rtol=least, atol=least * size)


def binds(function, *arrays) -> Counter:
    """How often each of our primitives occurs in the function's jaxpr."""

    def count(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for inner in jaxprs_in_params(eqn.params):
                yield from count(inner)

    names = count(jax.make_jaxpr(function)(*arrays).jaxpr)
    return Counter(name for name in names if name.startswith("mmattn_"))


def test_examples_cover_every_op():
    names = {name for f, arrays in EXAMPLES.items() for name in binds(f, *arrays)}
    assert names == {f"mmattn_{op.name}_fwd" for op in mmattn.OPS}


# Values, gradients and transforms


@each_example
def test_value_and_gradient_under_jit(f):
    arrays = EXAMPLES[f]
    same(jax.jit(f)(*arrays), reference(f)(*arrays))
    same(grads(f)(*arrays), grads(f, **REFERENCE)(*arrays))
    name = next(iter(binds(f, *arrays))).removesuffix("_fwd")
    assert binds(grads(f), *arrays) == {f"{name}_fwd": 1, f"{name}_bwd": 1}


@each_example
def test_vmap_is_one_launch(f):
    arrays = [jnp.stack([x, 2 * x, x - 1]) for x in EXAMPLES[f]]
    same(jax.vmap(jax.jit(f))(*arrays), jax.vmap(reference(f))(*arrays))
    same(jax.vmap(grads(f))(*arrays), jax.vmap(grads(f, **REFERENCE))(*arrays))
    assert set(binds(jax.vmap(grads(f)), *arrays).values()) == {1}


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (2, 1, None), (None, None, 0)])
@pytest.mark.parametrize("f", [norm, rotated, adaln], ids=label)
def test_vmap_keeps_gradients_of_shared_vectors_apart(f, axes, kernels):
    arrays = [x[:2] if x.ndim > 1 else x for x in EXAMPLES[f]]
    arrays = [x if axis is None else jnp.stack([x, 2 * x, x - 1], axis) for x, axis in zip(arrays, axes, strict=True)]
    got = jax.vmap(grads(f, implementation="triton"), axes)(*arrays)
    same(got, jax.vmap(grads(f, **REFERENCE), axes)(*arrays))


@pytest.mark.parametrize("f", [norm, residual], ids=label)
def test_nested_vmap(f, kernels):
    arrays = [x[:2] for x in EXAMPLES[f]] if f is residual else [EXAMPLES[f][0][:2], *EXAMPLES[f][1:]]
    arrays = [jnp.stack([x, x + 1, -x]) for x in arrays]
    arrays[0] = jnp.stack([arrays[0], 3 * arrays[0]])
    nested = lambda g: jax.vmap(jax.vmap(g), (0, *[None] * (len(arrays) - 1)))
    g = nested(grads(f, implementation="triton"))
    same(g(*arrays), nested(grads(f, **REFERENCE))(*arrays))
    assert set(binds(g, *arrays).values()) == {1}
    outs = lambda **how: nested(partial(f, **how))(*arrays)
    same(outs(implementation="triton"), outs(**REFERENCE))


@pytest.mark.parametrize("implementation", ["triton", "auto", "reference"])
@each_example
def test_vmap_over_no_example(f, implementation, request):
    """All arrays mapped, or the first alone; one vmap, or another one within or around it."""
    if implementation == "triton":
        request.getfixturevalue("kernels")
    arrays = [x[:1] if x.shape[0] == B else x for x in EXAMPLES[f]]
    g, gradients = partial(f, implementation=implementation), grads(f, implementation=implementation)
    every, alone = (0,) * len(arrays), (0, *[None] * (len(arrays) - 1))
    for h, axes, shape in ((g, alone, (0,)), (gradients, every, (0,)), (gradients, every, (0, 2)), (gradients, alone, (2, 0))):
        none = [x if axis is None else jnp.zeros(shape + x.shape, x.dtype) for x, axis in zip(arrays, axes, strict=True)]
        mapped = jax.vmap(h, axes) if len(shape) == 1 else jax.vmap(jax.vmap(h, axes), axes)
        got, want = jax.tree.leaves(mapped(*none)), jax.tree.leaves(jax.eval_shape(h, *arrays))
        assert [(x.shape, x.dtype) for x in got] == [(shape + x.shape, x.dtype) for x in want]


def test_jacrev_and_gradient_of_vmap():
    x, weight, bias = EXAMPLES[norm]
    x = x[:1, :2]
    same(jax.jit(jax.jacrev(norm, 1))(x, weight, bias), jax.jit(jax.jacrev(reference(norm), 1))(x, weight, bias))
    total = lambda **how: lambda x, weight, bias: jax.vmap(loss(norm, **how), (0, None, None))(x, weight, bias).sum()
    xs = jnp.stack([x, x * 2])
    gradient = lambda **how: jax.jit(jax.grad(total(**how), (0, 1, 2)))(xs, weight, bias)
    same(gradient(), gradient(**REFERENCE))


def test_scan_over_layers():
    x, scale, shift = EXAMPLES[adaln]
    scales = jnp.stack([scale, -scale, 2 * scale])

    def run(x, scales, **how):
        return jax.lax.scan(lambda x, scale: (x + adaln(x, scale, shift, **how), None), x, scales)[0]

    same(grads(run)(x, scales), grads(run, **REFERENCE)(x, scales))
    assert binds(grads(run), x, scales) == dict(mmattn_adaln_fwd=1, mmattn_adaln_bwd=1)


@pytest.mark.parametrize(
    "policy, forwards",
    [(jax.checkpoint_policies.nothing_saveable, 2), (jax.checkpoint_policies.save_only_these_names("mmattn_joint_attention"), 1)],
)
def test_remat_saves_named_residuals(policy, forwards):
    arrays = EXAMPLES[attention]
    block = jax.checkpoint(lambda *arrays: jax.tree.map(jnp.sin, attention(*arrays)), policy=policy)
    assert binds(grads(block), *arrays) == dict(mmattn_joint_attention_fwd=forwards, mmattn_joint_attention_bwd=1)
    same(grads(block)(*arrays), grads(lambda *arrays: jax.tree.map(jnp.sin, attention(*arrays, **REFERENCE)))(*arrays))


def test_checkpoint_names_are_those_of_the_ops():
    assert tuple(f"mmattn_{op.name}" for op in mmattn.OPS) == mmattn_jax.CHECKPOINT_NAMES


@pytest.mark.parametrize("row", [0, 2])
def test_row_of_a_packed_array(row, kernels):
    x, h, _ = EXAMPLES[residual]
    x, h, array = x[:2], h[:2], randn(2, 3, D)
    read = lambda x, h, array, **how: residual(x, h, Row(array, row), **how)
    copied = lambda x, h, array: reference(residual)(x, h, array[:, row])
    run = partial(read, implementation="triton")
    same(run(x, h, array), copied(x, h, array))
    got = grads(run)(x, h, array)
    same(got, grads(copied)(x, h, array))
    assert not np.delete(np.asarray(got[2]), row, 1).any()
    same(jax.vmap(grads(run))(x[None], h[None], array[None]), jax.tree.map(lambda g: g[None], got))


@pytest.mark.parametrize("array, row", [((2, 3, D), 3), ((2, 3, D), -1), ((2, D), 0), ((2, 3, D), np.int32(1))])
def test_row_that_is_none(array, row):
    with pytest.raises(ValueError, match=r"gated_residual: gate is row .*; expected \(B, M, D\) and an int from 0 to M - 1"):
        residual(randn(2, L, D), randn(2, L, D), Row(randn(*array), row))


def test_gradient_of_a_constant_is_refused():
    weight, cos, sin = randn(16), randn(9, 4), randn(9, 4)
    run = lambda cos, **how: mmattn_jax.qk_norm_rope(randn(2, 5, 3, 2, 8), weight, weight, over="width", cos=cos, sin=sin, **how)[
        0
    ].sum()
    with pytest.raises(NotImplementedError, match="qk_norm_rope: cos wants a gradient, for which there is no kernel"):
        jax.grad(run)(cos)
    assert np.abs(jax.grad(partial(run, implementation="reference"))(cos)).max() > 0


@each_example
def test_batch_of_none(f, kernels):
    arrays = [x[:0] if x.shape[0] == B else x for x in EXAMPLES[f]]
    how = dict(implementation="triton")
    assert [y.shape[0] for y in jax.tree.leaves(f(*arrays, **how))] == [0] * len(jax.tree.leaves(f(*arrays, **how)))
    for g, x in zip(grads(f, **how)(*arrays), arrays, strict=True):
        assert g.shape == x.shape and not g.any()


def masked(n: int, lengths: tuple[int, ...], *shape: int, dtype) -> tuple[jax.Array, np.ndarray]:
    """Tokens of samples of these lengths, NaN behind them, and their mask."""
    keep = np.arange(n)[None] < np.array(lengths)[:, None]
    x = randn(len(lengths), n, *shape).astype(dtype)
    return jnp.where(keep.reshape(*keep.shape, *(1,) * len(shape)), x, jnp.nan), keep


def joint_of(q, k, v, c, keys, mask, **how):
    masks = dict(key_masks=keys, attn_mask=mask, causal=mask is not None)
    return mmattn_jax.joint_attention((q, c), (k, c), (v, c), **masks, **how)


def whole_of(x, c, keys, mask, **how):
    weights = (np.ones(D, "f4"),) * 2
    return mmattn_jax.qk_norm_rope_attention((x, c), weights, weights, over="width", key_masks=keys, attn_mask=mask, **how)


def linear_of(q, k, v, c, keys, mask, **how):
    return mmattn_jax.relu_linear_attention((q, c), (k, c), (v, c), key_masks=keys, **how)


@pytest.mark.parametrize("debug", [jax.debug_infs, jax.debug_nans], ids=["infs", "nans"])
@pytest.mark.parametrize("implementation", ["triton", "auto", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("f, masks", [(joint_of, 1), (joint_of, 2), (whole_of, 1), (whole_of, 2), (linear_of, 1)], ids=label)
def test_masked_tokens_are_no_debug_errors(f, masks, dtype, implementation, debug, request):
    """A sample without any token, and rows that a mask leaves empty: finite wherever JAX looks, op by op and under transforms,
    whatever masked tokens hold."""
    if implementation == "triton":
        request.getfixturevalue("kernels")
    shape = (3, HEADS, D // HEADS) if f is whole_of else (HEADS, D // HEADS)
    x, keep = masked(L, (0, 4), *shape, dtype=dtype)
    c, keep_c = masked(C, (0, 2), *shape, dtype=dtype)
    mask = np.arange(L)[None, :, None] % 3 + np.zeros((2, 1, L)) > 0 if masks == 2 else None
    run = partial(f, keys=(keep, keep_c), mask=mask, implementation=implementation)
    arrays = (x, c) if f is whole_of else (x, x, x, c)
    examples = [jnp.stack([x, x]) for x in arrays]
    total = lambda *arrays: sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in run(*arrays))
    with debug(True):
        jax.block_until_ready((jax.grad(total, tuple(range(len(arrays))))(*arrays), jax.vmap(run)(*examples)))


def test_lse_of_an_empty_row_is_minus_infinity(kernels):
    q, keep = masked(L, (0, 4), HEADS, D // HEADS, dtype="float32")
    for how in (dict(implementation="triton"), REFERENCE):
        _, lse = mmattn_jax.joint_attention(q, q, q, key_masks=keep, return_lse=True, **how)
        assert np.array_equal(np.isneginf(lse), np.broadcast_to(~keep[:, None], lse.shape))
        with pytest.raises(FloatingPointError), jax.debug_infs(True):
            mmattn_jax.joint_attention(q, q, q, key_masks=keep, return_lse=True, **how)


# Derivatives that the kernels do not have


def jvp(f, x):
    return jax.jvp(f, (x,), (x,))


DERIVATIVES = dict(
    jvp=jvp,
    jit_of_jvp=lambda f, x: jax.jit(partial(jvp, f))(x),
    jacfwd=lambda f, x: jax.jacfwd(f)(x),
    hessian=lambda f, x: jax.hessian(f)(x),
    grad_of_grad=lambda f, x: jax.grad(lambda x: jax.grad(f)(x).sum())(x),
    grad_of_jvp=lambda f, x: jax.grad(lambda x: jvp(f, x)[1])(x),
)


def refuses(derivative, f):
    x, *rest = EXAMPLES[f]
    total = loss(f)
    if f is residual:  # the gradient of `residual` is passed on, without a kernel
        x, rest, total = rest[0], [x, rest[1]], lambda h, x, gate: loss(f)(x, h, gate)
    with pytest.raises(NotImplementedError, match='implementation="reference"'):
        derivative(lambda x: total(x, *rest), x)


@pytest.mark.parametrize("name", DERIVATIVES)
@each_example
def test_other_derivatives_name_the_remedy(f, name):
    """On every platform: it is refused when it is traced."""
    refuses(DERIVATIVES[name], f)


@each_example
def test_reference_has_other_derivatives(f):
    x, *rest = EXAMPLES[f]
    t = randn(*x.shape, seed=7)
    g = lambda x: loss(f, **REFERENCE)(x, *rest)
    _, along = jax.jit(lambda x: jax.jvp(g, (x,), (t,)))(x)
    np.testing.assert_allclose(along, jnp.vdot(jax.jit(jax.grad(g))(x), t), rtol=1e-4, atol=1e-3)
    second = jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(g)(x), t)))(x)
    assert jnp.isfinite(second).all() and (second.any() or f is residual)


# Lowering for CUDA, export


@needs_jax_triton
@each_example
def test_lowers_for_cuda_without_a_gpu(f, monkeypatch):
    launches = []
    launch = _bind.launch
    monkeypatch.setattr(_bind, "launch", lambda plan, arrays: launches.append(plan) or launch(plan, arrays))
    arrays = [jax.device_put(x.astype(jnp.bfloat16), CPU[0]) for x in EXAMPLES[f]]
    for function in (jax.jit(f), grads(f)):
        launches.clear()
        text = function.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        calls = sum(text.count(f"@{name}(") for name in _jax_triton.CUSTOM_CALLS)
        assert calls == len(launches) > 0
        assert "dot_general" not in text and "rsqrt" not in text


@needs_jax_triton
@each_example
def test_one_export_serves_cpu_and_cuda(f):
    arrays = EXAMPLES[f]
    exported = jax.export.export(grads(f), platforms=("cpu", "cuda"), disabled_checks=mmattn_jax.EXPORT_CHECKS)(*arrays)
    exported = jax.export.deserialize(exported.serialize())
    assert exported.platforms == ("cpu", "cuda") and b"triton_kernel_call" in exported.mlir_module_serialized
    same(exported.call(*arrays), grads(f, **REFERENCE)(*arrays))


def test_target():
    given = mmattn_jax.Target(arch=80, sms=108, shared=166912)
    default = _bind.target()
    mmattn_jax.set_target(given)
    try:
        assert _bind.target() == given
    finally:
        mmattn_jax.set_target(None)
    assert _bind.target() == default
    if jax.default_backend() == "cpu":
        assert (default.arch, default.sms) == (90, 132)


# Sharding over eight fake devices


@pytest.fixture
def partitioned(monkeypatch):
    """The CPU partitions our primitives as a GPU does."""
    jax.clear_caches()
    monkeypatch.setattr(_bind, "partition_host", True)
    yield
    jax.clear_caches()


def mesh(*axes: str, kind=AxisType.Auto):
    shape = dict(a=(8,), ab=(4, 2))["".join(axes)]
    return jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes), devices=CPU[:8])


def place(mesh, spec, *arrays):
    """Arrays with a batch axis sharded along it, vectors on all devices."""
    return [jax.device_put(x, NamedSharding(mesh, spec if x.shape[0] == B else P())) for x in arrays]


@pytest.mark.parametrize("f, spec", [*((f, P(("a", "b"))) for f in EXAMPLES), (norm, P("a", "b")), (fused, P("a"))], ids=label)
def test_jit_of_a_sharded_batch(f, spec, partitioned):
    arrays = EXAMPLES[f]
    compiled = grads(f).lower(*place(mesh("a", "b"), spec, *arrays)).compile()
    got = compiled(*place(mesh("a", "b"), spec, *arrays))
    same(got, grads(f, **REFERENCE)(*arrays))
    for g, x in zip(got, arrays, strict=True):
        assert g.sharding.is_equivalent_to(NamedSharding(mesh("a", "b"), P(spec[0]) if x.shape[0] == B else P()), x.ndim)
    shared = any(x.shape[0] != B for x in arrays)
    if spec == P(("a", "b")) and not shared:
        assert "all-" not in compiled.as_text()  # no gather, no reduction


def test_per_example_gradients_of_a_sharded_batch(partitioned):
    x, weight, bias = EXAMPLES[norm]
    for n in (3, 8):
        xs = jnp.stack([x + i for i in range(n)])
        want = jax.vmap(grads(norm, **REFERENCE), (0, None, None))(xs, weight, bias)
        for spec in (P(None, "a"), P("a") if n == 8 else P()):
            sharded = jax.device_put(xs, NamedSharding(mesh("a"), spec))
            same(jax.vmap(grads(norm), (0, None, None))(sharded, *place(mesh("a"), P(), weight, bias)), want)


@pytest.mark.parametrize(
    "f, names, check_vma",
    [*((f, "ab", True) for f in EXAMPLES), (norm, "ab", False), (norm, "a", True), (norm, "a", False), (fused, "a", True)],
    ids=label,
)
def test_shard_map_with_replicated_vectors(f, check_vma, names, partitioned):
    arrays = EXAMPLES[f]
    part = P(tuple(names))
    specs = tuple(part if x.shape[0] == B else P() for x in arrays)
    outs = jax.tree.map(lambda _: part, jax.eval_shape(f, *arrays))
    # The masks of the examples belong to the first samples; every device must see its own, so they are left out here.
    local = {attention: lambda q, k, v, c: mmattn_jax.joint_attention((q, c), (k, c), (v, c), return_lse=True)}
    local |= {linear: lambda q, k, v, c: mmattn_jax.relu_linear_attention((q, c), (k, c), (v, c))}
    local |= {rotated: lambda qkv, *weights: mmattn_jax.qk_norm_rope(qkv, *weights, over="width", **TABLE)}
    one = local.get(f, f)
    mapped = jax.shard_map(one, mesh=mesh("a", "b"), in_specs=specs, out_specs=outs, axis_names=set(names), check_vma=check_vma)
    with mmattn_jax.implementation("reference"):
        want = grads(one)(*arrays)
    same(grads(mapped)(*arrays), want)


def test_explicit_mesh(partitioned):
    with jax.set_mesh(mesh("a", kind=AxisType.Explicit)):
        for f in (adaln, norm):
            arrays = place(jax.sharding.get_mesh(), P("a"), *EXAMPLES[f])
            y = jax.jit(f)(*arrays)
            assert jax.typeof(y).sharding.spec[0] == "a"
            same(grads(f)(*arrays), grads(f, **REFERENCE)(*arrays))
        x, weight, bias = EXAMPLES[norm]
        xs = jax.device_put(jnp.stack([x, -x]), P(None, "a"))
        got = jax.vmap(grads(norm), (0, None, None))(xs, weight, bias)
    same(got, jax.vmap(grads(norm, **REFERENCE), (0, None, None))(jnp.stack([x, -x]), weight, bias))


# The choice of path


def test_a_cached_jit_respects_the_context():
    arrays = EXAMPLES[adaln]
    f = jax.jit(adaln)
    traced = lambda: bool(binds(f, *arrays))
    assert traced()
    with mmattn_jax.implementation("reference"):
        assert not traced()
        with mmattn_jax.implementation("auto"):
            assert traced()
        assert not traced()
    assert traced()


def test_a_cached_jit_respects_the_process_default():
    arrays = EXAMPLES[adaln]
    f = jax.jit(adaln)
    assert binds(f, *arrays)
    mmattn_jax.set_implementation("reference")
    try:
        assert not binds(f, *arrays)
        assert binds(partial(adaln, implementation="auto"), *arrays)
    finally:
        mmattn_jax.set_implementation("auto")
    assert binds(f, *arrays)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_triton_that_cannot_be_had_raises(wrap):
    with pytest.raises(
        RuntimeError,
        match=r'layernorm_adaln: implementation="triton" cannot be met: the kernels run on .* GPUs, the arrays are on cpu',
    ):
        wrap(partial(adaln, implementation="triton"))(*EXAMPLES[adaln])


def test_explain():
    x, scale, shift = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in EXAMPLES[adaln])
    assert mmattn_jax.explain(mmattn_jax.layernorm_adaln, x, scale, shift, device="cpu") == (
        "reference",
        "the kernels run on CUDA GPUs, the arrays are on cpu",
    )
    cuda = partial(mmattn_jax.explain, "layernorm_adaln", device="cuda")
    if _jax_triton.installed():
        assert cuda(x, scale, shift).path == "triton"
        assert cuda(x, scale, shift, device="cuda:0").path == "triton"
        assert cuda(jax.ShapeDtypeStruct((0, L, D), jnp.float32)).path == "triton"  # of which nothing is left to launch
    assert cuda(x, scale, implementation="reference") == ("reference", "asked for by the call")
    assert cuda(jax.ShapeDtypeStruct((B, L, D), "float64")).path == "reference"
    assert mmattn_jax.explain("layer_norm", *EXAMPLES[norm]).path == "reference"
    with pytest.raises(RuntimeError, match="cannot be met"):
        mmattn_jax.explain("layer_norm", *EXAMPLES[norm], implementation="triton")
    with pytest.raises(ValueError, match="expected one of"):
        mmattn_jax.explain("softmax", x)


@needs_jax_triton
def test_explain_of_a_gpu_that_is_too_old():
    mmattn_jax.set_target(mmattn_jax.Target(arch=75))
    try:
        assert mmattn_jax.explain("rms_norm", EXAMPLES[norm][0], device="cuda") == (
            "reference",
            "the kernels need compute capability 8.0, the GPU has 7.5",
        )
    finally:
        mmattn_jax.set_target(None)


def test_an_amd_gpu_takes_the_reference(monkeypatch):
    """No kernel has run on one. JAX calls its platform "gpu" as it does NVIDIA's, and lowers for "rocm"."""
    x, reason = EXAMPLES[norm][0], "the kernels have run on NVIDIA GPUs only, and this is one of AMD's (ROCm)"
    assert mmattn_jax.explain("rms_norm", x, device="rocm") == ("reference", reason)
    monkeypatch.setattr(ops, "backends", lambda: dict.fromkeys(("cpu", "rocm")))
    assert mmattn_jax.explain("rms_norm", x, device="gpu") == ("reference", reason)
    with pytest.raises(RuntimeError, match=f"cannot be met: {re.escape(reason)}"):
        mmattn_jax.explain("rms_norm", x, device="gpu", implementation="triton")

    def lowered(implementation):
        f = partial(mmattn_jax.rms_norm, implementation=implementation)
        gradient = jax.grad(lambda x: f(x).sum())
        return jax.jit(gradient).trace(x).lower(lowering_platforms=("rocm",)).as_text()

    assert "custom_call" not in lowered("auto")
    with pytest.raises(RuntimeError, match=f"cannot be met: {re.escape(reason)}"):
        lowered("triton")


def test_float64_takes_the_reference():
    with jax.enable_x64(True):
        arrays = [np.asarray(x, np.float64) for x in EXAMPLES[norm]]
        assert norm(*arrays).dtype == jnp.float64 and not binds(norm, *arrays)


def test_numpy_arrays_take_the_dtypes_of_jax():
    arrays = [np.asarray(x, np.float64) for x in EXAMPLES[norm]]
    y = norm(*arrays)
    assert y.dtype == jnp.float32
    same(y, norm(*EXAMPLES[norm]))


IEEE = (None, "highest", "float32", "F32_F32_F32", "BF16_BF16_F32_X9", "TF32_TF32_F32_X3")  # not coarser than was asked for
TF32 = ("default", "high", "tensorfloat32", "bfloat16", "TF32_TF32_F32")


@pytest.mark.parametrize("asked, meant", [(x, "ieee") for x in IEEE] + [(x, "tf32") for x in TF32])
def test_precision_follows_jax(asked, meant):
    with jax.default_matmul_precision(asked):
        assert ops.precision() == meant


# The surface


@pytest.mark.parametrize("name", ops.OPS)
def test_text_and_signature(name):
    function, core = getattr(mmattn_jax, name), getattr(mmattn, name)
    assert function.__doc__.startswith(core.__doc__.rstrip())
    mine, theirs = (inspect.signature(f).parameters for f in (function, core))
    assert list(mine)[-1] == "implementation"
    assert list(mine)[:-1] == [p for p in theirs if p not in ("precision", "start_extent")]
    assert all(mine[p].default == theirs[p].default and mine[p].kind == theirs[p].kind for p in list(mine)[:-1])


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
import jax, jax.numpy as jnp, mmattn_jax
x, weight = jnp.ones((2, 3, 16)), jnp.ones(16)
f = lambda x, weight: mmattn_jax.rms_norm(x, weight).sum()
print(jax.jit(jax.grad(f, 1))(x, weight).shape, mmattn_jax.explain("rms_norm", x, device="cuda"))
"""


@pytest.mark.parametrize("blocked, why", [(("torch", "jax_triton"), "jax-triton"), (("torch", "triton", "jax_triton"), "triton")])
def test_import_without(blocked, why):
    run = subprocess.run([sys.executable, "-c", WITHOUT.format(blocked=blocked)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"(16,) Explanation(path='reference', reason='{why} is not installed')"


@needs_jax_triton
@pytest.mark.parametrize("directory", [None, "/somewhere"])
def test_triton_cache_directory_survives(directory):
    code = "import os; from mmattn_jax import _jax_triton; _jax_triton.module(); print(os.environ.get('TRITON_CACHE_DIR'))"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_DIR"} | (
        {"TRITON_CACHE_DIR": directory} if directory else {}
    )
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(directory)
