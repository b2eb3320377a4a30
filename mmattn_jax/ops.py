"""The operations of mmattn on JAX arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.extend.backend import backends
from jax.typing import ArrayLike

import mmattn
from mmattn import Row, check
from mmattn.choice import Explanation, decide
from mmattn.op import Call, flatten

from . import _bind
from ._choice import Implementation, current

F = TypeVar("F", bound=Callable)
Vector = ArrayLike | Row
Streams = ArrayLike | tuple[ArrayLike, ...]
Cast = Literal["after_weight", "before_weight", "none"]
OptionalStreams = ArrayLike | tuple[ArrayLike | None, ...] | None
ArrayStreams = jax.Array | tuple[jax.Array, ...]

OPS: dict[str, Callable] = {}
"""The public ops of this module by name."""
PARAMETERS: dict[str, dict[str, str]] = {}
"""The parameters of mmattn's functions of these names, which check the arguments."""


def is_array(x) -> bool:
    """Whether jax.numpy takes x for an array; it takes torch's tensors too, through their memory and without their gradients."""
    if isinstance(x, np.ma.MaskedArray):
        return False
    return isinstance(x, jax.Array | np.ndarray) or hasattr(x, "__jax_array__")


ARRAY = check.Kind("jax.Array", is_array, "jax.numpy.asarray")
SHAPED = ARRAY._replace(accepts=lambda x: is_array(x) or isinstance(x, jax.ShapeDtypeStruct))


def op(function: F) -> F:
    """Register a public op; its text is that of mmattn's function of this name, which checks the arguments."""
    core = getattr(mmattn, function.__name__)
    OPS[function.__name__], PARAMETERS[function.__name__] = function, check.parameters(core)
    function.__doc__ = f"{core.__doc__.rstrip()}\n\n    implementation  overrides mmattn_jax.implementation for this call.\n    "
    return function


def checked(name: str, args, kwargs, kind: check.Kind = ARRAY) -> Call:
    """The Call of mmattn's function."""
    check_buffers(name, check.arrays(name, PARAMETERS[name], args, kwargs, kind))
    kwargs = {key: as_jax(x) for key, x in kwargs.items()}
    return getattr(mmattn, name)(*map(as_jax, args), **kwargs)._replace(name=name)


def as_jax(x):
    """x, in which NumPy arrays take JAX's dtypes but stay NumPy's, so that their values can be checked."""
    if isinstance(x, Row):
        return Row(as_jax(x.array), x.index)
    if type(x) in (tuple, list):
        return type(x)(map(as_jax, x))
    if not isinstance(x, np.ndarray):
        return x
    try:
        return x.astype(jax.dtypes.canonicalize_dtype(x.dtype))
    except TypeError:  # a dtype that JAX has not, which is refused in our words
        return x


def check_buffers(op: str, arrays: list[tuple[str, Any]]) -> None:
    """No array was deleted, and those that were put on a device are all on the same one."""
    first = None
    for name, x in arrays:
        if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
            continue
        if x.is_deleted():
            raise ValueError(
                f"{op}: {name} has been deleted; expected an array with values. Do not use again what was donated to jax.jit."
            )
        if not x.committed:
            continue
        devices = x.devices()
        first = first or (name, devices)
        if devices != first[1]:
            here, there = (", ".join(sorted(map(str, some))) for some in (devices, first[1]))
            raise ValueError(
                f"{op}: {name} is on {here}; expected {there}, where {first[0]} is. "
                f"Move it with jax.device_put({name}, {first[0]}.sharding)."
            )


def extent(start_pos) -> tuple[int, int] | None:
    """Smallest and largest start position; None where they cannot be seen without a synchronisation."""
    if isinstance(start_pos, int):
        return start_pos, start_pos
    if not isinstance(start_pos, jax.Array | np.ndarray) or isinstance(start_pos, jax.core.Tracer):
        return None
    if str(start_pos.dtype) not in ("int32", "int64") or not start_pos.size:
        return None  # what of this is wrong is refused in other words
    if isinstance(start_pos, jax.Array) and any(d.platform != "cpu" for d in start_pos.devices()):
        return None
    start_pos = np.asarray(start_pos)  # under trace the array's own min would be traced
    return int(start_pos.min()), int(start_pos.max())


