"""The kernels of norm and modulation.

A *line* is what one row of scale and shift serves: a sample, or the tokens of a sample whose index is r. Line i is row
r = i % LINES of sample b = i // LINES. Where the modulation is per token, or there is none, a line is a whole sample.
"""

from __future__ import annotations

from .._triton import tl, triton
from ..rows import affine, load_tile, load_vector, norm_backward, normalize, row_and_columns, store_sums


@triton.jit
def line_of(i, GROUP, LINES, TABLE: tl.constexpr):
    """Row of scale or shift that line i reads: its own, or its group's where all samples share one table."""
    if TABLE:
        return i // LINES // GROUP * LINES + i % LINES
    else:
        return i


@triton.jit
def indices(index_ptr, tokens, present, LINES):
    """Table rows of some tokens, clamped to the table; -1 for tokens that are not present."""
    index = tl.load(index_ptr + tokens, mask=present, other=0)
    return tl.where(present, tl.minimum(tl.maximum(index, 0), LINES - 1).to(tl.int32), -1)


@triton.jit
def load_modulation(ptr, token, line, rows, cols, inside, KIND: tl.constexpr, STRIDE: tl.constexpr):
    """What each token of a tile has of its own of scale or shift, [ROWS, COLS] in float32, or a row of zeros."""
    if KIND == "token":
        return load_tile(ptr + token * STRIDE, rows[:, None] * STRIDE + cols[None, :], inside)
    elif KIND == "index":
        return load_tile(ptr, (line * STRIDE)[:, None] + cols[None, :], inside)
    else:
        return tl.zeros((1, cols.shape[0]), tl.float32)


