"""Argument checks shared by all rooms: a wrong call names the argument, what came, what was expected and the remedy."""

from __future__ import annotations

import math
import numbers

from .op import FLOATS, Row, dtype_name, row_stride


def is_array(op: str, name: str, x) -> None:
    if not (isinstance(x, Row) or (hasattr(x, "shape") and hasattr(x, "dtype"))):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}; expected an array. Convert it to this framework's array first.")
    if isinstance(x, Row) and not (isinstance(x.index, int) and len(x.array.shape) == 3 and 0 <= x.index < x.array.shape[1]):
        raise ValueError(
            f"{op}: {name} is row {x.index} of an array of shape {tuple(x.array.shape)}; expected (B, M, D) and an int from 0 to "
            "M - 1. Make the Row of a packed array where it is used; it is no argument for a jitted function."
        )


def shape(op: str, name: str, x, *allowed: tuple[str, tuple[int, ...]], remedy: str) -> None:
    """x.shape must be one of `allowed`, each given as (axes, sizes)."""
    is_array(op, name, x)
    # Ranks first: comparing sizes of unlike axes would tie a symbolic one to a number.
    if all(len(x.shape) != len(want) or tuple(x.shape) != want for _, want in allowed):
        expected = " or ".join(f"({axes}) = {want}" for axes, want in allowed)
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected {expected}. {remedy}")


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
    if extent is not None and (extent[0] < 0 or extent[1] + tokens > limit):
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
    if not all(isinstance(n, int) for n in x.shape):  # a tracer's length, which must not be compared
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


def width(op: str, name: str, size: int, low: int = 8, high: int = 16384) -> None:
    if size % 8 or not low <= size <= high:
        raise ValueError(f"{op}: {name} is {size}; expected a multiple of 8 from {low} to {high}. Pad a narrower one with zeros.")


def eps(op: str, value, name: str = "eps") -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}; expected a Python float. Pass a number, it is compiled in.")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{op}: {name} is {value}; expected a finite number >= 0. The usual values are 1e-6 and 1.1920929e-7.")
    return float(value)


def flag(op: str, name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {value!r}; expected True or False. It is compiled in.")


def choice(op: str, name: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} is {value!r}; expected one of {', '.join(map(repr, allowed))}. Pick one of them.")
