"""The modules in the hands of Flax's other tools: what checkpoints a module, looks at it, or replaces a part of it."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from flax import nnx

import mmattn_jax
from mmattn_jax.nn import AttentionOutput, GPT2Block, GPT2Stack, RMSNormSelfCrossAttention

B, L, C, D, HEADS = 2, 7, 3, 32, 2
CROSS = dict(conditioning=True, use_cross_attn=True)


def how(kind):
    return dict(dim_feedforward=48, dropout=0.0, **kind, rngs=nnx.Rngs(0))


def stack_of(kind=CROSS):
    return GPT2Stack(2, D, HEADS, **how(kind))


def randn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).standard_normal(shape), jnp.float32)


def inputs_of(kind=CROSS):
    """In the order of the modules' arguments; tokens and context are padded."""
    x_mask, context_mask = (jnp.arange(n) < jnp.array([[n - 1], [n]]) for n in (L, C))
    y, context, context_mask = (randn(B, 1, D), randn(B, C, D), context_mask) if kind else (None, None, None)
    return randn(B, L, D), y, None, context, jnp.array([0, 5]), x_mask, context_mask


@nnx.jit
def grads(module, inputs):
    """Gradients of the parameters by path, and the outputs."""

    def loss(module):
        outs = module(*inputs)
        return sum((out * randn(*out.shape, seed=i)).sum() for i, out in enumerate(outs) if out is not None), outs

    return nnx.grad(loss, has_aux=True)(module)


@pytest.fixture(scope="module")
def plain_grads():
    return grads(stack_of(), inputs_of())


def same(got, want, tolerance=1e-5):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert jnp.linalg.norm(a - b) <= tolerance * jnp.linalg.norm(b)


def checkpoints(module) -> int:
    """Number of checkpoints in the program of a call."""
    graph, state = nnx.split(module)
    inputs = inputs_of()
    return str(jax.make_jaxpr(lambda state: nnx.merge(graph, state)(*inputs))(state)).count("remat")


class Blocks(nnx.Module):
    """A user's own stack, which checkpoints each block."""

    def __init__(self, layers):
        self.layers = layers

    def __call__(self, x, y, attn_mask, context, *rest):
        for layer in self.layers:
            x, context = nnx.remat(GPT2Block.__call__)(layer, x, y, attn_mask, context, *rest)
        return x, context


class Remat(GPT2Block):
    __call__ = nnx.remat(GPT2Block.__call__)


def test_remat_of_blocks_in_a_users_stack(plain_grads):
    module = Blocks(stack_of().layers)
    same(grads(module, inputs_of()), plain_grads)
    assert checkpoints(module) == 2


def test_remat_of_a_layer_of_a_stack(plain_grads):
    """By a class of the user's."""
    module = stack_of()
    remat = Remat(D, HEADS, **how(CROSS))
    nnx.update(remat, nnx.state(module.layers[1]))
    module.layers[1] = remat
    same(grads(module, inputs_of()), plain_grads)
    assert checkpoints(module) == 1


def test_remat_of_all_blocks(monkeypatch):
    """By a method in our class's place."""
    module = stack_of()
    assert checkpoints(module) == 0
    monkeypatch.setattr(GPT2Block, "__call__", nnx.remat(GPT2Block.__call__))
    assert checkpoints(module) == 2


@pytest.mark.parametrize("kind", [CROSS, {}], ids=["cross", "plain"])
def test_tabulate(kind):
    """Every layer with weights has its row, since it was called."""
    module = stack_of(kind)
    table = nnx.tabulate(module, *inputs_of(kind), console_kwargs=dict(width=400, force_terminal=False, force_jupyter=False))
    rows = {line.split("│")[1].strip() for line in table.splitlines() if "│" in line}
    layers = {"/".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    assert {"layers/0", "layers/1"} | layers <= rows
    same(module(*inputs_of(kind)), stack_of(kind)(*inputs_of(kind)), 0.0)  # it leaves no trace


class Scaled(nnx.Module):
    """A user's own layer: the old one, scaled."""

    def __init__(self, inner):
        self.inner, self.scale = inner, nnx.Param(jnp.ones(()))

    def __call__(self, x, *args):
        out = self.inner(x, *args)
        scaled = lambda s: None if s is None else s * self.scale[...]
        return AttentionOutput(*map(scaled, out)) if isinstance(out, tuple) else scaled(out)


def replace(owner, name):
    setattr(owner, name, Scaled(getattr(owner, name)))


REPLACED = {
    "layer": lambda layers: layers.__setitem__(1, Scaled(layers[1])),
    "attention": lambda layers: replace(layers[1], "cross_attn"),
    "norm of q": lambda layers: replace(layers[1].cross_attn, "rms_norm_q"),
    "norm of the context's k": lambda layers: replace(layers[1].cross_attn, "c_rms_norm_k"),
    "output": lambda layers: replace(layers[1].cross_attn, "to_out"),
    "last norm": lambda layers: layers[1].cross_attn.to_out.__setitem__(1, Scaled(layers[1].cross_attn.to_out[1])),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_layer_may_be_replaced_by_a_users_own(name, plain_grads):
    module = stack_of()
    REPLACED[name](module.layers)
    same(module(*inputs_of()), plain_grads[1])


def test_gradients_of_replaced_layers(plain_grads):
    module = stack_of()
    for name in ("norm of q", "last norm", "attention", "layer"):
        REPLACED[name](module.layers)
    got, _ = grads(module, inputs_of())
    flat = {tuple(key for key in path if key != "inner"): x[...] for path, x in nnx.to_flat_state(got)}
    want = {path: x[...] for path, x in nnx.to_flat_state(plain_grads[0])}
    scales = [x for path, x in flat.items() if path not in want]
    assert len(scales) == 4 and all(x != 0 for x in scales)
    same([flat[path] for path in want], list(want.values()))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_called_norms_of_attention(linear, implementation, kernels):
    """Softmax and linear attention whose norms are called, with every mask."""
    module = RMSNormSelfCrossAttention(D, HEADS, use_context=True, linear=linear, rngs=nnx.Rngs(0))
    x, _, _, context, *rest = inputs_of()
    inputs = x, context, jax.random.uniform(jax.random.key(0), (B, L, L)) < 0.7, *rest
    with mmattn_jax.implementation(implementation):
        want = module(*inputs)
        replace(module, "rms_norm_q")
        same(module(*inputs), want)


def test_a_start_position_that_jit_closes_over():
    """It is no argument of the program, so that its values can be seen, and are checked."""
    module, x = RMSNormSelfCrossAttention(D, HEADS, rngs=nnx.Rngs(0)), randn(B, L, D)
    start, late = jnp.array([0, 5]), jnp.array([0, 5000])
    same(jax.jit(lambda x: module(x, start_pos=start))(x), module(x, start_pos=start))
    with pytest.raises(ValueError, match="start_pos reaches from 0 to 5000"):
        jax.jit(lambda x: module(x, start_pos=late))(x)
