"""Norm and modulation: y = (norm(x) * weight + bias) * (1 + scale) + shift.

norm is LayerNorm (center) or RMSNorm over the last axis. weight and bias (D,) are the norm's own. scale and shift are one
row per sample, one per token, one that all tokens share, or rows of a table that each token picks from; each may have a
second addend that all tokens share. Any of them may be absent, and none is ever broadcast in memory.
adaLN: Peebles & Xie 2023, arXiv:2212.09748, sec. 3.2.  LayerNorm: Ba et al. 2016, arXiv:1607.06450.
RMSNorm: Zhang & Sennrich 2019, arXiv:1910.07467.

Backward of one row, with h = norm(x) and g = dy * (1 + scale) * weight:
    dx = rstd * (g - [center] mean(g) - h * mean(g * h))
The vector gradients follow from two sums over tokens, A = sum dy * h and H = sum dy, kept per line i, which is what one
row of scale and shift serves: a sample, or a sample's tokens that pick the same row of a table.
    dscale_i = weight * A_i + bias * H_i    dshift_i = H_i
    dweight  = sum_i (1 + scale_i) * A_i    dbias    = sum_i (1 + scale_i) * H_i
Gradients of shared vectors and tables sum those of their lines; a scale per token takes the place of (1 + scale_i) within
the sums. The main kernel writes A and H per (line, chunk of tokens); one small kernel reduces them in a fixed order, and is
left out where each line is one chunk. A program that serves a table's row reads the picks of all its chunk's tokens and the
rows of x and dy of its own tokens only, so no token is read twice and no sum needs atomics.

Saved for the backward: x and the vectors, which their owners keep alive anyway. Mean and rstd are recomputed from the tile
that the backward reads: at D = 128 in bfloat16 storing them would add 8 bytes to the 256 of a row.
"""

from __future__ import annotations

from .. import check
from ..op import Array, Call, Row, Vector
from .op import adaln


def call(
    op: str, x, scale=None, shift=None, *, weight=None, bias=None, rows=None, scale_base=None, shift_base=None, eps: float,
    center: bool, zero_centered: bool = False, cast: str = "after_weight",
) -> Call:  # fmt: skip
    """Check the arguments of the public functions of this room, which differ in `center` and in what they accept."""
    check.rank(op, "x", x, "B, L, D", "Reshape x to batch, tokens, width.")
    dtype = check.floating(op, "x", x)
    B, L, D = x.shape
    check.countable(op, "x", x)
    check.row_width(op, "the width of x", D)
    check.flag(op, "zero_centered", zero_centered)
    check.choice(op, "cast", cast, ("after_weight", "before_weight", "none"))
    if zero_centered and weight is None:
        raise ValueError(f"{op}: zero_centered=True was given without weight; expected the weight that 1 is added to. Give both.")
    operands = dict(x=x, rows=check_rows(op, rows, scale, shift, (B, L)))
    packed = {}
    for name, v, base in (("scale", scale, scale_base), ("shift", shift, shift_base)):
        if v is not None:
            check.beside(op, name, v, dtype, "x")
            if rows is not None:
                check_table(op, name, v, scale if scale is not None else shift, B, D)
            else:
                allowed = (("B, D", (B, D)), ("B, 1, D", (B, 1, D)), ("B, L, D", (B, L, D)), ("D", (D,)))
                check.shape(op, name, v, *allowed, remedy=f"Give one {name} row per sample, one per token, or one for all.")
        if base is not None:
            check.shape(op, f"{name}_base", base, ("D", (D,)), remedy="Give one row that all tokens share.")
            check.beside(op, f"{name}_base", base, dtype, "x")
        if v is not None and rows is None and len(v.shape) == 1:
            if base is not None:
                raise ValueError(
                    f"{op}: {name} has shape {tuple(v.shape)} and {name}_base was given; expected one row that all tokens share. "
                    f"Add the two and give the sum as {name}."
                )
            v, base = None, v
        table = v is not None and rows is not None and len(v.shape) == 2
        operands[name] = None if table else v.array if isinstance(v, Row) else v
        operands[f"{name}_table"] = v if table else None
        operands[f"{name}_base"] = base
        packed[f"{name}_row"] = v.index if isinstance(v, Row) else None
    for name, v in (("weight", weight), ("bias", bias)):
        if v is not None:
            check.shape(op, name, v, ("D", (D,)), remedy=f"Give one {name} that all tokens share.")
            check.beside(op, name, v, dtype, "x")
        operands[name] = v
    static = dict(eps=check.eps(op, eps), center=center, **packed, zero_centered=zero_centered, cast=cast)
    return Call(adaln, operands, tuple(static.items()), lambda outs: outs[0])


def check_rows(op: str, rows, scale, shift, want: tuple[int, int]):
    if rows is None:
        return None
    if scale is None and shift is None:
        raise ValueError(
            f"{op}: rows was given without scale and shift; expected a table that it picks from. Give scale or shift."
        )
    check.shape(op, "rows", rows, ("B, L", want), remedy="Give the number of a table row for each token of x.")
    check.integer(op, "rows", rows)
    return rows


