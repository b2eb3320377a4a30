"""Weights between the frameworks and to disk: the same bits, under torch's names."""

from __future__ import annotations

import os
import re
import warnings

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


# Files: replaced at once or not at all, and read whole or not at all


class Torch:
    def __init__(self):
        self.torch = pytest.importorskip("torch")
        import mmattn_torch

        self.ops, self.weights = mmattn_torch, mmattn_torch.weights

    def module(self, d_in=4, d_out=3, dtype="float32"):
        return self.torch.nn.Sequential(self.torch.nn.Linear(d_in, d_out, dtype=getattr(self.torch, dtype)))

    def bits(self, module):
        return {k: (str(x.dtype), x.shape, x.view(self.torch.uint8).numpy().tobytes()) for k, x in module.state_dict().items()}


class Jax:
    ops, weights = mmattn_jax, mmattn_jax.convert

    def module(self, d_in=4, d_out=3, dtype="float32"):
        return nnx.Sequential(nnx.Linear(d_in, d_out, param_dtype=getattr(jnp, dtype), rngs=nnx.Rngs(0)))

    def bits(self, module):
        return bits(read(module))


@pytest.fixture(params=[Torch, Jax], ids=["torch", "jax"])
def front(request):
    return request.param()


def test_a_failed_save_changes_nothing(front, tmp_path, monkeypatch):
    def half(arrays, path):
        with open(path, "wb") as file:
            file.write(b"half")
            raise OSError("No space left on device")

    path, module = tmp_path / "weights.safetensors", front.module()
    front.ops.save_safetensors(module, path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(front.weights, "save_file", half)
        for target in (path, tmp_path / "new"):
            with pytest.raises(OSError, match="No space left") as caught:
                front.ops.save_safetensors(module, target)
            assert caught.value.__notes__ == [f"save_safetensors: {target} has not been written; what was there is unchanged."]
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_save_is_what_a_reader_sees_or_is_not(front, tmp_path, monkeypatch):
    """Until all has been written the path has the old file."""
    path, save_file, seen = tmp_path / "weights.safetensors", front.weights.save_file, []
    front.ops.save_safetensors(front.module(), path)

    def watched(arrays, beside):
        save_file(arrays, beside)
        seen.append(front.bits(front.ops.load_safetensors(front.module(), path)))

    monkeypatch.setattr(front.weights, "save_file", watched)
    old = front.bits(front.ops.load_safetensors(front.module(), path))
    module = front.ops.load_safetensors(front.module(), path)
    changed = front.module(dtype="bfloat16")
    front.ops.save_safetensors(changed, path)
    assert seen == [old] == [front.bits(module)]
    assert front.bits(front.ops.load_safetensors(front.module(dtype="bfloat16"), path)) == front.bits(changed)


def test_permissions_and_links(front, tmp_path):
    path, link, module = tmp_path / "weights.safetensors", tmp_path / "link", front.module()
    mask = os.umask(0o027)
    try:
        front.ops.save_safetensors(module, path)
        assert path.stat().st_mode & 0o777 == 0o640  # of any new file
        path.chmod(0o664)
        link.symlink_to(path)
        path.write_bytes(b"")
        front.ops.save_safetensors(module, link)
        assert path.stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(mask)
    assert link.is_symlink() and sorted(tmp_path.iterdir()) == [link, path]
    front.ops.load_safetensors(module, path)


def test_paths_are_named(front, tmp_path):
    module = front.module()
    save, load = (lambda path: front.ops.save_safetensors(module, path)), (lambda path: front.ops.load_safetensors(module, path))
    cut, broken = tmp_path / "cut", tmp_path / "broken"
    save(cut)
    cut.write_bytes(cut.read_bytes()[:-8])
    broken.write_bytes(b"no weights")
    before = front.bits(module)
    for run, path, error, words in (
        (save, tmp_path / "a" / "b", FileNotFoundError, r"save_safetensors: the folder of {} does not exist; .* Make it first"),
        (save, tmp_path, IsADirectoryError, r"save_safetensors: {} is a folder, or a device; expected the path of a file"),
        (load, tmp_path / "none", FileNotFoundError, r"load_safetensors: there is no file {}; expected one in the safetensors"),
        (load, tmp_path, FileNotFoundError, r"load_safetensors: there is no file {}; expected"),
        (load, cut, ValueError, r"load_safetensors: {} is not in the safetensors format, or not all of it is there"),
        (load, broken, ValueError, r"load_safetensors: {} is not in the safetensors format, or not all of it is there"),
    ):
        with pytest.raises(error, match=words.format(re.escape(str(path)))):
            run(path)
    assert front.bits(module) == before and sorted(tmp_path.iterdir()) == [broken, cut]


def test_what_does_not_fit_changes_nothing(front, tmp_path):
    """The last of the weights is wrong, or one too many, or missing."""
    from safetensors.numpy import save_file

    module, path = front.module(), tmp_path / "weights.safetensors"
    before = front.bits(module)
    weights = {"0.bias": np.ones(3, "f4"), "0.weight": np.ones((3, 4), "f4")}
    rebuild = "Build the module with the arguments that the weights were made with."
    for change, error, words in (
        ({"0.weight": None}, ValueError, "missing ['0.weight'], unexpected []. "),
        ({"1.weight": np.ones(3, "f4")}, ValueError, "missing [], unexpected ['1.weight']. "),
        ({"0.weight": None, "0.kernel": np.ones(3, "f4")}, ValueError,
         "missing ['0.weight'], unexpected ['0.kernel']. 0, a Linear, has weight, for which the weights have kernel. "),
        ({"0.weight": np.ones((4, 3), "f4")}, ValueError, "0.weight has shape (4, 3); expected (3, 4). "),
        ({"0.weight": np.ones((3, 4), "i4")}, TypeError,
         "0.weight has dtype int32; expected float32, or what can be cast to it. "),
    ):  # fmt: skip
        save_file({name: x for name, x in (weights | change).items() if x is not None}, path)
        words = ("Sequential: " if error is TypeError or "shape" in words else "Sequential: the weights do not fit; ") + words
        with pytest.raises(error, match=re.escape(words + rebuild)):
            front.ops.load_safetensors(module, path)
        assert front.bits(module) == before
    save_file({name: x.astype("f2") for name, x in weights.items()}, path)
    front.ops.load_safetensors(module, path)
    assert front.bits(module) != before


@pytest.fixture
def T():
    torch = pytest.importorskip("torch")
    import mmattn_torch  # noqa: F401

    return torch.nn


def torch_round_trip(module, other, tmp_path):
    import mmattn_torch

    mmattn_torch.save_safetensors(module, tmp_path / "weights.safetensors")
    return mmattn_torch.load_safetensors(other, tmp_path / "weights.safetensors")


def tied(T, device=None):
    layers = [T.Linear(4, 4, device=device) for _ in range(2)]
    layers[1].weight = layers[0].weight
    return T.Sequential(*layers, T.BatchNorm1d(4, device=device))


def test_memory_of_torch_tensors(T, tmp_path):
    """What is tied, a view, not contiguous or negated in memory only is written as it reads."""
    import torch

    source = tied(T)
    source.register_buffer("every_other", torch.arange(10.0)[::2])
    source.register_buffer("part", source[0].weight.detach()[1:])
    source.register_buffer("negated", torch._neg_view(torch.ones(3)))
    source.register_buffer("complex", torch.view_as_complex(torch.ones(2, 2)).conj())
    source.register_buffer("none", torch.ones(0, 4))
    source.register_buffer("narrow", torch.ones((), dtype=torch.float8_e4m3fn))
    target = tied(T)
    for name, x in source.named_buffers():
        if "." not in name:
            target.register_buffer(name, torch.zeros(x.shape, dtype=x.dtype))
    torch_round_trip(source, target, tmp_path)
    for name, x in source.state_dict().items():
        assert torch.equal(target.state_dict()[name].double() if "narrow" in name else target.state_dict()[name],
                           x.double() if "narrow" in name else x), name  # fmt: skip
    assert target[0].weight is target[1].weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_module_on_meta(T, dtype, tmp_path):
    import torch

    source, target = tied(T), tied(T, device="meta").to(getattr(torch, dtype))
    target[0].bias.requires_grad_(False)
    target.register_buffer("here", torch.zeros(3))  # not on meta
    here = target.here
    source.register_buffer("here", torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_round_trip(source, target, tmp_path)
    for name, x in source.state_dict().items():
        got = target.state_dict()[name]
        assert got.dtype == (
            torch.float32 if name == "here" else x.to(target[0].weight.dtype).dtype if x.is_floating_point() else x.dtype
        )
        assert torch.equal(got, x.to(got.dtype))
    assert target[0].weight is target[1].weight and target.here is here
    assert [p.requires_grad for p in target.parameters()] == [p is not target[0].bias for p in target.parameters()]
    (tmp_path / "weights.safetensors").write_bytes(b"")  # the module does not live in the file
    target(torch.ones(2, 4, dtype=getattr(torch, dtype))).float().sum().backward()


def test_what_stays_on_meta_is_refused(T, tmp_path):
    import torch

    target = T.Sequential(T.Linear(4, 4))
    target.register_buffer("angles", torch.zeros(3, device="meta"), persistent=False)
    before = target.state_dict()["0.weight"].clone()
    with pytest.raises(ValueError, match=r"Sequential: \['angles'\] are on meta, and no file has them, .* Build the module on a"):
        torch_round_trip(T.Sequential(T.Linear(4, 4)), target, tmp_path)
    assert torch.equal(target.state_dict()["0.weight"], before)
    with pytest.raises(ValueError, match=r"save_safetensors: 0.weight is on meta; expected a tensor with values"):
        torch_round_trip(T.Sequential(T.Linear(4, 4, device="meta")), target, tmp_path)


def test_what_is_no_dense_tensor_is_refused(T, tmp_path):
    import torch

    class Tensor(torch.Tensor):
        pass

    class Extra(T.Linear):
        def get_extra_state(self):
            return dict(step=1)

        def set_extra_state(self, state): ...

    def of(parameter):
        module = T.Linear(4, 4)
        module.weight = T.Parameter(parameter)
        return module

    for bad, words in (
        (Extra(4, 4), "_extra_state is a dict"),
        (of(torch.ones(4, 4).to_sparse()), "weight is torch.sparse_coo"),
        (of(torch.ones(4, 4).as_subclass(Tensor)), "weight is a Tensor"),
        (T.LazyLinear(4), "weight is a UninitializedParameter"),
    ):
        good = T.Linear(4, 4)
        for op, source, target in (("save", bad, good), ("load", good, bad)):
            with pytest.raises(TypeError, match=f"{op}_safetensors: {words}; expected a dense torch.Tensor, all of it here"):
                torch_round_trip(source, target, tmp_path)


def test_inference_tensors_are_refused_before_anything_is_written(T, tmp_path):
    import torch

    target = T.Sequential(T.Linear(4, 4), T.Linear(4, 4))
    with torch.inference_mode():
        target[1] = T.Linear(4, 4)
    before = target.state_dict()["0.weight"].clone()
    source = T.Sequential(T.Linear(4, 4), T.Linear(4, 4))
    with pytest.raises(ValueError, match=r"1.weight was made under torch.inference_mode\(\) .* Load under it too"):
        torch_round_trip(source, target, tmp_path)
    assert torch.equal(target.state_dict()["0.weight"], before)
    with torch.inference_mode():
        torch_round_trip(source, target, tmp_path)
    assert torch.equal(target.state_dict()["1.weight"], source.state_dict()["1.weight"])
