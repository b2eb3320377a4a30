"""Backward kernels of joint attention: delta, then dq per block of queries, then dk and dv per block of keys; and what the one
for Hopper needs besides: lse and delta in parts, locks, and the rounding of dq."""

from __future__ import annotations

from .._triton import tl, triton
from ..dots import for_dot
from .tokens import (
    EMPTY,
    accumulate,
    allowed,
    awake,
    kept,
    kept_range,
    load_head,
    load_queries,
    pair_sum,
    piece_of,
    place,
    power,
    products,
    stream_of,
    zero_head,
)

PAD: tl.constexpr = tl.constexpr(128)  # rows of statistics are padded to a multiple of this, so that no load of them is masked
PARTS: tl.constexpr = tl.constexpr(16)  # columns of lse and delta in parts: what a product takes at least; six are used


@triton.jit
def padded(length, EXACT: tl.constexpr):
    return length + 0 if EXACT else tl.cdiv(length, PAD) * PAD


@triton.jit
def store_statistics(ptr, row, token, reach, shift, delta, inside, EXACT: tl.constexpr):
    """What a score's gradient needs of its row: delta; or minus the shift and minus delta, side by side, since a pair is
    fetched by one load and nothing is left to do to them for each tile.

    `row` counts (sample, head) pairs, each of which has `reach` tokens."""
    delta = tl.where(shift == EMPTY, 0.0, delta)
    if EXACT:
        tl.store(ptr + row * reach + token, delta, mask=inside)
    else:
        pair = 2 * (row * reach + token)[:, None] + tl.arange(0, 2)[None, :]
        tl.store(ptr + pair, tl.join(-shift, -delta), mask=inside[:, None])


@triton.jit
def part(x, NUMBER: tl.constexpr):
    """The first, second or third of three numbers of bfloat16 that add up to x."""
    for _ in tl.static_range(NUMBER):
        x -= x.to(tl.bfloat16).to(tl.float32)
    return x.to(tl.bfloat16)


@triton.jit
def store_parts(ptr, row, token, reach, shift, delta, inside, SCALE: tl.constexpr):
    """Three parts of minus the shift divided by SCALE, then of minus delta, then zeros. An empty row's shift is finite, as it
    may be multiplied by 0, and large enough for P to be 0."""
    far: tl.constexpr = -3e38 if SCALE > 0 else 3e38
    start = tl.where(shift == EMPTY, far, -shift / SCALE)
    minus_delta = tl.where(shift == EMPTY, 0.0, -delta)
    cols = tl.arange(0, PARTS)[None, :]
    x = tl.zeros((row.shape[0], PARTS), tl.bfloat16)
    for i in tl.static_range(3):
        x = tl.where(cols == i, part(start, i)[:, None], x)
        x = tl.where(cols == 3 + i, part(minus_delta, i)[:, None], x)
    tl.store(ptr + (row * reach + token)[:, None] * PARTS + cols, x, mask=inside[:, None])


