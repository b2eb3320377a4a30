"""Which derivatives a call has that falls back from the kernels: the first in reverse mode, as it has with them.

Plain torch code has others too, of some operations, but not of scaled_dot_product_attention. Code that takes one on a CPU would
break on a GPU, so both refuse it; implementation="reference" has every derivative on both.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import Function

from mmattn.choice import first_only, no_gradient
from mmattn.op import Call, Operands, flatten, owners, unflatten


def refuse(name: str) -> NoReturn:
    raise RuntimeError(first_only(name))


class Entry(Function):
    """Operands on their way to the formula. constant: what the operand is called, if it has no gradient; passes: for each
    operand, whether its gradient is that of an output, which needs no kernel and may be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, constant: str | None, passes: tuple[bool, ...], *operands: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in operands)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name, constant, ctx.passes, *_ = inputs
        ctx.set_materialize_grads(False)
        if constant is not None and any(ctx.needs_input_grad):
            raise RuntimeError(no_gradient(ctx.name, constant, "detach it"))

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        if torch.is_grad_enabled():
            once = lambda g, passes: g if g is None or passes else Gradient.apply(g, ctx.name)
            gradients = map(once, gradients, ctx.passes)
        return None, None, None, *gradients

    @staticmethod
    def jvp(ctx, *_):
        refuse(ctx.name)


class Gradient(Function):
    """An operand's gradient, which is not differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, name: str) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.name = inputs

    @staticmethod
    def backward(ctx, *_):
        refuse(ctx.name)

    @staticmethod
    def jvp(ctx, *_):
        refuse(ctx.name)


def guarded(call: Call, plain: bool) -> Operands:
    """A call's operands, of which only a first derivative in reverse mode can be taken. plain: nobody transforms what runs."""
    if plain and not torch.is_grad_enabled():
        return Operands(**call.operands)
    arrays, layout = flatten(call.op, call.operands)
    names = owners(layout)
    found = [i for i, x in enumerate(arrays) if x.is_floating_point() and (x.requires_grad or not plain)]
    # All results of a function require a gradient if one of its operands does. Which operands do is known where nothing is
    # transformed: there one function takes them, in the time of one.
    apply = super(Function, Entry).apply if plain else Entry.apply  # the latter inspects signatures, in five times the time
    together = [i for i in found if plain and names[i] not in call.op.constant]
    for group in [together] * bool(together) + [[i] for i in found if i not in together]:
        constant = names[group[0]] if names[group[0]] in call.op.constant else None
        passes = tuple(names[i] in call.op.passes for i in group)
        for i, x in zip(group, apply(call.name, constant, passes, *(arrays[i] for i in group)), strict=True):
            arrays[i] = x
    return unflatten(layout, arrays)