def check_table(op: str, name: str, v, other, B: int, D: int) -> None:
    """v is a table that rows picks from; `other` is the one that came first."""
    remedy = f"With rows, {name} is a table of R rows that all samples share, or one per sample; scale and shift have one shape."
    if isinstance(v, Row):
        raise TypeError(
            f"{op}: {name} is a Row; expected a table (R, D) or (B, R, D). Give the packed array, rows picks from it."
        )
    R = other.shape[-2] if len(other.shape) in (2, 3) else None
    table, tables = ("R, D", (R, D)), ("B, R, D", (B, R, D))
    check.shape(op, name, v, *((table, tables) if v is other else (tables if len(other.shape) == 3 else table,)), remedy=remedy)
    if not R:
        raise ValueError(f"{op}: {name} has shape {tuple(v.shape)}; expected at least one row. {remedy}")


def layernorm_adaln(
    x: Array,
    scale: Vector | None = None,
    shift: Vector | None = None,
    *,
    weight: Array | None = None,
    bias: Array | None = None,
    rows: Array | None = None,
    scale_base: Array | None = None,
    shift_base: Array | None = None,
    eps: float = 1e-6,
    zero_centered: bool = False,
    cast: str = "after_weight",
) -> Call:
    """y = (LayerNorm(x) * weight + bias) * (1 + scale) + shift, the norm over D.

    x       (B, L, D) float32, bfloat16 or float16; D a multiple of 8. float64 takes the reference path.
    scale   absent means 0. (B, D) or (B, 1, D): a row per sample. (B, L, D): per token. (D,): one for all, without scale_base,
            which is the same.
            Rank 2 always means (B, D), unless rows is given. A strided view is read in place, nothing is broadcast in memory.
    shift   likewise.
    weight  (D,); absent means 1. With zero_centered, 1 + weight is meant.
    bias    (D,); absent means 0.
    rows    (B, L) int32: the row of scale and shift that each token takes. These are then tables (R, D), or (B, R, D) with one
            per sample. Numbers beyond the table are clamped to it. Meant for small tables: the backward looks at rows R times.
    scale_base, shift_base  (D,), added to scale and shift (a learned table beside an embedding).
    eps     added to the variance, 0 or more. With 0, and however small x is, the norm is of the numbers that are there; of a row
            without variance it is 0, and so is its gradient.
    cast    what of a norm with weight or bias is rounded to x's dtype before the modulation: "after_weight" its result
            (torch.nn.RMSNorm), "before_weight" also norm(x) itself (diffusers, Flux), "none" nothing.
    returns y (B, L, D) in x's dtype; statistics and arithmetic in float32, without weight and bias rounded once.

    Each vector may be float32, bfloat16 or float16, whatever x is; x's dtype is that of the result (docs/dtypes.md). Gradients
    come back in the shapes and dtypes given, all sums in a fixed order. Saved for them: x and the vectors, no statistics.
    Raises ValueError or TypeError that names the argument.
    adaLN: Peebles & Xie 2023, arXiv:2212.09748. Mind the order of a chunked modulation: the seed and diffusers'
    AdaLayerNormContinuous put scale first, DiT and SD3 blocks put shift first.
    """
    options = dict(weight=weight, bias=bias, rows=rows, scale_base=scale_base, shift_base=shift_base)
    return call("layernorm_adaln", x, scale, shift, **options, eps=eps, center=True, zero_centered=zero_centered, cast=cast)


def rmsnorm_adaln(
    x: Array,
    scale: Vector | None = None,
    shift: Vector | None = None,
    *,
    weight: Array | None = None,
    bias: Array | None = None,
    rows: Array | None = None,
    scale_base: Array | None = None,
    shift_base: Array | None = None,
    eps: float = 1e-6,
    zero_centered: bool = False,
    cast: str = "after_weight",
) -> Call:
    """y = (RMSNorm(x) * weight + bias) * (1 + scale) + shift, the norm over D.

    Arguments, dtypes and errors as in layernorm_adaln. RMSNorm: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    options = dict(weight=weight, bias=bias, rows=rows, scale_base=scale_base, shift_base=shift_base)
    return call("rmsnorm_adaln", x, scale, shift, **options, eps=eps, center=False, zero_centered=zero_centered, cast=cast)


def layer_norm(x: Array, weight: Array | None = None, bias: Array | None = None, *, eps: float = 1e-6) -> Call:
    """y = LayerNorm(x) * weight + bias over the last axis.

    x (B, L, D); weight, bias (D,), each may be absent. Otherwise as layernorm_adaln.
    Ba et al. 2016, arXiv:1607.06450. torch.nn.LayerNorm's eps is 1e-5; the seed's and DiT's is 1e-6.
    """
    return call("layer_norm", x, weight=weight, bias=bias, eps=eps, center=True)


def rms_norm(x: Array, weight: Array | None = None, *, eps: float = 1e-6) -> Call:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis.

    x (B, L, D); weight (D,), may be absent. Otherwise as layernorm_adaln.
    Zhang & Sennrich 2019, arXiv:1910.07467. torch.nn.RMSNorm(eps=None) means 1.1920929e-7 in every dtype but float64.
    """
    return call("rms_norm", x, weight=weight, eps=eps, center=False)
