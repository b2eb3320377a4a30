"""The modules of both frameworks: against the seed, against each other, and through the kernels."""

from __future__ import annotations

import inspect
import pickle
from functools import partial

import frameworks
import numpy as np
import pytest

TORCH, JAX = (name in frameworks.INSTALLED for name in ("torch", "jax"))
if TORCH:
    import seed
    import torch

    import mmattn_torch.nn
if JAX:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import mmattn_jax.nn
    from mmattn_jax.convert import fill, read

needs_torch = pytest.mark.skipif(not TORCH, reason="needs torch")
needs_jax = pytest.mark.skipif(not JAX, reason="needs jax")

B, L, C, D, HEADS, HIDDEN = 3, 13, 5, 32, 2, 48
DIFFERENTIABLE = ("x", "y", "context")


class TorchModules:
    def __init__(self):
        self.nn, self.implementation = mmattn_torch.nn, mmattn_torch.implementation
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def build(self, name, *args, state=None, dtype="float32", **kwargs):
        module = getattr(self.nn, name)(*args, **kwargs, device=self.device, dtype=getattr(torch, dtype))
        if state is not None:
            module.load_state_dict(state)
        return module

    def load(self, module, arrays):
        module.load_state_dict({k: torch.tensor(x) for k, x in arrays.items()})
        return module

    def numpy(self, x):
        return x.detach().double().cpu().numpy()

    def weights(self, module):
        return {k: self.numpy(t) for k, t in module.state_dict().items()}

    def put(self, x, dtype="float32"):
        t = torch.as_tensor(x, device=self.device)
        return t.to(getattr(torch, dtype)) if t.is_floating_point() else t

    def call(self, module, inputs, dtype="float32"):
        put = lambda k, x: self.put(x, dtype) if isinstance(x, np.ndarray) and k != "start_pos" else x
        return module(**{k: put(k, x) for k, x in inputs.items()})

    def outs_and_grads(self, module, inputs, douts, dtype="float32"):
        inputs = {k: self.put(x, dtype) if isinstance(x, np.ndarray) else x for k, x in inputs.items()}
        wanted = {k: inputs[k].requires_grad_() for k in DIFFERENTIABLE if inputs.get(k) is not None}
        wanted |= dict(module.named_parameters())
        outs = {k: x for k, x in module(**inputs)._asdict().items() if x is not None}
        cotangents = [self.put(douts[k]).to(x.dtype) for k, x in outs.items()]
        grads = torch.autograd.grad(list(outs.values()), list(wanted.values()), cotangents)
        results = outs | {f"d{k}": g for k, g in zip(wanted, grads, strict=True)}
        return {k: x.detach().double().cpu().numpy() for k, x in results.items()}


