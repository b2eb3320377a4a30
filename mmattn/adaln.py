"""Norm and modulation: y = (norm(x) * weight + bias) * (1 + scale) + shift.

norm is LayerNorm (center) or RMSNorm over the last axis. weight and bias (D,) are the norm's own, scale and shift one row
per sample; each may be absent.  adaLN: Peebles & Xie 2023, arXiv:2212.09748, sec. 3.2.  LayerNorm: Ba et al. 2016,
arXiv:1607.06450.  RMSNorm: Zhang & Sennrich 2019, arXiv:1910.07467.

Backward of one row, with h = norm(x) and g = dy * (1 + scale) * weight:
    dx = rstd * (g - [center] mean(g) - h * mean(g * h))
The vector gradients follow from two sums over tokens, A = sum dy * h and H = sum dy, kept per sample b:
    dscale_b = weight * A_b + bias * H_b    dshift_b = H_b
    dweight  = sum_b (1 + scale_b) * A_b    dbias    = sum_b (1 + scale_b) * H_b
The main kernel writes A and H per (sample, chunk of tokens); one small kernel reduces them in a fixed order.
Saved for the backward: x and the vectors. Mean and rstd are recomputed from the tile that the backward reads anyway.
"""

from __future__ import annotations

from functools import cache

from . import check
from ._triton import tl, triton
from .op import UNUSED, Call, Op, Plan, Row, Spec, Target, cast, cdiv, groups, next_power_of_2, row_stride, spec, wide
from .rows import gradient_spec, load_vector, per_sample, split, tile, warps


@triton.jit
def normalize(x, inside, WIDTH: tl.constexpr, EPS: tl.constexpr, CENTER: tl.constexpr):
    """norm(x) and rstd of the rows of a float32 tile [ROWS, COLS]; zeros outside."""
    if CENTER:
        mean = tl.sum(x, 1) * (1.0 / WIDTH)
        x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) * (1.0 / WIDTH) + EPS)  # [ROWS]
    return x * rstd[:, None], rstd


