"""Weights on disk, under the names of the torch modules; mmattn_jax reads and writes the same files."""

from __future__ import annotations

from os import PathLike

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmattn.op import spec
from mmattn.weights import Place, check_fit, existing, replacing, unreadable


def save_safetensors(module: nn.Module, path: str | PathLike) -> None:
    """Write module's state dict, every tensor in its own dtype; tensors that share memory are written one by one.

    A file that is there is replaced at once, when all has been written, and keeps its permissions. A tensor on meta or of a
    subclass of Tensor, anything else that is no dense tensor, and a path that cannot be written to raise, and change nothing.
    """
    tensors, seen = {}, set()
    for name, x in module.state_dict().items():
        check_whole("save_safetensors", name, x)
        if x.is_meta:
            raise ValueError(
                f"save_safetensors: {name} is on meta; expected a tensor with values. Load or initialise the module."
            )
        x = x.resolve_conj().resolve_neg().contiguous()  # what is written is the memory
        memory = x.device, x.untyped_storage().data_ptr()
        tensors[name] = x.clone() if memory in seen else x  # safetensors refuses memory that it has seen
        seen.add(memory)
    with replacing("save_safetensors", path) as beside:
        save_file(tensors, beside)


def load_safetensors(module: nn.Module, path: str | PathLike) -> nn.Module:
    """Fill module in place with the weights of a file and return it.

    All or nothing: missing and unexpected names and wrong shapes raise ValueError, dtypes that cannot be cast TypeError, before
    anything is written. A tensor of another float dtype is cast to its parameter's. A module on meta gets tensors on the CPU;
    ValueError where it has more on meta than the file has.
    """
    state = module.state_dict(keep_vars=True)
    for name, x in state.items():
        check_whole("load_safetensors", name, x)
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"load_safetensors: {name} was made under torch.inference_mode() and cannot be written outside of it; expected "
                "an ordinary tensor. Load under it too, or build the module outside of it."
            )
    on_meta = [name for name, x in (*module.named_parameters(), *module.named_buffers()) if x.is_meta and name not in state]
    if on_meta:
        raise ValueError(
            f"{type(module).__name__}: {on_meta} are on meta, and no file has them, since they are not in the state dict; "
            "expected values. Build the module on a device."
        )
    try:
        values = load_file(existing("load_safetensors", path))
    except SafetensorError as error:
        raise unreadable("load_safetensors", path, error) from error
    layers = dict(module.named_modules())
    owners = {name: layers.get(name.rpartition(".")[0], module) for name in state}
    places = {name: Place(spec(x), type(owners[name]).__name__) for name, x in state.items()}
    check_fit(type(module).__name__, places, {name: spec(x) for name, x in values.items()})
    made = {id(x): allocated(x) for x in state.values() if x.is_meta}  # once where several names share a parameter
    for name, x in state.items():
        if x.is_meta:
            setattr(owners[name], name.rpartition(".")[2], made[id(x)])
    module.load_state_dict(values)
    return module


def check_whole(op: str, name: str, x) -> None:
    """A state dict's entry must be a dense tensor, all of it here."""
    if type(x) not in (Tensor, nn.Parameter) or x.layout is not torch.strided:
        what = x.layout if isinstance(x, Tensor) and x.layout is not torch.strided else f"a {type(x).__name__}"
        raise TypeError(
            f"{op}: {name} is {what}; expected a dense torch.Tensor, all of it here. Gather or convert it first, for example "
            "with full_tensor() or to_dense(); torch.distributed.checkpoint knows sharded modules."
        )


def allocated(x: Tensor) -> Tensor:
    """What is on meta, on the CPU."""
    memory = torch.empty_like(x, device="cpu")
    return nn.Parameter(memory, x.requires_grad) if isinstance(x, nn.Parameter) else memory
