"""Plans, op and reference of norm and modulation."""

from __future__ import annotations

from ..op import UNUSED, Op, Plan, Spec, Target, cast, cdiv, dtype_name, groups, remembered, spec, ungrouped, wide, widened
from ..rows import SUM_WARPS, config, gradient_spec, per_sample, row_meta, split, sum_tile, tile
from .kernels import adaln_bwd_kernel, adaln_bwd_vectors_kernel, adaln_fwd_kernel

GATHERED = ("sample", "index")  # kinds of modulation whose gradients are sums over tokens


def kind(a, v, row: int | None) -> str:
    """What one row of scale or shift belongs to."""
    if v is None:
        return "none"
    if a.rows is not None:
        return "index"
    return "token" if row is None and len(v.shape) == 3 and v.shape[1] == a.x.shape[1] != 1 else "sample"


class Form:
    """A call as the kernels see it: its sizes, its vectors, and constants that say which are present and where they lie."""

    def __init__(self, a, scale_row, shift_row, zero_centered, cast):
        self.table = a.scale_table is not None or a.shift_table is not None
        self.scale = a.scale_table if a.scale is None else a.scale
        self.shift = a.shift_table if a.shift is None else a.shift
        kinds = dict(SCALE=kind(a, self.scale, scale_row), SHIFT=kind(a, self.shift, shift_row))
        B, L, _ = a.x.shape
        given = ((a.weight, 1), (a.bias, 1), (a.scale_base, 1), (a.shift_base, 1), (a.scale_table, 2), (a.shift_table, 2))
        self.groups = max([groups(v, rank) for v, rank in given if v is not None], default=1)
        self.lines = next(v.shape[-2] for v in (self.scale, self.shift) if v is not None) if "index" in kinds.values() else 1
        # Where no vector is a sample's own, all tokens of a group are one sample.
        whole = any(k in GATHERED for k in kinds.values())
        self.samples, self.tokens = (B, L) if whole else (self.groups, B // self.groups * L)
        affine = a.weight is not None or a.bias is not None
        modulated = set(kinds.values()) != {"none"} or a.scale_base is not None or a.shift_base is not None
        self.meta = dict(
            **kinds,
            TABLE=self.table,
            WEIGHTED=a.weight is not None,
            BIASED=a.bias is not None,
            SCALE_BASED=a.scale_base is not None,
            SHIFT_BASED=a.shift_base is not None,
            ONE=float(zero_centered),
            ROUND_NORM=affine and cast == "before_weight",
            ROUND_AFFINE=affine and modulated and cast != "none",
        )
        for name, v, row in (("SCALE", self.scale, scale_row), ("SHIFT", self.shift, shift_row)):
            self.meta |= row_meta(name, v, row)
        per_token, gathered = kinds["SCALE"] == "token", kinds["SCALE"] in GATHERED
        self.sums = dict(
            SUM_A=gathered or a.scale_base is not None or (a.weight is not None and not per_token),
            SUM_H=kinds["SHIFT"] in GATHERED
            or a.shift_base is not None
            or (a.bias is not None and (gathered or a.scale_base is not None or not per_token)),
            SUM_WA=a.weight is not None and per_token,
            SUM_WH=a.bias is not None and per_token,
        )
        self.served = self.lines * (self.groups if self.table else self.samples) if whole else 0
        self.shared = affine or a.scale_base is not None or a.shift_base is not None
        self.final = not self.shared and not self.table

    def only(self, kernel) -> tuple:
        """What a kernel takes of the constants."""
        return tuple((k, v) for k, v in (self.meta | self.sums | dict(FINAL=self.final)).items() if k in kernel.arg_names)

    def read(self, **kinds: tuple[str, ...]) -> tuple[Spec, ...]:
        """Of scale and shift those that are of these kinds: a kernel reads a row of them for each token, as it does of x."""
        return tuple(spec(getattr(self, name)) for name, some in kinds.items() if self.meta[name.upper()] in some)


def variant(meta: tuple, center: bool) -> str | None:
    """What a config was measured for: "layer" with modulation per sample, "rms" with a weight alone."""
    kinds = {kind for _, kind in meta if isinstance(kind, str)}
    return None if {"token", "index"} & kinds else "layer" if center or "sample" in kinds else "rms"


@remembered
def fwd_plan(
    target: Target, streams: tuple[Spec, ...], samples: int, tokens: int, G: int, lines: int, meta: tuple, eps: float,
    center: bool,
) -> Plan:  # fmt: skip
    c, x = config("adaln_fwd", variant(meta, center), streams, target), streams[0]
    chunks, blocks = split(target, samples, cdiv(tokens, c.rows), c)
    return Plan(
        adaln_fwd_kernel,
        grid=(samples * chunks,),
        outs=(x,),
        ints=dict(TOKENS=tokens, CHUNKS=chunks, BLOCKS=blocks, GROUP=samples // G, LINES=lines),
        meta=dict(WIDTH=x.shape[2], EPS=eps, CENTER=center, **dict(meta), **tile(x.shape[2], c), STAGES=c.stages),
        warps=c.warps,
    )


@remembered
def bwd_plan(
    target: Target, streams: tuple[Spec, ...], samples: int, tokens: int, G: int, lines: int, meta: tuple, eps: float,
    center: bool, vectors: tuple,
) -> Plan:  # fmt: skip
    """vectors: gradients of scale and shift. A launch that leaves one to the second kernel has an output of its dtype anyway,
    so that one compiled kernel serves every number of chunks."""
    c, x = config("adaln_bwd", variant(meta, center), streams, target), streams[0]
    D = x.shape[2]
    chunks, blocks = split(target, samples * lines, cdiv(tokens, c.rows), c, sums=True)
    flags = dict(meta)
    final = flags["FINAL"] and chunks == 1
    part = Spec((samples * lines, chunks, D), "float32")
    here = [
        out if final or flags[name] == "token" else Spec((1,), out.dtype)
        for name, out in zip(("SCALE", "SHIFT"), vectors, strict=True)
    ]
    sums = [part if flags[name] and not final else UNUSED for name in ("SUM_A", "SUM_H", "SUM_WA", "SUM_WH")]
    return Plan(
        adaln_bwd_kernel,
        grid=(samples * lines * chunks,),
        outs=(x, *here, *sums),
        ints=dict(TOKENS=tokens, CHUNKS=chunks, BLOCKS=blocks, GROUP=samples // G, LINES=lines),
        meta=dict(WIDTH=D, EPS=eps, CENTER=center, **flags, **tile(D, c), STAGES=c.stages),
        warps=c.warps,
    )


@remembered
def vectors_plan(width: int, served: int, shared: bool, chunks: int, samples: int, G: int, lines: int, meta: tuple, outs: tuple):
    t = sum_tile(shared, sum(dict(meta)[name] for name in ("SUM_A", "SUM_H", "SUM_WA", "SUM_WH")))
    return Plan(
        adaln_bwd_vectors_kernel,
        grid=((served + G * shared) * cdiv(width, t["COLS"]),),
        outs=outs,
        ints=dict(SERVED=served, CHUNKS=chunks, GROUP=samples // G, LINES=lines),
        meta=dict(WIDTH=width, **dict(meta), **t),
        warps=SUM_WARPS,
    )


def infer(a, **_):
    return (spec(a.x),), ()


def forward(run, a, *, eps, center, scale_row, shift_row, zero_centered, cast):
    f = Form(a, scale_row, shift_row, zero_centered, cast)
    vectors = [a.x if v is None else v for v in (f.scale, f.shift, a.weight, a.bias, a.scale_base, a.shift_base, a.rows)]
    streams = (spec(a.x), *f.read(scale=("token", "index"), shift=("token", "index")))
    plan = fwd_plan(run.target, streams, f.samples, f.tokens, f.groups, f.lines, f.only(adaln_fwd_kernel), eps, center)
    return run(plan, a.x, *vectors), ()


def backward(run, a, outs, extras, douts, *, eps, center, scale_row, shift_row, zero_centered, cast):
    (dy,) = douts
    f = Form(a, scale_row, shift_row, zero_centered, cast)
    x = spec(a.x)
    scale, weight, bias, scale_base, index = (a.x if v is None else v for v in (f.scale, a.weight, a.bias, a.scale_base, a.rows))
    wanted = dict(scale=f.scale, shift=f.shift, weight=a.weight, bias=a.bias, scale_base=a.scale_base, shift_base=a.shift_base)
    rows = dict(scale=scale_row, shift=shift_row)
    specs = {name: UNUSED if v is None else gradient_spec(v, rows.get(name)) for name, v in wanted.items()}
    sizes = (f.samples, f.tokens, f.groups, f.lines)
    vectors = (specs["scale"], specs["shift"])
    streams = (x, spec(dy), *f.read(scale=("token",)))  # a program reads its row of a table once
    plan = bwd_plan(run.target, streams, *sizes, f.only(adaln_bwd_kernel), eps, center, vectors)
    dx, dscale, dshift, A, H, WA, WH = run(plan, a.x, dy, scale, weight, bias, scale_base, index)
    here = dict(scale=dscale, shift=dshift)

    grads, chunks = here, plan.ints["CHUNKS"]
    if any(f.sums.values()) and not (f.final and chunks == 1):
        outs = tuple(UNUSED if f.meta.get(name.upper()) == "token" else out for name, out in specs.items())
        plan = vectors_plan(x.shape[2], f.served, f.shared, chunks, *sizes[::2], f.lines, f.only(adaln_bwd_vectors_kernel), outs)
        grads = dict(zip(specs, run(plan, A, H, WA, WH, scale, weight, bias, scale_base), strict=True))
        grads |= {name: d for name, d in here.items() if f.meta[name.upper()] == "token"}
    grads = {name: None if v is None else grads[name] for name, v in wanted.items()}
    for name in ("scale", "shift"):
        grads[f"{name}_table"] = grads[name] if f.table else None
        if f.table:
            grads[name] = None
    return dict(x=dx) | grads


def per_group(xp, v, samples: int):
    """(D,) or (G, D) -> broadcastable against (B, L, D)."""
    return v if len(v.shape) == 1 else ungrouped(xp, v, samples)[:, None]


UNDERFLOW = dict(float32=(2.0**-100, 2.0**99, 2.0**-120), float64=(2.0**-900, 2.0**600, 2.0**-980))
"""A mean square that has lost terms to underflow, what lifts such rows, and less than any row but one of zeros has then."""


def shows_tiny_rows(x, eps: float) -> bool:
    """Whether eps does not outweigh what rows lose to underflow."""
    return eps < UNDERFLOW[dtype_name(x)][0]


def norm(xp, x, *, eps, center):
    """The norm over the last axis. With eps 0 a row of zeros, or for LayerNorm of equal numbers, is 0, and so is its gradient;
    rows so small that their squares underflow are multiplied by a power of two first."""
    exact = shows_tiny_rows(x, eps)
    if center:
        x = x - x[..., :1] if exact else x
        x = x - xp.mean(x, axis=-1, keepdims=True)
    if not exact:
        return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)
    tiny, lift, least = UNDERFLOW[dtype_name(x)]
    small = xp.mean(x * x, axis=-1, keepdims=True) < tiny
    x = xp.where(small, x * lift, x)
    mean_square = xp.mean(x * x, axis=-1, keepdims=True)
    total = xp.where(small, mean_square + eps * lift * lift, mean_square + eps)
    none = total < least
    return xp.where(none, 0.0, x / xp.sqrt(xp.where(none, 1.0, total)))


def selected(xp, table, index):
    """Row index[b, l] of each sample's table (B, R, D), clamped to the table."""
    B, R, D = table.shape
    return table.reshape(B * R, D)[xp.clip(index, 0, R - 1) + R * xp.arange(B, like=index)[:, None]]


def modulation(xp, a, name: str, row: int | None):
    """scale or shift, broadcastable against (B, L, D); 0 if there is none."""
    v, table, base = (getattr(a, name + suffix) for suffix in ("", "_table", "_base"))
    samples = a.x.shape[0]
    m = 0 if base is None else per_group(xp, base, samples)
    if table is not None and len(table.shape) == 2:
        return m + table[xp.clip(a.rows, 0, table.shape[0] - 1)]
    if table is not None:
        v = ungrouped(xp, table, samples)
    if v is None:
        return m
    if a.rows is not None:
        return m + selected(xp, v, a.rows)
    return m + (v if kind(a, v, row) == "token" else per_sample(v, row))


def reference(xp, a, *, eps, center, scale_row, shift_row, zero_centered, cast, norm=norm):
    dtype, samples = spec(a.x).dtype, a.x.shape[0]
    w = widened(a, "x", *VECTORS)
    w.rows = a.rows
    affine = a.weight is not None or a.bias is not None
    y = norm(xp, w.x, eps=eps, center=center)
    if affine and cast == "before_weight":
        y = rounded(y, dtype)
    if a.weight is not None:
        y = y * (per_group(xp, w.weight, samples) + float(zero_centered))
    if a.bias is not None:
        y = y + per_group(xp, w.bias, samples)
    modulated = any(v is not None for v in (a.scale, a.shift, a.scale_table, a.shift_table, a.scale_base, a.shift_base))
    if modulated:
        if affine and cast != "none":
            y = rounded(y, dtype)
        y = y * (1 + modulation(xp, w, "scale", scale_row)) + modulation(xp, w, "shift", shift_row)
    return (narrow(y, dtype),)


narrow = cast


def rounded(x, dtype: str):
    return wide(narrow(x, dtype))


VECTORS = ("scale", "shift", "scale_table", "shift_table", "weight", "bias", "scale_base", "shift_base")
adaln = Op(
    "adaln",
    operands=("x", *VECTORS, "rows"),
    infer=infer,
    forward=forward,
    backward=backward,
    reference=reference,
    keeps=frozenset({"x", *VECTORS, "rows"}),
    constant=frozenset({"rows"}),
    shared={"scale_table": 2, "shift_table": 2, "weight": 1, "bias": 1, "scale_base": 1, "shift_base": 1},
    dense={"scale": 1, "shift": 1},
)