@triton.jit(do_not_specialize=["TOKENS", "GROUP"])
def adaln_fwd_kernel(
    x_ptr,  # (B, L, D)
    scale_ptr,  # (B, D), a row stride apart
    shift_ptr,  # (B, D), a row stride apart
    weight_ptr,  # (G, D)
    bias_ptr,  # (G, D)
    y_ptr,  # (B, L, D)
    TOKENS,  # L
    GROUP,  # samples per group, B / G
    WIDTH: tl.constexpr,  # D
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_AT: tl.constexpr,
    SHIFT_STRIDE: tl.constexpr,
    SHIFT_AT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Grid (B * cdiv(L, ROWS),): one program normalises ROWS tokens of one sample."""
    blocks = tl.cdiv(TOKENS, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows < TOKENS)[:, None] & (cols < WIDTH)[None, :]
    at = (b * TOKENS + rows)[:, None] * WIDTH + cols[None, :]

    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [ROWS, COLS]
    y, _ = normalize(x, inside, WIDTH, EPS, CENTER)
    weight = load_vector(weight_ptr, b // GROUP * WIDTH, cols, WIDTH, WEIGHTED, 1.0)  # [COLS]
    bias = load_vector(bias_ptr, b // GROUP * WIDTH, cols, WIDTH, BIASED, 0.0)
    scale = load_vector(scale_ptr, b * SCALE_STRIDE + SCALE_AT, cols, WIDTH, SCALED, 0.0)
    shift = load_vector(shift_ptr, b * SHIFT_STRIDE + SHIFT_AT, cols, WIDTH, SHIFTED, 0.0)
    if WEIGHTED or BIASED:
        y = tl.fma(y, tl.broadcast_to(weight[None, :], y.shape), tl.broadcast_to(bias[None, :], y.shape))
    if SCALED or SHIFTED:
        y = tl.fma(y, tl.broadcast_to((1.0 + scale)[None, :], y.shape), tl.broadcast_to(shift[None, :], y.shape))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["TOKENS", "CHUNKS", "BLOCKS", "GROUP"])
def adaln_bwd_kernel(
    x_ptr,  # (B, L, D)
    dy_ptr,  # (B, L, D)
    scale_ptr,  # (B, D), a row stride apart
    weight_ptr,  # (G, D)
    dx_ptr,  # (B, L, D)
    a_ptr,  # (B, CHUNKS, D) float32: sum of dy * norm(x) over the chunk's tokens
    h_ptr,  # (B, CHUNKS, D) float32: sum of dy over the chunk's tokens
    TOKENS,  # L
    CHUNKS,
    BLOCKS,  # blocks of ROWS tokens in a chunk
    GROUP,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    SCALED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    VECTORS: tl.constexpr,  # whether any vector wants a gradient
    SCALE_STRIDE: tl.constexpr,
    SCALE_AT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Grid (B * CHUNKS,): one program walks one chunk of one sample's tokens."""
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    first = (tl.program_id(0) % CHUNKS) * BLOCKS * ROWS
    cols = tl.arange(0, COLS)
    scale = load_vector(scale_ptr, b * SCALE_STRIDE + SCALE_AT, cols, WIDTH, SCALED, 0.0)
    weight = load_vector(weight_ptr, b // GROUP * WIDTH, cols, WIDTH, WEIGHTED, 1.0)
    gain = (1.0 + scale) * weight  # [COLS]
    a = tl.zeros((ROWS, COLS), tl.float32)
    h = tl.zeros((ROWS, COLS), tl.float32)
    for block in range(0, BLOCKS):
        rows = first + block * ROWS + tl.arange(0, ROWS)
        inside = (rows < TOKENS)[:, None] & (cols < WIDTH)[None, :]
        at = (b * TOKENS + rows)[:, None] * WIDTH + cols[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [ROWS, COLS]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        n, rstd = normalize(x, inside, WIDTH, EPS, CENTER)
        g = dy * gain[None, :]
        dx = tl.fma(-n, tl.broadcast_to((tl.sum(g * n, 1) * (1.0 / WIDTH))[:, None], g.shape), g)
        if CENTER:
            dx -= (tl.sum(g, 1) * (1.0 / WIDTH))[:, None]
        tl.store(dx_ptr + at, (dx * rstd[:, None]).to(dx_ptr.dtype.element_ty), mask=inside)
        if VECTORS:
            a = tl.fma(dy, n, a)
            h += dy
    if VECTORS:
        part = tl.program_id(0).to(tl.int64) * WIDTH + cols
        tl.store(a_ptr + part, tl.sum(a, 0), mask=cols < WIDTH)
        tl.store(h_ptr + part, tl.sum(h, 0), mask=cols < WIDTH)


@triton.jit(do_not_specialize=["SAMPLES", "CHUNKS", "GROUP"])
def adaln_bwd_vectors_kernel(
    a_ptr,  # (B, CHUNKS, D) float32
    h_ptr,  # (B, CHUNKS, D) float32
    scale_ptr,  # (B, D), a row stride apart
    weight_ptr,  # (G, D)
    bias_ptr,  # (G, D)
    dscale_ptr,  # (B, D)
    dshift_ptr,  # (B, D)
    dweight_ptr,  # (G, D)
    dbias_ptr,  # (G, D)
    SAMPLES,  # programs that serve a sample each: B where there is modulation, else 0; the others serve a group
    CHUNKS,
    GROUP,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_AT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Grid ((SAMPLES + groups) * cdiv(D, COLS),): one program sums COLS columns of one sample's or one group's chunks."""
    column_blocks: tl.constexpr = (WIDTH + COLS - 1) // COLS
    i = tl.program_id(0) // column_blocks
    cols = tl.program_id(0) % column_blocks * COLS + tl.arange(0, COLS)
    if i < SAMPLES:
        a = tl.zeros((ROWS, COLS), tl.float32)
        h = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, CHUNKS, ROWS):
            rows = start + tl.arange(0, ROWS)
            inside = (rows < CHUNKS)[:, None] & (cols < WIDTH)[None, :]
            at = (i.to(tl.int64) * CHUNKS + rows)[:, None] * WIDTH + cols[None, :]
            a += tl.load(a_ptr + at, mask=inside, other=0.0)
            h += tl.load(h_ptr + at, mask=inside, other=0.0)
        da = tl.sum(a, 0)
        dh = tl.sum(h, 0)
        b = i.to(tl.int64)
        if SCALED:
            weight = load_vector(weight_ptr, b // GROUP * WIDTH, cols, WIDTH, WEIGHTED, 1.0)
            bias = load_vector(bias_ptr, b // GROUP * WIDTH, cols, WIDTH, BIASED, 0.0)
            dscale = tl.fma(weight, da, bias * dh)
            tl.store(dscale_ptr + b * WIDTH + cols, dscale.to(dscale_ptr.dtype.element_ty), mask=cols < WIDTH)
        if SHIFTED:
            tl.store(dshift_ptr + b * WIDTH + cols, dh.to(dshift_ptr.dtype.element_ty), mask=cols < WIDTH)
    else:
        g = (i - SAMPLES).to(tl.int64)
        a = tl.zeros((ROWS, COLS), tl.float32)
        h = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, GROUP * CHUNKS, ROWS):
            rows = start + tl.arange(0, ROWS)
            inside = (rows < GROUP * CHUNKS)[:, None] & (cols < WIDTH)[None, :]
            at = (g * GROUP * CHUNKS + rows)[:, None] * WIDTH + cols[None, :]
            gain = tl.full((ROWS, COLS), 1.0, tl.float32)
            if SCALED:
                sample = (g * GROUP + rows // CHUNKS)[:, None] * SCALE_STRIDE + SCALE_AT
                gain += tl.load(scale_ptr + sample + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            a = tl.fma(gain, tl.load(a_ptr + at, mask=inside, other=0.0), a)
            h = tl.fma(gain, tl.load(h_ptr + at, mask=inside, other=0.0), h)
        if WEIGHTED:
            tl.store(dweight_ptr + g * WIDTH + cols, tl.sum(a, 0).to(dweight_ptr.dtype.element_ty), mask=cols < WIDTH)
        if BIASED:
            tl.store(dbias_ptr + g * WIDTH + cols, tl.sum(h, 0).to(dbias_ptr.dtype.element_ty), mask=cols < WIDTH)


def sizes(a) -> tuple[int, int, int]:
    """Samples, tokens, groups as the kernels see them: without modulation all rows of a group are one sample."""
    B, L, _ = a.x.shape
    G = max([groups(v, 1) for v in (a.weight, a.bias) if v is not None], default=1)
    return (B, L, G) if a.scale is not None or a.shift is not None else (G, B // G * L, G)


def vector_meta(a, scale_row, shift_row) -> dict[str, int]:
    """Which vectors are present, and where one sample's row of scale and shift lies."""
    meta = dict(SCALED=a.scale is not None, SHIFTED=a.shift is not None, WEIGHTED=a.weight is not None, BIASED=a.bias is not None)
    for name, v, row in (("SCALE", a.scale, scale_row), ("SHIFT", a.shift, shift_row)):
        stride = 0 if v is None else row_stride(v, 1 if row is None else 2)
        meta |= {f"{name}_STRIDE": stride, f"{name}_AT": 0 if row is None else row * a.x.shape[2]}
    return meta


def only(meta: dict, *names: str) -> tuple:
    return tuple((k, v) for k, v in meta.items() if k in names)


@cache
def fwd_plan(x: Spec, samples: int, tokens: int, G: int, meta: tuple, eps: float, center: bool) -> Plan:
    t = tile(x.shape[2])
    return Plan(
        adaln_fwd_kernel,
        grid=(samples * cdiv(tokens, t["ROWS"]),),
        outs=(x,),
        ints=dict(TOKENS=tokens, GROUP=samples // G),
        meta=dict(WIDTH=x.shape[2], EPS=eps, CENTER=center, **dict(meta), **t),
        warps=warps(t),
    )


@cache
def bwd_plan(
    target: Target, x: Spec, samples: int, tokens: int, G: int, meta: tuple, vectors: bool, eps: float, center: bool
) -> Plan:
    t = tile(x.shape[2])
    chunks, per_chunk = split(target, samples, cdiv(tokens, t["ROWS"]))
    part = Spec((samples, chunks, x.shape[2]), "float32") if vectors else UNUSED
    return Plan(
        adaln_bwd_kernel,
        grid=(samples * chunks,),
        outs=(x, part, part),
        ints=dict(TOKENS=tokens, CHUNKS=chunks, BLOCKS=per_chunk, GROUP=samples // G),
        meta=dict(WIDTH=x.shape[2], EPS=eps, CENTER=center, VECTORS=vectors, **dict(meta), **t),
        warps=warps(t),
    )


@cache
def vectors_plan(part: Spec, G: int, outs: tuple[Spec, ...], meta: tuple) -> Plan:
    samples, chunks, D = part.shape
    flags = dict(meta)
    serve_samples = samples if flags["SCALED"] or flags["SHIFTED"] else 0
    serve_groups = G if flags["WEIGHTED"] or flags["BIASED"] else 0
    rows, cols = 32, min(128, next_power_of_2(D))
    return Plan(
        adaln_bwd_vectors_kernel,
        grid=((serve_samples + serve_groups) * cdiv(D, cols),),
        outs=outs,
        ints=dict(SAMPLES=serve_samples, CHUNKS=chunks, GROUP=samples // G),
        meta=dict(WIDTH=D, **flags, ROWS=rows, COLS=cols),
        warps=4,
    )


def infer(a, **_):
    return (spec(a.x),), ()


def forward(run, a, *, eps, center, scale_row, shift_row):
    samples, tokens, G = sizes(a)
    meta = tuple(vector_meta(a, scale_row, shift_row).items())
    vectors = [a.x if v is None else v for v in (a.scale, a.shift, a.weight, a.bias)]
    return run(fwd_plan(spec(a.x), samples, tokens, G, meta, eps, center), a.x, *vectors), ()


def backward(run, a, outs, extras, douts, *, eps, center, scale_row, shift_row):
    (dy,) = douts
    samples, tokens, G = sizes(a)
    meta = vector_meta(a, scale_row, shift_row)
    present = any(v is not None for v in (a.scale, a.shift, a.weight, a.bias))
    scale, weight, bias = (a.x if v is None else v for v in (a.scale, a.weight, a.bias))
    row = only(meta, "SCALED", "WEIGHTED", "SCALE_STRIDE", "SCALE_AT")
    dx, A, H = run(bwd_plan(run.target, spec(a.x), samples, tokens, G, row, present, eps, center), a.x, dy, scale, weight)
    grads = dict(x=dx, scale=None, shift=None, weight=None, bias=None)
    if present:
        wanted = dict(scale=a.scale, shift=a.shift, weight=a.weight, bias=a.bias)
        rows = dict(scale=scale_row, shift=shift_row)
        specs = tuple(UNUSED if v is None else gradient_spec(v, rows.get(name)) for name, v in wanted.items())
        row = tuple((k, v) for k, v in meta.items() if k not in ("SHIFT_STRIDE", "SHIFT_AT"))
        vectors = run(vectors_plan(spec(A), G, specs, row), A, H, scale, weight, bias)
        grads |= {name: d for (name, v), d in zip(wanted.items(), vectors, strict=True) if v is not None}
    return grads


def per_group(xp, v, samples: int):
    """(D,) or (G, D) -> broadcastable against (B, L, D), wide."""
    v = wide(v)
    if len(v.shape) == 1:
        return v
    G, D = v.shape
    return xp.broadcast_to(v[:, None], (G, samples // G, D)).reshape(samples, 1, D)


def norm(xp, x, *, eps, center):
    if center:
        x = x - xp.mean(x, axis=-1, keepdims=True)
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)


def reference(xp, a, *, eps, center, scale_row, shift_row, norm=norm):
    x = wide(a.x)
    y = norm(xp, x, eps=eps, center=center)
    if a.weight is not None:
        y = y * per_group(xp, a.weight, x.shape[0])
    if a.bias is not None:
        y = y + per_group(xp, a.bias, x.shape[0])
    if a.scale is not None:
        y = y * (1 + per_sample(a.scale, scale_row))
    if a.shift is not None:
        y = y + per_sample(a.shift, shift_row)
    return (cast(y, spec(a.x).dtype),)


adaln = Op(
    "adaln",
    operands=("x", "scale", "shift", "weight", "bias"),
    infer=infer,
    forward=forward,
    backward=backward,
    reference=reference,
    keeps=frozenset({"x", "scale", "shift", "weight", "bias"}),
    shared={"weight": 1, "bias": 1},
    dense={"scale": 1, "shift": 1},
)


def call(op: str, x, scale=None, shift=None, weight=None, bias=None, *, eps: float, center: bool) -> Call:
    """Check the arguments of the public functions of this room, which differ in `center` and in what they accept."""
    check.rank(op, "x", x, "B, L, D", "Reshape x to batch, tokens, width.")
    dtype = check.floating(op, "x", x)
    B, _, D = x.shape
    check.width(op, "the width of x", D)
    operands, rows = dict(x=x), {}
    for name, v in (("scale", scale), ("shift", shift)):
        if v is not None:
            check.shape(op, name, v, ("B, D", (B, D)), ("B, 1, D", (B, 1, D)), remedy=f"Give one {name} row per sample of x.")
            check.vector_dtype(op, name, v, dtype, "x")
        operands[name] = v.array if isinstance(v, Row) else v
        rows[f"{name}_row"] = v.index if isinstance(v, Row) else None
    for name, v in (("weight", weight), ("bias", bias)):
        if v is not None:
            check.shape(op, name, v, ("D", (D,)), remedy=f"Give one {name} that all tokens share.")
            check.vector_dtype(op, name, v, dtype, "x")
        operands[name] = v
    static = dict(eps=check.eps(op, eps), center=center, **rows)
    return Call(adaln, operands, tuple(static.items()), lambda outs: outs[0])


def layernorm_adaln(x, scale=None, shift=None, *, eps: float = 1e-6) -> Call:
    """y = LayerNorm(x) * (1 + scale) + shift, the norm over D without weights of its own.

    x       (B, L, D) float32, bfloat16 or float16; D a multiple of 8. float64 takes the reference path.
    scale   (B, D) or (B, 1, D), float32 or x's dtype; absent means 0. A strided view is read in place.
    shift   likewise.
    eps     added to the variance.
    returns y (B, L, D) in x's dtype; statistics and arithmetic in float32, rounded once.

    Gradients come back in the shapes given. Raises ValueError or TypeError that names the argument.
    adaLN: Peebles & Xie 2023, arXiv:2212.09748. Mind the order of a chunked modulation: the seed and diffusers'
    AdaLayerNormContinuous put scale first, DiT and SD3 blocks put shift first.
    """
    return call("layernorm_adaln", x, scale, shift, eps=eps, center=True)


def rmsnorm_adaln(x, scale=None, shift=None, *, eps: float = 1e-6) -> Call:
    """y = RMSNorm(x) * (1 + scale) + shift, the norm over D without weights of its own.

    Shapes, dtypes and errors as in layernorm_adaln. RMSNorm: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    return call("rmsnorm_adaln", x, scale, shift, eps=eps, center=False)


def layer_norm(x, weight=None, bias=None, *, eps: float = 1e-6) -> Call:
    """y = LayerNorm(x) * weight + bias over the last axis.

    x (B, L, D); weight, bias (D,) in float32 or x's dtype, each may be absent. Otherwise as layernorm_adaln.
    Ba et al. 2016, arXiv:1607.06450. torch.nn.LayerNorm's eps is 1e-5; the seed's and DiT's is 1e-6.
    """
    return call("layer_norm", x, weight=weight, bias=bias, eps=eps, center=True)


def rms_norm(x, weight=None, *, eps: float = 1e-6) -> Call:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis.

    x (B, L, D); weight (D,) in float32 or x's dtype, may be absent. Otherwise as layernorm_adaln.
    Zhang & Sennrich 2019, arXiv:1910.07467. torch.nn.RMSNorm(eps=None) means 1.1920929e-7 in every dtype but float64.
    """
    return call("rms_norm", x, weight=weight, eps=eps, center=False)
