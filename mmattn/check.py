"""Argument checks shared by all rooms: a wrong call names the argument, what came, what was expected and the remedy."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

from .op import FLOATS, Row, dtype_name, row_stride, several

FLOAT32_MAX = 3.4028234663852886e38


class Kind(NamedTuple):
    """What a framework takes for an array, and which of its functions makes one."""

    name: str
    accepts: Callable[[Any], bool]
    convert: str


def parameters(function: Callable) -> dict[str, str]:
    """The parameters of an operation's checked call, each with its annotation: Array, Streams and Vector are arrays."""
    return {name: str(p.annotation).partition(" ")[0] for name, p in inspect.signature(function).parameters.items()}


def arrays(op: str, parameters: dict[str, str], args: tuple, kwargs: dict[str, Any], kind: Kind) -> list[tuple[str, Any]]:
    """The arrays among a call's arguments, each with what errors call it. All must be of the framework's kind."""
    given = dict(zip(parameters, args, strict=False)) | kwargs
    found = []
    for name, annotation in parameters.items():
        x, more = given.get(name), ""
        if annotation == "Streams" and several(x):
            entries = [(f"{name}[{i}]", y) for i, y in enumerate(x)]
        elif annotation == "Vector" and isinstance(x, Row):
            entries = [(f"{name}.array", x.array)]
        elif annotation in ("Array", "Streams", "Vector"):
            entries, more = [(name, x)], " or a tuple of them, one per stream" * (annotation == "Streams")
        else:
            continue
        for label, y in entries:
            if y is None:
                continue
            if not kind.accepts(y):
                expected = f"a {kind.name}{more}"
                raise TypeError(f"{op}: {label} is {type_name(y)}; expected {expected}. Convert it with {kind.convert}.")
            found.append((label, y))
    return found


def is_array(op: str, name: str, x) -> None:
    if not (isinstance(x, Row) or (hasattr(x, "shape") and hasattr(x, "dtype"))):
        raise TypeError(f"{op}: {name} is {shown(x)}; expected an array. Give one.")
    if isinstance(x, Row) and not x.exists:
        raise ValueError(
            f"{op}: {name} is row {shown(x.index)} of an array of shape {tuple(x.array.shape)}; expected (B, M, D) and an int "
            "from 0 to M - 1. Make the Row of a packed array where it is used; it is no argument for a jitted function."
        )


def comparable(*sizes) -> bool:
    """Whether it can be asked which size is larger, as of numbers and of torch's symbolic sizes. Of jax.export's it cannot: JAX
    raises, but for equality."""
    return all(isinstance(n, int) or hasattr(n, "__index__") for n in sizes)


def shape(op: str, name: str, x, *allowed: tuple[str, tuple[int, ...]], remedy: str) -> None:
    """x.shape must be one of `allowed`, each given as (axes, sizes)."""
    is_array(op, name, x)
    # Ranks first: comparing sizes of unlike axes would tie a symbolic one to a number.
    if all(len(x.shape) != len(want) or tuple(x.shape) != want for _, want in allowed):
        expected = " or ".join(f"({axes}) = {want}" for axes, want in allowed)
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected {expected}. {remedy}")


def streams(op: str, name: str, x, like: tuple[str, int] | None = None) -> list[tuple[str, Any]]:
    """The entries of an argument that has one per token stream, and what errors call each; a single array is one stream.

    like: another argument and its number of streams, which this one must have; None stands for a None in each.
    """
    if several(x):
        entries = [(f"{name}[{i}]", y) for i, y in enumerate(x)]
    else:
        entries = [(name, x)] * (like[1] if x is None and like else 1)
    n = len(entries)
    if like is not None and n != like[1]:
        came = "1 entry" if n == 1 else f"{n} entries"
        raise ValueError(f"{op}: {name} has {came}; expected {like[1]}, one for each stream of {like[0]}. Give a tuple.")
    if not entries:
        raise ValueError(f"{op}: {name} is empty; expected at least one stream. Give an array, or a tuple with one per stream.")
    return entries


def rank(op: str, name: str, x, axes: str | tuple[str, ...], remedy: str) -> None:
    """x must have the rank of `axes`, "B, L, D", or of one of several."""
    is_array(op, name, x)
    allowed = (axes,) if isinstance(axes, str) else axes
    if all(len(x.shape) != len(a.split(", ")) for a in allowed):
        expected = " or ".join(f"({a})" for a in allowed)
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, rank {len(x.shape)}; expected {expected}. {remedy}")


def floating(op: str, name: str, x) -> str:
    """x's dtype, which must be float32, bfloat16, float16, or float64 (which takes the reference path)."""
    is_array(op, name, x)
    dtype = dtype_name(x)
    if dtype not in (*FLOATS, "float64"):
        raise TypeError(f"{op}: {name} has dtype {dtype}; expected {', '.join(FLOATS)} or float64. Cast it to one of them.")
    return dtype


def integer(op: str, name: str, x) -> None:
    if dtype_name(x) not in ("int32", "int64"):
        raise TypeError(f"{op}: {name} has dtype {dtype_name(x)}; expected int32 or int64. Cast it to int32.")


