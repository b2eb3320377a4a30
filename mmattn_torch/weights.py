"""Weights on disk, under the names of the torch modules; mmattn_jax reads and writes the same files."""

from __future__ import annotations

from os import PathLike

from safetensors.torch import load_file, save_file
from torch import nn


def save_safetensors(module: nn.Module, path: str | PathLike) -> None:
    """Write module's state dict, every tensor in its own dtype."""
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)


def load_safetensors(module: nn.Module, path: str | PathLike) -> nn.Module:
    """Fill module in place with the weights of a file and return it; missing and unexpected names raise RuntimeError."""
    module.load_state_dict(load_file(path))
    return module