FINER_THAN_TF32 = (
    None, "highest", "float32", "F32_F32_F32", "F64_F64_F64", "TF32_TF32_F32_X3", "BF16_BF16_F32_X3", "BF16_BF16_F32_X6",
    "BF16_BF16_F32_X9",
)  # fmt: skip


def precision() -> str:
    """How float32 products are taken: jax_default_matmul_precision, of which the kernels know tf32, and IEEE for all that is
    finer and where it is not set."""
    return "ieee" if jax.config.jax_default_matmul_precision in FINER_THAN_TF32 else "tf32"


def call(name: str, *args, implementation: Implementation | None, **kwargs):
    return _bind.bind(checked(name, args, kwargs), implementation)


@op
def layernorm_adaln(
    x: ArrayLike,
    scale: Vector | None = None,
    shift: Vector | None = None,
    *,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    rows: ArrayLike | None = None,
    scale_base: ArrayLike | None = None,
    shift_base: ArrayLike | None = None,
    eps: float = 1e-6,
    zero_centered: bool = False,
    cast: Cast = "after_weight",
    implementation: Implementation | None = None,
) -> jax.Array:
    vectors = dict(weight=weight, bias=bias, rows=rows, scale_base=scale_base, shift_base=shift_base)
    how = dict(eps=eps, zero_centered=zero_centered, cast=cast, implementation=implementation)
    return call("layernorm_adaln", x, scale, shift, **vectors, **how)


@op
def rmsnorm_adaln(
    x: ArrayLike,
    scale: Vector | None = None,
    shift: Vector | None = None,
    *,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    rows: ArrayLike | None = None,
    scale_base: ArrayLike | None = None,
    shift_base: ArrayLike | None = None,
    eps: float = 1e-6,
    zero_centered: bool = False,
    cast: Cast = "after_weight",
    implementation: Implementation | None = None,
) -> jax.Array:
    vectors = dict(weight=weight, bias=bias, rows=rows, scale_base=scale_base, shift_base=shift_base)
    how = dict(eps=eps, zero_centered=zero_centered, cast=cast, implementation=implementation)
    return call("rmsnorm_adaln", x, scale, shift, **vectors, **how)


@op
def layer_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    implementation: Implementation | None = None,
) -> jax.Array:
    return call("layer_norm", x, weight, bias, eps=eps, implementation=implementation)


@op
def rms_norm(
    x: ArrayLike, weight: ArrayLike | None = None, *, eps: float = 1e-6, implementation: Implementation | None = None
) -> jax.Array:
    return call("rms_norm", x, weight, eps=eps, implementation=implementation)


@op
def gated_residual(residual: ArrayLike, h: ArrayLike, gate: Vector, *, implementation: Implementation | None = None) -> jax.Array:
    return call("gated_residual", residual, h, gate, implementation=implementation)