def positions(op: str, extent: tuple[int, int] | None, tokens: int, limit: int) -> None:
    """The smallest and largest start position, where they can be seen, must leave every token within the table."""
    if extent is not None and comparable(tokens, limit) and (extent[0] < 0 or extent[1] + tokens > limit):
        raise ValueError(
            f"{op}: start_pos reaches from {extent[0]} to {extent[1]}; expected 0 to {limit - tokens}, "
            f"the {limit} positions of the table less {tokens} tokens. Move the start, or make the table longer."
        )


def boolean(op: str, name: str, x, integers: bool = False) -> None:
    """x must be a mask: bool, or integers if they may be. A float mask may be additive, and then its zeros mean attend."""
    is_array(op, name, x)
    dtype = dtype_name(x)
    if dtype != "bool" and not (integers and "int" in dtype):
        expected = "bool or integers, True or non-zero = attend" if integers else "bool, True = attend"
        raise TypeError(
            f"{op}: {name} has dtype {dtype}; expected {expected}. "
            "Compare it first: mask == 0 for an additive mask of 0 and -inf, mask != 0 for one of 0 and 1."
        )


def beside(op: str, name: str, x, like: str, like_name: str) -> None:
    """What acts on an array of dtype `like` has any dtype of the kernels, whatever `like` is, and float64 beside float64."""
    dtype = floating(op, name, x)
    if dtype == "float64" != like:
        raise TypeError(
            f"{op}: {name} has dtype float64; expected {', '.join(FLOATS)} beside {like_name} in {like}. "
            f"Cast {name}, or {like_name} to float64."
        )


def countable(op: str, name: str, x) -> None:
    """The tokens of x (B, L, ...) are counted in 32 bits."""
    B, L = x.shape[:2]
    if isinstance(B, int) and isinstance(L, int) and B * L >= 2**31:
        raise ValueError(f"{op}: {name} has {B * L} tokens in all; expected less than 2^31. Split the batch.")


def addressable(op: str, name: str, x, dense: int) -> None:
    """The tokens of one sample of x (B, L, ...), rows of `dense` axes, are counted in 32 bits."""
    if not all(isinstance(n, int) for n in x.shape):  # a tracer's length, which is not to be tied to a number
        return
    rows, stride = x.shape[1], row_stride(x, dense) or math.prod(x.shape[2:])
    if rows * stride >= 2**31:
        raise ValueError(
            f"{op}: {name} has {rows} tokens, {stride} elements apart; expected less than 2^31 elements per sample. "
            "Split the tokens into streams."
        )


def same_dtype(op: str, name: str, x, like: str, like_name: str) -> None:
    dtype = floating(op, name, x)
    if dtype != like:
        raise TypeError(f"{op}: {name} has dtype {dtype}; expected {like_name}'s dtype, {like}. Cast {name}.")


def width(op: str, name: str, size: int, high: int, odd: str, wide: str) -> None:
    """A width is a multiple of 8 up to `high`; `wide` is the remedy for a larger one, `odd` for any other."""
    if not comparable(size):
        raise ValueError(
            f"{op}: {name} is {size}, a symbolic size; expected a number, it is compiled in. Export the function for each width."
        )
    if size % 8 or not 8 <= size <= high:
        remedy = wide if size > high else odd
        raise ValueError(f"{op}: {name} is {size}; expected a multiple of 8 from 8 to {high}. {remedy}")


def row_width(op: str, name: str, size: int) -> None:
    odd = "Build the model with such a width: padding with zeros would change a norm."
    width(op, name, size, 16384, odd, "Take the framework's own function for wider rows.")


def head_width(op: str, name: str, size: int, padded: str = "") -> None:
    """padded: how to pad narrower heads, where that changes no result."""
    odd = padded or "Choose another number of heads: padding with zeros would change a norm."
    width(op, name, size, 128, odd, "Use more heads, which are narrower, or the framework's own attention.")


def type_name(x) -> str:
    """An object's type as errors call it, "an int", "a torch.Tensor"."""
    t = type(x)
    name = t.__qualname__ if t.__module__ == "builtins" else f"{t.__module__}.{t.__qualname__}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def shown(value) -> str:
    """A wrong value as errors show it: itself where that is short, else its type."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    if value is None or isinstance(value, int | float | str):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:80]}..."
    return type_name(value)


def number(op: str, name: str, value, low: float, expected: str, remedy: str) -> float:
    """A number that is compiled in, at least `low` and finite in float32."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} is {type_name(value)}; expected a Python float. Pass a number, it is compiled in.")
    if not low <= value <= FLOAT32_MAX:
        raise ValueError(f"{op}: {name} is {shown(value)}; expected {expected}. {remedy}")
    return float(value)


def eps(op: str, value, name: str = "eps") -> float:
    return number(op, name, value, 0, "a number >= 0 that is finite in float32", "The usual values are 1e-6 and 1.1920929e-7.")


def flag(op: str, name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {shown(value)}; expected True or False. It is compiled in.")


def choice(op: str, name: str, value, allowed: tuple) -> None:
    # Types first: an array compared with a string is an array, or an error of its framework.
    if not (value is None or isinstance(value, str)) or value not in allowed:
        raise ValueError(f"{op}: {name} is {shown(value)}; expected one of {', '.join(map(repr, allowed))}. Pick one of them.")
