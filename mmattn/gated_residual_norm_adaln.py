"""Gated residual and the norm behind it: r = residual + gate * h, y = norm(r) * (1 + scale) + shift.

h may be RMS-normalised first, u = h * rsqrt(mean(h^2) + h_eps) and gate * u * h_weight in place of gate * h: the seed's and
Lumina2's post-norm. The gate acts as it is or as tanh(gate). adaLN-Zero: Peebles & Xie 2023, arXiv:2212.09748, sec. 3.2.
The norm's statistics are those of the r that is returned, rounded.

Backward, from the gradients dr and dy of both results, with n = norm(r), w = h_weight and u = h where there is no post-norm:
    d = dr + (the norm's dx of r, see adaln)       dresidual = d
    dh = gate * d;  behind a post-norm with v = gate * w * d:  dh = rstd_h * (v - u * mean(v * u))
    dscale = sum dy * n    dshift = sum dy    dgate = gate' * w * Q with Q = sum d * u    dh_weight = sum_b gate_b * Q_b
The three sums over a chunk's tokens are kept per (sample, chunk); one small kernel reduces them in a fixed order.
Saved for the backward: residual, h and the vectors. r is computed again from them, which costs no memory traffic: h must be
read for dgate, and residual takes the place of r.
"""

from __future__ import annotations

from . import check
from ._triton import tl, triton
from .adaln.op import norm
from .op import UNUSED, Array, Call, Op, Plan, Row, Spec, Target, Vector, cast, cdiv, groups, remembered, spec, wide, widened
from .rows import (
    SUM_WARPS,
    affine,
    config,
    gradient_spec,
    load_tile,
    load_vector,
    norm_backward,
    normalize,
    per_sample,
    products,
    rms_normalize,
    row_and_columns,
    row_meta,
    split,
    store_sums,
    sum_tile,
    tile,
)


