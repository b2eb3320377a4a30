"""Weights to and from the torch modules, and on disk under their names.

A Flax module's paths are the torch module's keys, but for Linear: kernel (in, out) there is weight (out, in) here.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TypeVar

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

M = TypeVar("M", bound=nnx.Module)


def parameters(module: nnx.Module) -> dict[str, tuple[nnx.Param, bool]]:
    """torch's name of every parameter -> (the parameter, whether torch stores it transposed)."""
    named = {}
    for path, leaf in nnx.iter_graph(module):
        if isinstance(leaf, nnx.Param):
            kernel = path[-1] == "kernel"
            named[".".join(map(str, (*path[:-1], "weight") if kernel else path))] = leaf, kernel
    return named


def read(module: nnx.Module) -> dict[str, np.ndarray]:
    """Every parameter under torch's name and in torch's layout."""
    arrays = {}
    for name, (param, transposed) in parameters(module).items():
        array = np.asarray(param[...])
        arrays[name] = np.ascontiguousarray(array.T if transposed else array)
    return arrays


def fill(module: M, arrays: Mapping[str, np.ndarray]) -> M:
    """Inverse of `read`, in place, each array in its parameter's dtype and sharding; nothing is written if anything is wrong."""
    params = parameters(module)
    missing, unexpected = sorted(params.keys() - arrays.keys()), sorted(arrays.keys() - params.keys())
    if missing or unexpected:
        raise ValueError(
            f"{type(module).__name__}: the weights do not fit; missing {missing}, unexpected {unexpected}. "
            "Build the module with the arguments that the weights were made with."
        )
    values = {name: arrays[name].T if transposed else arrays[name] for name, (_, transposed) in params.items()}
    for name, (param, transposed) in params.items():
        if values[name].shape != param.shape:
            want = param.shape[::-1] if transposed else param.shape
            raise ValueError(
                f"{type(module).__name__}: {name} has shape {arrays[name].shape}; expected {want}. "
                "Build the module with the arguments that the weights were made with."
            )
    for name, (param, _) in params.items():
        old = param.get_value()
        param.set_value(jax.device_put(values[name].astype(old.dtype), old.sharding))
    return module


def from_torch(module: M, state_dict: Mapping) -> M:
    """Fill a Flax module in place with the state dict of its torch twin, and return it.

    Strict: a missing or unexpected name or a wrong shape raises ValueError, and nothing is written. Exact where the dtypes
    agree, bfloat16 included; otherwise each tensor is cast to its parameter's dtype, as torch's load_state_dict does.
    """
    import torch

    def array(t) -> np.ndarray:
        t = t.detach().cpu()
        return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()

    return fill(module, {name: array(t) for name, t in state_dict.items()})


def to_torch(module: nnx.Module) -> dict:
    """The state dict, name -> torch.Tensor, that the torch twin of a Flax module loads with strict=True. Exact; needs torch."""
    import torch

    def tensor(a: np.ndarray):
        if a.dtype == ml_dtypes.bfloat16:
            return torch.tensor(a.view(np.int16)).view(torch.bfloat16)
        return torch.tensor(a)

    return {name: tensor(a) for name, a in read(module).items()}


def save_safetensors(module: nnx.Module, path: str | PathLike) -> None:
    """Write the parameters under torch's names and layout, each in its own dtype; mmattn_torch reads the same file."""
    save_file(read(module), path)


def load_safetensors(module: M, path: str | PathLike) -> M:
    """Fill module in place with the weights of a file and return it. Strict, as from_torch."""
    return fill(module, load_file(path))
