"""Weights to and from the torch modules, and on disk under their names.

A Flax module's paths are the torch module's keys. What a layer of Flax calls otherwise, or stores in another layout, says LAYERS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import load_file, save_file

from mmattn.op import Spec, spec
from mmattn.weights import Place, check_fit, existing, replacing, unreadable

M = TypeVar("M", bound=nnx.Module)


class Weight(NamedTuple):
    """A layer's variable in torch: its name there, and its array in torch's layout and back in Flax's, of (layer, array)."""

    name: str
    to_torch: Callable[[Any, Any], Any] = lambda layer, x: x
    to_flax: Callable[[Any, Any], Any] = lambda layer, x: x


def is_linear(layer: nnx.LinearGeneral) -> bool:
    """Whether it is what nn.Linear is, over its last input axes taken as one."""
    return not layer.batch_axis and tuple(layer.axis) == tuple(range(-len(layer.in_features), 0))


def general_to_torch(layer, x):
    return x.reshape(math.prod(layer.in_features), -1).T


def general_to_flax(layer, x):
    return x.T.reshape(*layer.in_features, *layer.out_features)


def conv_to_torch(layer, x):
    """(*K, in, out) -> (out, in, *K)."""
    return x.transpose(x.ndim - 1, x.ndim - 2, *range(x.ndim - 2))


def conv_to_flax(layer, x):
    return x.transpose(*range(2, x.ndim), 1, 0)


def conv_transpose_to_torch(layer, x):
    """(*K, out, in) -> (in, out, *K) with transpose_kernel, which is the gradient of a convolution, as torch's layer is;
    (*K, in, out) and K from the other end without."""
    x = conv_to_torch(layer, x)
    return x if layer.transpose_kernel else flipped(x.swapaxes(0, 1))


def conv_transpose_to_flax(layer, x):
    return conv_to_flax(layer, x if layer.transpose_kernel else flipped(x).swapaxes(0, 1))


def flipped(x):
    """(in, out, *K) with every axis of K turned round."""
    return x[(slice(None), slice(None), *(slice(None, None, -1),) * (x.ndim - 2))]


SCALE = dict(scale=Weight("weight"))
LAYERS: dict[type, dict[str, Weight]] = {  # a variable that is not named here has the same name and layout in torch
    nnx.Linear: dict(kernel=Weight("weight", lambda layer, x: x.T, lambda layer, x: x.T)),
    nnx.LinearGeneral: dict(
        kernel=Weight("weight", general_to_torch, general_to_flax),
        bias=Weight("bias", lambda layer, x: x.reshape(-1), lambda layer, x: x.reshape(layer.out_features)),
    ),
    nnx.Conv: dict(kernel=Weight("weight", conv_to_torch, conv_to_flax)),
    nnx.ConvTranspose: dict(kernel=Weight("weight", conv_transpose_to_torch, conv_transpose_to_flax)),
    nnx.Embed: dict(embedding=Weight("weight")),
    nnx.LayerNorm: SCALE,
    nnx.RMSNorm: SCALE,
    nnx.GroupNorm: SCALE,
    nnx.InstanceNorm: SCALE,
    nnx.BatchNorm: SCALE | dict(mean=Weight("running_mean"), var=Weight("running_var")),
    nnx.PReLU: dict(negative_slope=Weight("weight", lambda layer, x: x.reshape(1), lambda layer, x: x.reshape(()))),
}
NO_WEIGHTS = (nnx.RngState, nnx.Cache, nnx.Intermediate)  # variables that no state dict has
BATCHES = "num_batches_tracked"
"""nn.BatchNorm's counter, which Flax lacks: it is passed over, and written as 0. torch reads it with momentum=None only."""


class Found(NamedTuple):
    """A variable of a module, the layer that has it, and what it is in torch."""

    variable: nnx.Variable
    layer: nnx.Module
    weight: Weight

    def spec(self) -> Spec:
        """In torch's layout."""
        value = self.variable.get_value()
        return spec(jax.eval_shape(lambda x: self.weight.to_torch(self.layer, x), jax.ShapeDtypeStruct(value.shape, value.dtype)))


def walk(node, path: tuple[str, ...] = (), within: tuple[int, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any, str]]:
    """(path of the layer, layer, variable, its attribute) of all that a module has. As in a state dict, what is shared comes as
    often as it has names."""
    if id(node) in within:  # a layer that knows one around it
        return
    if isinstance(node, nnx.Pytree):
        children = vars(node).items()
    elif isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list | tuple):
        children = enumerate(node)
    else:
        return
    for key, child in children:
        if isinstance(child, nnx.Variable):
            yield path, node, child, str(key)
        else:
            here = path if isinstance(node, nnx.Sequential) and key == "layers" else (*path, str(key))
            yield from walk(child, here, (*within, id(node)))


def known(layer, path: tuple[str, ...]) -> dict[str, Weight]:
    """What is known of a layer's class: nothing of a user's own, whose variables have torch's names and layouts."""
    for cls in type(layer).__mro__:
        if cls in LAYERS and (cls is not nnx.LinearGeneral or is_linear(layer)):
            return LAYERS[cls]
        if cls.__module__.startswith("flax.nnx.nn."):
            raise TypeError(
                f"{'.'.join(path)} is a {cls.__name__} of Flax, of which no counterpart in torch is known; expected one of "
                f"{', '.join(c.__name__ for c in LAYERS)} (LinearGeneral over the last axes). Keep its weights in a module of "
                "your own, under torch's names."
            )
    return {}


def weights(module: nnx.Module) -> dict[str, Found]:
    """torch's name of every variable that is a weight or a buffer there -> the variable."""
    found = {}
    for path, layer, variable, name in walk(module):
        if not isinstance(variable, NO_WEIGHTS):
            weight = known(layer, path).get(name) or Weight(name)
            found[".".join((*path, weight.name))] = Found(variable, layer, weight)
    return found