@op
def gated_residual_norm_adaln(
    residual: ArrayLike,
    h: ArrayLike,
    gate: Vector,
    scale: Vector | None = None,
    shift: Vector | None = None,
    *,
    center: bool = True,
    h_weight: ArrayLike | None = None,
    h_eps: float = 1.1920929e-7,
    eps: float = 1e-6,
    gate_fn: Literal["identity", "tanh"] = "identity",
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    how = dict(center=center, h_weight=h_weight, h_eps=h_eps, eps=eps, gate_fn=gate_fn, implementation=implementation)
    return call("gated_residual_norm_adaln", residual, h, gate, scale, shift, **how)


@op
def qk_norm_rope(
    qkv: Streams,
    q_weight: Streams,
    k_weight: Streams,
    *,
    over: Literal["width", "head"],
    eps: float = 1.1920929e-7,
    cos: OptionalStreams = None,
    sin: OptionalStreams = None,
    start_pos: ArrayLike | None = None,
    layout: Literal["interleaved", "half"] = "interleaved",
    implementation: Implementation | None = None,
) -> tuple[ArrayStreams, ArrayStreams]:
    rotation = dict(cos=cos, sin=sin, start_pos=start_pos, layout=layout, start_extent=extent(start_pos))
    return call("qk_norm_rope", qkv, q_weight, k_weight, over=over, eps=eps, **rotation, implementation=implementation)


@op
def joint_attention(
    q: Streams,
    k: Streams,
    v: Streams,
    *,
    attn_mask: ArrayLike | None = None,
    key_masks: OptionalStreams = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> ArrayStreams | tuple[ArrayStreams, ArrayStreams]:
    masks = dict(attn_mask=attn_mask, key_masks=key_masks, causal=causal)
    how = dict(scale=scale, return_lse=return_lse, precision=precision(), implementation=implementation)
    return call("joint_attention", q, k, v, **masks, **how)


@op
def qk_norm_rope_attention(
    qkv: Streams,
    q_weight: Streams,
    k_weight: Streams,
    *,
    over: Literal["width", "head"],
    eps: float = 1.1920929e-7,
    cos: OptionalStreams = None,
    sin: OptionalStreams = None,
    start_pos: ArrayLike | None = None,
    layout: Literal["interleaved", "half"] = "interleaved",
    attn_mask: ArrayLike | None = None,
    key_masks: OptionalStreams = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> ArrayStreams | tuple[ArrayStreams, ArrayStreams]:
    rotation = dict(cos=cos, sin=sin, start_pos=start_pos, layout=layout, start_extent=extent(start_pos))
    masks = dict(attn_mask=attn_mask, key_masks=key_masks, causal=causal)
    how = dict(scale=scale, return_lse=return_lse, precision=precision(), implementation=implementation)
    return call("qk_norm_rope_attention", qkv, q_weight, k_weight, over=over, eps=eps, **rotation, **masks, **how)


@op
def relu_linear_attention(
    q: Streams,
    k: Streams,
    v: Streams,
    *,
    key_masks: OptionalStreams = None,
    eps: float = 1e-6,
    implementation: Implementation | None = None,
) -> ArrayStreams:
    how = dict(eps=eps, precision=precision(), implementation=implementation)
    return call("relu_linear_attention", q, k, v, key_masks=key_masks, **how)


def explain(op: str | Callable, *args, device: jax.Device | str | None = None, **kwargs: Any) -> Explanation:
    """Which path the call `op(*args, **kwargs)` takes, "triton" or "reference", and why. Nothing is launched.

    op      a public op of this package, or its name.
    args    the call's arguments; a jax.ShapeDtypeStruct serves for an array.
    device  a device, or the name of a platform ("cuda", "cpu", ...); None: where jax.jit would run the call.

    Raises what the call itself would raise.
    """
    name = getattr(op, "__name__", op)
    check.choice("explain", "op", name, tuple(OPS))
    requested = kwargs.pop("implementation", None)
    if kwargs.get("start_pos") is not None:
        kwargs["start_extent"] = extent(kwargs["start_pos"])
    call = checked(name, args, kwargs, SHAPED)
    explanation = decide(call, requested, current(), _bind.problem(platform_of(device, jax.tree.leaves((args, kwargs)))))
    if explanation.path == "triton":
        _bind.check_sizes(name, flatten(call.op, call.operands)[0])
    return explanation


def platform_of(device: jax.Device | str | None, arrays) -> str:
    if not isinstance(device, jax.Device | str | None):
        raise TypeError(
            f'explain: device is {check.shown(device)}; expected a jax.Device, or the name of a platform, "cuda" or "cpu".'
        )
    device = device or next((d for x in arrays if isinstance(x, jax.Array) and x.committed for d in x.devices()), None)
    device = device or jax.config.jax_default_device or jax.devices()[0]
    platform = device.partition(":")[0] if isinstance(device, str) else device.platform
    if platform != "gpu":
        return platform
    return "rocm" if "rocm" in backends() else "cuda"  # "gpu" is JAX's name for both
