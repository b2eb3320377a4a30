"""Gated residual: out = residual + gate * h, one gate row per sample.

Backward: dresidual = dout, dh = gate * dout, dgate_b = sum over tokens of dout * h.
Saved for the backward: h and gate.
"""

from __future__ import annotations

from . import check
from ._triton import tl, triton
from .op import Array, Call, Op, Plan, Row, Spec, Target, Vector, cast, cdiv, remembered, spec, widened
from .rows import config, gradient_spec, load_tile, load_vector, per_sample, row_meta, split, store_sums, sum_chunks_plan, tile


@triton.jit(do_not_specialize=["TOKENS"])
def gated_residual_fwd_kernel(
    residual_ptr,  # (B, L, D)
    h_ptr,  # (B, L, D)
    gate_ptr,  # (B, D), a row stride apart
    out_ptr,  # (B, L, D)
    TOKENS,  # L
    WIDTH: tl.constexpr,  # D
    GATE_STRIDE: tl.constexpr,
    GATE_AT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Grid (B * cdiv(L, ROWS),)."""
    blocks = tl.cdiv(TOKENS, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows < TOKENS)[:, None] & (cols < WIDTH)[None, :]
    at = (b * TOKENS + rows)[:, None] * WIDTH + cols[None, :]
    gate = load_vector(gate_ptr, b * GATE_STRIDE + GATE_AT, cols, WIDTH, True, 1.0)  # [COLS]
    h = load_tile(h_ptr, at, inside)  # [ROWS, COLS]
    residual = load_tile(residual_ptr, at, inside)
    out = tl.fma(tl.broadcast_to(gate[None, :], h.shape), h, residual)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["TOKENS", "CHUNKS", "BLOCKS"])
def gated_residual_bwd_kernel(
    h_ptr,  # (B, L, D)
    gate_ptr,  # (B, D), a row stride apart
    dout_ptr,  # (B, L, D)
    dh_ptr,  # (B, L, D)
    part_ptr,  # (B, CHUNKS, D) float32: sum of dout * h over the chunk's tokens
    TOKENS,
    CHUNKS,
    BLOCKS,
    WIDTH: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    GATE_AT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Grid (B * CHUNKS,): one program walks one chunk of one sample's tokens."""
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    first = (tl.program_id(0) % CHUNKS) * BLOCKS * ROWS
    cols = tl.arange(0, COLS)
    gate = load_vector(gate_ptr, b * GATE_STRIDE + GATE_AT, cols, WIDTH, True, 1.0)  # [COLS]
    part = tl.zeros((ROWS, COLS), tl.float32)
    for block in range(0, BLOCKS):
        rows = first + block * ROWS + tl.arange(0, ROWS)
        inside = (rows < TOKENS)[:, None] & (cols < WIDTH)[None, :]
        at = (b * TOKENS + rows)[:, None] * WIDTH + cols[None, :]
        h = load_tile(h_ptr, at, inside)  # [ROWS, COLS]
        dout = load_tile(dout_ptr, at, inside)
        tl.store(dh_ptr + at, (gate[None, :] * dout).to(dh_ptr.dtype.element_ty), mask=inside)
        part = tl.fma(dout, h, part)
    store_sums(part_ptr, tl.program_id(0).to(tl.int64), part, cols, WIDTH)


def gate_meta(gate, row: int | None) -> tuple:
    return tuple(row_meta("GATE", gate, row).items())


@remembered
def fwd_plan(x: Spec, row: tuple) -> Plan:
    B, L, D = x.shape
    c = config("gated_residual_fwd", None, (x,), Target())
    return Plan(
        gated_residual_fwd_kernel,
        grid=(B * cdiv(L, c.rows),),
        outs=(x,),
        ints=dict(TOKENS=L),
        meta=dict(WIDTH=D, **dict(row), **tile(D, c)),
        warps=c.warps,
    )


@remembered
def bwd_plan(target: Target, h: Spec, row: tuple) -> Plan:
    B, L, D = h.shape
    c = config("gated_residual_bwd", None, (h,), target)
    chunks, blocks = split(target, B, cdiv(L, c.rows), c)
    return Plan(
        gated_residual_bwd_kernel,
        grid=(B * chunks,),
        outs=(h, Spec((B, chunks, D), "float32")),
        ints=dict(TOKENS=L, CHUNKS=chunks, BLOCKS=blocks),
        meta=dict(WIDTH=D, **dict(row), **tile(D, c)),
        warps=c.warps,
    )


def infer(a, **_):
    return (spec(a.residual),), ()


def forward(run, a, *, gate_row):
    return run(fwd_plan(spec(a.residual), gate_meta(a.gate, gate_row)), a.residual, a.h, a.gate), ()


def backward(run, a, outs, extras, douts, *, gate_row):
    (dout,) = douts
    dh, part = run(bwd_plan(run.target, spec(a.h), gate_meta(a.gate, gate_row)), a.h, a.gate, dout)
    (dgate,) = run(sum_chunks_plan(spec(part), gradient_spec(a.gate, gate_row)), part)
    return dict(h=dh, gate=dgate)


def reference(xp, a, *, gate_row):
    w = widened(a, "residual", "h", "gate")
    return (cast(w.residual + per_sample(w.gate, gate_row) * w.h, spec(a.residual).dtype),)


gated_residual_op = Op(
    "gated_residual",
    operands=("residual", "h", "gate"),
    infer=infer,
    forward=forward,
    backward=backward,
    reference=reference,
    keeps=frozenset({"h", "gate"}),
    passes={"residual": 0},
    dense={"gate": 1},
)


def gated_residual(residual: Array, h: Array, gate: Vector) -> Call:
    """residual + gate * h.

    residual, h  (B, L, D) float32, bfloat16 or float16, each its own; D a multiple of 8. float64 takes the reference path.
    gate         (B, D) or (B, 1, D), any of these dtypes. A strided view is read in place.
    returns      (B, L, D) in residual's dtype (docs/dtypes.md); float32 arithmetic, rounded once.

    The gate of adaLN-Zero: Peebles & Xie 2023, arXiv:2212.09748, sec. 3.2.
    """
    op = "gated_residual"
    check.rank(op, "residual", residual, "B, L, D", "Reshape residual to batch, tokens, width.")
    B, L, D = residual.shape
    dtype = check.floating(op, "residual", residual)
    check.countable(op, "residual", residual)
    check.row_width(op, "the width of residual", D)
    check.shape(op, "h", h, ("B, L, D", (B, L, D)), remedy="h and residual are added, they have one shape.")
    check.beside(op, "h", h, dtype, "residual")
    check.shape(op, "gate", gate, ("B, D", (B, D)), ("B, 1, D", (B, 1, D)), remedy="Give one gate row per sample of residual.")
    check.beside(op, "gate", gate, dtype, "residual")
    packed = isinstance(gate, Row)
    operands = dict(residual=residual, h=h, gate=gate.array if packed else gate)
    return Call(gated_residual_op, operands, (("gate_row", gate.index if packed else None),), lambda outs: outs[0])