def counters(found: Mapping[str, Found]) -> set[str]:
    """The names of what nn.BatchNorm counts."""
    norms = (name for name, x in found.items() if x.weight.name == "running_mean" and isinstance(x.layer, nnx.BatchNorm))
    return {name.removesuffix("running_mean") + BATCHES for name in norms}


def read(module: nnx.Module) -> dict[str, np.ndarray]:
    """Every weight under torch's name and in torch's layout."""
    found = weights(module)
    array = lambda x: np.asarray(x.weight.to_torch(x.layer, np.asarray(x.variable.get_value())), order="C")
    arrays = {name: array(x) for name, x in found.items()}
    return arrays | {name: np.zeros((), np.int64) for name in sorted(counters(found))}


def fill(module: M, arrays: Mapping[str, np.ndarray]) -> M:
    """Inverse of `read`, in place, each array in its variable's dtype and sharding; nothing is written if anything is wrong."""
    found = weights(module)
    arrays = {name: x for name, x in arrays.items() if name not in counters(found)}
    places = {name: Place(x.spec(), type(x.layer).__name__) for name, x in found.items()}
    check_fit(type(module).__name__, places, {name: spec(x) for name, x in arrays.items()})
    values = []
    for name, (variable, layer, weight) in found.items():
        old = variable.get_value()
        value = weight.to_flax(layer, arrays[name]).astype(old.dtype)  # a copy, which device_put may keep
        values.append((variable, jax.device_put(value, getattr(old, "sharding", None))))
    for variable, value in values:
        variable.set_value(value)
    return module


def from_torch(module: M, state_dict: Mapping) -> M:
    """Fill a Flax module in place with the state dict of its torch twin, parameters and buffers, and return it.

    Names and layouts are converted by the kind of layer: nnx.Linear, LinearGeneral, Conv, ConvTranspose, Embed, PReLU, LayerNorm,
    RMSNorm, GroupNorm, InstanceNorm and BatchNorm are torch's layers of those names, nnx.Sequential has no `layers` in its paths,
    and variables of other modules have torch's names and layouts. Of other layers of Flax nothing is known: TypeError.

    All or nothing: a missing or unexpected name or a wrong shape raises ValueError, a dtype that cannot be cast TypeError, and
    nothing is written. Exact where the dtypes agree, bfloat16 and float8 included; a tensor of another float dtype is cast to its
    variable's, as torch's load_state_dict does. A module of nnx.eval_shape gets arrays on the default device.
    """
    return fill(module, {name: from_tensor(name, x) for name, x in state_dict.items()})


def to_torch(module: nnx.Module) -> dict:
    """The state dict, name -> torch.Tensor, that the torch twin of a Flax module loads with strict=True. Exact; needs torch."""
    return {name: to_tensor(x) for name, x in read(module).items()}


BITS = {1: "uint8", 2: "int16"}  # integers as wide as the floats that NumPy lacks


def from_tensor(name: str, x) -> np.ndarray:
    import torch

    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided or x.is_meta:
        what = f"a {type(x).__name__}" if not isinstance(x, torch.Tensor) else "on meta" if x.is_meta else x.layout
        raise TypeError(f"from_torch: {name} is {what}; expected a dense torch.Tensor with values. Convert or load it first.")
    x = x.detach().cpu().resolve_conj().resolve_neg()
    own = getattr(ml_dtypes, str(x.dtype).removeprefix("torch."), None)
    return x.numpy() if own is None else x.view(getattr(torch, BITS[x.itemsize])).numpy().view(own)


def to_tensor(x: np.ndarray):
    import torch

    if not hasattr(ml_dtypes, x.dtype.name):
        return torch.tensor(x)
    return torch.tensor(x.view(BITS[x.itemsize])).view(getattr(torch, x.dtype.name))


def save_safetensors(module: nnx.Module, path: str | PathLike) -> None:
    """Write the weights under torch's names and layout, each in its own dtype; mmattn_torch reads the same file.

    A file that is there is replaced at once, when all has been written, and keeps its permissions. Layers as in from_torch.
    """
    arrays = read(module)
    with replacing("save_safetensors", path) as beside:
        save_file(arrays, beside)


def load_safetensors(module: M, path: str | PathLike) -> M:
    """Fill module in place with the weights of a file and return it. All or nothing, as from_torch."""
    try:
        return fill(module, read_file(existing("load_safetensors", path)))
    except SafetensorError as error:
        raise unreadable("load_safetensors", path, error) from error


FLOAT8 = dict(F8_E4M3="float8_e4m3fn", F8_E5M2="float8_e5m2", F8_E4M3FNUZ="float8_e4m3fnuz", F8_E5M2FNUZ="float8_e5m2fnuz")
NUMPY = FLOAT8 | dict(BF16="bfloat16", BOOL="bool", C64="complex64")
NUMPY |= {f"{kind[0].upper()}{n}": f"{kind}{n}" for kind in ("float", "int", "uint") for n in (8, 16, 32, 64)}


def read_file(path: str | PathLike) -> dict[str, np.ndarray]:
    """The arrays of a file, float8 too, which safetensors looks for in NumPy."""
    with safe_open(path, framework="np") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    if not dtypes & FLOAT8.keys():
        return load_file(path)
    entries = dict(deserialize(Path(path).read_bytes()))
    dtype = lambda name: np.dtype(getattr(ml_dtypes, NUMPY[name], NUMPY[name]))
    return {name: np.frombuffer(x["data"], dtype(x["dtype"])).reshape(x["shape"]) for name, x in entries.items()}
