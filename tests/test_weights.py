"""Weights between the frameworks and to disk: the same bits, under torch's names."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

import mmattn_jax  # noqa: E402
from mmattn_jax.convert import read  # noqa: E402
from mmattn_jax.nn import GPT2Stack  # noqa: E402

ARGUMENTS = dict(depth=2, dim_base=16, num_attn_head=2, dim_feedforward=24, conditioning=True, use_cross_attn=True)


def flax_stack(dtype, key=0):
    return GPT2Stack(**ARGUMENTS, param_dtype=getattr(jnp, dtype), rngs=nnx.Rngs(key))


def bits(arrays):
    return {k: (x.dtype, x.shape, x.tobytes()) for k, x in arrays.items()}


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def dtype(request):
    return request.param


def test_flax_file_round_trip(dtype, tmp_path):
    module, other = flax_stack(dtype), flax_stack(dtype, key=1)
    want = bits(read(module))
    assert bits(read(other)) != want
    mmattn_jax.save_safetensors(module, tmp_path / "weights.safetensors")
    assert mmattn_jax.load_safetensors(other, tmp_path / "weights.safetensors") is other
    assert bits(read(other)) == want


def test_fill_is_strict_and_all_or_nothing():
    module = flax_stack("float32")
    arrays, before = {k: x + 1 for k, x in read(module).items()}, bits(read(module))
    name = "layers.1.mlp.0.weight"
    wrong = {
        "missing .*layers.1.mlp.0.weight": {k: x for k, x in arrays.items() if k != name},
        "unexpected .*layers.2.mlp.0.weight": arrays | {"layers.2.mlp.0.weight": arrays[name]},
        r"layers.1.mlp.0.weight has shape \(16, 24\); expected \(24, 16\)": arrays | {name: arrays[name].T},
    }
    for sentence, weights in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            mmattn_jax.convert.fill(module, weights)
        assert bits(read(module)) == before


def torch_stack(dtype, seed=0):
    torch = pytest.importorskip("torch")
    import mmattn_torch.nn

    torch.manual_seed(seed)
    return mmattn_torch.nn.GPT2Stack(**ARGUMENTS, dtype=getattr(torch, dtype))


def torch_bits(state):
    """As `bits`, through integers of the same width."""
    import torch

    kinds = {torch.bfloat16: np.dtype(ml_dtypes.bfloat16), torch.float16: np.dtype("float16"), torch.float32: np.dtype("float32")}
    raw = {k: t.view(torch.int16 if t.itemsize == 2 else torch.int32).numpy() for k, t in state.items()}
    return {k: (kinds[state[k].dtype], x.shape, x.tobytes()) for k, x in raw.items()}


def test_between_the_frameworks(dtype):
    torch = pytest.importorskip("torch")
    source, module = torch_stack(dtype), flax_stack(dtype)
    assert mmattn_jax.from_torch(module, source.state_dict()) is module
    assert bits(read(module)) == torch_bits(source.state_dict())
    back = mmattn_jax.to_torch(module)
    assert torch_bits(back) == torch_bits(source.state_dict())
    target = torch_stack(dtype, seed=1)
    target.load_state_dict(back, strict=True)
    assert torch_bits(target.state_dict()) == torch_bits(source.state_dict())
    with torch.no_grad():
        source.layers[0].mlp[0].weight.zero_()
    assert read(module)["layers.0.mlp.0.weight"].any()


def test_one_file_for_both(dtype, tmp_path):
    source = torch_stack(dtype)
    import mmattn_torch.nn

    mmattn_torch.save_safetensors(source, tmp_path / "torch.safetensors")
    module = mmattn_jax.load_safetensors(flax_stack(dtype), tmp_path / "torch.safetensors")
    assert bits(read(module)) == torch_bits(source.state_dict())
    mmattn_jax.save_safetensors(module, tmp_path / "jax.safetensors")
    target = torch_stack(dtype, seed=1)
    assert mmattn_torch.load_safetensors(target, tmp_path / "jax.safetensors") is target
    assert torch_bits(target.state_dict()) == torch_bits(source.state_dict())


def test_other_dtypes_are_cast_as_torch_does():
    source, module = torch_stack("float32"), flax_stack("bfloat16")
    mmattn_jax.from_torch(module, source.state_dict())
    target = torch_stack("bfloat16", seed=1)
    target.load_state_dict(source.state_dict())
    assert bits(read(module)) == torch_bits(target.state_dict())
