"""QK-RMSNorm and rotary embedding of packed projections, one launch for all streams.

For q and for k of each token:  y = R(pos) (weight * x / sqrt(mean(x^2) + eps)).
The mean runs over all heads (over="width", before the head split) or over each head (over="head"); a "row" below is what
is normalised together. R rotates pairs of a head's elements by pos * frequency, pairs being (2i, 2i + 1) (interleaved) or
(i, i + d/2) (half).  QK-norm: Henry et al. 2020, arXiv:2010.04245; Dehghani et al. 2023, arXiv:2302.05442.
RoPE: Su et al. 2021, arXiv:2104.09864.

Backward of a row, with n = x * rstd, u = R(pos)^T dy and g = weight * u:
    dx = rstd * (g - n * mean(g * n))      dweight = sum over rows of u * n
Saved for the backward: the packed projections and the weights; rstd is recomputed from the tile that is read anyway.
"""

from __future__ import annotations

from typing import NamedTuple

from . import check
from ._triton import tl, triton
from .adaln.op import norm
from .op import (
    Array,
    Call,
    Op,
    Plan,
    Spec,
    Streams,
    Target,
    cast,
    cdiv,
    groups,
    next_power_of_2,
    remembered,
    spec,
    ungrouped,
    wide,
    widest,
)
from .rows import TINY, lift_of, reciprocal_root, row_and_columns, sum_chunks
from .streams import integers, name_of, over_streams


