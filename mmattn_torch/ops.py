"""The operations of mmattn on torch tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

import mmattn
from mmattn import check
from mmattn.choice import Explanation
from mmattn.op import Call, Row

from . import _bind
from ._bind import constant_under_compile, perform
from ._choice import Implementation

Streams = Tensor | tuple[Tensor, ...]
Cast = Literal["after_weight", "before_weight", "none"]
OptionalStreams = Tensor | tuple[Tensor | None, ...] | None

CORE: dict[str, Callable[..., Call]] = {}  # public name -> the function that checks its arguments


def documented(core: Callable[..., Call]):
    """Give a public function the text of the core function that it stands on."""

    def decorate(function):
        CORE[function.__name__] = core
        _bind.PARAMETERS[function.__name__] = check.parameters(core)
        function.__doc__ = (
            f"{core.__doc__.rstrip()}\n\n    implementation  overrides mmattn_torch.implementation for this call.\n    "
        )
        return function

    return decorate


def vector(v, rows=None):
    """A Row as the view that torch has for it. One that does not exist, or stands where rows want a table, is refused later."""
    there = isinstance(v, Row) and isinstance(v.array, Tensor) and _bind.is_dense(v.array) and v.exists and rows is None
    return v.array[:, v.index] if there else v


AUTOCAST = dict.fromkeys(("joint_attention", "relu_linear_attention"), ("q", "k", "v")) | dict(qk_norm_rope_attention=("qkv",))
"""The first arguments of some operations, which are taken in autocast's dtype."""


def autocast(x):
    """x in autocast's dtype where it is on, float64 as it is, as scaled_dot_product_attention takes its arguments."""
    if isinstance(x, tuple | list):
        return tuple(map(autocast, x))
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    dtype = _bind.autocast_dtype(x.device)
    return x if dtype is None else x.to(dtype)


def extent(start_pos) -> tuple[int, int] | None:
    """Smallest and largest start position; None where they cannot be seen without a synchronisation."""
    if isinstance(start_pos, int):
        return start_pos, start_pos
    if torch.compiler.is_compiling() or str(getattr(start_pos, "dtype", "")) not in (
        "int32",
        "int64",
        "torch.int32",
        "torch.int64",
    ):
        return None  # what is wrong is refused in other words
    if isinstance(start_pos, Tensor):
        wrapped = type(start_pos) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(start_pos)
        if wrapped or start_pos.device.type != "cpu" or not _bind.is_dense(start_pos):
            return None
    if 0 in start_pos.shape:
        return None
    return int(start_pos.min()), int(start_pos.max())