@triton.jit
def gate_value(gate, TANH: tl.constexpr):
    """The factor that the gate stands for."""
    if TANH:  # near 0, where a gate begins, 1 - e would cancel: the series leaves out 1e-8 of it
        e = tl.exp(-2.0 * tl.abs(gate))
        far = tl.where(gate < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        g = gate * gate
        near = gate * (1.0 + g * (-1 / 3 + g * (2 / 15 + g * (-17 / 315 + g * (62 / 2835)))))
        return tl.where(tl.abs(gate) < 0.25, near, far)
    else:
        return gate


@triton.jit
def sum_rounded(residual, h, gate, h_weight, H_EPS: tl.constexpr, WIDTH: tl.constexpr, POST: tl.constexpr, dtype: tl.constexpr):
    """u, rstd_h [ROWS] and r in dtype, from tiles in float32 that are 0 outside and vectors [COLS]."""
    rstd = tl.full((h.shape[0],), 1.0, tl.float32)
    if POST:
        h, rstd = rms_normalize(h, WIDTH, H_EPS)
    r = tl.fma(tl.broadcast_to((gate * h_weight)[None, :], h.shape), h, residual)
    return h, rstd, r.to(dtype)


@triton.jit(do_not_specialize=["TOKENS", "CHUNKS", "BLOCKS", "GROUP"])
def gated_residual_norm_adaln_fwd_kernel(
    residual_ptr,  # (B, L, D)
    h_ptr,  # (B, L, D)
    gate_ptr,  # (B, D), a row stride apart
    scale_ptr,  # (B, D), a row stride apart
    shift_ptr,  # (B, D), a row stride apart
    h_weight_ptr,  # (G, D)
    r_ptr,  # (B, L, D)
    y_ptr,  # (B, L, D)
    TOKENS,  # L
    CHUNKS,
    BLOCKS,  # blocks of ROWS tokens in a chunk
    GROUP,  # samples per group, B / G
    WIDTH: tl.constexpr,  # D
    EPS: tl.constexpr,
    H_EPS: tl.constexpr,
    CENTER: tl.constexpr,
    TANH: tl.constexpr,
    POST: tl.constexpr,  # whether h is normalised
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    GATE_AT: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_AT: tl.constexpr,
    SHIFT_STRIDE: tl.constexpr,
    SHIFT_AT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (B * CHUNKS,): one program walks one chunk of one sample's tokens."""
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    first = (tl.program_id(0) % CHUNKS) * BLOCKS * ROWS
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    at = rows[:, None] * WIDTH + cols[None, :]
    gate = gate_value(load_vector(gate_ptr, b * GATE_STRIDE + GATE_AT, cols, WIDTH, True, 1.0), TANH)  # [COLS]
    h_weight = load_vector(h_weight_ptr, b // GROUP * WIDTH, cols, WIDTH, POST, 1.0)
    scale = load_vector(scale_ptr, b * SCALE_STRIDE + SCALE_AT, cols, WIDTH, SCALED, 0.0)
    shift = load_vector(shift_ptr, b * SHIFT_STRIDE + SHIFT_AT, cols, WIDTH, SHIFTED, 0.0)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        inside = (first + block * ROWS + rows < TOKENS)[:, None] & (cols < WIDTH)[None, :]
        start = (b * TOKENS + first + block * ROWS) * WIDTH
        residual = load_tile(residual_ptr + start, at, inside)  # [ROWS, COLS]
        h = load_tile(h_ptr + start, at, inside)
        _, _, r = sum_rounded(residual, h, gate, h_weight, H_EPS, WIDTH, POST, r_ptr.dtype.element_ty)
        tl.store(r_ptr + start + at, r, mask=inside)
        y, _ = normalize(r.to(tl.float32), inside, WIDTH, EPS, CENTER)
        if SCALED or SHIFTED:
            y = affine(y, (1.0 + scale)[None, :], shift[None, :])
        tl.store(y_ptr + start + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["TOKENS", "CHUNKS", "BLOCKS", "GROUP"])
def gated_residual_norm_adaln_bwd_kernel(
    residual_ptr,  # (B, L, D)
    h_ptr,  # (B, L, D)
    gate_ptr,  # (B, D), a row stride apart
    scale_ptr,  # (B, D), a row stride apart
    h_weight_ptr,  # (G, D)
    dr_ptr,  # (B, L, D)
    dy_ptr,  # (B, L, D)
    dresidual_ptr,  # (B, L, D)
    dh_ptr,  # (B, L, D)
    dgate_ptr,  # (B, D) where the sums are the gradients
    dscale_ptr,  # likewise
    dshift_ptr,  # likewise
    q_ptr,  # (B, CHUNKS, D) float32: sum of d * u over the chunk's tokens
    a_ptr,  # (B, CHUNKS, D) float32: sum of dy * norm(r)
    s_ptr,  # (B, CHUNKS, D) float32: sum of dy
    TOKENS,  # L
    CHUNKS,
    BLOCKS,  # blocks of ROWS tokens in a chunk
    GROUP,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    H_EPS: tl.constexpr,
    CENTER: tl.constexpr,
    TANH: tl.constexpr,
    POST: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    GATE_AT: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_AT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (B * CHUNKS,): one program walks one chunk of one sample's tokens."""
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    first = (tl.program_id(0) % CHUNKS) * BLOCKS * ROWS
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    at = rows[:, None] * WIDTH + cols[None, :]
    gate = gate_value(load_vector(gate_ptr, b * GATE_STRIDE + GATE_AT, cols, WIDTH, True, 1.0), TANH)  # [COLS]
    h_weight = load_vector(h_weight_ptr, b // GROUP * WIDTH, cols, WIDTH, POST, 1.0)
    gain = 1.0 + load_vector(scale_ptr, b * SCALE_STRIDE + SCALE_AT, cols, WIDTH, SCALED, 0.0)
    q = tl.zeros((ROWS, COLS), tl.float32)
    a = tl.zeros((ROWS, COLS), tl.float32)
    s = tl.zeros((ROWS, COLS), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        inside = (first + block * ROWS + rows < TOKENS)[:, None] & (cols < WIDTH)[None, :]
        start = (b * TOKENS + first + block * ROWS) * WIDTH
        residual = load_tile(residual_ptr + start, at, inside)  # [ROWS, COLS]
        h = load_tile(h_ptr + start, at, inside)
        dy = load_tile(dy_ptr + start, at, inside)
        dr = load_tile(dr_ptr + start, at, inside)
        u, rstd_h, r = sum_rounded(residual, h, gate, h_weight, H_EPS, WIDTH, POST, residual_ptr.dtype.element_ty)
        n, d = norm_backward(r.to(tl.float32), dy * gain[None, :], dr, inside, WIDTH, EPS, CENTER)
        tl.store(dresidual_ptr + start + at, d.to(dresidual_ptr.dtype.element_ty), mask=inside)
        dh = d * (gate * h_weight)[None, :]
        if POST:
            mean = tl.sum(products(dh, u), 1) * (1.0 / WIDTH)
            dh = tl.fma(-u, tl.broadcast_to(mean[:, None], dh.shape), dh) * rstd_h[:, None]
        tl.store(dh_ptr + start + at, dh.to(dh_ptr.dtype.element_ty), mask=inside)
        q = tl.fma(d, u, q)
        if SCALED:
            a = tl.fma(dy, n, a)
        if SHIFTED:
            s += dy
    part = tl.program_id(0).to(tl.int64)
    if CHUNKS == 1 and not POST and not TANH:  # the sums over a sample's only chunk are the gradients
        store_sums(dgate_ptr, part, q, cols, WIDTH)
        if SCALED:
            store_sums(dscale_ptr, part, a, cols, WIDTH)
        if SHIFTED:
            store_sums(dshift_ptr, part, s, cols, WIDTH)
    else:
        store_sums(q_ptr, part, q, cols, WIDTH)
        if SCALED:
            store_sums(a_ptr, part, a, cols, WIDTH)
        if SHIFTED:
            store_sums(s_ptr, part, s, cols, WIDTH)


@triton.jit(do_not_specialize=["SAMPLES", "CHUNKS", "GROUP"])
def gated_residual_norm_adaln_bwd_vectors_kernel(
    q_ptr,  # (B, CHUNKS, D) float32
    a_ptr,  # (B, CHUNKS, D) float32
    s_ptr,  # (B, CHUNKS, D) float32
    gate_ptr,  # (B, D), a row stride apart
    h_weight_ptr,  # (G, D)
    dgate_ptr,  # (B, D)
    dscale_ptr,  # (B, D)
    dshift_ptr,  # (B, D)
    dh_weight_ptr,  # (G, D)
    SAMPLES,  # B
    CHUNKS,
    GROUP,
    WIDTH: tl.constexpr,
    TANH: tl.constexpr,
    POST: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    GATE_AT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
):
    """Grid ((B + groups with h_weight) * cdiv(D, COLS),): one program sums COLS columns of one sample or of one group."""
    # Backwards: the groups' sums take longest, so they begin first.
    i, cols = row_and_columns(tl.num_programs(0) - 1 - tl.program_id(0), WIDTH, COLS)
    if i < SAMPLES:
        own_q = tl.zeros((ROWS, COLS), tl.float32)
        a = tl.zeros((ROWS, COLS), tl.float32)
        s = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, CHUNKS, ROWS):
            c = start + tl.arange(0, ROWS)
            valid = (c < CHUNKS)[:, None] & (cols < WIDTH)[None, :]
            own = (i * CHUNKS + c)[:, None] * WIDTH + cols[None, :]
            own_q += tl.load(q_ptr + own, mask=valid, other=0.0)
            if SCALED:
                a += tl.load(a_ptr + own, mask=valid, other=0.0)
            if SHIFTED:
                s += tl.load(s_ptr + own, mask=valid, other=0.0)
        dgate = tl.sum(own_q, 0) * load_vector(h_weight_ptr, i // GROUP * WIDTH, cols, WIDTH, POST, 1.0)
        if TANH:
            factor = gate_value(load_vector(gate_ptr, i * GATE_STRIDE + GATE_AT, cols, WIDTH, True, 1.0), TANH)
            dgate *= (1.0 - factor) * (1.0 + factor)
        tl.store(dgate_ptr + i * WIDTH + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=cols < WIDTH)
        if SCALED:
            store_sums(dscale_ptr, i, a, cols, WIDTH)
        if SHIFTED:
            store_sums(dshift_ptr, i, s, cols, WIDTH)
    else:
        g = i - SAMPLES
        q = tl.zeros((SHARED_ROWS, COLS), tl.float32)
        for start in range(0, GROUP * CHUNKS, SHARED_ROWS):
            k = start + tl.arange(0, SHARED_ROWS)
            inside = (k < GROUP * CHUNKS)[:, None] & (cols < WIDTH)[None, :]
            sample = ((g * GROUP + k // CHUNKS) * GATE_STRIDE + GATE_AT)[:, None]
            gate = gate_value(load_tile(gate_ptr, sample + cols[None, :], inside), TANH)
            at = (g * GROUP * CHUNKS + k)[:, None] * WIDTH + cols[None, :]
            q = tl.fma(gate, tl.load(q_ptr + at, mask=inside, other=0.0), q)
        store_sums(dh_weight_ptr, g, q, cols, WIDTH)


def constants(a, static: dict, kernel) -> tuple:
    """What a kernel takes of a call's constants: which vectors are present, and where one sample's row of them lies."""
    meta = dict(
        EPS=static["eps"],
        H_EPS=static["h_eps"],
        CENTER=static["center"],
        TANH=static["gate_fn"] == "tanh",
        POST=a.h_weight is not None,
        SCALED=a.scale is not None,
        SHIFTED=a.shift is not None,
    )
    for name in ("gate", "scale", "shift"):
        meta |= row_meta(name.upper(), getattr(a, name), static[f"{name}_row"])
    return tuple((k, v) for k, v in meta.items() if k in kernel.arg_names)


def variant(meta: tuple) -> str:
    """What a config was measured for."""
    return "post" if dict(meta)["POST"] else "layer"


@remembered
def fwd_plan(target: Target, x: Spec, h: Spec, G: int, meta: tuple) -> Plan:
    B, L, D = x.shape
    c = config("gated_residual_norm_adaln_fwd", variant(meta), (x, h), target)
    chunks, blocks = split(target, B, cdiv(L, c.rows), c)
    return Plan(
        gated_residual_norm_adaln_fwd_kernel,
        grid=(B * chunks,),
        outs=(x, x),
        ints=dict(TOKENS=L, CHUNKS=chunks, BLOCKS=blocks, GROUP=B // G),
        meta=dict(WIDTH=D, **dict(meta), **tile(D, c), STAGES=c.stages),
        warps=c.warps,
    )


def sums_are_gradients(chunks: int, flags: dict) -> bool:
    """Whether the sums over a sample's only chunk are what is wanted, so that no second launch is."""
    return chunks == 1 and not flags["POST"] and not flags["TANH"]


@remembered
def bwd_plan(target: Target, x: Spec, h: Spec, G: int, meta: tuple, vectors: tuple[Spec, ...]) -> Plan:
    """vectors: the gradients of gate, scale and shift. A launch that leaves them to the second kernel has outputs of their
    dtypes anyway, so that one compiled kernel serves every number of chunks."""
    B, L, D = x.shape
    c = config("gated_residual_norm_adaln_bwd", variant(meta), (x, h, x, x), target)
    chunks, blocks = split(target, B, cdiv(L, c.rows), c, sums=True)
    flags = dict(meta)
    part = Spec((B, chunks, D), "float32")
    sums = [part if wanted else UNUSED for wanted in (True, flags["SCALED"], flags["SHIFTED"])]
    if sums_are_gradients(chunks, flags):
        sums = [UNUSED] * 3
    else:
        vectors = [Spec((1,), out.dtype) for out in vectors]
    return Plan(
        gated_residual_norm_adaln_bwd_kernel,
        grid=(B * chunks,),
        outs=(x, h, *vectors, *sums),
        ints=dict(TOKENS=L, CHUNKS=chunks, BLOCKS=blocks, GROUP=B // G),
        meta=dict(WIDTH=D, **flags, **tile(D, c), STAGES=c.stages),
        warps=c.warps,
    )


@remembered
def vectors_plan(samples: int, chunks: int, width: int, G: int, meta: tuple, outs: tuple[Spec, ...]) -> Plan:
    t = sum_tile(dict(meta)["POST"], 1)
    return Plan(
        gated_residual_norm_adaln_bwd_vectors_kernel,
        grid=((samples + G * dict(meta)["POST"]) * cdiv(width, t["COLS"]),),
        outs=outs,
        ints=dict(SAMPLES=samples, CHUNKS=chunks, GROUP=samples // G),
        meta=dict(WIDTH=width, **dict(meta), **t),
        warps=SUM_WARPS,
    )


def number_of_groups(a) -> int:
    return 1 if a.h_weight is None else groups(a.h_weight, 1)


def infer(a, **_):
    return (spec(a.residual), spec(a.residual)), ()


def forward(run, a, **static):
    vectors = [a.residual if v is None else v for v in (a.gate, a.scale, a.shift, a.h_weight)]
    meta = constants(a, static, gated_residual_norm_adaln_fwd_kernel)
    plan = fwd_plan(run.target, spec(a.residual), spec(a.h), number_of_groups(a), meta)
    return run(plan, a.residual, a.h, *vectors), ()


def backward(run, a, outs, extras, douts, **static):
    dr, dy = douts
    G, (B, _, D) = number_of_groups(a), a.residual.shape
    scale, h_weight = (a.residual if v is None else v for v in (a.scale, a.h_weight))
    wanted = dict(gate=a.gate, scale=a.scale, shift=a.shift)
    specs = [UNUSED if v is None else gradient_spec(v, static[f"{name}_row"]) for name, v in wanted.items()]
    meta = constants(a, static, gated_residual_norm_adaln_bwd_kernel)
    plan = bwd_plan(run.target, spec(a.residual), spec(a.h), G, meta, tuple(specs))
    dresidual, dh, *rest = run(plan, a.residual, a.h, a.gate, scale, h_weight, dr, dy)
    vectors, sums = rest[:3], rest[3:]
    dh_weight = None
    if not sums_are_gradients(plan.ints["CHUNKS"], plan.meta):
        meta = constants(a, static, gated_residual_norm_adaln_bwd_vectors_kernel)
        outs = (*specs, UNUSED if a.h_weight is None else spec(a.h_weight))
        plan = vectors_plan(B, plan.ints["CHUNKS"], D, G, meta, outs)
        *vectors, dh_weight = run(plan, *sums, a.gate, h_weight)
    grads = {name: None if v is None else d for (name, v), d in zip(wanted.items(), vectors, strict=True)}
    return dict(residual=dresidual, h=dh, h_weight=None if a.h_weight is None else dh_weight) | grads


def reference(xp, a, *, center, eps, h_eps, gate_fn, gate_row, scale_row, shift_row, norm=norm):
    dtype, w = spec(a.residual).dtype, widened(a, "residual", "h", *VECTORS)
    h, gate, weight = w.h, per_sample(w.gate, gate_row), w.h_weight
    if weight is not None:
        if len(weight.shape) == 2:
            G, D = weight.shape
            weight = xp.broadcast_to(weight[:, None], (G, h.shape[0] // G, D)).reshape(h.shape[0], 1, D)
        h = norm(xp, h, eps=h_eps, center=False) * weight
    r = cast(w.residual + (xp.tanh(gate) if gate_fn == "tanh" else gate) * h, dtype)
    y = norm(xp, wide(r), eps=eps, center=center)
    if w.scale is not None:
        y = y * (1 + per_sample(w.scale, scale_row))
    if w.shift is not None:
        y = y + per_sample(w.shift, shift_row)
    return r, cast(y, dtype)


VECTORS = ("gate", "scale", "shift", "h_weight")
gated_residual_norm_adaln_op = Op(
    "gated_residual_norm_adaln",
    operands=("residual", "h", *VECTORS),
    infer=infer,
    forward=forward,
    backward=backward,
    reference=reference,
    keeps=frozenset({"residual", "h", *VECTORS}),
    shared={"h_weight": 1},
    dense={"gate": 1, "scale": 1, "shift": 1},
)


def gated_residual_norm_adaln(
    residual: Array,
    h: Array,
    gate: Vector,
    scale: Vector | None = None,
    shift: Vector | None = None,
    *,
    center: bool = True,
    h_weight: Array | None = None,
    h_eps: float = 1.1920929e-7,
    eps: float = 1e-6,
    gate_fn: str = "identity",
) -> Call:
    """r = residual + gate * h and y = norm(r) * (1 + scale) + shift, as one launch. Returns (r, y).

    residual, h  (B, L, D) float32, bfloat16 or float16, each its own; D a multiple of 8. float64 takes the reference path.
    gate         (B, D) or (B, 1, D), any of these dtypes. A strided view is read in place.
    scale, shift likewise; each may be absent, which means 0.
    center       LayerNorm, else RMSNorm; eps, 0 or more, is added to its variance, as in layernorm_adaln.
    h_weight     (D,), any of these dtypes: h is RMS-normalised first, h * rsqrt(mean(h^2) + h_eps) * h_weight.
    gate_fn      "identity", or "tanh": tanh(gate) is the gate.
    returns      r, y (B, L, D) in residual's dtype (docs/dtypes.md); float32 arithmetic, each rounded once. The norm is that of
                 the rounded r, so y is layernorm_adaln(r, scale, shift), or rmsnorm_adaln, but for the order of float32 sums.

    Saved for the backward: residual, h and the vectors. Raises ValueError or TypeError that names the argument.
    adaLN-Zero: Peebles & Xie 2023, arXiv:2212.09748. Post-norm with a tanh gate: Lumina-Image 2.0, arXiv:2503.21758.
    """
    op = "gated_residual_norm_adaln"
    check.rank(op, "residual", residual, "B, L, D", "Reshape residual to batch, tokens, width.")
    B, L, D = residual.shape
    dtype = check.floating(op, "residual", residual)
    check.countable(op, "residual", residual)
    check.row_width(op, "the width of residual", D)
    check.shape(op, "h", h, ("B, L, D", (B, L, D)), remedy="h and residual are added, they have one shape.")
    check.beside(op, "h", h, dtype, "residual")
    check.flag(op, "center", center)
    check.choice(op, "gate_fn", gate_fn, ("identity", "tanh"))
    operands, packed = dict(residual=residual, h=h, h_weight=h_weight), {}
    for name, v in (("gate", gate), ("scale", scale), ("shift", shift)):
        if v is not None or name == "gate":
            check.shape(op, name, v, ("B, D", (B, D)), ("B, 1, D", (B, 1, D)), remedy=f"Give one {name} row per sample.")
            check.beside(op, name, v, dtype, "residual")
        operands[name] = v.array if isinstance(v, Row) else v
        packed[f"{name}_row"] = v.index if isinstance(v, Row) else None
    if h_weight is not None:
        check.shape(op, "h_weight", h_weight, ("D", (D,)), remedy="Give one weight that all tokens share.")
        check.beside(op, "h_weight", h_weight, dtype, "residual")
    static = dict(center=center, eps=check.eps(op, eps), h_eps=check.eps(op, h_eps, "h_eps"), gate_fn=gate_fn, **packed)
    return Call(gated_residual_norm_adaln_op, operands, tuple(static.items()), lambda outs: (outs[0], outs[1]))