@triton.jit
def pair_columns(pair, WIDTH_HEAD: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Columns of the two elements that RoPE turns together, for pair numbers counted over all heads of a row.

    The first TURNED pairs of a head make up its first columns; the others, which are not turned, are paired alike.
    """
    if INTERLEAVED:
        first = 2 * pair
        return first, first + 1
    else:
        half: tl.constexpr = WIDTH_HEAD // 2
        i = pair % half
        head = pair // half * WIDTH_HEAD
        if half == TURNED:
            return head + i, head + i + half
        else:
            first = head + tl.where(i < TURNED, i, i + TURNED)
            return first, first + tl.where(i < TURNED, TURNED, half - TURNED)


@triton.jit
def load_pairs(
    ptr, row, inside,
    WIDTH: tl.constexpr, WIDTH_HEAD: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Both halves [ROWS, PAIRS] of rows that start at `row` [ROWS], float32, zeros outside."""
    if INTERLEAVED:
        # One vectorised load; neighbours in a register pair are split without a shuffle.
        cols = tl.arange(0, 2 * PAIRS)
        x = tl.load(ptr + row[:, None] + cols[None, :], mask=inside[:, None] & (cols < WIDTH)[None, :], other=0.0)
        return tl.split(tl.reshape(x.to(tl.float32), (row.shape[0], PAIRS, 2)))
    else:
        pair = tl.arange(0, PAIRS)
        first, second = pair_columns(pair, WIDTH_HEAD, TURNED, False)
        there = inside[:, None] & (2 * pair < WIDTH)[None, :]
        a = tl.load(ptr + row[:, None] + first[None, :], mask=there, other=0.0).to(tl.float32)
        b = tl.load(ptr + row[:, None] + second[None, :], mask=there, other=0.0).to(tl.float32)
        return a, b


@triton.jit
def store_pairs(
    ptr, row, inside, a, b,
    WIDTH: tl.constexpr, WIDTH_HEAD: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Inverse of load_pairs, rounded to the pointer's dtype."""
    a = a.to(ptr.dtype.element_ty)
    b = b.to(ptr.dtype.element_ty)
    if INTERLEAVED:
        cols = tl.arange(0, 2 * PAIRS)
        x = tl.reshape(tl.join(a, b), (row.shape[0], 2 * PAIRS))
        tl.store(ptr + row[:, None] + cols[None, :], x, mask=inside[:, None] & (cols < WIDTH)[None, :])
    else:
        pair = tl.arange(0, PAIRS)
        first, second = pair_columns(pair, WIDTH_HEAD, TURNED, False)
        there = inside[:, None] & (2 * pair < WIDTH)[None, :]
        tl.store(ptr + row[:, None] + first[None, :], a, mask=there)
        tl.store(ptr + row[:, None] + second[None, :], b, mask=there)


@triton.jit
def load_rotation(
    cos_ptr, sin_ptr, start_ptr, b, token, inside, table,
    WIDTH_HEAD: tl.constexpr, TURNED: tl.constexpr, STARTED: tl.constexpr, POSITIONS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """cos and sin [ROWS, PAIRS] of each row's position, which is clamped to the table; 1 and 0 for pairs that are not turned."""
    position = token
    if STARTED:
        # Clamped before the addition too, which may leave the 32 bits, as may a start of 64.
        start = tl.load(start_ptr + b, mask=inside, other=0)
        position += tl.minimum(tl.maximum(start, -(2**30)), POSITIONS - 1).to(token.dtype)
    position = tl.minimum(tl.maximum(position, 0), POSITIONS - 1)
    pair = tl.arange(0, PAIRS) % (WIDTH_HEAD // 2)
    at = (table + position)[:, None] * TURNED + pair[None, :]
    there = inside[:, None]
    if 2 * TURNED < WIDTH_HEAD:
        there &= (pair < TURNED)[None, :]
    c = tl.load(cos_ptr + at, mask=there, other=1.0).to(tl.float32)
    s = tl.load(sin_ptr + at, mask=there, other=0.0).to(tl.float32)
    return c, s


@triton.jit
def rms(a, b, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """Normalised pairs and rstd [ROWS], as rows.rms_normalize."""
    mean_square = tl.sum(tl.fma(a, a, b * b), 1) * (1.0 / WIDTH)
    if EPS < TINY:
        lift = lift_of(mean_square)
        a *= lift[:, None]
        b *= lift[:, None]
        rstd = reciprocal_root(tl.sum(tl.fma(a, a, b * b), 1) * (1.0 / WIDTH), lift, EPS)
        return a * rstd[:, None], b * rstd[:, None], rstd * lift
    else:
        rstd = reciprocal_root(mean_square, 1.0, EPS)
        return a * rstd[:, None], b * rstd[:, None], rstd


@triton.jit
def turn(a, b, c, s):
    return tl.fma(a, c, -(b * s)), tl.fma(a, s, b * c)


@triton.jit
def locate(r, first_token, LENGTH, ROWS_PER_TOKEN: tl.constexpr, WIDTH: tl.constexpr):
    """Of rows r [ROWS] counted from a group's first token: token counted over the batch, sample, and where a row begins in
    (B, L, H, d) and in the packed projections."""
    D: tl.constexpr = WIDTH * ROWS_PER_TOKEN
    token = first_token + r // ROWS_PER_TOKEN
    row = token.to(tl.int64) * D + r % ROWS_PER_TOKEN * WIDTH
    return token, token // LENGTH, row, row + token.to(tl.int64) * 2 * D


@triton.jit
def norm_rows(
    program, qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, start_ptr, key_mask_ptr, q_ptr, k_ptr,
    LENGTH, SAMPLES, TABLE_SAMPLES,
    WIDTH: tl.constexpr, ROWS_PER_TOKEN: tl.constexpr, WIDTH_HEAD: tl.constexpr, EPS: tl.constexpr, TURNED: tl.constexpr,
    POSITIONS: tl.constexpr, STARTED: tl.constexpr, INTERLEAVED: tl.constexpr, Q_SCALE: tl.constexpr, KEY_MASK: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One program of a stream: ROWS rows of q and the same rows of k."""
    rows_of_group = SAMPLES * LENGTH * ROWS_PER_TOKEN
    blocks = tl.cdiv(rows_of_group, ROWS)
    g = program // blocks
    r = (program % blocks) * ROWS + tl.arange(0, ROWS)
    inside = r < rows_of_group
    token, b, row, packed = locate(r, g * SAMPLES * LENGTH, LENGTH, ROWS_PER_TOKEN, WIDTH)
    keep = inside
    if KEY_MASK:
        keep = inside & (tl.load(key_mask_ptr + token, mask=inside, other=0) != 0)
    if TURNED:
        c, s = load_rotation(
            cos_ptr, sin_ptr, start_ptr, b, token % LENGTH, inside, b // TABLE_SAMPLES * POSITIONS,
            WIDTH_HEAD, TURNED, STARTED, POSITIONS, PAIRS,
        )  # fmt: skip
    first, second = pair_columns(tl.arange(0, PAIRS), WIDTH_HEAD, TURNED, INTERLEAVED)
    there = 2 * tl.arange(0, PAIRS) < WIDTH
    for part in tl.static_range(2):
        x_ptr = qkv_ptr + part * WIDTH * ROWS_PER_TOKEN
        weight = (k_weight_ptr if part else q_weight_ptr) + g.to(tl.int64) * WIDTH
        a, b_ = load_pairs(x_ptr, packed, keep, WIDTH, WIDTH_HEAD, TURNED, INTERLEAVED, PAIRS)  # [ROWS, PAIRS]
        a, b_, _ = rms(a, b_, WIDTH, EPS)
        a *= tl.load(weight + first, mask=there, other=0.0).to(tl.float32)[None, :]
        b_ *= tl.load(weight + second, mask=there, other=0.0).to(tl.float32)[None, :]
        if TURNED:
            a, b_ = turn(a, b_, c, s)
        if part == 0 and Q_SCALE != 1.0:
            a *= Q_SCALE
            b_ *= Q_SCALE
        store_pairs(k_ptr if part else q_ptr, row, inside, a, b_, WIDTH, WIDTH_HEAD, TURNED, INTERLEAVED, PAIRS)


@triton.jit
def qk_norm_rope_fwd_body(
    qkv_ptrs,  # (B, L_s, 3, H, d) per stream
    q_weight_ptrs,  # (G, WIDTH)
    k_weight_ptrs,  # (G, WIDTH)
    cos_ptrs,  # (T, POSITIONS, TURNED) float32
    sin_ptrs,  # (T, POSITIONS, TURNED) float32
    start_ptr,  # (B,) int32
    key_mask_ptrs,  # (B, L_s) bool: a masked token reads as 0, whatever it holds, so that NaN is in no residual
    q_ptrs,  # (B, L_s, H, d)
    k_ptrs,  # (B, L_s, H, d)
    LENGTHS,
    PROGRAMS,  # of a stream: G * cdiv(rows of a group, ROWS)
    SAMPLES,  # of a group, B / G
    TABLE_SAMPLES,  # samples that share a table, B / T
    WIDTH,  # elements of a row
    ROWS_PER_TOKEN,  # 1 over the width, H over the head
    WIDTH_HEAD,  # d
    EPS,
    STARTED,
    INTERLEAVED,
    TURNEDS_,  # pairs of a head that are turned, 0 for a stream that is not
    POSITIONS_,  # rows of the table
    Q_SCALE,  # q is multiplied by it before it is rounded
    KEY_MASKS_,
    ROWS,
    PAIRS,
):
    """Grid (sum of PROGRAMS,): a program belongs to one stream."""
    program = tl.program_id(0)
    for t in tl.static_range(len(qkv_ptrs)):
        if (program >= 0) & (program < PROGRAMS[t]):
            norm_rows(
                program, qkv_ptrs[t], q_weight_ptrs[t], k_weight_ptrs[t], cos_ptrs[t], sin_ptrs[t], start_ptr, key_mask_ptrs[t],
                q_ptrs[t], k_ptrs[t], LENGTHS[t], SAMPLES[t], TABLE_SAMPLES[t], WIDTH, ROWS_PER_TOKEN, WIDTH_HEAD, EPS,
                TURNEDS_[t], POSITIONS_[t], STARTED, INTERLEAVED or TURNEDS_[t] == 0, Q_SCALE, KEY_MASKS_[t], ROWS, PAIRS,
            )  # fmt: skip
        program -= PROGRAMS[t]


@triton.jit
def load_weight(ptr, first, second, there):
    """Weights of both elements of each pair [1, PAIRS]."""
    a = tl.load(ptr + first, mask=there, other=0.0).to(tl.float32)[None, :]
    b = tl.load(ptr + second, mask=there, other=0.0).to(tl.float32)[None, :]
    return a, b


@triton.jit
def unnormalise(x_a, x_b, u_a, u_b, weight_a, weight_b, part_a, part_b, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """Gradients of the pairs x, and the sums of u * n with these rows added."""
    n_a, n_b, rstd = rms(x_a, x_b, WIDTH, EPS)
    g_a = weight_a * u_a
    g_b = weight_b * u_b
    mean = (tl.sum(tl.fma(g_a, n_a, g_b * n_b), 1) * (1.0 / WIDTH))[:, None]
    rstd = rstd[:, None]
    return (g_a - n_a * mean) * rstd, (g_b - n_b * mean) * rstd, tl.fma(u_a, n_a, part_a), tl.fma(u_b, n_b, part_b)


@triton.jit
def norm_rows_backward(
    program, qkv_ptr, dq_ptr, dk_ptr, dv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, start_ptr, key_mask_ptr, dqkv_ptr,
    q_part_ptr, k_part_ptr, LENGTH, SAMPLES, TABLE_SAMPLES, CHUNKS, BLOCKS,
    WIDTH: tl.constexpr, ROWS_PER_TOKEN: tl.constexpr, WIDTH_HEAD: tl.constexpr, EPS: tl.constexpr, TURNED: tl.constexpr,
    POSITIONS: tl.constexpr, STARTED: tl.constexpr, INTERLEAVED: tl.constexpr, VALUE: tl.constexpr, KEY_MASK: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One program of a stream: one chunk of a group's rows."""
    D: tl.constexpr = WIDTH * ROWS_PER_TOKEN
    rows_of_group = SAMPLES * LENGTH * ROWS_PER_TOKEN
    g = program // CHUNKS
    start = program % CHUNKS * BLOCKS
    first, second = pair_columns(tl.arange(0, PAIRS), WIDTH_HEAD, TURNED, INTERLEAVED)
    there = 2 * tl.arange(0, PAIRS) < WIDTH
    cols = tl.arange(0, 2 * PAIRS)
    at = g.to(tl.int64) * WIDTH
    q_weight_a, q_weight_b = load_weight(q_weight_ptr + at, first, second, there)
    k_weight_a, k_weight_b = load_weight(k_weight_ptr + at, first, second, there)
    q_part_a = tl.zeros((ROWS, PAIRS), tl.float32)
    q_part_b = tl.zeros((ROWS, PAIRS), tl.float32)
    k_part_a = tl.zeros((ROWS, PAIRS), tl.float32)
    k_part_b = tl.zeros((ROWS, PAIRS), tl.float32)
    for block in range(start, start + BLOCKS):
        r = block * ROWS + tl.arange(0, ROWS)
        inside = r < rows_of_group
        token, b, row, packed = locate(r, g * SAMPLES * LENGTH, LENGTH, ROWS_PER_TOKEN, WIDTH)
        keep = inside
        if KEY_MASK:
            keep = inside & (tl.load(key_mask_ptr + token, mask=inside, other=0) != 0)
        # All of a block is asked for before any of it is used.
        q_a, q_b = load_pairs(qkv_ptr, packed, keep, WIDTH, WIDTH_HEAD, TURNED, INTERLEAVED, PAIRS)  # [ROWS, PAIRS]
        k_a, k_b = load_pairs(qkv_ptr + D, packed, keep, WIDTH, WIDTH_HEAD, TURNED, INTERLEAVED, PAIRS)
        dq_a, dq_b = load_pairs(dq_ptr, row, inside, WIDTH, WIDTH_HEAD, TURNED, INTERLEAVED, PAIRS)
        dk_a, dk_b = load_pairs(dk_ptr, row, inside, WIDTH, WIDTH_HEAD, TURNED, INTERLEAVED, PAIRS)
        whole = inside[:, None] & (cols < WIDTH)[None, :]
        if VALUE:
            dv = tl.load(dv_ptr + row[:, None] + cols[None, :], mask=whole, other=0.0)
        else:
            dv = tl.zeros((ROWS, 2 * PAIRS), dqkv_ptr.dtype.element_ty)
        if TURNED:
            c, s = load_rotation(
                cos_ptr, sin_ptr, start_ptr, b, token % LENGTH, inside, b // TABLE_SAMPLES * POSITIONS,
                WIDTH_HEAD, TURNED, STARTED, POSITIONS, PAIRS,
            )  # fmt: skip
            dq_a, dq_b = turn(dq_a, dq_b, c, -s)
            dk_a, dk_b = turn(dk_a, dk_b, c, -s)
        tl.store(dqkv_ptr + 2 * D + packed[:, None] + cols[None, :], dv, mask=whole)
        d_a, d_b, q_part_a, q_part_b = unnormalise(q_a, q_b, dq_a, dq_b, q_weight_a, q_weight_b, q_part_a, q_part_b, WIDTH, EPS)
        store_pairs(dqkv_ptr, packed, inside, d_a, d_b, WIDTH, WIDTH_HEAD, TURNED, INTERLEAVED, PAIRS)
        d_a, d_b, k_part_a, k_part_b = unnormalise(k_a, k_b, dk_a, dk_b, k_weight_a, k_weight_b, k_part_a, k_part_b, WIDTH, EPS)
        store_pairs(dqkv_ptr + D, packed, inside, d_a, d_b, WIDTH, WIDTH_HEAD, TURNED, INTERLEAVED, PAIRS)
    at = program.to(tl.int64) * WIDTH
    tl.store(q_part_ptr + at + first, tl.sum(q_part_a, 0), mask=there)
    tl.store(q_part_ptr + at + second, tl.sum(q_part_b, 0), mask=there)
    tl.store(k_part_ptr + at + first, tl.sum(k_part_a, 0), mask=there)
    tl.store(k_part_ptr + at + second, tl.sum(k_part_b, 0), mask=there)


@triton.jit
def qk_norm_rope_bwd_body(
    qkv_ptrs,  # (B, L_s, 3, H, d) per stream
    dq_ptrs,  # (B, L_s, H, d)
    dk_ptrs,  # (B, L_s, H, d)
    dv_ptrs,  # (B, L_s, H, d)
    q_weight_ptrs,  # (G, WIDTH)
    k_weight_ptrs,  # (G, WIDTH)
    cos_ptrs,  # (T, POSITIONS, TURNED) float32
    sin_ptrs,  # (T, POSITIONS, TURNED) float32
    start_ptr,  # (B,) int32
    key_mask_ptrs,  # (B, L_s) bool: a masked token reads as 0 and adds nothing to the gradients, whatever it holds
    dqkv_ptrs,  # (B, L_s, 3, H, d)
    q_part_ptrs,  # (G, CHUNKS, WIDTH) float32: sum of u * n over the chunk's rows
    k_part_ptrs,  # (G, CHUNKS, WIDTH) float32
    LENGTHS,
    PROGRAMS,  # of a stream: G * CHUNKS
    SAMPLES,
    TABLE_SAMPLES,
    CHUNKS,
    BLOCKS,  # blocks of ROWS rows in a chunk
    WIDTH,
    ROWS_PER_TOKEN,
    WIDTH_HEAD,
    EPS,
    STARTED,
    INTERLEAVED,
    TURNEDS_,
    POSITIONS_,
    VALUES_,  # whether dv is given; else v's part of the gradient is 0
    KEY_MASKS_,
    ROWS,
    PAIRS,
):
    """Grid (sum of PROGRAMS,): a program belongs to one stream."""
    program = tl.program_id(0)
    for t in tl.static_range(len(qkv_ptrs)):
        if (program >= 0) & (program < PROGRAMS[t]):
            norm_rows_backward(
                program, qkv_ptrs[t], dq_ptrs[t], dk_ptrs[t], dv_ptrs[t], q_weight_ptrs[t], k_weight_ptrs[t], cos_ptrs[t],
                sin_ptrs[t], start_ptr, key_mask_ptrs[t], dqkv_ptrs[t], q_part_ptrs[t], k_part_ptrs[t],
                LENGTHS[t], SAMPLES[t], TABLE_SAMPLES[t], CHUNKS[t], BLOCKS[t], WIDTH, ROWS_PER_TOKEN, WIDTH_HEAD, EPS,
                TURNEDS_[t], POSITIONS_[t], STARTED, INTERLEAVED or TURNEDS_[t] == 0, VALUES_[t], KEY_MASKS_[t], ROWS, PAIRS,
            )  # fmt: skip
        program -= PROGRAMS[t]


@triton.jit
def qk_norm_rope_bwd_weights_body(
    q_part_ptrs,  # (G, CHUNKS, WIDTH) float32 per stream
    k_part_ptrs,  # (G, CHUNKS, WIDTH) float32
    dq_weight_ptrs,  # (G, WIDTH)
    dk_weight_ptrs,  # (G, WIDTH)
    PROGRAMS,  # of a stream: 2 * G * cdiv(WIDTH, COLS)
    CHUNKS,
    WIDTH,
    ROWS,
    COLS,
):
    """Grid (sum of PROGRAMS,): even programs serve q, odd ones k."""
    program = tl.program_id(0)
    for t in tl.static_range(len(q_part_ptrs)):
        if (program >= 0) & (program < PROGRAMS[t]):
            g, cols = row_and_columns(program // 2, WIDTH, COLS)
            if program % 2 == 0:
                sum_chunks(q_part_ptrs[t], dq_weight_ptrs[t], g, cols, CHUNKS[t], WIDTH, ROWS, COLS)
            else:
                sum_chunks(k_part_ptrs[t], dk_weight_ptrs[t], g, cols, CHUNKS[t], WIDTH, ROWS, COLS)
        program -= PROGRAMS[t]


class Stream(NamedTuple):
    """What a launch depends on of one stream."""

    qkv: Spec
    groups: int  # of samples that share weights
    tables: int
    positions: int  # rows of a table
    turned: int  # pairs of a head that are turned, 0 without rotation

    @property
    def samples(self) -> tuple[int, int]:
        """Samples that share weights, and samples that share a table."""
        B = self.qkv.shape[0]
        return B // self.groups, B // self.tables

    def rows(self, width: int) -> int:
        """Rows of a group."""
        _, L, _, H, d = self.qkv.shape
        return self.samples[0] * L * (H * d // width)


def streams_of(a) -> tuple[Stream, ...]:
    found = []
    for qkv, weight, cos in zip(a.qkv, a.q_weight, a.cos, strict=True):
        table = (1, 1, 0) if cos is None else (max(1, groups(cos, 2)), cos.shape[-2], cos.shape[-1])
        found.append(Stream(spec(qkv), groups(weight, 1), *table))
    return tuple(found)


def stream_inputs(a) -> tuple:
    """Weights, tables and positions; an absent one is replaced by an array that the kernel does not read."""
    present = lambda xs: tuple(w if x is None else x for x, w in zip(xs, a.q_weight, strict=True))
    return (*a.q_weight, *a.k_weight, *present(a.cos), *present(a.sin), a.q_weight[0] if a.start_pos is None else a.start_pos)


def constants(streams: tuple[Stream, ...], over: str, eps: float, started: bool, layout: str, pairs_at_once: int) -> dict:
    _, _, _, H, d = streams[0].qkv.shape
    width = H * d if over == "width" else d
    pairs = next_power_of_2(width // 2)
    per_stream = {name_of("TURNEDS_", i): s.turned for i, s in enumerate(streams)}
    per_stream |= {name_of("POSITIONS_", i): s.positions for i, s in enumerate(streams)}
    return dict(
        WIDTH=width,
        ROWS_PER_TOKEN=H * d // width,
        WIDTH_HEAD=d,
        EPS=eps,
        STARTED=started,
        INTERLEAVED=layout == "interleaved",
        **per_stream,
        ROWS=max(1, pairs_at_once // pairs),
        PAIRS=pairs,
    )


def sizes(streams: tuple[Stream, ...], programs: tuple[int, ...], **more: tuple[int, ...]) -> dict[str, int]:
    samples, table_samples = zip(*(s.samples for s in streams), strict=True)
    lengths = tuple(s.qkv.shape[1] for s in streams)
    return integers(LENGTHS=lengths, PROGRAMS=programs, SAMPLES=samples, TABLE_SAMPLES=table_samples, **more)


@remembered
def fwd_plan(
    streams: tuple[Stream, ...], over: str, eps: float, started: bool, layout: str, q_scale: float, key_masks: tuple[bool, ...]
) -> Plan:
    meta = constants(streams, over, eps, started, layout, 512) | dict(Q_SCALE=q_scale)
    meta |= {name_of("KEY_MASKS_", i): x for i, x in enumerate(key_masks)}
    programs = tuple(s.groups * cdiv(s.rows(meta["WIDTH"]), meta["ROWS"]) for s in streams)
    outs = tuple(Spec((B, L, H, d), dtype) for (B, L, _, H, d), dtype in (s.qkv for s in streams))
    return Plan(
        over_streams(qk_norm_rope_fwd_body, len(streams)),
        grid=(sum(programs),),
        outs=outs + outs,
        ints=sizes(streams, programs),
        meta=meta,
        warps=min(16, max(1, meta["ROWS"] * meta["PAIRS"] // 256)),  # 16 elements a thread
    )


@remembered
def bwd_plan(
    target: Target,
    streams: tuple[Stream, ...],
    over: str,
    eps: float,
    started: bool,
    layout: str,
    values: tuple[bool, ...],
    key_masks: tuple[bool, ...],
) -> Plan:
    meta = constants(streams, over, eps, started, layout, 512)
    meta |= {name_of("VALUES_", i): x for i, x in enumerate(values)}
    meta |= {name_of("KEY_MASKS_", i): x for i, x in enumerate(key_masks)}
    blocks = [cdiv(s.rows(meta["WIDTH"]), meta["ROWS"]) for s in streams]
    # As many programs as the GPU holds at once where rows are short, so that few partial sums are left to add.
    per_chunk = max(1, cdiv(sum(s.groups * b for s, b in zip(streams, blocks, strict=True)), 6 * target.sms))
    chunks = tuple(cdiv(b, per_chunk) for b in blocks)
    parts = tuple(Spec((s.groups, c, meta["WIDTH"]), "float32") for s, c in zip(streams, chunks, strict=True))
    programs = tuple(s.groups * c for s, c in zip(streams, chunks, strict=True))
    return Plan(
        over_streams(qk_norm_rope_bwd_body, len(streams)),
        grid=(sum(programs),),
        outs=(*(s.qkv for s in streams), *parts, *parts),
        ints=sizes(streams, programs, CHUNKS=chunks, BLOCKS=(per_chunk,) * len(streams)),
        meta=meta,
        warps=min(16, max(1, meta["ROWS"] * meta["PAIRS"] // 256)),  # 16 elements a thread
    )


@remembered
def weights_plan(parts: tuple[Spec, ...], outs: tuple[Spec, ...]) -> Plan:
    """outs: gradients of q_weight of every stream, then of k_weight."""
    _, _, width = parts[0].shape
    cols = 8  # many programs of many rows: a thousand are to be added
    programs = tuple(2 * part.shape[0] * cdiv(width, cols) for part in parts)
    return Plan(
        over_streams(qk_norm_rope_bwd_weights_body, len(parts)),
        grid=(sum(programs),),
        outs=outs,
        ints=integers(PROGRAMS=programs, CHUNKS=tuple(part.shape[1] for part in parts)),
        meta=dict(WIDTH=width, ROWS=256, COLS=cols),
        warps=8,
    )


def norm_forward(run, a, key_masks, *, over: str, eps: float, layout: str, q_scale: float = 1.0):
    """q of every stream, and k of every stream."""
    masked = tuple(m is not None for m in key_masks)
    plan = fwd_plan(streams_of(a), over, eps, a.start_pos is not None, layout, q_scale, masked)
    instead = (x if m is None else m for m, x in zip(key_masks, a.qkv, strict=True))
    outs = run(plan, *a.qkv, *stream_inputs(a), *instead)
    return tuple(outs[: len(a.qkv)]), tuple(outs[len(a.qkv) :])


def norm_backward(run, a, dq, dk, dv, key_masks, *, over: str, eps: float, layout: str) -> dict:
    """Gradients of qkv, q_weight and k_weight of every stream; dv[i] None where v has no gradient of its own."""
    n = len(a.qkv)
    values, masked = tuple(x is not None for x in dv), tuple(m is not None for m in key_masks)
    plan = bwd_plan(run.target, streams_of(a), over, eps, a.start_pos is not None, layout, values, masked)
    instead = lambda xs: tuple(d if x is None else x for x, d in zip(xs, dq, strict=True))
    outs = run(plan, *a.qkv, *dq, *dk, *instead(dv), *stream_inputs(a), *instead(key_masks))
    dqkv, parts = outs[:n], outs[n:]
    plan = weights_plan(tuple(map(spec, parts[:n])), tuple(map(spec, (*a.q_weight, *a.k_weight))))
    weights = run(plan, *parts)
    return dict(qkv=tuple(dqkv), q_weight=tuple(weights[:n]), k_weight=tuple(weights[n:]))


def infer(a, **_):
    outs = tuple(Spec((x.shape[0], x.shape[1], x.shape[3], x.shape[4]), spec(x).dtype) for x in a.qkv)
    return outs + outs, ()


def forward(run, a, **static):
    q, k = norm_forward(run, a, (None,) * len(a.qkv), **static)
    return q + k, ()


def backward(run, a, outs, extras, douts, **static):
    n = len(a.qkv)
    return norm_backward(run, a, douts[:n], douts[n:], (None,) * n, (None,) * n, **static)


def rotate(xp, x, cos, sin, start_pos, layout: str):
    """x (B, L, H, d) turned by the table's rows start_pos + 0, 1, ...; positions are clamped to the table."""
    B, L = x.shape[:2]
    if not B:
        return x
    turned = cos.shape[-1]
    last = cos.shape[-2] - 1
    at = xp.arange(L, like=cos)[None]
    if start_pos is not None:  # clamped before the addition too, which may leave the dtype's range
        at = xp.clip(start_pos, -L, last)[:, None] + xp.arange(L, like=start_pos)[None]
    at = xp.clip(at, 0, last)
    if len(cos.shape) == 2:
        c, s = (wide(t)[at][:, :, None] for t in (cos, sin))  # (1 or B, L, 1, turned)
    else:
        T = cos.shape[0]
        at = xp.broadcast_to(at, (B, L)).reshape(T, B // T * L)
        group = xp.arange(T, like=cos)[:, None]
        c, s = (wide(t)[group, at].reshape(B, L, 1, turned) for t in (cos, sin))
    x, rest = x[..., : 2 * turned], x[..., 2 * turned :]
    if layout == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
        y = xp.stack([a * c - b * s, a * s + b * c], axis=-1).reshape(x.shape)
    else:
        a, b = x[..., :turned], x[..., turned:]
        y = xp.concatenate([a * c - b * s, a * s + b * c], axis=-1)
    return xp.concatenate([y, rest], axis=-1) if rest.shape[-1] else y


def norm_reference(xp, x, weight, cos, sin, start_pos, *, over: str, eps: float, layout: str):
    """RMSNorm and rotation of x (B, L, H, d), wide."""
    B, L, H, d = x.shape
    x, weight = wide(x), cast(weight, widest(x))
    x = x.reshape(B, L, 1, H * d) if over == "width" else x
    x = norm(xp, x, eps=eps, center=False)
    if len(weight.shape) == 2:
        weight = ungrouped(xp, weight, B)[:, None, None]
    x = (x * weight).reshape(B, L, H, d)
    return x if cos is None else rotate(xp, x, cos, sin, start_pos, layout)


def reference(xp, a, **static):
    """q of every stream, then k of every stream."""
    outs = []
    for part, weights in ((0, a.q_weight), (1, a.k_weight)):
        for qkv, weight, cos, sin in zip(a.qkv, weights, a.cos, a.sin, strict=True):
            y = norm_reference(xp, qkv[:, :, part], weight, cos, sin, a.start_pos, **static)
            outs.append(cast(y, spec(qkv).dtype))
    return tuple(outs)


qk_norm_rope_op = Op(
    "qk_norm_rope",
    operands=("qkv", "q_weight", "k_weight", "cos", "sin", "start_pos"),
    infer=infer,
    forward=forward,
    backward=backward,
    reference=reference,
    keeps=frozenset({"qkv", "q_weight", "k_weight", "cos", "sin", "start_pos"}),
    constant=frozenset({"cos", "sin", "start_pos"}),
    shared={"q_weight": 1, "k_weight": 1, "cos": 2, "sin": 2},
)


def check_tables(op: str, named_cos: tuple, named_sin: tuple, packed: tuple[int, ...]) -> None:
    """Tables of a stream of packed projections of shape `packed`. Kernels index both by cos's sizes."""
    (cos_name, cos), (sin_name, sin) = named_cos, named_sin
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError(
            f"{op}: only one of {cos_name} and {sin_name} is given; expected both or neither. Give both to rotate the stream."
        )
    B, L, _, _, d = packed
    remedy = (
        "The table has a row for every position, at least one per token, and a column for every pair that is turned, at most d/2."
    )
    check.rank(op, cos_name, cos, ("S, d/2", "B, S, d/2"), remedy)
    S, r = cos.shape[-2:]
    if check.comparable(S, L):  # otherwise positions are clamped to the table
        S = max(S, L)
    want = (S, max(1, min(r, d // 2)) if check.comparable(r) else d // 2)
    check.shape(op, cos_name, cos, ("S, d/2", want), ("B, S, d/2", (B, *want)), remedy=remedy)
    axes = "S, d/2" if len(cos.shape) == 2 else "B, S, d/2"
    check.shape(op, sin_name, sin, (axes, tuple(cos.shape)), remedy=f"{sin_name} has the shape of {cos_name}.")
    for name, t in ((cos_name, cos), (sin_name, sin)):
        check.same_dtype(op, name, t, "float32", "the table")


def norm_operands(op: str, qkv, q_weight, k_weight, over, eps, cos, sin, start_pos, layout, start_extent):
    """Checked operands and static arguments of the norm and rotation."""
    streams = check.streams(op, "qkv", qkv)
    for name, x in streams:
        remedy = "Reshape the projection to (batch, tokens, 3, heads, head width), q, k, v in this order."
        check.rank(op, name, x, "B, L, 3, H, d", remedy)
    check.choice(op, "over", over, ("width", "head"))
    check.choice(op, "layout", layout, ("interleaved", "half"))
    like = ("qkv", len(streams))
    q_weights, k_weights, cosines, sines = (
        check.streams(op, name, x, like)
        for name, x in (("q_weight", q_weight), ("k_weight", k_weight), ("cos", cos), ("sin", sin))
    )
    first, x = streams[0]
    dtype = check.floating(op, first, x)
    B, _, _, H, d = x.shape
    check.head_width(op, f"the head width of {first}", d)
    check.row_width(op, f"the width of {first}, heads * head width,", H * d)
    width = H * d if over == "width" else d
    for (name, x), weights, *tables in zip(streams, zip(q_weights, k_weights, strict=True), cosines, sines, strict=True):
        want = (B, x.shape[1], 3, H, d)
        check.shape(op, name, x, ("B, L, 3, H, d", want), remedy="All streams share the batch, the heads and the head width.")
        check.same_dtype(op, name, x, dtype, first)
        check.addressable(op, name, x, 3)
        for w_name, w in weights:
            check.shape(op, w_name, w, ("W", (width,)), remedy=f'over="{over}" normalises {width} elements together.')
            check.beside(op, w_name, w, dtype, "qkv")
        check_tables(op, *tables, x.shape)
    if start_pos is not None:
        check.shape(op, "start_pos", start_pos, ("B", (B,)), remedy="Give one start position per sample.")
        check.integer(op, "start_pos", start_pos)
        for (_, x), (_, t) in zip(streams, cosines, strict=True):
            if t is not None:
                check.positions(op, start_extent, x.shape[1], t.shape[-2])
    each = dict(qkv=streams, q_weight=q_weights, k_weight=k_weights, cos=cosines, sin=sines)
    operands = {name: tuple(x for _, x in entries) for name, entries in each.items()}
    return operands | dict(start_pos=start_pos), dict(over=over, eps=check.eps(op, eps), layout=layout)


def qk_norm_rope(
    qkv: Streams,
    q_weight: Streams,
    k_weight: Streams,
    *,
    over: str,
    eps: float = 1.1920929e-7,
    cos: Streams | None = None,
    sin: Streams | None = None,
    start_pos: Array | None = None,
    layout: str = "interleaved",
    start_extent: tuple[int, int] | None = None,
) -> Call:
    """q, k = RoPE(RMSNorm(q) * q_weight), RoPE(RMSNorm(k) * k_weight) for each stream of packed projections.

    qkv        (B, L_s, 3, H, d) per stream, all float32, bfloat16 or float16; d a multiple of 8, 8 to 128.
    q_weight   (H * d,) per stream for over="width", (d,) for over="head"; any of these dtypes. k_weight likewise.
    over       "width" normalises all heads together, before the head split; "head" each head by itself.
    eps        added to the mean square, 0 or more; the default is what torch.nn.RMSNorm(eps=None) means. With 0 the norm of zeros
               is 0, and so is its gradient.
    cos, sin   (S, d/2), or (B, S, d/2) for a table per sample, float32, per stream: row p holds the angles of position p; None
               for a stream that is not rotated.
               With r < d/2 columns the first 2r elements of a head are turned and the others are not (partial rotation).
    start_pos  (B,) int32: position of each sample's first token, 0 where absent. Positions beyond the table raise where they
               can be seen, in CPU values, and are clamped to it where they cannot, on a device or under trace.
    layout     pairs are elements (2i, 2i + 1) of a head ("interleaved") or (i, i + r) ("half"), r the columns of the table.
    returns    (q, k), each a tuple over streams of (B, L_s, H, d) in qkv's dtype (docs/dtypes.md), or an array where qkv is one.

    A single array is one stream. float32 arithmetic, rounded once. Raises ValueError or TypeError that names the argument.
    QK-norm: Henry et al. 2020, arXiv:2010.04245. RoPE: Su et al. 2021, arXiv:2104.09864. Mind that half-split and
    interleaved RoPE differ only by a permutation of the head, but weights trained for one are wrong for the other.
    """
    operands, static = norm_operands(
        "qk_norm_rope", qkv, q_weight, k_weight, over, eps, cos, sin, start_pos, layout, start_extent
    )
    n = len(operands["qkv"])
    single = not isinstance(qkv, tuple | list)
    result = lambda outs: (outs[0], outs[1]) if single else (tuple(outs[:n]), tuple(outs[n:]))
    return Call(qk_norm_rope_op, operands, tuple(static.items()), result)