@triton.jit
def attention_delta_body(
    o_ptrs,  # (B, L_s, H, d)
    do_ptrs,  # (B, L_s, H, d)
    lse_ptrs,  # (B, H, L_s) float32, as the forward wrote it
    dlse_ptrs,  # (B, H, L_s) float32
    delta_ptrs,  # (B, H, padded L_s, 2) float32; EXACT: (B, H, L_s); LOCK_TOKENS: (B, H, padded L_s, PARTS) bfloat16
    locks_ptr,  # LOCK_TOKENS: (1 + B * H * blocks of LOCK_TOKENS tokens,) int32, set to 0
    LENGTHS,
    HEADS,
    WIDTH,
    SHIFTED,  # whether dlse is given
    EXACT,
    LOCK_TOKENS,  # for joint_attention_hopper_bwd_body: tokens of a block of dq, which has a lock; else 0
    SCALE,  # likewise: its own, by which a shift is divided
    ROWS,
    COLS,
):
    """Grid (B * blocks of ROWS (token, head) rows over all streams,): delta = sum(o * do) - dlse, 0 for an empty row.

    Locks are set to 0, 32 a program, which are more than there are: a program has 16 rows or more, a lock as many or more.
    """
    blocks = 0
    for t in tl.static_range(len(o_ptrs)):
        blocks += tl.cdiv(padded(LENGTHS[t], EXACT) * HEADS, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if LOCK_TOKENS:
        locks = 0
        for t in tl.static_range(len(o_ptrs)):
            locks += tl.cdiv(LENGTHS[t], LOCK_TOKENS)
        lock = tl.program_id(0) * 32 + tl.arange(0, 32)
        tl.store(locks_ptr + lock, 0, mask=lock <= tl.num_programs(0) // blocks * HEADS * locks)
    for t in tl.static_range(len(o_ptrs)):
        reach = padded(LENGTHS[t], EXACT)
        here = tl.cdiv(reach * HEADS, ROWS)
        if (block >= 0) & (block < here):
            row = block * ROWS + tl.arange(0, ROWS)
            cols = tl.arange(0, COLS)
            real = row < LENGTHS[t] * HEADS
            inside = real[:, None] & (cols < WIDTH)[None, :]
            at = batch * LENGTHS[t] * HEADS * WIDTH + row[:, None] * WIDTH + cols[None, :]
            if EXACT:
                delta = tl.zeros((ROWS,), tl.float32)
            else:
                o = tl.load(o_ptrs[t] + at, mask=inside, other=0.0).to(tl.float32)  # [ROWS, COLS]
                do = tl.load(do_ptrs[t] + at, mask=inside, other=0.0).to(tl.float32)
                delta = tl.sum(o * do, 1)
            at = (batch * HEADS + row % HEADS) * LENGTHS[t] + row // HEADS
            if SHIFTED:
                delta -= tl.load(dlse_ptrs[t] + at, mask=real, other=0.0)
            shift = tl.load(lse_ptrs[t] + (2 * at if EXACT else at), mask=real, other=EMPTY)
            pair, token = batch * HEADS + row % HEADS, row // HEADS
            there = row < reach * HEADS
            if LOCK_TOKENS:
                store_parts(delta_ptrs[t], pair, token, reach, shift, delta, there, SCALE)
            else:
                store_statistics(delta_ptrs[t], pair, token, reach, shift, delta, there, EXACT)
        block -= here


@triton.jit
def load_row_statistics(lse_ptr, delta_ptr, row, query, length, EXACT: tl.constexpr):
    """Minus what a row's scores are shifted by, P's factor besides, and minus delta; `row` counts (sample, head) pairs."""
    if EXACT:
        at = row * length + query
        inside = query < length
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        shift = tl.load(lse_ptr + 2 * at, mask=inside, other=EMPTY)
        factor = tl.div_rn(tl.full(query.shape, 1.0, tl.float32), tl.load(lse_ptr + 2 * at + 1, mask=inside, other=1.0))
        return -shift, factor, -delta
    else:
        pair = tl.load(delta_ptr + 2 * (row * padded(length, EXACT) + query)[:, None] + tl.arange(0, 2)[None, :])
        minus_shift, minus_delta = tl.split(pair)
        return minus_shift, minus_shift, minus_delta


@triton.jit
def probabilities(s, minus_shift, factor, SCALE: tl.constexpr, EXACT: tl.constexpr):
    """The softmax of a tile of scores; `minus_shift` and `factor` broadcast to it."""
    if EXACT:
        return power(s * SCALE + minus_shift, EXACT) * factor
    else:
        return tl.exp2(tl.fma(s, tl.full(s.shape, SCALE, tl.float32), tl.broadcast_to(minus_shift, s.shape)))


@triton.jit
def products_from(start, x, y, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """start + x y^T of two heads' [ROWS, COLS]; start broadcasts to the tile."""
    if EXACT:
        return products(x, y, PRECISION, EXACT) + start
    else:
        s = tl.broadcast_to(start, (x[0].shape[0], y[0].shape[0]))
        for i in tl.static_range(len(x)):
            s = tl.dot(x[i], tl.trans(y[i]), s, input_precision=PRECISION)
        return s


@triton.jit
def gather_queries(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, mask_ptr, rows_ptr, cols_ptr, batch, row,
    i, t, query, keep, key, length, first_length, q_stride, do_stride,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dk and dv [KEYS, COLS] with what one block of queries adds; scores are held transposed, [KEYS, QUERIES].

    keep: the queries to read [QUERIES]; the others have P = 0, or read as 0.
    """
    dtype: tl.constexpr = v[0].dtype
    q = load_head(q_ptr, batch, query, length, q_stride, keep, dtype, PRECISION, WIDTH, COLS, False)  # [QUERIES, COLS]
    do = load_head(do_ptr, batch, query, length, do_stride, keep, dtype, PRECISION, WIDTH, COLS, False)
    minus_shift, factor, minus_delta = load_row_statistics(lse_ptr, delta_ptr, row, query, length, EXACT)  # [QUERIES]
    p = probabilities(products(k, q, PRECISION, EXACT), minus_shift[None, :], factor[None, :], SCALE, EXACT)  # [KEYS, QUERIES]
    if CAUSAL or MASKED:
        valid = allowed(mask_ptr, rows_ptr, cols_ptr, batch, i, t, query[None, :], key[:, None], first_length, CAUSAL, MASKED)
        p = tl.where(valid, p, 0.0)
    dv = accumulate(dv, 1.0, for_dot(p.to(dtype), PRECISION), do, PRECISION, EXACT)
    ds = (p * products_from(minus_delta[None, :], v, do, PRECISION, EXACT)).to(dtype)
    dk = accumulate(dk, 1.0, for_dot(ds, PRECISION), q, PRECISION, EXACT)
    return dk, dv


@triton.jit
def joint_attention_bwd_dkdv_body(
    q_ptrs,
    k_ptrs,
    v_ptrs,
    key_mask_ptrs,
    mask_ptr,
    rows_ptr,
    cols_ptr,
    do_ptrs,  # (B, L_s, H, d)
    lse_ptrs,  # (B, H, L_s) float32, as the forward wrote it
    delta_ptrs,  # as attention_delta_body wrote it
    dk_ptrs,  # (B, L_s, H / GROUP, d)
    dv_ptrs,  # (B, L_s, H / GROUP, d)
    LENGTHS,
    Q_STRIDES_,
    K_STRIDES_,
    V_STRIDES_,
    V_AT,
    HEADS,
    GROUP,  # heads of q that share one of k and v
    WIDTH,
    SCALE,
    KEY_MASKS_,
    CAUSAL,
    MASKED,
    PRECISION,
    EXACT,
    DK_SCALE,  # of dS^T q: the softmax scale, or what undoes log2(e) in a folded q
    QUERIES,
    KEYS,
    COLS,
):
    """Grid (B * H / GROUP * blocks of KEYS tokens over all streams,): dk and dv of one block of keys, from every head of q that
    reads it."""
    kv_heads: tl.constexpr = HEADS // GROUP
    batch, head, block = place(LENGTHS, KEYS, kv_heads)
    t, k_ptr, length, k_stride, first = stream_of(block, k_ptrs, LENGTHS, K_STRIDES_, KEYS)
    _, v_ptr, _, v_stride, _ = stream_of(block, v_ptrs, LENGTHS, V_STRIDES_, KEYS)
    _, dk_ptr, _, _, _ = stream_of(block, dk_ptrs, LENGTHS, K_STRIDES_, KEYS)
    _, dv_ptr, _, _, _ = stream_of(block, dv_ptrs, LENGTHS, K_STRIDES_, KEYS)
    _, key_mask_ptr, _, key_masked, _ = stream_of(block, key_mask_ptrs, LENGTHS, KEY_MASKS_, KEYS)

    key = first + tl.arange(0, KEYS)
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    keep = key < length
    if key_masked:
        keep = kept(key_mask_ptr, batch, key, length, True)
    busy = awake(keep, key_masked)
    v = load_head(
        v_ptr + head * WIDTH + V_AT, batch, key, length, v_stride, keep, dtype, PRECISION, WIDTH, COLS, False
    )  # [KEYS, COLS]
    k = load_head(k_ptr + head * WIDTH, batch, key, length, k_stride, keep, dtype, PRECISION, WIDTH, COLS, False)
    dk = zero_head(KEYS, COLS)
    dv = zero_head(KEYS, COLS)
    for i in tl.static_range(len(q_ptrs)):
        lead, end, _ = kept_range(key_mask_ptrs[i], batch, LENGTHS[i], KEY_MASKS_[i])
        begin = 0
        if CAUSAL:
            begin = tl.where(i == t, first // QUERIES * QUERIES, 0)
        # Up to here no block holds a masked query before one that counts; it is the end if the mask is padding.
        plain = lead * busy
        if KEY_MASKS_[i]:
            plain = tl.where(end > lead, lead // QUERIES * QUERIES, lead) * busy
        for of_group in range(GROUP):
            query_head = head * GROUP + of_group
            q_ptr = q_ptrs[i] + query_head * WIDTH
            do_ptr = do_ptrs[i] + query_head * WIDTH
            row = batch * HEADS + query_head
            # P is 0 behind the last query that counts, so masks are for loads only and no block is peeled.
            for start in range(begin, plain, QUERIES):
                query = start + tl.arange(0, QUERIES)
                dk, dv = gather_queries(
                    dk, dv, k, v, q_ptr, do_ptr, lse_ptrs[i], delta_ptrs[i], mask_ptr, rows_ptr, cols_ptr,
                    batch, row, i, t, query, query < plain, key, LENGTHS[i], LENGTHS[0], Q_STRIDES_[i], HEADS * WIDTH,
                    SCALE, WIDTH, CAUSAL, MASKED, PRECISION, EXACT, COLS,
                )  # fmt: skip
            if KEY_MASKS_[i]:
                for start in range(tl.maximum(begin, plain), end * busy, QUERIES):
                    query = start + tl.arange(0, QUERIES)
                    rest = kept(key_mask_ptrs[i], batch, query, LENGTHS[i], True)
                    dk, dv = gather_queries(
                        dk, dv, k, v, q_ptr, do_ptr, lse_ptrs[i], delta_ptrs[i], mask_ptr, rows_ptr, cols_ptr,
                        batch, row, i, t, query, rest, key, LENGTHS[i], LENGTHS[0], Q_STRIDES_[i], HEADS * WIDTH,
                        SCALE, WIDTH, CAUSAL, MASKED, PRECISION, EXACT, COLS,
                    )  # fmt: skip
    for j in tl.static_range(len(dk)):
        at, inside = piece_of(batch, head, key, length, j, kv_heads, WIDTH, COLS)
        tl.store(dk_ptr + at, tl.where(keep[:, None], dk[j] * DK_SCALE, 0.0).to(dk_ptr.dtype.element_ty), mask=inside)
        tl.store(dv_ptr + at, tl.where(keep[:, None], dv[j], 0.0).to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gather_keys(
    acc, q, do, minus_shift, factor, minus_delta, k_ptr, v_ptr, key_mask_ptr, mask_ptr, rows_ptr, cols_ptr, batch,
    i, t, query, start, length, first_length, k_stride, v_stride,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, KEY_MASKED: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, TAIL: tl.constexpr,
    DELTA: tl.constexpr,
):  # fmt: skip
    """acc and what one block of keys adds to dq [QUERIES, COLS]; DELTA: to the sum of P * dP [QUERIES, 1]."""
    key = start + tl.arange(0, KEYS)
    dtype: tl.constexpr = do[0].dtype
    whole: tl.constexpr = not (TAIL or KEY_MASKED)
    keep = kept(key_mask_ptr, batch, key, length, KEY_MASKED)
    v = load_head(v_ptr, batch, key, length, v_stride, keep, dtype, PRECISION, WIDTH, COLS, whole)  # [KEYS, COLS]
    k = load_head(k_ptr, batch, key, length, k_stride, keep, dtype, PRECISION, WIDTH, COLS, whole)
    p = probabilities(products(q, k, PRECISION, EXACT), minus_shift[:, None], factor[:, None], SCALE, EXACT)  # [QUERIES, KEYS]
    if not whole:
        p = tl.where(keep[None, :], p, 0.0)
    if CAUSAL or MASKED:
        valid = allowed(mask_ptr, rows_ptr, cols_ptr, batch, i, t, query[:, None], key[None, :], first_length, CAUSAL, MASKED)
        p = tl.where(valid, p, 0.0)
    if DELTA:
        return (acc[0] + pair_sum(p * products(do, v, PRECISION, EXACT)),)
    else:
        ds = p * products_from(minus_delta[:, None], do, v, PRECISION, EXACT)
        return accumulate(acc, 1.0, for_dot(ds.to(dtype), PRECISION), k, PRECISION, EXACT)


@triton.jit
def joint_attention_bwd_dq_body(
    q_ptrs,
    k_ptrs,
    v_ptrs,
    key_mask_ptrs,
    mask_ptr,
    rows_ptr,
    cols_ptr,
    do_ptrs,
    lse_ptrs,
    delta_ptrs,
    dq_ptrs,  # (B, L_s, H, d)
    exact_delta_ptrs,  # (B, H, L_s) float32, written where EXACT
    LENGTHS,
    Q_STRIDES_,
    K_STRIDES_,
    V_STRIDES_,
    V_AT,
    HEADS,
    GROUP,
    WIDTH,
    SCALE,
    KEY_MASKS_,
    CAUSAL,
    MASKED,
    PRECISION,
    EXACT,
    DQ_SCALE,  # of dS k: the softmax scale
    QUERIES,
    KEYS,
    COLS,
):
    """Grid (B * H * blocks of QUERIES tokens over all streams,): dq of one block of queries."""
    batch, head, block = place(LENGTHS, QUERIES, HEADS)
    i, q_ptr, length, q_stride, first = stream_of(block, q_ptrs, LENGTHS, Q_STRIDES_, QUERIES)
    _, do_ptr, _, _, _ = stream_of(block, do_ptrs, LENGTHS, Q_STRIDES_, QUERIES)
    _, dq_ptr, _, _, _ = stream_of(block, dq_ptrs, LENGTHS, Q_STRIDES_, QUERIES)
    _, lse_ptr, _, _, _ = stream_of(block, lse_ptrs, LENGTHS, Q_STRIDES_, QUERIES)
    _, delta_ptr, _, _, _ = stream_of(block, delta_ptrs, LENGTHS, Q_STRIDES_, QUERIES)
    _, query_mask_ptr, _, query_masked, _ = stream_of(block, key_mask_ptrs, LENGTHS, KEY_MASKS_, QUERIES)

    dtype: tl.constexpr = do_ptr.dtype.element_ty
    query, keep, q = load_queries(
        q_ptr + head * WIDTH, query_mask_ptr, batch, first, length, q_stride, query_masked, dtype, PRECISION, WIDTH, QUERIES, COLS
    )
    busy = awake(keep, query_masked)
    do = load_head(do_ptr + head * WIDTH, batch, query, length, HEADS * WIDTH, keep, dtype, PRECISION, WIDTH, COLS, False)
    minus_shift, factor, minus_delta = load_row_statistics(lse_ptr, delta_ptr, batch * HEADS + head, query, length, EXACT)
    for DELTA in tl.static_range(1 if EXACT else 0, -1, -1):
        acc = zero_head(QUERIES, 1 if DELTA else COLS)
        for t in tl.static_range(len(k_ptrs)):
            k_ptr = k_ptrs[t] + head // GROUP * WIDTH
            v_ptr = v_ptrs[t] + head // GROUP * WIDTH + V_AT
            lead, end, _ = kept_range(key_mask_ptrs[t], batch, LENGTHS[t], KEY_MASKS_[t])
            if CAUSAL:
                end = tl.where(i == t, tl.minimum(end, first + QUERIES), end)
            end = end * busy
            full = tl.minimum(lead, end) // KEYS * KEYS
            for start in range(0, full, KEYS):
                acc = gather_keys(
                    acc, q, do, minus_shift, factor, minus_delta, k_ptr, v_ptr, key_mask_ptrs[t], mask_ptr, rows_ptr, cols_ptr,
                    batch, i, t, query, start, LENGTHS[t], LENGTHS[0], K_STRIDES_[t], V_STRIDES_[t],
                    SCALE, WIDTH, False, CAUSAL, MASKED, PRECISION, EXACT, KEYS, COLS, False, DELTA,
                )  # fmt: skip
            # The tail, and with a key mask all that follows the first masked key.
            for start in tl.range(full, end, KEYS, num_stages=1):
                acc = gather_keys(
                    acc, q, do, minus_shift, factor, minus_delta, k_ptr, v_ptr, key_mask_ptrs[t], mask_ptr, rows_ptr, cols_ptr,
                    batch, i, t, query, start, LENGTHS[t], LENGTHS[0], K_STRIDES_[t], V_STRIDES_[t],
                    SCALE, WIDTH, KEY_MASKS_[t], CAUSAL, MASKED, PRECISION, EXACT, KEYS, COLS, True, DELTA,
                )  # fmt: skip
        if DELTA:
            _, exact_delta_ptr, _, _, _ = stream_of(block, exact_delta_ptrs, LENGTHS, Q_STRIDES_, QUERIES)
            minus_delta -= tl.max(acc[0], 1)
            tl.store(exact_delta_ptr + (batch * HEADS + head) * length + query, -minus_delta, mask=query < length)
    for j in tl.static_range(len(acc)):
        at, inside = piece_of(batch, head, query, length, j, HEADS, WIDTH, COLS)
        tl.store(dq_ptr + at, (acc[j] * DQ_SCALE).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def attention_round_body(
    x_ptrs,  # (B, L_s, H, d) float32
    rounded_ptrs,  # (B, L_s, H, d)
    LENGTHS,
    HEADS,
    WIDTH,
    SIZE,
):
    """Grid (B * blocks of SIZE numbers over all streams,): x in another dtype."""
    blocks = 0
    for t in tl.static_range(len(x_ptrs)):
        blocks += tl.cdiv(LENGTHS[t] * HEADS * WIDTH, SIZE)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    for t in tl.static_range(len(x_ptrs)):
        each = LENGTHS[t] * HEADS * WIDTH
        here = tl.cdiv(each, SIZE)
        if (block >= 0) & (block < here):
            at = block * SIZE + tl.arange(0, SIZE)
            x = tl.load(x_ptrs[t] + batch * each + at, mask=at < each)
            tl.store(rounded_ptrs[t] + batch * each + at, x.to(rounded_ptrs[t].dtype.element_ty), mask=at < each)
        block -= here