@constant_under_compile
def precision() -> str:
    """How float32 products are taken: torch.get_float32_matmul_precision, of which the kernels know two."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@documented(mmattn.layernorm_adaln)
def layernorm_adaln(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    scale_base: Tensor | None = None,
    shift_base: Tensor | None = None,
    eps: float = 1e-6,
    zero_centered: bool = False,
    cast: Cast = "after_weight",
    implementation: Implementation | None = None,
) -> Tensor:
    return perform(
        mmattn.layernorm_adaln, implementation, x, vector(scale, rows), vector(shift, rows), weight=weight, bias=bias, rows=rows,
        scale_base=scale_base, shift_base=shift_base, eps=eps, zero_centered=zero_centered, cast=cast,
    )  # fmt: skip


@documented(mmattn.rmsnorm_adaln)
def rmsnorm_adaln(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    scale_base: Tensor | None = None,
    shift_base: Tensor | None = None,
    eps: float = 1e-6,
    zero_centered: bool = False,
    cast: Cast = "after_weight",
    implementation: Implementation | None = None,
) -> Tensor:
    return perform(
        mmattn.rmsnorm_adaln, implementation, x, vector(scale, rows), vector(shift, rows), weight=weight, bias=bias, rows=rows,
        scale_base=scale_base, shift_base=shift_base, eps=eps, zero_centered=zero_centered, cast=cast,
    )  # fmt: skip


@documented(mmattn.layer_norm)
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    implementation: Implementation | None = None,
) -> Tensor:
    return perform(mmattn.layer_norm, implementation, x, weight, bias, eps=eps)


@documented(mmattn.rms_norm)
def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, implementation: Implementation | None = None
) -> Tensor:
    return perform(mmattn.rms_norm, implementation, x, weight, eps=eps)


@documented(mmattn.gated_residual)
def gated_residual(residual: Tensor, h: Tensor, gate: Tensor, *, implementation: Implementation | None = None) -> Tensor:
    return perform(mmattn.gated_residual, implementation, residual, h, vector(gate))


@documented(mmattn.gated_residual_norm_adaln)
def gated_residual_norm_adaln(
    residual: Tensor,
    h: Tensor,
    gate: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    center: bool = True,
    h_weight: Tensor | None = None,
    h_eps: float = 1.1920929e-7,
    eps: float = 1e-6,
    gate_fn: Literal["identity", "tanh"] = "identity",
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor]:
    return perform(
        mmattn.gated_residual_norm_adaln, implementation, residual, h, vector(gate), vector(scale), vector(shift),
        center=center, h_weight=h_weight, h_eps=h_eps, eps=eps, gate_fn=gate_fn,
    )  # fmt: skip


@documented(mmattn.qk_norm_rope)
def qk_norm_rope(
    qkv: Streams,
    q_weight: Streams,
    k_weight: Streams,
    *,
    over: Literal["width", "head"],
    eps: float = 1.1920929e-7,
    cos: OptionalStreams = None,
    sin: OptionalStreams = None,
    start_pos: Tensor | None = None,
    layout: Literal["interleaved", "half"] = "interleaved",
    implementation: Implementation | None = None,
) -> tuple[Streams, Streams]:
    static = dict(over=over, eps=eps, cos=cos, sin=sin, start_pos=start_pos, layout=layout, start_extent=extent(start_pos))
    return perform(mmattn.qk_norm_rope, implementation, qkv, q_weight, k_weight, **static)


@documented(mmattn.joint_attention)
def joint_attention(
    q: Streams,
    k: Streams,
    v: Streams,
    *,
    attn_mask: Tensor | None = None,
    key_masks: OptionalStreams = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Streams | tuple[Streams, Streams]:
    masks = dict(attn_mask=attn_mask, key_masks=key_masks, causal=causal)
    return perform(
        mmattn.joint_attention,
        implementation,
        autocast(q),
        autocast(k),
        autocast(v),
        **masks,
        scale=scale,
        return_lse=return_lse,
        precision=precision(),
    )


@documented(mmattn.qk_norm_rope_attention)
def qk_norm_rope_attention(
    qkv: Streams,
    q_weight: Streams,
    k_weight: Streams,
    *,
    over: Literal["width", "head"],
    eps: float = 1.1920929e-7,
    cos: OptionalStreams = None,
    sin: OptionalStreams = None,
    start_pos: Tensor | None = None,
    layout: Literal["interleaved", "half"] = "interleaved",
    attn_mask: Tensor | None = None,
    key_masks: OptionalStreams = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Streams | tuple[Streams, Streams]:
    norm = dict(over=over, eps=eps, cos=cos, sin=sin, start_pos=start_pos, layout=layout, start_extent=extent(start_pos))
    masks = dict(attn_mask=attn_mask, key_masks=key_masks, causal=causal)
    return perform(
        mmattn.qk_norm_rope_attention,
        implementation,
        autocast(qkv),
        q_weight,
        k_weight,
        **norm,
        **masks,
        scale=scale,
        return_lse=return_lse,
        precision=precision(),
    )


@documented(mmattn.relu_linear_attention)
def relu_linear_attention(
    q: Streams,
    k: Streams,
    v: Streams,
    *,
    key_masks: OptionalStreams = None,
    eps: float = 1e-6,
    implementation: Implementation | None = None,
) -> Streams:
    return perform(
        mmattn.relu_linear_attention,
        implementation,
        autocast(q),
        autocast(k),
        autocast(v),
        key_masks=key_masks,
        eps=eps,
        precision=precision(),
    )


def explain(op: str | Callable, *args: Any, device: torch.device | str | None = None, **kwargs: Any) -> Explanation:
    """Which path the call op(*args, **kwargs) takes, "triton" or "reference", and why. Nothing runs.

    "reference" is the op's formula in plain torch code; where a fused function of torch's takes its place, the reason names it.

    op      a public function of this package, or its name.
    device  the device to ask about; the tensors' own unless given. Meta tensors do: only shapes and dtypes count. Without a
            device they stand for tensors on the GPU, where there is one.

    Raises what the call itself would raise.
    """
    name = getattr(op, "__name__", op)
    check.choice("explain", "op", name, tuple(CORE))
    requested = kwargs.pop("implementation", None)
    if kwargs.get("start_pos") is not None:
        kwargs["start_extent"] = extent(kwargs["start_pos"])
    taken = AUTOCAST.get(name, ())
    args = (*map(autocast, args[: len(taken)]), *args[len(taken) :])
    kwargs |= {key: autocast(kwargs[key]) for key in taken if key in kwargs}
    call = _bind.checked(CORE[name], args, kwargs)
    return _bind.explain(call, requested, None if device is None else device_named(device))


def device_named(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f'explain: device is {check.shown(device)}; expected a torch.device or the name of one, "cuda" or "cpu". Name one.'
        ) from None