class FlaxModules:
    def __init__(self):
        self.nn, self.implementation, self.load = mmattn_jax.nn, mmattn_jax.implementation, fill

    def build(self, name, *args, state=None, dtype="float32", **kwargs):
        dtype = getattr(jnp, dtype)
        module = getattr(self.nn, name)(*args, **kwargs, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
        return module if state is None else mmattn_jax.from_torch(module, state)

    def numpy(self, x):
        return np.asarray(x, np.float64)

    def weights(self, module):
        return read(module)

    def put(self, x, dtype="float32"):
        return jnp.asarray(x, getattr(jnp, dtype) if x.dtype.kind == "f" else None)

    def call(self, module, inputs, dtype="float32"):
        put = lambda k, x: self.put(x, dtype) if isinstance(x, np.ndarray) and k != "start_pos" else x
        return module(**{k: put(k, x) for k, x in inputs.items()})

    def outs_and_grads(self, module, inputs, douts, dtype="float32"):
        arrays = {k: self.put(x, dtype) for k, x in inputs.items() if isinstance(x, np.ndarray)}
        static = tuple((k, x) for k, x in inputs.items() if k not in arrays)
        wanted = {k: arrays.pop(k) for k in DIFFERENTIABLE if k in arrays}
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        with jax.default_matmul_precision("float32"):
            results, grads = flax_vjp(graph, static, params, rest, wanted, arrays, {k: self.put(x) for k, x in douts.items()})
        grads = read(nnx.merge(graph, grads, rest))
        return {k: np.asarray(x, np.float64) for k, x in (results | {f"d{k}": g for k, g in grads.items()}).items()}


if JAX:

    @partial(jax.jit, static_argnums=(0, 1))
    def flax_vjp(graph, static, params, rest, wanted, arrays, douts):
        function = lambda params, wanted: nnx.merge(graph, params, rest)(**wanted, **arrays, **dict(static))._asdict()
        outs, vjp = jax.vjp(function, params, wanted)
        grads, dwanted = vjp({k: None if x is None else douts[k].astype(x.dtype) for k, x in outs.items()})
        return {k: x for k, x in outs.items() if x is not None} | {f"d{k}": g for k, g in dwanted.items()}, grads


FRONTS = ({"torch": TorchModules()} if TORCH else {}) | ({"jax": FlaxModules()} if JAX else {})


@pytest.fixture(params=FRONTS)
def front(request):
    return FRONTS[request.param]


def draw(*names, length=L, random_seed=1):
    """Inputs and cotangents by name; `mask` has empty rows and columns."""
    rng = np.random.default_rng(random_seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    inputs = dict(x=normal(B, length, D))
    draws = dict(
        y=lambda: normal(B, 1, D),
        context=lambda: normal(B, C, D),
        attn_mask=lambda: mask(rng, length),
        start_pos=lambda: np.array([0, 5, 31], np.int32),
        x_mask=lambda: np.arange(length) < np.array([[length], [length - 4], [1]]),
        context_mask=lambda: np.arange(C) < np.array([[C - 2], [C], [0]]),
    )
    inputs |= {name: draws[name]() for name in names}
    return inputs, dict(x_out=normal(B, length, D), context_out=normal(B, C, D))


def mask(rng, length):
    m = rng.random((B, length, length)) < 0.6
    m[0, 3], m[1, :, 2], m[2, 0] = False, False, False
    return m


def assert_close(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape, name
        error = frameworks.distance(got[name], want[name], np.linalg.norm)
        assert error <= tolerance, f"{name}: relative error {error:.3g}"


def seed_results(state, function, inputs, douts):
    """Outputs and all gradients of the seed, under the modules' names."""
    tensors = {k: torch.tensor(x, requires_grad=k in DIFFERENTIABLE) for k, x in inputs.items()}
    weights = {k: t.clone().requires_grad_() for k, t in state.items()}
    names = dict(attn_mask="mask", start_pos="start")
    outs = function(weights, **{names.get(k, k): t for k, t in tensors.items()})
    outs = {k: x for k, x in zip(("x_out", "context_out"), outs, strict=True) if x is not None}
    wanted = {k: t for k, t in tensors.items() if t.requires_grad} | weights
    grads = torch.autograd.grad(list(outs.values()), list(wanted.values()), [torch.tensor(douts[k]) for k in outs])
    results = outs | {f"d{k}": g for k, g in zip(wanted, grads, strict=True)}
    return {k: x.detach().double().numpy() for k, x in results.items()}


BLOCKS = {
    "cross": (dict(conditioning=True, use_cross_attn=True), ("y", "context", "attn_mask", "start_pos")),
    "cross without mask": (dict(conditioning=True, use_cross_attn=True), ("y", "context")),
    "conditioned": (dict(conditioning=True), ("y", "attn_mask", "start_pos")),
    "unconditioned": (dict(), ("attn_mask", "start_pos")),
}


@needs_torch
@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_the_seed(front, name):
    flags, names = BLOCKS[name]
    state = seed.random_weights(
        seed.block_shapes(D, HIDDEN, flags.get("conditioning", False), flags.get("use_cross_attn", False))
    )
    inputs, douts = draw(*names)
    module = front.build("GPT2Block", D, HEADS, dim_feedforward=HIDDEN, dropout=0.0, **flags, state=state)
    want = seed_results(state, lambda w, **kw: seed.block(w, **kw, heads=HEADS), inputs, douts)
    assert_close(front.outs_and_grads(module, inputs, douts), want)


@needs_torch
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("names", [("attn_mask", "start_pos"), ("context", "attn_mask", "start_pos"), ("context",)], ids="-".join)
def test_attention_equals_the_seed(front, names, linear):
    cross = "context" in names
    state = seed.random_weights(seed.attention_shapes(D, cross))
    inputs, douts = draw(*names)
    if linear and "attn_mask" in names:
        inputs["attn_mask"][2, 0, 4:] = True  # an empty first row leaves nothing to compare
    if cross:
        module = front.build("RMSNormSelfCrossAttention", D, HEADS, use_context=True, linear=linear, state=state)
    else:
        module = front.build("RMSNormSelfAttention", D, HEADS, linear=linear, state=state)
    want = seed_results(state, lambda w, **kw: seed.attention(w, **kw, heads=HEADS, linear=linear), inputs, douts)
    assert_close(front.outs_and_grads(module, inputs, douts), want)


@needs_torch
def test_state_dict_is_the_seeds(front):
    for flags, _ in BLOCKS.values():
        module = front.build("GPT2Block", D, HEADS, dim_feedforward=HIDDEN, **flags)
        want = seed.block_shapes(D, HIDDEN, flags.get("conditioning", False), flags.get("use_cross_attn", False))
        assert {k: w.shape for k, w in front.weights(module).items()} == want
    block = front.build("GPT2Block", 128, 8, dim_feedforward=512, conditioning=True, use_cross_attn=True)
    assert sum(w.size for w in front.weights(block).values()) == 594_432
    stack = front.build("GPT2Stack", 2, D, HEADS, dim_feedforward=HIDDEN)
    want = {f"layers.{i}.{k}": s for i in range(2) for k, s in seed.block_shapes(D, HIDDEN, False, False).items()}
    assert {k: w.shape for k, w in front.weights(stack).items()} == want


def test_initialisation_is_torchs(front):
    weights = front.weights(front.build("GPT2Block", 128, 8, dim_feedforward=512))
    for name, fan_in in (("mlp.0", 128), ("mlp.2", 512), ("attn.to_qkv", 128), ("attn.to_out.0", 128)):
        for kind in ("weight", "bias"):
            w = weights[f"{name}.{kind}"] * fan_in**0.5
            assert 0.9 < np.abs(w).max() <= 1
            assert abs(w.std() - 3**-0.5) < 0.1
    assert all(
        (weights[f"{name}.weight"] == 1).all() for name in ("ln_1", "ln_2", "attn.rms_norm_q", "attn.rms_norm_k", "attn.to_out.1")
    )
    assert all((weights[f"{name}.bias"] == 0).all() for name in ("ln_1", "ln_2"))


MODULES = {
    "stack": ("GPT2Stack", (2, D, HEADS), dict(dim_feedforward=HIDDEN, dropout=0.0, conditioning=True, use_cross_attn=True)),
    "unconditioned stack": ("GPT2Stack", (2, D, HEADS), dict(dim_feedforward=HIDDEN, dropout=0.0)),
    "block": ("GPT2Block", (D, HEADS), dict(dim_feedforward=HIDDEN, dropout=0.0, conditioning=True, use_cross_attn=True)),
    "narrow heads": ("GPT2Block", (D, 3, 8), dict(dim_feedforward=HIDDEN, dropout=0.0, conditioning=True, use_cross_attn=True)),
    "linear": ("RMSNormSelfCrossAttention", (D, HEADS), dict(use_context=True, linear=True)),
    "wide heads": ("RMSNormSelfAttention", (D, HEADS), dict(dim_head=24)),
    "pre-only stack": (
        "GPT2Stack",
        (2, D, HEADS),
        dict(dim_feedforward=HIDDEN, dropout=0.0, conditioning=True, use_cross_attn=True, context_pre_only=True),
    ),
    "pre-only linear": ("RMSNormSelfCrossAttention", (D, HEADS), dict(use_context=True, linear=True, context_pre_only=True)),
}
PADDED = ("attn_mask", "start_pos", "x_mask")


def module_inputs(name, *names):
    _, _, kwargs = MODULES[name]
    names = (*names, "y") if kwargs.get("conditioning") else names
    if kwargs.get("use_cross_attn") or kwargs.get("use_context"):
        names = (*names, "context", *(["context_mask"] if "x_mask" in names else []))
    return draw(*names)


@needs_torch
@needs_jax
@pytest.mark.parametrize("name", MODULES)
def test_both_frameworks_agree(name):
    cls, args, kwargs = MODULES[name]
    inputs, douts = module_inputs(name, *PADDED)
    module = FRONTS["torch"].build(cls, *args, **kwargs)
    twin = FRONTS["jax"].build(cls, *args, **kwargs, state=module.state_dict())
    want = FRONTS["torch"].outs_and_grads(module, inputs, douts)
    assert_close(FRONTS["jax"].outs_and_grads(twin, inputs, douts), want)


def test_context_pre_only(front):
    """The tokens' half of the block with these weights; the context comes out as it went in."""
    kwargs = dict(dim_feedforward=HIDDEN, dropout=0.0, conditioning=True, use_cross_attn=True)
    block, full = (front.build("GPT2Block", D, HEADS, **kwargs, context_pre_only=pre_only) for pre_only in (True, False))
    weights = front.weights(full)
    mine = {k: w for k, w in weights.items() if "c_" not in k and "context" not in k}
    for kind in ("weight", "bias"):
        for name, rows in (("context_layers.adaLN_modulation.1", slice(2 * D)), ("cross_attn.c_to_qkv", slice(D, None))):
            mine[f"{name}.{kind}"] = weights[f"{name}.{kind}"][rows]
    mine["cross_attn.c_rms_norm_k.weight"] = weights["cross_attn.c_rms_norm_k.weight"]
    assert {k: w.shape for k, w in front.weights(block).items()} == {k: w.shape for k, w in mine.items()}

    front.load(block, {k: w.astype(np.float32) for k, w in mine.items()})
    inputs, _ = draw("y", "context", "attn_mask", "start_pos", "x_mask", "context_mask")
    token = inputs["context_mask"][..., None]
    inputs["context"] = np.where(token, inputs["context"], np.nan)
    got, want = (front.call(module, inputs) for module in (block, full))
    assert_close(dict(x=front.numpy(got.x_out)), dict(x=front.numpy(want.x_out)))
    assert np.array_equal(front.numpy(got.context_out), np.where(token, inputs["context"], 0))


@pytest.mark.parametrize("context_pre_only", [True, False])
def test_a_loss_on_the_tokens_reaches_every_parameter(front, context_pre_only):
    """With context_pre_only; without it, it passes the last block's layers of the context by."""
    inputs, douts = draw("y", "context")
    douts["context_out"] = np.zeros_like(douts["context_out"])
    kwargs = dict(dim_feedforward=HIDDEN, dropout=0.0, conditioning=True, use_cross_attn=True)
    module = front.build("GPT2Stack", 1, D, HEADS, **kwargs, context_pre_only=context_pre_only)
    grads = front.outs_and_grads(module, inputs, douts)
    assert all(np.abs(g).max() > 0 for k, g in grads.items() if k.startswith("d")) is context_pre_only


def test_dim_head_sets_the_inner_width(front):
    weights = front.weights(front.build("RMSNormSelfAttention", D, HEADS, dim_head=24))
    shapes = {k: w.shape for k, w in weights.items()}
    assert shapes["to_qkv.weight"] == (3 * 48, D)
    assert shapes["rms_norm_q.weight"] == (48,)
    assert shapes["to_out.0.weight"] == (D, 48)
    assert shapes["to_out.1.weight"] == (D,)


@pytest.mark.parametrize("name", ["block", "linear", "unconditioned stack"])
def test_padding_is_silent_both_ways(front, name):
    """Whatever the padding holds, outputs and gradients are the same bits, 0 at the padding, and those of the bare tokens."""
    cls, args, kwargs = MODULES[name]
    inputs, douts = module_inputs(name, "start_pos", "x_mask")
    module = front.build(cls, *args, **kwargs)
    want = front.outs_and_grads(module, inputs, douts)
    spoilt = dict(inputs)
    for stream in ("x", "context"):
        if stream in inputs:
            padding = ~inputs[f"{stream}_mask"]
            spoilt[stream] = np.where(padding[..., None], np.nan, inputs[stream])
            assert (want[f"{stream}_out"][padding] == 0).all()
            assert (want[f"d{stream}"][padding] == 0).all()
    got = front.outs_and_grads(module, spoilt, douts)
    assert all(np.isfinite(x).all() for x in got.values())
    assert_close(got, want, 0.0)

    b = 1  # a sample by itself, without its padding
    keep = {stream: inputs[f"{stream}_mask"][b].sum() for stream in ("x", "context") if stream in inputs}
    alone = {k: inputs[k][b : b + 1, : keep.get(k)] for k in ("x", "y", "context") if k in inputs}
    alone["start_pos"] = inputs["start_pos"][b : b + 1]
    outs = front.outs_and_grads(
        module, alone, {f"{stream}_out": douts[f"{stream}_out"][b : b + 1, :n] for stream, n in keep.items()}
    )
    for stream, n in keep.items():
        for name in (f"{stream}_out", f"d{stream}"):
            assert_close({name: want[name][b : b + 1, :n]}, {name: outs[name]})


@needs_torch
def test_empty_rows_with_zero_output_bias(front):
    """Such a row's attention output is 0, where RMSNorm's gradient gain is weight / sqrt(eps), about 2900."""
    state = seed.random_weights(seed.attention_shapes(D, True))
    state["to_out.0.bias"].zero_()
    inputs, douts = draw("context", "attn_mask")
    module = front.build("RMSNormSelfCrossAttention", D, HEADS, use_context=True, state=state)
    got = front.outs_and_grads(module, inputs, douts)
    assert (got["x_out"][0, 3] == 0).all()
    assert np.abs(got["dto_out.0.bias"]).max() > 1000
    assert_close(got, seed_results(state, lambda w, **kw: seed.attention(w, **kw, heads=HEADS), inputs, douts))


def test_masks_of_integers(front):
    inputs, douts = draw("attn_mask")
    module = front.build("RMSNormSelfAttention", D, HEADS)
    want = front.outs_and_grads(module, inputs, douts)
    for dtype in (np.uint8, np.int32):
        got = front.outs_and_grads(module, inputs | dict(attn_mask=inputs["attn_mask"].astype(dtype) * 2), douts)
        assert_close(got, want, 0.0)


@pytest.mark.parametrize("name", ["stack", "linear", "wide heads"])
def test_masks_by_position(front, name):
    """As torch's checkpoint and nnx.remat pass arguments on."""
    cls, args, kwargs = MODULES[name]
    module = front.build(cls, *args, **kwargs)
    inputs, _ = module_inputs(name, *PADDED)
    order = inspect.signature(getattr(module, "forward", module)).parameters
    got = module(*(front.put(inputs[name]) if name in inputs else None for name in order))
    for a, b in zip(got, front.call(module, inputs), strict=True):
        assert a is b is None or bool((a == b).all())


def test_start_pos_as_a_number(front):
    inputs, douts = draw()
    module = front.build("RMSNormSelfAttention", D, HEADS)
    run = lambda start: front.outs_and_grads(module, inputs | dict(start_pos=start), douts)
    assert_close(run(0), run(None), 0.0)
    assert_close(run(7), run(np.full(B, 7, np.int32)), 0.0)
    assert_close(run(7), run(np.int32(7)), 0.0)


def test_y_without_token_axis(front):
    inputs, douts = draw("y")
    module = front.build("GPT2Block", D, HEADS, dim_feedforward=HIDDEN, dropout=0.0, conditioning=True)
    want = front.outs_and_grads(module, inputs, douts)
    got = front.outs_and_grads(module, inputs | dict(y=inputs["y"][:, 0]), douts)
    assert_close(got | dict(dy=got["dy"][:, None]), want, 0.0)


def test_dropout(front):
    inputs, _ = draw()
    module = front.build("GPT2Block", D, HEADS, dim_feedforward=HIDDEN, dropout=0.5)
    out = lambda: np.asarray(front.call(module, inputs).x_out.tolist())
    first, second = out(), out()
    assert (first != second).mean() > 0.3
    module.eval()
    assert np.array_equal(out(), out())
    module.train()
    assert not np.array_equal(out(), out())


ERRORS = {
    "heads": (lambda f: f.build("GPT2Block", D, 3), "GPT2Block|RMSNormSelfAttention: dim = 32 is not divisible by num_head = 3"),
    "no heads": (lambda f: f.build("RMSNormSelfAttention", D, 0, dim_head=8), "the number of heads is 0; expected an int"),
    "wide head": (lambda f: f.build("RMSNormSelfAttention", D, dim_head=256), "the head width is 256; expected .* from 8 to 128"),
    "odd head": (lambda f: f.build("RMSNormSelfAttention", D, 4, dim_head=7), "the head width is 7; expected an even one"),
    "width": (lambda f: f.build("RMSNormSelfAttention", 30, 2), "dim is 30; expected a multiple of 8"),
    "dropout": (lambda f: f.build("GPT2Block", D, dropout=1.0), "dropout is 1.0; expected a probability"),
    "cross": (lambda f: f.build("GPT2Block", D, use_cross_attn=True), "use_cross_attn=True needs conditioning=True"),
    "pre-only block": (
        lambda f: f.build("GPT2Block", D, context_pre_only=True),
        "GPT2Block: context_pre_only=True needs use_cross",
    ),
    "pre-only": (
        lambda f: f.build("RMSNormSelfCrossAttention", D, context_pre_only=True),
        "RMSNormSelfCrossAttention: context_pre_only=True needs use_context=True",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_construction_errors(front, name):
    build, sentence = ERRORS[name]
    with pytest.raises(ValueError, match=sentence):
        build(front)


ATTENTION, CROSS = ("RMSNormSelfAttention", {}), ("RMSNormSelfCrossAttention", {})
BLOCK = ("GPT2Block", dict(dim_feedforward=HIDDEN))
FULL_BLOCK = ("GPT2Block", dict(dim_feedforward=HIDDEN, conditioning=True, use_cross_attn=True))
zeros = lambda *shape: np.zeros(shape, np.float32)
CALL_ERRORS = {
    "context": (CROSS, dict(context=zeros(B, C, D)), "context was given, but the module was built without it"),
    "context of a block": (BLOCK, dict(context=zeros(B, C, D)), "context was given, but the module was built without it"),
    "no context": (FULL_BLOCK, dict(y=zeros(B, 1, D)), "context is None, but the module was built with use_cross_attn=True"),
    "no y": (FULL_BLOCK, dict(context=zeros(B, C, D)), "y is None, but the module was built with conditioning=True"),
    "y": (BLOCK, dict(y=zeros(B, 1, D)), "y was given, but the module was built without conditioning=True"),
    "y's batch": (FULL_BLOCK, dict(y=zeros(1, 1, D), context=zeros(B, C, D)), r"y has shape \(1, 1, 32\); expected \(B, 1, D\)"),
    "width": (ATTENTION, dict(x=zeros(B, L, 16)), r"x has shape \(3, 13, 16\); expected \(B, L, D\) = \(3, 13, 32\)"),
    "rank": (ATTENTION, dict(x=zeros(L, D)), r"x has shape \(13, 32\), rank 2; expected \(B, L, D\)"),
    "context_mask": (CROSS, dict(context_mask=np.ones((B, C), bool)), "context_mask was given without context"),
    "integers": (ATTENTION, dict(x=np.zeros((B, L, D), np.int32)), "x has dtype int32; expected float32"),
    "attn_mask": (ATTENTION, dict(attn_mask=np.ones((L, L), bool)), r"attn_mask has shape \(13, 13\); expected \(B, L, L\)"),
    "x_mask": (ATTENTION, dict(x_mask=np.ones((B, L), np.int32)), "x_mask has dtype int32; expected bool"),
    "additive x_mask": (
        ATTENTION,
        dict(x_mask=zeros(B, L)),
        "x_mask has dtype float32; expected bool.*: mask == 0 for an additive mask of 0 and -inf, mask != 0 for one of 0 and 1",
    ),
    "additive attn_mask": (
        ATTENTION,
        dict(attn_mask=zeros(B, L, L)),
        "attn_mask has dtype float32; expected bool or integers.*: mask == 0 for an additive mask of 0 and -inf, mask != 0 for",
    ),
    "negative start": (ATTENTION, dict(start_pos=-1), "start_pos reaches from -1 to -1; expected 0 to 4083"),
    "late start": (
        ATTENTION,
        dict(start_pos=np.array([0, 1, 4090], np.int32)),
        "start_pos reaches from 0 to 4090; expected 0 to 4083",
    ),
    "start's batch": (ATTENTION, dict(start_pos=np.array([0], np.int32)), r"start_pos has shape \(1,\); expected \(B\) = \(3,\)"),
}


@pytest.mark.parametrize("name", CALL_ERRORS)
def test_call_errors(front, name):
    (cls, kwargs), wrong, sentence = CALL_ERRORS[name]
    module = front.build(cls, D, HEADS, **kwargs)
    with pytest.raises((ValueError, TypeError), match=f"{cls}: {sentence}"):
        front.call(module, dict(x=zeros(B, L, D)) | wrong)


def test_start_pos_on_the_cpu_is_seen(front):
    module = front.build("RMSNormSelfAttention", D, HEADS)
    start = jnp.array([0, 1, 4090]) if front is FRONTS.get("jax") else torch.tensor([0, 1, 4090])
    if JAX and isinstance(start, jax.Array) and start.device.platform != "cpu":
        pytest.skip("jax puts it on the GPU")
    with pytest.raises(ValueError, match="start_pos reaches from 0 to 4090; expected 0 to 4083"):
        module(front.put(zeros(B, L, D)), start_pos=start)


@pytest.mark.parametrize("cls", ["RMSNormSelfAttention", "GPT2Block", "GPT2Stack"])
def test_max_seq_len(front, cls):
    """Modules of all kinds take it."""
    build = lambda **kwargs: front.build(cls, *(2, D) if cls == "GPT2Stack" else (D,), HEADS, **kwargs)
    late = dict(x=draw()[0]["x"], start_pos=np.full(B, 5000, np.int32))
    with pytest.raises(ValueError, match="x has 13 tokens; expected at most max_seq_len = 8"):
        front.call(build(max_seq_len=8), dict(x=zeros(B, L, D)))
    with pytest.raises(ValueError, match="start_pos reaches from 5000 to 5000"):
        front.call(build(), late)
    assert front.call(build(max_seq_len=5000 + L), late).x_out.shape == (B, L, D)


def test_max_seq_len_with_context(front):
    module = front.build("GPT2Stack", 1, D, HEADS, conditioning=True, use_cross_attn=True, max_seq_len=8)
    with pytest.raises(ValueError, match="expected at most max_seq_len = 8"):
        front.call(module, draw("y", "context")[0])


@needs_torch
def test_torch_autocast():
    inputs, douts = draw("y", "context", "attn_mask")
    module = FRONTS["torch"].build(
        "GPT2Block", D, HEADS, dim_feedforward=HIDDEN, dropout=0.0, conditioning=True, use_cross_attn=True
    )
    want = FRONTS["torch"].outs_and_grads(module, inputs, douts)
    with torch.autocast(FRONTS["torch"].device, torch.bfloat16):
        out = FRONTS["torch"].call(module, inputs)
        got = FRONTS["torch"].outs_and_grads(module, inputs, douts)
    assert out.x_out.dtype == out.context_out.dtype == torch.float32
    assert not np.array_equal(got["x_out"], want["x_out"])
    assert_close(got, want, 0.05)
    half = module.bfloat16()
    with torch.autocast(FRONTS["torch"].device, torch.bfloat16):
        out = FRONTS["torch"].call(half, inputs)
    assert out.x_out.dtype == torch.float32


@needs_jax
@pytest.mark.parametrize("conditioning", [True, False])
@pytest.mark.parametrize("stream, layers", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_flax_residual_stream_keeps_its_dtype(stream, layers, conditioning):
    dtypes = dict(dtype=getattr(jnp, layers), param_dtype=jnp.float16)
    options = dict(dim_feedforward=HIDDEN, dropout=0.0, conditioning=conditioning) | dtypes
    module = mmattn_jax.nn.GPT2Stack(2, D, HEADS, **options, rngs=nnx.Rngs(0))
    x, y = (jax.ShapeDtypeStruct(shape, getattr(jnp, stream)) for shape in ((B, L, D), (B, D)))
    assert jax.eval_shape(lambda *a: module(*a).x_out, *((x, y) if conditioning else (x,))).dtype == stream


@needs_torch
@pytest.mark.parametrize("shape", [(3, 700), (2100,), (0, 5)], ids=str)
def test_torch_linear(shape):
    """The layer's own gradients: each as near to float64's as torch's are."""
    device = FRONTS["torch"].device
    arrays = [torch.randn(*n, device=device, dtype=torch.bfloat16, requires_grad=True) for n in ((*shape, 16), (24, 16), (24,))]
    dy = torch.randn(*shape, 24, device=device, dtype=torch.bfloat16)
    exact = [a.detach().double().requires_grad_() for a in arrays]
    want = torch.autograd.grad(torch.nn.functional.linear(*exact), exact, dy.double())
    theirs = torch.autograd.grad(torch.nn.functional.linear(*arrays), arrays, dy)
    y = mmattn_torch.nn._LinearFunction.apply(*arrays)
    assert torch.equal(y, torch.nn.functional.linear(*arrays))
    for ours, torchs, right in zip(torch.autograd.grad(y, arrays, dy), theirs, want, strict=True):
        assert ours.shape == right.shape and ours.dtype == torch.bfloat16
        assert (ours - right).norm() <= 1.1 * (torchs - right).norm()


@needs_torch
def test_ones_stay_where_a_graph_has_seen_them():
    like = torch.zeros(1, device=FRONTS["torch"].device, dtype=torch.bfloat16)
    few = mmattn_torch.nn._ones(5, like)
    many = mmattn_torch.nn._ones(70000, like)
    assert few.shape == (1, 5) and many.shape == (1, 70000) and bool((many == 1).all())
    assert mmattn_torch.nn._ones(6, like).data_ptr() == few.data_ptr() != many.data_ptr()


@needs_torch
def test_torch_compile():
    """One forward and one backward graph for every length."""
    from torch._dynamo.testing import CompileCounterWithBackend

    names = ("y", "attn_mask", "start_pos", "x_mask")
    module = FRONTS["torch"].build("GPT2Block", D, HEADS, dim_feedforward=HIDDEN, dropout=0.0, conditioning=True)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for inputs, douts in (draw(*names), draw(*names, length=L + 4)):
        want = FRONTS["torch"].outs_and_grads(module, inputs, douts)
        got = FRONTS["torch"].outs_and_grads(compiled, inputs, douts)
        assert_close({k.replace("_orig_mod.", ""): x for k, x in got.items()}, want)
    assert backend.frame_count == 2


@needs_jax
def test_flax_training_step():
    optax = pytest.importorskip("optax")
    inputs, _ = draw("y", "context")
    module = FRONTS["jax"].build("GPT2Stack", 1, D, HEADS, dim_feedforward=HIDDEN, conditioning=True, use_cross_attn=True)
    optimizer = nnx.Optimizer(module, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, x, y, context):
        def loss(module):
            out = module(x, y, context=context)
            return (out.x_out**2).mean() + (out.context_out**2).mean()

        value, grads = nnx.value_and_grad(loss)(module)
        optimizer.update(module, grads)
        return value

    losses = [float(step(module, optimizer, **inputs)) for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]
    module.eval()
    graph, state = nnx.split(module)
    assert np.array_equal(nnx.merge(graph, state)(**inputs).x_out, module(**inputs).x_out)


INTERPRETED = {("block", "bfloat16"), ("unconditioned stack", "float32"), ("linear", "float16"), ("pre-only linear", "float32")}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if (name, dtype) in INTERPRETED else pytest.mark.gpu)
        for name in ("block", "unconditioned stack", "linear", "pre-only stack", "pre-only linear")
        for dtype in ("float32", "bfloat16", "float16")
    ],
)
def test_through_the_kernels(front, kernels, name, dtype):
    """At most twice as far from float32 as the reference path in the same dtype, plus half an ulp."""
    cls, args, kwargs = MODULES[name]
    inputs, douts = module_inputs(name, *PADDED)
    inputs = {k: frameworks.rounded(x, dtype).astype(x.dtype) for k, x in inputs.items()}
    weights = {k: frameworks.rounded(w, dtype) for k, w in front.weights(front.build(cls, *args, **kwargs)).items()}

    def results(implementation, dtype):
        module = front.load(front.build(cls, *args, **kwargs, dtype=dtype), weights)
        with front.implementation(implementation):
            return front.outs_and_grads(module, inputs, douts, dtype)

    exact, plain, got = results("reference", "float32"), results("reference", dtype), results("triton", dtype)
    for k, want in exact.items():
        error, budget = (frameworks.distance(r[k], want, np.linalg.norm) for r in (got, plain))
        assert error <= 2 * budget + max(frameworks.EPS[dtype] / 2, 1e-5 * (dtype == "float32")), k


def test_modules_can_be_pickled(front):
    inputs, douts = draw("y", "context")
    module = front.build("GPT2Block", D, HEADS, dim_feedforward=HIDDEN, dropout=0.0, conditioning=True, use_cross_attn=True)
    again = pickle.loads(pickle.dumps(module))
    assert_close(front.outs_and_grads(again, inputs, douts), front.outs_and_grads(module, inputs, douts), 0.0)
