"""Weights of a user's modules from torch to Flax and back, each kind of layer: the same function, and the same bits."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from mmattn_jax import from_torch, load_safetensors, save_safetensors, to_torch  # noqa: E402

T = torch.nn
IN, OUT = 6, 8
KERNEL = (2, 3, 4)
FLAX = dict(rngs=nnx.Rngs(0))


def conv(rank: int, **how):
    return getattr(T, f"Conv{rank}d")(IN, OUT, KERNEL[:rank], **how)


def transposed(rank: int, **how):
    return getattr(T, f"ConvTranspose{rank}d")(IN, OUT, KERNEL[:rank], **how)


def flax_conv(rank: int, **how):
    return nnx.Conv(IN, OUT, KERNEL[:rank], padding="VALID", **how, **FLAX)


def flax_transposed(rank: int, **how):
    return nnx.ConvTranspose(IN, OUT, KERNEL[:rank], padding="VALID", **how, **FLAX)


def evaluated(layer, **how):
    return layer(IN, **how).eval()


# name -> (torch's layer, Flax's, axes between the batch and the features)
KINDS = {
    "Linear": (lambda: T.Linear(IN, OUT), lambda: nnx.Linear(IN, OUT, **FLAX), 1),
    "Linear without bias": (lambda: T.Linear(IN, OUT, False), lambda: nnx.Linear(IN, OUT, use_bias=False, **FLAX), 1),
    "LinearGeneral to heads": (lambda: T.Linear(IN, OUT), lambda: nnx.LinearGeneral(IN, (2, 4), **FLAX), 1),
    "LinearGeneral of heads": (lambda: T.Linear(IN, OUT), lambda: nnx.LinearGeneral((2, 3), OUT, axis=(-2, -1), **FLAX), 1),
    "PReLU": (T.PReLU, nnx.PReLU, 1),
    "Embed": (lambda: T.Embedding(IN, OUT), lambda: nnx.Embed(IN, OUT, **FLAX), 0),
    "LayerNorm": (lambda: T.LayerNorm(IN, 1e-6), lambda: nnx.LayerNorm(IN, **FLAX), 1),
    "LayerNorm without weights": (
        lambda: T.LayerNorm(IN, 1e-6, elementwise_affine=False),
        lambda: nnx.LayerNorm(IN, use_scale=False, use_bias=False, **FLAX),
        1,
    ),
    "RMSNorm": (lambda: T.RMSNorm(IN, 1e-6), lambda: nnx.RMSNorm(IN, **FLAX), 1),
    "GroupNorm": (lambda: T.GroupNorm(3, IN, 1e-6), lambda: nnx.GroupNorm(IN, 3, **FLAX), 2),
    "InstanceNorm": (lambda: T.InstanceNorm2d(IN, 1e-6, affine=True), lambda: nnx.InstanceNorm(IN, **FLAX), 2),
    "BatchNorm": (lambda: evaluated(T.BatchNorm2d), lambda: nnx.BatchNorm(IN, use_running_average=True, **FLAX), 2),
    "BatchNorm without weights": (
        lambda: evaluated(T.BatchNorm1d, affine=False),
        lambda: nnx.BatchNorm(IN, use_running_average=True, use_scale=False, use_bias=False, **FLAX),
        1,
    ),
}
for n in (1, 2, 3):
    KINDS |= {
        f"Conv {n}d": (lambda n=n: conv(n), lambda n=n: flax_conv(n), n),
        f"Conv {n}d in groups": (lambda n=n: conv(n, groups=2), lambda n=n: flax_conv(n, feature_group_count=2), n),
        f"Conv {n}d in steps": (
            lambda n=n: conv(n, stride=2, dilation=2, bias=False),
            lambda n=n: flax_conv(n, strides=2, kernel_dilation=2, use_bias=False),
            n,
        ),
        f"ConvTranspose {n}d": (lambda n=n: transposed(n), lambda n=n: flax_transposed(n), n),
        f"ConvTranspose {n}d as a gradient": (
            lambda n=n: transposed(n, stride=2),
            lambda n=n: flax_transposed(n, strides=(2,) * n, transpose_kernel=True),
            n,
        ),
    }


def randomized(module: T.Module) -> T.Module:
    generator = torch.Generator().manual_seed(0)
    for name, x in module.state_dict().items():
        x.copy_(
            torch.randn(x.shape, generator=generator).abs() + 0.5 if "var" in name else torch.randn(x.shape, generator=generator)
        )
    return module


def bits(state) -> dict:
    return {name: (x.dtype, x.shape, x.numpy().tobytes()) for name, x in state.items() if "num_batches" not in name}


def output(layer, x: np.ndarray, kind: str) -> np.ndarray:
    """Flax's result for x, channels first as in torch where there are axes behind them."""
    if kind == "Embed":
        return np.asarray(layer(jnp.arange(IN)))
    x = np.moveaxis(x, 1, -1)
    x = x.reshape(*x.shape[:-1], *getattr(layer, "in_features", (IN,))) if isinstance(layer, nnx.LinearGeneral) else x
    with jax.default_matmul_precision("highest"):
        y = np.asarray(layer(jnp.asarray(x)))
    y = y.reshape(*y.shape[: -len(layer.out_features)], -1) if isinstance(layer, nnx.LinearGeneral) else y
    return np.moveaxis(y, -1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_same_function(kind, tmp_path):
    torch_layer, flax_layer, n = KINDS[kind]
    source, layer = randomized(torch_layer()), flax_layer()
    x = np.random.default_rng(0).standard_normal((2, IN, *(9, 10, 11)[:n])).astype("f4")
    last = isinstance(source, T.Linear | T.LayerNorm | T.RMSNorm)  # torch too takes features last
    with torch.no_grad():
        if kind == "Embed":
            want = source(torch.arange(IN))
        else:
            want = source(torch.tensor(x).movedim(1, -1)).movedim(-1, 1) if last else source(torch.tensor(x))
    assert from_torch(layer, source.state_dict()) is layer
    np.testing.assert_allclose(output(layer, x, kind), want.numpy(), rtol=1e-5, atol=1e-5)

    back = to_torch(layer)
    assert bits(back) == bits(source.state_dict())
    twin = torch_layer()
    twin.load_state_dict(back, strict=True)
    save_safetensors(layer, tmp_path / "weights.safetensors")
    other = load_safetensors(flax_layer(), tmp_path / "weights.safetensors")
    assert bits(to_torch(other)) == bits(back)


class Patches(nnx.Module):
    """What a user's model may have: buffers, containers, tied weights, state that is no weight."""

    def __init__(self, rngs: nnx.Rngs):
        self.proj = nnx.Conv(3, IN, (2, 2), strides=2, padding="VALID", rngs=rngs)
        self.pos_embed = nnx.Variable(jnp.zeros((1, 4, IN)))
        self.index = nnx.Variable(jnp.zeros((4,), jnp.int32))
        self.blocks = nnx.List([nnx.Sequential(nnx.Linear(IN, IN, rngs=rngs), nnx.silu, nnx.Linear(IN, IN, rngs=rngs))])
        self.by_name = nnx.Dict(first=nnx.LayerNorm(IN, rngs=rngs))
        self.embed, self.head = nnx.Embed(5, IN, rngs=rngs), nnx.Linear(IN, 5, use_bias=False, rngs=rngs)
        self.again = self.by_name["first"]  # one layer under two names
        self.logit_scale = nnx.Param(jnp.zeros(()))
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.cache = nnx.Cache(jnp.zeros((3,)))
        self.sown = nnx.Intermediate(jnp.zeros((3,)))


class TorchPatches(T.Module):
    def __init__(self):
        super().__init__()
        self.proj = T.Conv2d(3, IN, 2, stride=2)
        self.register_buffer("pos_embed", torch.zeros(1, 4, IN))
        self.register_buffer("index", torch.zeros(4, dtype=torch.int32))
        self.blocks = T.ModuleList([T.Sequential(T.Linear(IN, IN), T.SiLU(), T.Linear(IN, IN))])
        self.by_name = T.ModuleDict(dict(first=T.LayerNorm(IN)))
        self.embed, self.head = T.Embedding(5, IN), T.Linear(IN, 5, bias=False)
        self.again = self.by_name["first"]
        self.logit_scale = T.Parameter(torch.zeros(()))


def test_a_users_module(tmp_path):
    source, module = randomized(TorchPatches()), Patches(nnx.Rngs(0))
    cache = module.cache
    from_torch(module, source.state_dict())
    assert bits(to_torch(module)) == bits(source.state_dict())
    assert np.array_equal(module.pos_embed[...], source.pos_embed.numpy())
    assert module.cache is cache and not cache[...].any()
    TorchPatches().load_state_dict(to_torch(module), strict=True)
    save_safetensors(module, tmp_path / "weights.safetensors")
    other = load_safetensors(Patches(nnx.Rngs(1)), tmp_path / "weights.safetensors")
    assert bits(to_torch(other)) == bits(source.state_dict())


def test_tied_weights():
    class Tied(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(IN, IN, use_bias=False, rngs=nnx.Rngs(0))
            self.b = nnx.Linear(IN, IN, use_bias=False, rngs=nnx.Rngs(1))
            self.b.kernel = self.a.kernel

    source, module = T.ModuleDict(dict(a=T.Linear(IN, IN, False), b=T.Linear(IN, IN, False))), Tied()
    source["b"].weight = source["a"].weight
    from_torch(module, source.state_dict())
    assert module.a.kernel is module.b.kernel
    assert bits(to_torch(module)) == bits(source.state_dict())


def test_an_abstract_module_gets_arrays():
    source = randomized(TorchPatches())
    module = nnx.eval_shape(lambda: Patches(nnx.Rngs(0)))
    from_torch(module, source.state_dict())
    assert isinstance(module.proj.kernel[...], jax.Array)
    assert bits(to_torch(module)) == bits(source.state_dict())


def test_batch_norms_counter():
    """Flax has none: it need not be there, and is 0 in what torch gets."""
    source, module = randomized(T.BatchNorm1d(IN)), nnx.BatchNorm(IN, rngs=nnx.Rngs(0))
    state = source.state_dict()
    counter = state.pop("num_batches_tracked")
    from_torch(module, state)
    got = to_torch(module)["num_batches_tracked"]
    assert got.dtype == counter.dtype and got.shape == counter.shape and got == 0
    with pytest.raises(ValueError, match=r"missing .*'running_mean'"):
        from_torch(module, {name: x for name, x in source.state_dict().items() if name != "running_mean"})
    with pytest.raises(ValueError, match=r"unexpected .*'num_batches_tracked'"):
        from_torch(nnx.Linear(IN, OUT, rngs=nnx.Rngs(0)), T.Linear(IN, OUT).state_dict() | dict(num_batches_tracked=counter))


class Dense(nnx.Module):
    """A layer of a user's own: the names are torch's, whatever they are."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((IN, OUT)))


def holding(layer) -> nnx.Module:
    module = nnx.Module()
    module.layers = nnx.List([layer])
    return module


def test_a_users_layer_is_not_transposed():
    value = torch.arange(IN * OUT).reshape(IN, OUT) + 0.5
    module = from_torch(holding(Dense()), {"layers.0.kernel": value})
    assert np.array_equal(module.layers[0].kernel[...], value.numpy())


def test_what_is_not_known_is_refused():
    linear = T.Linear(IN, OUT)
    message = (
        r"Module: the weights do not fit; missing \['layers.0.kernel'\], unexpected \['layers.0.bias', 'layers.0.weight'\]. "
        "layers.0, a Dense, has kernel, for which the weights have bias, weight. Build the module"
    )
    with pytest.raises(ValueError, match=message):
        from_torch(holding(Dense()), {f"layers.0.{name}": x for name, x in linear.state_dict().items()})
    refused = [
        nnx.Einsum("ab,bc->ac", (IN, OUT), rngs=nnx.Rngs(0)),
        nnx.LinearGeneral((2, 3), OUT, axis=(-1, -2), rngs=nnx.Rngs(0)),
        nnx.LinearGeneral(IN, OUT, batch_axis={0: 2}, rngs=nnx.Rngs(0)),
        type("Mine", (nnx.Einsum,), {})("ab,bc->ac", (IN, OUT), rngs=nnx.Rngs(0)),
    ]
    for layer in refused:
        before = jax.tree.map(np.asarray, nnx.state(layer))
        for use in (lambda module: from_torch(module, {}), to_torch, lambda module: save_safetensors(module, "nowhere")):
            with pytest.raises(
                TypeError, match=r"layers.0\S* is a \w+ of Flax, of which no counterpart in torch is known; expected"
            ):
                use(holding(layer))
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, nnx.state(layer)), before)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_narrow_floats(name, tmp_path):
    """Bit for bit, also what is no number, a lone number and no number at all."""
    dtype = getattr(torch, name)
    patterns = torch.arange(256, dtype=torch.uint8).repeat(2).view(torch.uint8)
    state = dict(
        weight=patterns.view(dtype).reshape(-1, 4), bias=torch.ones((), dtype=dtype), empty=torch.ones(0, 3, dtype=dtype)
    )
    integers = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    raw = lambda state: {k: (x.dtype, x.shape, x.view(integers).numpy().tobytes()) for k, x in state.items()}

    def module():
        m = nnx.Module()
        for key, x in state.items():
            setattr(m, key, nnx.Param(jnp.zeros(x.shape, getattr(jnp, name))))
        return m

    first = from_torch(module(), state)
    assert raw(to_torch(first)) == raw(state)
    save_safetensors(first, tmp_path / "weights.safetensors")
    assert raw(to_torch(load_safetensors(module(), tmp_path / "weights.safetensors"))) == raw(state)


def test_other_kinds_of_numbers_are_refused():
    module = lambda dtype: holding_param(jnp.zeros((3,), dtype))
    for mine, theirs in ((jnp.float32, torch.int64), (jnp.int32, torch.float32), (jnp.float32, torch.bool)):
        with pytest.raises(TypeError, match=r"w has dtype \w+; expected \w+, or what can be cast to it"):
            from_torch(module(mine), dict(w=torch.zeros(3, dtype=theirs)))
    assert from_torch(module(jnp.int32), dict(w=torch.tensor([1, 2, 3]))).w[...].tolist() == [1, 2, 3]


def holding_param(x) -> nnx.Module:
    module = nnx.Module()
    module.w = nnx.Param(x)
    return module


def test_what_is_no_tensor_is_named():
    module = holding_param(jnp.zeros((3,)))
    for x, what in (
        (np.zeros(3, "f4"), "a ndarray"),
        (torch.zeros(3, device="meta"), "on meta"),
        (torch.zeros(3).to_sparse(), "torch.sparse_coo"),
    ):
        with pytest.raises(TypeError, match=f"from_torch: w is {what}; expected a dense torch.Tensor with values"):
            from_torch(module, dict(w=x))
    assert from_torch(module, dict(w=torch._neg_view(torch.ones(3)))).w[...].tolist() == [-1.0] * 3


def test_nothing_is_written_when_a_transfer_fails(monkeypatch):
    module = Patches(nnx.Rngs(0))
    before, put, calls = bits(to_torch(module)), jax.device_put, []

    def failing(*args, **how):
        calls.append(args)
        if len(calls) == 9:
            raise RuntimeError("out of memory")
        return put(*args, **how)

    monkeypatch.setattr(jax, "device_put", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        from_torch(module, randomized(TorchPatches()).state_dict())
    assert bits(to_torch(module)) == before


def test_the_source_may_change_afterwards():
    source = randomized(TorchPatches())
    module = from_torch(Patches(nnx.Rngs(0)), source.state_dict())
    before = bits(to_torch(module))
    with torch.no_grad():
        for x in source.state_dict().values():
            x.zero_()
    assert bits(to_torch(module)) == before