@triton.jit(do_not_specialize=["TOKENS", "CHUNKS", "BLOCKS", "GROUP", "LINES"])
def adaln_fwd_kernel(
    x_ptr,  # (B, L, D)
    scale_ptr,  # rows of D, a row stride apart
    shift_ptr,  # likewise
    weight_ptr,  # (G, D)
    bias_ptr,  # (G, D)
    scale_base_ptr,  # (G, D)
    shift_base_ptr,  # (G, D)
    index_ptr,  # (B, L) integers
    y_ptr,  # (B, L, D)
    TOKENS,  # L
    CHUNKS,
    BLOCKS,  # blocks of ROWS tokens in a chunk
    GROUP,  # samples per group, B / G
    LINES,  # rows of a table, 1 without
    WIDTH: tl.constexpr,  # D
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,  # "none", "sample", "token", "index"
    SHIFT: tl.constexpr,
    TABLE: tl.constexpr,  # whether the samples of a group share the table
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    SCALE_BASED: tl.constexpr,
    SHIFT_BASED: tl.constexpr,
    ONE: tl.constexpr,  # added to the weight: 1 where it is zero-centered
    ROUND_NORM: tl.constexpr,
    ROUND_AFFINE: tl.constexpr,
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
    shared = b // GROUP * WIDTH
    weight = load_vector(weight_ptr, shared, cols, WIDTH, WEIGHTED, 1.0) + ONE  # [COLS]
    bias = load_vector(bias_ptr, shared, cols, WIDTH, BIASED, 0.0)
    scale = 1.0 + load_vector(scale_base_ptr, shared, cols, WIDTH, SCALE_BASED, 0.0)
    shift = load_vector(shift_base_ptr, shared, cols, WIDTH, SHIFT_BASED, 0.0)
    scale += load_vector(scale_ptr, b * SCALE_STRIDE + SCALE_AT, cols, WIDTH, SCALE == "sample", 0.0)
    shift += load_vector(shift_ptr, b * SHIFT_STRIDE + SHIFT_AT, cols, WIDTH, SHIFT == "sample", 0.0)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        token = b * TOKENS + first + block * ROWS
        present = first + block * ROWS + rows < TOKENS
        inside = present[:, None] & (cols < WIDTH)[None, :]
        x = load_tile(x_ptr + token * WIDTH, at, inside)  # [ROWS, COLS]
        y, _ = normalize(x, inside, WIDTH, EPS, CENTER)
        if ROUND_NORM:
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        if WEIGHTED or BIASED:
            y = affine(y, weight[None, :], bias[None, :])
        if ROUND_AFFINE:
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        line = tl.zeros((ROWS,), tl.int64)
        if SCALE == "index" or SHIFT == "index":
            index = tl.maximum(indices(index_ptr + token, rows, present, LINES), 0)
            line += (b // GROUP if TABLE else b) * LINES + index
        if SCALE != "none" or SHIFT != "none" or SCALE_BASED or SHIFT_BASED:
            factor = scale[None, :] + load_modulation(scale_ptr, token, line, rows, cols, inside, SCALE, SCALE_STRIDE)
            addend = shift[None, :] + load_modulation(shift_ptr, token, line, rows, cols, inside, SHIFT, SHIFT_STRIDE)
            y = affine(y, factor, addend)
        tl.store(y_ptr + token * WIDTH + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_block(
    x_ptr,
    dy_ptr,
    scale_ptr,
    dx_ptr,
    dscale_ptr,
    dshift_ptr,
    token,
    present,
    scale,
    weight,
    bias,
    a,
    h,
    wa,
    wh,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    SUM_A: tl.constexpr,
    SUM_H: tl.constexpr,
    SUM_WA: tl.constexpr,
    SUM_WH: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One tile of tokens: stores the gradients of the tokens, returns the sums with the tile's products added."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = present[:, None] & (cols < WIDTH)[None, :]
    at = rows[:, None] * WIDTH + cols[None, :]
    x = load_tile(x_ptr + token * WIDTH, at, inside)  # [ROWS, COLS]
    dy = load_tile(dy_ptr + token * WIDTH, at, inside)
    gain = scale[None, :]
    if SCALE == "token":
        gain += load_modulation(scale_ptr, token, rows, rows, cols, inside, SCALE, SCALE_STRIDE)
    g = dy * gain
    n, dx = norm_backward(x, g * weight[None, :], tl.zeros((1, 1), tl.float32), inside, WIDTH, EPS, CENTER)
    tl.store(dx_ptr + token * WIDTH + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if SCALE == "token":
        dscale = dy * affine(n, weight[None, :], bias[None, :])
        tl.store(dscale_ptr + token * WIDTH + at, dscale.to(dscale_ptr.dtype.element_ty), mask=inside)
    if SHIFT == "token":
        tl.store(dshift_ptr + token * WIDTH + at, dy.to(dshift_ptr.dtype.element_ty), mask=inside)
    if SUM_A:
        a = tl.fma(dy, n, a)
    if SUM_H:
        h += dy
    if SUM_WA:
        wa = tl.fma(g, n, wa)
    if SUM_WH:
        wh += g
    return a, h, wa, wh


@triton.jit(do_not_specialize=["TOKENS", "CHUNKS", "BLOCKS", "GROUP", "LINES"])
def adaln_bwd_kernel(
    x_ptr,  # (B, L, D)
    dy_ptr,  # (B, L, D)
    scale_ptr,  # rows of D, a row stride apart
    weight_ptr,  # (G, D)
    bias_ptr,  # (G, D)
    scale_base_ptr,  # (G, D)
    index_ptr,  # (B, L) integers
    dx_ptr,  # (B, L, D)
    dscale_ptr,  # (B, L, D) for a scale per token; (B * LINES, D) where the sums are the gradients
    dshift_ptr,  # likewise
    a_ptr,  # (B * LINES, CHUNKS, D) float32: sum of dy * norm(x) over the line's tokens of the chunk
    h_ptr,  # (B * LINES, CHUNKS, D) float32: sum of dy
    wa_ptr,  # (B * LINES, CHUNKS, D) float32: sum of dy * (1 + scale) * norm(x), for a scale per token
    wh_ptr,  # (B * LINES, CHUNKS, D) float32: sum of dy * (1 + scale), for a scale per token
    TOKENS,  # L
    CHUNKS,
    BLOCKS,  # blocks of ROWS tokens in a chunk
    GROUP,
    LINES,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    TABLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    SCALE_BASED: tl.constexpr,
    ONE: tl.constexpr,
    SUM_A: tl.constexpr,
    SUM_H: tl.constexpr,
    SUM_WA: tl.constexpr,
    SUM_WH: tl.constexpr,
    FINAL: tl.constexpr,  # whether the sums over a line's only chunk are the gradients of its scale and shift
    SCALE_STRIDE: tl.constexpr,
    SCALE_AT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (B * LINES * CHUNKS,): one program walks one chunk of one sample's tokens, and takes those of its line."""
    i = tl.program_id(0) // CHUNKS
    b = (i // LINES).to(tl.int64)
    first = (tl.program_id(0) % CHUNKS) * BLOCKS * ROWS
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    shared = b // GROUP * WIDTH
    scale = 1.0 + load_vector(scale_base_ptr, shared, cols, WIDTH, SCALE_BASED, 0.0)  # [COLS]
    line = line_of(i.to(tl.int64), GROUP, LINES, TABLE)
    scale += load_vector(scale_ptr, line * SCALE_STRIDE + SCALE_AT, cols, WIDTH, SCALE == "sample" or SCALE == "index", 0.0)
    weight = load_vector(weight_ptr, shared, cols, WIDTH, WEIGHTED, 1.0) + ONE
    bias = load_vector(bias_ptr, shared, cols, WIDTH, BIASED and SCALE == "token", 0.0)
    a = tl.zeros((ROWS, COLS), tl.float32)
    h = tl.zeros((ROWS, COLS), tl.float32)
    wa = tl.zeros((ROWS, COLS), tl.float32)
    wh = tl.zeros((ROWS, COLS), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        present = first + block * ROWS + rows < TOKENS
        token = b * TOKENS + first + block * ROWS
        if SCALE == "index" or SHIFT == "index":
            present &= indices(index_ptr + token, rows, present, LINES) == i % LINES
            if tl.max(present.to(tl.int32), 0) > 0:
                a, h, wa, wh = backward_block(
                    x_ptr, dy_ptr, scale_ptr, dx_ptr, dscale_ptr, dshift_ptr, token, present, scale, weight, bias, a, h, wa, wh,
                    WIDTH, EPS, CENTER, SCALE, SHIFT, SUM_A, SUM_H, SUM_WA, SUM_WH, SCALE_STRIDE, ROWS, COLS,
                )  # fmt: skip
        else:
            a, h, wa, wh = backward_block(
                x_ptr, dy_ptr, scale_ptr, dx_ptr, dscale_ptr, dshift_ptr, token, present, scale, weight, bias, a, h, wa, wh,
                WIDTH, EPS, CENTER, SCALE, SHIFT, SUM_A, SUM_H, SUM_WA, SUM_WH, SCALE_STRIDE, ROWS, COLS,
            )  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    if FINAL and CHUNKS == 1:
        if SUM_A:
            store_sums(dscale_ptr, part, a, cols, WIDTH)
        if SUM_H:
            store_sums(dshift_ptr, part, h, cols, WIDTH)
    else:
        if SUM_A:
            store_sums(a_ptr, part, a, cols, WIDTH)
        if SUM_H:
            store_sums(h_ptr, part, h, cols, WIDTH)
        if SUM_WA:
            store_sums(wa_ptr, part, wa, cols, WIDTH)
        if SUM_WH:
            store_sums(wh_ptr, part, wh, cols, WIDTH)


@triton.jit(do_not_specialize=["SERVED", "CHUNKS", "GROUP", "LINES"])
def adaln_bwd_vectors_kernel(
    a_ptr,  # (B * LINES, CHUNKS, D) float32
    h_ptr,  # (B * LINES, CHUNKS, D) float32
    wa_ptr,  # (B * LINES, CHUNKS, D) float32
    wh_ptr,  # (B * LINES, CHUNKS, D) float32
    scale_ptr,  # rows of D, a row stride apart
    weight_ptr,  # (G, D)
    bias_ptr,  # (G, D)
    scale_base_ptr,  # (G, D)
    dscale_ptr,  # a row of D per line, or per group and table row
    dshift_ptr,  # likewise
    dweight_ptr,  # (G, D)
    dbias_ptr,  # (G, D)
    dscale_base_ptr,  # (G, D)
    dshift_base_ptr,  # (G, D)
    SERVED,  # rows of dscale and dshift to write, 0 if neither is wanted
    CHUNKS,
    GROUP,
    LINES,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    TABLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    SCALE_BASED: tl.constexpr,
    SHIFT_BASED: tl.constexpr,
    ONE: tl.constexpr,
    SUM_A: tl.constexpr,
    SUM_H: tl.constexpr,
    SUM_WA: tl.constexpr,
    SUM_WH: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_AT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
):
    """Grid ((SERVED + groups) * cdiv(D, COLS),): one program sums COLS columns of one row of dscale and dshift, or of a group."""
    # Backwards: the groups' sums take longest, so they begin first.
    i, cols = row_and_columns(tl.num_programs(0) - 1 - tl.program_id(0), WIDTH, COLS)
    if i < SERVED:
        line_a = tl.zeros((ROWS, COLS), tl.float32)
        line_h = tl.zeros((ROWS, COLS), tl.float32)
        b = i // LINES * GROUP if TABLE else i // LINES  # the first sample that the row serves
        samples = GROUP if TABLE else 1
        for start in range(0, samples * CHUNKS, ROWS):
            c = start + tl.arange(0, ROWS)
            valid = (c < samples * CHUNKS)[:, None] & (cols < WIDTH)[None, :]
            line = ((b + c // CHUNKS) * LINES + i % LINES) * CHUNKS + c % CHUNKS
            own = line[:, None] * WIDTH + cols[None, :]
            if SUM_A:
                line_a += tl.load(a_ptr + own, mask=valid, other=0.0)
            if SUM_H:
                line_h += tl.load(h_ptr + own, mask=valid, other=0.0)
        shared = (i // LINES if TABLE else b // GROUP) * WIDTH
        da = tl.sum(line_a, 0)
        dh = tl.sum(line_h, 0)
        if SCALE == "sample" or SCALE == "index":
            weight = load_vector(weight_ptr, shared, cols, WIDTH, WEIGHTED, 1.0) + ONE
            bias = load_vector(bias_ptr, shared, cols, WIDTH, BIASED, 0.0)
            dscale = tl.fma(weight, da, bias * dh)
            tl.store(dscale_ptr + i * WIDTH + cols, dscale.to(dscale_ptr.dtype.element_ty), mask=cols < WIDTH)
        if SHIFT == "sample" or SHIFT == "index":
            tl.store(dshift_ptr + i * WIDTH + cols, dh.to(dshift_ptr.dtype.element_ty), mask=cols < WIDTH)
    else:
        g = i - SERVED
        a = tl.zeros((SHARED_ROWS, COLS), tl.float32)
        h = tl.zeros((SHARED_ROWS, COLS), tl.float32)
        wa = tl.zeros((SHARED_ROWS, COLS), tl.float32)
        wh = tl.zeros((SHARED_ROWS, COLS), tl.float32)
        shared = g * WIDTH
        base = load_vector(scale_base_ptr, shared, cols, WIDTH, SCALE_BASED, 0.0)[None, :]
        for start in range(0, GROUP * LINES * CHUNKS, SHARED_ROWS):
            k = start + tl.arange(0, SHARED_ROWS)
            inside = (k < GROUP * LINES * CHUNKS)[:, None] & (cols < WIDTH)[None, :]
            at = (g * GROUP * LINES * CHUNKS + k)[:, None] * WIDTH + cols[None, :]
            gain = tl.broadcast_to(1.0 + base, (SHARED_ROWS, COLS))
            if SCALE == "sample" or SCALE == "index":
                line = line_of(g * GROUP * LINES + k // CHUNKS, GROUP, LINES, TABLE)
                gain += load_tile(scale_ptr, line[:, None] * SCALE_STRIDE + SCALE_AT + cols[None, :], inside)
            if SUM_A:
                part = tl.load(a_ptr + at, mask=inside, other=0.0)
                a += part
                if WEIGHTED and SCALE != "token":
                    wa = tl.fma(gain, part, wa)
            if SUM_H:
                part = tl.load(h_ptr + at, mask=inside, other=0.0)
                h += part
                if BIASED and SCALE != "token":
                    wh = tl.fma(gain, part, wh)
            if SUM_WA:
                wa += tl.load(wa_ptr + at, mask=inside, other=0.0)
            if SUM_WH:
                wh += tl.load(wh_ptr + at, mask=inside, other=0.0)
        if WEIGHTED:
            store_sums(dweight_ptr, g, wa, cols, WIDTH)
        if BIASED:
            store_sums(dbias_ptr, g, wh, cols, WIDTH)
        if SCALE_BASED:
            weight = load_vector(weight_ptr, shared, cols, WIDTH, WEIGHTED, 1.0) + ONE
            bias = load_vector(bias_ptr, shared, cols, WIDTH, BIASED, 0.0)
            dscale_base = tl.fma(weight, tl.sum(a, 0), bias * tl.sum(h, 0))
            tl.store(dscale_base_ptr + shared + cols, dscale_base.to(dscale_base_ptr.dtype.element_ty), mask=cols < WIDTH)
        if SHIFT_BASED:
            store_sums(dshift_base_ptr, g, h, cols, WIDTH)
